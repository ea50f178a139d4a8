"""Connections tried from inside of namespaces, on the real kernel: what is seen, and that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from agent import probe
from agent.cluster.model import Pod
from agent.pods.model import Attachment
from agent.probe import Inside, Question, Target, inside_of
from cni.spec import CniError
from lab import netns, processes
from lab.probe import has_sctp

PREFIX = "podwall-probetest-"
MAC = "02:00:00:00:00:01"
QUIET_S = 0.6


def ip(where: str, *words: str) -> None:
    subprocess.run(["ip", "-n", where, *words], check=True, timeout=10)


def listening(family: int, kind: int, port: int, number: int = 0) -> socket.socket:
    made = socket.socket(family, kind, number)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(("", port))
    if kind == socket.SOCK_STREAM:
        made.listen(512)
    return made


@pytest.fixture(scope="module")
def pod() -> Iterator[Inside]:
    """A Pod at 10.9.0.1 and fd09::1, and a neighbour at .2 that listens on 80 and drops what goes to 81."""
    here, there = PREFIX + "pod", PREFIX + "neighbour"
    opened: list[socket.socket] = []
    try:
        for name in (here, there):
            netns.create(name)
        ip(here, "link", "add", "eth0", "address", MAC, "type", "veth", "peer", "eth0", "netns", there)
        for name, last in ((here, "1"), (there, "2")):
            ip(name, "address", "add", f"10.9.0.{last}/24", "dev", "eth0")
            ip(name, "address", "add", f"fd09::{last}/64", "dev", "eth0", "nodad")
            ip(name, "link", "set", "eth0", "up")
        drop = "table inet t { chain c { type filter hook input priority 0; th dport 81 drop; }; }"
        subprocess.run(["ip", "netns", "exec", there, "nft", drop], check=True, timeout=10)
        for family in (socket.AF_INET, socket.AF_INET6):
            opened.append(netns.run(netns.path(there), listening, family, socket.SOCK_STREAM, 80))
            opened.append(netns.run(netns.path(there), listening, family, socket.SOCK_DGRAM, 80))
            if has_sctp():
                opened.append(
                    netns.run(
                        netns.path(there), listening, family, socket.SOCK_STREAM, 80, socket.IPPROTO_SCTP
                    )
                )
        inside = Inside(netns.path(here), "eth0", MAC)
        # the kernel joins the groups of neighbour discovery in the background
        processes.until(
            lambda: tried(inside, ("fd09::2", 80, "TCP")) == [("connected", "")],
            10,
            lambda: "the neighbour is not found",
        )
        yield inside
    finally:
        for each in opened:
            each.close()
        for name in (here, there):
            netns.remove(name)


@pytest.fixture
def echo(pod: Inside) -> Iterator[None]:
    """The neighbour answers datagrams at port 82 and name servers' status requests at port 53."""
    sockets = [
        netns.run(netns.path(PREFIX + "neighbour"), listening, socket.AF_INET, socket.SOCK_DGRAM, port)
        for port in (82, 53)
    ]

    def answer(of: socket.socket) -> None:
        data, client = of.recvfrom(512)
        if of.getsockname()[1] != 53 or data[2] >> 3 == 2:
            of.sendto(data, client)

    threads = [threading.Thread(target=answer, args=(each,)) for each in sockets]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(5)
    for each in sockets:
        each.close()


def tried(inside: Inside | str | None, *targets: tuple[str, int, str]) -> list[tuple[str, str]]:
    asked = tuple(Target(ip_address(address), port, protocol) for address, port, protocol in targets)
    (outcomes,) = probe.run([Question(inside, asked)], QUIET_S)
    return [(of.verdict, of.words) for of in outcomes]


CASES = [
    (("10.9.0.2", 80, "TCP"), "connected"),
    (("fd09::2", 80, "TCP"), "connected"),
    (("10.9.0.2", 79, "TCP"), "refused"),
    (("fd09::2", 79, "TCP"), "refused"),
    (("10.9.0.2", 81, "TCP"), "silent"),
    (("fd09::2", 81, "TCP"), "silent"),
    (("192.0.2.1", 80, "TCP"), "unreachable"),
    (("2001:db8::1", 80, "TCP"), "unreachable"),
    (("10.9.0.2", 79, "UDP"), "refused"),
    (("fd09::2", 79, "UDP"), "refused"),
    (("10.9.0.2", 80, "UDP"), "silent"),
    (("10.9.0.2", 81, "UDP"), "silent"),
    (("192.0.2.1", 53, "UDP"), "unreachable"),
]


def test_what_is_seen(pod: Inside) -> None:
    outcomes = tried(pod, *(target for target, _ in CASES))
    assert [(target, verdict) for (target, _), (verdict, _) in zip(CASES, outcomes, strict=True)] == CASES


def test_datagrams_that_are_answered(pod: Inside, echo: None) -> None:
    outcomes = tried(pod, ("10.9.0.2", 82, "UDP"), ("10.9.0.2", 53, "UDP"))
    assert [verdict for verdict, _ in outcomes] == ["connected", "connected"]


def test_sctp(pod: Inside) -> None:
    targets = [("10.9.0.2", 80, "SCTP"), ("fd09::2", 80, "SCTP"), ("10.9.0.2", 79, "SCTP")]
    outcomes = tried(pod, *targets)
    if has_sctp():
        assert [verdict for verdict, _ in outcomes] == ["connected", "connected", "refused"]
    else:
        assert outcomes == [("failed", "no SCTP socket can be made: Protocol not supported")] * 3


def test_from_the_node_itself() -> None:
    with listening(socket.AF_INET, socket.SOCK_STREAM, 0) as made:
        port = made.getsockname()[1]
        assert tried(None, ("127.0.0.1", port, "TCP")) == [("connected", "")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": Path("/run/netns/podwall-nowhere")}, "mountPropagation: HostToContainer"),
        ({"path": Path("/proc/self/status")}, "cannot enter the network namespace: Invalid argument"),
        ({"mac": "02:00:00:00:00:99"}, "is not the Pod's network namespace any more"),
        ({"path": Path("/proc/self/ns/net")}, "is not the Pod's network namespace any more"),
    ],
)
def test_a_namespace_that_is_not_the_pods(pod: Inside, change: dict[str, Any], said: str) -> None:
    ((verdict, words),) = tried(pod._replace(**change), ("10.9.0.2", 80, "TCP"))
    assert verdict == "failed"
    assert said in words


def test_why_a_place_is_not_known() -> None:
    assert tried("nobody knows", ("10.9.0.2", 80, "TCP")) == [("failed", "nobody knows")]


def test_nothing_is_left_behind(pod: Inside) -> None:
    """No descriptor, no thread, and none in another namespace; also when there are few descriptors."""
    before = left()
    targets = [target for target, _ in CASES] * 8
    tried(pod, *targets)
    tried(pod._replace(mac="02:00:00:00:00:99"), *targets)
    tried(pod._replace(path=Path("/run/netns/podwall-nowhere")), *targets)
    # a thread that was joined may be listed for a moment more, also one of an earlier test
    processes.until(
        lambda: left()[0] <= before[0] and left()[1].items() <= before[1].items(),
        5,
        lambda: f"{left()} is left, not {before}",
    )


def left() -> tuple[int, dict[str, str]]:
    """How many descriptors, and the namespace of each thread."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    where: dict[str, str] = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            where[task.name] = str((task / "ns/net").readlink())
    return descriptors, where


def test_in_turns_where_descriptors_are_few(pod: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.resource, "getrlimit", lambda _: (probe._SPARE_DESCRIPTORS + 3, 0))
    targets = [("10.9.0.2", 80, "TCP"), ("10.9.0.2", 79, "TCP")] * 5
    assert [verdict for verdict, _ in tried(pod, *targets)] == ["connected", "refused"] * 5


def test_what_there_was_no_time_for_was_not_tried(pod: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WHOLE_S", 0.0)
    ((verdict, words),) = tried(pod, ("10.9.0.2", 80, "TCP"))
    assert (verdict, words) == ("failed", "no time was left for it: the agent has few descriptors")


# The call


def attachment(inside: Inside, **changes: Any) -> Attachment:
    said = {
        "container_id": "c", "ifname": inside.ifname, "link": "podwall00000000", "namespace": "shop",
        "pod": "web", "pod_uid": "", "addresses": (), "mac": inside.mac, "host_mac": "", "mtu": 1500,
        "netns": str(inside.path),
    }  # fmt: skip
    return Attachment(**{**said, **changes})


NODE_POD = Pod("shop", "agent", node="node-1", host_network=True, phase="Running")


def call_of(inside: Inside, pods: Mapping[tuple[str, str], Pod]) -> Callable[[probe.Body], Awaitable[object]]:
    attachments = [attachment(inside)]
    return probe.answers(partial(inside_of, attachments=attachments, pods=pods, node="node-1"))["probe"]


def asked(inside: Inside, *names: str, target: tuple[str, int] = ("10.9.0.2", 80), **body: Any) -> Any:
    """The answer of a node with the Pods shop/web and shop/agent."""
    pods = [{"namespace": "shop", "name": name, "targets": [[*target, "TCP"]]} for name in names]
    call = call_of(inside, {NODE_POD.key: NODE_POD})
    return asyncio.run(call({"pods": pods, "quiet_s": QUIET_S, **body}))  # type: ignore[arg-type]


def test_the_call_answers_for_each_pod(pod: Inside) -> None:
    web, nobody = asked(pod, "web", "nobody")["pods"]
    assert web == [["connected", ""]]
    assert nobody == [["failed", "Pod shop/nobody is not on the network of node-1"]]


def test_a_pod_of_the_nodes_own_network_asks_from_there(pod: Inside) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = server.getsockname()
        assert asked(pod, "agent", target=there)["pods"] == [[["connected", ""]]]


def test_a_path_of_var_run_is_one_of_run(pod: Inside) -> None:
    moved = pod._replace(path=Path("/var/run") / pod.path.relative_to("/run"))
    assert asked(moved, "web")["pods"] == [[["connected", ""]]]


@pytest.mark.parametrize(
    "body",
    [
        {"pods": None},
        {"pods": [{"namespace": "shop"}]},
        {"pods": [{"namespace": "shop", "name": "web", "targets": [["10.9.0.2", 0, "TCP"]]}]},
        {"pods": [{"namespace": "shop", "name": "web", "targets": [["10.9.0.2", True, "TCP"]]}]},
        {"pods": [{"namespace": "shop", "name": "web", "targets": [["10.9.0.2", 80, "ICMP"]]}]},
        {"pods": [{"namespace": "shop", "name": "web", "targets": [["nowhere", 80, "TCP"]]}]},
        {"pods": [], "quiet_s": "long"},
        {"pods": [{"namespace": "a", "name": "b", "targets": [["10.9.0.2", 80, "TCP"]] * 2001}]},
    ],
)
def test_what_is_no_question_is_refused(pod: Inside, body: dict[str, Any]) -> None:
    with pytest.raises(CniError):
        asked(pod, **body)


def test_the_agent_goes_on_while_nobody_answers(pod: Inside) -> None:
    """The event loop is never held up, and questions take turns."""

    async def both() -> float:
        call = call_of(pod, {})
        body = {
            "pods": [{"namespace": "shop", "name": "web", "targets": [["10.9.0.2", 81, "TCP"]] * 300}],
            "quiet_s": QUIET_S,
        }
        asks = [asyncio.create_task(call(body)) for _ in range(2)]  # type: ignore[arg-type]
        longest, last = 0.0, time.monotonic()
        while not all(task.done() for task in asks):
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        for task in asks:
            assert (await task) == {"pods": [[["silent", ""]] * 300]}
        return longest

    assert asyncio.run(both()) < QUIET_S / 2
