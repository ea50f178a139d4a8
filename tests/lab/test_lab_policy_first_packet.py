"""A Pod is isolated, and allowed what its policies allow, from its first packet.

A neighbour sends a SYN every millisecond to the addresses that Pods are about to get. What a Pod's kernel has
received since its namespace was made is counted there, so nothing that arrived can have been missed.

PODWALL_TEST_PODS says how many Pods are started (40).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
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
    pod("open/neighbour", node="node1"),
    pod("begin/server-1", PORT, node="node1", labels={"app": "server"}),
    pod("begin/server-2", PORT, node="node2", labels={"app": "server"}),
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
    with Lab(nodes=2, given=BASE) as made:
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

    def __init__(self, lab: Lab, count: int) -> None:
        found = lab.pod("open/neighbour")
        link = json.loads(lab.run("open/neighbour", ["ip", "-j", "link", "show", "eth0"]).stdout)[0]
        gateway = json.loads(lab.run("open/neighbour", ["ip", "-j", "neigh", "show"]).stdout)[0]
        self.sent = 0
        self.frames: list[bytes] = []
        ether = Ether(src=link["address"], dst=gateway["lladdr"])
        self._capture = lab.capture("open/neighbour", incoming_only=True)
        for host in range(1, count):
            for version, header in ((4, IP), (6, IPv6)):
                base = {4: "10.244.1.0", 6: "fd00:10:244:1::"}[version]
                to, own = str(ip_address(base) + host), str(found.address(version))
                if to != own:
                    packet = ether / header(src=own, dst=to) / TCP(sport=2000 + host, dport=PORT, flags="S")
                    self.frames.append(bytes(packet))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="podwall-neighbour")

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
    return pod(f"closed/pod-{number(index)}", PORT, node="node1")


def control(index: int) -> Object:
    return pod(f"open/control-{number(index)}", PORT, node="node1")


def test_the_first_connection_needs_no_second_try(lab: Lab) -> None:
    """Once ADD has answered, the Pod connects to one of its node, where it is known as a peer at once."""
    runtime, cluster = lab.runtimes["node1"], ObjectDirectory(RUN / "cluster", RUN / "scratch")
    near = [(version, str(lab.pod("begin/server-1").address(version))) for version in (4, 6)]
    took, late = [], 0
    for index in range(PODS):
        item = pod(f"begin/client-{number(index)}", node="node1", labels={"app": "client"})
        item["metadata"]["uid"] = f"client-{index}"
        cluster.write({**item, "status": {"phase": "Pending"}})
        box = runtime.run(pod_netns("begin", item["metadata"]["name"]), item)
        try:
            for version, address in near:
                family = socket.AF_INET if version == 4 else socket.AF_INET6
                with netns.run(box.path, socket.socket, family, socket.SOCK_STREAM) as sock:
                    sock.settimeout(ANSWER_LIMIT_S)
                    began = time.monotonic()
                    sock.connect((address, PORT))
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
    controls = max(4, PODS // 10)
    pods = [closed(index) for index in range(PODS)]
    with Neighbour(lab, min(250, 2 * (PODS + controls))) as neighbour:
        try:
            lab.apply([*pods, *(control(index) for index in range(controls))])
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

    aimed = {ip_address(frame[30:34]) for frame in neighbour.frames if frame[12:14] == b"\x08\x00"}
    reached = {name for name, address in addresses.items() if address in aimed}
    shut = [name for name in reached if name.startswith("closed/")]
    assert len(shut) >= min(PODS, 100), "the neighbour did not send to the addresses that Pods got"
    assert {name: inside[name] for name in inside if name.startswith("closed/") and inside[name]} == {}
    assert all(inside[name] for name in reached if name.startswith("open/control"))


def _resent(sock: socket.socket) -> int:
    """Segments that were sent again: tcpi_total_retrans."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104], "little")
