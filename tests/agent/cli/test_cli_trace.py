"""`podwall trace` with agents that say what a test lets them: how a packet fared, and who is told the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.agents import Agents, SilentError
from agent.cli.cluster import Asked
from agent.cli.main import main
from agent.cli.trace import Flow, Following
from agent.explain.observed import Names
from agent.explain.traced import Account, account
from agent.explain.world import World
from tests.agent.compile.worlds import policy
from tests.agent.explain.test_matrix import owned
from tests.agent.explain.test_why import AWAY, CLIENT, service, world

ASKED = ("10.96.0.7", 80)
END = ("10.244.1.3", 8080)
NODE1, NODE2 = "node-1", "node-2"
IN, OUT, UPLINK = "podwall0a0a0a0a", "podwall0b0b0b0b", "eth0"
SERVICE = service("shop/web", clusterIP=ASKED[0], clusterIPs=[ASKED[0]])


def packet(to: tuple[str, int], source: str = "10.244.0.2") -> dict[str, Any]:
    return {"protocol": "tcp", "source": source, "sport": 4000, "destination": to[0], "dport": to[1]}


def met(
    chain: str,
    verdict: str = "accept",
    *,
    table: str = "podwall",
    kind: str = "policy",
    of: Mapping[str, Any] | None = None,
    links: tuple[str, str] = ("", ""),
    comment: str = "",
) -> dict[str, Any]:
    return {
        "id": "1",
        "family": "inet",
        "table": table,
        "chain": chain,
        "handle": 7 if kind == "rule" else 0,
        "kind": kind,
        "verdict": verdict,
        "target": "",
        "comment": comment,
        "policies": ["shop/deny"] if "_" in chain and chain.startswith(("ingress", "egress")) else [],
        "in": links[0],
        "out": links[1],
        "packet": of,
    }


def marked(to: tuple[str, int], link: str, source: str = "10.244.0.2") -> dict[str, Any]:
    return met(
        "prerouting",
        "continue",
        table="podwall_trace_1",
        kind="rule",
        of=packet(to, source),
        links=(link, ""),
    )


LEAVES = [
    marked(ASKED, IN),
    met("link_source", of=packet(ASKED), links=(IN, "")),
    met("policy_forward", of=packet(END), links=(IN, UPLINK)),
    met("services_postrouting", of=packet(END), links=(IN, UPLINK)),
]
ARRIVES = [
    marked(END, UPLINK),
    met("policy_forward", of=packet(END), links=(UPLINK, OUT)),
    met("leave_cluster", of=packet(END), links=(UPLINK, OUT)),
]
DENIED = [
    *ARRIVES[:2],
    met("ingress4_c0ffee", "continue", kind="rule", comment="denied"),
    met("ingress4_c0ffee", "drop", kind="rule"),
]
FOREIGN = [
    *LEAVES[:2],
    met("FORWARD", "drop", table="filter", of=packet(END), links=(IN, UPLINK)),
]
REUSED = [
    *LEAVES,
    marked(("10.9.9.9", 1), IN),
    met("link_source", "drop", of=packet(("10.9.9.9", 1)), links=(IN, "")),
]
REFUSED = [
    *LEAVES[:2],
    met("prerouting", of=packet(ASKED), links=(IN, "")),
    met("refuse", "drop", kind="rule"),
]
HIDDEN = [marked(END, UPLINK, "192.168.10.1"), *ARRIVES[1:]]
STRANGER = [marked(END, UPLINK, "192.168.10.77"), *ARRIVES[1:]]

Heard = dict[str, list[dict[str, Any]]]
CASES: dict[str, tuple[Heard, str, str, str]] = {
    "answered": ({NODE1: LEAVES, NODE2: ARRIVES}, "connected", "answered", "answered: shop/web:8080"),
    "denied there": (
        {NODE1: LEAVES, NODE2: DENIED},
        "silent",
        "denied",
        "denied: ingress of Pod shop/web is isolated by shop/deny",
    ),
    "never came": ({NODE1: LEAVES, NODE2: []}, "silent", "lost", "lost between node-1 and node-2"),
    "nobody heard of": ({NODE1: [], NODE2: []}, "silent", "unseen", "no packet was seen"),
    "only the first node asked": ({NODE1: LEAVES}, "silent", "lost", "no answer: it left node-1 by eth0"),
    "nobody listens": (
        {NODE1: LEAVES, NODE2: ARRIVES},
        "refused",
        "refused",
        "where nothing listens at port 8080",
    ),
    "nobody answers": ({NODE1: LEAVES, NODE2: ARRIVES}, "silent", "silent", "but nothing came back"),
    "told that there is no way": (
        {NODE1: LEAVES},
        "unreachable",
        "unreachable",
        "unreachable: left node-1 by eth0, and the client was told so",
    ),
    "waited for": ({NODE1: LEAVES, NODE2: ARRIVES}, "", "passed", "passed: handed to Pod shop/web"),
    "masqueraded": ({NODE1: LEAVES, NODE2: HIDDEN}, "", "passed", "passed: handed to Pod shop/web"),
    "another client's": ({NODE1: LEAVES, NODE2: STRANGER}, "", "passed", "passed: left node-1 by eth0"),
    "somebody else's rules": (
        {NODE1: FOREIGN},
        "silent",
        "dropped",
        "table inet filter, chain FORWARD, its policy",
    ),
    "an id given again": ({NODE1: REUSED, NODE2: ARRIVES}, "connected", "answered", "answered"),
    "no endpoint": ({NODE1: REFUSED}, "refused", "dropped", "refused: Service shop/web:80 has no endpoint"),
    "not past the routing": ({NODE1: LEAVES[:2]}, "silent", "lost", "lost on node-1 between the rules"),
}


def told(heard: Heard, verdict: str) -> Account:
    deny = policy("shop/deny", podSelector={"matchLabels": {"app": "web"}})
    return account(Names(world([CLIENT, AWAY, SERVICE, deny])), heard, ASKED, verdict)


@pytest.mark.parametrize("case", CASES)
def test_how_a_packet_fared(case: str) -> None:
    heard, verdict, cause, sentence = CASES[case]
    found = told(heard, verdict)
    assert (found.cause, sentence in found.sentence) == (cause, True), found.sentence


def test_the_way_is_told_in_order() -> None:
    found = told({NODE2: ARRIVES, NODE1: LEAVES}, "connected")
    assert [(step.node, step.stage) for step in found.steps] == [
        (NODE1, "start"),
        (NODE1, "link"),
        (NODE1, "service"),
        (NODE1, "egress"),
        (NODE1, "route"),
        (NODE2, "arrival"),
        (NODE2, "ingress"),
        (NODE2, "delivery"),
    ]


# The command


class Node:
    """A node's agent that notes what it is asked; the call `breaks` breaks it."""

    def __init__(self, breaks: str = "") -> None:
        self.asked: list[str] = []
        self.opened: list[Mapping[str, object]] = []
        self.breaks = breaks

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        self.asked.append(call)
        if call == self.breaks:
            raise SilentError("gone")
        if call == "trace.open":
            self.opened.append(body)
            return {"source": "10.244.0.2", "sport": 4000}
        return {"steps": [], "lost": False, "verdict": "silent", "words": ""}

    def close(self) -> None:
        pass


def flow(made: World) -> Flow:
    client = made.snapshot.pods["shop", "client"]
    ends = ((ip_address(END[0]), END[1]),)
    return Flow(client, ip_address("10.244.0.2"), ip_address(ASKED[0]), ASKED[1], "TCP", ends)


@pytest.fixture
def shop() -> World:
    return world([CLIENT, AWAY, SERVICE])


@pytest.mark.parametrize("breaks", ["", "trace.send", "trace.read"])
def test_every_agent_that_was_asked_is_told_the_end(shop: World, breaks: str) -> None:
    one, two = Node(breaks), Node()
    with Agents({NODE1: lambda: one, NODE2: lambda: two}) as agents:
        following = Following(agents, shop)
        following.open(flow(shop), waits=False)
        try:
            following.send(0.1)
        except SilentError:
            assert breaks == "trace.send"
        finally:
            following.close()
    assert one.asked[-1] == two.asked[-1] == "trace.close"


def test_they_are_told_the_end_before_they_have_answered(shop: World) -> None:
    class Interrupted(Node):
        def ask(self, call: str, body: Mapping[str, object]) -> Any:
            super().ask(call, body)
            if call == "trace.open":
                raise KeyboardInterrupt

    one, two = Node(), Interrupted()
    with Agents({NODE1: lambda: one, NODE2: lambda: two}) as agents:
        following = Following(agents, shop)
        with pytest.raises(KeyboardInterrupt):
            following.open(flow(shop), waits=False)
        following.close()
    assert one.asked[-1] == two.asked[-1] == "trace.close"
    assert one.opened[0]["id"] == two.opened[0]["id"]


def test_a_node_that_is_silent_is_noted(shop: World) -> None:
    one, two = Node(), Node("trace.open")
    with Agents({NODE1: lambda: one, NODE2: lambda: two}) as agents:
        following = Following(agents, shop)
        following.open(flow(shop), waits=False)
        following.close()
    assert following.notes == ["node-2 was not asked: gone"]
    assert two.asked[-1] == "trace.close", "it may have opened it all the same"


def of_web(name: str, address: str, on: str) -> dict[str, Any]:
    return owned(f"shop/web-{name}", address, "StatefulSet", "web", node=on)


@pytest.mark.parametrize("wait", [False, True])
def test_of_a_workload_the_first_pod_on_a_node_with_an_agent_sends(
    monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """It is said which: before somebody has to connect from there, and in the answer."""
    one = Node()
    agents = Agents({NODE2: lambda: one})
    made = world([CLIENT, of_web("0", "10.244.0.3", NODE1), of_web("1", "10.244.1.3", NODE2)])
    monkeypatch.setattr(Asked, "snapshot", lambda _: made.snapshot)
    monkeypatch.setattr(Asked, "agents", lambda _: agents)
    words = ["trace", "-n", "shop", "sts/web", "client:80", *(["--wait", "--timeout", "0.1"] if wait else [])]
    done = CliRunner().invoke(main, words)

    said = "taken: web-1 of the 2 Pods of StatefulSet shop/web"
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1] == said
    assert done.stderr.splitlines()[:1] == ([said] if wait else [])
    (body,) = one.opened
    assert wait or body["from"] == {"namespace": "shop", "name": "web-1"}

    done = CliRunner().invoke(main, [*words, "-o", "json"])
    content = json.loads(done.stdout)
    assert (content["source"]["name"], content["taken"]) == ("Pod shop/web-1", said)


def test_a_workload_that_no_agent_can_make_send(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world([CLIENT, of_web("0", "10.244.0.3", NODE1)])
    monkeypatch.setattr(Asked, "snapshot", lambda _: made.snapshot)
    monkeypatch.setattr(Asked, "agents", lambda _: Agents({NODE2: Node}))
    done = CliRunner().invoke(main, ["trace", "-n", "shop", "web", "client:80"])
    assert done.exit_code == 2
    assert "no Pod of StatefulSet shop/web runs on a node with an agent" in done.output


USAGE: dict[str, tuple[Sequence[str], str]] = {
    "manifests": (["-f", "{}", "web", "db:80"], "No such option '-f'"),
    "a port that is none": (["web", "db:99999"], "port 99999 is not from 1 to 65535"),
    "no target": (["web"], "Missing argument"),
    "a timeout that is none": (["web", "db", "--timeout", "0"], "0.1<=x<=600"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str, tmp_path: Path) -> None:
    arguments, said = USAGE[case]
    done = CliRunner().invoke(main, ["trace", *(each.format(tmp_path) for each in arguments)])
    assert (done.exit_code, said in done.output) == (2, True), done.output
