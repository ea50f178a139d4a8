"""The rules of Pods' links in a real kernel: no Pod speaks under another's address or hears what is not its.

    pod a --- podwall0000000a \\
                               node (rules, forwarding)
    pod b --- podwall0000000b /

The lab's tests go further (scapy, two nodes, all kinds of frames); here are the rules alone.
"""

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from pyroute2 import netns

from agent.compile import links, verdicts
from agent.nft import diff
from agent.nft.kernel import Kernel
from agent.nft.model import Ruleset
from tests.linux import commands

A, B, NOBODY, GONE = "10.244.0.10", "10.244.0.11", "10.244.0.12", "10.244.0.13"
A6, B6, NOBODY6, GONE6 = (f"fd00:10:244::{last}" for last in "abcd")
PORT = 7000
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"
POD_A, POD_B = f"podwall-test-{os.getpid()}-a", f"podwall-test-{os.getpid()}-b"


@pytest.fixture
def pods(netns: None) -> Iterator[None]:
    """Two Pods on a node; each also holds an address that is nobody's, as a privileged Pod can."""
    try:
        commands(
            "ip link set lo up",
            "ip addr add 192.168.10.1/32 dev lo",
            "sysctl -qw net.ipv4.conf.all.rp_filter=0",  # it would drop some of this, but not IPv6
            "sysctl -qw net.ipv4.conf.default.rp_filter=0",
            "sysctl -qw net.ipv4.ip_forward=1",
            "sysctl -qw net.ipv6.conf.all.forwarding=1",
        )
        _pod(POD_A, "podwall0000000a", "02:00:00:00:00:0a", (A, NOBODY), (A6, NOBODY6))
        _pod(POD_B, "podwall0000000b", "02:00:00:00:00:0b", (B, GONE), (B6, GONE6))
        yield
    finally:
        for name in (POD_A, POD_B):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _pod(name: str, link: str, mac: str, v4: tuple[str, str], v6: tuple[str, str]) -> None:
    inside = f"ip -n {name}"
    commands(
        f"ip netns add {name}",
        f"ip link add {link} address {GATEWAY_MAC} type veth peer name eth0 address {mac} netns {name}",
        f"ip link set {link} addrgenmode none",
        f"ip link set {link} up",
        f"{inside} link set eth0 addrgenmode none",
        f"{inside} link set eth0 up",
        *(f"{inside} addr add {address}/32 dev eth0" for address in v4),
        *(f"{inside} addr add {address}/128 dev eth0 nodad" for address in v6),
        f"{inside} route add 169.254.1.1 dev eth0",
        f"{inside} route add default via 169.254.1.1",
        f"{inside} -6 route add default via fe80::1 dev eth0",
        f"{inside} neigh add 169.254.1.1 lladdr {GATEWAY_MAC} dev eth0",
        f"{inside} neigh add fe80::1 lladdr {GATEWAY_MAC} dev eth0",
    )
    for address in (v4[0], v6[0]):
        commands(f"ip route add {address} dev {link}", f"ip neigh add {address} lladdr {mac} dev {link}")


def _socket(pod: str, family: socket.AddressFamily, address: str, port: int = 0) -> socket.socket:
    """A socket inside a Pod's namespace."""
    netns.pushns(pod)
    try:
        made = socket.socket(family, socket.SOCK_DGRAM)
    finally:
        netns.popns()
    made.setblocking(False)
    made.bind((address, port))
    return made


WANTED = Ruleset(
    (
        *links.static(),
        *verdicts.static(),
        *links.link("podwall0000000a", (ip_address(A), ip_address(A6)), "default", "a"),
        *links.link("podwall0000000b", (ip_address(B), ip_address(B6)), "default", "b"),
    )
)
ATTEMPTS = {
    "own address": (socket.AF_INET, A, B, True),
    "own address, IPv6": (socket.AF_INET6, A6, B6, True),
    "address of nobody": (socket.AF_INET, NOBODY, B, False),
    "address of nobody, IPv6": (socket.AF_INET6, NOBODY6, B6, False),
}


async def _arrives(family: socket.AddressFamily, source: str, target: str) -> bool:
    """Send one datagram from Pod a and one honest one after it: both, or only the second, come to Pod b."""
    honest = A if family == socket.AF_INET else A6
    loop = asyncio.get_running_loop()
    with (
        _socket(POD_B, family, target, PORT) as server,
        _socket(POD_A, family, source) as tried,
        _socket(POD_A, family, honest) as last,
    ):
        tried.sendto(b"tried", (target, PORT))
        last.sendto(b"last", (target, PORT))
        seen = []
        async with asyncio.timeout(5):
            while b"last" not in seen:
                seen.append(await loop.sock_recv(server, 100))
    return b"tried" in seen


@pytest.mark.parametrize("case", ATTEMPTS)
def test_only_the_own_address_gets_out(pods: None, with_kernel: Callable[..., Any], case: str) -> None:
    family, source, target, expected = ATTEMPTS[case]

    async def body(kernel: Kernel) -> bool:
        await kernel.commit(diff.transaction(diff.difference(Ruleset(), WANTED), WANTED))
        return await _arrives(family, source, target)

    assert with_kernel(body) is expected


def test_without_the_rules_the_spoofed_packet_arrives(pods: None, with_kernel: Callable[..., Any]) -> None:
    """The other tests would pass on a network that is merely broken."""

    async def body(_: Kernel) -> bool:
        return await _arrives(socket.AF_INET, NOBODY, B) and await _arrives(socket.AF_INET6, NOBODY6, B6)

    assert with_kernel(body)


def test_nothing_reaches_a_link_under_an_address_that_is_not_its_own(
    pods: None, with_kernel: Callable[..., Any]
) -> None:
    """Even where a route leads there: the address may have belonged to a Pod that is gone."""
    commands(
        f"ip route add {GONE} dev podwall0000000b",
        f"ip neigh add {GONE} lladdr 02:00:00:00:00:0b dev podwall0000000b",
    )

    async def body(kernel: Kernel) -> list[bool]:
        before = await _reaches_gone()
        await kernel.commit(diff.transaction(diff.difference(Ruleset(), WANTED), WANTED))
        return [before, await _reaches_gone()]

    assert with_kernel(body) == [True, False]


async def _reaches_gone() -> bool:
    """Pod b listens on an address that is not its own; the node sends there, then to its own."""
    loop = asyncio.get_running_loop()
    with (
        _socket(POD_B, socket.AF_INET, GONE, PORT) as strange,
        _socket(POD_B, socket.AF_INET, B, PORT) as own,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as node,
    ):
        for target in (GONE, B):
            try:
                node.sendto(b"x", (target, PORT))
            except PermissionError:  # what the node's own rules drop on its way out
                continue
        async with asyncio.timeout(5):
            await loop.sock_recv(own, 100)
        try:
            return strange.recv(100) == b"x"
        except BlockingIOError:
            return False
