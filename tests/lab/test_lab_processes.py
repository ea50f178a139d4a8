"""The lab's processes are found by their namespace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import processes

SLEEP = [sys.executable, "-c", "import signal; print('ready', flush=True); signal.pause()"]
STUBBORN = [
    sys.executable,
    "-c",
    "from signal import *; signal(SIGTERM, SIG_IGN); print('ready', flush=True); pause()",
]


def started(where: Path, arguments: list[str], log: Path) -> processes.Process:
    process = processes.start(where, arguments, log)
    processes.until(lambda: b"ready" in log.read_bytes(), 10, lambda: "the program did not start")
    return process


def test_only_those_inside_are_ended(make_netns: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = make_netns("one"), make_netns("two")
    inside = started(one, SLEEP, tmp_path / "one")
    other = started(two, SLEEP, tmp_path / "two")

    assert processes.stop_in([one]) == 1

    assert inside.wait(5) == -15
    assert other.poll() is None
    assert processes.stop_in([two], 0.0) == 1
    assert other.wait(5) == -9


def test_one_that_ignores_sigterm_is_killed(make_netns: Callable[[str], Path], tmp_path: Path) -> None:
    where = make_netns("one")
    process = started(where, STUBBORN, tmp_path / "log")

    processes.stop_in([where], 0.1)

    assert process.wait(5) == -9
    assert processes.alive(where) == 0


def test_a_missing_namespace_holds_nobody(tmp_path: Path) -> None:
    assert processes.stop_in([tmp_path / "none"]) == 0


def test_several_threads_learn_the_same_status(make_netns: Callable[[str], Path], tmp_path: Path) -> None:
    """The kernel tells it once: who asks at the same time must not hear that there is no child."""
    where = make_netns("one")
    for _ in range(20):
        process = processes.start(where, ["true"], tmp_path / "log")
        with ThreadPoolExecutor(8) as pool:
            statuses = [pool.submit(process.wait) for _ in range(8)]
            assert [status.result() for status in statuses] == [0] * 8
