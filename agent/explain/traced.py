"""What nftables said of one packet, told in Kubernetes' words, node by node. Pure.

    node1  arrived from Pod shop/web --> Service shop/api:80 leads it to 10.244.2.5:8080 --> egress allowed by
           shop/out spec.egress[0] --> leaves by eth0 to node2
    node2  came in by eth0 --> ingress of shop/api denied: isolated by shop/default-deny

The kernel tells a rule at a time. A base chain's first message has the packet as it is there: where its
destination is another than before, it was translated in between. What a rule of podwall's is for stands in
its comment; policies' rules are named there, and a policy class's chain says which policies isolate the Pod.
A rule of somebody else's that drops the packet is named by its table, chain and handle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from agent.cluster.model import Direction, Protocol
from agent.compile.names import ARP_TABLE, DEVICE_PREFIX, LINK_PREFIX, SERVICES_TABLE, TABLE
from agent.explain.observed import End, Names, nearest_in_words
from agent.explain.policy import Packet, judge
from agent.explain.world import with_port

MARKING = "podwall_trace_"  # the tables that mark the packets
OWN_TABLES = frozenset({(each.family, each.name) for each in (TABLE, SERVICES_TABLE, ARP_TABLE)})

_CLASS = re.compile(r"(ingress|egress)[46]_[0-9a-f]+")
_RULE_COMMENT = re.compile(r"(?P<policy>.+/.+)/(?P<direction>ingress|egress)(?P<index>\[\d+\])")
_AFTER_ROUTING = re.compile(r"postrouting|leav|link_destination|to_node_behind_tunnel|link_output")
_HERE = re.compile(r"input")
_REFUSALS = {
    "refuse": "refused: {} has no endpoint that may answer here, or no such port",
    "drop_all": "dropped: {} has a traffic policy Local, and no endpoint on this node",
    "lost": "dropped: the endpoints of {} changed in this very moment; the packet is sent again",
    "not_first": "dropped: not the first packet of a connection to {}, and the node knows none such",
}


@dataclass(frozen=True, slots=True)
class Told:
    """One step of the way; `ok` is whether the packet came past it, None where nothing was decided."""

    node: str
    stage: str
    ok: bool | None
    text: str


@dataclass(slots=True)
class Visit:
    """What one packet met on one node: the kernel's messages, of one id."""

    node: str
    steps: list[Mapping[str, Any]]
    told: list[Told] = field(default_factory=list)
    dropped: Told | None = None
    to_pod: str = ""
    here: bool = False
    left_by: str = ""

    @property
    def arrived(self) -> Mapping[str, Any]:
        """The packet as it came to the node."""
        packet: Mapping[str, Any] = next(each["packet"] for each in self.steps if each["packet"])
        return packet

    @property
    def last(self) -> Mapping[str, Any]:
        """The packet as it was last seen there."""
        packet: Mapping[str, Any] = [each["packet"] for each in self.steps if each["packet"]][-1]
        return packet


@dataclass(frozen=True, slots=True)
class Account:
    """The whole way; cause: answered, refused, denied, dropped, unreachable, lost, silent, passed, unseen."""

    cause: str
    sentence: str
    steps: tuple[Told, ...]


def way(
    names: Names, heard: Mapping[str, Sequence[Mapping[str, Any]]], asked: tuple[str, int]
) -> list[Visit]:
    """What the first packet to an address and port met on each node, in the order of its way."""
    packets = {node: list(_packets(node, steps)) for node, steps in heard.items()}
    begun = [visit for of in packets.values() for visit in of if _target(visit.arrived) == asked]
    visits = begun[:1]
    while visits:
        here = visits[-1]
        node = names.world.snapshot.nodes.get(here.node)
        sources = {here.last["source"], *(map(str, node.internal_ips) if node else ())}
        passed = {visit.node for visit in visits}
        following = (
            visit
            for node_name, of in packets.items()
            for visit in of
            if node_name not in passed
            and _target(visit.arrived) == _target(here.last)
            and visit.arrived["source"] in sources
        )
        found = next(following, None)
        if found is None:
            break
        visits.append(found)
    return visits


def _packets(node: str, steps: Sequence[Mapping[str, Any]]) -> Iterator[Visit]:
    """Each packet on one node; the kernel gives an id again when a packet is gone."""
    current: dict[str, Visit] = {}
    for each in steps:
        if each["packet"] and each["table"].startswith(MARKING):
            begun = Visit(node, [each])
            if before := current.get(each["id"]):
                yield before
            current[each["id"]] = begun
        elif each["id"] in current:
            current[each["id"]].steps.append(each)
    yield from current.values()


def account(
    names: Names,
    heard: Mapping[str, Sequence[Mapping[str, Any]]],
    asked: tuple[str, int],
    verdict: str = "",
    words: str = "",
) -> Account:
    """How the packet to an address and port fared; verdict is what the client saw, "" when nobody knows."""
    visits = way(names, heard, asked)
    for number, visit in enumerate(visits):
        _tell(names, visit, first=number == 0)
    steps = tuple(told for visit in visits for told in visit.told)
    cause, sentence = _outcome(names, visits, verdict, set(heard))
    if words and cause in ("unseen", "unreachable"):
        sentence = f"{sentence}: {words}"
    return Account(cause, sentence, steps)


def _outcome(names: Names, visits: Sequence[Visit], verdict: str, nodes: set[str]) -> tuple[str, str]:
    if not visits:
        return "unseen", "no packet was seen on the nodes that were asked"
    dropped = next((visit.dropped for visit in visits if visit.dropped), None)
    if dropped is not None:
        return ("denied" if dropped.stage in ("egress", "ingress") else "dropped"), (
            f"{dropped.text} (on {dropped.node})"
        )
    return _undropped(names, visits[-1], verdict, nodes)


def _undropped(names: Names, last: Visit, verdict: str, nodes: set[str]) -> tuple[str, str]:
    """How it fared where no rule dropped it."""
    end = _end(names, last.last, "destination")
    where = f"handed to Pod {last.to_pod}" if last.to_pod else f"left {last.node} by {last.left_by}"
    if last.here:
        where = f"delivered to node {last.node} itself"
    there = bool(last.to_pod) or last.here
    said = (
        f"lost on {last.node} between the rules: no way there, or not the way back to its source (rp_filter)"
    )
    cause = "lost"
    match verdict:
        case "connected":
            cause, said = "answered", f"answered: {end} was reached and answered"
        case "refused" if there:
            cause, said = "refused", f"refused: {where}, where nothing listens at port {last.last['dport']}"
        case "refused":
            cause, said = "refused", f"refused: {where}; {end} or something before it refuses"
        case "unreachable":
            cause, said = "unreachable", f"unreachable: {where}, and the client was told so"
        case "" if there or last.left_by:
            cause, said = "passed", f"passed: {where}"
        case _ if there:
            cause, said = "silent", f"no answer: {where}, but nothing came back: does it listen at {end}?"
        case _ if last.left_by:
            said = _lost(names, last, end, nodes)
    return cause, said


def _lost(names: Names, last: Visit, end: End, nodes: set[str]) -> str:
    node = _node_of(names, last.last["destination"])
    if node and node in nodes and node != last.node:
        return (
            f"lost between {last.node} and {node}: it left {last.node} by {last.left_by} and never came to "
            f"{node}'s rules; look at the network between the nodes (security groups, MTU, routes)"
        )
    return f"no answer: it left {last.node} by {last.left_by} to {end}, and nothing came back"


# One node


def _tell(names: Names, visit: Visit, *, first: bool) -> None:
    """Put into words what a packet met on one node."""
    say = _Said(names, visit)
    say.arrival(first=first)
    before: Mapping[str, Any] | None = None
    for of in _passes(visit.steps):
        packet = of[0]["packet"]
        if before is not None and _target(packet) != _target(before):
            say.translated(before, packet)
        before = packet
        for step in of:
            if say.rule(step, packet):
                return
        say.end_of(of, packet)
    say.departure(before or visit.arrived)


def _passes(steps: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The messages of one base chain after the other, without those of the marking itself."""
    current: list[Mapping[str, Any]] = []
    for each in steps:
        if each["table"].startswith(MARKING):
            continue
        if each["packet"] and current:
            yield current
            current = []
        if current or each["packet"]:
            current.append(each)
    if current:
        yield current


class _Said:
    """The steps of one visit, as they are told."""

    def __init__(self, names: Names, visit: Visit) -> None:
        self._names, self._visit = names, visit
        self._asked = dict[str, bool]()
        self._out = ""
        self._routed = False

    def arrival(self, *, first: bool) -> None:
        link, packet = next((each["in"], each["packet"]) for each in self._visit.steps if each["packet"])
        source = _end(self._names, packet, "source")
        if not link:
            self._say("start", None, f"sent by {self._visit.node} itself")
        elif _is_pod_link(link):
            self._say("start", None, f"came from Pod {source.pod or source} by its link {link}")
        else:
            self._say("arrival", None, f"came in by {link}, from {source.name}")
        if first:
            to = _where(packet, _end(self._names, packet, "destination"))
            met = self._names.met(packet["protocol"], packet["destination"], packet["dport"])
            if met:
                to = f"Service {met.service}:{met.port} ({to})"
            said = self._visit.told.pop()
            self._visit.told.append(Told(said.node, "start", None, f"{said.text}, to {to}"))

    def translated(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        met = self._names.met(before["protocol"], before["destination"], before["dport"])
        to = _end(self._names, after, "destination")
        what = f"Service {met.service}, {met.type} port {met.port}," if met else "a port of the node"
        self._say("service", True, f"{what} leads it to {_where(after, to)}")

    def rule(self, step: Mapping[str, Any], packet: Mapping[str, Any]) -> bool:
        """Tell of one rule; whether the packet ended there."""
        if step["verdict"] == "drop":
            self._dropped(step, packet)
            return True
        found = _RULE_COMMENT.fullmatch(step["comment"])
        if found and _CLASS.fullmatch(step["chain"]) and step["verdict"] in ("accept", "return"):
            direction = found["direction"]
            pod = self._pod_of(direction, packet)
            where = f"spec.{direction}{found['index']}"
            self._say(direction, True, f"{direction} of {pod} allowed by policy {found['policy']} {where}")
            self._asked[direction] = True
        elif step["comment"] == "to itself":
            self._say("ingress", True, "a Pod is never cut off from itself")
        elif step["comment"] == "would be denied":
            names = ", ".join(step["policies"])
            self._say("audit", None, f"policies in audit mode would deny it{': ' + names if names else ''}")
        elif step["chain"] == "leave_cluster" and step["handle"] and step["verdict"] == "accept":
            self._say("masquerade", None, f"its source becomes the node's address: {step['comment']}")
        elif step["chain"] == "own_address" and step["handle"] and step["verdict"] == "accept":
            self._say("masquerade", None, "its source becomes the node's address: the endpoint is elsewhere")
        return False

    def end_of(self, steps: Sequence[Mapping[str, Any]], packet: Mapping[str, Any]) -> None:
        """What a base chain that let the packet pass means."""
        first = steps[0]
        if first["chain"] == "link_source" and _is_pod_link(first["in"]):
            self._say("link", True, "its source address belongs to the link")
        if first["chain"] in ("policy_forward", "policy_input"):
            known = any(each["chain"] == "known_flow" for each in steps)
            self._unasked(packet, first, known=known)
        self._out = first["out"] or self._out
        self._routed = self._routed or bool(_AFTER_ROUTING.search(first["chain"]))
        self._visit.here = self._visit.here or bool(_HERE.search(first["chain"]))

    def departure(self, packet: Mapping[str, Any]) -> None:
        to = _end(self._names, packet, "destination")
        arrived = next(each["in"] for each in self._visit.steps if each["packet"])
        if _is_pod_link(self._out) and not arrived and "ingress" not in self._asked:
            self._say("ingress", True, "what a node sends to its own Pods is not asked for policies")
        if self._visit.here and not self._out:
            self._say("delivery", True, "it is the node's own: delivered here")
        elif _is_pod_link(self._out):
            self._visit.to_pod = to.pod or to.address
            self._say("delivery", True, f"handed to Pod {self._visit.to_pod} by its link {self._out}")
        elif self._out:
            self._visit.left_by = self._out
            node = _node_of(self._names, packet["destination"])
            self._say("route", True, f"leaves by {self._out}" + (f", to {node}" if node else ""))
        else:
            self._say("route", False, "did not come past the node's routing")

    def _unasked(self, packet: Mapping[str, Any], first: Mapping[str, Any], *, known: bool) -> None:
        """The directions of which no policy's rule was heard, for the Pods that are this node's."""
        ends = {"egress": first["in"], "ingress": first["out"]}
        for direction, link in ends.items():
            if not _is_pod_link(link) or direction in self._asked:
                continue
            pod = self._pod_of(direction, packet)
            text = "part of a connection that is known" if known else f"no policy isolates {pod}"
            self._say(direction, True, text)

    def _dropped(self, step: Mapping[str, Any], packet: Mapping[str, Any]) -> None:
        stage, text = self._why_dropped(step, packet)
        self._say(stage, False, text)
        self._visit.dropped = self._visit.told[-1]

    def _why_dropped(self, step: Mapping[str, Any], packet: Mapping[str, Any]) -> tuple[str, str]:
        chain, comment = step["chain"], step["comment"]
        if (step["family"], step["table"]) not in OWN_TABLES:
            said = f" ({comment})" if comment else ""
            where = f"table {step['family']} {step['table']}, chain {chain}"
            what = f"rule handle {step['handle']}" if step["kind"] == "rule" else "its policy"
            return "foreign", f"dropped by somebody else's rules: {where}, {what}{said}"
        if _CLASS.fullmatch(chain):
            return self._denied("egress" if chain.startswith("egress") else "ingress", step, packet)
        if chain in _REFUSALS:
            met = self._names.met(packet["protocol"], packet["destination"], packet["dport"])
            of = f"Service {met.service}:{met.port}" if met else str(_end(self._names, packet, "destination"))
            return "service" if chain != "not_first" else "connection", _REFUSALS[chain].format(of)
        return "link" if "link" in chain else "rule", f"dropped: {comment or f'by chain {chain}'}"

    def _denied(self, direction: str, step: Mapping[str, Any], packet: Mapping[str, Any]) -> tuple[str, str]:
        pod = self._pod_of(direction, packet)
        policies = ", ".join(step["policies"]) or "its namespace's policies"
        text = f"denied: {direction} of {pod} is isolated by {policies}, and no rule admits it"
        protocol: Protocol = packet["protocol"].upper()
        asked = Packet(
            ip_address(packet["source"]), ip_address(packet["destination"]), protocol, packet["dport"] or None
        )
        way: Direction = "Egress" if direction == "egress" else "Ingress"
        judgement = judge(self._names.world, way, asked)
        near = "" if judgement.allowed else nearest_in_words(self._names.world, judgement, asked)
        return direction, f"{text}; {near}" if near else text

    def _pod_of(self, direction: str, packet: Mapping[str, Any]) -> str:
        end = _end(self._names, packet, "source" if direction == "egress" else "destination")
        return f"Pod {end.pod}" if end.pod else end.name

    def _say(self, stage: str, ok: bool | None, text: str) -> None:
        self._visit.told.append(Told(self._visit.node, stage, ok, text))


# Words


def _end(names: Names, packet: Mapping[str, Any], which: str) -> End:
    port = packet["sport" if which == "source" else "dport"]
    address = packet[which]
    pod = names.world.pod_at(ip_address(address))
    return names.end(address, port, "/".join(pod.key) if pod else "")


def _where(packet: Mapping[str, Any], end: End) -> str:
    at = with_port(packet["destination"], packet["dport"])
    return f"{end.name} ({at})" if end.pod or end.node else at


def _node_of(names: Names, address: str) -> str:
    """The node on whose network an address is."""
    pod = names.world.pod_at(ip_address(address))
    if pod is not None:
        return pod.node
    node = names.world.node_at(ip_address(address))
    return node.name if node else ""


def _target(packet: Mapping[str, Any]) -> tuple[str, int]:
    return packet["destination"], packet["dport"]


def _is_pod_link(name: str) -> bool:
    return name.startswith(LINK_PREFIX) and not name.startswith(DEVICE_PREFIX)
