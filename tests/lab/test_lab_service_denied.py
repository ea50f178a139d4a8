"""A denied Pod stays denied through every way in, and an admitted one is admitted through each of them.

    node1   open, closed, picky   who is asked: no policy; admits nobody; admits friends and an outside client
            friend-1, stranger-1, prisoner-1, careful-1
    node2   friend-2, stranger-2, prisoner-2, careful-2
    node3   nothing
    outside, by its address on the nodes' link and by one behind it

Each asks each by the Pod's address, ClusterIP, NodePort of every node with externalTrafficPolicy Cluster and
Local, externalIP, LoadBalancer address with both policies, and hostPort; TCP and UDP, both families. What
must come of it is worked out from the policies alone, on the addresses that both ends really have: `judge`
says which these are for each way, and the rest is the literal reading of the policies' documentation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from lab import names, probe
from lab.expectation import FirstPacket, Oracle
from lab.limits import SLOWNESS
from lab.names import Address
from lab.objects import Object
from lab.probe import CONNECTED, PROTOCOLS, SILENT, Outcome, Probe
from lab.world import Lab
from tests.lab.policies import namespace, pod, policy
from tests.lab.services import FAMILIES, of_version, service

SERVERS = ("open", "closed", "picky")
SERVER_NODE = "node1"
NODES = ("node1", "node2", "node3")
CLIENTS = tuple(f"{kind}-{node}" for kind in ("friend", "stranger", "prisoner", "careful") for node in (1, 2))
OUTER_ROUTE = "node2"
"""Through which node the outside sends to addresses that belong to no node."""

LIMIT = 10.0 * SLOWNESS
BY_HAND = "example.com/by-hand"


def outer(kind: str, number: int) -> dict[int, Address]:
    """An address that only Services have."""
    digit = {"external": 1, "balanced": 2, "balanced-local": 3}[kind]
    return {
        4: ip_address(f"198.51.100.{10 * digit + number}"),
        6: ip_address(f"2001:db8:51::{digit}:{number}"),
    }


def objects() -> list[Object]:
    made = [namespace("guarded")]
    for number, name in enumerate(SERVERS, 1):
        server = pod(f"guarded/{name}", 8080, node=SERVER_NODE, labels={"app": name})
        server["spec"]["containers"][0]["ports"] = [
            {"containerPort": 8080, "hostPort": 18080 + number, "protocol": each} for each in PROTOCOLS
        ]
        made += [server, *services(name, number)]
    for client in CLIENTS:
        kind, node = client.split("-")
        made.append(pod(f"guarded/{client}", node=f"node{node}", labels={"app": kind}))
    ports = [{"protocol": each, "port": 8080} for each in PROTOCOLS]
    friends = [
        {"podSelector": {"matchLabels": {"app": "friend"}}},
        *({"ipBlock": {"cidr": str(ip_network(each))}} for each in names.outside().addresses),
    ]
    return [
        *made,
        policy("guarded/closed", podSelector={"matchLabels": {"app": "closed"}}),
        policy(
            "guarded/picky",
            podSelector={"matchLabels": {"app": "picky"}},
            ingress=[{"from": friends, "ports": ports}],
        ),
        policy("guarded/prisoner", podSelector={"matchLabels": {"app": "prisoner"}}, policyTypes=["Egress"]),
        policy(
            "guarded/careful",
            podSelector={"matchLabels": {"app": "careful"}},
            policyTypes=["Egress"],
            egress=[{"to": [{"podSelector": {"matchLabels": {"app": "open"}}}], "ports": ports}],
        ),
    ]


def services(name: str, number: int) -> list[Object]:
    """The Services of one server; their load balancers' addresses are given by hand."""
    found = []
    for suffix, etp in (("", "Cluster"), ("-local", "Local")):
        made = service(
            f"guarded/{name}{suffix}",
            {"app": name},
            type="LoadBalancer",
            externalTrafficPolicy=etp,
            loadBalancerClass=BY_HAND,
        )
        addresses = outer(f"balanced{suffix}", number).values()
        made["status"] = {
            "loadBalancer": {"ingress": [{"ip": str(each), "ipMode": "VIP"} for each in addresses]}
        }
        found.append(made)
    found[0]["spec"]["externalIPs"] = [str(each) for each in outer("external", number).values()]
    return found


@dataclass(frozen=True)
class Way:
    """One way in: via is the node whose address it is; local: externalTrafficPolicy Local."""

    kind: str
    server: str
    address: Address
    port: int
    protocol: str
    via: str = ""
    local: bool = False


@dataclass(frozen=True)
class Source:
    """Who asks: its name, node ("" outside), addresses by family; own is to be bound to."""

    name: str
    node: str
    netns: Path
    addresses: Mapping[int, Address] = field(hash=False)
    own: bool = False
    is_node: bool = False


@dataclass(frozen=True)
class Case:
    """One connection and what must come of it: the client that the Pod sees; None: silence."""

    source: Source
    way: Way
    expected: Address | None

    def problem(self, outcome: Outcome) -> str:
        """What is not as expected; "" when all is."""
        answer = probe.read_answer(outcome)
        seen = f"{answer.pod} saw {answer.client}" if answer else f"{outcome.verdict} {outcome.error}"
        if answer is None:
            good = self.expected is None and outcome.verdict == SILENT
        else:
            good = answer.pod == f"guarded/{self.way.server}" and self._is_expected(answer.client)
        return "" if good else f"{self}: {seen}, expected {self.expected or 'silence'}"

    def _is_expected(self, client: Address) -> bool:
        """Whether the Pod saw the right client; of its own packets that come back it must not see itself.

        A node that asks a Pod itself may do so by its address on the tunnel.
        """
        if self.way.kind == "Pod" and self.source.is_node:
            return True
        itself = self.source.name == f"guarded/{self.way.server}" and self.way.kind != "Pod"
        if itself and self.expected in self.source.addresses.values():
            return client != self.expected
        return client == self.expected

    def __str__(self) -> str:
        way = self.way
        to = f"{way.kind} {way.via or 'Local' * way.local} {way.address} {way.protocol} {way.port}"
        return f"{self.source.name} -> {way.server} by {to}"


class World:
    """The lab with what was given it, and what must be."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.tunnel = lab.settings.mode == "vxlan"
        self.oracle = Oracle(lab.objects().values())
        self.servers = {name: lab.pod(f"guarded/{name}") for name in SERVERS}
        self.nodes = {place.name: place for place in lab.nodes}

    def sources(self) -> Iterator[Source]:
        for found in self.lab.pods():
            addresses = {each.version: each for each in found.addresses}
            yield Source(found.full_name, found.node, found.netns, addresses)
        for name, place in self.nodes.items():
            addresses = {each.version: each for each in place.addresses}
            yield Source(name, name, self.lab.netns(name), addresses, is_node=True)
        outside = self.lab.netns("outside")
        for name, given in (("outside", self.lab.outside.addresses), ("far outside", names.BEHIND_OUTSIDE)):
            yield Source(name, "", outside, {each.version: each for each in given}, own=True)

    def ways(self, version: int, protocol: str) -> Iterator[Way]:
        for number, name in enumerate(SERVERS, 1):
            there, local = (self.lab.service(f"guarded/{name}{suffix}") for suffix in ("", "-local"))
            yield Way("Pod", name, self.servers[name].address(version), 8080, protocol)
            yield Way("ClusterIP", name, there.address(version), 80, protocol)
            yield Way("externalIP", name, outer("external", number)[version], 80, protocol)
            yield Way("LoadBalancer", name, there.balanced_address(version), 80, protocol)
            yield Way("LoadBalancer", name, local.balanced_address(version), 80, protocol, local=True)
            here = of_version(self.nodes[SERVER_NODE].addresses, version)
            yield Way("hostPort", name, here, 18080 + number, protocol, via=SERVER_NODE)
            for node, place in self.nodes.items():
                for found in (there, local):
                    [port] = [each.node_port for each in found.ports if each.protocol == protocol]
                    address = of_version(place.addresses, version)
                    yield Way("NodePort", name, address, port, protocol, via=node, local=found is local)

    def cases(self) -> Iterator[Case]:
        for version in FAMILIES:
            for protocol in PROTOCOLS:
                for source in self.sources():
                    for way in self.ways(version, protocol):
                        if source.node or way.kind not in {"Pod", "ClusterIP"}:
                            yield Case(source, way, self.judge(source, way))

    def judge(self, source: Source, way: Way) -> Address | None:
        """The client that the server must see, or None where the packet must die."""
        mine = source.addresses[way.address.version]
        if not source.node:
            return self._from_outside(mine, way)
        if way.via and way.via != source.node and (way.local or way.kind == "hostPort"):
            return self._by_another_node(source, mine, way)
        # Translated where it is sent: both policies see the Pods themselves.
        return mine if self._leaves(mine, way) and self._enters(mine, way, source) else None

    def _from_outside(self, mine: Address, way: Way) -> Address | None:
        node = way.via or OUTER_ROUTE
        if node == SERVER_NODE:
            return mine if self._enters(mine, way) else None
        if way.local:
            return None
        hop = of_version(self.nodes[node].addresses, way.address.version)
        return hop if self._enters(hop, way) else None

    def _by_another_node(self, source: Source, mine: Address, way: Way) -> Address | None:
        """To a port that only the node itself knows: the packet leaves as one for that node."""
        packet = FirstPacket(str(mine), str(way.address), way.protocol, way.port)
        if not self.oracle.allows_egress(packet):
            return None
        if way.via != SERVER_NODE:
            return None  # a node without an endpoint of its own has nobody to give it to
        if self.tunnel:  # to a node's own address no tunnel leads: it leaves as from its node
            mine = of_version(self.nodes[source.node].addresses, way.address.version)
        return mine if self._enters(mine, way) else None

    def _leaves(self, mine: Address, way: Way) -> bool:
        return self.oracle.allows_egress(self._packet(mine, way))

    def _enters(self, client: Address, way: Way, source: Source | None = None) -> bool:
        if source and source.is_node and source.node == SERVER_NODE:
            return True  # a node reaches its own Pods
        return self.oracle.allows_ingress(self._packet(client, way))

    def _packet(self, client: Address, way: Way) -> FirstPacket:
        server = self.servers[way.server].address(way.address.version)
        return FirstPacket(str(client), str(server), way.protocol, 8080)


@pytest.fixture(scope="module", params=["direct", "vxlan"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with Lab(
        nodes=3,
        mode=request.param,
        given=objects(),
        flags={"external-ips": "198.51.100.0/24,2001:db8:51::/64"},
    ) as lab:
        for version, network in ((4, "198.51.100.0/24"), (6, "2001:db8:51::/64")):
            via = of_version(lab.node(OUTER_ROUTE).addresses, version)
            lab.run("outside", ["ip", f"-{version}", "route", "add", network, "via", str(via)])
        yield World(lab)


def attempt(cases: list[Case]) -> list[Outcome]:
    return probe.run(
        [
            Probe(
                case.source.netns,
                case.way.address,
                case.way.port,
                case.way.protocol,
                case.source.addresses[case.way.address.version] if case.source.own else None,
                b"all",
            )
            for case in cases
        ]
    )


def seen_by_all(cases: list[Case]) -> dict[Case, Outcome]:
    """What came of each; those that are not as expected are tried again for a while."""
    seen: dict[Case, Outcome] = {}
    left, deadline = cases, time.monotonic() + LIMIT
    while left and (not seen or time.monotonic() < deadline):
        seen |= dict(zip(left, attempt(left), strict=True))
        left = [case for case in left if case.problem(seen[case])]
    return seen


def test_every_way_in_is_as_open_as_the_policies_say(world: World) -> None:
    cases = list(world.cases())
    assert len(cases) > 2000
    admitted = seen_by_all([case for case in cases if case.expected])
    denied = seen_by_all([case for case in cases if not case.expected])

    assert [case.problem(outcome) for case, outcome in admitted.items() if case.problem(outcome)] == []
    assert [case.problem(outcome) for case, outcome in denied.items() if case.problem(outcome)] == []
    again = dict(zip(denied, attempt(list(denied)), strict=True))
    assert [case.problem(outcome) for case, outcome in again.items() if case.problem(outcome)] == []
    for version in FAMILIES:
        for protocol in PROTOCOLS:
            for kind in {case.way.kind for case in cases}:
                at = (version, protocol, kind)
                verdicts = {
                    (case.way.server, outcome.verdict)
                    for case, outcome in (*admitted.items(), *denied.items())
                    if (case.way.address.version, case.way.protocol, case.way.kind) == at
                }
                # Each way is open, is shut, and is both to the one who picks.
                wanted = {("open", CONNECTED), ("closed", SILENT), ("picky", CONNECTED), ("picky", SILENT)}
                assert wanted <= verdicts, at
