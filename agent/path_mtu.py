"""How large a packet the way to another node takes: echoes that nobody may fragment, of the size in question.

    all targets    a small echo, and one as large as a Pod's packet is on the way    --> answers
    large missing  sixteen sizes between at once, then sixteen between those         --> the largest that came

IP_PMTUDISC_PROBE sets "don't fragment" and forgets what the kernel believes of the path, so a way that drops
without a word is found too. Only the other node's kernel answers; podwall need not run there. A node that
answers no echo at all tells nothing. Blocks for 0.4 s in each of at most six turns; needs CAP_NET_RAW.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from agent.cluster.model import IPAddress

TURN_S = 0.4
SMALL = 100
"""Bytes of a packet that every path takes."""

_AT_ONCE = 16
_ECHO = struct.Struct("!BBHHH")
_REQUEST, _REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
_HEADER = {4: 20, 6: 40}
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PROBE, _IPV6_DONTFRAG = 10, 23, 3, 62
_ICMP6_FILTER, _SO_RCVBUFFORCE = 1, 33


@dataclass(frozen=True, slots=True)
class Path:
    """`asked` and `takes` are bytes of a whole packet; `takes` 0: the target answered no echo at all."""

    asked: int
    takes: int


def measure(asked: Mapping[IPAddress, int]) -> dict[IPAddress, Path]:
    """The largest packet that reaches each target, up to the size asked for. Raises OSError."""
    with ExitStack() as stack:
        versions = {target.version for target in asked}
        echoes = _Echoes({version: stack.enter_context(_socket(version)) for version in versions})
        both = [(target, each) for target, size in asked.items() for each in (SMALL, size)]
        came = echoes.turn(both)
        came |= echoes.turn(pair for pair in both if pair not in came)  # a lost packet is no answer
        found = {
            target: max((each for there, each in came if there == target), default=0) for target in asked
        }
        bounds = {target: (low, asked[target]) for target, low in found.items() if 0 < low < asked[target]}
        while open_ := {target: _between(*ends) for target, ends in bounds.items() if ends[1] - ends[0] > 1}:
            came = echoes.turn((target, each) for target, sizes in open_.items() for each in sizes)
            for target, sizes in open_.items():
                bounds[target] = _narrowed(bounds[target], sizes, {e for there, e in came if there == target})
    return {
        target: Path(size, bounds[target][0] if target in bounds else found[target])
        for target, size in asked.items()
    }


def _between(low: int, high: int) -> list[int]:
    step = max(1, (high - low) // (_AT_ONCE + 1))
    return list(range(low + step, high, step))


def _narrowed(bounds: tuple[int, int], sizes: list[int], came: set[int]) -> tuple[int, int]:
    low = max(came, default=bounds[0])
    return low, min([each for each in sizes if each > low], default=bounds[1])


class _Echoes:
    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._sockets = sockets
        self._id = int.from_bytes(os.urandom(2), "big")
        self._sequence = 0

    def turn(self, asked: Iterable[tuple[IPAddress, int]]) -> set[tuple[IPAddress, int]]:
        """Send an echo each, and return those that were answered within a turn."""
        sent: dict[int, tuple[IPAddress, int]] = {}
        for target, size in asked:
            self._sequence = (self._sequence + 1) % 0x10000
            if self._send(target, size):
                sent[self._sequence] = (target, size)
        came: set[tuple[IPAddress, int]] = set()
        end = time.monotonic() + TURN_S
        while sent and (left := end - time.monotonic()) > 0:
            for sock in select.select(list(self._sockets.values()), [], [], left)[0]:
                if (sequence := self._answer(sock)) in sent:
                    came.add(sent.pop(sequence))
        return came

    def _send(self, target: IPAddress, size: int) -> bool:
        """False when this node itself cannot send it."""
        version = target.version
        head = _ECHO.pack(_REQUEST[version], 0, 0, self._id, self._sequence)
        packet = head + bytes(size - _HEADER[version] - len(head))
        if version == 4:
            head = _ECHO.pack(_REQUEST[4], 0, _checksum(packet), self._id, self._sequence)
            packet = head + packet[len(head) :]
        try:
            self._sockets[version].sendto(packet, (str(target), 0))
        except OSError as error:
            if error.errno in (errno.EMSGSIZE, errno.ENETUNREACH, errno.EHOSTUNREACH):
                return False
            raise
        return True

    def _answer(self, sock: socket.socket) -> int:
        """The sequence of an answer to one of these echoes, else -1."""
        version = 4 if sock.family == socket.AF_INET else 6
        data = sock.recv(65536)
        start = (data[0] & 0xF) * 4 if version == 4 else 0
        if len(data) < start + _ECHO.size:
            return -1
        kind, _, _, number, sequence = _ECHO.unpack_from(data, start)
        return int(sequence) if (kind, number) == (_REPLY[version], self._id) else -1


def _socket(version: int) -> socket.socket:
    if version == 4:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        _make_room(sock)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PROBE)
        return sock
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    _make_room(sock)
    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PROBE)
    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1)
    blocked = bytearray(b"\xff" * 32)
    word, bit = divmod(_REPLY[6], 32)
    struct.pack_into("=I", blocked, word * 4, 0xFFFFFFFF & ~(1 << bit))
    sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, bytes(blocked))
    return sock


def _make_room(sock: socket.socket) -> None:
    """For a turn's answers at once; without the right to it they must fit into what is usual."""
    with suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)


def _checksum(packet: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet[: len(packet) // 2 * 2]))
    total += packet[-1] << 8 if len(packet) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
