"""The worker and the notifications against the real kernel: commits, crashes, and what others do."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from agent.nft import diff
from agent.nft import kernel as kernel_module
from agent.nft.kernel import Foreign, Kernel, NftError
from agent.nft.model import DROP, Chain, Element, Match, Named, Payload, Rule, Ruleset, Set, Table, TableName

INET = TableName("inet", "podwall")
PEERS = Set(INET, "peers", ("ipv4_addr",))
WANTED = Ruleset(
    (
        Table(*INET),
        PEERS,
        Chain(INET, "decide", (Rule((Match(Payload("ip", "saddr"), "==", Named("peers")), DROP)),)),
        Element(PEERS.id, IPv4Address("10.0.0.1")),
    )
)
LOAD = diff.transaction(diff.difference(Ruleset(), WANTED), WANTED)
WithKernel = Callable[..., Any]


def _nft(*commands: str) -> None:
    """Another program's change, in the network namespace of this thread."""
    subprocess.run(["nft", "; ".join(commands)], check=True, capture_output=True)


class Heard:
    """Gathers what a Kernel says of foreign changes."""

    def __init__(self, kernel: Kernel) -> None:
        self.all: list[Foreign] = []
        self._new = asyncio.Event()
        self._task = asyncio.create_task(self._gather(kernel))

    async def _gather(self, kernel: Kernel) -> None:
        async for change in kernel.changes():
            self.all.append(change)
            self._new.set()

    async def next(self, limit_s: float = 1.0) -> Foreign:
        async with asyncio.timeout(limit_s):
            await self._new.wait()
        self._new.clear()
        return self.all[-1]


# Commits


def test_a_refused_transaction_changes_nothing_and_is_reported_in_full(with_kernel: WithKernel) -> None:
    bad = "add table inet podwall\nadd rule inet podwall nowhere drop\n"

    async def body(kernel: Kernel) -> None:
        with pytest.raises(NftError, match="No such file") as caught:
            await kernel.commit(bad)
        assert caught.value.reason == "refused"
        assert caught.value.transaction == bad
        assert bad in str(caught.value)
        assert await kernel.read() == Ruleset()
        await kernel.commit(LOAD)

    with_kernel(body)


def test_a_dry_run_judges_and_changes_nothing(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.check(LOAD)
        with pytest.raises(NftError, match="refused"):
            await kernel.check("add rule inet podwall decide nonsense words")
        assert await kernel.read() == Ruleset()
        await kernel.commit(LOAD)
        assert diff.difference(await kernel.read(), WANTED) == {}

    with_kernel(body)


def test_commits_at_the_same_time_take_turns(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        adds = [f"add element inet podwall peers {{ 10.1.0.{last} }}" for last in range(50)]
        await asyncio.gather(*map(kernel.commit, adds), kernel.read(), kernel.check(adds[0]))
        assert len((await kernel.read()).elements[PEERS.id]) == 51

    with_kernel(body)


def test_a_listing_that_a_rehash_tore_is_asked_for_again(
    with_kernel: WithKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two listings is whole; in the first one element stands twice."""
    ask, listings = Kernel._ask, []

    async def torn_once(kernel: Kernel, kind: bytes, text: str) -> bytes:
        answer = await ask(kernel, kind, text)
        if kind == b"l":
            listings.append(answer)
            if len(listings) == 1:
                return answer.replace(b'"elem": [', b'"elem": ["10.0.0.1", ')
        return answer

    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        monkeypatch.setattr(Kernel, "_ask", torn_once)
        assert diff.difference(await kernel.read(), WANTED) == {}

    with_kernel(body)
    assert b'"elem": [' in listings[0]
    assert len(listings) == 2


# The worker's end


def test_a_worker_that_ended_while_nothing_was_asked_is_replaced_in_silence(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        first = kernel.worker_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while kernel.worker_pid is not None:  # noqa: ASYNC110 - no event tells; the fixture has a limit
            await asyncio.sleep(0.01)
        await kernel.commit(LOAD)
        assert kernel.worker_pid not in {None, first}

    with_kernel(body)


def test_a_killed_worker_is_reported_and_replaced(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        first = kernel.worker_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(NftError, match="signal=9") as caught:
            await kernel.commit("add table arp podwall")
        assert caught.value.reason == "lost"
        assert caught.value.transaction == "add table arp podwall"

        await kernel.commit("add table arp podwall")
        assert kernel.worker_pid not in {None, first}
        assert TableName("arp", "podwall") in (await kernel.read()).tables

    with_kernel(body)


def test_a_worker_killed_during_a_load_leaves_all_or_nothing(with_kernel: WithKernel) -> None:
    addresses = ", ".join(str(IPv4Address(0x0B000000 + number)) for number in range(20_000))

    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        assert kernel.worker_pid is not None
        load = asyncio.create_task(kernel.commit(f"add element inet podwall peers {{ {addresses} }}"))
        await asyncio.sleep(0)  # let it be written
        os.kill(kernel.worker_pid, signal.SIGKILL)
        with pytest.raises(NftError):
            await load
        assert len((await kernel.read()).elements[PEERS.id]) in {1, 20_001}

    with_kernel(body)


def test_a_worker_without_an_answer_is_given_up_in_time(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        assert kernel.worker_pid is not None
        os.kill(kernel.worker_pid, signal.SIGSTOP)
        with pytest.raises(NftError, match=r"no answer within 0\.3 s") as caught:
            await kernel.commit("add table arp podwall")
        assert caught.value.reason == "timeout"
        await kernel.commit("add table arp podwall")

    with_kernel(body, commit_timeout_s=0.3)


def test_a_cancelled_commit_does_not_leave_its_answer_to_the_next(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        assert kernel.worker_pid is not None
        os.kill(kernel.worker_pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await kernel.commit("add table arp podwall")
        assert INET in (await kernel.read()).tables

    with_kernel(body)


def test_the_rules_stay_when_the_kernel_is_stopped(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        await kernel.commit(LOAD)
        await kernel.stop()
        with pytest.raises(NftError, match="ending"):
            await kernel.commit("delete table inet podwall")
        await kernel.start()
        assert diff.difference(await kernel.read(), WANTED) == {}

    with_kernel(body)


PARENT = """
import asyncio
from agent.nft.kernel import Kernel
async def main():
    kernel = Kernel()
    await kernel.start()
    print(kernel.worker_pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_the_worker_dies_with_its_parent(netns: None) -> None:
    root = Path(kernel_module.__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGSTOP)  # stuck: it cannot see the end of its input
        parent.kill()
    _await(lambda: not _alive(worker), "the worker lives on")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _await(condition: Callable[[], bool], complaint: str, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.01)


# What others do


def test_own_commits_are_not_reported(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        heard = Heard(kernel)
        await kernel.commit(LOAD)
        for last in range(100):
            await kernel.commit(f"add element inet podwall peers {{ 10.2.0.{last} }}")
        await kernel.check("delete table inet podwall")
        await kernel.read()
        _nft("delete element inet podwall peers { 10.0.0.1 }")
        await heard.next()
        assert heard.all == [Foreign(frozenset({INET}))]

    with_kernel(body)


def test_commits_of_a_new_worker_are_own_too(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        heard = Heard(kernel)
        assert kernel.worker_pid is not None
        os.kill(kernel.worker_pid, signal.SIGKILL)
        with pytest.raises(NftError):
            await kernel.commit(LOAD)
        await kernel.commit(LOAD)
        _nft("delete table inet podwall")
        await heard.next()
        assert heard.all == [Foreign(frozenset({INET}))]

    with_kernel(body)


FOREIGN = {
    "flush ruleset": ("flush ruleset",),
    "flush table": ("flush table inet podwall",),
    "delete the table": ("delete table inet podwall",),
    "delete an element": ("delete element inet podwall peers { 10.0.0.1 }",),
    "add an element": ("add element inet podwall peers { 10.0.0.2 }",),
    "add a rule": ("add rule inet podwall decide accept",),
    "flush a chain": ("flush chain inet podwall decide",),
    "add a chain": ("add chain inet podwall intruder { type filter hook forward priority 5; }",),
    "among many others": (
        "add table inet others",
        *(f"add chain inet others c{number}" for number in range(500)),
        "flush chain inet podwall decide",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_change_is_heard_within_a_second(with_kernel: WithKernel, case: str) -> None:
    async def body(kernel: Kernel) -> Foreign:
        await kernel.commit(LOAD)
        heard = Heard(kernel)
        _nft(*FOREIGN[case])
        return await heard.next(1.0)

    assert with_kernel(body) == Foreign(frozenset({INET}))


def test_what_others_do_in_their_tables_is_not_reported(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        heard = Heard(kernel)
        await kernel.commit(LOAD)
        _nft("add table inet others", "add chain inet others podwall", "add table ip podwall")
        _nft("add table inet podwall2", "add chain inet podwall2 decide")
        _nft("add element inet podwall peers { 10.0.0.2 }")
        await heard.next()
        assert heard.all == [Foreign(frozenset({INET}))]

    with_kernel(body)


def test_a_storm_of_changes_is_heard_as_one(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> int:
        await kernel.commit(LOAD)
        heard = Heard(kernel)
        for last in range(5):
            _nft(f"add element inet podwall peers {{ 10.3.0.{last} }}")
        await heard.next()
        return len(heard.all)

    assert with_kernel(body) == 1


def test_lost_notifications_mean_that_anything_may_have_changed(
    with_kernel: WithKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_module, "RECEIVE_BYTES", 4096)
    addresses = ", ".join(str(IPv4Address(0x0C000000 + number)) for number in range(3000))

    async def body(kernel: Kernel) -> Foreign:
        await kernel.commit(LOAD)
        heard = Heard(kernel)
        await asyncio.sleep(0)
        _nft(f"add element inet podwall peers {{ {addresses} }}")
        return await heard.next()

    assert with_kernel(body).lost


def test_a_large_own_load_is_no_foreign_change(with_kernel: WithKernel) -> None:
    addresses = ", ".join(str(IPv4Address(0x0C000000 + number)) for number in range(50_000))

    async def body(kernel: Kernel) -> None:
        heard = Heard(kernel)
        await kernel.commit(LOAD)
        await kernel.commit(f"add element inet podwall peers {{ {addresses} }}")
        _nft("flush chain inet podwall decide")
        await heard.next()
        assert heard.all == [Foreign(frozenset({INET}))]

    with_kernel(body)
