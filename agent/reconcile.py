"""Dirty keys, worked off in batches until they are clean.

    mark(key) --> dirty --> run(batch) --ok--> clean, whoever settles on the key goes on
                   ^            |
                   +--back off--+ failed: the batch stays dirty, the old state stays in force

The result of a run depends on the current objects only, so marking a key twice is marking it once. What is
marked while a run is under way gathers into the next batch: a storm of events costs few runs, a lone event
none of the wait that a fixed debounce would add to every Pod's start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 5.0

log = logging.getLogger(__name__)


class Reconciler(Generic[Key]):
    """Runs `run` over the keys marked dirty, in batches, for as long as `loop` is awaited.

    `run` gets a frozenset of keys and makes all of them true or raises; the `expected` exceptions speak for
    themselves, all others are logged with their traceback. `sleep` is the clock (seconds).
    """

    def __init__(
        self,
        name: str,
        run: Callable[[frozenset[Key]], Awaitable[None]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        expected: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> None:
        self.name = name
        self.error: Exception | None = None
        self._run = run
        self._sleep = sleep
        self._expected = expected
        self._dirty: set[Key] = set()
        self._running: frozenset[Key] = frozenset()
        self._wake = asyncio.Event()
        self._waiting: dict[Key, list[asyncio.Future[None]]] = {}

    @property
    def clean(self) -> bool:
        """Whether nothing waits to be made true."""
        return not self._dirty and not self._running

    def mark(self, *keys: Key) -> None:
        """Say that these keys' truth may have changed."""
        self._dirty.update(keys)
        self._wake.set()

    async def settle(self, *keys: Key) -> None:
        """Mark the keys and wait until a run begun after now, the same for all, has made them true."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for key in keys:
            self._waiting.setdefault(key, []).append(future)
        self.mark(*keys)
        try:
            await future
        finally:
            for key in keys:
                self._forget(key, future)

    async def loop(self) -> None:
        """Work until cancelled; a failed batch is tried again after 50 ms, 100 ms, ... 5 s."""
        retry_s = FIRST_RETRY_S
        while True:
            await self._wake.wait()
            if await self._attempt():
                retry_s = FIRST_RETRY_S
            else:
                await self._sleep(retry_s)
                retry_s = min(retry_s * 2, LAST_RETRY_S)
                self._wake.set()

    async def _attempt(self) -> bool:
        """Run one batch; whether it succeeded."""
        self._wake.clear()
        batch, self._dirty = frozenset(self._dirty), set()
        if not batch:
            return True
        # Only those who waited before the run began may be told by it.
        told = {key: self._waiting.pop(key) for key in batch if key in self._waiting}
        self._running = batch
        try:
            await self._run(batch)
        except Exception as error:
            known = isinstance(error, self._expected)
            text = "event=%s-failed keys=%d error=%r"
            log.error(text, self.name, len(batch), str(error), exc_info=None if known else error)
            self.error = error
            self._dirty |= batch
            for key, futures in told.items():
                self._waiting.setdefault(key, []).extend(futures)
            return False
        finally:
            self._running = frozenset()
        self.error = None
        for futures in told.values():
            for future in futures:
                if not future.done():
                    future.set_result(None)
        return True

    def _forget(self, key: Key, future: asyncio.Future[None]) -> None:
        futures = self._waiting.get(key, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            self._waiting.pop(key, None)
