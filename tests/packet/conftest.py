"""Two nodes with the real links, rules and routes, and three Pods: who attacks, who is beside, who is far.

    node1 192.168.66.1 fd66::1 -- lan -- node2 192.168.66.2 fd66::2
      attacker, neighbour                  remote
                                           also 192.168.99.2 and fd99::2, which no Node object says

The Pods' links are made by `agent.pods.wiring`; the rules are those of `agent.compile.links`, `tunnel` and
`verdicts` (without any policy) as nft loads them; the routes come from `agent.routes`. Every Pod and node has
a UDP socket on PORT: a packet that arrives is seen twice, on the wire and by the one it was meant for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent.cluster.model import IPAddress, Node
from agent.compile import links, tunnel, verdicts
from agent.nft import render
from agent.nft.model import Item, Ruleset
from agent.node import settle
from agent.pods.model import Attachment, identities
from agent.pods.wiring import Wiring
from agent.routes.kernel import RouteKernel
from agent.routes.plan import Mode, Plan, plan_routes
from cni.spec import AttachmentKey
from lab import netns
from lab.capture import Capture
from tests.linux import command

PORT = 4444
VXLAN_ID, VXLAN_PORT = 9619, 4789
WORLDS = itertools.count(1)
PODS = {"attacker": (1, 11), "neighbour": (1, 12), "remote": (2, 13)}


@dataclass
class Place:
    """A node or a Pod: its namespace, its addresses, a socket that receives, a capture of what comes in."""

    name: str
    netns: str
    addresses: dict[int, IPAddress] = field(default_factory=dict)
    mac: str = ""
    host_mac: str = ""
    link: str = ""
    sockets: dict[int, socket.socket] = field(default_factory=dict)
    capture: Capture | None = None

    @property
    def path(self) -> Path:
        return netns.path(self.netns)

    def ip(self, *arguments: str) -> str:
        return command("ip", "-n", self.netns, *arguments)

    def batch(self, lines: str) -> None:
        command("ip", "-n", self.netns, "-batch", "-", data=lines)

    def nft(self, text: str) -> str:
        return command("ip", "netns", "exec", self.netns, "nft", "-f", "-", data=text)

    def counters(self) -> dict[str, int]:
        """What the kernel of this place counted, IPv4 and IPv6."""
        counted = {}
        for line in netns.run(self.path, Path("/proc/thread-self/net/snmp6").read_text).splitlines():
            counted[line.split()[0]] = int(line.split()[1])
        lines = netns.run(self.path, Path("/proc/thread-self/net/snmp").read_text).splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            kind, *columns = names.split()
            counted |= {kind + name: int(n) for name, n in zip(columns, values.split()[1:], strict=True)}
        return counted

    def listen(self) -> None:
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            self.sockets[version] = netns.run(self.path, _bound, family)
        self.capture = Capture(self.path, "eth0", incoming_only=True)

    def received(self) -> list[bytes]:
        """What the sockets have got since the last time."""
        got = []
        for sock in self.sockets.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    got.append(sock.recv(65536))
        return got


def _bound(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("", PORT))
    sock.setblocking(False)
    return sock


@dataclass
class World:
    """Places by name, and the plan of each node."""

    mode: Mode
    places: dict[str, Place] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    attachments: dict[str, Attachment] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(WORLDS))

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    def add(self, name: str) -> Place:
        place = self.places[name] = Place(name, f"podwall-pk{os.getpid()}-{self.number}-{name}")
        netns.create(place.netns)
        return place

    def close(self) -> None:
        for place in self.places.values():
            if place.capture:
                place.capture.close()
            for sock in place.sockets.values():
                sock.close()
            netns.remove(place.netns)

    def rules(self, name: str) -> str:
        """The node's rules as text."""
        items: list[Item] = [*links.static(), *verdicts.static(), *links.cluster(self.nodes.values())]
        items += tunnel.items(name, self.nodes.values(), self.plans[name])
        for pod, attachment in self.attachments.items():
            if f"node{PODS[pod][0]}" == name:
                items += links.link(attachment.link, attachment.addresses, "default", pod)
        return render.ruleset(Ruleset(items))


def _node_mac(number: int) -> str:
    return f"02:66:00:00:00:0{number}"


def _node(world: World, number: int) -> None:
    """A node that knows the other one's MAC, so that nothing but packets of the test crosses the link."""
    place, other = world.add(f"node{number}"), 3 - number
    world["lan"].batch(
        f"""link add name node{number} type veth peer name eth0 netns {place.netns}
        link set dev node{number} master bridge up"""
    )
    place.batch(
        f"""addr add 192.168.66.{number}/24 dev eth0
        addr add fd66::{number}/64 dev eth0 nodad
        link set eth0 address {_node_mac(number)} addrgenmode none
        link set eth0 up
        neigh add 192.168.66.{other} lladdr {_node_mac(other)} dev eth0 nud permanent
        neigh add fd66::{other} lladdr {_node_mac(other)} dev eth0 nud permanent
        route add default via 192.168.66.{other}
        route add default via fd66::{other}"""
    )
    place.addresses = {4: ip_address(f"192.168.66.{number}"), 6: ip_address(f"fd66::{number}")}
    world.nodes[place.name] = Node(
        name=place.name,
        internal_ips=tuple(place.addresses.values()),
        pod_cidrs=(ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:10:{number}::/64")),
    )


QUIET = """table inet podwalltest {
    chain out {
        type filter hook output priority 0
        oifname { "eth0", "podwall-vxlan" } icmpv6 type mld2-listener-report drop
    }
}"""
# The node's own reports about its own groups would stand among what a test sends; forwarded ones would pass.


async def _route(world: World, name: str) -> None:
    kernel = netns.run(world[name].path, RouteKernel)
    try:
        uplink = await kernel.uplink(world.nodes[name].internal_ips)
        world.plans[name] = plan_routes(
            name,
            world.nodes.values(),
            uplink,
            world.mode,
            vxlan_id=VXLAN_ID,
            vxlan_port=VXLAN_PORT,
        )
        changes = await kernel.sync(world.plans[name])
        assert changes.problems == ()
    finally:
        await kernel.close()


async def _wire(world: World, name: str) -> None:
    number, host = PODS[name]
    place, node = world.add(name), world[f"node{number}"]
    identity = next(identities(AttachmentKey(name * 4, "eth0")))
    place.addresses = {
        4: ip_address(f"10.244.{number}.{host}"),
        6: ip_address(f"fd00:10:{number}::{host}"),
    }
    place.mac, place.host_mac, place.link = identity.mac, identity.host_mac, identity.link
    world.attachments[name] = Attachment(
        container_id=name * 4,
        ifname="eth0",
        link=identity.link,
        namespace="default",
        pod=name,
        pod_uid="",
        addresses=tuple(place.addresses.values()),
        mac=identity.mac,
        host_mac=identity.host_mac,
        mtu=1430,
    )
    wiring = netns.run(node.path, Wiring)
    with place.path.open() as namespace:
        try:
            await wiring.attach(world.attachments[name], namespace.fileno())
        finally:
            await wiring.close()


async def _build(world: World) -> None:
    lan = world.add("lan")
    netns.run(lan.path, Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text, "1")
    lan.batch("link add bridge type bridge mcast_snooping 0\nlink set bridge up")
    for number in (1, 2):
        _node(world, number)
    world["node2"].batch("addr add 192.168.99.2/32 dev eth0\naddr add fd99::2/128 dev eth0 nodad")
    for name in world.nodes:
        world[name].nft(QUIET)
        _, problems = netns.run(world[name].path, settle, "eth0", world.mode, (4, 6))
        assert problems == ()
        await _route(world, name)
    for name in PODS:
        await _wire(world, name)
    for name in world.nodes:
        world[name].nft(world.rules(name))
    for name in (*world.nodes, *PODS):
        world[name].listen()


@contextlib.contextmanager
def _built(mode: Mode) -> Iterator[World]:
    whole = World(mode)
    try:
        asyncio.run(_build(whole))
        yield whole
    finally:
        whole.close()


@pytest.fixture(scope="module", params=["direct", "vxlan"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Two nodes and three Pods, the nodes joined in either way; the same for all tests of a module."""
    with _built(request.param) as whole:
        yield whole


@pytest.fixture
def new_world() -> Callable[[Mode], contextlib.AbstractContextManager[World]]:
    """Makes a world for a test that breaks it."""
    return _built
