"""Rules that somebody altered are found by comparing the kernel with what should be there, and named."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

import pytest

from agent import features, proofs
from agent.cluster.store import snapshot_of
from agent.config import Config
from agent.nft.kernel import Kernel
from agent.nft.model import (
    DROP,
    Chain,
    Element,
    Item,
    Match,
    Named,
    Owner,
    Payload,
    Rule,
    Set,
    Table,
    TableName,
)
from agent.routes.plan import Plan
from agent.rules import Rules

INET = TableName("inet", "podwall")
PEERS = Set(INET, "peers", ("ipv4_addr",))
ALL: tuple[Item, ...] = (
    Table(*INET),
    PEERS,
    Chain(INET, "decide", (Rule((Match(Payload("ip", "saddr"), "==", Named("peers")), DROP)),)),
    Element(PEERS.id, IPv4Address("10.0.0.1")),
)
OWNER: Owner = ("all",)
WithKernel = Callable[..., Any]


def _nft(change: str) -> None:
    """Another program's change, in the network namespace of this thread."""
    subprocess.run(["nft", change], check=True, capture_output=True)


def rules(kernel: Kernel) -> Rules:
    return Rules(kernel, lambda _: ALL, frozenset({INET}))


CASES = {
    "a rule more": (
        "add rule inet podwall decide accept",
        ["chain decide of inet podwall has 2 rules where 1 should be, or others"],
    ),
    "a rule less": (
        "flush chain inet podwall decide",
        ["chain decide of inet podwall has 0 rules where 1 should be, or others"],
    ),
    "an element less": (
        "delete element inet podwall peers { 10.0.0.1 }",
        ["element 10.0.0.1 of peers, inet podwall, is missing"],
    ),
    "an element more": (
        "add element inet podwall peers { 10.9.9.9 }",
        ["element 10.9.9.9 of peers, inet podwall, is not podwall's"],
    ),
    "a foreign chain": (
        "add chain inet podwall theirs",
        ["chain theirs of inet podwall is not podwall's"],
    ),
    "all gone": (
        "delete table inet podwall",
        [
            "chain decide of inet podwall is missing",
            "element 10.0.0.1 of peers, inet podwall, is missing",
            "set peers of inet podwall is missing",
            "table inet podwall is missing",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_altered_is_named(with_kernel: WithKernel, case: str) -> None:
    change, expected = CASES[case]

    async def body(kernel: Kernel) -> None:
        of = rules(kernel)
        await of.run(frozenset({OWNER}))
        assert await of.altered() == {}
        _nft(change)
        changes = await of.altered()
        assert changes is not None
        assert proofs.differences(changes) == expected
        of.distrust()
        await of.run(frozenset({OWNER}))
        assert await of.altered() == {}

    with_kernel(body)


def test_very_many_rules_are_not_read_for_whoever_asks(
    with_kernel: WithKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "MOST_COMPARED", 0)

    async def body(kernel: Kernel) -> dict[str, Any]:
        of = rules(kernel)
        await of.run(frozenset({OWNER}))
        at = of.last_compared
        _nft("flush chain inet podwall decide")
        said = await proofs.rules(subject(kernel, of))
        assert (said["compared"], said["altered"], said["at"]) == (True, 0, at)
        return said

    with_kernel(body)


def subject(kernel: Kernel, of: Rules) -> proofs.Subject:
    async def reach(_: str) -> None:
        """There is no cluster."""

    return proofs.Subject(
        Config(node_name="node1"),
        kernel,
        {"all": of},
        snapshot=lambda: snapshot_of(()),
        plan=Plan,
        pod_mtu=lambda: 1500,
        altered=lambda: None,
        status=dict,
        reach=reach,
    )


def test_an_answer_names_the_differences_and_has_them_put_right(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        of = rules(kernel)
        await of.run(frozenset({OWNER}))
        told: list[str] = []
        asked = dataclasses.replace(subject(kernel, of), altered=lambda: told.append("altered"))
        assert ((await proofs.rules(asked))["altered"], told) == (0, [])
        _nft("flush chain inet podwall decide")
        said = await proofs.rules(asked)
        assert (said["altered"], told) == (1, ["altered"])
        assert said["differences"][0]["part"] == "all"

    with_kernel(body)


def test_nothing_is_said_while_something_is_committed(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> None:
        of = rules(kernel)
        running = asyncio.create_task(of.run(frozenset({OWNER})))
        await asyncio.sleep(0)
        assert await of.altered() is None
        await running
        assert await of.altered() == {}

    with_kernel(body)


def test_this_kernel_has_every_feature(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> list[features.Found]:
        return await features.found(kernel, tunnels=True, families=(4, 6))

    found = with_kernel(body)
    assert {each.feature.name: each.why_not for each in found if not each.there} == {}
    assert subprocess.run(["nft", "list", "tables"], capture_output=True, check=True, text=True).stdout == ""


MISSING = {
    "what nft refuses": features.Feature("a", "m", "w", rule="ip saddr @nowhere accept"),
    # NAT needs a connection, which priority -300 comes before: only the kernel knows
    "what the kernel refuses": features.Feature("b", "m", "w", hook="type nat hook prerouting priority -300"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_feature_that_is_missing_says_why(with_kernel: WithKernel, case: str) -> None:
    async def body(kernel: Kernel) -> features.Found:
        return await features.asked(kernel, MISSING[case])

    found = with_kernel(body)
    assert not found.there
    assert "Error" in found.why_not
