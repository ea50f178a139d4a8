"""`podwall why` beside real packets on the real cluster: it says what becomes of each, by every way in, and
the rules in the nodes' kernels do just what it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import cluster, command, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.places import Asker

NAMESPACE = "guarded"
SERVICES = ("api", "api-local")
ADMITTED = "203.0.113.10"
"""An address outside that the policy names."""
NODE_PORTS = (30016, 30017)
SILENCE_S = 1.0


@pytest.fixture(scope="module", autouse=True)
def guarded(real_cluster: Settings) -> Iterator[None]:
    """Run the example: Services of all types for Pods that admit friends alone."""
    with kube.running((NAMESPACE,), *kube.example("services/policy.yaml", NAMESPACE)):
        for service in SERVICES:
            kube.balanced_addresses(NAMESPACE, service)
        yield


def ways() -> list[tuple[str, int]]:
    """Return an address and port of each kind, of IPv4."""
    found = [(kube.addresses(NAMESPACE, service)[0], 80) for service in SERVICES]
    found += [(kube.balanced_addresses(NAMESPACE, service)[0], 80) for service in SERVICES]
    return found + [(str(node.addresses[0]), port) for node in kube.nodes() for port in NODE_PORTS]


@pytest.mark.parametrize("name", ["friend", "stranger", "prisoner"])
def test_it_says_what_becomes_of_a_pods_packets(name: str) -> None:
    asker = places.pod(NAMESPACE, name)
    for address, port in ways():
        answer = command.why(NAMESPACE, name, f"{address}:{port}")  # waits until the nodes on the way follow
        seen = asker.one(Question(address, port, limit=SILENCE_S))

        assert answer["allowed"] == (not seen.error), (address, port, seen, answer["sentence"])
        assert answer["nodes"], (address, port)


def test_it_says_what_becomes_of_packets_from_outside(outside: Asker) -> None:
    """To the address that is answered only where a Pod is, so that the Pod sees who really asks."""
    address = kube.balanced_addresses(NAMESPACE, "api-local")[0]
    with places.another_address([ADMITTED]):
        admitting = Question(address, 80, source=ADMITTED, limit=SILENCE_S)
        wait_for("a node to answer for the address", lambda: outside.one(admitting).body, limit=20)
        for source, admitted in ((ADMITTED, True), (str(cluster.outside_address(4)), False)):
            answer = command.why(NAMESPACE, source, f"{address}:80")
            seen = outside.one(Question(address, 80, source=source, limit=SILENCE_S))

            assert (not seen.error, answer["allowed"]) == (admitted, admitted), (seen, answer["sentence"])
            assert answer["nodes"]
