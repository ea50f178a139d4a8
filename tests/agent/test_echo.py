"""Echoes between Pod ranges: what is sent is whole, and only what answers it counts."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from agent import echo
from agent.cluster.model import IPAddress

IDENTIFIER, TOKEN = 0x1234, b"podwall!"
PAIRS: dict[str, tuple[IPAddress, IPAddress]] = {
    "IPv4": (ip_address("10.244.1.0"), ip_address("10.244.2.0")),
    "IPv6": (ip_address("fd00:10:244:1::"), ip_address("fd00:10:244:2::")),
}
ROUTER = {"IPv4": ip_address("192.0.2.1"), "IPv6": ip_address("2001:db8::1")}


def sent(family: str, size: int = 0, sequence: int = 7) -> bytes:
    source, destination = PAIRS[family]
    return echo.request(source, destination, identifier=IDENTIFIER, sequence=sequence, token=TOKEN, size=size)


def packet(family: str, sender: IPAddress, icmp: bytes) -> bytes:
    """What somebody sends to this node."""
    to = PAIRS[family][0].packed
    if family == "IPv4":
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0, sender.packed, to)
        return head + icmp
    return struct.pack("!IHBB16s16s", 6 << 28, len(icmp), 58, 64, sender.packed, to) + icmp


def reply(family: str) -> bytes:
    head = 20 if family == "IPv4" else 40
    icmp = bytes([0 if family == "IPv4" else 129]) + sent(family)[head + 1 :]
    return packet(family, PAIRS[family][1], icmp)


def error(family: str, kind: int, code: int, rest: int = 0) -> bytes:
    return packet(family, ROUTER[family], struct.pack("!BBHI", kind, code, 0, rest) + sent(family, 100))


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("size", [64, 1450, 9000])
def test_a_request_is_as_large_as_asked_and_sums_up(family: str, size: int) -> None:
    made = sent(family, size)
    assert len(made) == size
    source, destination = PAIRS[family]
    if family == "IPv4":
        assert struct.unpack_from("!H", made, 6)[0] == 0x4000, "it may not be fragmented"
        assert echo.checksum(made[20:]) == 0
    else:
        pseudo = source.packed + destination.packed + struct.pack("!II", size - 40, 58)
        assert echo.checksum(pseudo + made[40:]) == 0


@pytest.mark.parametrize("family", PAIRS)
def test_a_request_has_room_for_its_token(family: str) -> None:
    assert len(sent(family)) == echo.HEADERS[4 if family == "IPv4" else 6] + echo.TOKEN


@pytest.mark.parametrize("family", PAIRS)
def test_a_reply_is_known_by_its_token(family: str) -> None:
    other = PAIRS[family][1]
    assert echo.answer(reply(family), IDENTIFIER, TOKEN) == (other, other, 7, "reply", 0)
    assert echo.answer(reply(family), IDENTIFIER, b"another!") is None
    assert echo.answer(reply(family), IDENTIFIER + 1, TOKEN) is None


UNREACHABLE = {"IPv4": (3, 1), "IPv6": (1, 0)}


@pytest.mark.parametrize("family", PAIRS)
def test_an_error_is_known_by_what_it_quotes(family: str) -> None:
    found = echo.answer(error(family, *UNREACHABLE[family]), IDENTIFIER, TOKEN)
    assert found == (ROUTER[family], PAIRS[family][1], 7, "unreachable", 0)
    assert echo.answer(error(family, *UNREACHABLE[family]), IDENTIFIER + 1, TOKEN) is None


@pytest.mark.parametrize(("family", "kind", "code"), [("IPv4", 3, 4), ("IPv6", 2, 0)])
def test_who_finds_it_too_big_says_what_fits(family: str, kind: int, code: int) -> None:
    found = echo.answer(error(family, kind, code, 1280), IDENTIFIER, TOKEN)
    assert found == (ROUTER[family], PAIRS[family][1], 7, "too big", 1280)


OTHERS = {
    "nothing": b"",
    "half a header": sent("IPv4")[:12],
    "no ICMP": b"\x45" + bytes(8) + b"\x06" + bytes(30),
    "ICMP cut off": sent("IPv6")[:44],
    "its own request": sent("IPv4"),
    "an error that quotes nothing": packet("IPv4", ROUTER["IPv4"], bytes([3, 1]) + bytes(6)),
    "an error cut off in what it quotes": error("IPv6", 1, 0)[:70],
    "another version": b"\x75" + bytes(60),
}


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_is_no_answer(case: str) -> None:
    assert echo.answer(OTHERS[case], IDENTIFIER, TOKEN) is None
