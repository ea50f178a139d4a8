"""Who reaches whom: many connections at once, each opened inside its source's namespace.

    connected     the handshake was done (TCP, SCTP), and whoever answered told its name
    refused       a TCP reset, an SCTP abort, or ICMP says that the port is closed
    unreachable   the kernel or ICMP says that there is no way
    silent        nothing came back

Silence is measured for all together: it is over when nobody has heard anything for a while since everything
was sent. So a slow machine makes the probes slower, and never makes a connection look denied.
"""

from __future__ import annotations

import errno
import resource
import selectors
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from lab import netns
from lab.limits import SLOWNESS
from lab.names import Address

CONNECTED, REFUSED, UNREACHABLE, SILENT = "connected", "refused", "unreachable", "silent"

TCP, UDP = PROTOCOLS = ("TCP", "UDP")
"""What is served on every port; SCTP only where a Pod's port says so."""

SCTP = "SCTP"
QUIET = 1.25
"""Seconds without any answer after which the rest counts as silent.

Enough for one lost packet: TCP and neighbour discovery both ask again after a second. SCTP asks again after
three seconds only (RFC 9260, RTO.Initial).
"""

_RESEND = 0.35
_WHOLE = 60.0 * SLOWNESS
_SPARE_DESCRIPTORS = 256
_REFUSED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)


@dataclass(frozen=True, slots=True)
class Probe:
    """One connection to try: from a namespace to an address; source is an address to bind to, if any."""

    netns: Path
    address: Address
    port: int
    protocol: str = TCP
    source: Address | None = None
    ask: bytes = b"name"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a probe; answer is what was asked for: a name by default."""

    verdict: str
    answer: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered, and how both ends saw it there: client as the Pod saw it, reached on its own address."""

    pod: str
    client: Address
    client_port: int
    reached: Address
    reached_port: int


def read_answer(outcome: Outcome) -> Answer | None:
    """Read what a probe that asked for "all" was told; None when it did not connect."""
    words = outcome.answer.split()
    if outcome.verdict != CONNECTED or len(words) != 5:
        return None
    pod, client, client_port, reached, reached_port = words
    return Answer(pod, ip_address(client), int(client_port), ip_address(reached), int(reached_port))


def has_sctp() -> bool:
    """Whether this kernel has SCTP sockets; asking loads the kernel's module where there is one."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


def run(probes: Sequence[Probe], quiet: float = QUIET) -> list[Outcome]:
    """Try all probes at once and return what became of each, in their order.

    Takes as long as the connections, plus quiet seconds if any stays silent; a minute at the most.
    """
    room = _raise_descriptor_limit() - _SPARE_DESCRIPTORS
    outcomes: list[Outcome] = []
    for start in range(0, len(probes), room):
        outcomes += _Batch(probes[start : start + room], quiet).run()
    return outcomes


class _Attempt:
    """One probe's socket and what it heard."""

    __slots__ = ("answer", "asked", "opened", "outcome", "probe")

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.opened: socket.socket | None = None
        self.outcome: Outcome | None = None
        self.asked = False
        self.answer = b""

    def connect(self) -> None:
        assert self.opened is not None
        try:
            if self.probe.source:
                self.opened.bind((str(self.probe.source), 0))
            self.opened.connect((str(self.probe.address), self.probe.port))
            self._ask()
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)

    def ready(self) -> None:
        """Go on: the socket was connected, or has something to say."""
        assert self.opened is not None
        try:
            if not self.asked:
                if code := self.opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(code, errno.errorcode.get(code, str(code)))
                self._ask()
            else:
                self._hear()
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)

    def ask_again(self) -> None:
        """Send a datagram once more: one may have been lost."""
        if self.probe.protocol == UDP and self.outcome is None:
            self.ready() if not self.asked else self._resend()

    def give_up(self) -> None:
        if self.outcome is None:
            verdict = CONNECTED if self.asked and self.probe.protocol != UDP else SILENT
            self.outcome = Outcome(verdict, self.answer.decode(errors="replace").strip())

    def _ask(self) -> None:
        assert self.opened is not None
        self.opened.send(self.probe.ask + b"\n")
        self.asked = True

    def _resend(self) -> None:
        try:
            self._ask()
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)

    def _hear(self) -> None:
        assert self.opened is not None
        data = self.opened.recv(4096)
        self.answer += data
        if self.probe.protocol == UDP or not data or b"\n" in self.answer:
            self.outcome = Outcome(CONNECTED, self.answer.decode(errors="replace").strip())

    def _failed(self, error: OSError) -> None:
        if self.asked and self.probe.protocol != UDP:
            self.outcome = Outcome(CONNECTED, self.answer.decode(errors="replace").strip(), str(error))
        else:
            verdict = REFUSED if error.errno in _REFUSED else UNREACHABLE
            self.outcome = Outcome(verdict, error=str(error))


class _Batch:
    """Attempts that run at once."""

    def __init__(self, probes: Iterable[Probe], quiet: float) -> None:
        self._attempts = [_Attempt(probe) for probe in probes]
        self._quiet = quiet
        self._selector = selectors.EpollSelector()

    def run(self) -> list[Outcome]:
        try:
            self._open()
            for attempt in self._attempts:
                self._start(attempt)
            self._listen()
        finally:
            self._close()
        return [attempt.outcome or Outcome(SILENT) for attempt in self._attempts]

    def _open(self) -> None:
        by_netns: dict[Path, list[_Attempt]] = defaultdict(list)
        for attempt in self._attempts:
            by_netns[attempt.probe.netns].append(attempt)
        for where, attempts in by_netns.items():
            netns.run(where, _open_sockets, attempts)

    def _start(self, attempt: _Attempt) -> None:
        attempt.connect()
        self._follow(attempt)

    def _follow(self, attempt: _Attempt) -> None:
        """Wait for what comes next; a socket that connects is waited for by its being writable."""
        assert attempt.opened is not None
        known = attempt.opened in self._selector.get_map()
        if attempt.outcome is not None:
            if known:
                self._selector.unregister(attempt.opened)
            attempt.opened.close()
            return
        events = selectors.EVENT_READ if attempt.asked else selectors.EVENT_WRITE
        if known:
            self._selector.modify(attempt.opened, events, attempt)
        else:
            self._selector.register(attempt.opened, events, attempt)

    def _listen(self) -> None:
        began = heard = sent = time.monotonic()
        while self._selector.get_map():
            now = time.monotonic()
            if now - heard >= self._quiet or now - began >= _WHOLE:
                break
            if now - sent >= _RESEND:
                sent = now
                self._ask_again()
            ready = self._selector.select(max(0.0, min(sent + _RESEND, heard + self._quiet) - now))
            for key, _ in ready:
                key.data.ready()
                self._follow(key.data)
            if ready:
                heard = time.monotonic()

    def _ask_again(self) -> None:
        for attempt in [key.data for key in self._selector.get_map().values()]:
            attempt.ask_again()
            self._follow(attempt)

    def _close(self) -> None:
        self._selector.close()
        for attempt in self._attempts:
            attempt.give_up()
            if attempt.opened is not None:
                attempt.opened.close()


def _open_sockets(attempts: Iterable[_Attempt]) -> None:
    for attempt in attempts:
        family = socket.AF_INET if attempt.probe.address.version == 4 else socket.AF_INET6
        kind = socket.SOCK_DGRAM if attempt.probe.protocol == UDP else socket.SOCK_STREAM
        number = socket.IPPROTO_SCTP if attempt.probe.protocol == SCTP else 0
        attempt.opened = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
        if attempt.probe.protocol == SCTP and family == socket.AF_INET6:
            # an association has all addresses of both ends, unless it is told to know one family
            attempt.opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def _raise_descriptor_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard, 2 * _SPARE_DESCRIPTORS)
