"""ARP and Neighbour Discovery in bytes, written here and read by scapy, and the other way round."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.utils6 import in6_getnsma

from agent.loadbalancer import filters, frames
from agent.loadbalancer.frames import Asked, Claimed

CLIENT, NODE = bytes.fromhex("020000000107"), bytes.fromhex("020000000101")
CLIENT_MAC, NODE_MAC = CLIENT.hex(":"), NODE.hex(":")
FOUR, SIX = ip_address("192.0.2.200"), ip_address("2001:db8::200")
WHO4, WHO6 = ip_address("192.0.2.7"), ip_address("2001:db8::7")
EVERYBODY = "ff:ff:ff:ff:ff:ff"


def arp(**fields: object) -> bytes:
    whole = {"op": 1, "hwsrc": CLIENT_MAC, "psrc": str(WHO4), "hwdst": "00:00:00:00:00:00", "pdst": str(FOUR)}
    return bytes(Ether(src=CLIENT_MAC, dst=EVERYBODY) / ARP(**{**whole, **fields}))


def solicited(**changes: object) -> bytes:
    options = changes.pop("options", ICMPv6NDOptSrcLLAddr(lladdr=CLIENT_MAC))
    head = {"src": str(WHO6), "dst": "ff02::1:ff00:200", "hlim": 255}
    head |= {name: changes.pop(name) for name in tuple(head) if name in changes}
    packet = IPv6(**head) / ICMPv6ND_NS(**{"tgt": str(SIX), **changes})
    return bytes(Ether(src=CLIENT_MAC, dst="33:33:ff:00:02:00") / (packet / options if options else packet))


ASKED4, ASKED6 = Asked(FOUR, WHO4, CLIENT), Asked(SIX, WHO6, CLIENT)

READ = {
    "a request": (arp(), ASKED4),
    "a request to one node": (arp(hwdst=NODE_MAC), ASKED4),
    "a probe": (arp(psrc="0.0.0.0"), Asked(FOUR, ip_address("0.0.0.0"), CLIENT)),
    "a request, padded": (arp() + bytes(18), ASKED4),
    "an announcement": (arp(psrc=str(FOUR)), Claimed(FOUR, CLIENT)),
    "a reply": (arp(op=2, psrc=str(FOUR), pdst=str(WHO4)), Claimed(FOUR, CLIENT)),
    "ARP for another medium": (arp(hwtype=6), None),
    "ARP for another protocol": (arp(ptype=0x86DD), None),
    "ARP cut short": (arp()[:41], None),
    "a solicitation": (solicited(), ASKED6),
    "a solicitation to the address itself": (solicited(dst=str(SIX)), ASKED6),
    "a solicitation without a source's address": (solicited(options=None), ASKED6),
    "duplicate address detection": (solicited(src="::", options=None), Asked(SIX, IPv6Address("::"), CLIENT)),
    "the same, to the address itself": (solicited(src="::", options=None, dst=str(SIX)), None),
    "the same, with an option it must not have": (solicited(src="::"), None),
    "a solicitation that a router passed on": (solicited(hlim=254), None),
    "a solicitation with a wrong checksum": (solicited(cksum=0x1234), None),
    "a solicitation with another code": (solicited(code=1), None),
    "a solicitation of a multicast address": (solicited(tgt="ff02::1"), None),
    "an option without a length": (solicited(options=ICMPv6NDOptSrcLLAddr(lladdr=CLIENT_MAC, len=0)), None),
    "an option that is cut": (solicited(options=ICMPv6NDOptSrcLLAddr(lladdr=CLIENT_MAC, len=2)), None),
    "another option first": (
        solicited(options=ICMPv6NDOptDstLLAddr() / ICMPv6NDOptSrcLLAddr(lladdr=CLIENT_MAC)),
        ASKED6,
    ),
    "a solicitation cut short": (solicited()[:70], None),
    "an advertisement": (bytes(Ether() / IPv6(hlim=255) / ICMPv6ND_NA(tgt=str(SIX))), None),
    "a tagged frame": (bytes(Ether() / Dot1Q(vlan=5) / ARP(op=1, pdst=str(FOUR))), None),
    "something else": (bytes(Ether() / IP() / UDP()), None),
    "nothing": (b"", None),
}


@pytest.mark.parametrize("case", READ, ids=list(READ))
def test_what_a_frame_asks(case: str) -> None:
    frame, meaning = READ[case]
    assert frames.read(frame) == meaning


@given(st.binary(max_size=120))
def test_any_bytes_are_read_without_harm(data: bytes) -> None:
    frames.read(data)
    frames.read(arp()[:20] + data)
    frames.read(solicited()[:50] + data)


def test_an_answer_to_arp() -> None:
    packet = Ether(frames.answer(ASKED4, NODE))
    assert (packet.src, packet.dst) == (NODE_MAC, CLIENT_MAC)
    told = packet[ARP]
    assert (told.op, told.hwsrc, told.psrc, told.hwdst, told.pdst) == (
        2,
        NODE_MAC,
        str(FOUR),
        CLIENT_MAC,
        str(WHO4),
    )


def test_an_answer_to_a_solicitation() -> None:
    raw = frames.answer(ASKED6, NODE)
    packet = Ether(raw)
    assert (packet.src, packet.dst) == (NODE_MAC, CLIENT_MAC)
    assert (packet[IPv6].src, packet[IPv6].dst, packet[IPv6].hlim) == (str(SIX), str(WHO6), 255)
    told = packet[ICMPv6ND_NA]
    assert (told.R, told.S, told.O, told.tgt) == (0, 1, 1, str(SIX))
    assert told[ICMPv6NDOptDstLLAddr].lladdr == NODE_MAC
    assert bytes(scapy_checksum(packet)) == raw


def test_an_answer_to_duplicate_address_detection_goes_to_all() -> None:
    packet = Ether(frames.answer(Asked(SIX, IPv6Address("::"), CLIENT), NODE))
    assert (packet.dst, packet[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    assert (packet[ICMPv6ND_NA].S, packet[ICMPv6ND_NA].O) == (0, 1)


def test_announcements() -> None:
    request, reply = (Ether(frame) for frame in frames.announcements(FOUR, NODE))
    for packet, operation in ((request, 1), (reply, 2)):
        told = packet[ARP]
        assert (packet.src, packet.dst, told.op) == (NODE_MAC, EVERYBODY, operation)
        assert (told.hwsrc, told.psrc, told.pdst) == (NODE_MAC, str(FOUR), str(FOUR))
    (frame,) = frames.announcements(SIX, NODE)
    packet = Ether(frame)
    assert (packet.dst, packet[IPv6].src, packet[IPv6].dst) == ("33:33:00:00:00:01", str(SIX), "ff02::1")
    assert (packet[ICMPv6ND_NA].S, packet[ICMPv6ND_NA].O, packet[ICMPv6ND_NA].tgt) == (0, 1, str(SIX))
    assert bytes(scapy_checksum(packet)) == frame


def scapy_checksum(packet: Ether) -> Ether:
    """The packet with the checksum as scapy computes it."""
    again = packet.copy()
    del again[ICMPv6ND_NA].cksum
    return again


@given(st.integers(0, 2**128 - 1))
def test_the_group_of_an_address(number: int) -> None:
    address = IPv6Address(number)
    assert frames.solicited_node(address).packed == in6_getnsma(address.packed)


# Filters; test_speaker.py has them run by the kernel


def passed(code: bytes, given_frames: list[bytes]) -> list[bytes]:
    """What a filter lets through, by the meaning of its instructions."""
    return [frame for frame in given_frames if _run(code, frame)]


def _run(code: bytes, frame: bytes) -> int:
    """A machine for the instructions that filters use; beyond the frame's end it drops, as the kernel's."""
    accumulator, at = 0, 0
    sizes = {0x20: 4, 0x28: 2, 0x30: 1}
    while True:
        what, jump_true, jump_false, value = filters._INSTRUCTION.unpack_from(code, at * 8)
        at += 1
        if what == 0x06:
            return int(value)
        if what == 0x15:
            at += jump_true if accumulator == value else jump_false
        else:
            size = sizes[what]
            if value + size > len(frame):
                return 0
            accumulator = int.from_bytes(frame[value : value + size], "big")


def test_what_filters_let_through() -> None:
    others = [arp(pdst="192.0.2.201"), arp(pdst="192.0.2.201", psrc="192.0.2.9")]
    claims = [arp(psrc=str(FOUR)), arp(op=2, psrc=str(FOUR), pdst=str(WHO4))]
    near = solicited(tgt="2001:db8::201", dst="ff02::1:ff00:201")
    advertisement = bytes(Ether() / IPv6(hlim=255) / ICMPv6ND_NA(tgt=str(SIX)))
    everything = [arp(), *claims, *others, solicited(), near, advertisement, b"", arp()[:30]]
    assert passed(filters.arp([FOUR]), everything) == [arp(), *claims]
    assert passed(filters.solicitations([SIX]), everything) == [solicited()]
    assert passed(filters.nothing(), everything) == []


def test_too_many_addresses_for_a_filter() -> None:
    many = [ip_address(0x0A000000 + number) for number in range(filters.MOST_COMPARED + 1)]
    assert passed(filters.arp(many), [arp(), solicited()]) == [arp()]
    assert len(filters.arp(many[:-1])) // 8 <= 4096
