"""`podwall status` and `podwall get` through the API server: every agent is asked by exec in its Pod."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster import cluster, kube
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for

PODWALL = Path(sys.executable).parent / "podwall"
LIMIT_S = 90


def podwall(*words: str) -> subprocess.CompletedProcess[str]:
    command = [PODWALL, *words, "--kubeconfig", cluster.kubeconfig()]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_S)


def read(*words: str) -> Any:
    done = podwall(*words, "-o", "json")
    assert done.returncode == 0, done.stdout[:2000] + done.stderr
    return json.loads(done.stdout)


def nodes() -> set[str]:
    return {node["metadata"]["name"] for node in kube.get("nodes")}


def test_every_node_is_proved_well(real_cluster: Settings) -> None:
    done = podwall("status", "--wait", "--timeout", "60s")
    assert done.returncode == 0, done.stdout + done.stderr
    said = read("status")
    assert said["well"], said["findings"]
    assert {node["node"] for node in said["nodes"]} == nodes()
    for node in said["nodes"]:
        assert {path["node"] for path in node["paths"]["paths"]} == nodes() - {node["node"]}
        assert all(path["ok"] for path in node["paths"]["paths"])
        assert node["rules"] == {**node["rules"], "compared": True, "altered": 0}
        assert {watch["kind"] for watch in node["status"]["watches"]} >= {"Pod", "Service", "NetworkPolicy"}
        assert all(watch["synced"] and not watch["error"] for watch in node["status"]["watches"])
        assert all(each["there"] for each in node["features"]["features"] if each["matters"])


def test_what_the_agents_hold_is_what_the_cluster_says(real_cluster: Settings) -> None:
    expected = {
        (pod["metadata"]["namespace"], pod["metadata"]["name"], pod["spec"]["nodeName"])
        for pod in kube.get("pods", "-n", "kube-system", "-l", "k8s-app=kube-dns")
    }
    held = {
        (of["namespace"], of["name"], of["node"]) for of in read("get", "pods", "-n", "kube-system")["items"]
    }
    assert expected <= held
    (dns,) = read("get", "services", "kube-dns", "-n", "kube-system")["items"]
    assert set(dns["nodes"]) == nodes()
    (address,) = {tuple(dns["cluster_ips"])}
    service = kube.get("service", "-n", "kube-system", "kube-dns")[0]
    assert list(address) == service["spec"]["clusterIPs"]


def test_a_policy_is_enforced_with_its_generation(real_cluster: Settings) -> None:
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "status-test", "namespace": "kube-system"},
        "spec": {"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}, "ingress": [{}]},
    }
    kube.apply(policy)
    try:
        item = wait_for("the policy in force", in_force, limit=20)
        pods = kube.get("pods", "-n", "kube-system", "-l", "k8s-app=kube-dns")
        assert (item["generation"], item["pods"]) == (1, len(pods))
    finally:
        cluster.kubectl("-n", "kube-system", "delete", "networkpolicy", "status-test")


def in_force() -> Any:
    """The policy when every node that has Pods of it enforces it."""
    done = podwall("get", "policies", "status-test", "-n", "kube-system", "-o", "json")
    items = json.loads(done.stdout)["items"] if done.returncode == 0 else []
    return next((of for of in items if of["in_force_on"] and not of["waiting_on"]), None)
