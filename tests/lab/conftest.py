"""A small world without agents: the underlay and nodes, and Pods on plain veths, under names of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_interface
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from lab import manifests, netns, processes
from lab.world import Lab

PREFIX = f"podwall-labtest{os.getpid()}-"
HELLO = Path(__file__).parents[2] / "examples" / "hello"


def connect(first: Path, second: Path, addresses: dict[str, tuple[str, ...]]) -> None:
    """Join two namespaces by a veth called eth0 on both sides."""

    def make() -> None:
        with IPRoute() as kernel, second.open("rb") as other:
            kernel.link(
                "add", ifname="eth0", kind="veth", peer={"ifname": "eth0", "net_ns_fd": other.fileno()}
            )

    def address(texts: tuple[str, ...]) -> None:
        netns.set_sysctl("ipv6/conf/eth0/accept_dad", "0")
        with IPRoute() as kernel:
            index = kernel.link_lookup(ifname="eth0")[0]
            for interface in map(ip_interface, texts):
                prefix = interface.network.prefixlen
                kernel.addr("add", index=index, address=str(interface.ip), prefixlen=prefix)
            kernel.link("set", index=index, state="up")

    netns.run(first, make)
    for where, side in ((first, "first"), (second, "second")):
        netns.run(where, address, addresses[side])
    for where, side in ((first, "first"), (second, "second")):
        _wait_for_discovery(where, ip_interface(addresses[side][1]).ip)


def _wait_for_discovery(where: Path, address: IPv4Address | IPv6Address) -> None:
    """Wait until neighbours can find an IPv6 address: the kernel joins its group in the background."""
    group = "ff0200000000000000000001ff" + address.packed[-3:].hex()
    groups = Path("/proc/thread-self/net/igmp6")
    processes.until(
        lambda: group in netns.run(where, groups.read_text), 5, lambda: f"{address} joins no multicast group"
    )


@pytest.fixture
def make_netns() -> Iterator[Callable[[str], Path]]:
    """Make namespaces that go with the test."""

    def make(name: str) -> Path:
        return netns.create(PREFIX + name)

    yield make
    names = list(netns.names(PREFIX))
    processes.stop_in([netns.path(name) for name in names], 0.0)
    for name in names:
        netns.remove(name)


@pytest.fixture
def pair(make_netns: Callable[[str], Path]) -> tuple[Path, Path]:
    """Two connected namespaces: 10.9.0.1 and fd09::1 in the first, 10.9.0.2 and fd09::2 in the second."""
    first, second = make_netns("first"), make_netns("second")
    addresses = {"first": ("10.9.0.1/24", "fd09::1/64"), "second": ("10.9.0.2/24", "fd09::2/64")}
    connect(first, second, addresses)
    return first, second


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab of two nodes with the example's Pods; its tests leave these as they are."""
    with Lab(nodes=2, given=manifests.read([HELLO])) as made:
        yield made
