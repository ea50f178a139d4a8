"""What the first bytes of an IP packet say about whose it is, however short, odd or hostile they are.

    IPv4 [options]  or  IPv6 [hop-by-hop] [routing] [fragment] [authentication] [...]
      --> TCP, UDP, SCTP: ports    ICMP: type    anything else, or a later fragment: its number alone

What is not there is 0 or None. Only a packet whose addresses cannot be read is None as a whole.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from agent.cluster.model import IPAddress
from agent.nft.model import Proto

PROTOCOL_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}

_WITH_PORTS = frozenset({Proto.TCP, Proto.UDP, Proto.SCTP})
_FRAGMENT, _AUTHENTICATION = 44, 51
# hop-by-hop, routing, destination options, mobility, host identity, shim6
_OPTIONS = frozenset({0, 43, 60, 135, 139, 140})
_MOST_EXTENSIONS = 16  # of a header each: more than that no honest sender uses


class Headers(NamedTuple):
    """Of a packet; `fragment` when it is not the first of several, so that ports are elsewhere."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    sport: int = 0
    dport: int = 0
    tcp_flags: int = 0
    icmp_type: int | None = None
    fragment: bool = False


def read(data: bytes) -> Headers | None:
    """Read a packet from its IP header on; None if it is not IP, or too short for its addresses."""
    match data[0] >> 4 if data else 0:
        case 4 if len(data) >= 20:
            return _ipv4(data)
        case 6 if len(data) >= 40:
            return _ipv6(data)
    return None


def _ipv4(data: bytes) -> Headers:
    start = max(data[0] & 15, 5) * 4
    addresses = IPv4Address(data[12:16]), IPv4Address(data[16:20])
    if int.from_bytes(data[6:8], "big") & 0x1FFF:
        return Headers(*addresses, data[9], fragment=True)
    return _transport(*addresses, data[9], data[start:])


def _ipv6(data: bytes) -> Headers:
    addresses = IPv6Address(data[8:24]), IPv6Address(data[24:40])
    following, offset = data[6], 40
    for _ in range(_MOST_EXTENSIONS):
        if len(data) < offset + 4:
            break
        if following == _FRAGMENT:
            if int.from_bytes(data[offset + 2 : offset + 4], "big") & 0xFFF8:
                return Headers(*addresses, data[offset], fragment=True)
            size = 8
        elif following == _AUTHENTICATION:
            size = (data[offset + 1] + 2) * 4
        elif following in _OPTIONS:
            size = (data[offset + 1] + 1) * 8
        else:
            break
        following, offset = data[offset], offset + size
    return _transport(*addresses, following, data[offset:])


def _transport(source: IPAddress, destination: IPAddress, protocol: int, data: bytes) -> Headers:
    if protocol in _WITH_PORTS and len(data) >= 4:
        ports = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")
        flags = data[13] if protocol == Proto.TCP and len(data) >= 14 else 0
        return Headers(source, destination, protocol, *ports, flags)
    own_icmp = Proto.ICMP if source.version == 4 else Proto.ICMPV6
    if protocol == own_icmp and len(data) >= 2:
        return Headers(source, destination, protocol, icmp_type=data[0])
    return Headers(source, destination, protocol)
