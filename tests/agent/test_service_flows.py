"""Flows of Services that must end: the whole table of cases, and real flows of both families.

client 10.7.1.2, fd07:1::2  --  node  --  10.7.2.2 and .3, fd07:2::2 and ::3
Service 10.7.96.1:53, [fd07:96::1]:53
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from agent.conntrack import Ended, Endpoint, Ends, Flow, list_flows
from agent.nft.model import CtStatus, Proto
from agent.service_flows import PROTOCOLS, Destination, Target, end_stale, must_end
from tests.agent.sides import Sides, entered

CLIENT = Endpoint(ip_address("10.244.1.7"), 41000)
FRONTEND = Endpoint(ip_address("10.96.0.10"), 53)
HERE = Endpoint(ip_address("10.244.2.9"), 5353)
GONE = Endpoint(ip_address("10.244.2.8"), 5353)
NODE = Endpoint(ip_address("172.18.0.2"), 41001)
SERVES = Target(frozenset({HERE}))
EMPTY = Target(frozenset())


def flow(to: Endpoint, seen_from: Endpoint = CLIENT) -> Flow:
    return Flow(
        protocol=Proto.UDP,
        original=Ends(CLIENT, FRONTEND),
        reply=Ends(to, seen_from),
        status=CtStatus(0),
    )


CASES: dict[str, tuple[Flow, Target | None, bool, bool]] = {
    "to an endpoint": (flow(HERE), SERVES, False, False),
    "to an endpoint, under the node's address": (flow(HERE, NODE), SERVES, False, False),
    "to one that is gone": (flow(GONE), SERVES, False, True),
    "to one that is gone, under the node's address": (flow(GONE, NODE), SERVES, False, True),
    "to another port of an endpoint": (flow(HERE._replace(port=53)), SERVES, False, True),
    "to the last endpoint, which is gone": (flow(GONE), EMPTY, False, True),
    "not translated, and there are endpoints": (flow(FRONTEND), SERVES, False, True),
    "not translated, and there are none": (flow(FRONTEND), EMPTY, False, False),
    "not translated where only some are": (flow(FRONTEND), Target(frozenset({HERE}), False), False, False),
    "translated where only some are": (flow(GONE), Target(frozenset({HERE}), False), False, True),
    "to a Service that is gone": (flow(GONE), None, True, True),
    "not translated, to a Service that is gone": (flow(FRONTEND), None, True, False),
    "translated by somebody else": (flow(GONE), None, False, False),
    "nobody's": (flow(FRONTEND), None, False, False),
    "nobody's, under the node's address": (flow(FRONTEND, NODE), None, True, False),
}


@pytest.mark.parametrize(("flow", "target", "was_frontend", "ends"), CASES.values(), ids=CASES.keys())
def test_who_ends(flow: Flow, target: Target | None, was_frontend: bool, ends: bool) -> None:
    assert must_end(flow, target, was_frontend) is ends


# Real flows

SERVICE = {4: "10.7.96.1", 6: "fd07:96::1"}
OTHER = {4: "10.7.96.2", 6: "fd07:96::2"}
ENDPOINTS = {4: ("10.7.2.2", "10.7.2.3"), 6: ("fd07:2::2", "fd07:2::3")}
RULES = """
table inet podwall_test {
    map to4 { type ipv4_addr . inet_service : ipv4_addr . inet_service; }
    map to6 { type ipv6_addr . inet_service : ipv6_addr . inet_service; }
    chain services {
        type nat hook prerouting priority -100;
        meta l4proto { tcp, udp } dnat ip to ip daddr . th dport map @to4
        meta l4proto { tcp, udp } dnat ip6 to ip6 daddr . th dport map @to6
    }
}
"""


class World(Sides):
    """The sides, with two endpoints on the right, to which everything goes that the node has no route to."""

    def build(self) -> None:
        super().build()
        second = "addr add 10.7.2.3/24 dev eth0\naddr add fd07:2::3/64 dev eth0 nodad"
        self.run("right", "ip", "-batch", "-", data=second)
        self.run("node", "nft", "-f", "-", data=RULES)
        for version in (4, 6):
            self.run("node", "ip", f"-{version}", "route", "add", "default", "dev", "right")

    def translate(self, version: int, address: str, port: int, *endpoints: str) -> None:
        """Lead an address and port to an endpoint's port 5353, or (none given) nowhere."""
        table = f"inet podwall_test to{version}"
        elements = (f"add element {table} {{ {address} . {port} : {each} . 5353 }}\n" for each in endpoints)
        self.run("node", "nft", "-f", "-", data=f"flush map {table}\n{''.join(elements)}")

    def server(self, version: int, address: str, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        made = self.open("right", version, kind)
        made.bind((address, 5353))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made


@pytest.fixture
def world() -> Iterator[World]:
    with entered(World()) as made:
        yield made


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def frontend(version: int, address: dict[int, str] = SERVICE) -> Destination:
    return Destination(ip_address(address[version]), Proto.UDP, 53)


def target(*endpoints: str) -> Target:
    return Target(frozenset(Endpoint(ip_address(each), 5353) for each in endpoints))


def end(
    targets: dict[Destination, Target], gone: frozenset[Destination] = frozenset(), local: str = ""
) -> Ended:
    addresses = frozenset({ip_address(local)} if local else ())
    return asyncio.run(end_stale(targets.get, gone, addresses))


def known() -> set[tuple[Endpoint, Endpoint]]:
    """UDP flows of Services: where they were sent, and where they lead."""
    flows = asyncio.run(list_flows(protocols=PROTOCOLS))
    return {(each.original.destination, each.destination) for each in flows}


@pytest.mark.parametrize("version", [4, 6])
def test_the_next_datagram_goes_to_another_endpoint_and_other_flows_go_on(
    world: World, stack: contextlib.ExitStack, version: int
) -> None:
    old, new = ENDPOINTS[version]
    servers = [stack.enter_context(world.server(version, each)) for each in (old, new)]
    stream = stack.enter_context(world.server(version, old, socket.SOCK_STREAM))
    clients = [stack.enter_context(world.open("left", version, socket.SOCK_DGRAM)) for _ in range(3)]
    world.translate(version, SERVICE[version], 53, old)
    connection = stack.enter_context(world.open("left", version, socket.SOCK_STREAM))
    connection.connect((SERVICE[version], 53))
    accepted = stack.enter_context(stream.accept()[0])
    for client, to in zip(clients, [(SERVICE[version], 53)] * 2 + [(old, 5353)], strict=True):
        client.sendto(b"before", to)
        assert servers[0].recv(100) == b"before"
    world.translate(version, SERVICE[version], 53, new)
    clients[0].sendto(b"still", (SERVICE[version], 53))
    assert servers[0].recv(100) == b"still"  # the rules alone do not end it
    assert end({frontend(version): target(new)}) == Ended(2, 0)
    clients[0].sendto(b"after", (SERVICE[version], 53))
    assert servers[1].recv(100) == b"after"
    clients[2].sendto(b"straight to it", (old, 5353))
    assert servers[0].recv(100) == b"straight to it"
    connection.sendall(b"and TCP")
    assert accepted.recv(100) == b"and TCP"
    assert end({frontend(version): target(new)}) == Ended()


@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_that_began_before_its_service_had_endpoints(
    world: World, stack: contextlib.ExitStack, version: int
) -> None:
    server = stack.enter_context(world.server(version, ENDPOINTS[version][0]))
    client = stack.enter_context(world.open("left", version, socket.SOCK_DGRAM))
    for address in (SERVICE, OTHER):
        client.sendto(b"to nobody", (address[version], 53))
    assert end({frontend(version): target()}) == Ended()
    world.translate(version, SERVICE[version], 53, ENDPOINTS[version][0])
    assert end({frontend(version): target(ENDPOINTS[version][0])}) == Ended(1, 0)
    client.sendto(b"after", (SERVICE[version], 53))
    assert server.recv(100) == b"after"
    assert (Endpoint(ip_address(OTHER[version]), 53),) * 2 in known()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("any_address", [False, True], ids=["an address", "a port of the node"])
def test_a_frontend_that_is_gone(
    world: World, stack: contextlib.ExitStack, version: int, any_address: bool
) -> None:
    server = stack.enter_context(world.server(version, ENDPOINTS[version][0]))
    client = stack.enter_context(world.open("left", version, socket.SOCK_DGRAM))
    world.translate(version, SERVICE[version], 53, ENDPOINTS[version][0])
    client.sendto(b"before", (SERVICE[version], 53))
    assert server.recv(100) == b"before"
    assert end({}) == Ended(), "what was never podwall's"
    gone = Destination(None, Proto.UDP, 53) if any_address else frontend(version)
    assert end({}, frozenset({gone}), SERVICE[version]) == Ended(1, 0)
    assert not known()
