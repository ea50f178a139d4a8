"""The lab's processes: started inside a namespace, found again by it, and ended.

Whatever runs in one of the lab's namespaces belongs to the lab: its agents, its server, and what a user
started with `lab exec`. So no list of process ids has to survive a crash, and no number can come to mean
another process: a process is held by a pidfd before its namespace is looked at.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import lab
from lab import netns
from lab.limits import SLOWNESS

GRACE = 2.0
"""Seconds a process gets to end by SIGTERM."""

_POLL = 0.01


class LabError(Exception):
    """The lab cannot do what was asked; the message says what, and what to do."""


class Process:
    """A program that was started here; it may outlive this process, which then no longer cares."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None
        self._asking = threading.Lock()  # the kernel tells a status once

    def poll(self) -> int | None:
        """Return None while it runs, then its status: negative for the signal that ended it."""
        with self._asking:
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._status = os.waitstatus_to_exitcode(status)
                    _started.discard(self)
            return self._status

    def wait(self, seconds: float = 10.0) -> int:
        """Wait for its end and return its status. Raises LabError when it goes on."""
        until(lambda: self.poll() is not None, seconds, lambda: f"process {self.pid} goes on")
        assert self._status is not None
        return self._status


_started: set[Process] = set()


def start(where: Path, arguments: Sequence[str], log: Path) -> Process:
    """Start a program inside a namespace, in a session of its own, its output appended to a log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    given = environment(os.environ)
    try:
        process = Process(
            netns.run(
                where,
                os.posix_spawnp,
                arguments[0],
                list(arguments),
                given,
                file_actions=actions,
                setsid=True,
            )
        )
    finally:
        os.close(output)
    _started.add(process)
    return process


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the lab's programs: podwall's own packages, and no settings from outside."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(("PODWALL_", "CNI_"))}
    sources = str(Path(lab.__file__).parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [sources, kept.get("PYTHONPATH")]))
    return kept


def stop_in(namespaces: Iterable[Path], grace: float = GRACE) -> int:
    """End every process in these namespaces but this one, and return how many there were."""
    wanted = {netns.identity(where) for where in namespaces if where.exists()}
    held = _hold(wanted)
    try:
        _end(held, grace)
    finally:
        for descriptor in held:
            os.close(descriptor)
    for process in tuple(_started):
        process.poll()
    return len(held)


def alive(where: Path) -> int:
    """Return how many processes live in a namespace."""
    held = _hold({netns.identity(where)}) if where.exists() else []
    for descriptor in held:
        os.close(descriptor)
    return len(held)


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait until a condition holds. Raises LabError with what() after so many seconds, or more where all is
    slow."""
    deadline = time.monotonic() + seconds * SLOWNESS
    while not condition():
        if time.monotonic() >= deadline:
            raise LabError(what())
        time.sleep(_POLL)


def _hold(wanted: set[tuple[int, int]]) -> list[int]:
    held = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            descriptor = _hold_one(int(entry.name), wanted)
            if descriptor is not None:
                held.append(descriptor)
    return held


def _hold_one(process: int, wanted: set[tuple[int, int]]) -> int | None:
    try:
        if netns.identity(Path(f"/proc/{process}/ns/net")) not in wanted:
            return None
        descriptor = os.pidfd_open(process)
    except OSError:
        return None  # it has ended
    try:
        if netns.identity(Path(f"/proc/{process}/ns/net")) in wanted:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _end(held: Sequence[int], grace: float) -> None:
    """SIGTERM to all, and SIGKILL to those still there when the grace is over; without grace at once."""
    left = list(held)
    if grace > 0:
        _signal(left, signal.SIGTERM)
        left = _wait(left, grace)
    _signal(left, signal.SIGKILL)
    _wait(left, GRACE)


def _wait(held: Sequence[int], seconds: float) -> list[int]:
    """Wait until all of these have ended, at most so long, and return those that have not."""
    deadline = time.monotonic() + seconds
    left = list(held)
    while left and time.monotonic() < deadline:
        left = _living(left, deadline - time.monotonic())
    return left


def _living(held: Sequence[int], seconds: float) -> list[int]:
    """Wait until one of these ends, at most so long, and return the others."""
    ready, _, _ = select.select(held, [], [], max(0.0, seconds))
    return [descriptor for descriptor in held if descriptor not in ready]


def _signal(held: Iterable[int], number: signal.Signals) -> None:
    for descriptor in held:
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            continue  # it has ended
