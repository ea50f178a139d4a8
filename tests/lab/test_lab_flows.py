"""`podwall flows` over real connections in the lab: each is told once, with its Service, endpoint and policy.

web (node1), stranger (node1) --> Service shop/api --> api (node2), which admits web alone
outside --> node1:30081 --> Service shop/open --> open (node2)
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from agent.compile.names import TABLE
from agent.nft.handles import rules
from lab import netns
from lab.limits import SLOWNESS
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import namespace, pod, policy
from tests.lab.services import eventually, port, service

PODWALL = Path(sys.executable).parent / "podwall"
LIMIT = 15.0 * SLOWNESS
QUIET = 3.0 * SLOWNESS
WEB = {"matchLabels": {"app": "web"}}
OBJECTS = (
    namespace("shop"),
    pod("shop/api", 8080, node="node2", labels={"app": "api"}),
    pod("shop/open", 8080, node="node2", labels={"app": "open"}),
    pod("shop/web", node="node1", labels={"app": "web"}),
    pod("shop/stranger", node="node1", labels={"app": "stranger"}),
    pod("shop/locked", node="node1", labels={"app": "locked"}),
    service("shop/api", {"app": "api"}, port(80)),
    service("shop/open", {"app": "open"}, port(80, nodePort=30081), type="NodePort"),
    policy(
        "shop/web-only",
        podSelector={"matchLabels": {"app": "api"}},
        ingress=[{"from": [{"podSelector": WEB}]}],
    ),
    policy("shop/locked-in", podSelector={"matchLabels": {"app": "locked"}}, policyTypes=["Egress"]),
)


@pytest.fixture
def shop() -> Iterator[Lab]:
    with Lab(nodes=2, given=OBJECTS) as made:
        in_force(made)
        yield made


def in_force(lab: Lab) -> None:
    """Return when all Services work; asked by IPv6, so that IPv4's connections are the tests' own."""
    every_node_follows(lab)
    for source, address, number in (
        ("shop/web", lab.service("shop/api").address(6), 80),
        ("node1", lab.service("shop/open").address(6), 80),
        ("outside", next(each for each in lab.node("node1").addresses if each.version == 6), 30081),
    ):
        seen = eventually(lambda to=(source, address, number): lab.connect(*to), "connected".__eq__, LIMIT)  # type: ignore[misc]
        assert seen == "connected"


def listed(*arguments: str) -> Any:
    done = CliRunner().invoke(main, ["flows", "--lab", "-o", "json", *arguments])
    assert done.exit_code == 0, done.output
    return [event for event in json.loads(done.stdout)["events"] if "." in event["destination"]["address"]]


def told(event: dict[str, Any]) -> tuple[str, ...]:
    """What of an event is the same in every run."""
    met = event["service"] or {"name": "", "type": ""}
    source = event["source"]["pod"] or event["source"]["node"] or event["source"]["address"]
    destination = event["destination"]["pod"] or event["destination"]["address"]
    return event["event"], source, met["name"], met["type"], destination, ",".join(event["policies"])


def traffic(lab: Lab) -> list[tuple[str, ...]]:
    """Connections of all kinds, and what must be told of them."""
    outside = str(lab.outside.addresses[0])
    api, opened = lab.service("shop/api").address(4), lab.service("shop/open").address(4)
    assert lab.connect("shop/web", api, 80) == "connected"
    assert lab.connect("shop/stranger", api, 80) == "silent"
    assert lab.connect("shop/locked", api, 80) == "silent"
    assert lab.connect("outside", lab.node("node1").addresses[0], 30081) == "connected"
    assert lab.connect("shop/web", lab.pod("shop/open").address(4), 8080) == "connected"
    assert lab.connect("node1", opened, 80) == "connected"
    return [
        ("begun", "shop/web", "shop/api", "ClusterIP", "shop/api", ""),
        ("denied", "shop/stranger", "shop/api", "ClusterIP", "shop/api", "shop/web-only"),
        ("denied", "shop/locked", "", "", "shop/api", "shop/locked-in"),
        ("begun", outside, "shop/open", "NodePort", "shop/open", ""),
        ("begun", "shop/web", "", "", "shop/open", ""),
        ("begun", "node1", "shop/open", "ClusterIP", "shop/open", ""),
    ]


def test_what_there_is_is_shown_once_with_its_service_and_policy(shop: Lab) -> None:
    expected = [(each[0].replace("begun", "open"), *each[1:]) for each in traffic(shop)]

    def seen() -> Any:
        return set(map(told, listed()))

    assert eventually(seen, set(expected).__eq__, LIMIT) == set(expected)
    once = Counter(told(event) for event in listed() if event["event"] == "open")
    assert once == Counter(each for each in expected if each[0] == "open")


def test_filters_leave_exactly_theirs(shop: Lab) -> None:
    expected = set(traffic(shop))
    denied = {each for each in expected if each[0] == "denied"}
    assert eventually(lambda: set(map(told, listed("--denied"))), denied.__eq__, LIMIT) == denied
    assert {event["event"] for event in listed("--allowed")} == {"open"}
    stranger = listed("--pod", "shop/stranger")
    assert {told(event)[1] for event in stranger} == {"shop/stranger"}
    assert {event["direction"] for event in stranger} == {"ingress"}
    assert "nearest is shop/web-only spec.ingress[0]" in stranger[0]["reason"]
    services = listed("-n", "shop", "--service", "open")
    assert {told(event)[4] for event in services} == {"shop/open"}
    assert not listed("--denied", "--since", "0s")
    assert len(listed("--denied", "--last", "2")) == 2


@contextmanager
def following(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, when it has begun to follow."""
    command = [PODWALL, "flows", "--lab", "--follow", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("following node1, node2")
        yield process
    finally:
        process.kill()
        process.communicate()


def lines(process: subprocess.Popen[str], count: int) -> list[dict[str, Any]]:
    """So many events, and those that come in a while after these."""
    out = stdout(process).fileno()
    text, deadline = b"", time.monotonic() + LIMIT
    while (left := deadline - time.monotonic()) > 0:
        if select.select([out], [], [], left)[0]:
            text += os.read(out, 1 << 16)
        if text.count(b"\n") >= count:
            deadline, count = time.monotonic() + QUIET, sys.maxsize
    return [json.loads(line) for line in text.splitlines()]


def stdout(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def test_following_tells_exactly_what_happens_in_order_and_once(shop: Lab) -> None:
    with following("-o", "json") as process:
        expected = traffic(shop)
        events = lines(process, len(expected))
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
    begun = [event for event in events if event["event"] != "denied"]
    assert Counter(map(told, begun)) == Counter(each for each in expected if each[0] == "begun")
    assert {told(event) for event in events} == set(expected)
    assert sum(event["event"] == "denied" for event in events) <= 4  # each of two, and again after a second
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_an_end_is_told_of_what_was_told_to_begin(shop: Lab) -> None:
    before = shop.pod("shop/open").address(4)
    assert shop.connect("shop/web", before, 8080) == "connected"
    with following("-o", "json", "--allowed") as process:
        refused = shop.connect("shop/web", before, 8081)  # its reset ends the kernel's entry at once
        assert refused == "refused"
        events = lines(process, 2)
    assert [event["event"] for event in events] == ["begun", "ended"]
    assert [event["answered"] for event in events] == [False, False]
    assert events[0]["destination"]["port"] == 8081


def test_it_ends_when_nobody_reads_any_more(shop: Lab) -> None:
    with following() as process:
        stdout(process).close()
        assert process.wait(LIMIT) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_an_agent_that_dies_meanwhile_is_said_and_followed_again(shop: Lab) -> None:
    with following("-o", "json") as process:
        shop.agents["node2"].stop(kill=True)
        lost = lines(process, 1)
        assert [(event["event"], event["node"]) for event in lost] == [("lost", "node2")]
        shop.agents["node2"].start()
        shop.wait_until_ready()
        assert shop.connect("shop/web", shop.service("shop/api").address(4), 80) == "connected"
        events = lines(process, 2)
    assert [event["event"] for event in events if event["event"] != "lost"] == ["begun"]


def test_what_the_rules_did_not_log_is_counted(shop: Lab) -> None:
    def denied() -> int:
        counted = netns.run(shop.netns("node2"), rules, TABLE)
        return sum(rule.packets or 0 for rule in counted if rule.comment == "denied")

    address, before = shop.pod("shop/api").address(4), denied()
    with following("-o", "json", "--denied") as process:
        shop.ask("shop/stranger", address, 8080, "UDP", times=100)
        events = lines(process, 2)
    logged = sum(event["count"] for event in events if event["event"] == "denied")
    lost = [event for event in events if event["event"] == "lost"]
    assert {(event["node"], event["what"]) for event in lost} == {("node2", "not_logged")}
    assert logged + sum(event["count"] for event in lost) == denied() - before >= 100
