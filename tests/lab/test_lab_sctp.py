"""SCTP with real associations: policies by port, flows that end, masquerade, the overlay, Services.

one/near (node1), one/far (node2) --SCTP 9090, 9191--> one/server (node1)   --> outside
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from lab import netns
from lab.capture import Capture
from lab.limits import SLOWNESS
from lab.matrix import Result
from lab.names import Address
from lab.objects import Object, check
from lab.probe import CONNECTED, SCTP, has_sctp
from lab.processes import until
from lab.world import Lab
from tests.lab.policies import applied, expected_matrix, namespace, policy
from tests.lab.services import eventually, of_version, port, service

FAMILIES = (4, 6)
SERVER = "one/server"
SOURCES = ("one/near", "one/far")
PORTS = (9090, 9191)
LINE_MS = 50
ENDS_WITHIN = 1.0


def pod(path: str, node: str, *ports: tuple[str, int]) -> Object:
    """A Pod whose ports are all SCTP's."""
    space, name = path.split("/")
    said = [{"name": each, "containerPort": number, "protocol": SCTP} for each, number in ports]
    meta = {"namespace": space, "name": name, "labels": {"app": name}}
    spec = {"nodeName": node, "containers": [{"name": "main", "ports": said}]}
    return check({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}, "test")


PODS = [
    namespace("one"),
    pod(SERVER, "node1", ("signals", 9090), ("more", 9191)),
    pod("one/near", "node1"),
    pod("one/far", "node2"),
]


@pytest.fixture(scope="module", params=["direct", "vxlan"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if not has_sctp():
        pytest.skip("this kernel has no SCTP sockets: `make vm` runs these tests on one that has")
    with Lab(nodes=2, given=PODS, mode=request.param) as made:
        yield made


def allowing(*ports: dict[str, Any]) -> Object:
    ingress = [{"ports": [{"protocol": SCTP, **each} for each in ports]}] if ports else []
    return policy("one/server", podSelector={"matchLabels": {"app": "server"}}, ingress=ingress)


POLICIES = {
    "none": ([], {9090, 9191}),
    "nothing": ([allowing()], set()),
    "a port": ([allowing({"port": 9090})], {9090}),
    "a name": ([allowing({"port": "more"})], {9191}),
    "a range": ([allowing({"port": 9000, "endPort": 9190})], {9090}),
    "all of SCTP": ([allowing({})], {9090, 9191}),
    "TCP alone": ([allowing({"port": 9090, "protocol": "TCP"})], set()),
}


def over_sctp(results: tuple[Result, ...], sources: tuple[str, ...]) -> list[Result]:
    return [each for each in results if each.trial.protocol == SCTP and each.trial.source in sources]


@pytest.mark.parametrize(("policies", "ports"), POLICIES.values(), ids=POLICIES)
def test_a_policy_of_ports(lab: Lab, policies: list[Object], ports: set[int]) -> None:
    seen = applied(lab, [*PODS, *policies])

    assert [str(result) for result in seen.results if not result.good] == []
    tried = over_sctp(seen.results, SOURCES)
    assert len(tried) == len(SOURCES) * len(PORTS) * len(FAMILIES)
    assert {result.trial.port for result in tried if result.connected} == ports
    assert all(result.connected == (result.trial.port in ports) for result in tried)


def connected(lab: Lab, source: str, address: Address, number: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = lab.socket(source, family, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    if address.version == 6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.settimeout(10 * SLOWNESS)
    sock.connect((str(address), number))
    return sock


class Association:
    """A stream of counted lines; when the last came."""

    def __init__(self, lab: Lab, source: str, address: Address, number: int) -> None:
        self.sock = connected(lab, source, address, number)
        self.sock.send(f"stream {LINE_MS}\n".encode())
        self.received = 0
        self.last = time.monotonic()
        self._reader = threading.Thread(target=self._read, name="podwall-association")
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := self.sock.recv(65536):
                self.received += data.count(b"\n")
                self.last = time.monotonic()
        except OSError:
            pass  # shut down, or silent for as long as the test may last

    def goes_on(self) -> None:
        wanted = self.received + 5
        until(lambda: self.received >= wanted, 10, lambda: f"{self.received} lines came, not {wanted}")

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self._reader.join(20 * SLOWNESS)
        self.sock.close()


@pytest.mark.parametrize("version", FAMILIES)
def test_what_is_no_longer_allowed_ends_and_the_rest_goes_on(lab: Lab, version: int) -> None:
    assert applied(lab, [*PODS, allowing({"port": 9090}, {"port": 9191})]).good
    address = lab.pod(SERVER).address(version)
    flows = {
        (source, number): Association(lab, source, address, number) for source in SOURCES for number in PORTS
    }
    try:
        for flow in flows.values():
            flow.goes_on()

        lab.apply([*PODS, allowing({"port": 9090})], prune=True)

        denied = [flow for (_, number), flow in flows.items() if number == 9191]
        quiet = ENDS_WITHIN * SLOWNESS
        until(
            lambda: all(time.monotonic() - flow.last > quiet for flow in denied),
            3 * ENDS_WITHIN + 5,
            lambda: f"still heard: {[flow.received for flow in denied]} lines",
        )
        for (_, number), flow in flows.items():
            if number == 9090:
                flow.goes_on()
        assert all(time.monotonic() - flow.last > quiet for flow in denied)
    finally:
        for flow in flows.values():
            flow.close()


def heartbeats(capture: Capture, version: int) -> int:
    """How many frames begin with a HEARTBEAT chunk (RFC 9260, 3.3.5)."""
    ether, network, transport = 14, 20 if version == 4 else 40, 12
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    protocol = ether + (9 if version == 4 else 6)
    return sum(
        frame[12:14] == kind
        and frame[protocol] == socket.IPPROTO_SCTP
        and frame[ether + network + transport] == 4
        for frame in capture.frames
    )


IMPATIENT = {"rto_min": 100, "rto_max": 300, "hb_interval": 100}  # milliseconds
NEVER_GIVES_UP = {"association_max_retrans": 10_000, "path_max_retrans": 10_000}


def listening(lab: Lab, source: str, version: int, number: int) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    listener = lab.socket(source, family, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.settimeout(10 * SLOWNESS)
    listener.bind(("", number))
    listener.listen()
    return listener


@pytest.mark.parametrize("version", FAMILIES)
def test_heartbeats_do_not_open_what_has_ended(lab: Lab, version: int) -> None:
    """Connection tracking takes a HEARTBEAT for the begin of a flow, and what comes back for its replies."""
    assert applied(lab, [*PODS, allowing({"port": 9292})]).good
    for name, value in (IMPATIENT | NEVER_GIVES_UP).items():  # for sockets that are opened from now on
        netns.run(lab.netns(SERVER), netns.set_sysctl, f"sctp/{name}", str(value))
    with (
        closing(listening(lab, SERVER, version, 9292)) as listener,
        closing(connected(lab, "one/far", lab.pod(SERVER).address(version), 9292)) as client,
        closing(listener.accept()[0]) as server,
        lab.capture(SERVER) as heard,
    ):
        client.send(b"before")
        assert server.recv(100) == b"before"

        assert applied(lab, [*PODS, allowing()]).good
        beats = heartbeats(heard, version)
        until(lambda: heartbeats(heard, version) >= beats + 5, 10, lambda: f"{len(heard.frames)} frames")
        client.send(b"after")
        until(lambda: heartbeats(heard, version) >= beats + 15, 10, lambda: f"{len(heard.frames)} frames")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100)


@pytest.mark.parametrize("version", FAMILIES)
def test_what_leaves_the_cluster_has_the_nodes_address(lab: Lab, version: int) -> None:
    applied(lab, PODS)
    with (
        closing(listening(lab, "outside", version, 9090)) as listener,
        closing(connected(lab, "one/far", of_version(lab.outside.addresses, version), 9090)),
    ):
        accepted, (seen, *_) = listener.accept()
        accepted.close()

    assert seen == str(of_version(lab.node("node2").addresses, version))


# Services

SIGNALS = service("one/signals", {"app": "server"}, port(90, 9090, protocol=SCTP), type="NodePort")
BY: dict[str, Callable[[Lab, int], tuple[Address, int]]] = {
    "its cluster address": lambda lab, version: (lab.service("one/signals").address(version), 90),
    "the Pod's node": lambda lab, version: (
        of_version(lab.node("node1").addresses, version),
        lab.service("one/signals").node_port,
    ),
    "the other node": lambda lab, version: (
        of_version(lab.node("node2").addresses, version),
        lab.service("one/signals").node_port,
    ),
}


def reached(lab: Lab, source: str, by: str, version: int) -> str:
    """Who answers there; nobody when it does not connect."""
    address, number = BY[by](lab, version)
    outcome = lab.probe(source, address, number, SCTP)
    return outcome.answer if outcome.verdict == CONNECTED else ""


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("by", BY)
def test_a_service_is_reached_from_everywhere(lab: Lab, by: str, version: int) -> None:
    lab.apply([*PODS, SIGNALS], prune=True)
    sources = [*SOURCES, SERVER, "node1", "node2", *(["outside"] if by != "its cluster address" else [])]

    for source in sources:
        answer = eventually(lambda: reached(lab, source, by, version), bool)  # noqa: B023
        assert answer == SERVER, source


def test_policies_see_the_pod_behind_a_service(lab: Lab) -> None:
    near = policy(
        "one/server",
        podSelector={"matchLabels": {"app": "server"}},
        ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "near"}}}]}],
    )
    lab.apply([*PODS, SIGNALS, near], prune=True)
    assert expected_matrix(lab).good

    for version in FAMILIES:
        assert eventually(lambda: reached(lab, "one/near", "its cluster address", version), bool)  # noqa: B023
        assert not reached(lab, "one/far", "its cluster address", version)
        assert not reached(lab, "one/far", "the other node", version)
