"""Which way a packet for another node's Pods leaves this node: computed from all Nodes alone.

    10.244.2.0/24 via 192.168.0.2 dev eth0                    direct: the peer is on the uplink's own link
    10.244.3.0/24 via 10.244.3.0 dev podwall-vxlan onlink     vxlan:  the peer is behind a router
    fd00:10:3::/64 via fe80::… dev podwall-vxlan
    unreachable 10.244.1.0/24                                 this node's own range, where no Pod is

`auto` decides for each peer and each range: direct where the peer has an InternalIP in a subnet that is
connected to the uplink, vxlan otherwise.  A VXLAN packet needs an inner destination MAC and an outer
destination address:

    route -> next hop: the peer's tunnel address (IPv4: its range's first; IPv6: link-local, from the MAC)
    neighbour: tunnel address -> the peer's MAC, derived from the Node's name, so nobody has to publish it
    forwarding entry: MAC -> the peer's InternalIP in the underlay's family

The IPv6 next hop is link-local because the kernel refuses an onlink next hop inside a range that is routed
over another device, which is how a peer looks that changes from direct to vxlan; a link-local one is not
looked up.

The unreachable route answers packets for Pods that are not there; without it they would leave by the default
route, and a router that knows the range would send them back.  A Pod's own /32 or /128 is more specific and
wins.

MTU: with `direct` Pods have the uplink's.  With `vxlan` and with `auto` they have 50 bytes less (outer
Ethernet header 14, IPv4 20, UDP 8, VXLAN 8) or 70 over an IPv6 underlay, in `auto` also while every peer is
direct: a peer behind a router may come at any time, and a running Pod keeps the MTU that it was made with.

Ranges are untrusted.  One that overlaps another Node's, the uplink's subnets or a Node's address, or that is
no unicast range, gets no route and is reported with the Nodes it concerns; of two Nodes with the same range
this node comes first, then the first by name.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Literal, TypeAlias

from agent.cluster.model import IPAddress, IPNetwork, Node

Mode: TypeAlias = Literal["auto", "direct", "vxlan"]
Way: TypeAlias = Literal["direct", "vxlan"]

VXLAN_DEVICE = "podwall-vxlan"
VXLAN_OVERHEAD = {4: 50, 6: 70}
IPV6_MINIMUM_MTU = 1280  # RFC 8200 section 5

_UNUSABLE = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "fe80::/10",
        "ff00::/8",
    )
)


class UnknownNode(Exception):  # noqa: N818 - it names what is missing
    """This node's own Node object is not among the Nodes; routes stay as they are until it is."""


@dataclass(frozen=True, slots=True)
class Uplink:
    """The interface that holds the Node's InternalIP: its MTU in bytes, addresses and connected subnets."""

    name: str
    index: int
    mtu: int
    addresses: tuple[IPAddress, ...]
    subnets: tuple[IPNetwork, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """A route in the main table; without a gateway the destination is unreachable."""

    destination: IPNetwork
    gateway: IPAddress | None = None
    device: str = ""
    onlink: bool = False

    def __str__(self) -> str:
        if self.gateway is None:
            return f"unreachable {self.destination}"
        via = (
            f"inet6 {self.gateway}" if self.destination.version < self.gateway.version else str(self.gateway)
        )
        return f"{self.destination} via {via} dev {self.device}{' onlink' if self.onlink else ''}"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent neighbour on the VXLAN device: a peer's tunnel address and its MAC."""

    address: IPAddress
    mac: str

    def __str__(self) -> str:
        return f"neighbour {self.address} lladdr {self.mac}"


@dataclass(frozen=True, slots=True)
class Forwarding:
    """A forwarding entry of the VXLAN device: frames for this MAC go to this node."""

    mac: str
    underlay: IPAddress

    def __str__(self) -> str:
        return f"forwarding {self.mac} to {self.underlay}"


@dataclass(frozen=True, slots=True)
class Vxlan:
    """The VXLAN device; `addresses` are this node's tunnel addresses, its own source towards Pods."""

    vxlan_id: int
    port: int
    local: IPAddress
    mac: str
    mtu: int
    addresses: frozenset[IPAddress]
    up: bool = True

    def __str__(self) -> str:
        return f"{VXLAN_DEVICE} id {self.vxlan_id} port {self.port} local {self.local} mtu {self.mtu}"


@dataclass(frozen=True, slots=True)
class Path:
    """How the Pods of one range of a peer are reached; `status` shows it."""

    node: str
    cidr: IPNetwork
    way: Way


@dataclass(frozen=True, slots=True)
class RouteProblem:
    """What of the Nodes cannot be routed, and the Nodes it concerns."""

    nodes: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"Node {', '.join(self.nodes)}: {self.message}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All routes and VXLAN entries this node needs; `underlay` is the tunnel's outer address here."""

    routes: frozenset[Route] = frozenset()
    vxlan: Vxlan | None = None
    neighbours: frozenset[Neighbour] = frozenset()
    forwarding: frozenset[Forwarding] = frozenset()
    underlay: IPAddress | None = None
    paths: tuple[Path, ...] = ()
    problems: tuple[RouteProblem, ...] = ()


def vtep_mac(node: str) -> str:
    """The MAC of a Node's tunnel end: 46 bits of the name's hash, locally administered, unicast."""
    octets = bytearray(hashlib.sha256(b"podwall-vtep/" + node.encode()).digest()[:6])
    octets[0] = octets[0] & 0xFC | 0x02
    return octets.hex(":")


def vtep_link_local(mac: str) -> IPv6Address:
    """The IPv6 next hop of a tunnel end: the link-local address of RFC 4291 appendix A for its MAC."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(
        b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    )


def pod_mtu(mode: Mode, plan: Plan, uplink_mtu: int) -> int:
    """The MTU of this node's Pods in bytes: the uplink's, less VXLAN's headers where mode allows VXLAN."""
    if mode == "direct" or plan.underlay is None:
        return uplink_mtu
    return uplink_mtu - VXLAN_OVERHEAD[plan.underlay.version]


def plan_routes(
    own: str, nodes: Iterable[Node], uplink: Uplink, mode: Mode, *, vxlan_id: int, vxlan_port: int
) -> Plan:
    """Compute the plan of Node `own`; raises UnknownNode when it is not among `nodes`."""
    by_name = {node.name: node for node in nodes}
    if own not in by_name:
        raise UnknownNode(f"Node {own} is not among the cluster's Nodes; is --node-name right?")
    ordered = [by_name.pop(own), *(by_name[name] for name in sorted(by_name))]
    draft = _Draft(uplink, mode)
    addresses = draft.claim_addresses(ordered)
    ranges = draft.claim_ranges(ordered, addresses)
    draft.underlay = None if mode == "direct" else draft.choose_underlay(ordered[0])
    for node in ordered[1:]:
        draft.reach(node.name, addresses[node.name], ranges[node.name])
    draft.routes |= {Route(cidr) for cidr in ranges[own]}
    return draft.finish(own, ranges[own], vxlan_id, vxlan_port)


@dataclass(slots=True)
class _Draft:
    """A plan while it is computed; peers only ever add to it."""

    uplink: Uplink
    mode: Mode
    underlay: IPAddress | None = None
    routes: set[Route] = field(default_factory=set)
    neighbours: set[Neighbour] = field(default_factory=set)
    forwarding: set[Forwarding] = field(default_factory=set)
    paths: list[Path] = field(default_factory=list)
    problems: list[RouteProblem] = field(default_factory=list)

    def problem(self, nodes: Sequence[str], message: str) -> None:
        self.problems.append(RouteProblem(tuple(nodes), message))

    def claim_addresses(self, ordered: Sequence[Node]) -> dict[str, tuple[IPAddress, ...]]:
        """The InternalIPs each Node may use; an address that two Nodes have belongs to the first."""
        holders: dict[IPAddress, str] = dict.fromkeys(self.uplink.addresses, ordered[0].name)
        usable = {}
        for node in ordered:
            held = [ip for ip in node.internal_ips if holders.setdefault(ip, node.name) == node.name]
            for ip in sorted({*node.internal_ips} - {*held}, key=str):
                self.problem((node.name, holders[ip]), f"both have InternalIP {ip}; {holders[ip]} keeps it")
            usable[node.name] = tuple(ip for ip in held if not ip.is_link_local)
        return usable

    def claim_ranges(
        self, ordered: Sequence[Node], addresses: dict[str, tuple[IPAddress, ...]]
    ) -> dict[str, tuple[IPNetwork, ...]]:
        """The podCIDRs of each Node that can be routed; the first claim of a range wins."""
        machines = _Claims()
        for name, ips in addresses.items():
            for ip in ips:
                machines.claim(ip_network(ip), name)
        claims = _Claims()
        usable = {}
        for node in ordered:
            if not node.pod_cidrs:
                self.problem((node.name,), "spec.podCIDRs is empty: its Pods get no routes until it is set")
            usable[node.name] = tuple(self._claim_each(node, claims, machines))
        return usable

    def _claim_each(self, node: Node, claims: _Claims, machines: _Claims) -> Iterator[IPNetwork]:
        for cidr in node.pod_cidrs:
            where = f"spec.podCIDRs {cidr}"
            if any(_overlap(cidr, unusable) for unusable in _UNUSABLE):
                self.problem((node.name,), f"{where} is no range for Pods")
            elif near := next((subnet for subnet in self.uplink.subnets if _overlap(cidr, subnet)), None):
                self.problem((node.name,), f"{where} overlaps {near}, the link of {self.uplink.name}")
            elif machine := machines.holder(cidr):
                self.problem((node.name, machine[0]), f"{where} holds the InternalIP of Node {machine[0]}")
            elif winner := claims.claim(cidr, node.name):
                self.problem(
                    tuple(dict.fromkeys((node.name, winner[0]))),
                    f"{where} overlaps {winner[1]} of Node {winner[0]}, which keeps it",
                )
            else:
                yield cidr

    def choose_underlay(self, own: Node) -> IPAddress | None:
        """The outer source address: this node's InternalIP, IPv4 before IPv6, when it is on the uplink."""
        local = [ip for ip in own.internal_ips if ip in self.uplink.addresses and not ip.is_link_local]
        if not local:
            self.problem(
                (own.name,), f"no InternalIP is on {self.uplink.name}: {VXLAN_DEVICE} has no address"
            )
        return min(local, key=lambda ip: ip.version, default=None)

    def reach(self, peer: str, addresses: Sequence[IPAddress], ranges: Iterable[IPNetwork]) -> None:
        """Add what reaches the Pods of one peer."""
        for cidr in ranges:
            gateway = None if self.mode == "vxlan" else self._gateway(addresses, cidr)
            if gateway is not None:
                onlink = not any(gateway in subnet for subnet in self.uplink.subnets)
                self.routes.add(Route(cidr, gateway, self.uplink.name, onlink))
                self.paths.append(Path(peer, cidr, "direct"))
            elif self.mode == "direct":
                self.problem((peer,), self._not_direct(addresses, cidr))
            elif self._tunnel(peer, addresses, cidr):
                self.paths.append(Path(peer, cidr, "vxlan"))

    def _gateway(self, addresses: Sequence[IPAddress], cidr: IPNetwork) -> IPAddress | None:
        """The peer's address on the uplink's link; IPv4 may go by an IPv6 next hop (RFC 8950, Linux 5.2)."""
        families = (4, 6) if cidr.version == 4 else (6,)
        for family in families:
            for ip in addresses:
                if ip.version == family and (self._connected(ip) or self._hosts_only(family)):
                    return ip
        return None

    def _connected(self, address: IPAddress) -> bool:
        return any(address in subnet for subnet in self.uplink.subnets)

    def _hosts_only(self, family: int) -> bool:
        """Whether the uplink has an address but no subnet, and mode says that nodes share the link."""
        subnets = [subnet for subnet in self.uplink.subnets if subnet.version == family]
        return (
            self.mode == "direct"
            and any(ip.version == family and not ip.is_link_local for ip in self.uplink.addresses)
            and all(subnet.prefixlen == subnet.max_prefixlen or subnet.is_link_local for subnet in subnets)
        )

    def _not_direct(self, addresses: Sequence[IPAddress], cidr: IPNetwork) -> str:
        known = ", ".join(map(str, addresses)) or "none"
        return f"no direct route to {cidr}: InternalIP ({known}) is not on {self.uplink.name}; use mode auto"

    def _tunnel(self, peer: str, addresses: Sequence[IPAddress], cidr: IPNetwork) -> bool:
        if self.underlay is None:
            return False
        outer = next((ip for ip in addresses if ip.version == self.underlay.version), None)
        if outer is None:
            self.problem((peer,), f"{cidr} has no route: no InternalIP of {self.underlay}'s family for VXLAN")
            return False
        mac = vtep_mac(peer)
        hop = vtep_link_local(mac) if isinstance(cidr, IPv6Network) else cidr.network_address
        self.routes.add(Route(cidr, hop, VXLAN_DEVICE, onlink=isinstance(cidr, IPv4Network)))
        self.neighbours.add(Neighbour(hop, mac))
        self.forwarding.add(Forwarding(mac, outer))
        return True

    def finish(self, own: str, ranges: Iterable[IPNetwork], vxlan_id: int, port: int) -> Plan:
        vxlan = None
        if self.underlay is not None:
            addresses = frozenset(cidr.network_address for cidr in ranges)
            mtu = self.uplink.mtu - VXLAN_OVERHEAD[self.underlay.version]
            vxlan = Vxlan(vxlan_id, port, self.underlay, vtep_mac(own), mtu, addresses)
            if mtu < IPV6_MINIMUM_MTU and any(ip.version == 6 for ip in addresses):
                self.problem((own,), f"{self.uplink.name}'s MTU leaves {mtu} bytes in VXLAN; IPv6 needs 1280")
        return Plan(
            routes=frozenset(self.routes),
            vxlan=vxlan,
            neighbours=frozenset(self.neighbours),
            forwarding=frozenset(self.forwarding),
            underlay=self.underlay,
            paths=tuple(self.paths),
            problems=tuple(self.problems),
        )


class _Claims:
    """Disjoint ranges and who holds them, found by bisection: a cluster has thousands of Nodes."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        self._held: dict[int, list[tuple[int, str, IPNetwork]]] = {4: [], 6: []}

    def holder(self, cidr: IPNetwork) -> tuple[str, IPNetwork] | None:
        at = bisect_right(self._starts[cidr.version], int(cidr.broadcast_address)) - 1
        if at < 0:
            return None
        last, name, held = self._held[cidr.version][at]
        return (name, held) if last >= int(cidr.network_address) else None

    def claim(self, cidr: IPNetwork, name: str) -> tuple[str, IPNetwork] | None:
        """Hold `cidr` for `name`, or say who holds a part of it."""
        holder = self.holder(cidr)
        if holder is None:
            starts = self._starts[cidr.version]
            at = bisect_right(starts, int(cidr.network_address))
            starts.insert(at, int(cidr.network_address))
            self._held[cidr.version].insert(at, (int(cidr.broadcast_address), name, cidr))
        return holder


def _overlap(left: IPNetwork, right: IPNetwork) -> bool:
    if isinstance(left, IPv4Network) and isinstance(right, IPv4Network):
        return left.overlaps(right)
    return isinstance(left, IPv6Network) and isinstance(right, IPv6Network) and left.overlaps(right)
