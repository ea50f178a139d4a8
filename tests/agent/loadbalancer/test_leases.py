"""Leases in files, and candidates for them: who holds what when several agents share a directory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import msgspec
import pytest

from agent.cluster.errors import Conflict, NotFound, Unreachable
from agent.cluster.model import Lease
from agent.loadbalancer.candidate import Candidate
from agent.loadbalancer.claim import Timing
from agent.loadbalancer.leases import NAMESPACE, FileLeases
from tests.agent.loadbalancer.onelink import until

LEASE = Lease(NAMESPACE, "it", holder="a", duration_s=3)
QUICK = Timing(duration_s=2, renew_s=0.2, observe_s=0.15, margin_s=0.3, stagger_s=0.3, retry_s=0.05)


def test_files_keep_leases(tmp_path: Path) -> None:
    async def story() -> None:
        leases = FileLeases(tmp_path / "made" / "when needed")
        assert await leases.get("it") is None
        made = await leases.create(LEASE)
        assert msgspec.structs.replace(made, resource_version="") == LEASE
        assert await leases.get("it") == made
        with pytest.raises(Conflict):
            await leases.create(LEASE)
        renewed = await leases.update(made)
        with pytest.raises(Conflict):
            await leases.update(made)
        with pytest.raises(Conflict):
            await leases.delete(made)
        await leases.delete(renewed)
        with pytest.raises(NotFound):
            await leases.delete(renewed)
        with pytest.raises(NotFound):
            await leases.update(renewed)
        again = await leases.create(LEASE)
        assert again.resource_version not in {made.resource_version, renewed.resource_version}

    asyncio.run(story())


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "it.json").write_text("{")

    async def story() -> None:
        with pytest.raises(Unreachable, match="Not a directory"):
            await FileLeases(tmp_path / "file" / "leases").get("it")
        with pytest.raises(Unreachable, match=r"it.json cannot be read: .*; remove it"):
            await FileLeases(tmp_path).get("it")

    asyncio.run(story())


LIMIT_S = 60.0
_together: list[Barrier] = []


def _begin_together(barrier: Barrier) -> None:
    _together.append(barrier)


def _increments(directory: str, times: int) -> int:
    """Count in one Lease with others, each write based on what was read; how many were refused.

    The first writes are all based on the same Lease, so that all but one are refused.
    """

    async def count() -> int:
        leases, refused, done = FileLeases(Path(directory)), 0, 0
        while done < times:
            lease = await leases.get("it")
            assert lease is not None
            if not done and not refused:
                _together[0].wait(LIMIT_S)
            try:
                await leases.update(msgspec.structs.replace(lease, transitions=lease.transitions + 1))
                done += 1
            except Conflict:
                refused += 1
        return refused

    return asyncio.run(count())


def test_processes_at_once_lose_no_write(tmp_path: Path) -> None:
    asyncio.run(FileLeases(tmp_path).create(LEASE))
    context = get_context("spawn")
    with ProcessPoolExecutor(3, context, _begin_together, (context.Barrier(3),)) as pool:
        refused = sum(pool.map(_increments, [str(tmp_path)] * 3, [60] * 3))
    lease = asyncio.run(FileLeases(tmp_path).get("it"))
    assert lease is not None
    assert lease.transitions == 180
    assert refused >= 2


class Shaky:
    """Leases that can be made to fail, to hang, or to fail after having done what was asked."""

    def __init__(self, leases: FileLeases) -> None:
        self._leases = leases
        self.how = "well"

    async def get(self, name: str) -> Lease | None:
        await self._before()
        return await self._leases.get(name)

    async def create(self, lease: Lease) -> Lease:
        await self._before()
        return self._after(await self._leases.create(lease))

    async def update(self, lease: Lease) -> Lease:
        await self._before()
        return self._after(await self._leases.update(lease))

    async def delete(self, lease: Lease) -> None:
        await self._before()
        await self._leases.delete(lease)

    def close(self) -> None:
        self._leases.close()

    async def _before(self) -> None:
        if self.how == "failing":
            raise Unreachable("it fails")
        await until(lambda: self.how != "hanging")

    def _after(self, lease: Lease) -> Lease:
        if self.how == "answers lost":
            raise Unreachable("the answer was lost")
        return lease


class Node:
    """A candidate that runs, and what it told."""

    def __init__(self, name: str, directory: Path) -> None:
        self.leases = Shaky(FileLeases(directory))
        self.told: list[bool] = []
        self.candidate = Candidate("it", name, self.leases, QUICK, changed=self._tell)
        self.task = asyncio.create_task(self.candidate.run())

    def _tell(self) -> None:
        self.told.append(self.candidate.held)


@contextlib.asynccontextmanager
async def nodes(directory: Path, *names: str) -> AsyncIterator[list[Node]]:
    """Nodes that want the Lease, ranked as named."""
    made = [Node(name, directory) for name in names]
    for rank, node in enumerate(made):
        node.candidate.want(rank)
    try:
        yield made
    finally:
        for node in made:
            node.task.cancel()
        await asyncio.gather(*(node.task for node in made), return_exceptions=True)


def test_one_holds_and_another_follows(tmp_path: Path) -> None:
    async def story() -> None:
        async with nodes(tmp_path, "a", "b") as (a, b):
            await until(lambda: a.candidate.held)
            await until(lambda: b.candidate.holder == "a")
            a.task.cancel()
            await until(lambda: b.candidate.held)
            assert (a.told, b.told) == ([True], [True])
            lease = await b.leases.get("it")
            assert lease is not None
            assert (lease.holder, lease.transitions, lease.duration_s) == ("b", 1, 2)
            assert lease.acquired is not None

    asyncio.run(story())


@pytest.mark.parametrize("how", ["failing", "hanging", "answers lost"])
def test_a_holder_that_cannot_renew_says_so_itself(tmp_path: Path, how: str) -> None:
    """It is told that it ceased to hold, and it holds again when all is well."""

    async def story() -> None:
        async with nodes(tmp_path, "a") as (a,):
            await until(lambda: a.candidate.held)
            a.leases.how = how
            await until(lambda: not a.candidate.held)
            a.leases.how = "well"
            await until(lambda: a.candidate.held)
            await until(lambda: len(a.told) in {1, 3})
            assert a.told in ([True, False, True], [True])  # a step that hung tells nothing meanwhile

    asyncio.run(story())


def test_resigning_tells_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with nodes(tmp_path, "a", "b") as (a, b):
            await until(lambda: a.candidate.held)
            await a.candidate.resign(5.0)
            assert not a.candidate.held
            lease = await a.leases.get("it")
            assert lease is not None
            assert lease.holder in {"", "b"}
            await until(lambda: b.candidate.held)

    asyncio.run(story())


def test_resigning_ends_when_nobody_can_be_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with nodes(tmp_path, "a") as (a,):
            await until(lambda: a.candidate.held)
            a.leases.how = "hanging"
            await a.candidate.resign(0.2)
            assert not a.candidate.held

    asyncio.run(story())


def test_leaving_removes_what_was_held(tmp_path: Path) -> None:
    async def story() -> None:
        async with nodes(tmp_path, "a", "b") as (a, b):
            await until(lambda: a.candidate.held)
            for node in (b, a):
                node.candidate.leave()
                await asyncio.wait_for(node.task, 10)
            assert await a.leases.get("it") is None

    asyncio.run(story())


def test_who_is_wanted_again_while_leaving_stays(tmp_path: Path) -> None:
    async def story() -> None:
        async with nodes(tmp_path, "a") as (a,):
            await until(lambda: a.candidate.held)
            for _ in range(5):
                a.candidate.leave()
                assert not a.candidate.held
                await asyncio.sleep(0)
                a.candidate.want(0)
                await until(lambda: a.candidate.held)
            assert not a.task.done()

    asyncio.run(story())


def test_a_failure_that_nobody_expected_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with nodes(tmp_path, "a") as (a,):
            await until(lambda: a.candidate.held)
            with monkeypatch.context() as patched:
                patched.setattr(a.leases, "update", None)
                await until(lambda: not a.candidate.held)
            await until(lambda: a.candidate.held)

    asyncio.run(story())
    assert sum("lease-failed" in line for line in caplog.messages) == 1
