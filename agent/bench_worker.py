"""The process that measures for `podwall bench`, alone in a network namespace of its own.

    agent --a command a line--> here, in a new namespace --an answer a line--> agent

    {"do": "serve"}                                     listen, for other workers to connect to
    {"do": "pair", "netns": "/proc/71/ns/net"}          a veth pair to another worker, and nothing else on it
    {"do": "connections", "address", "port", "seconds"} connections one after the other, each reset at once
    {"do": "requests", ...}                             a byte there and back, again and again
    {"do": "throughput", ...}                           as much as goes through

It ends with its standard input, that is with the agent, and its namespace and links end with it. All of it is
Python, which takes a share of each figure: what counts is one way beside another.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any

from agent.pods import rtnetlink
from agent.pods.rtnetlink import Rtnetlink

CONNECT_PORT, REQUEST_PORT, STREAM_PORT = 7001, 7002, 7003
PORTS = {"connections": CONNECT_PORT, "requests": REQUEST_PORT, "throughput": STREAM_PORT}
RAW = IPv4Address("198.18.0.1"), IPv4Address("198.18.0.2")  # RFC 2544: for measuring alone
MOST_CONNECTIONS = 2000
"""Of one turn: each is an entry in the node's connection tracking for some seconds."""
LIMIT_S = 3.0

_CLONE_NEWNET = 0x40000000
_MACS = "02:00:00:00:00:01", "02:00:00:00:00:02"
_RAW_LINK, _RAW_MTU, _LOOPBACK = "raw0", 1500, 1
_CHUNK = bytes(1 << 17)
_COUNT = struct.Struct("!Q")
_RESET = struct.pack("ii", 1, 0)
_libc = ctypes.CDLL(None, use_errno=True)

Address = tuple[str, int]


def main() -> None:
    """Do what is asked until nobody asks any more."""
    _check(_libc.unshare(_CLONE_NEWNET), "no network namespace can be made")
    with Rtnetlink() as kernel:
        kernel.ask(rtnetlink.set_up("lo", _LOOPBACK))
    _say({"ready": True})
    for line in sys.stdin:
        try:
            _say(_done(json.loads(line)))
        except OSError as error:
            _say({"error": error.strerror or str(error)})


def _done(command: Mapping[str, Any]) -> Mapping[str, object]:
    match command["do"]:
        case "serve":
            serve()
            return {}
        case "pair":
            pair(command["netns"])
            return {}
    to = str(command["address"]), int(command["port"])
    return MEASUREMENTS[command["do"]](to, float(command["seconds"]))


def _say(answer: Mapping[str, object]) -> None:
    print(json.dumps(answer), flush=True)


def _check(failed: int, what: str) -> None:
    if failed:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


# A veth pair without any rules


def pair(other: str) -> None:
    """Between this namespace and another worker's, with an address at each end."""
    own, there = (os.open(each, os.O_RDONLY) for each in ("/proc/thread-self/ns/net", other))
    names = {"link": _RAW_LINK, "mac": _MACS[0], "peer": _RAW_LINK, "peer_mac": _MACS[1]}
    try:
        with Rtnetlink() as kernel:
            kernel.ask(rtnetlink.new_veth(**names, mtu=_RAW_MTU, netns=there))
        _use(*RAW)
        _check(_libc.setns(there, _CLONE_NEWNET), "the other namespace cannot be entered")
        _use(*reversed(RAW))
    finally:
        _check(_libc.setns(own, _CLONE_NEWNET), "the own namespace cannot be entered")
        os.close(own)
        os.close(there)


def _use(own: IPv4Address, peer: IPv4Address) -> None:
    index = socket.if_nametoindex(_RAW_LINK)
    with Rtnetlink() as kernel:
        kernel.ask(
            rtnetlink.set_up(_RAW_LINK, index),
            rtnetlink.new_address(own, index),
            rtnetlink.new_route(peer, index),
        )


# The server


def serve() -> None:
    """Listen at the three ports, in threads that end with the process."""
    for port, answer in (
        (CONNECT_PORT, None),
        (REQUEST_PORT, _answer_requests),
        (STREAM_PORT, _count_bytes),
    ):
        for family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):  # a kernel without IPv6
                _listen(family, port, answer)


def _listen(family: socket.AddressFamily, port: int, answer: Callable[[socket.socket], None] | None) -> None:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listening.bind(("", port))
    listening.listen(1024)
    threading.Thread(target=_accept, args=(listening, answer), daemon=True).start()


def _accept(listening: socket.socket, answer: Callable[[socket.socket], None] | None) -> None:
    while True:
        with suppress(OSError):
            connection, _ = listening.accept()
            if answer is None:
                connection.close()
            else:
                threading.Thread(target=_serve, args=(connection, answer), daemon=True).start()


def _serve(connection: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    with connection, suppress(OSError):
        connection.settimeout(2 * LIMIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer(connection)


def _answer_requests(connection: socket.socket) -> None:
    while data := connection.recv(1):
        connection.sendall(data)


def _count_bytes(connection: socket.socket) -> None:
    room, count = bytearray(len(_CHUNK)), 0
    while got := connection.recv_into(room):
        count += got
    connection.sendall(_COUNT.pack(count))


# What is measured


def connections(to: Address, seconds: float) -> dict[str, float]:
    """How many a second, and what each took; closed by a reset, so that none waits for its end."""
    taken: list[int] = []
    begun = time.perf_counter_ns()
    end = begun + seconds * 1e9
    while time.perf_counter_ns() < end and len(taken) < MOST_CONNECTIONS:
        with _socket(to) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            before = time.perf_counter_ns()
            connection.connect(to)
            taken.append(time.perf_counter_ns() - before)
    return _rates(taken, time.perf_counter_ns() - begun)


def requests(to: Address, seconds: float) -> dict[str, float]:
    """Bytes there and back on one connection: how many a second, and what each took."""
    taken: list[int] = []
    with _socket(to) as connection:
        connection.connect(to)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun = before = time.perf_counter_ns()
        while before < begun + seconds * 1e9:
            connection.sendall(b".")
            if not connection.recv(1):
                raise OSError(0, "the other end closed the connection")
            after = time.perf_counter_ns()
            taken.append(after - before)
            before = after
        return _rates(taken, before - begun)


def throughput(to: Address, seconds: float) -> dict[str, float]:
    """Bits per second that the other end has read."""
    with _socket(to) as connection:
        connection.connect(to)
        begun = time.perf_counter_ns()
        while time.perf_counter_ns() < begun + seconds * 1e9:
            connection.sendall(_CHUNK)
        connection.shutdown(socket.SHUT_WR)
        (count,) = _COUNT.unpack(connection.recv(_COUNT.size, socket.MSG_WAITALL))
        return {"bits_per_second": count * 8e9 / (time.perf_counter_ns() - begun)}


MEASUREMENTS: Mapping[str, Callable[[Address, float], dict[str, float]]] = {
    "connections": connections,
    "requests": requests,
    "throughput": throughput,
}


def _socket(to: Address) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_STREAM)
    made.settimeout(LIMIT_S)
    return made


def _rates(taken: list[int], whole_ns: int) -> dict[str, float]:
    ordered = sorted(taken)
    p50, p99 = (ordered[len(ordered) * of // 100] / 1e3 for of in (50, 99))
    return {"per_second": len(taken) / whole_ns * 1e9, "p50_us": p50, "p99_us": p99}


if __name__ == "__main__":
    main()
