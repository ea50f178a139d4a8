"""`podwall bugreport` of the real cluster: everything is in it, and nobody's secrets."""

from __future__ import annotations

import base64
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cluster, contents, kube
from tests.cluster.cluster import Settings

NAMESPACE = "careless"
SECRETS = [f"planted-{number}-9d2c" for number in range(4)]


@pytest.fixture(scope="module")
def members(real_cluster: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    encoded = base64.b64encode(SECRETS[0].encode()).decode()
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": NAMESPACE},
        "data": {"password": encoded},
    }
    container = {
        "name": "c",
        "image": contents.agnhost_name(),
        "args": ["pause"],
        "env": [{"name": "INNOCENT", "value": SECRETS[1]}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": NAMESPACE, "annotations": {"example.com/note": SECRETS[2]}},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
    }
    setting = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "other", "namespace": "kube-system"},
        "data": {"token": SECRETS[3]},
    }
    target = tmp_path_factory.mktemp("report") / "r.tar.gz"
    command = [sys.executable, "-m", "agent.cli.main", "bugreport", "-O", str(target)]
    command += ["--kubeconfig", str(cluster.kubeconfig())]
    kube.apply(setting)
    try:
        with kube.running([NAMESPACE], secret, pod):
            subprocess.run(
                command, cwd=Path(__file__).parents[2], check=True, capture_output=True, timeout=120
            )
    finally:
        kube.delete(setting)
    with tarfile.open(target) as tar:
        found = {each.name: tar.extractfile(each) for each in tar}
        yield {
            name.removeprefix("podwall-bugreport/"): member.read().decode()
            for name, member in found.items()
            if member
        }


def test_every_node_and_kind_is_in_it(members: dict[str, str]) -> None:
    for node in cluster.nodes():
        for part in ("status.json", "doctor.json", "rules.txt", "links.txt", "routes.txt", "log.txt"):
            assert f"nodes/{node}/{part}" in members
    for kind in ("Node", "Pod", "Service", "EndpointSlice", "DaemonSet", "ConfigMap"):
        assert f"objects/{kind}.jsonl" in members
    assert members.get("missing.txt", "") == ""
    assert '"v1.' in members["versions.json"]


def test_no_secret_is_in_it(members: dict[str, str]) -> None:
    planted = [*SECRETS, base64.b64encode(SECRETS[0].encode()).decode()]
    for name, text in members.items():
        for secret in planted:
            assert secret not in text, name
        assert "PRIVATE KEY" not in text, name
