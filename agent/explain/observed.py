"""What the nodes' agents saw, joined to what happened: each connection once, each denial once. Pure.

    client --10.96.0.7:80--> node1 --10.244.2.5:8080--> node2          two nodes see one connection:
             asked             |  what leaves one node   |             what leaves the first (its reply tuple
                               +--- enters the next -----+             turned round) is what enters the next

    node1: a flow nobody answered    node2: denied 10.244.1.3 -> 10.244.2.5 tcp 8080
    the same connection: denied, and node1 knows which Service was asked

Where a Service was asked, its name comes from the objects: by ClusterIP, load balancer, external address or
NodePort. Agents name the Pods, because an address may be another Pod's by now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, NamedTuple, TypeAlias

from agent.cluster.model import Direction, Family, IPAddress, Protocol, Service
from agent.compile.endpoints import candidates
from agent.explain.near import miss, nearest
from agent.explain.policy import Judgement, Packet, judge
from agent.explain.world import World, service_addresses

ANSWERED = 1 << 1  # of connection tracking's status: packets were seen both ways
UNANSWERED_S = 130.0
"""So long at most the kernel keeps a TCP flow whose first packets nobody answers."""

NEAR_S = 0.25  # clocks of nodes differ by less

Point: TypeAlias = tuple[str, int]
Wire: TypeAlias = tuple[str, Point, Point, tuple[int, ...]]
"""Protocol, source, destination and ICMP's own numbers, as they stand in a packet between two nodes."""


@dataclass(frozen=True, slots=True)
class End:
    """An end of a connection; pod and node are "" where it is none."""

    address: str
    port: int
    pod: str = ""
    node: str = ""

    def __str__(self) -> str:
        name = self.pod or (f"node/{self.node}" if self.node else "")
        if not name:
            name = f"[{self.address}]" if ":" in self.address and self.port else self.address
        return f"{name}:{self.port}" if self.port else name

    @property
    def name(self) -> str:
        """Who it is, without the port."""
        return str(replace(self, port=0))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"address": self.address, "port": self.port, "pod": self.pod, "node": self.node}


class Met(NamedTuple):
    """A port of a Service, and by which kind of address it was asked."""

    service: str
    port: int
    type: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.service, "port": self.port, "type": self.type}


@dataclass(frozen=True, slots=True)
class Event:
    """One connection or denial; time: seconds since the epoch, None for a flow that is there now.

    event: open, begun, ended, denied, or audit (passed, though policies in audit mode would deny it).
    endpoint_of: Services that lead to the destination, where it is not known which was asked.
    """

    event: str
    time: float | None
    node: str
    protocol: str
    source: End
    destination: End
    asked: End | None = None
    seen_source: End | None = None
    met: Met | None = None
    endpoint_of: tuple[str, ...] = ()
    answered: bool | None = None
    direction: str = ""
    policies: tuple[str, ...] = ()
    reason: str = ""
    count: int = 1
    last_time: float | None = None

    @property
    def denied(self) -> bool:
        """Whether policies are what it is about."""
        return self.event in ("denied", "audit")

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys; times as RFC 3339 in UTC."""
        return {
            "time": moment(self.time),
            "event": self.event,
            "node": self.node,
            "protocol": self.protocol,
            "source": self.source.to_json(),
            "asked": self.asked.to_json() if self.asked else None,
            "service": self.met.to_json() if self.met else None,
            "destination": self.destination.to_json(),
            "endpoint_of": list(self.endpoint_of),
            "seen_source": self.seen_source.to_json() if self.seen_source else None,
            "answered": self.answered,
            "direction": self.direction,
            "policies": list(self.policies),
            "reason": self.reason,
            "count": self.count,
            "last_time": moment(self.last_time),
        }


def moment(when: float | None) -> str | None:
    """A time as RFC 3339 in UTC."""
    if when is None:
        return None
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one node's agent says of one flow (`event` open, begun, ended) or denial, as it came."""

    node: str
    event: str
    time: float | None
    raw: Mapping[str, Any]

    @property
    def entering(self) -> Wire:
        """The packet as it came to this node."""
        return self._wire(self.raw["source"], self.raw["asked"] or self.raw["destination"])

    @property
    def leaving(self) -> Wire:
        """The packet as it went on, or would have."""
        if self.is_denial:
            raw = self.raw
            return raw["protocol"], (raw["source"], raw["sport"]), (raw["destination"], raw["dport"]), ()
        return self._wire(self.raw["seen_source"] or self.raw["source"], self.raw["destination"])

    @property
    def kind(self) -> tuple[str, str, str, int]:
        """What repeats of a denial have in common: protocol, addresses as they went on, port."""
        if self.is_denial:
            raw = self.raw
            return raw["protocol"], raw["source"], raw["destination"], raw["dport"]
        protocol, source, destination, _ = self.leaving
        return protocol, source[0], *destination

    @property
    def is_denial(self) -> bool:
        """Whether policies denied it, or would."""
        return self.event in ("denied", "audit")

    @property
    def answered(self) -> bool:
        """Whether packets went both ways."""
        return not self.is_denial and bool(self.raw["status"] & ANSWERED)

    def _wire(self, source: Mapping[str, Any], destination: Mapping[str, Any]) -> Wire:
        icmp = tuple(self.raw["icmp"] or ())
        return self.raw["protocol"], _point(source), _point(destination), icmp


def _point(end: Mapping[str, Any]) -> Point:
    return end["address"], end["port"]


def flow(node: str, raw: Mapping[str, Any]) -> Seen:
    """A flow of an agent's answer."""
    return Seen(node, raw.get("event", "open"), raw.get("time"), raw)


def denial(node: str, raw: Mapping[str, Any]) -> Seen:
    """A denial of an agent's answer."""
    return Seen(node, "audit" if raw.get("audit") else "denied", raw["time"], raw)


# One connection, seen by several nodes


@dataclass(slots=True)
class Connection:
    """What several nodes saw of one: `first` is where it came in, `last` where it leads to."""

    first: Seen
    last: Seen
    parts: list[Seen] = field(default_factory=list)
    denial: Seen | None = None

    @property
    def time(self) -> float | None:
        """When: of a denial its first packet."""
        return self.denial.time if self.denial else self.first.time


def join(seen: Iterable[Seen], now: float, earlier: Mapping[Wire, Seen] | None = None) -> list[Connection]:
    """The connections behind what the nodes saw; `now` in seconds since the epoch.

    earlier: denied flows of before, by what leaves the node, whose further packets may be denied too.
    """
    found = list(seen)
    connections = _connected([each for each in found if not each.is_denial])
    whose: dict[int, Connection] = {}
    denied: list[Connection] = []
    for of in found:
        if of.is_denial:
            about = [] if of.event == "audit" else [each for each in connections if _is_about(of, each, now)]
            whose |= {id(each): each for each in about}
            denied.append(_denied(of, about, earlier or {}))
    return [*(each for each in connections if id(each) not in whose), *denied]


def _connected(flows: Sequence[Seen]) -> list[Connection]:
    by_entering: dict[tuple[str, Wire], list[Seen]] = {}
    for each in flows:
        by_entering.setdefault((each.event, each.entering), []).append(each)
    later = set[int]()  # those that another node's continues in
    for each in flows:
        if each.leaving != each.entering:
            following = by_entering.get((each.event, each.leaving), ())
            later.update(id(next_one) for next_one in following if next_one.node != each.node)
    made: list[Connection] = []
    for (event, _), same in by_entering.items():
        heads = [each for each in same if id(each) not in later]
        if not heads:
            continue
        first = min(heads, key=lambda each: (each.leaving == each.entering, each.time or 0.0, each.node))
        made.append(_followed(event, first, same, by_entering))
    return made


def _followed(
    event: str, first: Seen, same: list[Seen], by_entering: Mapping[tuple[str, Wire], list[Seen]]
) -> Connection:
    """All that the nodes saw of a flow, from where it came in."""
    whole = Connection(first, first, list(same))
    here = first
    for _ in range(len(by_entering)):
        following = [each for each in by_entering.get((event, here.leaving), ()) if each not in whole.parts]
        if not following:
            break
        here = following[0]
        whole.parts += following
        whole.last = here
    return whole


def _denied(of: Seen, about: Sequence[Connection], earlier: Mapping[Wire, Seen]) -> Connection:
    """A denial with the connections that it is about, which are several when it counts several."""
    parts = [of, *(part for each in about for part in each.parts)]
    exact = [each.first for each in about if each.last.leaving == of.leaving]
    others = [each.first for each in about]
    known = [earlier[of.leaving]] if of.leaving in earlier else []
    return Connection([*exact, *known, *others, of][0], of, parts, of)


def _is_about(of: Seen, connection: Connection, now: float) -> bool:
    """Whether a flow is one whose packets these are: nobody answered it, and it is of that time."""
    last = connection.last
    if last.answered or last.event == "ended" or last.kind != of.kind:
        return False
    if last.time is None:
        return now - float(of.raw["last_time"]) < UNANSWERED_S
    return float(of.raw["time"]) - NEAR_S <= last.time <= float(of.raw["last_time"]) + NEAR_S


# What it means


class Names:
    """A cluster's objects, to name what was seen; made once for many events."""

    def __init__(self, world: World) -> None:
        self.world = world
        nodes = world.snapshot.nodes.values()
        self._nodes = {str(ip): node for node in nodes for ip in (*node.internal_ips, *node.external_ips)}
        self._frontends = dict(_frontends(world.snapshot.services.values()))
        self._node_ports = dict(_node_ports(world.snapshot.services.values()))
        self._endpoints: dict[tuple[str, str, int], list[str]] = {}
        for service in world.snapshot.services.values():
            for key in self._backends(service):
                self._endpoints.setdefault(key, []).append("/".join(service.key))

    def event(self, connection: Connection) -> Event:
        """What happened, in the objects' names."""
        denied = connection.denial
        if denied is not None:
            return self._denial(denied, connection.first)
        first, last = connection.first, connection.last
        destination = self._end(last.raw["destination"])
        asked, met = self._asked(first, destination)
        seen = last.raw["seen_source"] or last.raw["source"]
        source = self._end(first.raw["source"])
        return Event(
            first.event,
            first.time,
            first.node,
            first.raw["protocol"],
            source,
            destination,
            asked=asked,
            seen_source=self._end(seen) if _point(seen) != (source.address, source.port) else None,
            met=met,
            endpoint_of=() if met else self._services_at(first.raw["protocol"], destination),
            answered=any(part.answered for part in connection.parts),
        )

    def _denial(self, of: Seen, first: Seen) -> Event:
        raw = of.raw
        own, peer = (raw["pod"], raw["peer"]) if raw["direction"] == "egress" else (raw["peer"], raw["pod"])
        destination = self.end(raw["destination"], raw["dport"], peer)
        source = self.end(raw["source"], raw["sport"], own)
        asked: End | None = None
        met: Met | None = None
        seen_source: End | None = None
        if not first.is_denial:
            asked, met = self._asked(first, destination)
            if _point(first.raw["source"]) != (source.address, source.port):
                began = self._end(first.raw["source"])
                if began.address != source.address:
                    seen_source, source = source, began
        return Event(
            of.event,
            of.time,
            of.node,
            raw["protocol"],
            source,
            destination,
            asked=asked,
            seen_source=seen_source,
            met=met,
            endpoint_of=() if met else self._services_at(raw["protocol"], destination),
            direction=raw["direction"],
            policies=tuple(raw.get("policies", ())),
            reason=self._why(raw),
            count=raw["count"],
            last_time=raw["last_time"],
        )

    def _asked(self, first: Seen, destination: End) -> tuple[End | None, Met | None]:
        raw = first.raw["asked"]
        if raw is None:
            return None, None
        asked = self._end(raw)
        return asked, self.met(first.raw["protocol"], asked.address, asked.port)

    def met(self, protocol: str, address: str, port: int) -> Met | None:
        """The Service's port that is asked for at an address; a NodePort at any that is no Service's."""
        return self._frontends.get((address, protocol, port)) or self._node_ports.get((protocol, port))

    def _services_at(self, protocol: str, end: End) -> tuple[str, ...]:
        return tuple(sorted(self._endpoints.get((end.address, protocol, end.port), ())))

    def _end(self, raw: Mapping[str, Any]) -> End:
        return self.end(raw["address"], raw["port"], raw["pod"])

    def end(self, address: str, port: int, pod: str) -> End:
        """An end of a connection; the node's name where no Pod is said."""
        node = self._nodes.get(address)
        return End(address, port, pod, node.name if node and not pod else "")

    def _backends(self, service: Service) -> Iterator[tuple[str, str, int]]:
        slices = self.world.snapshot.slices_of(service.key).values()
        families: set[Family] = {4 if of.address_type == "IPv4" else 6 for of in slices}
        for port in service.ports:
            for family in families:
                for address, number in candidates(slices, port, family):
                    yield str(address), port.protocol.lower(), number

    # Why policies deny

    def _why(self, raw: Mapping[str, Any]) -> str:
        if raw["direction"] == "midstream":
            return "not the first packet of a connection, and the node knows none that it belongs to"
        names = ", ".join(raw["policies"]) or "its namespace's policies"
        isolated = "would be isolated" if raw.get("audit") else "is isolated"
        said = f"{raw['direction']} of {raw['pod'] or 'the Pod'} {isolated} by {names}, no rule admits it"
        near = self._nearest(raw)
        return f"{said}; {near}" if near else said

    def _nearest(self, raw: Mapping[str, Any]) -> str:
        """The rule that comes nearest, by the objects as they are now."""
        protocol: Protocol = raw["protocol"].upper()
        packet = Packet(_ip(raw["source"]), _ip(raw["destination"]), protocol, raw["dport"] or None)
        direction: Direction = "Egress" if raw["direction"] == "egress" else "Ingress"
        judgement = judge(self.world, direction, packet)
        if raw.get("audit") and judgement.audit:
            judgement = judgement.audit
        if judgement.allowed:
            return "as the objects are now it would be allowed"
        return nearest_in_words(self.world, judgement, packet)


def nearest_in_words(world: World, of: Judgement, packet: Packet) -> str:
    """The rule that comes nearest to admitting a packet, and what of it does not fit; "" without rules."""
    near = nearest(of)
    if not near:
        return ""
    return f"nearest is {'/'.join(near[0].policy.key)} {near[0].field}: {miss(world, near[0], packet)}"


def _ip(text: str) -> IPAddress:
    return ip_address(text)


def _frontends(services: Iterable[Service]) -> Iterator[tuple[tuple[str, str, int], Met]]:
    for service in services:
        kinds = dict.fromkeys(service.cluster_ips, "ClusterIP")
        kinds |= dict.fromkeys(service.external_ips, "externalIP")
        for ip in service_addresses(service):
            for port in service.ports:
                met = Met("/".join(service.key), port.port, kinds.get(ip, "LoadBalancer"))
                yield (str(ip), port.protocol.lower(), port.port), met


def _node_ports(services: Iterable[Service]) -> Iterator[tuple[tuple[str, int], Met]]:
    for service in services:
        for port in service.ports:
            if port.node_port:
                yield (
                    (port.protocol.lower(), port.node_port),
                    Met("/".join(service.key), port.node_port, "NodePort"),
                )
