"""A policy in audit mode, with real packets: they pass and are told; unannotated it denies them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from agent.cli.ask import ask
from lab.objects import Object
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import LIMIT, namespace, pod, policy
from tests.lab.services import until

PORT = 8080
OBJECTS = (
    namespace("shop"),
    pod("shop/api", PORT, node="node1", labels={"app": "api"}),
    pod("shop/web", PORT, node="node2", labels={"app": "web"}),
)
API = {"matchLabels": {"app": "api"}}
DENYING = policy("shop/deny", podSelector=API)
GOING_OUT = policy("shop/out", podSelector={"matchLabels": {"app": "web"}}, policyTypes=["Egress"])


def audited(of: Object) -> Object:
    return {**of, "metadata": {**of["metadata"], "annotations": {"podwall.dev/mode": "audit"}}}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, given=[*OBJECTS, audited(DENYING)]) as made:
        every_node_follows(made)  # else a node may not know the peer by its name
        yield made


def asked(lab: Lab, node: str, what: str) -> dict[str, Any]:
    return cast("dict[str, Any]", ask(lab.node(node).directory / "agent.sock", what, {}))


def in_mode(lab: Lab, mode: str, node: str = "node1") -> Callable[[], bool]:
    def check() -> bool:
        return [each["mode_in_force"] for each in asked(lab, node, "policies")["policies"]] == [mode]

    return check


def table(lab: Lab, node: str) -> str:
    return lab.run(node, ["nft", "list", "table", "inet", "podwall"]).stdout


def told(lab: Lab, node: str, event: str) -> list[str]:
    lines = lab.agents[node].log.read_text().splitlines()
    return [line for line in lines if f"event={event} " in line]


@pytest.mark.parametrize("family", [4, 6])
def test_packets_pass_and_are_told_until_the_annotation_goes(lab: Lab, family: int) -> None:
    api = str(lab.pod("shop/api").address(family))
    assert lab.connect("shop/web", api, PORT) == "connected"
    (event,) = until(lambda: asked(lab, "node1", "denials")["denials"], LIMIT, "nothing was told")
    assert (event["audit"], event["direction"], event["pod"], event["peer"], event["policies"]) == (
        True, "ingress", "shop/api", "shop/web", ["shop/deny"],
    )  # fmt: skip
    assert (event["count"], event["dport"]) == (1, PORT), "a connection's first packet alone is told"
    assert told(lab, "node1", "would-be-denied")
    assert not told(lab, "node1", "denied")
    assert "audit" not in table(lab, "node2"), "a node without such Pods has nothing of it"

    lab.apply([DENYING])
    until(in_mode(lab, "enforce"), LIMIT, "it is not enforced")
    assert lab.connect("shop/web", api, PORT) == "silent"
    assert "audit" not in table(lab, "node1")
    until(lambda: told(lab, "node1", "denied"), LIMIT, "no denial was told")


def test_a_live_flow_ends_when_it_is_enforced_and_not_by_the_audit(lab: Lab) -> None:
    lab.apply([*OBJECTS], prune=True)
    until(lambda: asked(lab, "node1", "policies")["policies"] == [], LIMIT, "it is still there")
    live = lab.socket("shop/web", socket.AF_INET, socket.SOCK_STREAM)
    live.settimeout(LIMIT)
    live.connect((str(lab.pod("shop/api").address(4)), PORT))
    live.sendall(b"echo\n")
    answered(live)

    lab.apply([audited(DENYING)])
    until(in_mode(lab, "audit"), LIMIT, "it is not audited")
    assert lab.connect("shop/web", str(lab.pod("shop/api").address(4)), PORT) == "connected"
    answered(live)

    lab.apply([DENYING])
    until(in_mode(lab, "enforce"), LIMIT, "it is not enforced")
    until(lambda: not flows_of(lab, live), LIMIT, "its flow lives on")
    live.close()


def test_egress_is_audited_at_its_own_node(lab: Lab) -> None:
    lab.apply([*OBJECTS, audited(GOING_OUT)], prune=True)
    until(in_mode(lab, "audit", "node2"), LIMIT, "it is not audited")
    assert lab.connect("shop/web", str(lab.pod("shop/api").address(4)), PORT) == "connected"
    (event,) = until(lambda: asked(lab, "node2", "denials")["denials"], LIMIT, "nothing was told")
    assert (event["audit"], event["direction"], event["pod"]) == (True, "egress", "shop/web")


def test_an_agent_that_comes_back_finds_the_audit_as_it_left_it(lab: Lab) -> None:
    before = in_words(table(lab, "node1"))
    agent = lab.agents["node1"]
    agent.stop(kill=True)
    agent.start()
    lab.wait_until_ready()
    assert in_words(table(lab, "node1")) == before
    assert asked(lab, "node1", "status")["commits"] == 0, "it commits nothing that is there already"
    assert lab.connect("shop/web", str(lab.pod("shop/api").address(4)), PORT) == "connected"


def in_words(listing: str) -> list[str]:
    """A listing without what packets changed, or the order of elements."""
    lines = (line.strip() for line in listing.splitlines() if "counter" not in line)
    return sorted(line for line in lines if "elements" not in line)


def answered(live: socket.socket) -> None:
    """What is sent comes back."""
    live.sendall(b"still there\n")
    assert live.recv(64) == b"still there\n"


def flows_of(lab: Lab, live: socket.socket) -> list[dict[str, Any]]:
    port = live.getsockname()[1]
    return [flow for flow in asked(lab, "node1", "flows")["flows"] if flow["source"]["port"] == port]
