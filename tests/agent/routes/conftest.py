"""Nodes as network namespaces: a, b and c on one bridge, far behind a router; one Pod each.

    a 192.168.77.1 --+
    b 192.168.77.2 --+-- lan -- router -- 192.168.88.4 far        (fd77::/64 and fd88::/64 alike)
    c 192.168.77.3 --+

All check strictly that a packet comes from where its source is routed (rp_filter 1), as some distributions
do, and nodes forward nothing until podwall has settled that; the router has no route to Pods.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TypeVar

import pytest

from agent.cluster.model import Node
from agent.node import settle
from agent.routes.kernel import RouteKernel
from lab import netns
from tests.linux import command

T = TypeVar("T")
PREFIX = f"podwall-rt{os.getpid()}-"
NUMBERS = {"a": 1, "b": 2, "c": 3, "far": 4}


@dataclass
class Place:
    """A network namespace made for a test."""

    name: str

    @property
    def netns(self) -> str:
        return PREFIX + self.name

    def batch(self, lines: str) -> None:
        """Commands of `ip`, one a line, without options in front."""
        command("ip", "-n", self.netns, "-batch", "-", data=lines)

    def ip(self, *arguments: str) -> str:
        return command("ip", "-n", self.netns, *arguments)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.netns, *arguments],
            text=True,
            capture_output=True,
            check=False,
            timeout=30,
        )

    def sysctl(self, **settings: str) -> None:
        pairs = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        assert not self.run("sysctl", "-qw", *pairs).returncode

    def inside(self, work: Callable[[], T]) -> T:
        """Call in a thread of its own that is in the namespace."""
        return netns.run(netns.path(self.netns), work)


def ping(target: str, count: int = 1, interval: float = 0.0, size: int = 56) -> int:
    """Send echo requests one after the other and count the answers. Raises the network's OSError."""
    v6 = ":" in target
    protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
    answers = 0
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM, protocol) as sock:
        level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
        sock.setsockopt(level, 25 if v6 else 11, 1)  # IP_RECVERR
        sock.setsockopt(level, 23 if v6 else 10, 2)  # IP_MTU_DISCOVER: do
        sock.settimeout(2)
        sock.connect((target, 0))
        for number in range(count):
            payload = bytes(size - (48 if v6 else 28))
            sock.send(struct.pack("!BBHHH", 128 if v6 else 8, 0, 0, 0, number) + payload)
            with contextlib.suppress(TimeoutError):
                answers += struct.unpack_from("!H", sock.recv(65536), 6)[0] == number
            time.sleep(interval)
    return answers


@dataclass
class World:
    """All namespaces of a test, and the Node objects that describe them."""

    places: dict[str, Place] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str) -> Place:
        place = self.places[name] = Place(name)
        command("ip", "netns", "add", place.netns)
        place.batch("link set lo up")
        place.sysctl(
            net__ipv4__conf__all__rp_filter="1",
            net__ipv4__ping_group_range="0 0",
            net__ipv6__conf__default__accept_dad="0",
        )
        return place

    def remove(self) -> None:
        for place in self.places.values():
            subprocess.run(["ip", "netns", "del", place.netns], check=False, capture_output=True)

    def pings(self, source: str, target: str, size: int = 56) -> bool:
        """Whether the target answers; IP packets of that size, never fragmented."""
        return self.places[source].inside(lambda: ping(target, size=size)) == 1

    def pinged(self, source: str, target: str, count: int, interval: float) -> int:
        """How many of `count` echo requests, `interval` seconds apart, are answered."""
        return self.places[source].inside(lambda: ping(target, count, interval))

    def pod_address(self, name: str, version: int) -> str:
        number = NUMBERS[name]
        return f"10.244.{number}.5" if version == 4 else f"fd00:10:{number}::5"


def _node(world: World, name: str, lan: Place, net: str) -> None:
    number = NUMBERS[name]
    place = world.add(name)
    lan.batch(f"link add name {name} type veth peer name eth0 netns {place.netns}")
    place.batch(
        f"""addr add 192.168.{net}.{number}/24 dev eth0
        addr add fd{net}::{number}/64 dev eth0 nodad
        link set eth0 up
        route add default via 192.168.{net}.254
        route add default via fd{net}::254"""
    )
    pod = world.add(f"pod-{name}")
    place.batch(
        f"""link add podwall{number} type veth peer name eth0 netns {pod.netns}
        link set podwall{number} up
        addr add 169.254.1.1/32 dev podwall{number}
        addr add fe80::1/64 dev podwall{number} nodad
        route add 10.244.{number}.5 dev podwall{number} proto 112
        route add fd00:10:{number}::5 dev podwall{number} proto 112"""
    )
    pod.batch(
        f"""addr add 10.244.{number}.5/32 dev eth0
        addr add fd00:10:{number}::5/128 dev eth0 nodad
        link set eth0 mtu 1430 up
        route add 169.254.1.1 dev eth0
        route add default via 169.254.1.1
        route add default via fe80::1 dev eth0"""
    )
    _, problems = place.inside(lambda: settle("eth0", "auto", (4, 6)))
    assert problems == ()
    world.nodes[name] = Node(
        name=name,
        internal_ips=(ip_address(f"192.168.{net}.{number}"), ip_address(f"fd{net}::{number}")),
        pod_cidrs=(ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:10:{number}::/64")),
    )


def _build(world: World) -> None:
    lan, router = world.add("lan"), world.add("router")
    router.sysctl(net__ipv4__ip_forward="1", net__ipv6__conf__all__forwarding="1")
    lan.batch("link add bridge type bridge mcast_snooping 0\nlink set bridge up")
    for name in ("a", "b", "c"):
        _node(world, name, lan, "77")
    lan.batch(f"link add router type veth peer name lan netns {router.netns}")
    lan.batch("".join(f"link set dev {port} master bridge up\n" for port in ("a", "b", "c", "router")))
    _node(world, "far", router, "88")
    router.batch(
        """addr add 192.168.77.254/24 dev lan
        addr add fd77::254/64 dev lan nodad
        link set lan up
        addr add 192.168.88.254/24 dev far
        addr add fd88::254/64 dev far nodad
        link set far up"""
    )


@pytest.fixture
def world() -> Iterator[World]:
    whole = World()
    try:
        _build(whole)
        yield whole
    finally:
        whole.remove()


@pytest.fixture
def kernels(world: World) -> dict[str, RouteKernel]:
    return {name: world.places[name].inside(RouteKernel) for name in world.nodes}
