"""ARP and Neighbour Discovery in bytes: who asks for an address, and the answers and announcements.

    request   who has 192.0.2.200? tell 192.0.2.7          NS  to ff02::1:ff00:100  target 2001:db8:7::100
    answer    192.0.2.200 is at MAC, to the one who asked  NA  from the target to the one who asked, S and O
    announce  192.0.2.200 is at MAC, to all                NA  from the target to ff02::1, O

An announcement makes neighbours replace the MAC that they have for the address (RFC 5227 section 3, RFC 4861
section 7.2.6). ARP has two forms of it, and some equipment heeds only one, so both are sent.

Solicitations are checked as RFC 4861 section 7.1.1 says: a hop limit of 255 proves that no router passed them
on. Frames are those of Ethernet; the kernel has taken a VLAN tag off already.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from agent.cluster.model import IPAddress

ETH_ARP, ETH_IPV6 = 0x0806, 0x86DD
_BROADCAST = b"\xff" * 6
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET_IPV4 = (1, 0x0800, 6, 4)
_REQUEST, _REPLY = 1, 2
_IPV6 = struct.Struct("!IHBB16s16s")
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_SOLICITED, _OVERRIDE = 0x40000000, 0x20000000
_OPTION_SOURCE, _OPTION_TARGET = 1, 2
_ALL_NODES = IPv6Address("ff02::1")


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody asks who has `target`; `source` is unspecified when he only probes whether anybody has."""

    target: IPAddress
    source: IPAddress
    mac: bytes


@dataclass(frozen=True, slots=True)
class Claimed:
    """Somebody says that he has the address."""

    address: IPAddress
    mac: bytes


def read(frame: bytes) -> Asked | Claimed | None:
    """What a frame asks or claims; None for anything else and for what is malformed."""
    kind = frame[12:14]
    if kind == b"\x08\x06":
        return _read_arp(frame)
    if kind == b"\x86\xdd":
        return _read_solicitation(frame)
    return None


def answer(asked: Asked, mac: bytes) -> bytes:
    """The frame that tells who asked that the address is at this MAC."""
    if isinstance(asked.target, IPv4Address):
        reply = _ARP.pack(*_ETHERNET_IPV4, _REPLY, mac, asked.target.packed, asked.mac, asked.source.packed)
        return _ethernet(asked.mac, mac, ETH_ARP, reply)
    assert isinstance(asked.source, IPv6Address)
    if asked.source.is_unspecified:  # duplicate address detection: everybody is told
        return _advertisement(asked.target, mac, _ALL_NODES, _multicast_mac(_ALL_NODES), _OVERRIDE)
    return _advertisement(asked.target, mac, asked.source, asked.mac, _SOLICITED | _OVERRIDE)


def announcements(address: IPAddress, mac: bytes) -> tuple[bytes, ...]:
    """The frames that tell everybody on the link that the address is at this MAC now."""
    if isinstance(address, IPv4Address):
        own = address.packed
        request = _ARP.pack(*_ETHERNET_IPV4, _REQUEST, mac, own, bytes(6), own)
        reply = _ARP.pack(*_ETHERNET_IPV4, _REPLY, mac, own, mac, own)
        return tuple(_ethernet(_BROADCAST, mac, ETH_ARP, body) for body in (request, reply))
    return (_advertisement(address, mac, _ALL_NODES, _multicast_mac(_ALL_NODES), _OVERRIDE),)


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The group to which solicitations for an address are sent (RFC 4291 section 2.7.1)."""
    return IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | int(address) & 0xFFFFFF)


def _read_arp(frame: bytes) -> Asked | Claimed | None:
    if len(frame) < 14 + _ARP.size:
        return None
    *layout, operation, sender_mac, sender, _, target = _ARP.unpack_from(frame, 14)
    if tuple(layout) != _ETHERNET_IPV4:
        return None
    source = IPv4Address(sender)
    if operation == _REQUEST and sender != target:
        return Asked(IPv4Address(target), source, sender_mac)
    return Claimed(source, sender_mac)


def _ethernet(to: bytes, mac: bytes, kind: int, body: bytes) -> bytes:
    return to + mac + kind.to_bytes(2, "big") + body


def _read_solicitation(frame: bytes) -> Asked | None:
    if len(frame) < 14 + 40 + 24:
        return None
    _, length, following, hops, source, destination = _IPV6.unpack_from(frame, 14)
    message = frame[54 : 54 + length]
    if following != _ICMPV6 or hops != 255 or len(message) != length or length < 24:
        return None
    if message[:2] != bytes((_SOLICITATION, 0)) or _checksum(source, destination, message):
        return None
    asker, target = IPv6Address(source), IPv6Address(message[8:24])
    options = _options(message[24:])
    if options is None or target.is_multicast:
        return None
    if asker.is_unspecified and (_OPTION_SOURCE in options or destination != solicited_node(target).packed):
        return None
    return Asked(target, asker, options.get(_OPTION_SOURCE, frame[6:12]))


def _options(data: bytes) -> dict[int, bytes] | None:
    """Link-layer addresses by option; None when an option has no length or does not fit."""
    found = {}
    while data:
        size = data[1] * 8 if len(data) > 1 else 0
        if not size or size > len(data):
            return None
        found[data[0]] = data[2:8]
        data = data[size:]
    return found


def _advertisement(address: IPv6Address, mac: bytes, to: IPv6Address, to_mac: bytes, flags: int) -> bytes:
    message = struct.pack("!BBHI", _ADVERTISEMENT, 0, 0, flags) + address.packed
    message += bytes((_OPTION_TARGET, 1)) + mac
    checksum = _checksum(address.packed, to.packed, message)
    message = message[:2] + checksum.to_bytes(2, "big") + message[4:]
    head = _IPV6.pack(6 << 28, len(message), _ICMPV6, 255, address.packed, to.packed)
    return _ethernet(to_mac, mac, ETH_IPV6, head + message)


def _multicast_mac(group: IPv6Address) -> bytes:
    return b"\x33\x33" + group.packed[12:]


def _checksum(source: bytes, destination: bytes, message: bytes) -> int:
    """ICMPv6's checksum; 0 for a message that holds its own, when it is right."""
    data = source + destination + struct.pack("!II", len(message), _ICMPV6) + message
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
