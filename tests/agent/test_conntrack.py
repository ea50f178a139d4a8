"""Real flows through a forwarding node: what conntrack says of them, and that exactly the ended ones end.

left 10.7.1.2, fd07:1::2  --  node  --  right 10.7.2.2, fd07:2::2        10.7.96.1:80, [fd07:96::1]:80: DNAT
"""

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.conntrack import (
    Conntrack,
    ConntrackError,
    Ended,
    Endpoint,
    Flow,
    decode,
    end_denied,
    end_flows,
    list_flows,
    to_end,
)
from agent.nft.model import CtStatus
from tests.agent.sides import LIMIT_S, Sides, entered

SILENCE_S = 0.3  # retransmissions begin after 0.2 s
LEFT = {4: "10.7.1.2", 6: "fd07:1::2"}
RIGHT = {4: "10.7.2.2", 6: "fd07:2::2"}
SERVICE = {4: "10.7.96.1", 6: "fd07:96::1"}
RULES = """
table inet podwall_test {
    set denied { type inet_service; }
    chain forward {
        type filter hook forward priority 0; policy accept;
        ct state established accept
        tcp flags & (fin | syn | rst | ack) != syn counter drop
        th dport @denied drop
    }
    chain services {
        type nat hook prerouting priority -100;
        ip daddr 10.7.96.1 tcp dport 80 dnat ip to 10.7.2.2:8080
        ip6 daddr fd07:96::1 tcp dport 80 dnat ip6 to [fd07:2::2]:8080
        ip daddr 10.7.96.1 udp dport 53 dnat ip to numgen inc mod 2 map { 0 : 10.7.2.2, 1 : 10.7.2.3 }
    }
    chain leaving {
        type nat hook postrouting priority 100;
        th dport 9999 masquerade
    }
}
"""


class World(Sides):
    """The sides, with rules that deny ports and translate the Service's addresses."""

    def build(self) -> None:
        super().build()
        self.run("node", "nft", "-f", "-", data=RULES)
        self.run("left", "sysctl", "-qw", "net.ipv4.ping_group_range=0 0")

    def deny(self, port: int) -> None:
        self.run("node", "nft", "add", "element", "inet", "podwall_test", "denied", f"{{ {port} }}")

    def listener(self, version: int, kind: int, port: int) -> socket.socket:
        made = self.open("right", version, kind)
        made.bind((RIGHT[version], port))
        if kind == socket.SOCK_STREAM:
            made.listen(64)
        return made


@pytest.fixture
def world() -> Iterator[World]:
    with entered(World()) as made:
        yield made


@pytest.fixture
def open_sockets() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def flows_of(*addresses: str) -> tuple[Flow, ...]:
    return asyncio.run(list_flows(frozenset(map(ip_address, addresses))))


def streams(
    world: World, stack: contextlib.ExitStack, version: int, count: int, target: tuple[str, int]
) -> list[tuple[socket.socket, socket.socket]]:
    """TCP connections from left to a listener on the right, both ends."""
    listener = stack.enter_context(world.listener(version, socket.SOCK_STREAM, 8080))
    found = []
    for _ in range(count):
        near = stack.enter_context(world.open("left", version, socket.SOCK_STREAM))
        near.connect(target)
        far, _ = listener.accept()
        far.settimeout(LIMIT_S)
        found.append((near, stack.enter_context(far)))
    return found


def exchange(near: socket.socket, far: socket.socket, data: bytes) -> bytes:
    """Send there, and back what arrived."""
    near.sendall(data)
    arrived = b""
    while len(arrived) < len(data):
        arrived += far.recv(65536)
    far.sendall(arrived)
    back = b""
    while len(back) < len(data):
        back += near.recv(65536)
    return back


def silent(*ends: socket.socket) -> bool:
    """Whether nothing arrives at any end for a while."""
    for end in ends:
        end.settimeout(SILENCE_S / len(ends))
        with contextlib.suppress(TimeoutError):
            if end.recv(1):
                return False
    return True


@pytest.mark.parametrize("version", [4, 6])
def test_ended_tcp_is_cut_and_others_lose_nothing(
    world: World, open_sockets: contextlib.ExitStack, version: int
) -> None:
    pairs = streams(world, open_sockets, version, 20, (RIGHT[version], 8080))
    for near, far in pairs:
        assert exchange(near, far, b"before") == b"before"
    ports = {near.getsockname()[1] for near, _ in pairs[:5]}
    flows = flows_of(LEFT[version])
    assert len(flows) == 20
    assert asyncio.run(end_flows(to_end(flows, lambda flow: flow.source.port not in ports))) == Ended(5, 0)
    for near, far in pairs[:5]:
        near.sendall(b"from the side that began")
        far.sendall(b"from the other")
    load = os.urandom(200_000)
    for near, far in pairs[5:]:
        assert exchange(near, far, load[:50_000]) == load[:50_000]
    assert silent(*(end for pair in pairs[:5] for end in pair))
    assert {flow.source.port for flow in flows_of(LEFT[version])} == {
        near.getsockname()[1] for near, _ in pairs[5:]
    }


@pytest.mark.parametrize("version", [4, 6])
def test_ended_udp_is_judged_anew(world: World, open_sockets: contextlib.ExitStack, version: int) -> None:
    far = {
        port: open_sockets.enter_context(world.listener(version, socket.SOCK_DGRAM, port))
        for port in (5001, 5002)
    }
    near = open_sockets.enter_context(world.open("left", version, socket.SOCK_DGRAM))
    for port, end in far.items():
        near.sendto(b"before", (RIGHT[version], port))
        data, peer = end.recvfrom(100)
        end.sendto(data, peer)
        assert near.recv(100) == b"before"
    world.deny(5001)
    near.sendto(b"still", (RIGHT[version], 5001))
    assert far[5001].recv(100) == b"still"  # established: the rules alone do not end it

    async def judge() -> Callable[[Flow], bool]:
        return lambda flow: flow.destination.port != 5001

    assert asyncio.run(end_denied(judge, {ip_address(RIGHT[version])})) == Ended(1, 0)
    for port in far:
        near.sendto(b"after", (RIGHT[version], port))
    assert far[5002].recv(100) == b"after"
    assert silent(far[5001])


@pytest.mark.parametrize("version", [4, 6])
def test_real_ends_behind_dnat(world: World, open_sockets: contextlib.ExitStack, version: int) -> None:
    ((near, far),) = streams(world, open_sockets, version, 1, (SERVICE[version], 80))
    (flow,) = flows_of(RIGHT[version])
    assert flow.protocol == socket.IPPROTO_TCP
    assert flow.source == Endpoint(ip_address(LEFT[version]), near.getsockname()[1])
    assert flow.original.destination == Endpoint(ip_address(SERVICE[version]), 80)
    assert flow.destination == Endpoint(ip_address(RIGHT[version]), 8080)
    assert flow.status & CtStatus.DNAT
    assert not flow.status & CtStatus.SNAT
    assert flows_of(SERVICE[version]) == ()
    assert asyncio.run(end_flows([flow])) == Ended(1, 0)
    near.sendall(b"x")
    assert silent(far)


@pytest.mark.parametrize("version", [4, 6])
def test_source_before_masquerade(world: World, open_sockets: contextlib.ExitStack, version: int) -> None:
    near = open_sockets.enter_context(world.open("left", version, socket.SOCK_DGRAM))
    far = open_sockets.enter_context(world.listener(version, socket.SOCK_DGRAM, 9999))
    near.sendto(b"x", (RIGHT[version], 9999))
    seen = ip_address(far.recvfrom(10)[1][0])
    (flow,) = flows_of(LEFT[version])
    assert (flow.source.address, flow.destination) == (
        ip_address(LEFT[version]),
        Endpoint(ip_address(RIGHT[version]), 9999),
    )
    assert flow.reply.destination.address == seen != ip_address(LEFT[version])
    assert flow.status & CtStatus.SNAT


@pytest.mark.parametrize(("version", "request_type"), [(4, 8), (6, 128)])
def test_icmp(world: World, open_sockets: contextlib.ExitStack, version: int, request_type: int) -> None:
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    near = open_sockets.enter_context(world.open("left", version, socket.SOCK_DGRAM, protocol))
    near.sendto(struct.pack("!BBHHH", request_type, 0, 0, 0, 1), (RIGHT[version], 0))
    near.recv(100)
    (flow,) = (flow for flow in flows_of(LEFT[version]) if flow.icmp and flow.icmp.type == request_type)
    assert flow.protocol == protocol
    assert flow.icmp
    assert flow.icmp.code == 0
    assert (flow.source.port, flow.destination.port) == (0, 0)
    assert flow.icmp.id == near.getsockname()[1]
    assert asyncio.run(end_flows([flow])) == Ended(1, 0)


def test_a_successor_with_another_translation_stays(world: World, open_sockets: contextlib.ExitStack) -> None:
    """The same original tuple, perhaps even in the same memory, but another Pod answers."""
    near = open_sockets.enter_context(world.open("left", 4, socket.SOCK_DGRAM))
    near.sendto(b"x", (SERVICE[4], 53))
    (old,) = flows_of(LEFT[4])
    assert asyncio.run(end_flows([old])) == Ended(1, 0)
    near.sendto(b"x", (SERVICE[4], 53))
    (new,) = flows_of(LEFT[4])
    assert new.original == old.original
    assert new.destination.address != old.destination.address
    assert asyncio.run(end_flows([old])) == Ended(0, 1)
    assert flows_of(LEFT[4]) == (new,)


def test_many_flows_and_many_that_are_gone(world: World, open_sockets: contextlib.ExitStack) -> None:
    near = open_sockets.enter_context(world.open("left", 4, socket.SOCK_DGRAM))
    other = open_sockets.enter_context(world.open("left", 6, socket.SOCK_DGRAM))
    for port in range(1, 20_001):
        near.sendto(b"", (RIGHT[4], port))
    other.sendto(b"", (RIGHT[6], 1))
    with Conntrack() as conntrack:
        begun = time.process_time()
        flows = conntrack.flows()
        assert len([flow for flow in flows if flow.protocol == socket.IPPROTO_UDP]) >= 20_001
        few = conntrack.flows({ip_address(LEFT[6])})
        assert {flow.source.address for flow in few} == {ip_address(LEFT[6])}
        assert conntrack.end(flows).ended >= 20_001 - 50  # a reply may have ended one
        assert conntrack.end(flows[:1000]) == Ended(0, 1000)
        assert time.process_time() - begun < 2.0
        assert conntrack.flows() == ()
        assert conntrack.end([]) == Ended(0, 0)


def test_what_did_not_come_from_the_kernel_is_refused(
    world: World, open_sockets: contextlib.ExitStack
) -> None:
    """A deletion without a tuple would delete every flow."""
    near = open_sockets.enter_context(world.open("left", 4, socket.SOCK_DGRAM))
    near.sendto(b"", (RIGHT[4], 5))
    (flow,) = flows_of(LEFT[4])
    made = Flow(protocol=17, original=flow.original, reply=flow.reply, status=flow.status)
    with pytest.raises(ValueError, match="did not come from the kernel"):
        asyncio.run(end_flows([flow, made]))
    assert flows_of(LEFT[4]) == (flow,)


def test_a_listing_that_is_cancelled_before_it_begins_holds_nothing_open(world: World) -> None:
    """Every thread is busy, so that the listing waits for one."""
    busy = threading.Event()

    async def story() -> set[str]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        waiting = loop.run_in_executor(None, busy.wait)
        listing = asyncio.create_task(list_flows())
        await asyncio.sleep(0)
        before = sockets()
        listing.cancel()
        await asyncio.wait([listing])
        closed = before - sockets()
        busy.set()
        await waiting
        return closed

    assert len(asyncio.run(story())) == 1


def sockets() -> set[str]:
    found = set()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found.add(str(each.readlink()))
    return {each for each in found if each.startswith("socket:")}


def test_the_kernels_refusal_is_told() -> None:
    conntrack = Conntrack()
    conntrack.close()
    with pytest.raises(ConntrackError, match="cannot list"):
        conntrack.flows()


@given(st.binary(max_size=200), st.sampled_from([2, 10, 0, 255]))
def test_nothing_from_the_kernel_raises(data: bytes, family: int) -> None:
    decode(bytes([family]) + data)


@given(st.data())
def test_damaged_entries_are_no_flows_or_others(data: st.DataObject) -> None:
    entry = bytearray(ENTRY)
    for place in data.draw(st.lists(st.integers(0, len(entry) - 1), max_size=4)):
        entry[place] = data.draw(st.integers(0, 255))
    decode(bytes(entry[: data.draw(st.integers(0, len(entry)))]))


ENTRY = bytes.fromhex(
    "02000000" "34000180" "14000180" "080001000a070102" "080002000a070202"
    "1c000280" "0500010011000000" "06000200a0010000" "06000300138a0000"
    "34000280" "14000180" "080001000a070202" "080002000a070102"
    "1c000280" "0500010011000000" "06000200138a0000" "06000300a0010000"
    "0800030000000008" "08000c0012345678"
)  # fmt: skip


def test_an_entry() -> None:
    flow = decode(ENTRY)
    assert flow
    assert flow.source == Endpoint(ip_address("10.7.1.2"), 0xA001)
    assert flow.destination == Endpoint(ip_address("10.7.2.2"), 5002)
    assert (flow.protocol, flow.id, flow.status) == (17, 0x12345678, CtStatus.CONFIRMED)
    assert decode(ENTRY, {ip_address("10.7.1.2").packed}) == flow
    assert decode(ENTRY, {ip_address("10.7.1.3").packed}) is None
