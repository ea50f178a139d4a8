"""What a Pod sends first, as soon as it runs, to a Pod of another node that admits it by its labels."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import cluster, kube
from tests.cluster.cluster import Settings
from tests.cluster.console import ClusterError, say, wait_for
from tests.cluster.contents import agnhost_name
from tests.cluster.kube import Place

NAMESPACE = "first-connection"
PORT = 8080
CLIENTS = 10
SECOND_SYN_S = 1.0
"""After which TCP sends again what nobody answered (RFC 6298)."""
CONNECT = "curl -s -o /dev/null -w '%{{time_connect}}\\n' --max-time 20 '{}' || echo none"

POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "clients-only", "namespace": NAMESPACE},
    "spec": {
        "podSelector": {"matchLabels": {"app": "server"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
    },
}


def pod(name: str, app: str, node: str, *words: str) -> dict[str, Any]:
    """Return a Pod of a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": app}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": agnhost_name(), "command": list(words)}],
        },
    }


@pytest.fixture(scope="module")
def server(real_cluster: Settings) -> Iterator[Place]:
    """Run an isolated Pod on the last node."""
    node = kube.nodes()[-1].name
    words = "/agnhost", "netexec", f"--http-port={PORT}", "--udp-port=-1"
    with kube.running((NAMESPACE,), pod("server", "server", node, *words), POLICY):
        yield kube.wait_for_pods(NAMESPACE, 1, app="server")[0]


def test_it_needs_no_second_syn(server: Place) -> None:
    other = next(node.name for node in kube.nodes() if node.name != server.node)
    tried = "; ".join(CONNECT.format(kube.url(each, PORT, "hostname")) for each in server.addresses)
    clients = [f"client-{number}" for number in range(CLIENTS)]
    taken: list[float] = []
    for name in clients:
        kube.apply(pod(name, "client", other, "sh", "-c", f"{tried}; sleep 3600"))
        logged = wait_for(f"what {name} connected to", lambda n=name: said(n), limit=60)  # type: ignore[misc]
        assert "none" not in logged, logged
        taken += map(float, logged)
    slow = [each for each in taken if each >= SECOND_SYN_S]
    say(f"first connections: slowest {max(taken) * 1000:.1f} ms, {len(slow)} of {len(taken)} by a second SYN")
    assert len(slow) <= len(taken) // 10, taken


def said(name: str) -> list[str]:
    """Return what a client printed when it has tried both families, else nothing."""
    try:
        lines = cluster.kubectl("-n", NAMESPACE, "logs", name).split()
    except ClusterError:  # its container has not started yet
        return []
    return lines if len(lines) == 2 else []
