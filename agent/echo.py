"""ICMP echoes in bytes, from one node's Pod range to another's, and what may answer them. Pure.

    this node                                     the other node
    10.244.1.0 --echo request, as from a Pod-->   10.244.2.0 is its own (a tunnel is there): echo reply
    10.244.1.0 <----------------------------      it is nobody's: unreachable, said by one of its addresses

The first address of a Pod range is never a Pod's. A packet to it takes the way of a packet to a Pod up to the
other node's routing, and whatever answers takes the way of a Pod's answer: it is sent to a Pod's range.
Where the node has no tunnel the address belongs to no device, so the node's route for its own range, which
says "unreachable", answers; that proves the same two ways.

Layouts: RFC 791, RFC 792, RFC 8200, RFC 4443.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import NamedTuple

from agent.cluster.model import IPAddress

HEADERS = {4: 20 + 8, 6: 40 + 8}
"""Bytes of IP and ICMP header before the payload."""

TOKEN = 8
"""Bytes at the payload's begin that only the sender knows."""

_ICMP, _ICMP6 = 1, 58
_REQUEST = {4: 8, 6: 128}
_REPLY = {4: 0, 6: 129}
_UNREACHABLE = {4: 3, 6: 1}
_TOO_BIG = {4: {(3, 4)}, 6: {(2, 0)}}
_DONT_FRAGMENT = 0x4000
_HOPS = 64
_IP4 = struct.Struct("!BBHHHBBH4s4s")
_IP6 = struct.Struct("!IHBB16s16s")
_ECHO = struct.Struct("!BBHHH")


class Answer(NamedTuple):
    """What came for a request: from whom, for which destination, and what it says.

    `word`: "reply", "unreachable", or "too big" with the MTU in bytes that passes.
    """

    sender: IPAddress
    destination: IPAddress
    sequence: int
    word: str
    mtu: int = 0


def request(
    source: IPAddress, destination: IPAddress, *, identifier: int, sequence: int, token: bytes, size: int
) -> bytes:
    """A whole packet of `size` bytes, no less than its headers and token; it must not be fragmented."""
    version = source.version
    payload = token + bytes(max(0, size - HEADERS[version] - len(token)))
    echo = _ECHO.pack(_REQUEST[version], 0, 0, identifier, sequence) + payload
    if version == 4:
        head = _IP4.pack(
            0x45, 0, 20 + len(echo), 0, _DONT_FRAGMENT, _HOPS, _ICMP, 0, source.packed, destination.packed
        )
        return head + _with_checksum(echo, checksum(echo))
    pseudo = source.packed + destination.packed + struct.pack("!II", len(echo), _ICMP6)
    head = _IP6.pack(6 << 28, len(echo), _ICMP6, _HOPS, source.packed, destination.packed)
    return head + _with_checksum(echo, checksum(pseudo + echo))


def answer(packet: bytes, identifier: int, token: bytes) -> Answer | None:
    """What a received packet answers; None when it is about something else."""
    found = _read(packet)
    if found is None or len(found[2]) < _ECHO.size:
        return None
    version, sender, icmp = found
    kind, code, _, given, sequence = _ECHO.unpack_from(icmp)
    if kind == _REPLY[version]:
        ours = given == identifier and icmp[_ECHO.size : _ECHO.size + TOKEN] == token
        return Answer(sender, sender, sequence, "reply") if ours else None
    quoted = _quoted(icmp[_ECHO.size :], identifier)
    if quoted is not None and (kind, code) in _TOO_BIG[version]:
        return Answer(sender, *quoted, "too big", sequence if version == 4 else given << 16 | sequence)
    if quoted is not None and kind == _UNREACHABLE[version]:
        return Answer(sender, *quoted, "unreachable")
    return None


def _quoted(packet: bytes, identifier: int) -> tuple[IPAddress, int] | None:
    """The destination and sequence of the request that an error quotes."""
    found = _read(packet, sender=False)
    if found is None or len(found[2]) < _ECHO.size:
        return None
    version, destination, icmp = found
    kind, _, _, given, sequence = _ECHO.unpack_from(icmp)
    return (destination, sequence) if (kind, given) == (_REQUEST[version], identifier) else None


def _read(packet: bytes, sender: bool = True) -> tuple[int, IPAddress, bytes] | None:
    """Version, source (or destination) and ICMP message of a packet; None when it has none."""
    if not packet:
        return None
    version = packet[0] >> 4
    if version == 4 and len(packet) >= _IP4.size and packet[9] == _ICMP:
        at = 12 if sender else 16
        return 4, ip_address(packet[at : at + 4]), packet[(packet[0] & 15) * 4 :]
    if version == 6 and len(packet) >= _IP6.size and packet[6] == _ICMP6:
        at = 8 if sender else 24
        return 6, ip_address(packet[at : at + 16]), packet[40:]
    return None


def _with_checksum(echo: bytes, value: int) -> bytes:
    return echo[:2] + struct.pack("!H", value) + echo[4:]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
