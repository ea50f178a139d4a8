"""What an agent proves when it is asked: a part that fails hides none of the others."""

from __future__ import annotations

import asyncio
import dataclasses
from ipaddress import ip_address
from typing import Any, cast

import pytest

from agent import proofs
from agent.cluster.errors import Unreachable
from agent.cluster.model import Node
from agent.cluster.store import snapshot_of
from agent.config import Config
from agent.nft.kernel import Kernel, NftError
from agent.routes.plan import Plan, Vxlan
from cni.spec import CniError


class Refusing:
    """A kernel that has none of the features, and counts how often it is asked."""

    asked = 0

    async def check(self, text: str) -> None:
        self.asked += 1
        raise NftError("refused", "Error: Could not process rule: Operation not supported\nadd rule", text)


async def reached(_: str) -> None:
    """Everything has been delivered."""


def subject(**changed: Any) -> proofs.Subject:
    made = proofs.Subject(
        Config(node_name="node1"),
        cast("Kernel", Refusing()),
        {},
        snapshot=lambda: snapshot_of([Node("node1"), Node("node2")]),
        plan=Plan,
        pod_mtu=lambda: 1500,
        altered=lambda: None,
        status=lambda: {"node": "node1"},
        reach=reached,
    )
    return dataclasses.replace(made, **changed)


def ask(of: proofs.Subject, call: str, times: int = 1) -> Any:
    async def asked() -> Any:
        answers = proofs.answers(of)
        for _ in range(times):
            found = await answers[call]({})
        return found

    return asyncio.run(asked())


def test_what_fails_hides_nothing_else() -> None:
    async def refused(_: str) -> None:
        raise Unreachable("connection refused")

    said = ask(subject(reach=refused), "health")
    assert said["status"] == {"node": "node1"}
    assert said["lag"] == {"error": "connection refused"}
    assert said["paths"]["without_path"] == ["node2"]
    assert said["rules"]["altered"] == 0
    assert said.keys() == {"status", "paths", "rules", "filters", "features", "lag"}


def test_a_watch_that_does_not_get_there_in_time_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "LAG_LIMIT_S", 0.01)

    async def never(_: str) -> None:
        await asyncio.Event().wait()

    with pytest.raises(CniError, match=r"does not get to what the API server has within 0\.01 s"):
        ask(subject(reach=never), "lag")


def test_how_long_it_takes_to_know_is_told() -> None:
    assert ask(subject(), "lag")["ms"] < 1000


def test_features_that_are_missing_are_told_with_the_kernels_words() -> None:
    found = {each["name"]: each for each in ask(subject(), "features")["features"]}
    nat = found["nftables: NAT in family inet"]
    assert (nat["there"], nat["matters"]) == (False, True)
    assert nat["why_not"] == "Error: Could not process rule: Operation not supported"
    assert "Services" in nat["without"] or "Service" in nat["without"]
    assert found["VXLAN devices"]["matters"] is False, "no path is tunnelled here"


def test_the_kernel_is_not_asked_for_features_again_and_again() -> None:
    kernel = Refusing()
    ask(subject(kernel=kernel), "features", times=1)
    once = kernel.asked
    ask(subject(kernel=kernel), "features", times=5)
    assert kernel.asked == 2 * once


TUNNEL = Vxlan(9619, 4789, ip_address("192.0.2.1"), "02:00:00:00:00:01", 1450, frozenset())
SENT = {"by tunnel, each time": (Plan(vxlan=TUNNEL), 3), "without one, not so often": (Plan(), 1)}


@pytest.mark.parametrize("case", SENT)
def test_packets_are_sent(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, times = SENT[case]
    looks: list[object] = []
    monkeypatch.setattr(proofs.reachability, "trials", lambda *of: looks.append(of) or ())
    ask(subject(plan=lambda: plan), "paths", times=3)
    assert len(looks) == times
