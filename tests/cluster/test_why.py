"""`podwall why` beside real packets on the real cluster: it says what becomes of each, by every way in, and
the rules in the nodes' kernels do just what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import cluster, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.places import Asker

PODWALL = Path(sys.executable).parent / "podwall"
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


def command(*words: str) -> list[str | Path]:
    return [PODWALL, "why", "--kubeconfig", cluster.kubeconfig(), "-n", NAMESPACE, "-o", "json", *words]


def why(*words: str) -> Any:
    """Return the whole answer, once the nodes' rules have followed what was applied last."""

    def look() -> Any:
        done = subprocess.run(command(*words), check=True, capture_output=True, timeout=30)
        answer = json.loads(done.stdout)
        return answer if all(each["agrees"] for each in answer["nodes"]) else None

    return wait_for(f"the rules to follow: {' '.join(words)}", look, limit=10, every=0.5)


def ways() -> list[tuple[str, int]]:
    """Return an address and port of each kind, of IPv4."""
    found = [(kube.addresses(NAMESPACE, service)[0], 80) for service in SERVICES]
    found += [(kube.balanced_addresses(NAMESPACE, service)[0], 80) for service in SERVICES]
    return found + [(str(node.addresses[0]), port) for node in kube.nodes() for port in NODE_PORTS]


@pytest.mark.parametrize("name", ["friend", "stranger", "prisoner"])
def test_it_says_what_becomes_of_a_pods_packets(name: str) -> None:
    asker = places.pod(NAMESPACE, name)
    for address, port in ways():
        seen = asker.one(Question(address, port, limit=SILENCE_S))
        answer = why(name, f"{address}:{port}")

        assert answer["allowed"] == (not seen.error), (address, port, seen, answer["sentence"])
        assert answer["nodes"], (address, port)


def test_it_says_what_becomes_of_packets_from_outside(outside: Asker) -> None:
    """To the address that is answered only where a Pod is, so that the Pod sees who really asks."""
    address = kube.balanced_addresses(NAMESPACE, "api-local")[0]
    with places.another_address([ADMITTED]):
        for source, admitted in ((ADMITTED, True), (str(cluster.outside_address(4)), False)):
            seen = outside.one(Question(address, 80, source=source, limit=SILENCE_S))
            answer = why(source, f"{address}:80")

            assert (not seen.error, answer["allowed"]) == (admitted, admitted), (seen, answer["sentence"])
            assert answer["nodes"]
