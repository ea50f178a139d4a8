"""Policies in audit mode: what they would deny is reported, once, and passes; nobody else notices."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from agent.cluster.decode import decode
from agent.cluster.model import MODE_ANNOTATION, NetworkPolicy
from agent.compile import audit
from agent.nft import render
from agent.nft.evaluate import Result
from agent.nft.model import Chain, CtState, Element, Log, TcpFlag
from agent.nft.packet import Connection
from lab.expectation import FirstPacket, Oracle, pod_addresses
from tests.agent.compile.test_policy import CLUSTER
from tests.agent.compile.test_policy_property import (
    PAIRS_PER_CLUSTER,
    SEEDS,
    SETTINGS,
    Chance,
    expected,
    probes,
)
from tests.agent.compile.worlds import NODE, World, namespace, pod, policy

API, WEB, AWAY = "10.244.0.2", "10.244.0.3", "10.244.1.4"
SHOP = (
    namespace("shop"),
    pod("shop/api", API, ports=[("http", 8080)], app="api"),
    pod("shop/web", WEB, app="web"),
    pod("shop/away", AWAY, node="node-2", app="away"),
)
OF_API = {"podSelector": {"matchLabels": {"app": "api"}}}
OF_WEB = {"podSelector": {"matchLabels": {"app": "web"}}}
FROM_WEB = [{"from": [OF_WEB], "ports": [{"port": "http"}]}]


def audited(of: dict[str, Any]) -> dict[str, Any]:
    return {**of, "metadata": {**of["metadata"], "annotations": {MODE_ANNOTATION: "audit"}}}


def reports(result: Result) -> list[str]:
    """The prefixes of what was logged on the way."""
    logs = (of for step in result.trace for of in step.rule.statements if isinstance(of, Log))
    return [of.prefix for of in logs]


def direction_of(prefix: str) -> str:
    return " ".join(word for word in prefix.split()[1:] if len(word) < 20)  # without the class


CASES: dict[str, tuple[list[dict[str, Any]], FirstPacket, bool, list[str]]] = {
    "what no rule would allow passes and is reported": (
        [audited(policy("shop/deny", **OF_API))],
        FirstPacket(AWAY, API, "TCP", 8080), True, ["audit ingress"],
    ),
    "what a rule would allow is not reported": (
        [audited(policy("shop/api", **OF_API, ingress=FROM_WEB))],
        FirstPacket(WEB, API, "TCP", 8080), True, [],
    ),
    "another port of it is": (
        [audited(policy("shop/api", **OF_API, ingress=FROM_WEB))],
        FirstPacket(WEB, API, "TCP", 9090), True, ["audit ingress"],
    ),
    "both ends would deny it: reported once, as the first that would": (
        [audited(policy("shop/all", policyTypes=["Ingress", "Egress"]))],
        FirstPacket(WEB, API, "TCP", 8080), True, ["audit egress"],
    ),
    "one in force that allows it is counted in": (
        [policy("shop/api", **OF_API, ingress=FROM_WEB), audited(policy("shop/deny"))],
        FirstPacket(WEB, API, "TCP", 8080), True, [],
    ),
    "what is denied already is reported as that alone": (
        [policy("shop/api", **OF_API, ingress=FROM_WEB), audited(policy("shop/deny"))],
        FirstPacket(AWAY, API, "TCP", 8080), False, ["ingress"],
    ),
    "an allow in audit mode allows nothing": (
        [policy("shop/deny"), audited(policy("shop/api", **OF_API, ingress=FROM_WEB))],
        FirstPacket(WEB, API, "TCP", 8080), False, ["ingress"],
    ),
    "egress of one in audit mode, ingress of one in force": (
        [audited(policy("shop/out", **OF_WEB, policyTypes=["Egress"])), policy("shop/in", **OF_API)],
        FirstPacket(WEB, API, "TCP", 8080), False, ["ingress"],
    ),
    "two in audit mode add up": (
        [audited(policy("shop/deny")), audited(policy("shop/api", **OF_API, ingress=FROM_WEB))],
        FirstPacket(WEB, API, "TCP", 8080), True, [],
    ),
    "a Pod to its node": (
        [audited(policy("shop/out", policyTypes=["Egress"]))],
        FirstPacket(API, "192.168.10.1", "TCP", 10250), True, ["audit egress"],
    ),
    "a Pod to itself": (
        [audited(policy("shop/all", policyTypes=["Ingress", "Egress"]))],
        FirstPacket(API, API, "TCP", 8080), True, [],
    ),
    "a Pod of another node is that node's to report": (
        [audited(policy("shop/all"))], FirstPacket(WEB, AWAY, "TCP", 8080), True, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_would_be_denied(name: str) -> None:
    policies, probe, passes, told = CASES[name]
    result = World(*SHOP, *policies).judge(probe)

    assert result.accepted == passes
    assert [direction_of(prefix) for prefix in reports(result)] == told


def test_packets_that_policy_is_not_asked_about_are_not_reported() -> None:
    world = World(*SHOP, audited(policy("shop/deny", policyTypes=["Ingress", "Egress"])))
    known = world.judge(
        FirstPacket(AWAY, API, "TCP", 8080), Connection(state=CtState.ESTABLISHED), tcp_flags=TcpFlag.ACK
    )
    unreachable = world.judge(
        FirstPacket(AWAY, API, "ICMP"), Connection(state=CtState.RELATED), icmp_type=3, icmp_code=1
    )
    assert (reports(known), reports(unreachable)) == ([], [])


def test_a_flow_that_begins_in_the_middle_would_be_cut() -> None:
    world = World(*SHOP, audited(policy("shop/deny", **OF_API)))
    ends = {"into it": (AWAY, API), "out of it": (API, AWAY), "of others": (WEB, AWAY)}
    told = {
        name: reports(world.judge(FirstPacket(*of, "TCP", 8080), tcp_flags=TcpFlag.ACK))
        for name, of in ends.items()
    }
    midstream = ["podwall audit midstream"]
    assert told == {"into it": midstream, "out of it": midstream, "of others": []}


def test_without_one_there_is_nothing_of_it() -> None:
    ruleset = World(*CLUSTER).ruleset
    assert "audit" not in render.ruleset(ruleset)
    assert audit.AUDIT not in World(*CLUSTER).desired.owners


def test_a_policy_that_selects_no_pod_of_this_node_costs_it_nothing() -> None:
    world = World(*SHOP, audited(policy("shop/away", podSelector={"matchLabels": {"app": "away"}})))
    assert world.ruleset == World(*SHOP).ruleset


def test_the_last_one_takes_everything_along() -> None:
    of = audited(policy("shop/deny"))
    world = World(*SHOP, of)
    assert audit.AUDIT in world.desired.owners
    world.put({**of, "metadata": {**of["metadata"], "annotations": {}}})
    assert world.ruleset == World(*SHOP, policy("shop/deny")).ruleset
    world.remove(of)
    assert world.ruleset == World(*SHOP).ruleset


def test_a_pod_of_which_the_cluster_says_nothing_is_not_isolated_by_one() -> None:
    world = World(namespace("shop"), audited(policy("shop/deny")))
    world.attach(SHOP[1])
    assert world.accepts(AWAY, API)


@pytest.mark.parametrize(
    ("said", "mode", "problems"),
    [
        ("audit", "audit", 0),
        ("enforce", "enforce", 0),
        ("Audit", "enforce", 1),
        ("", "enforce", 1),
        ("audit ", "enforce", 1),
        (None, "enforce", 0),
        (["audit"], "enforce", 1),
    ],
)
def test_a_mode_that_nobody_knows_is_reported_and_enforced(said: object, mode: str, problems: int) -> None:
    of = policy("shop/api", ingress=FROM_WEB)
    of["metadata"]["annotations"] = {} if said is None else {MODE_ANNOTATION: said}
    read = decode("NetworkPolicy", of)

    assert isinstance(read, NetworkPolicy)
    assert (read.mode, len(read.problems)) == (mode, problems)
    assert len(read.ingress) == 1
    assert all(problem.field.startswith("metadata.annotations") for problem in read.problems)


def in_force(world: World) -> dict[Any, Any]:
    """Chains and elements that are not of audit; peers' sets are shared with it."""
    chains = {of.id: of for of in world.ruleset.items() if isinstance(of, Chain) and "audit" not in of.name}
    elements = {
        of.id: of
        for of in world.ruleset.items()
        if isinstance(of, Element) and not of.set.name.startswith(("audit", "peer", "ports"))
    }
    return {**chains, **elements}


@SETTINGS
@given(SEEDS)
def test_every_packet_is_reported_that_would_be_denied_and_no_other(seed: int) -> None:
    """And what is in force is the same as if there were no policies in audit mode."""
    objects = Chance(seed).cluster()
    enforced = [of for of in objects if not is_audited(of)]
    world, wrong = World(*objects), []
    for probe in probes(objects, PAIRS_PER_CLUSTER):
        result = world.judge(probe)
        told = [prefix for prefix in reports(result) if prefix.startswith("podwall audit ")]
        passes = expected(enforced, probe)
        if (result.accepted, len(told)) != (passes, int(passes and not would_pass(objects, probe))):
            wrong.append((probe, told))

    assert wrong == []
    assert in_force(world) == in_force(World(*enforced))


def is_audited(of: dict[str, Any]) -> bool:
    return of["metadata"].get("annotations", {}).get(MODE_ANNOTATION) == "audit"


def would_pass(objects: list[dict[str, Any]], probe: FirstPacket) -> bool:
    """By the documentation, if all policies were in force, as far as this node's Pods say."""
    oracle = Oracle(objects, audited=True)
    pods = [of for of in objects if of["kind"] == "Pod" and of["spec"]["nodeName"] == NODE]
    local = {address for of in pods for address in pod_addresses(of)}
    out = probe.source not in local or oracle.allows_egress(probe)
    return out and (probe.target not in local or oracle.allows_ingress(probe))
