"""Sessions end by themselves when nobody asks, or at once, and are closed once; by the tests' own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from agent.sessions import Sessions

EXPIRES_S = 20.0


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time goes on when it is told to."""

    now = 0.0

    def time(self) -> float:
        return self.now

    async def pass_(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)  # what is due by now becomes ready
        await asyncio.sleep(0)  # and is done


class Held:
    closed = 0

    def close(self) -> None:
        self.closed += 1


def play(story: Callable[[Clock], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=Clock) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, Clock)
        runner.run(story(loop))


def test_one_that_nobody_asks_for_ends_by_itself() -> None:
    async def story(clock: Clock) -> None:
        sessions, held = Sessions[Held](1, EXPIRES_S), Held()
        sessions.keep("a", held)
        await clock.pass_(EXPIRES_S - 1)
        assert (sessions.full, held.closed) == (True, 0)
        await clock.pass_(1)
        assert (sessions.full, held.closed) == (False, 1)
        assert sessions.get("a") is None

    play(story)


def test_every_question_begins_its_time_anew() -> None:
    async def story(clock: Clock) -> None:
        sessions, held = Sessions[Held](1, EXPIRES_S), Held()
        sessions.keep("a", held)
        for _ in range(3):
            await clock.pass_(EXPIRES_S - 1)
            assert sessions.get("a") is held
        await clock.pass_(EXPIRES_S)
        assert held.closed == 1

    play(story)


def test_one_that_is_ended_is_closed_once() -> None:
    async def story(clock: Clock) -> None:
        sessions, held = Sessions[Held](1, EXPIRES_S), Held()
        sessions.keep("a", held)
        sessions.end("a")
        sessions.end("a")
        assert sessions.get("a") is None
        await clock.pass_(EXPIRES_S)
        assert held.closed == 1

    play(story)


def test_one_that_ends_leaves_the_others() -> None:
    async def story(clock: Clock) -> None:
        sessions, first, second = Sessions[Held](2, EXPIRES_S), Held(), Held()
        sessions.keep("a", first)
        assert not sessions.full
        sessions.keep("b", second)
        sessions.end("a")
        assert sessions.get("b") is second
        assert (first.closed, second.closed) == (1, 0)

    play(story)
