"""Dirty keys are worked off in batches, and a failure leaves them dirty."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

import pytest

from agent.reconcile import FIRST_RETRY_S, LAST_RETRY_S, Reconciler

LIMIT_S = 10.0


class Runs:
    """A run that records its batches, waits where it is told to and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.batches: list[frozenset[str]] = []
        self.failures = failures
        self.begun = asyncio.Event()
        self.allowed: asyncio.Semaphore | None = None

    async def __call__(self, batch: frozenset[str]) -> None:
        self.batches.append(batch)
        self.begun.set()
        if self.allowed:
            await self.allowed.acquire()
        if self.failures:
            self.failures -= 1
            raise OSError("no")


def drive(
    story: Callable[[Reconciler[str], Runs], Coroutine[None, None, None]], failures: int = 0
) -> list[float]:
    """Tell the story beside a running loop; what the loop slept."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def main() -> None:
        runs = Runs(failures)
        reconciler = Reconciler("test", runs, sleep)
        task = asyncio.create_task(reconciler.loop())
        async with asyncio.timeout(LIMIT_S):
            await story(reconciler, runs)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    return slept


def test_marks_made_during_a_run_gather_into_the_next() -> None:
    async def story(reconciler: Reconciler[str], runs: Runs) -> None:
        runs.allowed = asyncio.Semaphore(0)
        first = asyncio.create_task(reconciler.settle("a"))
        await runs.begun.wait()
        reconciler.mark("b", "c")
        reconciler.mark("c")
        fourth = asyncio.create_task(reconciler.settle("d"))
        await asyncio.sleep(0)
        runs.allowed.release()
        await first
        runs.allowed.release()
        await fourth
        assert runs.batches == [{"a"}, {"b", "c", "d"}]
        assert reconciler.clean

    drive(story)


def test_settle_waits_for_a_run_begun_after_it() -> None:
    async def story(reconciler: Reconciler[str], runs: Runs) -> None:
        runs.allowed = asyncio.Semaphore(0)
        first = asyncio.create_task(reconciler.settle("a"))
        await runs.begun.wait()
        second = asyncio.create_task(reconciler.settle("a"))
        await asyncio.sleep(0)
        runs.allowed.release()
        await first
        assert not second.done()
        runs.allowed.release()
        await second
        assert runs.batches == [{"a"}, {"a"}]

    drive(story)


def test_a_failed_batch_stays_dirty_and_is_tried_again_ever_later() -> None:
    async def story(reconciler: Reconciler[str], runs: Runs) -> None:
        await reconciler.settle("a")
        assert len(runs.batches) == 11
        assert reconciler.error is None

    slept = drive(story, failures=10)
    assert slept[:3] == [FIRST_RETRY_S, FIRST_RETRY_S * 2, FIRST_RETRY_S * 4]
    assert slept[-1] == LAST_RETRY_S


def test_who_gives_up_waiting_leaves_nothing_behind() -> None:
    async def story(reconciler: Reconciler[str], runs: Runs) -> None:
        runs.allowed = asyncio.Semaphore(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reconciler.settle("a"), 0.01)
        runs.allowed.release()
        runs.allowed.release()
        await reconciler.settle("a")
        assert runs.batches == [{"a"}, {"a"}]
        assert not reconciler._waiting

    drive(story)
