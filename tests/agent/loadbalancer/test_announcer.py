"""What one node answers for: its Leases, the moment they are lost, addresses that move between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from agent.cluster.model import IPAddress, Lease
from agent.loadbalancer.announcer import HEIRS, MOVE_S, Announcer
from agent.loadbalancer.candidate import boottime
from agent.loadbalancer.leases import NAMESPACE, FileLeases
from agent.loadbalancer.shards import Shard
from tests.agent.loadbalancer.onelink import Link, arp_request, until

ONE, TWO, SIX = ip_address("192.0.2.200"), ip_address("192.0.2.201"), ip_address("2001:db8::200")


class CountedLeases(FileLeases):
    """Leases in files, and how often each was asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.asked: Counter[str] = Counter()

    async def get(self, name: str) -> Lease | None:
        self.asked[name] += 1
        return await super().get(name)


class Place:
    """An announcer of node "a" on the link, and the reason for which it may not answer."""

    def __init__(self, directory: Path) -> None:
        self.leases = CountedLeases(directory)
        self.reason = ""
        self.announcer = Announcer("a", self.leases, lambda: self.reason)

    def plan(self, *shards: Shard) -> None:
        self.announcer.plan({shard.lease: shard for shard in shards})

    def answered(self) -> Mapping[IPAddress, str]:
        return self.announcer.answered()


def shard(lease: str, *addresses: IPAddress, nodes: str = "a b", only: Mapping[IPAddress, str] = {}) -> Shard:
    """A Lease with candidates in this order; `only` are the nodes that can answer for an address."""
    able = {ip: frozenset(only[ip].split()) if ip in only else None for ip in addresses}
    return Shard(lease, able, tuple(nodes.split()))


@contextlib.asynccontextmanager
async def place(directory: Path) -> AsyncIterator[Place]:
    made = Place(directory)
    made.announcer.use_link("eth0", 2)
    running = asyncio.create_task(made.announcer.run())
    try:
        yield made
    finally:
        await made.announcer.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_it_answers_for_what_it_holds(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE, SIX), shard("y", TWO, nodes="b"))
            await until(lambda: a.answered() == {ONE: "x", SIX: "x"})
            assert a.announcer.leases()["x"] == "a"
            link.capture.send(arp_request(str(ONE)))
            await until(lambda: ONE in link.told())
            assert TWO not in link.told()

    link.run(story)


def test_it_answers_only_for_what_its_endpoints_serve(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE, TWO, only={ONE: "a b", TWO: "b"}))
            await until(lambda: a.answered() == {ONE: "x"})
            a.plan(shard("x", ONE, TWO, only={ONE: "b", TWO: "a"}))
            assert a.answered() == {TWO: "x"}

    link.run(story)


def test_a_node_that_is_not_able_gives_everything_up(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE))
            await until(a.answered)
            a.reason = "the rules are not in the kernel yet"
            a.announcer.review()
            assert not a.answered()
            assert a.announcer.reason() == a.reason
            lease = None
            while lease is None or lease.holder:
                lease = await a.leases.get("x")
            a.reason = ""
            await until(a.answered)

    link.run(story)


def test_closing_hands_over(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE))
            await until(a.answered)
        assert not a.answered()
        lease = await a.leases.get("x")
        assert lease is not None
        assert lease.holder == ""

    link.run(story)


def test_an_address_that_moves_to_another_lease_is_silent_for_a_moment(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE), shard("y", TWO))
            await until(lambda: a.answered() == {ONE: "x", TWO: "y"})
            begin = boottime()
            a.plan(shard("y", ONE, TWO))
            assert a.answered() == {TWO: "y"}
            await until(lambda: a.answered() == {ONE: "y", TWO: "y"})
            assert boottime() - begin >= MOVE_S

    link.run(story)


def test_leases_of_no_address_are_removed(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE))
            await until(a.answered)
            a.plan()
            assert not a.answered()
            await until(lambda: not list(tmp_path.glob("*.json")))
            a.plan(shard("x", ONE))
            await until(a.answered)
            a.plan()
            a.plan(shard("x", ONE))  # before the Lease could be removed
            await until(a.answered)

    link.run(story)


def test_who_is_far_from_the_first_asks_seldom(link: Link, tmp_path: Path) -> None:
    others = " ".join(f"n{number}" for number in range(HEIRS))

    async def story() -> None:
        async with place(tmp_path) as a:
            await a.leases.create(Lease(NAMESPACE, "x", holder="n0", duration_s=600))
            await a.leases.create(Lease(NAMESPACE, "y", holder="n0", duration_s=600))
            a.plan(shard("x", ONE, nodes=f"{others} a"), shard("y", TWO, nodes="n0 a"))
            await until(lambda: a.leases.asked["y"] > 3)
            assert a.leases.asked["x"] == 1
            a.plan(shard("x", ONE, nodes="a n0"))
            await until(lambda: a.leases.asked["x"] > 3)
            assert ONE not in a.answered(), "it is held by another, who may not know of the new order yet"

    link.run(story)


def test_without_a_link_there_is_no_answer(link: Link, tmp_path: Path) -> None:
    async def story() -> None:
        async with place(tmp_path) as a:
            a.plan(shard("x", ONE))
            await until(a.answered)
            a.announcer.use_link("eth9", 9)
            assert not a.answered()
            assert "uplink eth9: no interface with this name" in a.announcer.reason()
            a.announcer.use_link("eth0", 2)
            await until(a.answered)
            link.ip(link.client, "link set eth0 down")
            await until(lambda: not a.answered())
            assert a.announcer.reason() == "uplink eth0 has no carrier"
            link.ip(link.client, "link set eth0 up")
            await until(a.answered)

    link.run(story)
