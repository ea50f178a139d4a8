"""What is denied is told by the agent in the Pods' names."""

from __future__ import annotations

import time
from ipaddress import ip_address

from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import LIMIT, namespace, pod, policy

OBJECTS = (
    namespace("shop"),
    pod("shop/api", 8080, node="node1", labels={"app": "api"}),
    pod("shop/web", 8080, node="node2", labels={"app": "web"}),
)
API = {"matchLabels": {"app": "api"}}
DIRECTIONS = {
    "ingress": (policy("shop/in", podSelector=API), "web", "api"),
    "egress": (policy("shop/out", podSelector=API, policyTypes=["Egress"]), "api", "web"),
}
"""Policies that select `api` on node1, and who then tries to reach whom."""


def test_a_denied_packet_is_told_with_both_pods_and_the_direction() -> None:
    for direction, (denying, source, target) in DIRECTIONS.items():
        with Lab(nodes=2, given=[*OBJECTS, denying]) as lab:
            every_node_follows(lab)  # else a node may not know the peer by its name
            address = ip_address(str(lab.pod(f"shop/{target}").address(4)))
            assert lab.connect(f"shop/{source}", address, 8080, "TCP") == "silent"
            peer = source if direction == "ingress" else target
            line = told(lab, "node1")
            assert f"direction={direction} pod=shop/api peer=shop/{peer} protocol=tcp" in line


def told(lab: Lab, node: str) -> str:
    """The first line about a denied packet in a node's log."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        lines = [line for line in lab.agents[node].log.read_text().splitlines() if "event=denied" in line]
        if lines:
            return lines[0]
    raise AssertionError(f"{node} told of no denial within {LIMIT} s")
