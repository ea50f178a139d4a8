"""Random clusters: packets go where the documentation says, and any history ends like a full compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.compile import links, service_claims, services
from agent.compile.service import ServiceSettings
from agent.compile.service_ids import RESERVED
from agent.nft.evaluate import Evaluator, HookName, Result
from agent.nft.model import FibType, Key, Proto, Ruleset
from agent.nft.packet import Packet
from tests.agent.compile.service_oracle import Backend, Fate, Origin, Probe, ServiceOracle
from tests.agent.compile.service_worlds import (
    NODE,
    ServiceWorld,
    endpoint,
    endpoint_slice,
    in_zone,
    load_balancer,
    node,
    service,
)

OWN = {"192.168.10.1", "10.8.0.1", "fd00:10::1"}
LINKS = {
    "10.244.0.2": "podwall00000002",
    "10.244.0.3": "podwall00000003",
    "fd00:244::2": "podwall00000002",
    "fd00:244::3": "podwall00000003",
}
CLUSTER_IPS = (("10.96.0.1", "fd00:96::1"), ("10.96.0.2",), ("fd00:96::3",), ("10.96.0.4", "fd00:96::4"))
OUTSIDE = ("203.0.113.1", "203.0.113.2", "2001:db8::1")
EXTERNAL = ("198.51.100.1", "198.51.100.200", "2001:db8:e::1")
ALLOWED = ("198.51.100.0/25", "2001:db8:e::/64")
ENDPOINTS = {
    4: ("10.244.0.2", "10.244.0.3", "10.244.1.2", "10.244.1.3", "192.168.10.1", "192.168.10.2", "192.0.2.99"),
    6: ("fd00:244::2", "fd00:244::3", "fd00:244:1::2", "fd00:10::1", "fd00:10::2", "2001:db8:99::1"),
}
AT = {"10.244.1": "node-2", "fd00:244:1": "node-2", "192.168.10.2": "node-2", "fd00:10::2": "node-2"}
SOURCES: tuple[tuple[Origin, str], ...] = (
    ("pod", "10.244.0.2"),
    ("pod", "10.244.0.3"),
    ("pod", "fd00:244::2"),
    ("node", "192.168.10.1"),
    ("node", "fd00:10::1"),
    ("other pod", "10.244.1.3"),
    ("other pod", "fd00:244:1::2"),
    ("outside", "192.0.2.7"),
    ("outside", "192.168.10.2"),
    ("outside", "2001:db8:7::7"),
)
TARGETS = (
    *(ip for each in CLUSTER_IPS for ip in each),
    *OUTSIDE,
    *EXTERNAL,
    *sorted(OWN),
    "192.168.10.2",
    "fd00:10::2",
    "10.244.0.2",
    "8.8.8.8",
)
PORTS = (80, 81, 30080, 30081)
ZONES = ("east", "west")


class Chance(Random):
    """Random clusters around the cases that matter: few names, so that things meet."""

    def happens(self, one_in: int) -> bool:
        return self.randrange(one_in) == 0

    def cluster(self) -> list[dict[str, Any]]:
        made = [self.node(NODE), self.node("node-2")]
        for name in "abcd":
            if not self.happens(5):
                made.append(self.service(name))
            made += self.slices(name)
        return made

    def next(self, manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Another cluster, with much of this one in it."""
        others = {_name(each): each for each in self.cluster()}
        kept = {_name(each): copy.deepcopy(each) for each in manifests if not self.happens(3)}
        return list({**others, **kept}.values())

    def node(self, name: str) -> dict[str, Any]:
        number = 1 if name == NODE else 2
        made = node(
            name,
            f"192.168.10.{number}",
            f"fd00:10::{number}",
            cidrs=(f"10.244.{number - 1}.0/24", "fd00:244::/64" if number == 1 else "fd00:244:1::/64"),
        )
        return made if self.happens(3) else in_zone(made, self.choice(ZONES))

    def service(self, name: str) -> dict[str, Any]:
        of = self.choice(("ClusterIP", "NodePort", "LoadBalancer"))
        ips = self.choice(CLUSTER_IPS)
        spec: dict[str, Any] = {"type": of}
        for field in ("internalTrafficPolicy", "externalTrafficPolicy"):
            if self.happens(3):
                spec[field] = "Local"
        if self.happens(3):
            spec["sessionAffinity"] = "ClientIP"
        if self.happens(3):
            spec["externalIPs"] = self.sample(EXTERNAL, self.randrange(1, 3))
        if of == "LoadBalancer":
            mode = "Proxy" if self.happens(6) else "VIP"
            spec["status"] = load_balancer(*self.sample(OUTSIDE, self.randrange(3)), mode=mode)
            if self.happens(3):
                ranges = ("192.0.2.0/24", "10.244.0.0/31", "10.244.0.0/24", "2001:db8:7::/48", "0.0.0.0/0")
                spec["loadBalancerSourceRanges"] = self.sample(ranges, self.randrange(1, 4))
        if self.happens(12):
            spec["labels"] = {"service.kubernetes.io/service-proxy-name": "somebody"}
        if not self.happens(3):
            spec["created"] = f"2024-01-0{self.randrange(1, 5)}T00:00:00Z"
        return service(f"shop/{name}", *ips, ports=self.ports(of), **spec)

    def ports(self, of: str) -> list[dict[str, Any]]:
        made = []
        for name, protocol in self.sample(
            (("http", "TCP"), ("alt", "TCP"), ("dns", "UDP"), ("s", "SCTP")), 2
        ):
            port = {"name": name, "port": self.choice((80, 81)), "protocol": protocol}
            if of != "ClusterIP" and not self.happens(4):
                port["nodePort"] = self.choice((30080, 30081))
            made.append(port)
        return made

    def slices(self, name: str) -> Iterator[dict[str, Any]]:
        for index in range(self.randrange(4)):
            version = self.choice((4, 6))
            ips = self.sample(ENDPOINTS[version], self.randrange(1, 4))
            ports = [
                {"name": port, "port": self.choice((8080, 9090)), "protocol": protocol}
                for port, protocol in (("http", "TCP"), ("alt", "TCP"), ("dns", "UDP"), ("s", "SCTP"))
                if not self.happens(4)
            ]
            labels = {"service.kubernetes.io/headless": ""} if self.happens(20) else {}
            yield endpoint_slice(
                f"shop/{name}-{index}", name, *map(self.endpoint, ips), ports=ports, **labels
            )

    def endpoint(self, ip: str) -> dict[str, Any]:
        at = next((node for start, node in AT.items() if ip.startswith(start)), NODE)
        state = self.choice(
            (
                {},
                {},
                {},
                {"ready": False},
                {"ready": False, "serving": True, "terminating": True},
                {"ready": False, "serving": False, "terminating": True},
                {"ready": None},
            )
        )
        hints: dict[str, Any] = {}
        if not self.happens(3):
            hints["zones"] = [self.choice(ZONES)]
        if self.happens(3):
            hints["nodes"] = [self.choice((NODE, "node-2"))]
        return endpoint(ip, node="" if ip.startswith(("192.0.2", "2001")) else at, **state, **hints)


def _name(of: dict[str, Any]) -> tuple[str, str]:
    return of["kind"], of["metadata"]["name"]


class Judged:
    """What the compiled rules do to packets of one world."""

    def __init__(self, world: ServiceWorld) -> None:
        attached = (
            item
            for ip, link in LINKS.items()
            for item in links.link(link, (ip_address(ip),), "shop", link[-1])
        )
        everything = (*links.static(), *attached, *world.ruleset.items())
        self.ruleset, self.place = Ruleset(everything), 0
        self.evaluator = Evaluator(self.ruleset, _fib, lambda of: self.place % of.mod)

    def fate(self, probe: Probe) -> tuple[Fate, dict[Backend, str]]:
        """Where it may go, and from whom it goes on to each endpoint."""
        seen, sources = set(), {}
        for self.place in range(8):
            result = self._way(probe)
            if result.outcome != "accept":
                return Fate("dropped" if result.outcome == "drop" else "refused"), {}
            assert result.packet.mark == 0
            assert result.connection.mark == 0
            translated = [of for of in result.translations if of.kind == "dnat"]
            if not translated:
                return Fate("untouched"), {}
            backend = str(result.packet.target), result.packet.dport
            seen.add(backend)
            sources[backend] = _source(probe, result)
        return Fate("endpoint", frozenset(seen)), sources

    def _way(self, probe: Probe) -> Result:
        packet = Packet(
            ip_address(probe.source),
            ip_address(probe.target),
            Proto[probe.protocol],
            40000,
            probe.port,
            iifname=LINKS.get(probe.source, "") if probe.origin != "outside" else "eth0",
        )
        if probe.origin == "other pod":
            packet = replace(packet, iifname="eth0")
        first: tuple[HookName, ...] = ("output",) if probe.origin == "node" else ("prerouting",)
        result = self.evaluator.judge(packet, first)
        if not result.accepted:
            return result
        target = str(result.packet.target)
        rest: tuple[HookName, ...] = (
            ("postrouting",) if probe.origin == "node" else ("forward", "postrouting")
        )
        if target in OWN:
            rest = ("postrouting", "input") if probe.origin == "node" else ("input",)
        sent = replace(result.packet, oifname=LINKS.get(target, "eth0"))
        after = self.evaluator.judge(sent, rest, result.connection)
        return replace(after, translations=(*result.translations, *after.translations))


def _source(probe: Probe, result: Result) -> str:
    if any(of.kind == "masquerade" for of in result.translations):
        return "itself"
    return "node" if any(of.kind == "snat" for of in result.translations) else "kept"


def _fib(flags: tuple[str, ...], result: str, packet: Packet) -> Key:
    assert result == "type"
    address = packet.target if flags == ("daddr",) else packet.source
    local = str(address) in OWN or address.is_loopback
    return FibType.LOCAL if local else FibType.UNICAST


def probes() -> Iterator[Probe]:
    for (origin, source), target, protocol, port in product(SOURCES, TARGETS, ("TCP", "UDP", "SCTP"), PORTS):
        if (":" in source) == (":" in target):
            yield Probe(origin, source, target, protocol, port)


PROBES = tuple(probes())
SEEDS = st.integers(0, 2**32 - 1)
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LIMITED: tuple[tuple[str, ...], ...] = ((), (), ("192.168.10.0/24",), ("10.8.0.0/16", "fd00:10::/64"))


@SETTINGS
@given(SEEDS)
def test_every_packet_goes_where_the_documentation_says(seed: int) -> None:
    chance = Chance(seed)
    manifests, limited = chance.cluster(), chance.choice(LIMITED)
    oracle = ServiceOracle(manifests, NODE, OWN, ALLOWED, limited)
    judged = Judged(_world(manifests, limited))

    wrong = []
    for probe in chance.sample(PROBES, 400):
        expected = oracle.fate(probe)
        fate, sources = judged.fate(probe)
        said = {each: oracle.source(probe, each, LINKS) for each in expected.endpoints}
        if (fate, sources) != (expected, said):
            wrong.append((probe, fate, expected, sources, said))

    assert wrong == []


def _world(manifests: list[dict[str, Any]], limited: tuple[str, ...] = ()) -> ServiceWorld:
    ranges = tuple(map(ip_network, ALLOWED)), tuple(map(ip_network, limited))
    return ServiceWorld(*manifests, settings=ServiceSettings(True, *ranges))


@settings(SETTINGS, max_examples=200)
@given(SEEDS)
def test_any_history_ends_where_a_full_compile_does(seed: int) -> None:
    """From state to state by single events in any order; then from there to nothing."""
    _live(Chance(seed))


@settings(SETTINGS, max_examples=100)
@given(SEEDS)
def test_so_does_one_in_which_numbers_meet(seed: int) -> None:
    """Every digest is one of four, so almost every list and endpoint shares its own with others."""

    def few(digest: Callable[[Any], int]) -> Callable[[Any], int]:
        return lambda name: RESERVED + digest(name) % 4

    with pytest.MonkeyPatch.context() as patched:
        for where, name in ((services, "name_digest"), (service_claims, "backend_digest")):
            patched.setattr(where, name, few(getattr(where, name)))
        _live(Chance(seed))


def _live(chance: Chance) -> None:
    world = _world([])
    states = [chance.cluster()]
    while chance.happens(2) or len(states) < 2:
        states.append(chance.next(states[-1]))
    there: dict[tuple[str, str], dict[str, Any]] = {}
    for state in [*states, []]:
        wanted = {_name(of): of for of in state}
        names = sorted({*wanted, *there})
        chance.shuffle(names)
        for name in names:
            if name in wanted:
                world.put(wanted[name])
            else:
                world.remove(there[name])
        there = wanted
        fresh = _world(state)
        assert world.ruleset == fresh.ruleset
        assert world.desired.owners == {*world.compiler.owners}
        assert world.compiler.problems() == fresh.compiler.problems()
        assert world.compiler.health_checks() == fresh.compiler.health_checks()
    compiler = world.compiler
    endpoints = compiler._endpoints.values()
    numbers = [compiler._numbers, *(each.numbers for each in endpoints)]
    left = (
        *(compiler._served, compiler._slices, compiler._backends, compiler._hinted, compiler._balancers),
        *(compiler._claims._wanted, compiler._claims._rank),
        *(each._of for each in endpoints),
        *(each for of in numbers for each in (of._first, of._others)),
    )
    assert not any(left)
