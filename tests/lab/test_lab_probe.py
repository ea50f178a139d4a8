"""Probes against the Pods' server, over a plain veth."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from lab import netns, probe, processes, server
from lab.limits import SLOWNESS
from lab.probe import CONNECTED, REFUSED, SILENT, TCP, UDP, UNREACHABLE, Outcome, Probe

FOUR, SIX = ip_address("10.9.0.2"), ip_address("fd09::2")


class Serving:
    """A server process of the test's own, and its control socket."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "server.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.server", str(self.socket)], env=processes.environment(os.environ)
        )
        processes.until(self.socket.exists, 10, lambda: "the server did not start")

    def ask(self, **request: object) -> dict[str, object]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10 * SLOWNESS)
            connection.connect(str(self.socket))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answers:
                answer: dict[str, object] = json.loads(answers.readline())
                return answer


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    found = Serving(tmp_path)
    yield found
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(10 * SLOWNESS) == 0


def talk(where: Path, *lines: bytes, address: str = "10.9.0.2") -> socket.socket:
    """Connect from a namespace and say something."""
    connection = netns.run(where, socket.socket, socket.AF_INET)
    connection.settimeout(5 * SLOWNESS)
    connection.connect((address, 8080))
    connection.sendall(b"".join(lines))
    return connection


@pytest.mark.parametrize("address", [FOUR, SIX], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_pod_tells_its_name_until_it_is_stopped(
    pair: tuple[Path, Path], serving: Serving, address: probe.Address, protocol: str
) -> None:
    client, pod = pair
    asked = Probe(client, address, 8080, protocol)
    serving.ask(serve="ns/pod", netns=str(pod), ports=[8080])

    assert probe.run([asked]) == [Outcome(CONNECTED, "ns/pod")]

    serving.ask(stop="ns/pod")
    assert probe.run([asked])[0].verdict == REFUSED


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_pod_tells_who_asked(pair: tuple[Path, Path], serving: Serving, protocol: str) -> None:
    client, pod = pair
    serving.ask(serve="ns/pod", netns=str(pod), ports=[8080])

    [outcome] = probe.run([Probe(client, SIX, 8080, protocol, ask=b"peer")])

    assert outcome.answer.split()[0] == "fd09::1"


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(("address", "client"), [(FOUR, "10.9.0.1"), (SIX, "fd09::1")], ids=["IPv4", "IPv6"])
def test_a_pod_tells_all_at_once(
    pair: tuple[Path, Path], serving: Serving, protocol: str, address: probe.Address, client: str
) -> None:
    serving.ask(serve="ns/pod", netns=str(pair[1]), ports=[8080])

    [outcome] = probe.run([Probe(pair[0], address, 8080, protocol, ask=b"all")])
    answer = probe.read_answer(outcome)

    assert answer is not None
    assert (answer.pod, answer.client, answer.reached, answer.reached_port) == (
        "ns/pod",
        ip_address(client),
        address,
        8080,
    )
    assert probe.read_answer(Outcome(REFUSED)) is None


def test_no_answer_is_silence_and_no_way_is_unreachable(pair: tuple[Path, Path]) -> None:
    client, pod = pair
    netns.run(pod, subprocess.run, ["ip", "link", "set", "eth0", "arp", "off"], check=True)
    netns.run(
        client,
        subprocess.run,
        ["ip", "neigh", "add", "10.9.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0"],
        check=True,
    )
    probes = [
        Probe(client, ip_address(address), 8080, protocol)
        for address in ("10.9.0.9", "192.0.2.1")
        for protocol in (TCP, UDP)
    ]

    began = time.monotonic()
    verdicts = [outcome.verdict for outcome in probe.run(probes, quiet=0.5)]

    assert verdicts == [SILENT, SILENT, UNREACHABLE, UNREACHABLE]
    assert time.monotonic() - began < 2


def test_two_thousand_probes_at_once(pair: tuple[Path, Path], serving: Serving) -> None:
    client, pod = pair
    serving.ask(serve="ns/pod", netns=str(pod), ports=[8080])
    probes = [
        Probe(client, address, 8080, protocol) for address in (FOUR, SIX) for protocol in (TCP, UDP)
    ] * 500

    outcomes = probe.run(probes)

    assert set(outcomes) == {Outcome(CONNECTED, "ns/pod")}


def test_echo_and_stream_live_until_the_pod_stops(pair: tuple[Path, Path], serving: Serving) -> None:
    client, pod = pair
    serving.ask(serve="ns/pod", netns=str(pod), ports=[8080])
    with talk(client, b"echo\n", b"hello\n") as echo, talk(client, b"stream 1\n") as stream:
        assert echo.recv(100) == b"hello\n"
        with stream.makefile("rb") as lines:
            assert [lines.readline() for _ in range(3)] == [b"ns/pod 0\n", b"ns/pod 1\n", b"ns/pod 2\n"]

        serving.ask(stop="ns/pod")

        assert echo.recv(100) == b""


def test_http_and_a_client_that_says_nothing(pair: tuple[Path, Path], serving: Serving) -> None:
    client, pod = pair
    serving.ask(serve="ns/pod", netns=str(pod), ports=[8080])

    with talk(client, b"GET / HTTP/1.1\r\nHost: pod\r\n\r\n") as web, web.makefile("rb") as answer:
        text = answer.read()
    assert text.startswith(b"HTTP/1.1 200 OK\r\n")
    assert text.endswith(b"\r\n\r\nns/pod\n")
    assert b"X-Peer: 10.9.0.1 " in text

    with talk(client) as silent:
        assert silent.recv(100) == b"ns/pod\n"


def test_a_taken_port_names_itself(pair: tuple[Path, Path], serving: Serving) -> None:
    serving.ask(serve="ns/one", netns=str(pair[1]), ports=[8080])

    answer = serving.ask(serve="ns/two", netns=str(pair[1]), ports=[9090, 8080])

    assert "ns/two" in str(answer["error"])
    assert "port 8080" in str(answer["error"])
    assert server.SILENCE < probe.QUIET
