"""Follows the API server: one thread per kind lists, then watches; events reach the event loop in order.

    list, page by page --> remove what is no longer there --> Synced (the first time) --> watch
        ^                                                                                   |
        +----------- 410 Gone ------------------------------------+                         |
                                                                   +-- back off, jitter <---+
    watch, from where it was <---- closed, silent, refused --------+

A watch that ends for any reason goes on from the last resource version that an event or a bookmark named;
only `410 Gone` makes a kind be listed again, once, and no other kind with it.  While nothing can be read,
what was read stays.

Threads decode and hand over batches; the loop is woken once for all that has gathered, and takes a bounded
share at a time.  A thread that is too far ahead waits, and TCP lets the server wait with it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from .client import EVERY, PAGE, ApiClient, Selection, open_watch, read_page
from .connection import Connection
from .decode import Change, DecodeError, decode_change
from .errors import BY_STATUS, ApiError, Gone, Refused, Unauthorized, Unreachable
from .model import KINDS, Event, Key, Kind, Object, Remove, Synced, Upsert

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
SHORTEST_WATCH_S = 1.0
MOST_WAITING = 4096
SHARE = 256
"""Events that the loop takes at a time, so that others get their turn."""
END_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a watch may last and be silent (seconds), and how many objects a page of a list has.

    `lag_s` is how long something that the server is known to have may take to arrive.

    The server sends a bookmark about once a minute, so silence means that it, or the way to it, hangs.
    """

    watch_s: tuple[int, int] = (300, 600)
    silence_s: float = 120.0
    page: int = PAGE
    lag_s: float = 1.0


TIMING = Timing()


class WatchState:
    """How one kind is doing, for status and metrics; `heard` is monotonic time, 0 before the first word.

    `delivered` is the resource version up to which everything has been delivered, 0 before the first list.
    """

    def __init__(self) -> None:
        self.synced = False
        self.version = ""
        self.heard = 0.0
        self.lists = 0
        self.watches = 0
        self.events = 0
        self.refused = 0
        self.failures = 0
        self.error = ""
        self.delivered = 0
        self.moved = asyncio.Event()

    def reached(self, version: str) -> None:
        """Everything up to a resource version has been delivered; wakes those who wait for that."""
        self.delivered = int(version) if version.isdecimal() else 0
        self.moved.set()
        self.moved = asyncio.Event()


class ApiSource:
    """Events from the API server, for these kinds and of each the selected objects."""

    def __init__(
        self,
        client: ApiClient,
        kinds: Iterable[Kind] = KINDS,
        selections: Mapping[Kind, Selection] | None = None,
        timing: Timing = TIMING,
    ) -> None:
        self.states = {kind: WatchState() for kind in kinds}
        self._client = client
        self._selections = selections or {}
        self._timing = timing
        self._watches: dict[Kind, _Watch] = {}

    async def reach(self, kind: Kind, version: int) -> None:
        """Return when everything of a kind up to a resource version has been delivered.

        A watch that says nothing for too long is begun anew: its connection may have died without a word.
        """
        state = self.states[kind]
        while state.delivered < version:
            try:
                async with asyncio.timeout(self._timing.lag_s):
                    await state.moved.wait()
            except TimeoutError:
                silent_s = time.monotonic() - state.heard
                log.warning("event=watch-late kind=%s silent=%.1fs", kind, silent_s)
                if silent_s > self._timing.lag_s and (watch := self._watches.get(kind)):
                    watch.begin_anew()

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Deliver events until cancelled; what `deliver` raises ends it."""
        loop = asyncio.get_running_loop()
        handover = _Handover(loop, deliver)
        self._watches = {
            kind: _Watch(
                self._client,
                kind,
                selection=self._selections.get(kind, EVERY),
                timing=self._timing,
                state=state,
                handover=handover,
            )
            for kind, state in self.states.items()
        }
        watches = list(self._watches.values())
        for watch in watches:
            watch.thread.start()
        try:
            await handover.failed
        finally:
            handover.stop()
            for watch in watches:
                watch.stop()
            await _all_ended(watches)


async def _all_ended(watches: Sequence[_Watch]) -> None:
    """Wait for the threads a little; one that is still connecting ends by itself, and unheard."""
    limit = time.monotonic() + END_S

    def join() -> None:
        for watch in watches:
            watch.thread.join(max(0.0, limit - time.monotonic()))

    await asyncio.to_thread(join)


class _Handover:
    """From the threads to the loop: in order, in batches, and never too many."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Event], None]) -> None:
        self.failed: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._deliver = deliver
        self._waiting: deque[Event | tuple[WatchState, str]] = deque()
        self._room = threading.Condition()
        self._woken = False
        self._stopped = False

    def put(self, events: Sequence[Event]) -> None:
        """Hand over a batch; blocks while the loop has too much to do."""
        with self._room:
            while len(self._waiting) >= MOST_WAITING and not self._stopped:
                self._room.wait()
            if self._stopped or not events:
                return
            self._waiting.extend(events)
            self._wake()

    def reached(self, state: WatchState, version: str) -> None:
        """Say, once all that was handed over before is delivered, up to which version that was."""
        with self._room:
            if not self._stopped:
                self._waiting.append((state, version))
                self._wake()

    def stop(self) -> None:
        """Take nothing any more, and let nobody wait."""
        with self._room:
            self._stopped = True
            self._waiting.clear()
            self._room.notify_all()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        with self._room:
            events = [self._waiting.popleft() for _ in range(min(SHARE, len(self._waiting)))]
            self._woken = bool(self._waiting)
            if self._woken:
                self._loop.call_soon(self._take)
            self._room.notify_all()
        try:
            for event in events:
                if isinstance(event, tuple):
                    state, version = event
                    state.reached(version)
                else:
                    self._deliver(event)
        except Exception as error:  # the loop's own task must hear of it
            if not self.failed.done():
                self.failed.set_exception(error)


class _Watch:
    """The thread of one kind."""

    def __init__(
        self,
        client: ApiClient,
        kind: Kind,
        *,
        selection: Selection,
        timing: Timing,
        state: WatchState,
        handover: _Handover,
    ) -> None:
        self.thread = threading.Thread(target=self._run, name=f"podwall-watch-{kind}", daemon=True)
        self._client = client
        self._kind = kind
        self._selection = selection
        self._timing = timing
        self._state = state
        self._handover = handover
        self._known: set[Key] = set()
        self._version = ""
        self._failures = 0
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def stop(self) -> None:
        """End the thread, wherever it waits."""
        self._ending.set()
        self.begin_anew()

    def begin_anew(self) -> None:
        """End its connection, whatever it is doing with it; unless it ends, it goes on from where it was."""
        with self._lock:
            if self._connection is not None:
                self._connection.abort()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._follow()
            except ApiError as error:
                self._wait_after(error)
            except Exception as error:  # a thread must not die unheard: this kind would stand still
                log.exception("event=watch-defect kind=%s", self._kind)
                self._wait_after(Unreachable(f"{type(error).__name__}: {error}"))

    def _follow(self) -> None:
        """One connection: list if need be, then watch until something ends it.  Raises ApiError."""
        connection = self._connect()
        try:
            while not self._ending.is_set():
                if not self._version:
                    self._list(connection)
                self._watch(connection)
        except Unauthorized:
            self._client.refused(connection)
            raise
        except (Gone, Refused) as error:
            # 504 and 400: the server never had this version (its data are older than ours, from a backup).
            if error.status in {400, 410, 504}:
                self._version = ""
            raise
        finally:
            connection.close()

    def _connect(self) -> Connection:
        connection = self._client.connection()
        with self._lock:
            self._connection = connection
        if self._ending.is_set():
            connection.abort()
        return connection

    def _list(self, connection: Connection) -> None:
        """Deliver all there is, page by page, then remove what is no longer there."""
        self._state.lists += 1
        seen: set[Key] = set()
        continues = ""
        while True:
            page = read_page(connection, self._kind, self._selection, continues, self._timing.page)
            self._heard()
            for refused in page.refused:
                self._refuse(refused)
            keys = [item.key for item in page.objects]
            seen.update(keys)
            self._known.update(keys)
            self._handover.put([_upsert(self._kind, item) for item in page.objects])
            continues = page.continues
            if not continues:
                break
        gone: list[Event] = [Remove(self._kind, key) for key in self._known - seen]
        self._known = seen
        self._handover.put(gone if self._state.synced else [*gone, Synced(self._kind)])
        self._state.synced = True
        self._at(page.resource_version)

    def _watch(self, connection: Connection) -> None:
        """Deliver changes until the server ends the watch.  Raises Gone, and Unreachable after silence."""
        limit_s = random.randint(*self._timing.watch_s)
        begun, heard_before = time.monotonic(), self._state.events
        response = open_watch(connection, self._kind, self._version, self._selection, limit_s)
        self._state.watches += 1
        self._heard()
        for lines in connection.lines(response, self._timing.silence_s):
            self._take(lines)
        lasted = time.monotonic() - begun
        if lasted < SHORTEST_WATCH_S and self._state.events == heard_before:
            raise Unreachable(f"the API server ended a watch of {self._kind} after {lasted:.2f} s")

    def _take(self, lines: Iterable[bytes]) -> None:
        events: list[Event] = []
        version = ""
        try:
            for line in lines:
                change = self._decoded(line)
                events.extend(self._events(change))
                version = change.resource_version or version
        finally:
            # Handed over before it counts as read, also when a later line of the batch is an error.
            self._handover.put(events)
            if version:
                self._at(version)
        self._state.events += len(events)
        self._heard()

    def _decoded(self, line: bytes) -> Change:
        try:
            return decode_change(self._kind, line)
        except msgspec.DecodeError as error:
            raise Unreachable(f"the watch of {self._kind} said what is no event: {error}") from error

    def _events(self, change: Change) -> Sequence[Event]:
        if change.status is not None:
            kind = BY_STATUS.get(change.status.code, Refused)
            raise kind(f"watch of {self._kind}: {change.status.message}", change.status.code)
        if change.refused is not None:
            self._refuse(change.refused)
        if change.key is None:
            return ()
        if change.object is None:
            self._known.discard(change.key)
            return (Remove(self._kind, change.key),)
        self._known.add(change.key)
        return (_upsert(self._kind, change.object),)

    def _at(self, version: str) -> None:
        self._version = self._state.version = version
        self._handover.reached(self._state, version)

    def _heard(self) -> None:
        """The server answers: the next trouble is the first again."""
        self._failures = 0
        self._state.heard, self._state.error = time.monotonic(), ""

    def _refuse(self, error: DecodeError) -> None:
        self._state.refused += 1
        log.error("event=object-refused problem=%r", str(error))

    def _wait_after(self, error: ApiError) -> None:
        if self._ending.is_set():
            return
        self._failures += 1
        self._state.failures += 1
        self._state.error = str(error)
        seconds = back_off(self._failures)
        if error.retry_after is not None:
            seconds = max(seconds, min(error.retry_after, LONGEST_WAIT_S))
        level = logging.INFO if isinstance(error, Gone) else logging.WARNING
        log.log(
            level,
            "event=watch-interrupted kind=%s again_in=%.2fs problem=%r",
            self._kind,
            seconds,
            str(error),
        )
        self._ending.wait(seconds)


def back_off(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, and half of it by chance.

    Without chance all agents of a cluster would come back to a restarted server at the same moments.
    """
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures - 1, 16))
    return longest * random.uniform(0.5, 1.0)


def _upsert(kind: Kind, item: object) -> Event:
    assert isinstance(item, Object)
    return Upsert(kind, item)
