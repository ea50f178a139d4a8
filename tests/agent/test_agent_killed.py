"""The whole agent killed, ended or robbed of its rules while Pods come and go: nothing leaks or is lost.

The agents of two nodes are killed at random moments of ADD, DEL and their own start. After each kill ledger,
kernel and the answers that the runtime got must agree. Between Pods that stay, traffic flows all the time.
PODWALL_TEST_KILLS=100 is the whole test; a run of all tests takes fewer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from lab import agents, manifests, netns
from lab.agents import Agent
from lab.manifests import ObjectDirectory
from lab.names import CLUSTER_CIDRS, LAB
from lab.processes import until
from lab.runtime import PluginError, Runtime, Sandbox
from lab.world import Lab
from tests.agent.traffic import Flow, observed, steady

KILLS = int(os.environ.get("PODWALL_TEST_KILLS", "10"))
CHURNERS = 4  # a node
TRIES = 50
OWN_TABLES = {"inet podwall", "arp podwall", "inet podwall_services"}  # the last by a commit of its own
POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: default, uid: uid-{name}, labels: {{app: {app}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, ports: [{{containerPort: 8080}}]}}]}}
"""
POLICIES = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends, namespace: default}
spec:
  podSelector: {matchLabels: {app: friend}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: friend}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: churn, namespace: default}
spec:
  podSelector: {matchLabels: {app: churn}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}], ports: [{port: 8080}]}]
"""
STAY = {"here": "node1", "beside": "node1", "far": "node2", "stranger": "node1"}
PAIRS = [("here", "beside"), ("here", "far"), ("far", "beside")]
DENIED = [("stranger", "beside"), ("stranger", "far")]
LINK = re.compile(r"podwall[0-9a-f]{8}")
SHAPER = re.compile(r"podwalli[0-9a-f]{7}")


def pod(name: str, node: str, app: str) -> dict[str, Any]:
    return manifests.parse(POD.format(name=name, node=node, app=app), "test")[0]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes with Pods that stay; addresses rest shortly, so that churn uses them again."""
    given = [pod(name, node, "other" if name == "stranger" else "friend") for name, node in STAY.items()]
    given += manifests.parse(POLICIES, "test")
    with Lab(nodes=2, flags={"address-rest-s": "0.5"}, given=given) as made:
        yield made


def process(agent: Agent, program: str = "agent.main") -> int:
    """The id of the agent's process, or of its worker's."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            inside = netns.identity(entry / "ns/net") == netns.identity(netns.path(agent.node.netns))
            if inside and program.encode() in (entry / "cmdline").read_bytes():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    (only,) = (pid for pid, parent in parents.items() if parent not in parents)  # a child before its exec
    return only


def signal_and_wait(pid: int, number: signal.Signals) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
        assert select.select([pidfd], [], [], 10)[0], f"process {pid} goes on after {number.name}"
    finally:
        os.close(pidfd)


def kill(agent: Agent) -> None:
    """End the agent alone, as the kernel's out-of-memory killer would, and start another."""
    signal_and_wait(process(agent), signal.SIGKILL)
    agent.start()


# Pods that come and go


@dataclass
class Churner:
    """Starts and stops one Pod after the other until it is told to pause; `box` is the one there is."""

    runtime: Runtime
    cluster: ObjectDirectory
    number: int
    chance: random.Random
    running: threading.Event
    box: Sandbox | None = None
    started: int = 0
    refused: list[str] = field(default_factory=list)
    idle: threading.Event = field(default_factory=threading.Event)
    over: bool = False

    def run(self) -> None:
        while not self.over:
            if not self.running.is_set():
                self.idle.set()
                self.running.wait()
                self.idle.clear()
            elif self.box is None:
                self._start()
            else:
                self.stop(self.box)

    def _start(self) -> None:
        name = f"churn-{self.runtime.node.name}-{self.number}"
        self.cluster.write(pod(name, self.runtime.node.name, "churn"))
        box = Sandbox(secrets.token_hex(32), f"{LAB}-{name}", "default", name, f"uid-{name}")
        netns.create(box.netns)
        try:
            self.box = dataclasses.replace(box, result=self.runtime.call("ADD", box))
            self.started += 1
        except PluginError as error:  # kubelet tries again with a new sandbox
            self.refused.append(str(error))
            self.stop(box)

    def stop(self, box: Sandbox) -> None:
        if self.chance.random() < 0.2:  # the runtime lost the namespace before it called DEL
            netns.remove(box.netns)
        self.runtime.call("DEL", box)
        netns.remove(box.netns)
        self.box = None


class Churn:
    """All churners; `paused` is the time to look at things."""

    def __init__(self, lab: Lab, chance: random.Random) -> None:
        self._go = threading.Event()
        self.churners = [
            Churner(runtime, lab._cluster, number, random.Random(chance.random()), self._go)
            for runtime in lab.runtimes.values()
            for number in range(CHURNERS)
        ]
        self._threads = [threading.Thread(target=each.run) for each in self.churners]
        for thread in self._threads:
            thread.start()
        self.wait_until_idle()

    def go(self) -> None:
        for each in self.churners:
            each.idle.clear()
        self._go.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._go.clear()
        self.wait_until_idle()
        yield
        self.go()

    def wait_until_idle(self) -> None:
        for each in self.churners:
            assert each.idle.wait(30), f"Pod {each.number} of {each.runtime.node.name} hangs"

    def end(self) -> None:
        for each in self.churners:
            each.over = True
        self.go()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for each in self.churners:
            if each.box:
                each.stop(each.box)

    def boxes(self, node: str) -> list[Sandbox]:
        return [each.box for each in self.churners if each.box and each.runtime.node.name == node]


# What there is, as ledger and kernel tell it: addresses by link

Held = dict[str, frozenset[str]]


def run(lab: Lab, node: str, *command: str) -> str:
    done = lab.run(node, command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def listing(lab: Lab, node: str, *arguments: str) -> list[dict[str, Any]]:
    return json.loads(run(lab, node, "ip", "-j", *arguments) or "[]")


def gathered(pairs: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> Held:
    found: dict[str, set[str]] = {}
    for link, address in pairs:
        if LINK.fullmatch(link):
            found.setdefault(link, set()).add(str(ip_address(address)))
    return {link: frozenset(addresses) for link, addresses in found.items()}


def links(lab: Lab, node: str) -> set[str]:
    """Devices of podwall but those of the tunnel and those that a test's node always has."""
    names = {line["ifname"] for line in listing(lab, node, "link")}
    return {name for name in names if LINK.fullmatch(name) or SHAPER.fullmatch(name)}


def routes(lab: Lab, node: str) -> Held:
    lines = itertools.chain.from_iterable(
        listing(lab, node, family, "route", "show", "table", "all") for family in ("-4", "-6")
    )
    return gathered(
        [
            (line["dev"], line["dst"])
            for line in lines
            if "dev" in line
            and line["dst"] != "default"
            and line.get("protocol") != "kernel"
            and "/" not in line["dst"]
        ]
    )


def neighbours(lab: Lab, node: str) -> Held:
    lines = listing(lab, node, "neighbour", "show", "nud", "permanent")
    return gathered([(line["dev"], line["dst"]) for line in lines])


def elements(lab: Lab, node: str) -> Held:
    found = []
    for name in ("pod_links4", "pod_links6"):
        said = json.loads(run(lab, node, "nft", "-j", "list", "set", "inet", "podwall", name))
        (shown,) = (each["set"] for each in said["nftables"] if "set" in each)
        for element in shown.get("elem", ()):
            value = element.get("elem", {}).get("val", element) if "elem" in element else element
            found.append(tuple(value["concat"]))
    return gathered(found)


def spoken_of(lab: Lab, node: str) -> set[str]:
    """The Pods' addresses in all elements of podwall's tables."""
    said = json.loads(run(lab, node, "nft", "-j", "list", "ruleset"))["nftables"]
    words = re.findall(
        r'"([0-9a-f.:]+)"', json.dumps([item for item in said if {"set", "map"} & item.keys()])
    )
    found = set()
    for word in words:
        with contextlib.suppress(ValueError):
            found.add(ip_address(word))
    return {
        str(each)
        for each in found
        if any(each in cidr for cidr in CLUSTER_CIDRS if cidr.version == each.version)
    }


def ledger(agent: Agent, state: str) -> Held:
    path = agent.state_dir / "ledger.sqlite3"
    query = """SELECT link, address FROM attachments JOIN addresses ON addresses.attachment = attachments.id
               WHERE state = ?"""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return gathered(connection.execute(query, (state,)).fetchall())


def rules(lab: Lab, node: str) -> list[dict[str, Any]]:
    """The node's tables without what comes and goes; rules in their order, all else in any."""
    found = []
    for item in json.loads(run(lab, node, "nft", "-j", "-s", "list", "ruleset"))["nftables"]:
        for kind, content in item.items():
            kept = {name: value for name, value in content.items() if name not in ("handle", "elem")}
            found.append({"kind": kind, **kept})
    order = ("kind", "family", "table", "chain", "name")
    return sorted(found, key=lambda item: [str(item.get(name, "")) for name in order])


def networks(lab: Lab) -> set[str]:
    """What stands for a range in a set: its first address."""
    return {str(cidr.network_address) for node in lab.nodes for cidr in node.pod_cidrs}


def friends(lab: Lab) -> set[str]:
    """Those that the policies name as peers, wherever they are."""
    pods = [lab.pod(name) for name in STAY if name != "stranger"]
    return {str(address) for pod in pods for address in pod.addresses}


def verify(lab: Lab, node: str, boxes: list[Sandbox]) -> None:
    """Ledger, kernel and the answers that the runtime got say the same."""
    agent = lab.agents[node]
    stay = [box for box in agent.runtime.sandboxes() if box.pod in STAY]
    answered = {box.host_link: frozenset(map(str, box.addresses)) for box in [*boxes, *stay]}
    until(  # DEL answers before the link is gone
        lambda: links(lab, node) == set(answered) and set(ledger(agent, "attached")) == set(answered),
        5,
        lambda: f"{node}: {links(lab, node)} or {ledger(agent, 'attached')} is not {answered}",
    )
    assert ledger(agent, "reserved") == {}
    for told in (ledger(agent, "attached"), routes(lab, node), neighbours(lab, node), elements(lab, node)):
        assert told == answered
    addresses = [address for held in answered.values() for address in held]
    assert len(addresses) == len(set(addresses)) == 2 * len(answered)
    assert spoken_of(lab, node) - networks(lab) == set(addresses) | friends(lab)
    for box in [*boxes, *stay]:
        agent.runtime.call("CHECK", box)


# The tests


@pytest.mark.parametrize("seed", [int(os.environ.get("PODWALL_TEST_SEED", "3"))])
def test_killed_at_any_moment(lab: Lab, seed: int) -> None:
    chance = random.Random(seed)
    before = {node: rules(lab, node) for node in lab.agents}
    churn = Churn(lab, chance)
    adopted = kills = 0
    try:
        with steady(lab, PAIRS, DENIED):
            churn.go()
            while kills < KILLS:
                agent = chance.choice(list(lab.agents.values()))
                for _ in range(chance.choice((1, 1, 2, 3))):
                    time.sleep(chance.random() * 0.4)  # the moment; also one of the new agent's own start
                    kill(agent)
                    kills += 1
                agents.wait_until_ready([agent])
                with churn.paused():
                    for node in lab.agents:
                        verify(lab, node, churn.boxes(node))
                        adopted += len(churn.boxes(node))
    finally:
        churn.end()
    for node in lab.agents:
        verify(lab, node, [])
        assert rules(lab, node) == before[node]
    started = sum(each.started for each in churn.churners)
    refused = [text for each in churn.churners for text in each.refused]
    print(
        f"{kills} kills, {started} Pods started, {adopted} found after a kill, refused: {refused or 'none'}"
    )
    assert adopted, "no Pod ever lived through a kill: the test shows nothing"


def test_ended_by_sigterm_and_started_again(lab: Lab) -> None:
    churn = Churn(lab, random.Random(1))
    try:
        with steady(lab, PAIRS, DENIED):
            for agent in lab.agents.values():
                churn.go()
                time.sleep(0.2)
                signal_and_wait(process(agent), signal.SIGTERM)
                assert "event=stopped" in agent.last_lines()
                assert not agent.socket.exists()
                agent.start()
                agents.wait_until_ready([agent])
                with churn.paused():
                    for node in lab.agents:
                        verify(lab, node, churn.boxes(node))
    finally:
        churn.end()


def tables_of(lab: Lab, node: str) -> set[str]:
    return {line.split(" ", 1)[1] for line in run(lab, node, "nft", "list", "tables").splitlines()}


def test_flushed_rules_are_back_within_a_second(lab: Lab) -> None:
    tables = rules(lab, "node1"), elements(lab, "node1")
    flows: list[Flow] = []
    with observed(lab, PAIRS, DENIED, flows):
        for _ in range(3):
            run(lab, "node1", "nft", "flush", "ruleset")
            begun = time.monotonic()
            until(lambda: "inet podwall" in tables_of(lab, "node1"), 5, lambda: "no tables")
            print(f"the rules were back after {(time.monotonic() - begun) * 1e3:.0f} ms")
            until(lambda: tables_of(lab, "node1") >= OWN_TABLES, 5, lambda: "not all tables")
            assert time.monotonic() - begun < 1
            assert (rules(lab, "node1"), elements(lab, "node1")) == tables
    assert [flow for flow in flows if flow.back != flow.sent] == [
        flow for flow in flows if flow.name.startswith("denied")
    ]
    with steady(lab, PAIRS, DENIED):
        time.sleep(0.2)
    assert lab.connect("here", lab.pod("far").address(4), 8080) == "connected"
    assert lab.connect("far", lab.pod("here").address(6), 8080) == "connected"


@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_that_began_without_rules_ends_with_them(lab: Lab, version: int) -> None:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with (
        lab.socket("beside", family, socket.SOCK_DGRAM) as sink,
        lab.socket("stranger", family, socket.SOCK_DGRAM) as sender,
    ):
        sink.bind((str(lab.pod("beside").address(version)), 0))
        sink.setblocking(False)
        sender.connect(sink.getsockname())
        for _ in range(TRIES):  # the rules may be back before the first datagram is there
            run(lab, "node1", "nft", "flush", "ruleset")
            begun = time.monotonic()
            if arrives(sender, sink):
                break
        else:
            pytest.fail(f"nothing arrived in {TRIES} gaps")
        until(lambda: not arrives(sender, sink), 5, lambda: "it goes on")
        print(f"the flow was over after {(time.monotonic() - begun) * 1e3:.0f} ms")
        assert time.monotonic() - begun < 1
        assert not any(arrives(sender, sink) for _ in range(10))


def arrives(sender: socket.socket, sink: socket.socket) -> bool:
    sender.send(b"denied")
    if not select.select([sink], [], [], 0.02)[0]:
        return False
    sink.recv(100)
    return True


def test_a_killed_worker_is_replaced(lab: Lab) -> None:
    """The process that holds libnftables may crash on a ruleset of another program."""
    churn = Churn(lab, random.Random(1))
    agent = lab.agents["node1"]
    try:
        with steady(lab, PAIRS, DENIED):
            for _ in range(3):
                churn.go()
                time.sleep(0.1)
                signal_and_wait(process(agent, "nft/worker.py"), signal.SIGKILL)
                with churn.paused():
                    verify(lab, "node1", churn.boxes("node1"))
    finally:
        churn.end()
    assert not [text for each in churn.churners for text in each.refused]
