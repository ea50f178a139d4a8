"""Services in a real kernel, with real TCP and UDP from everywhere.

    outside 192.0.2.7 ----+                      +---- Pod a 10.244.0.10   (serves 8080)
                          | 192.0.2.1            |
                        node 192.168.10.1 -------+---- Pod b 10.244.0.11   (serves 8080)
                          |                      +---- Pod c 10.244.0.12   (a client)
    other node 192.168.10.2, with Pod r 10.244.1.10 on it (serves 8080)

Each server answers with its name and with whom it sees. The same addresses exist in IPv6.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from msgspec.structs import replace
from pyroute2 import netns as namespaces

from agent.compile import links, verdicts
from agent.compile import service_chains as chains
from agent.compile.hostports import host_ports
from agent.compile.names import SERVICES_TABLE
from agent.compile.service import ServiceSettings
from agent.nft import diff
from agent.nft.kernel import Kernel
from agent.nft.model import Item, Ruleset
from cni.spec import PortMapping
from lab.limits import SLOWNESS
from tests.agent.compile.service_worlds import (
    NODE,
    ServiceWorld,
    decoded,
    endpoint,
    endpoint_slice,
    load_balancer,
    node,
    service,
)
from tests.linux import commands

WithKernel = Callable[[Callable[[Kernel], Coroutine[Any, Any, Any]]], Any]

MAC = "ee:ee:ee:ee:ee:ee"
SILENCE_S = 0.4 * SLOWNESS
PODS = {"a": 10, "b": 11, "c": 12}
HERE, OUTSIDE, OTHER = "", "outside", "other"
V4 = {
    "a": "10.244.0.10",
    "b": "10.244.0.11",
    "c": "10.244.0.12",
    "r": "10.244.1.10",
    "node": "192.168.10.1",
    "other": "192.168.10.2",
    "outside": "192.0.2.7",
    "gate": "192.0.2.1",
    "cluster": "10.96.0.1",
    "vip": "203.0.113.1",
}
V6 = {
    "a": "fd00:244::a",
    "b": "fd00:244::b",
    "c": "fd00:244::c",
    "r": "fd00:244:1::10",
    "node": "fd00:10::1",
    "other": "fd00:10::2",
    "outside": "2001:db8:2::7",
    "gate": "2001:db8:2::1",
    "cluster": "fd00:96::1",
    "vip": "2001:db8:113::1",
}
FAMILIES = {4: V4, 6: V6}
NAMES = {address: name for family in (V4, V6) for name, address in family.items()}


def _netns(name: str) -> str:
    return f"podwall-test-{os.getpid()}-{name}"


@pytest.fixture
def network(netns: None) -> Iterator[None]:
    """The node in the test's own namespace, all others beside it."""
    try:
        commands(
            "ip link set lo up",
            "sysctl -qw net.ipv4.conf.all.rp_filter=0",
            "sysctl -qw net.ipv4.conf.default.rp_filter=0",
            "sysctl -qw net.ipv4.ip_forward=1",
            "sysctl -qw net.ipv6.conf.all.forwarding=1",
            "sysctl -qw net.ipv6.conf.default.accept_dad=0",  # neighbours are asked from link-local addresses
            "sysctl -qw net.ipv4.icmp_ratelimit=0",
            "sysctl -qw net.ipv6.icmp.ratelimit=0",
        )
        for name, number in PODS.items():
            _pod(name, number)
        _neighbour(OUTSIDE, "up0", "gate")
        _neighbour(OTHER, "up1", "node")
        inside = f"ip -n {_netns(OTHER)}"
        for of in FAMILIES.values():
            commands(f"{inside} addr add {of['r']} dev lo", f"ip route add {of['r']} via {of['other']}")
            commands(f"ip route add default via {of['other']}")
        yield
    finally:
        for name in (*PODS, OUTSIDE, OTHER):
            subprocess.run(["ip", "netns", "del", _netns(name)], check=False, capture_output=True)


def _pod(name: str, number: int) -> None:
    inside, link, mac = f"ip -n {_netns(name)}", _link(name), f"02:00:00:00:00:{number:02x}"
    commands(
        f"ip netns add {_netns(name)}",
        f"ip link add {link} address {MAC} type veth peer name eth0 address {mac} netns {_netns(name)}",
        f"ip link set {link} addrgenmode none",
        f"ip link set {link} up",
        f"{inside} link set lo up",
        f"{inside} link set eth0 addrgenmode none",
        f"{inside} link set eth0 up",
        f"{inside} addr add {V4[name]}/32 dev eth0",
        f"{inside} addr add {V6[name]}/128 dev eth0 nodad",
        f"{inside} route add 169.254.1.1 dev eth0",
        f"{inside} route add default via 169.254.1.1",
        f"{inside} -6 route add default via fe80::1 dev eth0",
        f"{inside} neigh add 169.254.1.1 lladdr {MAC} dev eth0",
        f"{inside} neigh add fe80::1 lladdr {MAC} dev eth0",
    )
    for of in FAMILIES.values():
        commands(f"ip route add {of[name]} dev {link}", f"ip neigh add {of[name]} lladdr {mac} dev {link}")


def _link(name: str) -> str:
    return f"podwall000000{PODS[name]:02x}"


def _neighbour(name: str, link: str, own: str) -> None:
    """A host beside the node, which is its router."""
    inside = f"ip -n {_netns(name)}"
    commands(
        f"ip netns add {_netns(name)}",
        f"ip link add {link} type veth peer name eth0 netns {_netns(name)}",
        f"ip link set {link} up",
        f"ip netns exec {_netns(name)} sysctl -qw net.ipv6.conf.eth0.accept_dad=0",
        f"{inside} link set lo up",
        f"{inside} link set eth0 up",
        f"ip addr add {V4[own]}/24 dev {link}",
        f"ip addr add {V6[own]}/64 dev {link} nodad",
        f"{inside} addr add {V4[name]}/24 dev eth0",
        f"{inside} addr add {V6[name]}/64 dev eth0 nodad",
        f"{inside} route add default via {V4[own]}",
        f"{inside} -6 route add default via {V6[own]}",
    )


LINKS = (
    *links.static(),
    *verdicts.static(),
    *links.cluster(
        decoded(each)  # type: ignore[misc]  # these are Nodes
        for each in (
            node(NODE, V4["node"], V6["node"], cidrs=("10.244.0.0/24", "fd00:244::/64")),
            node(OTHER, V4["other"], V6["other"], cidrs=("10.244.1.0/24", "fd00:244:1::/64")),
        )
    ),
    *(
        item
        for name in PODS
        for item in links.link(_link(name), (ip_address(V4[name]), ip_address(V6[name])), "shop", name)
    ),
)
NODES = (
    node(NODE, V4["node"], V6["node"], cidrs=("10.244.0.0/24", "fd00:244::/64")),
    node(OTHER, V4["other"], V6["other"], cidrs=("10.244.1.0/24", "fd00:244:1::/64")),
)


class Rules:
    """The rules of a world in the kernel, brought there by their differences."""

    def __init__(
        self,
        kernel: Kernel,
        *manifests: Any,
        settings: ServiceSettings | None = None,
        extra: Iterable[Item] = (),
    ) -> None:
        self.kernel, self._extra = kernel, tuple(extra)
        self.world = ServiceWorld(*NODES, *manifests, settings=settings)
        self._there = Ruleset()

    async def commit(self) -> None:
        wanted = Ruleset((*LINKS, *self.world.ruleset.items(), *self._extra))
        await self.kernel.commit(diff.transaction(diff.difference(self._there, wanted), wanted))
        self._there = wanted
        assert diff.difference(await self.kernel.read(list(wanted.tables)), wanted) == {}

    async def only(self, *manifests: Any) -> None:
        """Let the cluster be exactly this, beside its nodes."""
        kept = {decoded(each).key for each in (*NODES, *manifests)}
        gone = [of for (_, key), of in self.world.objects.items() if key not in kept]
        self.world.take_away(*gone)
        await self.put(*manifests)

    async def put(self, *manifests: Any) -> None:
        self.world.put(*manifests)
        await self.commit()

    async def remove(self, *manifests: Any) -> None:
        self.world.remove(*manifests)
        await self.commit()


def _socket(where: str, version: int, kind: socket.SocketKind) -> socket.socket:
    """A socket of somebody; of the node itself with `HERE`."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    if where == HERE:
        made = socket.socket(family, kind)
    else:
        namespaces.pushns(_netns(where))
        try:
            made = socket.socket(family, kind)
        finally:
            namespaces.popns()
    made.setblocking(False)
    return made


@asynccontextmanager
async def _serving(*names: str, port: int = 8080) -> AsyncIterator[None]:
    """TCP and UDP servers; each says its name, the address and family it was asked from."""
    async with AsyncExitStack() as stack:
        for name in names:
            for version in FAMILIES:
                await stack.enter_async_context(_server(name, version, port))
        yield


@asynccontextmanager
async def _server(name: str, version: int, port: int) -> AsyncIterator[None]:
    where = OTHER if name == "r" else HERE if name == "node" else name
    address = FAMILIES[version][name]
    tcp = _socket(where, version, socket.SOCK_STREAM)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    udp = _socket(where, version, socket.SOCK_DGRAM)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{name} {writer.get_extra_info('peername')[0]}".encode())
        writer.close()

    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(f"{name} {addr[0]}".encode(), addr)

    tcp.bind((address, port))
    udp.bind((address, port))
    server = await asyncio.start_server(answer, sock=tcp)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Echo, sock=udp)
    try:
        yield
    finally:
        transport.close()
        server.close()
        await server.wait_closed()


async def ask(where: str, target: str, port: int, *, udp: bool = False) -> str:
    """Who answers, and whom it saw; or "refused", or "silence"."""
    version = ip_address(target).version
    with _socket(where, version, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as made:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SILENCE_S):
                await loop.sock_connect(made, (target, port))
                if udp:
                    await loop.sock_sendall(made, b"?")
                text = (await loop.sock_recv(made, 100)).decode()
        except TimeoutError:
            return "silence"
        except OSError as error:
            refused = {errno.ECONNREFUSED} | ({errno.EPERM} if where == HERE and udp else set())
            return "refused" if error.errno in refused else f"{error}"
    name, _, seen = text.partition(" ")
    return f"{name} sees {NAMES.get(seen, seen)}"


async def ask_often(where: str, target: str, port: int, times: int = 30) -> Counter[str]:
    return Counter([await ask(where, target, port) for _ in range(times)])


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def of(request: pytest.FixtureRequest) -> dict[str, str]:
    """The addresses of a family."""
    return FAMILIES[request.param]


BOTH = (V4["cluster"], V6["cluster"])
TCP_AND_UDP = (
    {"port": 80, "name": "t", "nodePort": 30080},
    {"port": 80, "name": "u", "nodePort": 30080, "protocol": "UDP"},
)


def web(*ready: str, **spec: Any) -> tuple[Any, ...]:
    """Service shop/web with these endpoints, of both families and protocols."""
    spec.setdefault("ports", TCP_AND_UDP)
    ports = ({"port": 8080, "name": "t"}, {"port": 8080, "name": "u", "protocol": "UDP"})
    slices = (
        endpoint_slice(
            f"shop/web-{version}",
            "web",
            *(endpoint(family[name], node=OTHER if name == "r" else NODE) for name in ready),
            ports=ports,
        )
        for version, family in FAMILIES.items()
        if ready
    )
    return service("shop/web", *BOTH, **spec), *slices


NODE_PORT: dict[str, Any] = {"type": "NodePort"}
BALANCED: dict[str, Any] = {"type": "LoadBalancer", "status": load_balancer(V4["vip"], V6["vip"])}
LOCAL = {"externalTrafficPolicy": "Local"}

# from where, to which address, port, of a Service with which endpoints: who answers and sees whom
WAYS: dict[str, tuple[tuple[str, str, int], str, dict[str, Any], str]] = {
    "a Pod, ClusterIP": (("c", "cluster", 80), "a", {}, "a sees c"),
    "a Pod, ClusterIP, endpoint on another node": (("c", "cluster", 80), "r", {}, "r sees c"),
    "the node, ClusterIP": ((HERE, "cluster", 80), "a", {}, "a sees node"),
    "the node, ClusterIP, other node": ((HERE, "cluster", 80), "r", {}, "r sees node"),
    "a Pod, itself": (("a", "cluster", 80), "a", {}, "a sees node or a sees gate"),
    "a Pod, itself by NodePort": (("a", "node", 30080), "a", NODE_PORT, "a sees node or a sees gate"),
    "outside, NodePort": ((OUTSIDE, "node", 30080), "a", NODE_PORT, "a sees outside"),
    "outside, NodePort of another address": ((OUTSIDE, "gate", 30080), "a", NODE_PORT, "a sees outside"),
    "outside, NodePort, other node": ((OUTSIDE, "node", 30080), "r", NODE_PORT, "r sees node"),
    "outside, NodePort, Local": ((OUTSIDE, "node", 30080), "a", {**NODE_PORT, **LOCAL}, "a sees outside"),
    "outside, NodePort, Local, other node": (
        (OUTSIDE, "node", 30080),
        "r",
        {**NODE_PORT, **LOCAL},
        "silence",
    ),
    "a Pod, NodePort": (("c", "node", 30080), "a", NODE_PORT, "a sees c"),
    "a Pod, NodePort, other node": (("c", "node", 30080), "r", NODE_PORT, "r sees c"),
    "a Pod, NodePort of another node": (("c", "other", 30080), "a", NODE_PORT, "a sees c"),
    "a Pod, NodePort of another node, Local": (
        ("c", "other", 30080),
        "a",
        {**NODE_PORT, **LOCAL},
        "refused",  # no podwall there: nobody listens
    ),
    "a Pod, NodePort, Local, other node": (("c", "node", 30080), "r", {**NODE_PORT, **LOCAL}, "r sees c"),
    "the node, NodePort": ((HERE, "node", 30080), "a", NODE_PORT, "a sees node"),
    "the node, NodePort, other node": ((HERE, "node", 30080), "r", NODE_PORT, "r sees node"),
    "the node, NodePort of another node": ((HERE, "other", 30080), "a", NODE_PORT, "a sees node"),
    "another node, NodePort": ((OTHER, "node", 30080), "a", NODE_PORT, "a sees other"),
    "another node, NodePort, Local": ((OTHER, "node", 30080), "a", {**NODE_PORT, **LOCAL}, "a sees other"),
    "outside, load balancer": ((OUTSIDE, "vip", 80), "a", BALANCED, "a sees outside"),
    "outside, load balancer, other node": ((OUTSIDE, "vip", 80), "r", BALANCED, "r sees node"),
    "outside, load balancer, Local": ((OUTSIDE, "vip", 80), "a", {**BALANCED, **LOCAL}, "a sees outside"),
    "outside, load balancer, Local, other": ((OUTSIDE, "vip", 80), "r", {**BALANCED, **LOCAL}, "silence"),
    "a Pod, load balancer, Local, other": (("c", "vip", 80), "r", {**BALANCED, **LOCAL}, "r sees c"),
    "the node, load balancer": ((HERE, "vip", 80), "r", BALANCED, "r sees node"),
    "nobody, a Pod": (("c", "cluster", 80), "", {}, "refused"),
    "nobody, the node": ((HERE, "cluster", 80), "", {}, "refused"),
    "nobody, outside": ((OUTSIDE, "node", 30080), "", NODE_PORT, "refused"),
    "nobody, outside, Local": ((OUTSIDE, "node", 30080), "", {**NODE_PORT, **LOCAL}, "refused"),
    "nobody, outside, load balancer": ((OUTSIDE, "vip", 80), "", BALANCED, "refused"),
    "nobody here, internal Local": (("c", "cluster", 80), "r", {"internalTrafficPolicy": "Local"}, "refused"),
    "another port of the ClusterIP": (("c", "cluster", 81), "a", {}, "refused"),
    "another port of the ClusterIP, node": ((HERE, "cluster", 81), "a", {}, "refused"),
}


@pytest.mark.parametrize("transport", ["TCP", "UDP"])
def test_ways(network: None, with_kernel: WithKernel, transport: str, of: dict[str, str]) -> None:
    """One way to a Service after the other, each ruleset made from the one before by the difference."""

    async def body(kernel: Kernel) -> dict[str, str]:
        rules, wrong = Rules(kernel), {}
        async with _serving("a", "r"):
            for way, ((where, target, port), endpoints, spec, expected) in WAYS.items():
                await rules.only(*web(*endpoints, **spec))
                seen = await ask(where, of[target], port, udp=transport == "UDP")
                if seen not in expected.split(" or "):
                    wrong[way] = seen
        return wrong

    assert with_kernel(body) == {}


# Session affinity

STICKY: dict[str, Any] = {"sessionAffinity": "ClientIP"}


def _for(seconds: int) -> dict[str, Any]:
    return {**STICKY, "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}


def test_clients_are_spread_without_affinity(
    network: None, with_kernel: WithKernel, of: dict[str, str]
) -> None:
    async def body(kernel: Kernel) -> Counter[str]:
        await Rules(kernel, *web("a", "b")).commit()
        async with _serving("a", "b"):
            return await ask_often("c", of["cluster"], 80, 100)

    seen = with_kernel(body)
    assert set(seen) == {"a sees c", "b sees c"}
    assert all(30 <= times <= 70 for times in seen.values()), seen  # 1 in 10,000 by chance


def test_a_client_stays_with_its_endpoint(network: None, with_kernel: WithKernel, of: dict[str, str]) -> None:
    """Also when others come and go; when its own goes, it gets another one and stays there."""

    async def body(kernel: Kernel) -> None:
        rules = Rules(kernel, *web("a", "r", **_for(60)))
        await rules.commit()
        async with _serving("a", "b", "r"):
            (first,) = await ask_often("c", of["cluster"], 80, 10)
            own = first[0]
            for others in ("ab", "abr", "br", "rab", own):
                await rules.put(*web(*dict.fromkeys((*others, own)), **_for(60)))
                assert set(await ask_often("c", of["cluster"], 80, 10)) == {first}, others
            left = [name for name in "abr" if name != own]
            await rules.put(*web(*left, **_for(60)))
            (second,) = await ask_often("c", of["cluster"], 80, 10)
            assert second[0] in left
            await rules.put(*web("a", "b", "r", **_for(60)))
            assert set(await ask_often("c", of["cluster"], 80, 10)) == {second}

    with_kernel(body)


def test_affinity_ends_after_its_timeout(network: None, with_kernel: WithKernel, of: dict[str, str]) -> None:
    """Every connection begins it anew; when none came for so long the client may get anybody."""

    async def body(kernel: Kernel) -> bool:
        await Rules(kernel, *web("a", "b", **_for(1))).commit()
        async with _serving("a", "b"):
            (first,) = await ask_often("c", of["cluster"], 80, 10)
            for _ in range(13):  # each time another one by chance of one half
                await _entries_end(kernel)
                (seen,) = await ask_often("c", of["cluster"], 80, 5)
                if seen != first:
                    return True
        return False

    assert with_kernel(body)


def test_clients_too_many_to_remember_are_served_all_the_same(
    network: None, with_kernel: WithKernel, of: dict[str, str]
) -> None:
    """One entry is all there is: who has it keeps its endpoint, others get any."""

    async def body(kernel: Kernel) -> None:
        sets = ServiceWorld().ruleset.sets
        small = [replace(sets[name], size=1) for name in chains.STICKY_CLIENTS.values()]
        await Rules(kernel, *web("a", "r", **STICKY), extra=small).commit()
        async with _serving("a", "r"):
            (first,) = await ask_often("c", of["cluster"], 80, 5)
            assert set(await ask_often("b", of["cluster"], 80, 30)) == {"a sees b", "r sees b"}
            assert set(await ask_often("c", of["cluster"], 80, 5)) == {first}

    with_kernel(body)


async def _entries_end(kernel: Kernel) -> None:
    """Wait until no client is remembered."""
    remembered = set(chains.STICKY_CLIENTS.values())
    async with asyncio.timeout(5 * SLOWNESS):
        while remembered & (await kernel.read([SERVICES_TABLE])).elements.keys():  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)


# Who may come in, and by which addresses

Asked = tuple[tuple[str, str, int], str]


def _asks(
    with_kernel: WithKernel,
    of: dict[str, str],
    asked: Iterable[Asked],
    *manifests: Any,
    settings: ServiceSettings | None = None,
    extra: Iterable[Item] = (),
) -> None:
    """Each is answered as it says, all under one ruleset."""

    async def body(kernel: Kernel) -> dict[Asked, str]:
        await Rules(kernel, *manifests, settings=settings, extra=extra).commit()
        async with _serving("a", "r"):
            seen = {each: await ask(each[0][0], of[each[0][1]], each[0][2]) for each in asked}
        return {each: said for each, said in seen.items() if said not in each[1].split(" or ")}

    assert with_kernel(body) == {}


def test_source_ranges(network: None, with_kernel: WithKernel, of: dict[str, str]) -> None:
    """They hold for everybody who uses a load balancer's address, and for nothing else."""
    ranges = [f"{address}/{ip_address(address).max_prefixlen}" for address in (of["b"], of["outside"])]
    asked = (
        ((OUTSIDE, "vip", 80), "a sees outside"),
        ((OTHER, "vip", 80), "silence"),
        (("b", "vip", 80), "a sees b"),
        (("c", "vip", 80), "silence"),
        ((HERE, "vip", 80), "silence"),
        (("c", "cluster", 80), "a sees c"),
        ((OTHER, "node", 30080), "a sees other"),
    )
    _asks(with_kernel, of, asked, *web("a", **BALANCED, loadBalancerSourceRanges=ranges))


def test_source_ranges_that_lie_in_one_another(
    network: None, with_kernel: WithKernel, of: dict[str, str]
) -> None:
    """The widest of all admits everybody of its family."""
    ranges = ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.7/32", "10.0.0.0/8"]
    said = "a sees outside" if of is V4 else "silence"
    _asks(
        with_kernel,
        of,
        [((OUTSIDE, "vip", 80), said)],
        *web("a", **BALANCED, loadBalancerSourceRanges=ranges),
    )


def test_external_ips(network: None, with_kernel: WithKernel, of: dict[str, str]) -> None:
    allowed = ServiceSettings(external_ips=(ip_network(of["vip"]),))
    asked = (
        ((OUTSIDE, "vip", 80), "r sees node"),
        (("c", "vip", 80), "r sees c"),
        ((HERE, "vip", 80), "r sees node"),
    )
    _asks(with_kernel, of, asked, *web("r", externalIPs=[V4["vip"], V6["vip"]]), settings=allowed)


def test_node_ports_on_some_addresses_only(
    network: None, with_kernel: WithKernel, of: dict[str, str]
) -> None:
    limited = ServiceSettings(node_port_addresses=tuple(ip_network(each["node"]) for each in (V4, V6)))
    asked = (
        ((OUTSIDE, "node", 30080), "a sees outside"),
        ((OUTSIDE, "gate", 30080), "refused"),
        (("c", "gate", 30080), "refused"),
        (("c", "other", 30080), "refused"),
    )
    _asks(with_kernel, of, asked, *web("a", **NODE_PORT), settings=limited)


def test_node_ports_are_not_on_loopback(network: None, with_kernel: WithKernel) -> None:
    loopback = {"v4": "127.0.0.1", "v6": "::1"}
    asked = (((HERE, "v4", 30080), "refused"), ((HERE, "v6", 30080), "refused"))
    _asks(with_kernel, loopback, asked, *web("a", **NODE_PORT))


def test_a_slice_with_another_port_number(network: None, with_kernel: WithKernel, of: dict[str, str]) -> None:
    """A named targetPort is what each Pod calls so."""
    one, other = (
        endpoint_slice(f"shop/web-{port}", "web", of[name], ports=({"name": "t", "port": port},))
        for name, port in (("a", 8080), ("b", 9090))
    )

    async def body(kernel: Kernel) -> Counter[str]:
        await Rules(kernel, service("shop/web", *BOTH, ports=TCP_AND_UDP), one, other).commit()
        async with _serving("a"), _serving("b", port=9090):
            return await ask_often("c", of["cluster"], 80, 20)

    assert set(with_kernel(body)) == {"a sees c", "b sees c"}


@pytest.mark.parametrize("services", [True, False])
@pytest.mark.parametrize("at", ["every address", "one address"])
def test_host_ports(
    network: None, with_kernel: WithKernel, of: dict[str, str], at: str, services: bool
) -> None:
    """A port of the node leads to a Pod, after Services and with the source kept."""
    mapping = PortMapping(8000, 8080, "tcp", "" if at == "every address" else of["node"])
    elements = host_ports((ip_address(of["a"]),), (mapping,), "shop", "a")
    asked = (
        ((OUTSIDE, "node", 8000), "a sees outside"),
        ((OUTSIDE, "gate", 8000), "a sees outside" if at == "every address" else "refused"),
        (("c", "node", 8000), "a sees c"),
        (("a", "node", 8000), "a sees node or a sees gate"),
        ((HERE, "node", 8000), "a sees node"),
        ((OUTSIDE, "node", 8001), "refused"),
    )
    _asks(with_kernel, of, asked, settings=ServiceSettings(enabled=services), extra=elements)


# What others see

WATCHER = """
table inet podwall_test {
    counter seen {}
    counter marked {}
    chain count { counter name seen; meta mark != 0 counter name marked; }
    chain count_connection { counter name seen; ct mark != 0 counter name marked; }
    chain forward { type filter hook forward priority -200; meta l4proto { tcp, udp } jump count; }
    chain input { type filter hook input priority -200; meta l4proto { tcp, udp } jump count; }
    chain output { type filter hook output priority -50; meta l4proto { tcp, udp } jump count; }
    chain postrouting { type filter hook postrouting priority -200; meta l4proto { tcp, udp } jump count; }
    chain left { type filter hook postrouting priority 300; meta l4proto { tcp, udp } jump count_connection; }
    chain received { type filter hook input priority 300; meta l4proto { tcp, udp } jump count_connection; }
}
"""


def test_marks_are_gone_when_others_look(network: None, with_kernel: WithKernel, of: dict[str, str]) -> None:
    """Of packets: in every hook behind Services. Of connections: before they leave, or arrive at the node.

    Kernel 6.18 sends IPv6's multicast reports with a mark of its own, so only TCP and UDP are looked at.
    """

    async def body(kernel: Kernel) -> tuple[int, int]:
        rules = Rules(kernel)
        async with _serving("a", "r"), _serving("node", port=8080):
            for (where, target, port), endpoints, spec, _ in WAYS.values():
                for affinity in ({}, STICKY):
                    await rules.only(*web(*endpoints, **spec, **affinity))
                    await ask(where, of[target], port)
            await rules.only(*web("node", **NODE_PORT))
            assert await ask("c", of["cluster"], 80) == "node sees c"
            assert await ask(HERE, of["cluster"], 80) == "node sees node"
        return _counted("seen"), _counted("marked")

    subprocess.run(["nft", "-f", "-"], input=WATCHER, text=True, check=True)
    seen, marked = with_kernel(body)
    assert seen > len(WAYS)
    assert marked == 0


def _counted(name: str) -> int:
    command = ["nft", "list", "counter", "inet", "podwall_test", name]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(listed.split("packets")[1].split()[0])


def test_a_packet_out_of_its_connection_reaches_no_client(
    network: None, with_kernel: WithKernel, of: dict[str, str]
) -> None:
    """Not translated back it would make the client reset the endpoint's connection (kubernetes 74839)."""
    version = ip_address(of["a"]).version

    async def body(kernel: Kernel) -> tuple[set[str], bytes]:
        await Rules(kernel, *web("a")).commit()
        loop = asyncio.get_running_loop()
        with (
            _socket("a", version, socket.SOCK_STREAM) as server,
            _socket("c", version, socket.SOCK_STREAM) as client,
            _socket("c", version, socket.SOCK_DGRAM) as marker,
            _raw("c", version, socket.IPPROTO_TCP) as watcher,
        ):
            server.bind((of["a"], 8080))
            server.listen()
            marker.bind((of["c"], 7000))
            await loop.sock_connect(client, (of["cluster"], 80))
            accepted, _ = await loop.sock_accept(server)
            with accepted:
                _send_out_of_window(of, version, client.getsockname()[1], await loop.sock_recv(watcher, 2000))
                with _socket("a", version, socket.SOCK_DGRAM) as last:
                    await loop.sock_sendto(last, b"last", (of["c"], 7000))
                await loop.sock_recv(marker, 10)
                await loop.sock_sendall(accepted, b"still here")
                said = await loop.sock_recv(client, 100)
            return _sources(watcher), said

    sources, said = with_kernel(body)
    assert said == b"still here"
    assert sources == {of["cluster"]}


def _raw(where: str, version: int, protocol: int) -> socket.socket:
    namespaces.pushns(_netns(where))
    try:
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_RAW, protocol)
    finally:
        namespaces.popns()
    made.setblocking(False)
    return made


def _send_out_of_window(of: dict[str, str], version: int, port: int, answer: bytes) -> None:
    """From the endpoint to the client, of their connection but far ahead of where its SYN ACK says it is."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    header = IP(src=of["a"], dst=of["c"]) if version == 4 else IPv6(src=of["a"], dst=of["c"])
    seq, ack = struct.unpack_from("!II", answer, 24 if version == 4 else 4)
    packet = bytes(
        header / TCP(sport=8080, dport=port, flags="A", seq=(seq + (1 << 30)) % (1 << 32), ack=ack)
    )
    with _raw("a", version, socket.IPPROTO_RAW) as sender:
        sender.sendto(packet, (of["c"], 0))


def _sources(watcher: socket.socket) -> set[str]:
    """From whom TCP came so far."""
    seen = set()
    while True:
        try:
            seen.add(watcher.recvfrom(2000)[1][0])
        except BlockingIOError:
            return seen
