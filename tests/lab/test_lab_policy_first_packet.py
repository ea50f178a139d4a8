"""A Pod is isolated, and allowed what its policies allow, from its first packet.

On every node a neighbour sends a SYN every millisecond to the addresses that the node's Pods are about to
get. What a Pod's kernel has received since its namespace was made is counted there, so nothing that arrived
can have been missed.

PODWALL_TEST_PODS says how many Pods are started (40), at most 200 on a node: each has 254 addresses.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from lab import netns
from lab.limits import SLOWNESS
from lab.manifests import ObjectDirectory
from lab.names import RUN, pod_netns
from lab.objects import Object, key_of
from lab.world import Lab
from tests.lab.policies import expected_matrix, namespace, pod, policy

PODS = int(os.environ.get("PODWALL_TEST_PODS", "40"))
NODES = max(2, -(-PODS // 200))
PORT = 8080
EVERY_S = 0.001
ANSWER_LIMIT_S = 5.0 * SLOWNESS


def number(index: int) -> str:
    return f"{index:04d}"


BASE = [
    namespace("closed"),
    namespace("open"),
    namespace("begin"),
    policy("closed/deny", policyTypes=["Ingress", "Egress"]),
    *(pod(f"open/neighbour-{node}", node=f"node{node}") for node in range(1, NODES + 1)),
    *(
        pod(f"begin/server-{node}", PORT, node=f"node{node}", labels={"app": "server"})
        for node in range(1, NODES + 1)
    ),
    policy(
        "begin/client",
        podSelector={"matchLabels": {"app": "client"}},
        policyTypes=["Ingress", "Egress"],
        egress=[{"to": [{"podSelector": {"matchLabels": {"app": "server"}}}], "ports": [{"port": PORT}]}],
    ),
    policy(
        "begin/server",
        podSelector={"matchLabels": {"app": "server"}},
        ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": PORT}]}],
    ),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=NODES, given=BASE) as made:
        assert expected_matrix(made).good
        yield made


def received(where: Path) -> int:
    """Packets of IPv4 and IPv6 that a namespace has received since it was made."""
    lines = netns.run(where, Path("/proc/thread-self/net/snmp").read_text).splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Ip:"))
    v4 = int(dict(zip(names, values, strict=True))["InReceives"])
    six = netns.run(where, Path("/proc/thread-self/net/snmp6").read_text).splitlines()
    return v4 + next(int(line.split()[1]) for line in six if line.startswith("Ip6InReceives"))


class Neighbour:
    """Sends a SYN every millisecond: to each address of its node's, both families, one after the other."""

    def __init__(self, lab: Lab, node: int, count: int) -> None:
        name = f"open/neighbour-{node}"
        found = lab.pod(name)
        link = json.loads(lab.run(name, ["ip", "-j", "link", "show", "eth0"]).stdout)[0]
        gateway = json.loads(lab.run(name, ["ip", "-j", "neigh", "show"]).stdout)[0]
        self.sent = 0
        self.frames: list[bytes] = []
        ether = Ether(src=link["address"], dst=gateway["lladdr"])
        self._capture = lab.capture(name, incoming_only=True)
        for host in range(1, count):
            for version, header in ((4, IP), (6, IPv6)):
                base = {4: f"10.244.{node}.0", 6: f"fd00:10:244:{node}::"}[version]
                to, own = str(ip_address(base) + host), str(found.address(version))
                if to != own:
                    packet = ether / header(src=own, dst=to) / TCP(sport=2000 + host, dport=PORT, flags="S")
                    self.frames.append(bytes(packet))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"podwall-neighbour-{node}")

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._capture.close()

    def _run(self) -> None:
        """As many as are due: a late wake-up sends those that were missed at once."""
        began = time.monotonic()
        while not self._stop.wait(EVERY_S):
            due = int((time.monotonic() - began) / EVERY_S)
            while self.sent < due:
                self._capture.send(self.frames[self.sent % len(self.frames)])
                self.sent += 1


def closed(index: int) -> Object:
    return pod(f"closed/pod-{number(index)}", PORT, node=node_of(index))


def control(index: int) -> Object:
    return pod(f"open/control-{number(index)}", PORT, node=node_of(index))


def node_of(index: int) -> str:
    return f"node{1 + index % NODES}"


def test_the_first_connection_needs_no_second_try(lab: Lab) -> None:
    """Once ADD has answered, the Pod connects to one of its node, where it is known as a peer at once."""
    cluster = ObjectDirectory(RUN / "cluster", RUN / "scratch")
    servers = [lab.pod(f"begin/server-{node}") for node in range(1, NODES + 1)]
    took, late = [], 0
    for index in range(PODS):
        runtime, server = lab.runtimes[node_of(index)], servers[index % NODES]
        item = pod(f"begin/client-{number(index)}", node=node_of(index), labels={"app": "client"})
        item["metadata"]["uid"] = f"client-{index}"
        cluster.write({**item, "status": {"phase": "Pending"}})
        box = runtime.run(pod_netns("begin", item["metadata"]["name"]), item)
        try:
            for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
                with netns.run(box.path, socket.socket, family, socket.SOCK_STREAM) as sock:
                    sock.settimeout(ANSWER_LIMIT_S)
                    began = time.monotonic()
                    sock.connect((str(server.address(version)), PORT))
                    took.append(time.monotonic() - began)
                    late += _resent(sock) > 0
        finally:
            runtime.stop(box)
            cluster.remove(key_of(item))
    assert len(took) == 2 * PODS
    print(f"{len(took)} first connections, the slowest in {max(took) * 1000:.1f} ms, {late} by a second SYN")
    assert late == 0


def test_no_packet_is_earlier_than_the_policies(lab: Lab) -> None:
    """Pods without a policy, started among the others, are the control."""
    controls = max(2 * NODES, PODS // 10)
    pods = [closed(index) for index in range(PODS)]
    addresses_each = min(254, 2 * (PODS + controls) // NODES + 10)
    with ExitStack() as stack:
        neighbours = [
            stack.enter_context(Neighbour(lab, node, addresses_each)) for node in range(1, NODES + 1)
        ]
        try:
            lab.apply([*pods, *(control(index) for index in range(controls))])
            for neighbour in neighbours:
                wanted = neighbour.sent + 2 * len(neighbour.frames)  # every address once more
                while neighbour.sent < wanted:
                    time.sleep(EVERY_S)
            inside = {
                found.full_name: received(found.netns) for found in lab.pods() if found.namespace != "begin"
            }
            addresses = {
                found.full_name: found.address(4) for found in lab.pods() if found.full_name in inside
            }
        finally:
            lab.apply(BASE, prune=True)

    frames = [frame for neighbour in neighbours for frame in neighbour.frames]
    aimed = {ip_address(frame[30:34]) for frame in frames if frame[12:14] == b"\x08\x00"}
    reached = {name for name, address in addresses.items() if address in aimed}
    shut = [name for name in reached if name.startswith("closed/")]
    print(f"{sum(neighbour.sent for neighbour in neighbours)} SYNs to {len(shut)} isolated Pods")
    assert len(shut) >= 0.9 * PODS, "the neighbours did not send to the addresses that Pods got"
    assert {name: inside[name] for name in inside if name.startswith("closed/") and inside[name]} == {}
    assert all(inside[name] for name in reached if name.startswith("open/control"))


def _resent(sock: socket.socket) -> int:
    """Segments that were sent again: tcpi_total_retrans."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104], "little")
