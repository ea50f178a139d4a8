"""Beside kube-proxy: podwall sees its rules and serves no Services; when they are gone, it does."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cluster import cluster, kube
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.places import Asker

NAMESPACE = "beside"
PROXY = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "nftables",
    # a node of kind cannot change the machine's own settings
    "conntrack": {"maxPerCore": 0},
}
NOTICES_S = 60
"""It looks every 10 s, and wants to have seen a change more than once."""


@pytest.fixture(scope="module", autouse=True)
def services(real_cluster: Settings) -> Iterator[None]:
    """Run a Service on every node."""
    with kube.running((NAMESPACE,), *kube.example("services/cluster-ip.yaml", NAMESPACE)):
        yield


@pytest.fixture
def kube_proxy(services: None) -> Iterator[None]:
    """Install kube-proxy as kubeadm does, and remove it with its rules."""
    control = cluster.nodes()[0]
    try:
        words = ["kubeadm", "init", "phase", "addon", "kube-proxy", "--config=/dev/stdin"]
        cluster.on_node(control, *words, stdin=yaml.safe_dump_all(proxy_settings(control)).encode())
        cluster.kubectl("-n", "kube-system", "rollout", "status", "daemonset/kube-proxy", "--timeout=60s")
        yield
    finally:
        named = ["daemonset/kube-proxy", "configmap/kube-proxy", "serviceaccount/kube-proxy"]
        cluster.kubectl("-n", "kube-system", "delete", "--ignore-not-found", *named)
        gone = "--selector=k8s-app=kube-proxy"
        wait_for("the end of kube-proxy", lambda: not kube.get("pods", "-n", "kube-system", gone), limit=60)
        for node in cluster.nodes():
            for family in ("ip", "ip6"):
                table = f"table {family} kube-proxy"
                cluster.on_node(node, "nft", f"add {table}; delete {table}")


def proxy_settings(control: str) -> list[dict[str, Any]]:
    """Return kubeadm's own configuration of this cluster with one for kube-proxy."""
    there = yaml.safe_load_all(cluster.on_node(control, "cat", "/kind/kubeadm.conf"))
    return [each for each in there if each and each["kind"] != PROXY["kind"]] + [PROXY]


def states() -> dict[str, dict[str, Any]]:
    """Return what every node's agent says of Services."""
    found = {}
    for pod in kube.get("pods", "-n", "kube-system", "--selector=app.kubernetes.io/name=podwall"):
        said = kube.execute("kube-system", pod["metadata"]["name"], "podwall", "status", "--output=json")
        found[pod["spec"]["nodeName"]] = json.loads(said)["services"]
    return found


def all_are(state: str) -> bool:
    """Say whether every agent's Services are on, or off."""
    return {each["state"] for each in states().values()} == {state}


def everybody_answers(nodes: dict[str, Asker]) -> bool:
    """Say whether every Pod of the Service answers on every node, in both families."""
    expected = {pod.name for pod in kube.pods(NAMESPACE, app="my-app")}
    questions = [Question(each, 80) for each in kube.addresses(NAMESPACE, "my-app") for _ in range(30)]
    return all({each.body for each in asker.ask(questions)} == expected for asker in nodes.values())


def test_podwall_steps_aside_and_comes_back(nodes: dict[str, Asker], request: pytest.FixtureRequest) -> None:
    assert all_are("on")
    assert everybody_answers(nodes)
    request.getfixturevalue("kube_proxy")
    wait_for("podwall to see kube-proxy's rules", lambda: all_are("off"), limit=NOTICES_S, every=1)
    assert all("kube-proxy" in each["why"] for each in states().values())
    assert everybody_answers(nodes)


def test_podwall_serves_again_without_kube_proxy(nodes: dict[str, Asker]) -> None:
    wait_for("podwall to serve", lambda: all_are("on"), limit=NOTICES_S, every=1)
    wait_for("every answer", lambda: everybody_answers(nodes), limit=10)
