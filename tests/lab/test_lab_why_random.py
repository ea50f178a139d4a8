"""Random clusters with policies and Services, and real packets of all kinds: `why` says what becomes of each.

    Pods, nodes, outside  -->  Pods, ClusterIPs, NodePorts, LoadBalancer addresses, externalIPs, hostPorts

Each state follows another without a rest. A packet may be answered by any endpoint that `why` lets it in to,
and by nobody else; the client that the endpoint sees is whom `why` says; it is refused where nothing listens,
and is not answered where a policy denies it. The nodes' own rules are asked about some of the packets, too.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from agent.cli.cluster import Asked
from agent.cli.why import Looked, looked
from agent.cluster.model import IPAddress, Node, Pod, Protocol
from agent.explain.answer import Answer
from agent.explain.question import Question
from agent.explain.route import Target
from agent.explain.way import why
from agent.explain.world import Address, End, node_of
from lab import names, probe
from lab.limits import SLOWNESS
from lab.objects import Object
from lab.probe import CONNECTED, REFUSED, SILENT, Outcome, Probe
from lab.world import OUTSIDE_PORTS, OUTSIDE_WEB, Lab
from tests.lab.following import every_node_follows
from tests.lab.services import service
from tests.lab.test_lab_policy_random import NAMESPACES, Chance

STATES = 4
PACKETS = 700  # of one state; three seeds make 8,400
COMPARED = 25  # with the kernel's rules
LIMIT = 6.0 * SLOWNESS
VIA = "node2"
"""Through which node the outside sends to addresses that belong to no node."""

ALLOWED = "198.51.100.0/25,2001:db8:51::/64"
OUTER = {4: ("198.51.100.{}", "198.51.100.2{:02}"), 6: ("2001:db8:51::{}", "2001:db8:52::{}")}
"""Addresses that Services ask for: in the ranges that the agents allow for externalIPs, and not."""

BY_HAND = "example.com/by-hand"
HOST_PORTS = range(18080, 18084)


class Services(Chance):
    """The same random clusters, with Services and ports of nodes."""

    def service(self, number: int) -> Object:
        kind = self.choice(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"))
        spec: dict[str, Any] = {"type": kind, "sessionAffinity": self.choice(("None", "None", "ClientIP"))}
        if self.happens(3):
            spec["internalTrafficPolicy"] = "Local"
        if kind != "ClusterIP":
            spec["externalTrafficPolicy"] = self.choice(("Cluster", "Local"))
        if self.happens(4):
            spec["externalIPs"] = [self.choice(OUTER[v]).format(number) for v in (4, 6)]
        ports = [self.port(80, "TCP"), self.port(53, "UDP")]
        labels = {"app": self.choice(("web", "web", "db"))}
        made = service(f"{self.choice(NAMESPACES)}/service-{number}", labels, *ports, **spec)
        if kind == "LoadBalancer":
            made["spec"]["loadBalancerClass"] = BY_HAND
            given = [OUTER[version][0].format(100 + number) for version in (4, 6)]
            made["status"] = {"loadBalancer": {"ingress": [{"ip": each, "ipMode": "VIP"} for each in given]}}
            if self.happens(3):
                made["spec"]["loadBalancerSourceRanges"] = ["10.244.1.0/24", "172.30.0.0/24", "fd30::/64"]
        return made

    def port(self, number: int, protocol: str) -> dict[str, Any]:
        target = self.choice((80, 443, "http", 8080) if protocol == "TCP" else (53, 80, "dns", "nobodys"))
        return {"name": protocol.lower(), "port": number, "protocol": protocol, "targetPort": target}

    def services(self) -> list[Object]:
        return [self.service(number) for number in range(1, 7)]

    def pod(self, number: int) -> Object:
        made = super().pod(number)
        if number < len(HOST_PORTS):
            made["spec"]["containers"][0]["ports"][0]["hostPort"] = HOST_PORTS[number]
        return made


@dataclass(frozen=True, eq=False)
class Sent:
    """One first packet: who sends it from which address, and to what."""

    source: End
    name: str
    mine: IPAddress
    target: IPAddress
    port: int
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.name} ({self.mine}) -> {self.target} {self.protocol} {self.port}"


class Cluster:
    """The lab as the command sees it."""

    def __init__(self, lab: Lab, seen: Looked) -> None:
        self.lab, self.seen, self.world = lab, seen, seen.world
        self.sources = [*self._sources()]

    def _sources(self) -> Iterator[tuple[End, str, IPAddress]]:
        for pod in self.world.snapshot.pods.values():
            yield from ((pod, "/".join(pod.key), ip) for ip in pod.ips)
        for node in self.world.snapshot.nodes.values():
            yield from ((node, node.name, ip) for ip in node.internal_ips)
        for ip in (*names.outside().addresses, *names.BEHIND_OUTSIDE):
            yield Address(ip), "outside", ip

    def targets(self) -> Iterator[tuple[IPAddress, int, Protocol]]:
        """Every address and port worth sending to, and some at which nobody is."""
        snapshot = self.world.snapshot
        for pod in snapshot.pods.values():
            yield from ((ip, each.port, each.protocol) for ip in pod.ips for each in pod.ports)
        nodes = [ip for node in snapshot.nodes.values() for ip in node.internal_ips]
        for of in snapshot.services.values():
            ingress = [each.ip for each in of.load_balancer if each.ip is not None]
            for port in of.ports:
                for ip in (*of.cluster_ips, *of.external_ips, *ingress):
                    yield ip, port.port, port.protocol
                yield (*of.cluster_ips, *ingress)[0], port.port + 1, port.protocol
                if port.node_port:
                    yield from ((ip, port.node_port, port.protocol) for ip in nodes)
        yield from ((ip, port, "TCP") for ip in nodes for port in HOST_PORTS)
        yield from ((ip, OUTSIDE_PORTS[0], "TCP") for ip in names.outside().addresses)

    def packets(self, chance: random.Random, count: int) -> list[Sent]:
        """Some of all, each kind of target as often as it is there."""
        targets, found = list(self.targets()), []
        while len(found) < count:
            source, name, mine = chance.choice(self.sources)
            target, port, protocol = chance.choice(targets)
            if mine.version != target.version or target == mine:
                continue
            if name == "outside" and (self._inside(target) or target in names.outside().addresses):
                continue  # the outside has no way there, or is there
            found.append(Sent(source, name, mine, target, port, protocol))
        return found

    def _inside(self, ip: IPAddress) -> bool:
        services = self.world.snapshot.services.values()
        return any(ip in of.cluster_ips for of in services) or self.world.pod_at(ip) is not None

    def answer(self, sent: Sent) -> Answer:
        question = Question(
            source=sent.source,
            target=self.world.at(sent.target),
            port=sent.port,
            protocol=sent.protocol,
            family=4 if sent.mine.version == 4 else 6,
            address=sent.target,
            via="" if node_of(sent.source) else VIA,
        )
        return why(self.world, question)

    def probe(self, sent: Sent) -> Probe:
        own = sent.mine if sent.name == "outside" else None
        return Probe(self.lab.netns(sent.name), sent.target, sent.port, sent.protocol, own, b"all")

    # What is right

    def wrong(self, sent: Sent, answer: Answer, outcome: Outcome) -> str:
        """What is not as `why` says, "" when all is."""
        if answer.cause in {"not-served", "no-such-port"}:
            return "" if outcome.verdict != CONNECTED else f"{sent}: {outcome}, but {answer.sentence}"
        possible = [self._end(sent, target, allowed) for target, allowed in answer.targets]
        if not answer.targets:
            silent = any(leg.silent for leg in answer.legs)
            possible = [(SILENT if silent else REFUSED, "", None)]
        if isinstance(sent.source, Node) and "not permitted" in outcome.error:
            outcome = Outcome(REFUSED)  # how a node's own datagram is refused
        told = probe.read_answer(outcome)
        for verdict, name, client in possible:
            if verdict != outcome.verdict:
                continue
            if told is None or (told.pod == name and client in (None, told.client)):
                return ""
        return f"{sent}: {outcome}, but {answer.sentence} {possible}"

    def _end(self, sent: Sent, target: Target, allowed: bool) -> tuple[str, str, IPAddress | None]:
        """What is seen of an end: the verdict, who answers and whom it sees; None: that may be several."""
        if not allowed:
            return SILENT, "", None
        there = self.world.at(target.address)
        if isinstance(there, Node):
            return REFUSED, "", None
        if isinstance(there, Pod):
            listens = any(each.port == target.port for each in there.ports)
            if not listens:
                return REFUSED, "", None
            itself = sent.name == "/".join(there.key)
            seen = None if itself or isinstance(sent.source, Node) else target.seen_source or sent.mine
            return CONNECTED, "/".join(there.key), seen
        listens = target.port in (*OUTSIDE_PORTS, OUTSIDE_WEB)
        return (CONNECTED if listens else REFUSED), "outside", None


@pytest.fixture(scope="module", params=["direct", "vxlan"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(nodes=2, mode=request.param, flags={"external-ips": ALLOWED}) as made:
        for version, networks in ((4, ("198.51.100.0/24",)), (6, ("2001:db8:51::/64", "2001:db8:52::/64"))):
            via = next(ip for ip in made.node(VIA).addresses if ip.version == version)
            for network in networks:
                made.run("outside", ["ip", f"-{version}", "route", "add", network, "via", str(via)])
        for name in ("all", "eth0"):  # a redirect for a port that no Service has would lead the others astray
            redirects = f"/proc/sys/net/ipv4/conf/{name}/accept_redirects"
            both = redirects, redirects.replace("ipv4", "ipv6")
            made.run("outside", ["sh", "-c", "; ".join(f"echo 0 > {each}" for each in both)])
        for place in made.nodes:  # of refused datagrams each has to be told, many at once
            limits = "/proc/sys/net/ipv4/icmp_ratelimit", "/proc/sys/net/ipv6/icmp/ratelimit"
            made.run(place.name, ["sh", "-c", "; ".join(f"echo 0 > {limit}" for limit in limits)])
        yield made


@pytest.mark.parametrize("seed", [11, 12])
def test_why_says_what_becomes_of_every_packet(lab: Lab, seed: int) -> None:
    chance, objects = Services(seed), []
    verdicts: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    for number in range(STATES):
        objects = chance.next(objects)
        lab.apply([*objects, *chance.services()], prune=True)
        chance.see(lab)
        lab.apply([*objects, *chance.services(), *chance.policies()], prune=True)
        with looked(Asked((), True, None, "", "default"), ask=True) as seen:
            cluster = Cluster(lab, seen)
            packets = cluster.packets(chance, PACKETS)
            answers = {sent: cluster.answer(sent) for sent in packets}

            wrong, outcomes = tried(cluster, answers)

            assert not wrong, "\n".join((f"seed {seed}, state {number}", *wrong))
            verdicts.update(outcome.verdict for outcome in outcomes)
            causes.update(answer.cause for answer in answers.values())
            every_node_follows(lab)
            legs = [leg for sent in packets[:COMPARED] for leg in answers[sent].legs]
            differing = [(leg, found) for leg in legs for found in seen.compared([leg]) if found.differs]
            assert differing == []
    assert min(verdicts[each] for each in (CONNECTED, REFUSED, SILENT)) > PACKETS // 10, verdicts
    print(f"{lab.settings.mode}, seed {seed}: {dict(verdicts)}, {dict(causes)}")


def tried(cluster: Cluster, answers: dict[Sent, Answer]) -> tuple[list[str], list[Outcome]]:
    """What was not as said, and what was seen; rules may take a while to follow what was applied."""
    left, deadline = list(answers), time.monotonic() + LIMIT
    seen: dict[Sent, Outcome] = {}
    while True:
        outcomes = probe.run([cluster.probe(sent) for sent in left])
        seen |= dict(zip(left, outcomes, strict=True))
        left = [sent for sent in left if cluster.wrong(sent, answers[sent], seen[sent])]
        if not left or time.monotonic() > deadline:
            return [cluster.wrong(sent, answers[sent], seen[sent]) for sent in left], list(seen.values())
