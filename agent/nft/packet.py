"""A packet and its connection, and what a rule can ask of them.

    payload(packet, "tcp", "dport")     a header field: ip saddr, th dport, icmpv6 type, ...
    meta(packet, "iifname")             a fact beside the packet
    ct(packet, connection, "state")     a fact of its connection

A fact that the packet does not have (a TCP port of an ICMP packet) raises `AbsentError`, on which a rule
ends; one that nobody can tell from the description raises `UndecidedError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.nft.model import (
    Address,
    CtDirection,
    CtState,
    EtherType,
    NfProto,
    PacketType,
    Proto,
)

_PORTS = frozenset({Proto.TCP, Proto.UDP, Proto.SCTP})
_VERSIONS = {"ip": 4, "ip6": 6, "icmp": 4, "icmpv6": 6}
_TRANSPORT = {
    "tcp": Proto.TCP,
    "udp": Proto.UDP,
    "sctp": Proto.SCTP,
    "icmp": Proto.ICMP,
    "icmpv6": Proto.ICMPV6,
}


class UndecidedError(Exception):
    """Something asked for is not known to the evaluator, the packet's description or the caller."""


class AbsentError(Exception):
    """The packet has no such fact: the rule ends here."""


class Unknown:
    """Bytes of the packet that its description does not have: in no set of ports and protocols."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction of a connection: from where to where; ports are 0 where there are none."""

    source: Address
    target: Address
    sport: int = 0
    dport: int = 0

    @property
    def back(self) -> Flow:
        """The other direction."""
        return Flow(self.target, self.source, self.dport, self.sport)


@dataclass(frozen=True, slots=True)
class Connection:
    """What connection tracking knows of the packet; without flows: a new connection of the packet's own.

    `reply` is the original's other direction unless addresses are translated.
    """

    state: CtState = CtState.NEW
    direction: CtDirection = CtDirection.ORIGINAL
    status: int = 0
    mark: int = 0
    original: Flow | None = None
    reply: Flow | None = None


@dataclass(frozen=True, slots=True)
class Packet:
    """A whole packet (fragments are joined before policy) and where it comes in and goes out.

    `l4proto` is what follows IPv6 extension headers, which `extensions` names; `fields` has any other header
    fields, such as ("ip", "ttl").  SCTP without a tag begins an association.
    """

    source: Address
    target: Address
    l4proto: int = Proto.TCP
    sport: int = 0
    dport: int = 0
    tcp_flags: int = 0
    sctp_tag: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    iifname: str = ""
    oifname: str = ""
    mark: int = 0
    pkttype: int = PacketType.HOST
    extensions: frozenset[str] = frozenset()
    fields: Mapping[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.source.version

    @property
    def flow(self) -> Flow:
        """From where to where it goes."""
        return Flow(self.source, self.target, self.sport, self.dport)


def payload(packet: Packet, protocol: str, name: str) -> Any:
    """A header field by nft's names."""
    if protocol in {"arp", "vlan"} or _VERSIONS.get(protocol, packet.version) != packet.version:
        raise AbsentError
    if _TRANSPORT.get(protocol, packet.l4proto) != packet.l4proto:
        raise AbsentError
    if protocol == "th" and packet.l4proto not in _PORTS:
        return Unknown()  # whatever stands there in the packet
    facts = _FIELDS["transport" if protocol in {"th", "tcp", "udp", "sctp"} else protocol.removesuffix("v6")]
    if name in facts:
        return getattr(packet, facts[name])
    return given(packet, protocol, name)


_FIELDS = {
    "ip": {"saddr": "source", "daddr": "target", "protocol": "l4proto"},
    "ip6": {"saddr": "source", "daddr": "target"},
    "icmp": {"type": "icmp_type", "code": "icmp_code"},
    "transport": {"sport": "sport", "dport": "dport", "flags": "tcp_flags", "vtag": "sctp_tag"},
}


def given(packet: Packet, protocol: str, name: str) -> Any:
    """A header field that only `fields` can have."""
    try:
        return packet.fields[protocol, name]
    except KeyError:
        raise UndecidedError(f"{protocol} {name} of {packet}") from None


def meta(packet: Packet, key: str) -> Any:
    """A fact beside the packet."""
    if key in {"nfproto", "protocol"}:
        v4, v6 = (NfProto.IPV4, NfProto.IPV6) if key == "nfproto" else (EtherType.IP, EtherType.IP6)
        return v4 if packet.version == 4 else v6
    if key not in {"iifname", "oifname", "l4proto", "mark", "pkttype"}:
        raise UndecidedError(f"meta {key}")
    return getattr(packet, key)


def ct(packet: Packet, connection: Connection, key: str, direction: str = "") -> Any:
    """A fact of the packet's connection; of an invalid or untracked packet only its state."""
    if key == "state":
        return connection.state
    if connection.state & (CtState.INVALID | CtState.UNTRACKED):
        raise AbsentError
    if key in {"status", "mark", "direction"}:
        return getattr(connection, key)
    if key in {"protocol", "l3proto"}:
        return meta(packet, "l4proto" if key == "protocol" else "nfproto")
    original = connection.original or packet.flow
    flow = {"original": original, "reply": connection.reply or original.back}.get(direction)
    family, _, name = key.rpartition(" ")
    if flow is None or name not in _ENDS:
        raise UndecidedError(f"ct {direction} {key}")
    if family and flow.source.version != _VERSIONS[family]:
        raise AbsentError
    return getattr(flow, _ENDS[name])


_ENDS = {"saddr": "source", "daddr": "target", "proto-src": "sport", "proto-dst": "dport"}
