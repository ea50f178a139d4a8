"""Flows that begin and end, as connection tracking tells them while somebody listens.

    kernel --new, destroyed--> socket --a window of 0.1 s: 300 messages--> events, the last 4,000
                                 full: the kernel drops, and says that it did, not how many

Nobody listening costs nothing: the kernel makes no such messages then. A flow that began before anybody
listened has no end here, for the kernel only watches those that begin meanwhile. TCP's end is when its entry
goes, two minutes after the last packet of a closed connection.
"""

from __future__ import annotations

import asyncio
import errno
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from agent import nfnetlink
from agent.conntrack import Flow, decode

KEPT = 4000
RECEIVE_BYTES = 1 << 20
WINDOW_S = 0.1
MESSAGES = 300  # a window; some 30 microseconds each
_NEW_GROUP, _DESTROYED_GROUP = 1, 3
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_DESTROYED = 2
_MOST = 1 << 16

Told = dict[str, Any]
Tell = Callable[[str, Flow, float], Told | None]
"""What is told of an event ("begun" or "ended", when), None for a flow that is nobody's business."""


class FlowEvents:
    """Listens in the caller's network namespace until closed; `missed` counts what nobody took in time.

    overruns: how often the kernel had to drop some, nobody knows how many.
    """

    def __init__(self, tell: Tell, *, kept: int = KEPT, receive_bytes: int = RECEIVE_BYTES) -> None:
        """Raises OSError."""
        self.missed = 0
        self.overruns = 0
        self._tell = tell
        self._waiting: deque[Told] = deque(maxlen=kept)
        self._left = MESSAGES
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._socket = nfnetlink.connect(receive_bytes)
        self._socket.setblocking(False)
        for group in (_NEW_GROUP, _DESTROYED_GROUP):
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, struct.pack("=I", group))
        self._loop.add_reader(self._socket, self._readable)

    def close(self) -> None:
        """Listen no more."""
        self._loop.remove_reader(self._socket)
        if self._timer:
            self._timer.cancel()
        self._socket.close()

    def take(self, fits: Callable[[Told], bool]) -> list[Told]:
        """What waits, oldest first, as long as it fits."""
        taken = []
        while self._waiting and fits(self._waiting[0]):
            taken.append(self._waiting.popleft())
        return taken

    @property
    def first(self) -> Told | None:
        """The oldest that waits."""
        return self._waiting[0] if self._waiting else None

    def _readable(self) -> None:
        """Read one datagram, so that others of the loop come between; rest when the window is used up."""
        try:
            data = self._socket.recv(_MOST)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            return
        for event, flow in _events(data):
            self._put(event, flow)
            self._left -= 1
        if self._timer is None:
            self._timer = self._loop.call_later(WINDOW_S, self._open_window)
        if self._left <= 0:
            self._loop.remove_reader(self._socket)

    def _open_window(self) -> None:
        self._timer = None
        if self._left <= 0:
            self._loop.add_reader(self._socket, self._readable)
        self._left = MESSAGES

    def _put(self, event: str, flow: Flow) -> None:
        told = self._tell(event, flow, time.time())
        if told is None:
            return
        self.missed += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(told)


def _events(data: bytes) -> Iterator[tuple[str, Flow]]:
    for received in nfnetlink.messages(data):
        if received.kind >> 8 != nfnetlink.CTNETLINK:
            continue
        flow = decode(received.body)
        if flow is not None:
            yield ("ended" if received.kind & 0xFF == _DESTROYED else "begun"), flow
