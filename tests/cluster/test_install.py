"""`podwall install` and `podwall uninstall` on the real cluster, as a person runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import cluster, kube
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.test_uninstall import left

PODWALL = [sys.executable, "-m", "agent.cli.main"]
SITE = Path(__file__).parents[2]


def podwall(*words: str, expect: int = 0) -> str:
    done = subprocess.run(
        [*PODWALL, *words, "--kubeconfig", str(cluster.kubeconfig())],
        cwd=SITE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def put_back(real_cluster: Settings) -> Iterator[None]:
    """The cluster as the other tests want it, whatever becomes of this one."""
    try:
        yield
    finally:
        # Pods that lost their network with podwall do not get it back: these are made again.
        cluster.kubectl("-n", "kube-system", "delete", "pods", "--selector=k8s-app=kube-dns", "--wait=false")
        (cluster.state() / "manifest.json").write_text("")  # the agents start again with the site's settings
        cluster.up(real_cluster)


def settings() -> dict[str, object]:
    (found,) = kube.get("configmap/podwall", "--namespace=kube-system")
    read: dict[str, object] = yaml.safe_load(found["data"]["config.yaml"])
    return read


def test_removed_and_installed_again(put_back: None) -> None:
    told = podwall("uninstall", "--yes").splitlines()
    nodes = cluster.nodes()
    for node in nodes:
        (said,) = [line for line in told if line.startswith(f"{node}: removed ")]
        assert said.endswith("; nothing of podwall is left")
        assert left(node) == []
    assert told[-1] == "leases of podwall deleted"

    told = podwall("install").splitlines()
    assert "daemonset.apps/podwall created" in told
    assert f"{len(nodes)} of {len(nodes)} agents ready" in told
    assert told[-1] == f"{len(nodes)} of {len(nodes)} nodes Ready"

    told = podwall("install").splitlines()
    assert {line.split()[1] for line in told if "/" in line} == {"unchanged"}

    podwall("install", "--set", "log_level=debug")
    assert settings()["log_level"] == "debug"
    podwall("install")
    assert settings()["log_level"] == "debug"


def test_beside_another_network_it_refuses(real_cluster: Settings) -> None:
    name = "kindnet-of-a-test"
    labels = {"app": name}
    pod = {
        "containers": [{"name": "c", "image": "none.invalid/none:1"}],
        "tolerations": [{"operator": "Exists"}],
    }
    other = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    before = kube.get("daemonset/podwall", "--namespace=kube-system")[0]["metadata"]["generation"]
    kube.apply(other)
    try:
        wait_for(
            "the DaemonSet to count its nodes",
            lambda: kube.get(f"daemonset/{name}")[0]["status"]["desiredNumberScheduled"],
            limit=30,
        )
        podwall("install", expect=1)
    finally:
        kube.delete(other)
    assert kube.get("daemonset/podwall", "--namespace=kube-system")[0]["metadata"]["generation"] == before
