"""Frames as a link carries them: all that come and go, and any that a test wants to send."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from lab import netns
from lab.limits import SLOWNESS

_ETH_P_ALL = 0x0003
_FRAME = 65536
_BUFFER = 1 << 22
_POLL = 0.05
_PACKET_IGNORE_OUTGOING = 23
_SOL_PACKET = 263


class Capture:
    """Listens on a link from its making until it is closed; parse the frames with scapy's Ether."""

    def __init__(self, where: Path, link: str = "eth0", *, incoming_only: bool = False) -> None:
        """Listen on a link of a namespace. Raises OSError when there is no such link."""
        self._socket = netns.run(where, _open, link, incoming_only=incoming_only)
        self._frames: list[bytes] = []
        self._closing = Event()
        self._thread = Thread(target=self._listen, name=f"podwall-capture-{link}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def frames(self) -> tuple[bytes, ...]:
        """What was heard so far, in order."""
        return tuple(self._frames)

    def send(self, frame: bytes) -> None:
        """Send a frame out of the link as it is, whatever it claims."""
        self._socket.send(frame)

    def wait(self, wanted: Callable[[bytes], bool], seconds: float = 2.0) -> bytes | None:
        """Return the first frame that is wanted, also one heard before; None when the time is over."""
        deadline = time.monotonic() + seconds * SLOWNESS
        seen = 0
        while True:
            for frame in self._frames[seen:]:
                seen += 1
                if wanted(frame):
                    return frame
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL / 10)

    def close(self) -> None:
        """Stop listening; what was heard stays."""
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._closing.is_set():
            if select.select([self._socket], [], [], _POLL)[0]:
                try:
                    self._frames.append(self._socket.recv(_FRAME))
                except OSError:
                    return  # the link is gone


def _open(link: str, *, incoming_only: bool) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, int(incoming_only))
        opened.bind((link, _ETH_P_ALL))
    except BaseException:
        opened.close()
        raise
    return opened
