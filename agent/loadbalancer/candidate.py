"""One node's part in one Lease: does the steps of its claim, and says when it began or ceased to hold.

Where steps fail the claim decides what that means; here they are only tried, again and again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from math import inf

import msgspec

from agent import metrics
from agent.cluster.errors import ApiError, Conflict, NotFound
from agent.cluster.model import Lease
from agent.loadbalancer.claim import Claim, Step, Timing
from agent.loadbalancer.leases import NAMESPACE, Leases

Clock = Callable[[], float]

log = logging.getLogger(__name__)


def boottime() -> float:
    """Seconds that pass while the machine is suspended, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Candidate:
    """Keeps a claim on a Lease going while `run` is awaited; `changed` is called when `held` has changed."""

    def __init__(
        self,
        name: str,
        node: str,
        leases: Leases,
        timing: Timing,
        *,
        changed: Callable[[], None],
        clock: Clock = boottime,
    ) -> None:
        self.name = name
        self._node = node
        self._leases = leases
        self._timing = timing
        self._changed = changed
        self._clock = clock
        self._claim = Claim(node, timing)
        self._failures: dict[str, str] = {}  # what the last attempt of each step came to
        self._told = False
        self._leaving = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether this node may act as the holder now."""
        return self._claim.held(self._clock())

    @property
    def holder(self) -> str:
        """Who holds the Lease, as far as is known here; empty for nobody or unknown."""
        return self._claim.holder

    def want(self, rank: int | None, observe_s: float = 0.0) -> None:
        """Be an heir of this rank; None: let go of it at once, and tell the others. See `Claim.want`."""
        self._leaving = False
        self._ask(rank, observe_s)

    def _ask(self, rank: int | None, observe_s: float = 0.0) -> None:
        self._claim.want(rank, observe_s)
        self._idle.clear()
        self._wake.set()

    def leave(self) -> None:
        """The Lease is not needed any more: `run` ends, after removing it when this node held it."""
        self._leaving = True
        self._ask(None)

    async def resign(self, limit_s: float) -> None:
        """Let go, and return when the others know, or the time is over."""
        self.want(None)
        if self._claim.next(self._clock()) == inf:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), limit_s)

    async def run(self) -> None:
        """Work until cancelled, or until it has left."""
        while True:
            self._wake.clear()
            todo = self._claim.next(self._clock())
            if isinstance(todo, Step):
                await self._do(todo)
            else:
                if todo == inf:
                    self._idle.set()
                    if self._leaving:
                        return
                await self._wait(todo)
            self._tell()

    async def _wait(self, until: float) -> None:
        """Wait for the time, for another wish, or for the moment at which it ceases to hold."""
        if self.held:
            until = min(until, self._claim.held_until)
        limit = None if until == inf else max(0.0, until - self._clock())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), limit)

    async def _do(self, step: Step) -> None:
        self._claim.began(self._clock())
        try:
            await self._attempt(step)
        except (Conflict, NotFound):
            self._claim.lost_race()
        except Exception as error:
            self._note(step, error)
            self._claim.failed(self._clock())
        else:
            self._failures.pop(step.verb, None)

    def _note(self, step: Step, error: Exception) -> None:
        """Log a failure once, however often it is tried."""
        if self._failures.get(step.verb) == str(error):
            return
        self._failures[step.verb] = str(error)
        unknown = None if isinstance(error, ApiError) else error
        text = "event=lease-failed lease=%s step=%s error=%r"
        log.warning(text, self.name, step.verb, str(error), exc_info=unknown)

    async def _attempt(self, step: Step) -> None:
        if step.verb == "read":
            lease = await self._leases.get(self.name)
            self._claim.read(self._clock(), lease)
        elif step.verb == "release" and self._leaving:
            assert step.basis is not None
            await self._leases.delete(step.basis)
            self._claim.read(self._clock(), None)
        else:
            write = self._leases.update if step.basis else self._leases.create
            self._claim.wrote(self._clock(), await write(self._written(step)))

    def _written(self, step: Step) -> Lease:
        now = datetime.now(UTC)
        before = step.basis or Lease(NAMESPACE, self.name)
        if step.verb == "renew":
            return msgspec.structs.replace(before, renewed=now, duration_s=self._timing.duration_s)
        return msgspec.structs.replace(
            before,
            holder="" if step.verb == "release" else self._node,
            duration_s=self._timing.duration_s,
            acquired=now,
            renewed=now,
            transitions=before.transitions + (step.verb == "take"),
        )

    def _tell(self) -> None:
        held = self.held
        if held == self._told:
            return
        self._told = held
        if held:
            metrics.LOAD_BALANCER_TAKEN.inc()
        log.info("event=lease-%s lease=%s", "held" if held else "given-up", self.name)
        self._changed()
