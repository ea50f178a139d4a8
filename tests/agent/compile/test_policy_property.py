"""Random clusters: the compiled ruleset says of every packet what the documentation says of it.

Each cluster is judged with a grid of packets, more than 20,000 pairs of a cluster and a packet in a run.
"""

from __future__ import annotations

import random
from copy import deepcopy
from itertools import product
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.expectation import FirstPacket, Oracle, pod_addresses
from tests.agent.compile.worlds import NODE, NODE_ADDRESSES, World, namespace, pod, policy
from tests.chance import PolicyChance

NAMESPACES = ("red", "blue")
OUTSIDE = ("203.0.113.10", "203.0.113.77", "10.9.9.9", "2001:db8::10", "2001:db8:1::77")
PROBES = (("TCP", 80), ("TCP", 8080), ("TCP", 443), ("UDP", 53), ("SCTP", 80), ("ICMP", None), ("GRE", None))
PAIRS_PER_CLUSTER = 100
CLUSTERS = 500
BLOCKS = (
    {"cidr": "0.0.0.0/0"},
    {"cidr": "::/0", "except": ["2001:db8:1::/48"]},
    {"cidr": "203.0.113.0/24", "except": ["203.0.113.64/26", "203.0.113.0/30"]},
    {"cidr": "10.0.0.0/8", "except": ["10.244.0.2/32"]},
    {"cidr": "10.244.0.3/32"},
    {"cidr": "fd00:10:244::/64", "except": ["fd00:10:244::2/127"]},
    {"cidr": "192.168.10.1/32"},
    {"cidr": "0.0.0.0/0", "except": [f"203.0.113.{n}/32" for n in range(70, 90)]},
    {"cidr": "10.244.0.0/24", "except": [f"10.244.0.{n}/32" for n in range(3, 40, 2)]},
)
PORTS = (
    {"port": 80},
    {"port": 8080, "protocol": "TCP"},
    {"port": 53, "protocol": "UDP"},
    {"protocol": "UDP"},
    {"protocol": "SCTP", "port": 80},
    {},
    {"port": 80, "endPort": 442},
    {"port": 440, "endPort": 9000, "protocol": "TCP"},
    {"port": "http"},
    {"port": "dns", "protocol": "UDP"},
    {"port": "nobodys"},
)
CONTAINER_PORTS = (
    (),
    (("http", 80), ("dns", 53, "UDP")),
    (("http", 8080),),
    (("http", 443), ("http", 8080)),
    (("http", 80, "SCTP"), ("dns", 80)),
)


class Chance(PolicyChance):
    """Random clusters of one state after the other."""

    namespaces, blocks, ports = NAMESPACES, BLOCKS, PORTS

    def policy(self) -> dict[str, Any]:
        made = policy(f"{self.choice(NAMESPACES)}/policy-{self.randrange(4)}", **self.policy_spec())
        made["metadata"]["annotations"] = self.mode()
        return made

    def mode(self) -> dict[str, str]:
        """Most policies are enforced; so are those whose mode nobody knows."""
        of = self.choice(("", "", "", "", "enforce", "Audit", "audit", "audit", "audit"))
        return {"podwall.dev/mode": of} if of else {}

    def pod(self, number: int) -> dict[str, Any]:
        phases = ("Running", "Running", "Running", "Running", "Pending", "Unknown", "Succeeded", "Failed")
        phase = self.choice(phases)
        last = self.randrange(2, 9) if phase in {"Succeeded", "Failed"} else number  # used again by another
        address = {4: f"10.244.0.{last}", 6: f"fd00:10:244::{last}"}
        host_network = self.happens(1)
        families = self.choice(((4,), (6,), (4, 6), (4, 6), (4, 6), ())) if self.happens(6) else (4, 6)
        return pod(
            f"{self.choice(NAMESPACES)}/pod-{number}",
            *(NODE_ADDRESSES if host_network else [address[family] for family in families]),
            node=NODE if self.happens(6) else "node-2",
            ports=self.choice(CONTAINER_PORTS),
            phase=phase,
            host_network=host_network,
            **self.labels(),
        )

    def edited(self, of: dict[str, Any]) -> dict[str, Any]:
        """The object with one thing changed."""
        of = deepcopy(of)
        if of["kind"] == "NetworkPolicy" and self.happens(4):
            of["metadata"]["annotations"] = self.mode()
        elif of["kind"] == "NetworkPolicy":
            of["spec"] = self.policy_spec()
        elif of["kind"] == "Namespace" or self.happens(4):
            of["metadata"]["labels"] = self.labels()
        elif self.happens(4):
            of["spec"]["containers"] = pod("any/pod", ports=self.choice(CONTAINER_PORTS))["spec"][
                "containers"
            ]
        elif self.happens(5):
            of["status"]["phase"] = self.choice(("Running", "Succeeded"))
        else:
            of["status"]["podIPs"] = of["status"]["podIPs"][:1]
        return of

    def next(self, state: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A cluster somewhat later."""
        if self.happens(1):
            return self.cluster()
        return [self.edited(of) if self.happens(2) else of for of in state if not self.happens(1)]

    def cluster(self) -> list[dict[str, Any]]:
        """Namespaces (sometimes one is missing), Pods and policies, in any order."""
        objects = [namespace(name, **self.labels()) for name in NAMESPACES if self.happens(9)]
        objects += [self.pod(number) for number in range(2, 2 + self.choice((3, 5, 8)))]
        named = {
            of["metadata"]["namespace"] + of["metadata"]["name"]: of for of in self.some(self.policy, 1, 3, 5)
        }
        return self.sample([*objects, *named.values()], len(objects) + len(named))


SEEDS = st.integers(0, 2**32 - 1)


def probes(objects: list[dict[str, Any]], limit: int) -> list[FirstPacket]:
    """Packets that this node sees: from or to one of its Pods."""
    pods = [of for of in objects if of["kind"] == "Pod"]
    local = {ip for of in pods if of["spec"]["nodeName"] == NODE for ip in pod_addresses(of)}
    everybody = {each["ip"] for of in pods for each in of["status"]["podIPs"]} | {*OUTSIDE, *NODE_ADDRESSES}
    pairs = [
        (source, target)
        for source, target in product(sorted(everybody), repeat=2)
        if (source in local or (target in local and source not in NODE_ADDRESSES))
        and (":" in source) == (":" in target)
    ]
    grid = [FirstPacket(*ends, *what) for ends, what in product(pairs, PROBES)]
    return random.Random(len(grid)).sample(grid, min(limit, len(grid)))


def expected(objects: list[dict[str, Any]], probe: FirstPacket) -> bool:
    """The documentation, where this node enforces it: on its own Pods."""
    oracle = Oracle(objects)
    local = {
        ip
        for of in objects
        if of["kind"] == "Pod" and of["spec"]["nodeName"] == NODE
        for ip in pod_addresses(of)
    }
    out = probe.source not in local or oracle.allows_egress(probe)
    return out and (probe.target not in local or oracle.allows_ingress(probe))


SETTINGS = settings(
    max_examples=CLUSTERS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@SETTINGS
@given(SEEDS)
def test_every_packet_is_judged_as_the_documentation_says(seed: int) -> None:
    objects = Chance(seed).cluster()
    world = World(*objects)

    wrong = [
        (probe, result)
        for probe in probes(objects, PAIRS_PER_CLUSTER)
        if (result := world.judge(probe)).accepted != expected(objects, probe)
    ]

    assert wrong == []


@settings(SETTINGS, max_examples=200)
@given(SEEDS)
def test_any_history_ends_where_a_full_compile_does(seed: int) -> None:
    """From state to state by single events in any order; then from there to nothing."""
    order = Chance(seed)
    world = World()
    states = [order.cluster()]
    while order.happens(8):
        states.append(order.next(states[-1]))
    for state in [*states, []]:
        wanted = {(of["kind"], of["metadata"].get("namespace"), of["metadata"]["name"]): of for of in state}
        there = {
            (of["kind"], of["metadata"].get("namespace"), of["metadata"]["name"]): of
            for of in world.manifests.values()
        }
        names = sorted({*wanted, *there}, key=str)
        order.shuffle(names)
        for name in names:
            if name in wanted:
                world.put(wanted[name])
            else:
                if name[0] == "Pod" and order.random() < 0.5:
                    world.detach(there[name])
                world.remove(there[name])
                if name[0] == "Pod":
                    world.detach(there[name])
        assert world.ruleset == World(*state).ruleset
        assert {("links",), *world.compiler.owners} >= {
            owner for owner in world.desired.owners if owner[0] != "link"
        }
    assert world.ruleset == World().ruleset
    assert not world.compiler._peers._member_of
    assert not world.compiler._peers._members
    assert not world.compiler._classes_of
    assert not world.compiler._peers._population
