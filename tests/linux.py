"""What tests ask of the machine: its own programs, and to be in another network namespace for a while."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import netns
from lab.limits import SLOWNESS

LIMIT_S = 30.0 * SLOWNESS
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def command(*words: str, data: str = "") -> str:
    """What a program prints; its complaint becomes the test's failure."""
    done = subprocess.run(words, input=data, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def commands(*lines: str) -> None:
    """Programs, a line each, one after the other."""
    for line in lines:
        command(*line.split())


@contextmanager
def inside(where: Path) -> Iterator[None]:
    """This thread, and those it starts, in a network namespace; afterwards it is back where it was."""
    with _back_afterwards():
        netns.enter(where)
        yield


@contextmanager
def own_netns() -> Iterator[None]:
    """This thread, and those it starts, in an empty network namespace that nobody else can name."""
    with _back_afterwards():
        assert _libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        yield


@contextmanager
def _back_afterwards() -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        netns.enter(Path(f"/proc/self/fd/{before}"))
        os.close(before)
