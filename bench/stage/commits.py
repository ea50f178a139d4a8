"""Hears when a network namespace's nf_tables were changed: the kernel says so after each commit.

API event sent ... agent ... commit --notification--> heard()      the time between is what is measured
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from lab import netns

NETLINK_NETFILTER = getattr(socket, "NETLINK_NETFILTER", 12)
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
NFNLGRP_NFTABLES = 7
NEWGEN = 10 << 8 | 15  # nf_tables' subsystem, NFT_MSG_NEWGEN
SO_RCVBUFFORCE = 33
RECEIVE_BYTES = 256 << 20
READ_BYTES = 1 << 18
LOST = b""
HEAD = struct.Struct("=IH")  # a message's length and type


class Commits:
    """The commits of one namespace from now on."""

    def __init__(self, where: Path) -> None:
        self._socket = netns.run(where, _open)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def drain(self, quiet_s: float = 0.02) -> None:
        """Forget what was heard so far, until it is quiet for a moment."""
        while self._next(quiet_s) is not None:
            continue

    def heard(self, limit_s: float, about: bytes = b"") -> float:
        """Return when the next commit was heard (time.perf_counter) whose changes hold these bytes.

        Raises TimeoutError.
        """
        end = time.perf_counter() + limit_s
        found = not about
        while (left := end - time.perf_counter()) > 0:
            message = self._next(left)
            if message is None:
                continue
            found = found or about in message or message == LOST
            if _is_commit(message):
                if found:
                    return time.perf_counter()
                found = not about
        raise TimeoutError(f"no commit within {limit_s:g} s")

    def quiet(self, quiet_s: float, limit_s: float) -> float:
        """Wait until no commit comes for a while; return when the last one came. Raises TimeoutError."""
        end = time.perf_counter() + limit_s
        last = 0.0
        while time.perf_counter() < end:
            try:
                last = self.heard(quiet_s)
            except TimeoutError:
                return last
        raise TimeoutError(f"commits go on after {limit_s:g} s")

    def _next(self, limit_s: float) -> bytes | None:
        """The next message; None when there is none in time, LOST when some were lost."""
        if not select.select([self._socket], [], [], limit_s)[0]:
            return None
        try:
            return self._socket.recv(READ_BYTES)
        except OSError:
            return LOST


def _is_commit(message: bytes) -> bool:
    """Whether this is what the kernel says last of a commit, alone."""
    return len(message) >= HEAD.size and HEAD.unpack_from(message)[1] == NEWGEN


def _open() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BYTES)
    made.bind((0, 0))
    made.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
    return made


@contextlib.contextmanager
def listening(where: Path) -> Iterator[Commits]:
    """Listen for as long as the block lasts."""
    commits = Commits(where)
    try:
        yield commits
    finally:
        commits.close()
