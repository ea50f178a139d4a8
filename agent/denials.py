"""Denied packets, as the rules log them: who wanted what from whom, how often, and why not.

Packets that passed, but would be denied if the policies in audit mode were in force, come the same way.

    NFLOG --read--> Denial --same within a second--> Denied (counted, with the Pods' names)
                                                       +--> the last 1,000       (recent)
                                                       +--> whoever follows      (subscribe)
                                                       +--> podwall_denials_total, and a line in the log

The rules drop by themselves and count every packet in nftables; what comes here is limited by them, and
again by what this process spends on it: 2,000 packets a second are looked at, 17 microseconds each, so a
flood of any size costs about 3 percent of one CPU; the kernel drops what is more and says how many (`lost`).

A packet's bytes are whatever its sender liked; `agent.headers` reads them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace
from prometheus_client import Counter

from agent import headers
from agent.cluster.model import IPAddress
from agent.nflog import RECEIVE_BYTES, Logged, Nflog, NflogError

TOGETHER_S = 1.0
"""Repeats within this time of the first are one event; it is told at the end of it."""

KEPT = 1000
MOST_OPEN = 1000  # different denials within TOGETHER_S, for instance of a port scan; more are told at once
MOST_PODS = 1000  # with a metric of their own
WINDOW_S = 0.1
PACKETS = 200  # a window
LINES_PER_S, BURST = 10, 50
RETRY_S = 10.0

DENIALS = Counter(
    "podwall_denials_total",
    "Denied packets that were logged, by the Pod whose policy denies; nftables' own counters have all",
    ["direction", "namespace", "pod"],
)
AUDITED = Counter(
    "podwall_audit_denials_total",
    "Packets that were logged because a policy in audit mode would deny them; they passed",
    ["direction", "namespace", "pod"],
)
LOST = Counter("podwall_denials_lost_total", "Logged packets that were too many to look at")
UNREADABLE = Counter("podwall_denials_unreadable_total", "Logged packets without readable addresses")

log = logging.getLogger(__name__)


class Denial(Struct, frozen=True, kw_only=True, gc=False):
    """One denied packet; `time` in seconds since the epoch, links by name, `prefix` the rule's own."""

    time: float
    prefix: str
    in_link: str
    out_link: str
    family: int
    source: IPAddress
    destination: IPAddress
    protocol: int
    sport: int = 0
    dport: int = 0
    tcp_flags: int = 0
    icmp_type: int | None = None
    fragment: bool = False


class Reason(Struct, frozen=True, gc=False):
    """Why: the Pod whose policy denies ("namespace/name"), the other end, the direction, the policy class.

    policies: those that isolate it, as "namespace/name". audit: it was let pass, and would be denied if its
    policies in audit mode were in force. What is not known is "", or empty.
    """

    pod: str = ""
    peer: str = ""
    direction: str = ""
    pod_class: str = ""
    policies: tuple[str, ...] = ()
    audit: bool = False


class Denied(Struct, frozen=True, gc=False):
    """A denial with its repeats: the first of them, how many there were, and when the last came."""

    first: Denial
    reason: Reason
    count: int
    last_time: float


Describe: TypeAlias = Callable[[Denial], Reason]
LinkName: TypeAlias = Callable[[int], str]
_Key: TypeAlias = tuple[object, ...]


def denial_of(logged: Logged, now: float, link_name: LinkName) -> Denial | None:
    """What a logged packet says; None without readable addresses. `now` stands in for a missing time."""
    found = headers.read(logged.data)
    if found is None:
        return None
    return Denial(
        time=logged.time or now,
        prefix=logged.prefix,
        in_link=link_name(logged.in_link),
        out_link=link_name(logged.out_link),
        family=found.source.version,
        source=found.source,
        destination=found.destination,
        protocol=found.protocol,
        sport=found.sport,
        dport=found.dport,
        tcp_flags=found.tcp_flags,
        icmp_type=found.icmp_type,
        fragment=found.fragment,
    )


class Repeats:
    """Counts the same denials together; `now` is any clock in seconds that only goes forward."""

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._open: dict[_Key, tuple[float, Denied]] = {}  # in order of their ends

    def add(self, denial: Denial, now: float) -> Denied | None:
        """Count a denial; return one that had to make room for it."""
        key = _key(denial)
        if known := self._open.get(key):
            until, before = known
            self._open[key] = until, replace(before, count=before.count + 1, last_time=denial.time)
            return None
        pushed = self._pop() if len(self._open) >= MOST_OPEN else None
        self._open[key] = now + TOGETHER_S, Denied(denial, self._describe(denial), 1, denial.time)
        return pushed

    def ended(self, now: float) -> Iterator[Denied]:
        """Take out those whose time is over."""
        while (end := self.next_end()) is not None and end <= now:
            yield self._pop()

    def next_end(self) -> float | None:
        """When the next is over; None when there is none."""
        return next(iter(self._open.values()))[0] if self._open else None

    def _pop(self) -> Denied:
        return self._open.pop(next(iter(self._open)))[1]


def _key(denial: Denial) -> _Key:
    """What repeats have in common: everything but time, source port and flags."""
    return (
        denial.source,
        denial.destination,
        denial.protocol,
        denial.dport,
        denial.icmp_type,
        denial.prefix,
        denial.in_link,
        denial.out_link,
        denial.fragment,
    )


class Subscription:
    """What is denied from now on, until closed; `missed` counts what came faster than it was taken."""

    def __init__(self, followers: set[Subscription], most: int) -> None:
        self.missed = 0
        self._followers = followers
        self._waiting: deque[Denied] = deque(maxlen=most)
        followers.add(self)

    def close(self) -> None:
        """Keep nothing any more."""
        self._followers.discard(self)

    def put(self, denied: Denied) -> None:
        """Hand over one more; the oldest goes when there are too many."""
        self.missed += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(denied)

    def take(self) -> list[Denied]:
        """What waits, oldest first."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting


class Denials:
    """Reads one NFLOG group of the caller's network namespace; `describe` names the Pods of a denial.

    `describe` is called once for each event, when its first packet comes.
    """

    def __init__(
        self,
        group: int,
        describe: Describe,
        *,
        receive_bytes: int = RECEIVE_BYTES,
        packets: int = PACKETS,
    ) -> None:
        self.packets = 0
        self.lost = 0
        self._group = group
        self._receive_bytes = receive_bytes
        self._most = packets
        self._left = packets
        self._recent: deque[Denied] = deque(maxlen=KEPT)
        self._followers: set[Subscription] = set()
        self._repeats = Repeats(describe)
        self._lines = _Lines()
        self._counted: set[tuple[Counter, tuple[str, str, str]]] = set()
        self._names: dict[int, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._failed: asyncio.Future[None] | None = None

    def recent(self) -> tuple[Denied, ...]:
        """The last events, oldest first."""
        return tuple(self._recent)

    def subscribe(self, most: int = KEPT) -> Subscription:
        """Follow what is denied from now on; at most so many wait to be taken."""
        return Subscription(self._followers, most)

    def forget(self, namespace: str, pod: str) -> None:
        """Give up the metrics of a Pod that is gone."""
        for counter, labels in [each for each in self._counted if each[1][1:] == (namespace, pod)]:
            self._counted.discard((counter, labels))
            counter.remove(*labels)

    async def run(self) -> None:
        """Read until cancelled. Without the group the rules drop and count all the same, so it is retried."""
        while True:
            try:
                await self._read()
            except NflogError as error:
                log.warning('event=denials-not-read error="%s" retry_s=%g', error, RETRY_S)
            await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        nflog = Nflog(self._group, self._receive_bytes)
        self._failed = loop.create_future()
        windows = asyncio.create_task(self._open_windows(nflog))
        try:
            await self._failed
        finally:
            windows.cancel()
            loop.remove_reader(nflog)
            nflog.close()

    async def _open_windows(self, nflog: Nflog) -> None:
        """Every so often, allow a number of packets to be looked at; wait for the first one of each."""
        loop = asyncio.get_running_loop()
        while True:
            self._left = self._most
            self._names.clear()  # links come and go, and their numbers may return
            readable = asyncio.Event()
            loop.add_reader(nflog, self._readable, nflog, readable)
            await readable.wait()
            await asyncio.sleep(WINDOW_S)

    def _readable(self, nflog: Nflog, readable: asyncio.Event) -> None:
        """Look at one datagram, so that others of the loop come between; stop when the window is used up."""
        readable.set()
        try:
            logged = nflog.read()
        except NflogError as error:
            if self._failed and not self._failed.done():
                self._failed.set_exception(error)
            return
        for each in logged or ():
            self._take(each)
        self._left -= len(logged or ())
        if self._left <= 0:
            asyncio.get_running_loop().remove_reader(nflog)
        LOST.inc(nflog.lost)
        self.lost += nflog.lost
        nflog.lost = 0

    def _take(self, logged: Logged) -> None:
        self.packets += 1
        denial = denial_of(logged, time.time(), self._link_name)
        if denial is None:
            UNREADABLE.inc()
            return
        if pushed := self._repeats.add(denial, asyncio.get_running_loop().time()):
            self._tell(pushed)
        self._wake_at_next_end()

    def _wake_at_next_end(self) -> None:
        end = self._repeats.next_end()
        if self._timer is None and end is not None:
            self._timer = asyncio.get_running_loop().call_at(end, self._tell_ended)

    def _tell_ended(self) -> None:
        self._timer = None
        for denied in self._repeats.ended(asyncio.get_running_loop().time()):
            self._tell(denied)
        self._wake_at_next_end()

    def _tell(self, denied: Denied) -> None:
        self._recent.append(denied)
        for follower in self._followers:
            follower.put(denied)
        self._count(denied)
        self._lines.write(denied, asyncio.get_running_loop().time())

    def _count(self, denied: Denied) -> None:
        namespace, _, pod = denied.reason.pod.rpartition("/")
        counter = AUDITED if denied.reason.audit else DENIALS
        labels = denied.reason.direction, namespace, pod
        if (counter, labels) not in self._counted and len(self._counted) >= MOST_PODS:
            labels = denied.reason.direction, "", "others"
        else:
            self._counted.add((counter, labels))
        counter.labels(*labels).inc(denied.count)

    def _link_name(self, index: int) -> str:
        if index not in self._names:
            self._names[index] = link_name(index)
        return self._names[index]


class _Lines:
    """Writes a line for each event, within a limit."""

    def __init__(self) -> None:
        self._tokens = float(BURST)
        self._since = 0.0
        self._kept_back = 0

    def write(self, denied: Denied, now: float) -> None:
        self._tokens = min(BURST, self._tokens + (now - self._since) * LINES_PER_S)
        self._since = now
        if self._tokens < 1:
            self._kept_back += 1
            return
        self._tokens -= 1
        if self._kept_back:
            log.info("event=denied-not-logged events=%d", self._kept_back)
            self._kept_back = 0
        log.info("%s", line(denied))


def line(denied: Denied) -> str:
    """One event as key=value; addresses with ports where there are any."""
    first, reason = denied.first, denied.reason
    protocol = headers.PROTOCOL_NAMES.get(first.protocol, str(first.protocol))
    event = "would-be-denied" if reason.audit else "denied"
    words = [f"event={event} direction={reason.direction} pod={reason.pod} peer={reason.peer}"]
    words += [f"protocol={protocol} source={first.source} destination={first.destination}"]
    if first.dport:
        words.append(f"dport={first.dport}")
    if first.icmp_type is not None:
        words.append(f"icmp_type={first.icmp_type}")
    if first.fragment:
        words.append("fragment=true")
    words.append(f"in={first.in_link} out={first.out_link} class={reason.pod_class} count={denied.count}")
    return " ".join(words)


def link_name(index: int) -> str:
    """The name of a link of this network namespace; "" for none, its number when it is gone."""
    if not index:
        return ""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)
