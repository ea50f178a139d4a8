"""Following packets in a network namespace of the test's own: what is marked, what is heard, what is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import trace
from agent.datapath import Datapath
from agent.nft.trace import Match, Trace, TraceError
from agent.probe import inside_of
from cni.spec import CniError
from lab import netns
from lab.limits import SLOWNESS

NAME = "podwall-tracetest"
LIMIT = 10.0 * SLOWNESS
UDP = 17
V4, V6 = ip_address("127.0.0.1"), ip_address("::1")
DATAPATH = cast(
    "Datapath", SimpleNamespace(policies=SimpleNamespace(policies_of=lambda _: [("shop", "api")]))
)


@pytest.fixture
def place() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = netns.create(NAME)
    yield made
    netns.remove(NAME)


def tables(place: Path) -> str:
    listed = netns.run(place, subprocess.run, ["nft", "list", "ruleset"], capture_output=True, text=True)
    return cast("str", listed.stdout)


def say(place: Path, address: str, port: int, data: bytes = b"x") -> None:
    """One datagram that nobody takes."""

    def send() -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(data, (address, port))

    netns.run(place, send)


@pytest.mark.parametrize("address", [V4, V6], ids=["IPv4", "IPv6"])
def test_exactly_the_asked_flow_is_heard_of(place: Path, address: Any) -> None:
    made = netns.run(place, Trace, "a", [Match(UDP, address, None, address, 4000)])
    try:
        say(place, str(address), 4001)
        assert made.read() == []
        say(place, str(address), 4000)
        first = made.read()[0]
    finally:
        made.close()
    assert first.packet is not None
    assert (first.table, first.chain, first.packet.dport) == ("podwall_trace_a", "output", 4000)
    assert (first.packet.source, first.packet.destination) == (address, address)


def test_other_tables_rules_are_told_with_verdict_and_handle(place: Path) -> None:
    rules = "table inet mine { chain out { type filter hook output priority 0; udp dport 4000 drop; }; }"
    netns.run(place, subprocess.run, ["nft", rules], check=True)
    made = netns.run(place, Trace, "a", [Match(UDP, None, None, V4, 4000)])
    with pytest.raises(PermissionError):
        say(place, "127.0.0.1", 4000)
    last = made.read()[-1]
    made.close()
    assert (last.table, last.chain, last.kind, last.verdict) == ("mine", "out", "rule", "drop")
    assert last.handle > 0


@pytest.mark.parametrize("address", [V4, V6], ids=["IPv4", "IPv6"])
def test_of_a_connection_only_its_beginning_is_heard_of(place: Path, address: Any) -> None:
    """One that is under way already meets other rules than a first packet does."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with (
        netns.run(place, socket.create_server, (str(address), 4000), family=family) as server,
        netns.run(place, socket.create_connection, (str(address), 4000)) as under_way,
    ):
        made = netns.run(place, Trace, "a", [Match(socket.IPPROTO_TCP, None, None, address, 4000)])
        try:
            accepted = server.accept()[0]
            under_way.sendall(b"x")
            assert accepted.recv(1) == b"x"
            accepted.close()
            assert made.read() == []
            netns.run(place, socket.create_connection, (str(address), 4000)).close()
            heard = made.read()
        finally:
            made.close()
    assert [step.chain for step in heard if step.packet] == [
        "output",
        "prerouting",
    ]  # it goes out and comes in


def test_it_ends_by_itself_after_some_packets(place: Path) -> None:
    made = netns.run(place, Trace, "a", [Match(UDP, None, None, V4, 4000)])
    for _ in range(50):
        say(place, "127.0.0.1", 4000, bytes(1000))
    heard = {step.id for step in made.read() if step.packet and step.chain == "output"}
    say(place, "127.0.0.1", 4000)
    assert made.read() == []
    made.close()
    assert 1 <= len(heard) <= 20


def test_nothing_is_left_when_it_is_closed_and_nobody_else_changes_it(place: Path) -> None:
    made = netns.run(place, Trace, "a", [Match(UDP, V4)])
    assert "podwall_trace_a" in tables(place)
    foreign = ["nft", "delete", "table", "inet", "podwall_trace_a"]
    assert netns.run(place, subprocess.run, foreign, capture_output=True).returncode != 0
    made.close()
    assert tables(place) == ""


def test_nothing_is_left_of_a_process_that_was_killed(place: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from ipaddress import ip_address
        from agent.nft.trace import Match, Trace
        made = Trace("a", [Match(17, ip_address("127.0.0.1"))])
        print("made", flush=True)
        time.sleep(300)
        """
    )
    process = netns.run(
        place, subprocess.Popen, [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    assert "podwall_trace_a" in tables(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert tables(place) == ""


def test_two_of_one_name_are_refused_and_the_first_stays(place: Path) -> None:
    made = netns.run(place, Trace, "a", [Match(UDP, V4)])
    with pytest.raises(TraceError, match="cannot trace packets"):
        netns.run(place, Trace, "a", [Match(UDP, V4)])
    assert tables(place).count("podwall_trace_a") == 1
    made.close()


# The calls


def inside(place: Path, body: Callable[[Mapping[str, Any]], Any]) -> None:
    """Run with the calls' answers, in the namespace."""

    def run() -> None:
        calls = trace.answers(DATAPATH, partial(inside_of, attachments=[], pods={}, node="node1"))
        asyncio.run(body(calls))

    netns.run(place, run)


ID = {"id": "0123456789abcdef"}
SENDING = {**ID, "from": {}, "destination": "127.0.0.1", "port": 4000, "protocol": "TCP"}


def test_a_connection_is_sent_and_told_and_forgotten(place: Path) -> None:
    async def ask(calls: Mapping[str, Any]) -> None:
        opened = await calls["trace.open"](SENDING)
        assert opened["source"] == "127.0.0.1"
        assert (await calls["trace.send"](ID))["verdict"] == "refused"
        told = await calls["trace.read"](ID)
        packet = told["steps"][0]["packet"]
        assert (packet["sport"], packet["dport"]) == (opened["sport"], 4000)
        assert not told["lost"]
        await calls["trace.close"](ID)
        with pytest.raises(CniError, match="has ended"):
            await calls["trace.read"](ID)

    inside(place, ask)
    assert tables(place) == ""


def test_it_is_closed_by_a_client_that_went_away_before_the_answer(place: Path) -> None:
    async def ask(calls: Mapping[str, Any]) -> None:
        opening = asyncio.create_task(calls["trace.open"](SENDING))
        await asyncio.sleep(0)
        await calls["trace.close"](ID)
        assert opening.done()
        await opening
        with pytest.raises(CniError, match="has ended"):
            await calls["trace.read"](ID)

    inside(place, ask)
    assert tables(place) == ""


def test_a_client_that_is_gone_is_forgotten(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "EXPIRES_S", 0.2)

    async def ask(calls: Mapping[str, Any]) -> None:
        await calls["trace.open"](SENDING)
        assert "podwall_trace_" in await asyncio.to_thread(tables, place)
        until = time.monotonic() + LIMIT
        while await asyncio.to_thread(tables, place):
            assert time.monotonic() < until
            await asyncio.sleep(0.02)

    inside(place, ask)


def test_few_at_once(place: Path) -> None:
    async def ask(calls: Mapping[str, Any]) -> None:
        named = [{"id": f"{number:016x}"} for number in range(trace.MOST_SESSIONS)]
        for each in named:
            await calls["trace.open"]({**SENDING, **each})
        with pytest.raises(CniError, match="ask again"):
            await calls["trace.open"](SENDING)
        for each in named:
            await calls["trace.close"](each)

    inside(place, ask)
    assert tables(place) == ""


BAD = {
    "no address": {**SENDING, "destination": "web"},
    "no port": {**ID, "from": {}, "destination": "127.0.0.1", "protocol": "TCP"},
    "no protocol with ports": {**SENDING, "protocol": "ICMP"},
    "an unknown protocol": {**ID, "matches": [{"protocol": "EGP", "source": "127.0.0.1"}]},
    "no name": {**SENDING, "id": "../x"},
    "no list": {**ID, "matches": "all"},
    "a place that is none": {**SENDING, "from": "web"},
    "a Pod that is elsewhere": {**SENDING, "from": {"namespace": "shop", "name": "web"}},
}


@pytest.mark.parametrize("case", BAD)
def test_a_question_that_cannot_be_answered_leaves_nothing(place: Path, case: str) -> None:
    async def ask(calls: Mapping[str, Any]) -> None:
        with pytest.raises(CniError):
            await calls["trace.open"](BAD[case])

    inside(place, ask)
    assert tables(place) == ""
