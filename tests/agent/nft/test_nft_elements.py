"""Elements by the short way are what libnftables would have made of the same text, read back alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from agent import nfnetlink
from agent.nft import diff, elements
from agent.nft import kernel as kernel_module
from agent.nft.kernel import Kernel
from agent.nft.model import (
    ACCEPT,
    Chain,
    Element,
    Item,
    Range,
    Ruleset,
    Set,
    Table,
    TableName,
    Verdict,
    Wildcard,
)

WithKernel = Callable[..., Any]
INET, ARP = TableName("inet", "podwall"), TableName("arp", "podwall")


def _set(name: str, *kinds: str, data: tuple[str, ...] = (), table: TableName = INET, **more: Any) -> Set:
    return Set(table, name, kinds, data, **more)


V4, V6 = ip_address("10.244.0.7"), ip_address("fd00:10:244::7")
PORT4, PORT6 = (("ipv4_addr", "inet_proto", "inet_service"), ("ipv6_addr", "inet_proto", "inet_service"))
ELEMENTS = {
    "an IPv4 address": (_set("a", "ipv4_addr"), V4, None),
    "an IPv6 address": (_set("b", "ipv6_addr"), V6, None),
    "an IPv4-mapped address": (_set("b2", "ipv6_addr"), ip_address("::ffff:10.0.0.1"), None),
    "a port": (_set("c", "inet_service"), 8080, None),
    "a protocol": (_set("d", "inet_proto"), 132, None),
    "a mark": (_set("e", "mark"), 0x51234567, None),
    "an interface": (_set("f", "ifname"), "podwall0a1b2c3d", None),
    "an address of a link": (_set("g", "ifname", "ipv4_addr"), ("podwall0a1b2c3d", V4), None),
    "an address, a protocol and a port": (
        _set("h", "ipv4_addr", "inet_proto", "inet_service"),
        (V4, 17, 53),
        None,
    ),
    "the same of IPv6": (_set("i", *PORT6), (V6, 6, 1), None),
    "to a chain": (_set("j", "ipv4_addr", data=("verdict",)), V4, Verdict("jump", "there")),
    "to a chain for good": (_set("k", "mark", data=("verdict",)), 7, Verdict("goto", "there")),
    "to a verdict": (_set("l", "inet_service", data=("verdict",)), 80, ACCEPT),
    "to a number": (
        _set("m", "ipv4_addr", "inet_proto", "inet_service", data=("mark",)),
        (V4, 6, 80),
        0x5ABCDEF0,
    ),
    "to an endpoint": (_set("n", "mark", data=("ipv4_addr", "inet_service")), 0x51234567, (V4, 8080)),
    "to an endpoint of IPv6": (_set("o", "mark", data=("ipv6_addr", "inet_service")), 1, (V6, 65535)),
    "to one in a list": (_set("p", "mark", "integer", data=("mark",)), (0x51234567, 3), 0x5ABCDEF0),
    "of ARP": (_set("q", "ipv4_addr", table=ARP), V4, None),
}
BASE: tuple[Item, ...] = (Table(*INET), Table(*ARP), Chain(INET, "there"))


def _change(before: Ruleset, after: Ruleset) -> tuple[str, bytes | None]:
    changes = diff.difference(before, after)
    return diff.transaction(changes, after), elements.batch(diff.commands(changes, after))


async def _load(kernel: Kernel, items: Iterable[Item]) -> Ruleset:
    ruleset = Ruleset(items)
    await kernel.commit(_change(Ruleset(), ruleset)[0])
    return ruleset


@pytest.mark.parametrize("comment", ["", "shop/api", "x" * 127])
def test_each_kind_of_element_comes_is_read_back_and_goes(with_kernel: WithKernel, comment: str) -> None:
    sets = tuple(of for of, _, _ in ELEMENTS.values())
    all_of_them = [Element(of.id, key, data, comment) for of, key, data in ELEMENTS.values()]

    async def body(kernel: Kernel) -> None:
        empty = await _load(kernel, (*BASE, *sets))
        full = Ruleset((*BASE, *sets, *all_of_them))
        for before, after in ((empty, full), (full, empty)):
            _, quick = _change(before, after)
            assert quick
            assert _sent(quick)
            assert diff.difference(await kernel.read(after.tables), after) == {}

    with_kernel(body)


def _sent(quick: bytes) -> bool:
    with nfnetlink.connect() as sock:
        return kernel_module._send(sock, quick)


def test_an_element_that_leads_elsewhere_now_is_exchanged_at_once(with_kernel: WithKernel) -> None:
    of = _set("balance", "mark", data=("mark",))

    async def body(kernel: Kernel) -> None:
        before = await _load(kernel, (*BASE, of, Element(of.id, 1, 2), Element(of.id, 3, 4)))
        after = Ruleset((*BASE, of, Element(of.id, 1, 5), Element(of.id, 3, 4)))
        _, quick = _change(before, after)
        assert quick
        assert _sent(quick)
        assert diff.difference(await kernel.read(after.tables), after) == {}

    with_kernel(body)


def test_what_the_kernel_refuses_changes_nothing(with_kernel: WithKernel) -> None:
    one, other = _set("one", "ipv4_addr"), _set("other", "ipv4_addr")

    async def body(kernel: Kernel) -> None:
        there = await _load(kernel, (*BASE, one))
        wanted = Ruleset((*BASE, one, Element(one.id, V4), other, Element(other.id, V4)))
        changes = diff.difference(there, wanted)
        quick = elements.batch(each for each in diff.commands(changes, wanted) if each.word == "add element")
        assert quick
        assert not _sent(quick)
        assert diff.difference(await kernel.read(there.tables), there) == {}

    with_kernel(body)


def test_the_agent_hears_of_none_of_its_own(with_kernel: WithKernel) -> None:
    of = _set("peers", "ipv4_addr")

    async def body(kernel: Kernel) -> None:
        before = await _load(kernel, (*BASE, of))
        after = Ruleset((*BASE, of, Element(of.id, V4)))
        text, quick = _change(before, after)
        assert quick
        heard: list[object] = []

        async def listen() -> None:
            async for foreign in kernel.changes():
                heard.append(foreign)  # noqa: PERF401 - each as it comes

        listening = asyncio.create_task(listen())
        await kernel.commit(text, quick)
        assert diff.difference(await kernel.read(after.tables), after) == {}
        assert _sent(_change(after, before)[1] or b"")  # by a socket that is not the agent's
        async with asyncio.timeout(2):
            while not heard:  # noqa: ASYNC110 - what is awaited is a list
                await asyncio.sleep(0.01)
        listening.cancel()
        assert len(heard) == 1

    with_kernel(body)


def test_a_refused_batch_is_left_to_libnftables_which_says_why(with_kernel: WithKernel) -> None:
    of = _set("nowhere", "ipv4_addr")

    async def body(kernel: Kernel) -> None:
        await _load(kernel, BASE)
        quick = elements.batch([diff.Command("add element", of, (Element(of.id, V4),))])
        assert quick
        with pytest.raises(Exception, match="No such file or directory"):
            await kernel.commit("add element inet podwall nowhere { 10.244.0.7 }", quick)

    with_kernel(body)


NOT_ELEMENTS_ALONE = {
    "nothing": (),
    "a range": (Element(_set("r", "ipv4_addr").id, ip_network("10.0.0.0/8")), _set("r", "ipv4_addr")),
    "ports": (Element(_set("r", "inet_service").id, Range(1, 2)), _set("r", "inet_service")),
    "links": (Element(_set("r", "ifname").id, Wildcard("pod")), _set("r", "ifname")),
    "another type": (Element(_set("r", "ether_addr").id, "02:00:00:00:00:01"), _set("r", "ether_addr")),
    "intervals": (
        Element(_set("r", "ipv4_addr").id, V4),
        _set("r", "ipv4_addr", flags=frozenset({"interval"})),
    ),
    "too many": (
        *(Element(_set("r", "mark").id, number) for number in range(elements.MOST + 1)),
        _set("r", "mark"),
    ),
}


@pytest.mark.parametrize("name", NOT_ELEMENTS_ALONE)
def test_the_rest_is_for_libnftables(name: str) -> None:
    *items, of = NOT_ELEMENTS_ALONE[name] or (None,)
    commands = [diff.Command("add element", of, tuple(items))] if of else []  # type: ignore[arg-type]
    assert elements.batch(commands) is None


def test_a_new_set_is_for_libnftables() -> None:
    of = _set("new", "ipv4_addr")
    after = Ruleset((*BASE, of, Element(of.id, V4)))
    assert _change(Ruleset(BASE), after)[1] is None
