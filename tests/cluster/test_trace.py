"""`podwall trace` on the real cluster: from inside of a Pod, over two nodes, and nothing left on any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import cluster, kube, pair
from tests.cluster.cluster import Settings
from tests.cluster.command import podwall

NAMESPACE = "podwall-trace"
CASES = [
    ("client", "svc/server:80", "answered", "delivery"),
    ("stranger", "svc/server:80", "denied", "ingress"),
    ("client", "pod/server:8081", "refused", "delivery"),
]


@pytest.fixture(scope="module")
def running(real_cluster: Settings) -> Iterator[None]:
    with pair.running(NAMESPACE):
        yield


def traced(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(podwall("trace", "-n", NAMESPACE, "-o", "json", *words))
    return found


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(("source", "target", "cause", "stage"), CASES)
def test_the_packet_is_followed_to_its_end(source: str, target: str, cause: str, stage: str) -> None:
    found = traced(source, target)
    assert found["cause"] == cause, found["sentence"]
    nodes = sorted(node.name for node in kube.nodes())
    assert found["steps"][0]["node"] == nodes[0]
    last = found["steps"][-1]
    assert (last["node"], last["stage"], last["ok"]) == (nodes[-1], stage, cause != "denied")
    assert not found["notes"]


@pytest.mark.usefixtures("running")
def test_nothing_is_left_on_any_node() -> None:
    traced("client", "svc/server:80")
    for node in kube.nodes():
        listed = cluster.on_node(node.name, "nft", "list", "tables")
        assert "podwall_trace" not in listed
