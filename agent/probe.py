"""Whether this node's Pods really reach others: connections tried from inside their network namespaces.

    {"pods": [{"namespace", "name", "targets": [[address, port, protocol], ...]}, ...], "quiet_s": 1.25}

    a Pod's namespace  <--enters--  a thread that opens sockets there and ends
          |
       sockets  --connect-->  one thread that waits for all of them  -->  [verdict, words] for each

    connected     the handshake was done (TCP, SCTP), or an answer came (UDP)
    refused       a reset, an abort or ICMP says that nobody listens: the packet arrived all the same
    unreachable   the kernel or ICMP says that there is no way
    silent        nothing came back
    failed        it could not be tried; the words say why

Nothing is needed in the Pods' images. A socket stays in the namespace in which it was made, so that no thread
stays there with it, and none ever comes back from one. Silence is measured for all together: it is over when
none has heard anything for `quiet_s`, so that a slow node is never taken for a closed one. A datagram says
nothing unless somebody answers it: at port 53 it is a request that name servers refuse, else an empty line.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from agent.calls import Answer, Body
from agent.cluster.model import IPAddress, Pod
from agent.pods.model import Attachment
from agent.pods.rtnetlink import Rtnetlink
from agent.pods.wiring import enter
from cni import spec
from cni.spec import CniError

CONNECTED, REFUSED, UNREACHABLE, SILENT, FAILED = "connected", "refused", "unreachable", "silent", "failed"

MOST_TARGETS = 2000
"""Of one question, of all its Pods together."""
QUIET_S, MOST_QUIET_S = 1.25, 5.0
"""Enough for one lost packet: TCP asks again after a second."""
WHOLE_S = 7.0
"""Of one question, however many answer late."""
TURN_S = 2.0
"""How long a question waits for the one before it; the command waits ten seconds for both."""

_RESEND_S = 0.4
_SPARE_DESCRIPTORS = 256
_REFUSED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)
_DNS_PORT = 53
_DNS_STATUS = b"\x70\x77\x10" + bytes(9)
"""A server status request (RFC 1035, OPCODE 2): refused at once, where a name might be asked of others."""

log = logging.getLogger(__name__)


class Target(NamedTuple):
    """What to connect to; the protocol is TCP, UDP or SCTP."""

    address: IPAddress
    port: int
    protocol: str


class Outcome(NamedTuple):
    """What became of one connection, and the words for it where there are any."""

    verdict: str
    words: str = ""


class Inside(NamedTuple):
    """A Pod's network namespace, and the hardware address by which it is known to be the Pod's."""

    path: Path
    ifname: str
    mac: str


@dataclass(frozen=True, slots=True)
class Question:
    """From where (None: the node's own namespace; a text: why that is not known), and to whom."""

    inside: Inside | str | None
    targets: tuple[Target, ...]


FindInside = Callable[[str, str], Inside | str | None]
"""Where the network namespace of a Pod is, by its namespace and name; see `inside_of`."""


def answers(find_inside: FindInside) -> Mapping[str, Answer]:
    """The call `probe`; one question is answered at a time, so that descriptors are bounded."""
    turn = asyncio.Lock()

    async def probe(body: Body) -> object:
        asked, quiet_s = read(body)
        questions = [Question(find_inside(namespace, name), targets) for namespace, name, targets in asked]
        try:
            async with asyncio.timeout(TURN_S):
                await turn.acquire()
        except TimeoutError:
            raise CniError(spec.TRY_AGAIN_LATER, "other connections are being tried; ask again") from None
        try:
            outcomes = await asyncio.to_thread(run, questions, quiet_s)
        finally:
            turn.release()
        log.info("event=probed pods=%d connections=%d", len(questions), sum(map(len, outcomes)))
        return {"pods": [[[*outcome] for outcome in each] for each in outcomes]}

    return {"probe": probe}


# Questions


def read(body: Body) -> tuple[list[tuple[str, str, tuple[Target, ...]]], float]:
    """The Pods and targets that a question names, and its silence in seconds. Raises CniError."""
    try:
        quiet_s = max(0.0, min(float(body.get("quiet_s", QUIET_S)), MOST_QUIET_S))
        asked = [(str(of["namespace"]), str(of["name"]), _targets(of["targets"])) for of in body["pods"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CniError(spec.DECODING_FAILURE, f"this names no connections to try: {error!r}") from error
    if (count := sum(len(targets) for _, _, targets in asked)) > MOST_TARGETS:
        raise CniError(spec.FAILED, f"{count} connections are more than {MOST_TARGETS} in one question")
    return asked, quiet_s


def _targets(said: Iterable[Sequence[Any]]) -> tuple[Target, ...]:
    targets = tuple(Target(ip_address(str(address)), port, protocol) for address, port, protocol in said)
    for _, port, protocol in targets:
        if type(port) is not int or not 1 <= port <= 65535 or protocol not in _KINDS:
            raise ValueError(f"{protocol!r} {port!r} is no port")
    return targets


def inside_of(
    namespace: str,
    name: str,
    *,
    attachments: Iterable[Attachment],
    pods: Mapping[tuple[str, str], Pod],
    node: str,
) -> Inside | str | None:
    """Where a Pod's network namespace is; None: it is the node's own, a text: why that is not known."""
    own = [each for each in attachments if (each.namespace, each.pod) == (namespace, name)]
    if own:  # the newest, where an old sandbox of the same Pod is still there
        return Inside(_below_run(Path(own[-1].netns)), own[-1].ifname, own[-1].mac)
    pod = pods.get((namespace, name))
    if pod is not None and pod.host_network and pod.node == node and not pod.finished:
        return None
    return f"Pod {namespace}/{name} is not on the network of {node}"


def _below_run(path: Path) -> Path:
    """/var/run is /run on a node, but may be something else in the agent's container."""
    return Path("/run") / path.relative_to("/var/run") if path.is_relative_to("/var/run") else path


# Namespaces


def open_inside(inside: Inside | None, attempts: Sequence[Attempt]) -> None:
    """Open each attempt's socket in a namespace. Raises OSError; one socket's error is its outcome."""
    if inside is not None:
        _enter(inside)
    for attempt in attempts:
        attempt.open()


def _enter(inside: Inside) -> None:
    """Move the calling thread there. Raises OSError, also when it is another Pod's by now."""
    try:
        descriptor = os.open(inside.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the Pod's network namespace {inside.path} cannot be opened: {error.strerror}; "
            "the agent's container needs the node's /run/netns with mountPropagation: HostToContainer",
        ) from error
    try:
        enter(descriptor)
    finally:
        os.close(descriptor)
    with Rtnetlink() as kernel:
        if not any((link.name, link.mac) == (inside.ifname, inside.mac) for link in kernel.links()):
            raise OSError(errno.ENXIO, f"{inside.path} is not the Pod's network namespace any more")


# Sockets


class Attempt:
    """One connection: its socket, and what became of it."""

    __slots__ = ("opened", "outcome", "target")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.opened: socket.socket | None = None
        self.outcome: Outcome | None = None

    @property
    def is_datagram(self) -> bool:
        return self.target.protocol == "UDP"

    @property
    def event(self) -> int:
        """What it waits for: a handshake's end makes a socket writable."""
        return selectors.EVENT_READ if self.is_datagram else selectors.EVENT_WRITE

    def open(self) -> None:
        kind, number = _KINDS[self.target.protocol]
        family = socket.AF_INET if self.target.address.version == 4 else socket.AF_INET6
        try:
            self.opened = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
            if self.target.protocol == "SCTP" and family == socket.AF_INET6:
                # an association has all addresses of both ends, unless it is told to know one family
                self.opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        except OSError as error:
            self.fail(FAILED, f"no {self.target.protocol} socket can be made: {error.strerror}")

    def begin(self) -> None:
        self._step(self._connect)

    def go_on(self) -> None:
        """It has something to say."""
        self._step(self._hear)

    def ask_again(self) -> None:
        """Send the datagram once more: one may have been lost."""
        if self.is_datagram and self.outcome is None:
            self._step(self._ask)

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()

    def fail(self, verdict: str, words: str) -> None:
        self.outcome = Outcome(verdict, words)

    def _step(self, step: Callable[[socket.socket], None]) -> None:
        if self.opened is None or self.outcome is not None:
            return
        try:
            step(self.opened)
        except BlockingIOError:
            pass
        except OSError as error:
            refused = error.errno in _REFUSED
            self.fail(REFUSED if refused else UNREACHABLE, error.strerror or str(error))

    def _connect(self, opened: socket.socket) -> None:
        opened.connect((str(self.target.address), self.target.port))
        if self.is_datagram:
            self._ask(opened)
        else:
            self.outcome = Outcome(CONNECTED)

    def _ask(self, opened: socket.socket) -> None:
        opened.send(_DNS_STATUS if self.target.port == _DNS_PORT else b"\n")

    def _hear(self, opened: socket.socket) -> None:
        if self.is_datagram:
            opened.recv(1)
        elif code := opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        self.outcome = Outcome(CONNECTED)


_KINDS = {
    "TCP": (socket.SOCK_STREAM, 0),
    "UDP": (socket.SOCK_DGRAM, 0),
    "SCTP": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}


def run(questions: Sequence[Question], quiet_s: float = QUIET_S) -> list[list[Outcome]]:
    """Try all that is asked and return what became of each; blocks for as long as that takes.

    As many at once as there are descriptors; WHOLE_S in all at the most.
    """
    deadline = time.monotonic() + WHOLE_S
    attempts = [[Attempt(target) for target in question.targets] for question in questions]
    flat = [(question, attempt) for question, of in zip(questions, attempts, strict=True) for attempt in of]
    room = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS)
    for start in range(0, len(flat), room):
        if time.monotonic() < deadline:
            _Batch(flat[start : start + room]).run(quiet_s, deadline)
            continue
        for _, attempt in flat[start : start + room]:
            attempt.fail(FAILED, "no time was left for it: the agent has few descriptors")
    return [[attempt.outcome or Outcome(SILENT) for attempt in of] for of in attempts]


class _Batch:
    """Attempts that run at once."""

    def __init__(self, asked: Sequence[tuple[Question, Attempt]]) -> None:
        self._attempts = [attempt for _, attempt in asked]
        self._by_place: dict[Inside | str | None, list[Attempt]] = {}
        for question, attempt in asked:
            self._by_place.setdefault(question.inside, []).append(attempt)
        self._selector = selectors.EpollSelector()

    def run(self, quiet_s: float, deadline: float) -> None:
        """Give each attempt its outcome; those without one were silent."""
        try:
            self._open()
            for attempt in self._attempts:
                attempt.begin()
                if attempt.outcome is None and attempt.opened is not None:
                    self._selector.register(attempt.opened, attempt.event, attempt)
            self._listen(quiet_s, deadline)
        finally:
            self._selector.close()
            for attempt in self._attempts:
                attempt.close()

    def _open(self) -> None:
        for place, attempts in self._by_place.items():
            if isinstance(place, str):
                reason = place
            else:
                try:
                    with ThreadPoolExecutor(1, "podwall-probe") as thread:  # that no other goes there
                        thread.submit(open_inside, place, attempts).result()
                    continue
                except OSError as error:
                    reason = error.strerror or str(error)
            for attempt in attempts:
                attempt.fail(FAILED, reason)

    def _listen(self, quiet_s: float, deadline: float) -> None:
        heard = sent = time.monotonic()
        while self._selector.get_map():
            now = time.monotonic()
            if now - heard >= quiet_s or now >= deadline:
                return
            if now - sent >= _RESEND_S:
                sent = now
                self._ask_again()
            wait_s = min(sent + _RESEND_S, heard + quiet_s, deadline) - now
            for key, _ in self._selector.select(max(0.0, wait_s)):
                heard = time.monotonic()
                key.data.go_on()
                self._forget_if_done(key.data)

    def _ask_again(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.ask_again()
            self._forget_if_done(key.data)

    def _forget_if_done(self, attempt: Attempt) -> None:
        if attempt.outcome is not None and attempt.opened is not None:
            self._selector.unregister(attempt.opened)
            attempt.close()
