"""podwall's tables as they should be, and the commits that make them so.

    owners marked dirty --> compile each --> Desired --> the difference --> one transaction --> kernel

As long as every commit succeeded, what the kernel holds is known, and a transaction costs the size of the
change. After a start, a failure or a foreign change the kernel is read back, and still only what differs is
committed, so that counters, flows and sticky entries live on. Each `Rules` answers for its own tables: what
one cannot commit stops no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from agent import metrics
from agent.nft import elements
from agent.nft.diff import Change, Changes, commands, difference, transaction
from agent.nft.kernel import Kernel, NftError
from agent.nft.model import Item, ItemId, Owner, Ruleset, TableName
from agent.nft.owners import Desired

log = logging.getLogger(__name__)


class Rules:
    """Keeps these tables of the kernel equal to what `compile_owner` says; `run` is a reconciler's.

    Times are seconds since the epoch: of the last transaction, of when all was last as it should be, and of
    when the kernel was last read and compared as a whole.
    """

    def __init__(
        self, kernel: Kernel, compile_owner: Callable[[Owner], Iterable[Item]], tables: frozenset[TableName]
    ) -> None:
        self.commits = 0
        self.last_commit: float | None = None
        self.last_check: float | None = None
        self.last_compared: float | None = None
        self._kernel = kernel
        self._compile = compile_owner
        self._tables = tables
        self._desired = Desired()
        self._trusted = False
        self._runs = 0  # begun and ended; odd while one is under way

    @property
    def owners(self) -> frozenset[Owner]:
        """Those that want something now."""
        return self._desired.owners

    @property
    def ruleset(self) -> Ruleset:
        """A copy of what the kernel should hold."""
        return self._desired.ruleset.copy()

    async def altered(self) -> Changes | None:
        """What the kernel holds otherwise than it should, read now; None while something is being committed.

        Raises NftError.
        """
        runs = self._runs
        if runs % 2:
            return None
        have = await self._kernel.read(self._tables)
        if runs != self._runs:
            return None
        self.last_compared = time.time()
        return await asyncio.to_thread(difference, have, self.ruleset)

    @property
    def size(self) -> int:
        """How many elements its sets and maps should have: what reading them back costs."""
        return sum(map(len, self._desired.ruleset.elements.values()))

    def distrust(self) -> None:
        """What the kernel holds may differ from what was committed: compare as a whole next time."""
        self._trusted = False

    async def run(self, owners: frozenset[Owner]) -> Changes:
        """Compile these owners, commit what differs and return that.

        Raises NftError; the old rules are in force then.
        """
        self._runs += 1
        try:
            return await self._committed(owners)
        finally:
            self._runs += 1

    async def _committed(self, owners: frozenset[Owner]) -> Changes:
        for owner in owners:
            self._desired.replace(owner, self._compile(owner))
        trusted, self._trusted = self._trusted, True  # who distrusts from now on means the next run
        changes: Changes = {}
        try:
            if trusted:
                changes = self._desired.take()
            else:
                self._desired.forget()
                have = await self._kernel.read(self._tables)
                changes = await asyncio.to_thread(difference, have, self._desired.ruleset)
                self.last_compared = time.time()
            text = transaction(changes, self._desired.ruleset)
            if text:
                small = commands(changes, self._desired.ruleset) if len(changes) <= elements.MOST else ()
                await self._commit(text, elements.batch(small), len(changes))
        except BaseException:
            self._trusted = False
            raise
        self.last_check = time.time()
        return changes

    async def _commit(self, text: str, batch: bytes | None, items: int) -> None:
        begun = time.perf_counter()
        try:
            await self._kernel.commit(text, batch)
        except NftError:
            metrics.COMMIT_ERRORS.inc()
            raise
        seconds = time.perf_counter() - begun
        metrics.COMMIT_SECONDS.observe(seconds)
        self.commits += 1
        self.last_commit = time.time()
        log.info("event=committed items=%d bytes=%d ms=%.1f", items, len(text), seconds * 1e3)


class TolerantRules(Rules):
    """Rules in which an owner whose change nft or the kernel refuses stays as it was, and all others go on.

    `may_stay_behind` says which owners may; each in `behind` is tried again when it is dirty again. Who is
    refused is found by halving, which takes long with many owners but need never happen: what is compiled
    has been checked.
    """

    def __init__(
        self,
        kernel: Kernel,
        compile_owner: Callable[[Owner], Iterable[Item]],
        tables: frozenset[TableName],
        may_stay_behind: Callable[[Owner], bool],
    ) -> None:
        super().__init__(kernel, self._compile_unless_behind, tables)
        self.behind: dict[Owner, str] = {}
        self._former: dict[Owner, tuple[Item, ...]] = {}
        self._compile_anew = compile_owner
        self._may_stay_behind = may_stay_behind

    async def run(self, owners: frozenset[Owner]) -> Changes:
        """Compile these owners, commit what differs and return that.

        Raises NftError when it is not the fault of single owners; the old rules are in force then.
        """
        suspects = sorted(filter(self._may_stay_behind, owners))
        self._former |= {owner: self._desired.owned(owner) for owner in suspects}
        try:
            return await self._run(owners, suspects)
        except BaseException:
            for owner in suspects:  # what was refused must not be taken for what was in force
                self._desired.replace(owner, self._former[owner])
            raise
        finally:
            self._former = {owner: self._former[owner] for owner in self.behind}

    async def _run(self, owners: frozenset[Owner], suspects: list[Owner]) -> Changes:
        self._try_again(suspects)
        try:
            return await super().run(owners)
        except NftError as error:
            if error.reason != "refused" or not suspects:
                raise
            self._keep_behind(suspects, error.message)
        changes = dict(await super().run(owners))
        await self._catch_up(suspects, changes)
        return changes

    async def _catch_up(self, suspects: list[Owner], changes: dict[ItemId, Change]) -> None:
        """Bring forward all but those that are refused alone."""
        groups = [suspects]
        while groups:
            group = groups.pop()
            self._try_again(group)
            try:
                changes |= await super().run(frozenset(group))
            except NftError as error:
                self._keep_behind(group, error.message)
                if error.reason != "refused":
                    raise
                changes |= await super().run(frozenset(group))
                middle = len(group) // 2
                groups += [group[:middle], group[middle:]] if middle else []
        for owner in self.behind.keys() & set(suspects):
            log.error("event=refused owner=%s error=%r", "/".join(owner), self.behind[owner])

    def _keep_behind(self, owners: Iterable[Owner], reason: str) -> None:
        self.behind |= dict.fromkeys(owners, reason)

    def _try_again(self, owners: Iterable[Owner]) -> None:
        for owner in owners:
            self.behind.pop(owner, None)

    def _compile_unless_behind(self, owner: Owner) -> Iterable[Item]:
        return self._former[owner] if owner in self.behind else self._compile_anew(owner)
