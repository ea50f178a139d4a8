"""New TCP connections per second between two network namespaces, by a small program in C.

    client on CPU 0 --connect, reset--> ... what is measured ... --> server on CPU 1: accept, close

In Python the program itself would be most of each connection.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from stage.figures import say

from lab import netns

SOURCE = Path(__file__).with_name("connections.c")
BINARY = Path("/run/podwall-bench-connections")
CLIENT_CPU, SERVER_CPU = 0, 1
EACH = 100  # connections in a turn


def build() -> None:
    """Compile the program; /run is the sandbox's."""
    subprocess.run(["gcc", "-O2", "-o", str(BINARY), str(SOURCE)], check=True)


class Server:
    """Accepts connections in a namespace."""

    def __init__(self, where: Path, address: str, port: int) -> None:
        words = [str(BINARY), "serve", address, str(port), str(_cpu(SERVER_CPU))]
        self._process = netns.run(where, subprocess.Popen, words, stdout=subprocess.PIPE)
        assert self._process.stdout
        if not self._process.stdout.readline():
            raise SystemExit(f"nobody listens on {address} port {port}")

    def close(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


class Rate(NamedTuple):
    """Connections per second of the clock, and per second of the client's CPU time.

    The CPU time is nearly all of a connection's way to the server and back, as softirqs run where the packet
    was sent; it says more than the clock where others use the machine.
    """

    by_clock: float
    by_cpu: float


def opened(where: Path, address: str, port: int, seconds: float) -> Rate:
    """Open connections one after the other for so long; ends the benchmark when one fails."""
    words = [str(BINARY), "open", address, str(port), str(round(seconds * 1e3)), str(_cpu(CLIENT_CPU))]
    done = netns.run(where, subprocess.run, words, stdout=subprocess.PIPE, text=True, check=True)
    count, failed, clock_ns, cpu_ns = (int(word) for word in done.stdout.split())
    if failed:
        raise SystemExit(f"{failed} of {count + failed} connections to {address} port {port} failed")
    return Rate(count / clock_ns * 1e9, count / cpu_ns * 1e9)


@dataclass
class Case:
    """A client with somebody to connect to, and each round's rate."""

    name: str
    client: Path
    address: str
    port: int
    taken: list[Rate] = field(default_factory=list)


def rounds(cases: Sequence[Case], count: int) -> None:
    """Let cases take turns of some milliseconds, another first in every round.

    They are so short, and of one process, that what else the machine does falls on neighbours alike.
    """
    say(f"{count} rounds of {EACH} connections each")
    named = [word for case in cases for word in (str(case.client), case.address, str(case.port))]
    words = [str(BINARY), "turns", str(count), str(EACH), *named, str(_cpu(CLIENT_CPU))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        number, failed, clock_ns, cpu_ns = map(int, line.split())
        case = cases[number]
        if failed:
            raise SystemExit(f"{failed} of {EACH} connections to {case.address} port {case.port} failed")
        case.taken.append(Rate(EACH / clock_ns * 1e9, EACH / cpu_ns * 1e9))


def lost(case: Case, base: Case, by: Literal["by_clock", "by_cpu"] = "by_cpu") -> float:
    """How many percent fewer connections than the base; the median of the rounds."""
    rates = zip(case.taken, base.taken, strict=True)
    ratios: list[float] = [getattr(mine, by) / getattr(other, by) for mine, other in rates]
    return (1 - statistics.median(ratios)) * 100


HEAD = ("", "connections a second", "lost, percent", "CPU of each, microseconds", "lost by CPU, percent")


def row(case: Case, base: Case) -> list[object]:
    """A case's row below HEAD."""
    rate = statistics.median(each.by_clock for each in case.taken)
    cpu_us = statistics.median(1e6 / each.by_cpu for each in case.taken)
    return [case.name, rate, lost(case, base, "by_clock"), cpu_us, lost(case, base)]


def prepare_node(where: Path) -> None:
    """Let a namespace forward, and let conntrack forget reset connections after a second."""
    netns.run(where, _forward)


def prepare_client(where: Path) -> None:
    """Let a namespace use nearly all source ports, so that none comes again while conntrack knows it."""
    netns.run(where, netns.set_sysctl, "ipv4/ip_local_port_range", "1024 65535")


def _forward() -> None:
    netns.set_sysctl("ipv4/ip_forward", "1")
    netns.set_sysctl("netfilter/nf_conntrack_tcp_timeout_close", "1")


def _cpu(number: int) -> int:
    return min(number, (os.cpu_count() or 1) - 1)
