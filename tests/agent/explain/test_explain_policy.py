"""What `why` says of policies is what the rules do, and the change it offers is enough."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from hypothesis import given

from agent.cluster.model import Direction
from agent.cluster.store import snapshot_of
from agent.explain.policy import Packet, judge
from agent.explain.remedy import change_for
from agent.explain.world import World
from lab.expectation import FirstPacket, Oracle
from tests.agent.compile.test_policy_property import (
    NAMESPACES,
    PAIRS_PER_CLUSTER,
    SEEDS,
    SETTINGS,
    Chance,
    probes,
)
from tests.agent.compile.worlds import NODE, decoded, namespace, pod, policy
from tests.agent.compile.worlds import World as Rules

DIRECTIONS: tuple[Direction, Direction] = ("Egress", "Ingress")


def world_of(objects: list[dict[str, Any]]) -> World:
    return World(snapshot_of(decoded(of) for of in objects))


def packet_of(probe: FirstPacket) -> Packet:
    return Packet(ip_address(probe.source), ip_address(probe.target), probe.protocol, probe.port)


def allowed(world: World, packet: Packet) -> bool:
    """Seen from one node: only the policies of its own Pods are in force there."""
    judged = (judge(world, direction, packet) for direction in DIRECTIONS)
    return all(each.allowed for each in judged if each.pod is not None and each.pod.node == NODE)


@SETTINGS
@given(SEEDS)
def test_it_says_what_the_rules_do(seed: int) -> None:
    objects = Chance(seed).cluster()
    rules, world = Rules(*objects), world_of(objects)

    wrong = [
        probe
        for probe in probes(objects, PAIRS_PER_CLUSTER)
        if rules.judge(probe).accepted != allowed(world, packet_of(probe))
    ]

    assert wrong == []


@SETTINGS
@given(SEEDS)
def test_the_change_it_offers_is_enough(seed: int) -> None:
    """Each denied direction's change, made in the manifest, lets the packet pass by the documentation."""
    cluster = [of for of in Chance(seed).cluster() if of["kind"] != "Namespace"]
    objects = [*cluster, *map(namespace, NAMESPACES)]
    world = world_of(objects)
    for probe in probes(objects, 20):
        changed = {_key(of): of for of in objects}
        for direction in DIRECTIONS:
            change = change_for(world, judge(world, direction, packet_of(probe)), packet_of(probe))
            if change is not None:
                key = ("NetworkPolicy", *change.policy)
                changed[key] = change.applied(changed[key])
        assert Oracle(changed.values()).allows(probe)


def test_a_denied_pod_gets_the_smallest_change() -> None:
    web = pod("shop/web", "10.244.0.2", app="web", **{"pod-template-hash": "5f7c9"})
    api = pod("shop/api", "10.244.0.3", app="api")
    admits_web = {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 8080}]}
    from_elsewhere = {"from": [{"ipBlock": {"cidr": "10.9.0.0/16"}}]}
    from_anybody = {"from": [{"namespaceSelector": {}}], "ports": [{"port": 9090}]}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "its port is missing": (
            policy("shop/api", ingress=[admits_web]),
            "# NetworkPolicy shop/api: add to spec.ingress[0].ports\n- protocol: TCP\n  port: 80\n",
        ),
        "nothing is admitted": (
            policy("shop/api", policyTypes=["Ingress"]),
            "# NetworkPolicy shop/api: add to spec.ingress\n"
            "- from:\n  - podSelector:\n      matchLabels:\n        app: web\n"
            "  ports:\n  - protocol: TCP\n    port: 80\n",
        ),
        "it is not among those who may": (
            policy("shop/api", ingress=[{**from_elsewhere, "ports": [{"port": 80}]}]),
            "# NetworkPolicy shop/api: add to spec.ingress[0].from\n"
            "- podSelector:\n    matchLabels:\n      app: web\n",
        ),
        "a rule for all ports, or for everybody, is not widened": (
            policy("shop/api", ingress=[from_elsewhere, from_anybody]),
            "# NetworkPolicy shop/api: add to spec.ingress\n"
            "- from:\n  - podSelector:\n      matchLabels:\n        app: web\n"
            "  ports:\n  - protocol: TCP\n    port: 80\n",
        ),
    }  # fmt: skip
    packet = packet_of(FirstPacket("10.244.0.2", "10.244.0.3", "TCP", 80))
    for name, (of, wanted) in cases.items():
        world = world_of([namespace("shop"), web, api, of])
        change = change_for(world, judge(world, "Ingress", packet), packet)
        assert change is not None, name
        assert change.text() == wanted, name


def _key(of: dict[str, Any]) -> tuple[str, str, str]:
    return of["kind"], of["metadata"].get("namespace", ""), of["metadata"]["name"]
