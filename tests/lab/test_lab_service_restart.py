"""An agent that is killed and comes back under traffic: what works goes on, what is denied stays denied."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lab.probe import UDP
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.load import Datagrams, Load
from tests.lab.policies import namespace, pod, policy
from tests.lab.services import (
    FAMILIES,
    SOON,
    answers,
    eventually,
    of_version,
    pods_of,
    service,
    wait_for_frontends,
)

WEB = {"app": "web"}
PODS = ("guarded/web-1", "guarded/web-2")
NODES = ("node1", "node2")
CLIENTS = ("guarded/client-1", "guarded/client-2")


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = [namespace("guarded")]
    for number in (1, 2):
        node = f"node{number}"
        made.append(pod(f"guarded/web-{number}", 8080, node=node, labels=WEB))
        made.append(pod(f"guarded/client-{number}", node=node, labels={"app": "client"}))
    made += [
        pod("guarded/closed", 8080, node="node1", labels={"app": "closed"}),
        policy("guarded/closed", podSelector={"matchLabels": {"app": "closed"}}),
        service("guarded/web", WEB, type="NodePort"),
        service("guarded/sticky", WEB, sessionAffinity="ClientIP"),
        service("guarded/closed", {"app": "closed"}, type="NodePort"),
    ]
    with Lab(nodes=2, given=made) as found:
        every_node_follows(found)
        wait_for_frontends(found, "guarded/web", "guarded/sticky", "guarded/closed")
        for client in CLIENTS:
            for protocol in ("TCP", UDP):
                address = found.service("guarded/sticky").address(6)
                eventually(lambda: pods_of(answers(found, client, address, 80, protocol)), _anybody)  # noqa: B023
        yield found


def _anybody(seen: dict[str, int]) -> bool:
    return "" not in seen


def remembered(lab: Lab) -> dict[tuple[str, int], str]:
    """Which Pod the sticky Service keeps each client with."""
    return {
        (client, version): answer.pod if answer else ""
        for client in (*CLIENTS, *NODES)
        for version in FAMILIES
        for answer in answers(lab, client, lab.service("guarded/sticky").address(version), 80)
    }


@contextmanager
def traffic(lab: Lab) -> Iterator[tuple[list[Load], list[Load]]]:
    """Loads that must be answered, and loads that must not be, running."""
    web, closed = lab.service("guarded/web"), lab.service("guarded/closed")
    with ExitStack() as running:
        allowed = [
            running.enter_context(Load(lab.netns(source), address, number, pause=0.02))
            for source, address, number in (
                (CLIENTS[0], web.address(4), 80),
                (CLIENTS[1], web.address(6), 80),
                ("outside", lab.node("node1").addresses[0], web.node_port),
                ("outside", lab.node("node2").addresses[1], web.node_port),
            )
        ]
        denied = [
            running.enter_context(Load(lab.netns(source), address, number, patience=0.05))
            for source, address, number in (
                (CLIENTS[0], closed.address(4), 80),
                (CLIENTS[1], closed.address(6), 80),
                ("outside", lab.node("node1").addresses[0], closed.node_port),
                ("outside", lab.node("node2").addresses[1], closed.node_port),
            )
        ]
        yield allowed, denied


def test_killed_and_restarted_under_traffic(lab: Lab) -> None:
    before = remembered(lab)
    assert set(before.values()) <= set(PODS)
    stream = lab.socket(CLIENTS[1], socket.AF_INET, socket.SOCK_STREAM)
    with (
        stream,
        Datagrams(lab.netns(CLIENTS[0]), lab.service("guarded/web").address(6), 80) as flow,
        traffic(lab) as (allowed, denied),
    ):
        stream.settimeout(5)
        stream.connect((str(lab.service("guarded/web").address(4)), 80))
        stream.sendall(b"stream 5\n")
        lines = stream.makefile("rb")
        partner = flow.ask()
        for _ in range(2):
            for name in NODES:
                lab.agents[name].stop(kill=True)
            for load in (*allowed, *denied):
                load.wait_for(5)
            for name in NODES:
                lab.agents[name].start()
            lab.wait_until_ready()
            for load in (*allowed, *denied):
                load.wait_for(5)
            assert flow.ask() == partner
        seen = [int(lines.readline().split()[1]) for _ in range(200)]

    assert partner in PODS
    assert seen == list(range(200))
    assert [load.failed for load in allowed] == [[], [], [], []]
    assert [{each.pod for each in load.tries} for load in allowed] == [set(PODS)] * 4
    assert [{each.pod for each in load.tries} for load in denied] == [{""}] * 4
    assert remembered(lab) == before


def test_what_changed_while_the_agent_was_away_holds_when_it_is_back(lab: Lab) -> None:
    """A flow to an endpoint that is gone ends, though nobody was there to see it go."""
    address = lab.service("guarded/web").address(4)
    with Datagrams(lab.netns(CLIENTS[0]), address, 80) as flow:
        gone = flow.ask()
        assert gone in PODS
        [other] = set(PODS) - {gone}
        agent = lab.agents["node1"]
        agent.stop(kill=True)
        lab.set_ready(gone, False)
        assert flow.ask() == gone

        agent.start()
        lab.wait_until_ready()

        assert eventually(lambda: flow.ask(SOON), other.__eq__) == other
        assert set(pods_of(answers(lab, CLIENTS[0], address, 80, times=20))) == {other}
        assert set(pods_of(answers(lab, CLIENTS[0], lab.service("guarded/sticky").address(4), 80))) == {other}


@pytest.mark.parametrize("version", FAMILIES)
def test_rules_that_somebody_else_removed_come_back(lab: Lab, version: int) -> None:
    web, closed = lab.service("guarded/web"), lab.service("guarded/closed")
    node = of_version(lab.node("node1").addresses, version)
    with Load(lab.netns("outside"), node, closed.node_port, patience=0.05) as denied:
        denied.wait_for(3)
        lab.run("node1", ["nft", "flush", "ruleset"])

        found = eventually(
            lambda: set(pods_of(answers(lab, CLIENTS[0], web.address(version), 80, times=20))),
            set(PODS).__eq__,
        )
        assert found == set(PODS)
        assert set(pods_of(answers(lab, "outside", node, web.node_port, times=20))) == set(PODS)
        denied.wait_for(3)
    assert {each.pod for each in denied.tries[-3:]} == {""}
