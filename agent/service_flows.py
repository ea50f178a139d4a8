"""Flows of Services that must end because nothing translates them as their Service says now.

    client --> 10.96.0.10:53 --> 10.244.1.7:5353     its endpoint is gone         end
    client --> 10.96.0.10:53 --> 10.244.1.8:5353     its endpoint still serves    goes on
    client --> 10.96.0.10:53     (no translation)    began before the Service     end, if it has endpoints
    client --> 192.0.2.9:53  --> 10.244.1.7:5353     podwall's Service is gone    end
    client --> 192.0.2.9:53  --> 198.51.100.1:53     never was podwall's          goes on

Only the first packet of a flow meets the rules; connection tracking translates all others alike, as long as
one comes every now and then. For TCP that is right once it is answered: the endpoint itself ends its
connections. A UDP or SCTP client may go on for ever to nobody, and a SYN that came before its Service is sent
again and again to the same nobody for two minutes. These flows end, and their next packet is a first one.

What podwall translated before is known from the rules themselves: a frontend that a commit removes was in the
kernel until then, also when another agent's commit had put it there. So nothing need be remembered over a
restart, and no translation of somebody else is touched.

A packet that the old rules let through may enter the table just after it was listed: it is listed once more
after a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Set
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, TypeAlias

from agent.cluster.model import EndpointSlice, IPAddress, IPNetwork, Protocol, Service
from agent.cluster.store import Changed
from agent.compile import service_chains
from agent.conntrack import GRACE_S, Ended, Endpoint, Flow, end_flows, list_flows
from agent.nft.diff import Changes
from agent.nft.model import Element, Key, Proto
from agent.pods.model import Attachment
from cni.spec import PortMapping

_NAMES: Mapping[int, Protocol] = {Proto.TCP: "TCP", Proto.UDP: "UDP", Proto.SCTP: "SCTP"}
PROTOCOLS = frozenset({Proto.UDP, Proto.SCTP})
"""Whose flows end also when they have been answered."""
_DATAGRAMS = frozenset(_NAMES[protocol] for protocol in PROTOCOLS)

_OF_PODS = frozenset((*service_chains.HOST_PORTS.values(), *service_chains.HOST_PORTS_AT.values()))
_OF_SERVICES = frozenset(
    name
    for names in (
        service_chains.FRONTENDS,
        service_chains.RESTRICTED,
        service_chains.OUTSIDE,
        service_chains.NODE_PORTS,
        service_chains.OUTSIDE_NODE_PORTS,
    )
    for name in names.values()
)


class Destination(NamedTuple):
    """What the first packet of a flow was sent to; `address` None: any of the nodes' own."""

    address: IPAddress | None
    protocol: int
    port: int


class Target(NamedTuple):
    """Where flows to a destination may lead; `everyone`: it is translated for whoever sends there."""

    endpoints: frozenset[Endpoint]
    everyone: bool = True


class Places(NamedTuple):
    """Addresses of this node and of all Nodes, and the ranges where NodePorts are served (none: all)."""

    local: Set[IPAddress]
    nodes: Set[IPAddress]
    node_ports: tuple[IPNetwork, ...] = ()


ServingAt: TypeAlias = Callable[[IPAddress, Protocol, int, bool], "frozenset[tuple[IPAddress, int]] | None"]
"""Where a flow to address, protocol and port (True: of a node) may go on; None when no Service is there."""

Where: TypeAlias = Callable[[Destination], Target | None]
"""Where flows to this destination may lead now; None when it is no frontend."""


def destination_of(flow: Flow) -> Destination:
    """What the flow's first packet was sent to."""
    to = flow.original.destination
    return Destination(to.address, flow.protocol, to.port)


def must_end(flow: Flow, target: Target | None, was_frontend: bool) -> bool:
    """Whether a flow may not go on: by where its destination leads now, and whether it was a frontend."""
    translated = flow.destination != flow.original.destination
    if target is None:
        return translated and was_frontend
    if translated:
        return flow.destination not in target.endpoints
    return target.everyone and bool(target.endpoints)


def target_of(
    to: Destination, serving_at: ServingAt | None, host_ports: Iterable[Attachment], places: Places
) -> Target | None:
    """Where flows to a destination lead now; None when neither a Service nor a Pod's port is there.

    Other nodes' NodePorts are translated here only for Pods of this node. Without `serving_at` there are
    no Services.
    """
    if to.address is None:
        return None
    address, protocol = to.address, _NAMES[to.protocol]
    found = serving_at(address, protocol, to.port, False) if serving_at else None
    if found is not None:
        return _target(found)
    if address not in places.local and address not in places.nodes:
        return None
    if serving_at and _answers_node_ports(address, places.node_ports):
        found = serving_at(address, protocol, to.port, True)
    if address not in places.local:
        return None if found is None else _target(found, everyone=False)
    return _host_port(address, protocol, to.port, host_ports) if found is None else _target(found)


def _target(endpoints: Iterable[tuple[IPAddress, int]], *, everyone: bool = True) -> Target:
    return Target(frozenset(Endpoint(*each) for each in endpoints), everyone)


def _answers_node_ports(address: IPAddress, ranges: tuple[IPNetwork, ...]) -> bool:
    return any(address in each for each in ranges) if ranges else not address.is_loopback


def _host_port(
    address: IPAddress, protocol: Protocol, port: int, attachments: Iterable[Attachment]
) -> Target | None:
    for attachment in attachments:
        for mapping in attachment.port_mappings:
            if (mapping.host_port, mapping.protocol.upper()) == (port, protocol) and _is_at(mapping, address):
                ends = (ip for ip in attachment.addresses if ip.version == address.version)
                return _target((ip, mapping.container_port) for ip in ends)
    return None


def _is_at(mapping: PortMapping, address: IPAddress) -> bool:
    at = ip_address(mapping.host_ip) if mapping.host_ip else None
    if at is not None and not at.is_unspecified:
        return at == address
    return not address.is_loopback and (at is None or at.version == address.version)


def concerns_datagrams(change: Changed) -> bool:
    """Whether flows of UDP or SCTP may have to end by it; a Node's may: it can change what is near."""
    ports = [
        port.protocol
        for side in (change.before, change.after)
        if isinstance(side, (Service, EndpointSlice))
        for port in side.ports
    ]
    return change.kind == "Node" or not _DATAGRAMS.isdisjoint(ports)


def removed_frontends(changes: Changes, *, serving: bool) -> frozenset[Destination]:
    """The frontends of UDP and SCTP that a commit removed.

    Not `serving`: those of Services went because somebody else serves them now, and their flows go on.
    """
    maps = _OF_PODS | _OF_SERVICES if serving else _OF_PODS
    before = (change.before for change in changes.values() if change.after is None)
    removed = (_frontend(each.key) for each in before if isinstance(each, Element) and each.set in maps)
    return frozenset(each for each in removed if each.protocol in PROTOCOLS)


def begins_tcp(changes: Changes) -> bool:
    """Whether a commit added a frontend of TCP."""
    maps = _OF_PODS | _OF_SERVICES
    added = (change.after for change in changes.values() if change.before is None)
    return any(
        isinstance(each, Element) and each.set in maps and _frontend(each.key).protocol == Proto.TCP
        for each in added
    )


def _frontend(key: Key) -> Destination:
    match key:
        case (int() as protocol, int() as port):
            return Destination(None, protocol, port)
        case (IPv4Address() | IPv6Address() as address, int() as protocol, int() as port):
            return Destination(address, protocol, port)
    raise ValueError(f"{key} is no key of a map of frontends")


async def end_stale(
    where: Where,
    gone: Set[Destination],
    local: Set[IPAddress],
    grace_s: float = GRACE_S,
    *,
    tcp: bool = False,
) -> Ended:
    """End exactly the UDP and SCTP flows that may not go on; `tcp`: and those of TCP that began too early.

    `gone` are frontends that were just removed, `local` the nodes' own addresses. `where` is called by the
    event loop, after each listing, once for each destination. Raises ConntrackError.
    """
    total = Ended()
    for pause_s in (0.0, grace_s):
        await asyncio.sleep(pause_s)
        flows = await list_flows(protocols=PROTOCOLS)
        if tcp:
            flows += tuple(
                each for each in await list_flows(protocols={Proto.TCP}, unanswered=True) if _early(each)
            )
        destinations = await asyncio.to_thread(_destinations, flows)
        targets = {each: where(each) for each in destinations}
        before = {each for each in destinations if _was(each, gone, local)}
        stale = await asyncio.to_thread(_stale, flows, targets, before)
        if stale:
            more = await end_flows(stale)
            total = Ended(total.ended + more.ended, total.gone + more.gone)
    return total


def _early(flow: Flow) -> bool:
    """Whether its first packet was translated by nobody."""
    return flow.destination == flow.original.destination


def _destinations(flows: Iterable[Flow]) -> set[Destination]:
    return {destination_of(flow) for flow in flows}


def _was(destination: Destination, gone: Set[Destination], local: Set[IPAddress]) -> bool:
    if destination in gone:
        return True
    return destination.address in local and destination._replace(address=None) in gone


def _stale(
    flows: Iterable[Flow], targets: Mapping[Destination, Target | None], before: Set[Destination]
) -> tuple[Flow, ...]:
    return tuple(
        flow
        for flow in flows
        if must_end(flow, targets[destination := destination_of(flow)], destination in before)
    )
