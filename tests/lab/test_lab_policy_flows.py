"""Flows that a change denies end within a second, TCP and UDP; a hundred others lose nothing.

live/keep-1, live/keep-2 --100 TCP streams, UDP-->  live/server-1 (node1), live/server-2 (node2)
live/cut, away/cut       --TCP streams, UDP----->   the same, until a change denies one of them
"""

from __future__ import annotations

import itertools
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from agent.cli.ask import ask
from lab.limits import SLOWNESS
from lab.objects import Object, key_of
from lab.processes import until
from lab.world import Lab
from tests.lab.policies import expected_matrix, namespace, pod, policy

PORT = 8080
SERVERS = ("live/server-1", "live/server-2")
KEEPERS = ("live/keep-1", "live/keep-2")
CUT = ("live/cut", "away/cut")
STREAMS_EACH = 12
"""Streams of each keeper to each server in each family; with those of who is not cut, more than a hundred."""

LINE_MS = 50
LIMIT = 1.0 * SLOWNESS
STEPS = 4
"""How often a change waits for a processor on its way: files, rules, kernel, flows."""

_TCP_INFO_SPACE = 228
_RETRANSMITTED, _OUT_OF_ORDER = 100, 224  # tcpi_total_retrans, tcpi_rcv_ooopack (linux/tcp.h)

ROLE = {"key": "role", "operator": "In", "values": ["cut", "keep"]}
SERVER = {"matchLabels": {"app": "server"}}


def base() -> list[Object]:
    return [
        namespace("live"),
        namespace("away", team="friends"),
        pod("live/server-1", PORT, node="node1", labels={"app": "server"}),
        pod("live/server-2", PORT, node="node2", labels={"app": "server"}),
        pod("live/keep-1", node="node1", labels={"role": "keep"}),
        pod("live/keep-2", node="node2", labels={"role": "keep"}),
        pod("live/cut", node="node1", labels={"role": "cut"}),
        pod("away/cut", node="node2", labels={"role": "guest"}),
        policy(
            "live/near",
            podSelector=SERVER,
            ingress=[{"from": [{"podSelector": {"matchExpressions": [ROLE]}}]}],
        ),
        policy(
            "live/away",
            podSelector=SERVER,
            ingress=[{"from": [{"namespaceSelector": {"matchLabels": {"team": "friends"}}}]}],
        ),
    ]


def having(objects: Sequence[Object], *changed: Object) -> list[Object]:
    """The objects with some in place of those of their names."""
    return list({key_of(each): each for each in (*objects, *changed)}.values())


@dataclass(frozen=True)
class Change:
    """What is applied, and whose flows it denies."""

    cuts: str
    objects: Callable[[list[Object]], list[Object]]


def _narrowed(objects: list[Object]) -> list[Object]:
    keep = {"podSelector": {"matchLabels": {"role": "keep"}}}
    return having(objects, policy("live/near", podSelector=SERVER, ingress=[{"from": [keep]}]))


def _one_port_less(objects: list[Object]) -> list[Object]:
    rule = {
        "from": [{"namespaceSelector": {"matchLabels": {"team": "friends"}}}],
        "ports": [{"port": PORT + 1}],
    }
    return having(objects, policy("live/away", podSelector=SERVER, ingress=[rule]))


def _relabelled(objects: list[Object]) -> list[Object]:
    return having(objects, pod("live/cut", node="node1", labels={"role": "other"}))


def _no_egress(objects: list[Object]) -> list[Object]:
    selector = {"matchLabels": {"role": "cut"}}
    return having(objects, policy("live/jail", podSelector=selector, policyTypes=["Egress"]))


def _without_policy(objects: list[Object]) -> list[Object]:
    return [each for each in objects if (each["kind"], each["metadata"]["name"]) != ("NetworkPolicy", "away")]


def _other_team(objects: list[Object]) -> list[Object]:
    return having(objects, namespace("away", team="x"))


def _without_namespace(objects: list[Object]) -> list[Object]:
    kept = [each for each in objects if each["metadata"].get("namespace") != "away"]
    return [each for each in kept if (each["kind"], each["metadata"]["name"]) != ("Namespace", "away")]


CHANGES = {
    "a policy is narrowed": Change("live/cut", _narrowed),
    "a policy allows another port": Change("away/cut", _one_port_less),
    "a policy is deleted": Change("away/cut", _without_policy),
    "a Pod's label changes": Change("live/cut", _relabelled),
    "a namespace's label changes": Change("away/cut", _other_team),
    "the client is isolated": Change("live/cut", _no_egress),
    "a namespace is deleted": Change("away/cut", _without_namespace),
}


@dataclass
class Flow:
    """A stream of counted lines, or datagrams that are answered; when something came last."""

    source: str
    sock: socket.socket
    kind: int
    lines: int = 0
    last: float = 0.0
    rest: bytes = b""
    wrong: list[str] = field(default_factory=list)

    def read(self) -> None:
        try:
            data = self.sock.recv(65536)
        except OSError as error:
            self.wrong.append(str(error))
            return
        if self.kind == socket.SOCK_DGRAM:
            self.lines += 1
        else:
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                if int(line.split()[1]) != self.lines:
                    self.wrong.append(f"line {line!r} in place of {self.lines}")
                self.lines += 1
            if not data:
                self.wrong.append("closed")
        self.last = time.monotonic()

    def losses(self) -> list[str]:
        """What this flow lost; segments that came out of order show that one before them was lost."""
        if self.kind == socket.SOCK_STREAM:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SPACE)
            for offset, what in ((_RETRANSMITTED, "retransmitted"), (_OUT_OF_ORDER, "out of order")):
                (count,) = struct.unpack_from("I", info, offset)
                if count:
                    self.wrong.append(f"{count} {what}")
        return [f"{self.source} {self.sock.type.name}: {what}" for what in self.wrong]


class Flows:
    """All flows, read by one thread, which also sends the datagrams."""

    def __init__(self, lab: Lab) -> None:
        self.flows: list[Flow] = []
        self.late = 0.0  # the longest that this thread itself had to wait
        self._stop = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="podwall-flows")
        for source, server, version in itertools.product((*KEEPERS, *CUT), SERVERS, (4, 6)):
            address = (str(lab.pod(server).address(version)), PORT)
            for _ in range(STREAMS_EACH if source in KEEPERS else 1):
                self._open(lab, source, address, socket.SOCK_STREAM)
            self._open(lab, source, address, socket.SOCK_DGRAM)

    def _open(self, lab: Lab, source: str, address: tuple[str, int], kind: int) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = lab.socket(source, family, kind)
        sock.settimeout(5 * SLOWNESS)
        sock.connect(address)
        if kind == socket.SOCK_STREAM:
            sock.sendall(f"stream {LINE_MS}\n".encode())
        flow = Flow(source, sock, kind)
        self.flows.append(flow)
        self._selector.register(sock, selectors.EVENT_READ, flow)

    def __enter__(self) -> Flows:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._selector.close()
        for flow in self.flows:
            flow.sock.close()

    def _run(self) -> None:
        sent = time.monotonic()
        while not self._stop.is_set():
            if (waited := time.monotonic() - sent) > LINE_MS / 1000:
                self.late = max(self.late, waited - 2 * LINE_MS / 1000)
                sent += waited
                self._ask()
            for key, _ in self._selector.select(LINE_MS / 1000):
                key.data.read()
                if key.data.wrong:
                    self._selector.unregister(key.fileobj)

    def _ask(self) -> None:
        for flow in self.flows:
            if flow.kind == socket.SOCK_DGRAM:
                try:
                    flow.sock.send(b"name")
                except OSError as error:
                    flow.wrong.append(str(error))

    def of(self, source: str) -> list[Flow]:
        return [flow for flow in self.flows if flow.source == source]

    def others(self, source: str) -> list[Flow]:
        return [flow for flow in self.flows if flow.source != source]

    def go_on(self, flows: Sequence[Flow], lines: int) -> None:
        """Return when each has got so many lines more."""
        before = [flow.lines for flow in flows]
        until(
            lambda: all(flow.lines >= count + lines for flow, count in zip(flows, before, strict=True)),
            15,
            lambda: f"do not go on: {_late(flows, [count + lines for count in before])}",
        )


def _late(flows: Sequence[Flow], wanted: Sequence[int]) -> list[str]:
    late = [flow for flow, count in zip(flows, wanted, strict=True) if flow.lines < count]
    return [f"{flow.source} at {flow.lines} {flow.losses()}" for flow in late]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, given=base()) as made:
        yield made


@pytest.mark.parametrize("what", CHANGES)
def test_flows_that_are_denied_end_and_no_others(lab: Lab, what: str) -> None:
    lab.apply(base(), prune=True)
    assert expected_matrix(lab).good
    change = CHANGES[what]
    with Flows(lab) as flows:
        assert len([each for each in flows.others(change.cuts) if each.kind == socket.SOCK_STREAM]) >= 100
        flows.go_on(flows.flows, 3)

        flows.late = 0.0
        began = time.monotonic()
        lab.apply(change.objects(base()), prune=True)
        until(lambda: time.monotonic() > began + LIMIT, LIMIT + 1, lambda: "")
        flows.go_on(flows.others(change.cuts), 10)

        limit = began + LIMIT + STEPS * flows.late
        after = [round(flow.last - began, 2) for flow in flows.of(change.cuts) if flow.last > limit]
        assert after == [], "flows that are denied went on for too long"
        assert [each for flow in flows.others(change.cuts) for each in flow.losses()] == []
        lasted = max(flow.last for flow in flows.of(change.cuts)) - began
        print(f"{what}: the last of a denied flow came after {lasted * 1000:.0f} ms")


def ended(lab: Lab, source: str) -> bool:
    """Whether the servers' own nodes know no live flow that this Pod began."""
    for server in SERVERS:
        found = cast("dict[str, Any]", ask(lab.agents[lab.pod(server).node].socket, "flows", {}))["flows"]
        ends = [(each["source"]["pod"], each["destination"]["pod"]) for each in found if not each["closed"]]
        if (source, server) in ends:
            return False
    return True


def test_what_ended_cannot_begin_again_in_the_middle(lab: Lab) -> None:
    """Both ends still have the connection: what they send meets no policy that would open it anew."""
    lab.apply(base(), prune=True)
    assert expected_matrix(lab).good
    with Flows(lab) as flows, lab.capture("live/server-2", incoming_only=True) as heard:
        flows.go_on(flows.flows, 3)
        lab.apply(CHANGES["a policy is narrowed"].objects(base()), prune=True)
        own = [address.packed for address in lab.pod("live/cut").addresses]
        cut = flows.of("live/cut")
        denied = [flow for flow in cut if flow.kind == socket.SOCK_STREAM]
        until(lambda: ended(lab, "live/cut"), 5, lambda: "its flows are still known")
        until(lambda: all(time.monotonic() - flow.last > 0.3 for flow in cut), 5, lambda: "still flows")
        seen = len(heard.frames)
        for _ in range(5):
            for flow in denied:
                flow.sock.send(b"more\n")
            flows.go_on(flows.others("live/cut"), 2)
        assert [frame for frame in heard.frames[seen:] if any(each in frame[:54] for each in own)] == []
        silent: list[Any] = [flow.lines for flow in denied]
        flows.go_on(flows.others("live/cut"), 5)
        assert [flow.lines for flow in denied] == silent


def test_a_late_answer_does_not_open_the_flow_again(lab: Lab) -> None:
    """The answer to a datagram of before begins a flow: what was denied does not go on as replies to it."""
    lab.apply(base(), prune=True)
    assert expected_matrix(lab).good
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with (
            lab.socket("live/server-1", family, socket.SOCK_DGRAM) as server,
            lab.socket("live/cut", family, socket.SOCK_DGRAM) as client,
        ):
            server.bind(("", 7000))
            server.settimeout(2 * SLOWNESS)
            client.connect((str(lab.pod("live/server-1").address(version)), 7000))
            client.send(b"before")
            peer = server.recvfrom(100)[1]
            server.sendto(b"answer", peer)
            server.setblocking(False)
            lab.apply(CHANGES["a policy is narrowed"].objects(base()), prune=True)
            until(lambda: not _arrives(client, server), 5, lambda: "the flow does not end")

            server.sendto(b"late answer", peer)

            until(lambda: not _arrives(client, server), 2, lambda: "the flow goes on as replies")
            lab.apply(base(), prune=True)
            until(lambda: _arrives(client, server), 5, lambda: "what is allowed again does not arrive")


def _arrives(client: socket.socket, server: socket.socket) -> bool:
    """Whether any of some datagrams is heard, within 20 ms of the last."""
    for _ in range(3):
        client.send(b"more")
    heard = bool(select.select([server], [], [], 0.02)[0])
    while select.select([server], [], [], 0.02)[0]:
        server.recv(100)
    return heard
