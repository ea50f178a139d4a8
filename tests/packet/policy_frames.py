"""Frames that try to get past a policy: whatever is no ordinary first packet to an allowed port.

A case makes the frames that a Pod sends to another. What its control makes is let through where no policy
is: the same frames, unless the kernel or the rules of links drop them for everybody.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from scapy.layers.inet import (
    ICMP,
    IP,
    TCP,
    UDP,
    IPOption_Router_Alert,
    IPOption_RR,
    fragment,
)
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

EVIL, GOOD = b"podwall-evil", b"podwall-good"
OPEN_PORT = 4444
"""The only port, of UDP, that the tests' policies let through."""

CLOSED_PORT = 8080
_NUMBERS = itertools.count(1)
_MARKS = itertools.count(1)


@dataclass(frozen=True)
class Way:
    """From a Pod's eth0, by its gateway, to an address."""

    mac: str
    gateway: str
    source: str
    target: str
    service: str = ""  # an address that is translated to the target's

    @property
    def version(self) -> int:
        return ip_address(self.target).version

    def ether(self) -> Packet:
        return Ether(src=self.mac, dst=self.gateway)

    def ip(self, target: str = "", **fields: object) -> Packet:
        header = IP if self.version == 4 else IPv6
        return self.ether() / header(src=self.source, dst=target or self.target, **fields)


Frames = list[Packet]
Make = Callable[[Way], Frames]


@dataclass(frozen=True)
class Case:
    """What is sent where it is denied, and what shows that the same way lets through where it is not."""

    denied: Make
    control: Make


def number() -> int:
    """A number for fragments or ports that was not used lately."""
    return next(_NUMBERS) % 20_000 + 20_000


def good(way: Way) -> tuple[Packet, bytes]:
    """A datagram that the policies let through, of a new flow each time, and what is in no other."""
    mark = GOOD + f"-{next(_MARKS)};".encode()
    return way.ip() / UDP(sport=number(), dport=OPEN_PORT) / Raw(mark), mark


def udp(port: int = CLOSED_PORT, size: int = 1) -> Packet:
    return UDP(sport=number(), dport=port) / Raw(EVIL * size)


def tcp(flags: str = "S", port: int = CLOSED_PORT) -> Packet:
    return TCP(sport=number(), dport=port, flags=flags, seq=number(), ack=7) / Raw(EVIL)


def first_packets(way: Way) -> Frames:
    ports = (CLOSED_PORT, OPEN_PORT, 53, 65535, 1)
    return [way.ip() / tcp(port=port) for port in ports] + [
        way.ip() / udp(port) for port in ports if port != OPEN_PORT
    ]


def cut(way: Way, whole: Packet, size: int) -> Frames:
    if way.version == 4:
        return list(fragment(whole, fragsize=size))
    return list(fragment6(whole, size + 14 + 40 + 8))  # the link's header, IP's and the fragment's


def fragmentable(way: Way, upper: Packet) -> Packet:
    if way.version == 4:
        return way.ip(id=number()) / upper
    return way.ip() / IPv6ExtHdrFragment(id=number()) / upper


def fragments(way: Way) -> Frames:
    """Whole datagrams and segments in pieces: in order, backwards, with a cut through the TCP header."""
    pieces = cut(way, fragmentable(way, udp(size=40)), 160)
    pieces += reversed(cut(way, fragmentable(way, udp(size=40)), 160))
    pieces += cut(way, fragmentable(way, tcp() / Raw(EVIL * 40)), 16)
    return pieces + cut(way, fragmentable(way, udp(OPEN_PORT + 1, size=200)), 1280)


def piece(way: Way, key: int, offset: int, more: bool, data: bytes) -> Packet:
    """One fragment of a datagram; offset in bytes."""
    if way.version == 4:
        return way.ip(id=key, frag=offset // 8, flags=int(more), proto=17) / Raw(data)
    return way.ip() / IPv6ExtHdrFragment(id=key, offset=offset // 8, m=int(more), nh=17) / Raw(data)


def header(port: int, length: int) -> bytes:
    """A UDP header without a checksum (of IPv6 it is wrong; what is captured is judged, not read)."""
    return b"\x12\x34" + port.to_bytes(2, "big") + length.to_bytes(2, "big") + b"\x00\x00"


def overlapping(way: Way) -> Frames:
    """The allowed port first, and another one written over it, by fragments that overlap in every way."""
    frames: Frames = []
    evil = EVIL * 4
    for offset in (0, 8, 16):
        key = number()
        frames.append(piece(way, key, 0, True, header(OPEN_PORT, 120) + evil))
        frames.append(piece(way, key, offset, True, header(CLOSED_PORT, 120) + evil))
        frames.append(piece(way, key, 56, False, evil + evil))
        key = number()  # the other order: the header comes last, twice
        frames.append(piece(way, key, 56, False, evil + evil))
        frames.append(piece(way, key, offset, True, header(CLOSED_PORT, 120) + evil))
        frames.append(piece(way, key, 0, True, header(OPEN_PORT, 120) + evil))
    return frames


def stray(way: Way) -> Frames:
    """Middle and last fragments of nothing."""
    return [
        piece(way, number(), offset, more, EVIL * 4) for offset in (8, 64, 1024) for more in (True, False)
    ]


def headers(way: Way) -> Frames:
    """Denied packets behind options and extension headers, alone and in chains."""
    if way.version == 4:
        options = [[IPOption_RR()], [IPOption_Router_Alert()]]
        return [way.ip(options=each) / upper for each in options for upper in (udp(), tcp())]
    routing = IPv6ExtHdrRouting(type=4, segleft=0, addresses=[way.source])
    chains: list[Sequence[Packet]] = [
        (IPv6ExtHdrHopByHop(),),
        (IPv6ExtHdrDestOpt(),),
        (routing,),
        (IPv6ExtHdrFragment(id=number()),),
        (IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), routing, IPv6ExtHdrDestOpt()),
        tuple(IPv6ExtHdrDestOpt() for _ in range(7)),
    ]
    frames: Frames = []
    for chain, upper in itertools.product(chains, (udp(), tcp(), tcp("A"), ICMPv6EchoRequest(data=EVIL))):
        packet = way.ip()
        for each in chain:
            packet /= each.copy()
        frames.append(packet / upper.copy())
    return frames


PROTOCOLS = (4, 33, 41, 47, 50, 51, 88, 89, 103, 112, 132, 136, 253, 254, 255)


def protocols(way: Way) -> Frames:
    """Protocols that no policy can name, and names of the other family's."""
    field = "proto" if way.version == 4 else "nh"
    numbers = (*PROTOCOLS, 58 if way.version == 4 else 1)
    frames = [way.ip(**{field: each}) / Raw(EVIL * 4) for each in numbers]
    return frames + ([way.ip(nh=59) / Raw(EVIL)] if way.version == 6 else [])


FLAGS = ("A", "PA", "FA", "F", "R", "RA", "SA", "SF", "SR", "FPU", "", "SEC", "SU")


def midstream(way: Way) -> Frames:
    ports = (CLOSED_PORT, OPEN_PORT)
    return [way.ip() / tcp(flags, port) for flags in FLAGS for port in ports]


def middle(way: Way) -> Frames:
    """What may be of a flow whose beginning nobody saw; other flags without one are dropped for everybody."""
    return [way.ip() / tcp(flags, port) for flags in ("A", "PA") for port in (CLOSED_PORT, OPEN_PORT)]


def echoes(way: Way) -> Frames:
    if way.version == 6:
        kinds = [ICMPv6EchoRequest(id=7, data=EVIL), ICMPv6EchoReply(id=7, data=EVIL)]
    else:
        kinds = [ICMP(type=kind, id=7) / Raw(EVIL) for kind in (8, 0, 13, 15, 17)]
    return [way.ip() / kind for kind in kinds]


def errors(way: Way, quoted: Packet) -> Frames:
    """Every error about a packet."""
    if way.version == 4:
        kinds = [ICMP(type=3, code=code, nexthopmtu=600) for code in (0, 1, 2, 3, 4, 13)]
        kinds += [ICMP(type=4), ICMP(type=11), ICMP(type=11, code=1), ICMP(type=12)]
        return [way.ip() / kind / quoted.copy() for kind in kinds]
    kinds6: list[Packet] = [ICMPv6DestUnreach(code=code) for code in range(7)]
    kinds6 += [ICMPv6PacketTooBig(mtu=1280), ICMPv6TimeExceeded(), ICMPv6ParamProblem()]
    return [way.ip() / kind / quoted.copy() for kind in kinds6]


def made_up_errors(way: Way) -> Frames:
    """Errors about packets that the target never sent."""
    whole = IP if way.version == 4 else IPv6
    elsewhere = "8.8.8.8" if way.version == 4 else "2001:db8::8"
    return [
        frame
        for to in (way.source, elsewhere)
        for upper in (udp(), tcp())
        for frame in errors(way, whole(src=way.target, dst=to) / upper)
    ]


def translated(way: Way) -> Frames:
    """To a Service's address that is the target's."""
    return [way.ip(way.service) / upper for upper in (udp(), tcp(), tcp("A"), udp(53))]


def translated_and_cut(way: Way) -> Frames:
    """The same, and in fragments."""
    there = Way(way.mac, way.gateway, way.source, way.service)
    return translated(way) + cut(there, fragmentable(there, udp(size=40)), 160)


CASES: dict[str, Case] = {
    "first packets": Case(first_packets, first_packets),
    "fragments": Case(fragments, fragments),
    "overlapping fragments": Case(overlapping, fragments),
    "stray fragments": Case(stray, fragments),
    "options and extension headers": Case(headers, headers),
    "unknown protocols": Case(protocols, protocols),
    "TCP from the middle": Case(midstream, middle),
    "echo and other questions": Case(echoes, echoes),
    "errors about nothing": Case(made_up_errors, first_packets),
    "through a translated address": Case(translated_and_cut, translated),
}


def all_denied(way: Way) -> Iterator[bytes]:
    """Every frame of every case, as bytes."""
    for case in CASES.values():
        for frame in case.denied(way):
            yield bytes(frame)
