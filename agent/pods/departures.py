"""A Pod's way off the network, on which nothing may be forgotten and no address be given again too early.

    isolate   its rules out of the kernel, its link out of the datapath   --> DEL answers
    finish    links deleted, rows out of the ledger, addresses rest       many at once, in the background

Whatever fails is tried again, with growing pauses, for as long as the agent lives; after its death a
retired link tells the next agent the same. Failed ADDs go the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from agent.pods.ledger import LedgerThread
from agent.pods.model import Attachment
from agent.pods.wiring import Wiring
from cni.spec import AttachmentKey

GATHER_S = 0.02
"""How long a deletion waits for others: it takes as long for a hundred links as for one."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Departure:
    """One attachment on its way off; the events say how far it is."""

    attachment: Attachment
    isolated: bool = False
    failed: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Departures:
    """All attachments on their way off. `released` is called with each when nothing of it is left.

    `rules_out` takes an attachment's rules out of the kernel, within a time limit or raises.
    """

    def __init__(
        self,
        wiring: Wiring,
        ledger: LedgerThread,
        *,
        rules_out: Callable[[Attachment], Awaitable[None]],
        released: Callable[[Attachment, float], None],
        clock: Callable[[], float],
        rest_s: float,
    ) -> None:
        self.trouble = ""
        self._wiring = wiring
        self._ledger = ledger
        self._rules_out = rules_out
        self._released = released
        self._clock = clock
        self._rest_s = rest_s
        self._leaving: dict[AttachmentKey, Departure] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[Attachment]:
        return iter([departure.attachment for departure in self._leaving.values()])

    def of(self, key: AttachmentKey) -> Departure | None:
        """The departure under way, if there is one."""
        return self._leaving.get(key)

    def not_isolated(self) -> Iterator[Attachment]:
        """Those whose rules may still be in the kernel."""
        return iter([each.attachment for each in self._leaving.values() if not each.isolated])

    def begin(self, attachment: Attachment, *, isolated: bool = False) -> Departure:
        """Send an attachment off; it must not be on its way yet."""
        departure = self._leaving[attachment.key] = Departure(attachment, isolated)
        if isolated:
            self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._loop())
        return departure

    async def isolate(self, departure: Departure) -> None:
        """Return when no packet comes from it or goes to it any more.

        Raises what the datapath or the wiring raised; it is tried again in the background.
        """
        if departure.isolated:
            return
        attachment = departure.attachment
        outcomes = await asyncio.gather(
            self._rules_out(attachment), self._wiring.retire([attachment.link]), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        departure.failed = bool(errors)
        departure.isolated = not errors
        self._wake.set()
        if errors:
            raise errors[0]

    async def close(self) -> None:
        """Finish what can be finished now; the rest is the next agent's."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        try:
            await self._finish()
        except Exception as error:
            log.warning("event=departures-left count=%d error=%r", len(self._leaving), str(error))

    async def _loop(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            self._wake.clear()
            try:
                await self._finish()
            except Exception as error:
                self.trouble = str(error)
                log.warning("event=departure-retry count=%d error=%r", len(self._leaving), self.trouble)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, LAST_RETRY_S)
                self._wake.set()
            else:
                self.trouble = ""
                retry_s = FIRST_RETRY_S

    async def _finish(self) -> None:
        """Bring every departure as far as it can be brought; raises the first failure at the end."""
        failure: Exception | None = None
        for departure in [each for each in self._leaving.values() if each.failed]:
            try:
                await self.isolate(departure)
            except Exception as error:
                failure = failure or error
        ready = [each for each in self._leaving.values() if each.isolated]
        if ready:
            await self._wiring.remove()
            for departure in ready:
                departure.gone.set()
            freed = self._clock()
            keys = [departure.attachment.key for departure in ready]
            await self._ledger.run(lambda ledger: ledger.release(keys, freed, freed - self._rest_s))
            for departure in ready:
                self._leaving.pop(departure.attachment.key)
                self._released(departure.attachment, freed)
                departure.done.set()
        if failure:
            raise failure
