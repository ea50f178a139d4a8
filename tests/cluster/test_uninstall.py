"""Removing podwall with the documented commands leaves none of it, and installing it again works."""

from collections.abc import Iterator

import pytest

from tests.cluster import cluster, kube, node_state
from tests.cluster.cluster import Settings

UNINSTALL = cluster.CONF / "uninstall.yaml"


@pytest.fixture
def uninstalled(real_cluster: Settings) -> Iterator[Settings]:
    """Uninstall as conf/uninstall.yaml says, and install again afterwards."""
    try:
        cluster.kubectl("delete", "-f", cluster.MANIFEST, limit=120)
        cluster.kubectl("apply", "-f", UNINSTALL)
        words = ["rollout", "status", "daemonset/podwall-uninstall", "--timeout=90s"]
        cluster.kubectl("--namespace=kube-system", *words, limit=100)
        cluster.kubectl("delete", "-f", UNINSTALL, limit=60)
        yield real_cluster
    finally:
        cluster.kubectl("delete", "-f", UNINSTALL, "--ignore-not-found", limit=60)
        cluster.up(real_cluster)
        # Pods that ran before have lost their network.
        cluster.kubectl("-n", "kube-system", "delete", "pods", "--selector=k8s-app=kube-dns", limit=90)
        cluster.await_ready()


def test_nothing_of_podwall_is_left(uninstalled: Settings) -> None:
    for node in cluster.nodes():
        assert left(node) == [], node
    kinds = "serviceaccounts,configmaps,daemonsets,roles,rolebindings,clusterroles,clusterrolebindings"
    named = [each["metadata"]["name"] for each in kube.get(kinds, "--namespace=kube-system")]
    assert [name for name in named if "podwall" in name] == []


def left(node: str) -> list[str]:
    """Return what there is of podwall on a node."""
    return [
        *sorted(node_state.links(node)),
        *sorted(node_state.routes(node)),
        *sorted(node_state.neighbours(node)),
        *sorted(node_state.rules(node)),
        *sorted(node_state.files(node)),
    ]
