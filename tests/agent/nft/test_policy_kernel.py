"""Compiled policies in a real kernel: they load, are read back as meant, and change by their differences.

Forged ICMP errors are tried with real packets, because what connection tracking calls related, and which of
its addresses are the real ones, is the kernel's to say:

    a --asks--> Service address --dnat--> b (nobody listens: "port unreachable")
    c --forges "port unreachable" about a's question--> a
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from pyroute2 import netns as namespaces

from agent.compile import links
from agent.nft import diff
from agent.nft.kernel import Kernel
from agent.nft.model import Ruleset
from tests.agent.compile.test_policy_property import Chance
from tests.agent.compile.worlds import World, link_of, namespace, pod, policy
from tests.linux import commands

SEEDS = range(24)
WithKernel = Callable[[Callable[[Kernel], Coroutine[Any, Any, Any]]], Any]


async def _left(kernel: Kernel, wanted: Ruleset) -> dict[Any, Any]:
    """In what the kernel differs from what was wanted."""
    return diff.difference(await kernel.read(list(wanted.tables)), wanted)


async def _commit(kernel: Kernel, before: Ruleset, after: Ruleset) -> None:
    await kernel.commit(diff.transaction(diff.difference(before, after), after))


def test_random_clusters_load_and_are_read_back(with_kernel: WithKernel) -> None:
    """From one cluster to the next by the difference alone."""

    async def body(kernel: Kernel) -> list[tuple[int, Any]]:
        wrong, before = [], Ruleset()
        for seed in SEEDS:
            after = World(*Chance(seed).cluster()).ruleset
            await _commit(kernel, before, after)
            if left := await _left(kernel, after):
                wrong.append((seed, left))
            before = after
        return wrong

    assert with_kernel(body) == []


EXTREME = {
    "from anywhere, in many blocks": {
        "from": [
            {"ipBlock": {"cidr": "0.0.0.0/0"}},
            *({"ipBlock": {"cidr": f"10.0.{n}.0/24"}} for n in range(20)),
        ]
    },
    "from anywhere but many": {
        "from": [
            {"ipBlock": {"cidr": "0.0.0.0/0", "except": [f"203.0.113.{n}/32" for n in range(20)]}},
            {"ipBlock": {"cidr": "::/0", "except": [f"2001:db8:{n:x}::/48" for n in range(20)]}},
        ]
    },
    "neighbouring blocks": {"from": [{"ipBlock": {"cidr": f"10.0.{n}.0/24"}} for n in range(40)]},
    "all ports as a range": {"ports": [{"port": 1, "endPort": 65535}]},
    "many ranges": {"ports": [{"port": n, "endPort": n + 2} for n in range(1, 300, 5)]},
    "neighbouring ranges": {"ports": [{"port": n, "endPort": n + 4} for n in range(1, 300, 5)]},
    "ten thousand ports": {"ports": [{"port": 2 * n + 1} for n in range(10_000)]},
    "ports of all protocols": {
        "ports": [{"port": 80 + n, "protocol": of} for n in range(3) for of in ("TCP", "UDP", "SCTP")]
    },
    "long names": {
        "from": [
            {
                "podSelector": {
                    "matchExpressions": [{"key": f"{'k' * 60}{n}", "operator": "Exists"} for n in range(9)]
                }
            }
        ]
    },
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rules_load_and_are_read_back(with_kernel: WithKernel, name: str) -> None:
    world = World(
        namespace("shop"),
        pod("shop/api", "10.244.0.2", "fd00:10:244::2"),
        policy(f"shop/{'p' * 200}", ingress=[EXTREME[name]]),
    )

    async def body(kernel: Kernel) -> Any:
        await _commit(kernel, Ruleset(), world.ruleset)
        return await _left(kernel, world.ruleset)

    assert with_kernel(body) == {}


# Forged errors

A, B, C = (pod(f"shop/{name}", f"10.244.0.1{n}", app=name) for n, name in enumerate("abc"))
ADDRESS = {name: f"10.244.0.1{n}" for n, name in enumerate("abc")}
SERVICE, PORT = "10.96.0.10", 7000
MAC = "ee:ee:ee:ee:ee:ee"
NETNS = {name: f"podwall-test-{os.getpid()}-{name}" for name in "abc"}
DNAT = f"""table inet podwall_test {{ chain c {{ type nat hook prerouting priority -100;
    ip daddr {SERVICE} dnat ip to {ADDRESS["b"]}; }}; }}
"""


@pytest.fixture
def pods(netns: None) -> Iterator[None]:
    """Three Pods on a node that routes between them."""
    try:
        commands(
            "ip link set lo up", "sysctl -qw net.ipv4.ip_forward=1", "sysctl -qw net.ipv4.icmp_ratelimit=0"
        )
        for number, (name, of) in enumerate(zip("abc", (A, B, C), strict=True)):
            mac, link, inside = f"02:00:00:00:00:0{number}", link_of(of), f"ip -n {NETNS[name]}"
            peer = f"peer name eth0 address {mac} netns {NETNS[name]}"
            commands(
                f"ip netns add {NETNS[name]}",
                f"ip link add {link} address {MAC} type veth {peer}",
                f"ip link set {link} up",
                f"{inside} link set eth0 up",
                f"{inside} addr add {ADDRESS[name]}/32 dev eth0",
                f"{inside} route add 169.254.1.1 dev eth0",
                f"{inside} route add default via 169.254.1.1",
                f"{inside} neigh add 169.254.1.1 lladdr {MAC} dev eth0",
                f"ip route add {ADDRESS[name]} dev {link}",
                f"ip neigh add {ADDRESS[name]} lladdr {mac} dev {link}",
            )
        yield
    finally:
        for name in NETNS.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _socket(pod_name: str, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
    namespaces.pushns(NETNS[pod_name])
    try:
        made = socket.socket(socket.AF_INET, kind, protocol)
    finally:
        namespaces.popns()
    made.setblocking(False)
    return made


def _error_about(source: tuple[str, int], target: tuple[str, int]) -> bytes:
    """An ICMP "port unreachable" that quotes a datagram."""
    udp = struct.pack("!HHHH", source[1], target[1], 9, 0)
    packed = [socket.inet_aton(end[0]) for end in (source, target)]
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 29, 1, 0, 64, socket.IPPROTO_UDP, 0, *packed)
    header = header[:10] + struct.pack("!H", _checksum(header)) + header[12:]
    body = struct.pack("!BBHI", 3, 3, 0, 0) + header + udp
    return body[:2] + struct.pack("!H", _checksum(body)) + body[4:]


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


async def _error_arrives(asking: socket.socket, wait_s: float) -> bool:
    """Whether the asking socket hears that it was refused."""
    try:
        async with asyncio.timeout(wait_s):
            await asyncio.get_running_loop().sock_recv(asking, 100)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    return False


async def _ask(forge: bool) -> bool:
    """A asks the Service; B answers with an error, or holds its tongue while C forges one."""
    with (
        _socket("a", socket.SOCK_DGRAM) as asking,
        _socket("b", socket.SOCK_DGRAM) as listening,
        _socket("c", socket.SOCK_RAW, socket.IPPROTO_ICMP) as forging,
    ):
        if forge:
            listening.bind((ADDRESS["b"], PORT))
        asking.bind((ADDRESS["a"], 40000))
        asking.connect((SERVICE, PORT))
        asking.send(b"question")
        if not forge:
            return await _error_arrives(asking, 5)
        async with asyncio.timeout(5):
            await asyncio.get_running_loop().sock_recv(listening, 100)
        forging.sendto(_error_about((ADDRESS["a"], 40000), (ADDRESS["b"], PORT)), (ADDRESS["a"], 0))
        return await _error_arrives(asking, 0.5)


ISOLATED = World(namespace("shop"), A, B, C, policy("shop/deny", podSelector={"matchLabels": {"app": "a"}}))
LINKS_ALONE = Ruleset(
    (
        *links.static(),
        *(
            item
            for of, address in zip((A, B, C), ADDRESS.values(), strict=True)
            for item in links.link(link_of(of), [ip_address(address)], "shop", of["metadata"]["name"])
        ),
    )
)
FORGED = {
    "the real end's error arrives": (ISOLATED.ruleset, False, True),
    "another Pod's forged error does not": (ISOLATED.ruleset, True, False),
    "without policy's chains it would": (LINKS_ALONE, True, True),
}


@pytest.mark.parametrize("name", FORGED)
def test_errors_about_a_translated_flow(pods: None, with_kernel: WithKernel, name: str) -> None:
    rules, forge, expected = FORGED[name]

    async def body(kernel: Kernel) -> bool:
        await kernel.commit(DNAT)
        await _commit(kernel, Ruleset(), rules)
        return await _ask(forge)

    assert with_kernel(body) is expected
