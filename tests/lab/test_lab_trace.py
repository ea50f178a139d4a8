"""`podwall trace` follows real packets in the lab, and leaves nothing on the nodes, however it ends.

web, stranger (node1) --> Service shop/api --> api (node2), which admits web alone
crew (node1), crew (node2) of one Deployment --> Service shop/open
locked (node1): no egress      outside --> node1:30081 --> Service shop/open --> open (node2)
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab.limits import SLOWNESS
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import namespace, pod, policy, replica
from tests.lab.services import port, service, until

PODWALL = Path(sys.executable).parent / "podwall"
LIMIT = 15.0 * SLOWNESS
EXPIRED = 40.0 * SLOWNESS  # what agents keep for a client that is gone lives 20 s
WEB = {"matchLabels": {"app": "web"}}
OBJECTS = (
    namespace("shop"),
    pod("shop/api", 8080, node="node2", labels={"app": "api"}),
    pod("shop/open", 8080, node="node2", labels={"app": "open"}),
    pod("shop/near", 8080, node="node1", labels={"app": "near"}),
    pod("shop/web", node="node1", labels={"app": "web"}),
    pod("shop/stranger", node="node1", labels={"app": "stranger"}),
    pod("shop/locked", node="node1", labels={"app": "locked"}),
    replica("shop/crew-5f7-a", 8080, node="node1"),
    replica("shop/crew-5f7-b", 8080, node="node2"),
    service("shop/api", {"app": "api"}, port(80)),
    service("shop/open", {"app": "open"}, port(80, nodePort=30081), type="NodePort"),
    service("shop/none", {"app": "none"}, port(80)),
    policy(
        "shop/web-only",
        podSelector={"matchLabels": {"app": "api"}},
        ingress=[{"from": [{"podSelector": WEB}]}],
    ),
    policy("shop/locked-in", podSelector={"matchLabels": {"app": "locked"}}, policyTypes=["Egress"]),
)


@pytest.fixture(scope="module")
def shop() -> Iterator[Lab]:
    with Lab(nodes=2, given=OBJECTS) as made:
        every_node_follows(made)
        for source, address, number in (
            ("shop/web", made.service("shop/api").address(4), 80),
            ("outside", made.node("node1").addresses[0], 30081),
        ):
            until(lambda to=(source, address, number): made.connect(*to) == "connected", LIMIT)  # type: ignore[misc]
        yield made


def traced(*arguments: str) -> Any:
    done = CliRunner().invoke(main, ["trace", "--lab", "-n", "shop", "-o", "json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def tables(lab: Lab) -> list[str]:
    """The tables of all nodes that mark packets."""
    listed = (lab.run(node.name, ["nft", "list", "tables"]).stdout.splitlines() for node in lab.nodes)
    return [line for lines in listed for line in lines if "podwall_trace" in line]


Case: TypeAlias = tuple[tuple[str, ...], str, list[tuple[str, str, bool]], str]

CASES: list[Case] = [
    (
        ("web", "svc/api:80"),
        "answered",
        [
            ("node1", "link", True),
            ("node1", "service", True),
            ("node1", "egress", True),
            ("node1", "route", True),
            ("node2", "ingress", True),
            ("node2", "delivery", True),
        ],
        "allowed by policy shop/web-only spec.ingress[0]",
    ),
    (
        ("stranger", "svc/api:80"),
        "denied",
        [
            ("node1", "link", True),
            ("node1", "service", True),
            ("node1", "egress", True),
            ("node1", "route", True),
            ("node2", "ingress", False),
        ],
        "denied: ingress of Pod shop/api is isolated by shop/web-only",
    ),
    (
        ("locked", "pod/near:8080"),
        "denied",
        [("node1", "link", True), ("node1", "egress", False)],
        "denied: egress of Pod shop/locked is isolated by shop/locked-in",
    ),
    (
        ("web", "svc/none:80"),
        "dropped",
        [("node1", "link", True), ("node1", "service", False)],
        "refused: Service shop/none:80 has no endpoint",
    ),
    (
        ("web", "pod/near:8081"),
        "refused",
        [
            ("node1", "link", True),
            ("node1", "egress", True),
            ("node1", "ingress", True),
            ("node1", "delivery", True),
        ],
        "handed to Pod shop/near",
    ),
    (
        ("node/node2", "svc/open:80"),
        "answered",
        [("node2", "service", True), ("node2", "ingress", True), ("node2", "delivery", True)],
        "sent by node2 itself",
    ),
]


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize("case", CASES, ids=["-".join(case[0]).replace("/", " ") for case in CASES])
def test_each_step_is_told_in_order(shop: Lab, case: Case, family: str) -> None:
    arguments, cause, steps, text = case
    found = traced(*arguments, "--family", family)
    assert found["cause"] == cause, found["sentence"]
    decided = [(each["node"], each["stage"], each["ok"]) for each in found["steps"] if each["ok"] is not None]
    assert decided == steps
    assert any(text in each["text"] for each in found["steps"])
    assert not tables(shop)


def test_of_workloads_one_pod_is_taken(shop: Lab) -> None:
    """A Deployment asked about itself: from its first Pod to another."""
    found = traced("deploy/crew", "crew:8080")

    assert (found["cause"], found["source"]["name"]) == ("answered", "Pod shop/crew-5f7-a")
    assert found["destination"]["address"] == str(shop.pod("shop/crew-5f7-b").address(4))
    of = "of the 2 Pods of Deployment shop/crew"
    assert found["taken"] == f"taken: crew-5f7-a {of}; crew-5f7-b {of}"
    assert not tables(shop)


def test_udp_is_followed_too(shop: Lab) -> None:
    found = traced("stranger", "pod/api:8080", "--protocol", "udp")
    assert (found["cause"], found["steps"][-1]["node"]) == ("denied", "node2")


def test_a_packet_from_outside_is_waited_for(shop: Lab) -> None:
    node1 = str(shop.node("node1").addresses[0])
    outside = str(shop.outside.addresses[0])
    going = threading.Event()

    def connects() -> None:
        while not going.is_set():
            shop.connect("outside", node1, 30081)

    thread = threading.Thread(target=connects)
    thread.start()
    try:
        found = traced(outside, "node/node1:30081")
    finally:
        going.set()
        thread.join()
    assert found["cause"] == "passed", found["sentence"]
    told = [(each["node"], each["stage"]) for each in found["steps"]]
    assert told == [
        ("node1", "start"),
        ("node1", "service"),
        ("node1", "masquerade"),
        ("node1", "route"),
        ("node2", "arrival"),
        ("node2", "ingress"),
        ("node2", "delivery"),
    ]
    assert not tables(shop)


def test_rules_of_somebody_else_are_named(shop: Lab) -> None:
    foreign = (
        "table inet foreign { chain fw { type filter hook forward priority 10; tcp dport 8080 drop; }; }"
    )
    assert shop.run("node1", ["nft", foreign]).returncode == 0
    try:
        found = traced("web", "pod/open:8080")
    finally:
        shop.run("node1", ["nft", "delete table inet foreign"])
    assert found["cause"] == "dropped"
    assert "dropped by somebody else's rules: table inet foreign, chain fw" in found["sentence"]


def test_what_never_comes_to_the_other_node_is_said(shop: Lab) -> None:
    shop.unplug("node2")
    try:
        found = traced("web", "pod/open:8080")
    finally:
        shop.plug("node2")
    assert found["cause"] == "lost"
    assert "lost between node1 and node2" in found["sentence"]
    until(lambda: shop.connect("shop/web", shop.pod("shop/open").address(4), 8080) == "connected", LIMIT)


@contextmanager
def begun() -> Iterator[subprocess.Popen[str]]:
    """The command, which will wait for a packet that nobody sends."""
    command = [PODWALL, "trace", "--lab", "-n", "shop", "--wait", "--timeout", "300", "web", "svc/api:80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def waiting() -> Iterator[subprocess.Popen[str]]:
    """The same, when it waits."""
    with begun() as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting 300 s")
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_leaves_nothing(shop: Lab, number: signal.Signals) -> None:
    with waiting() as process:
        assert len(tables(shop)) == 2
        process.send_signal(number)
        assert process.wait(LIMIT) == 130
    assert not tables(shop)


def test_one_that_is_interrupted_while_the_agents_are_asked_leaves_nothing(shop: Lab) -> None:
    with begun() as process:
        until(lambda: tables(shop), LIMIT)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
    assert not tables(shop)


def test_a_killed_one_leaves_nothing_for_long(shop: Lab) -> None:
    with waiting() as process:
        assert len(tables(shop)) == 2
        process.kill()
    until(lambda: not tables(shop), EXPIRED)


def test_a_killed_agent_leaves_nothing_at_once(shop: Lab) -> None:
    agent = shop.agents["node1"]
    with waiting() as process:
        assert len(tables(shop)) == 2
        agent.stop(kill=True)
        assert len(tables(shop)) == 1  # node2's
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
    assert not tables(shop)
    agent.start()
    shop.wait_until_ready()


def test_podwalls_own_tables_are_not_touched_by_it(shop: Lab) -> None:
    def own() -> str:
        text = "".join(
            shop.run("node1", ["nft", "--stateless", "--handle", "list", "table", *table]).stdout
            for table in (("inet", "podwall"), ("inet", "podwall_services"))
        )
        assert text
        return text

    before, log = own(), shop.agents["node1"].log.read_text()
    with waiting() as process:
        assert own() == before
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT)
    assert own() == before
    assert "foreign-change" not in shop.agents["node1"].log.read_text()[len(log) :]
