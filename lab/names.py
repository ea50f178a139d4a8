"""What the lab calls things, and where they are: namespaces, addresses, files. Pure.

                    podwall-lab-underlay: a bridge, or a router when every node has a subnet of its own
                    172.30.0.1 fd30::1
           ┌──────────────┼───────────────┬─────────────────────────┐
    podwall-lab-node1   -node2          ...                 podwall-lab-outside
    172.30.0.11         172.30.0.12                         172.30.0.5, 203.0.113.10 (behind it)
    fd30::11            fd30::12                            fd30::5, 2001:db8:203::10
       │      │
    Pod     Pod         podwall-lab-pod.NAMESPACE.NAME: 10.244.1.0/24 and fd00:10:244:1::/64 on node1

One lab per machine: everything is found again by these names alone, whatever became of the process that made
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_interface,
    ip_network,
)
from pathlib import Path

LAB = "podwall-lab"
RUN = Path("/run") / LAB
UNDERLAY = f"{LAB}-underlay"
OUTSIDE = f"{LAB}-outside"
BRIDGE = "podwall-lab"

MAX_NODES = 80
CLUSTER_CIDRS = (IPv4Network("10.244.0.0/16"), IPv6Network("fd00:10:244::/48"))
SERVICE_CIDRS = (IPv4Network("10.96.0.0/16"), IPv6Network("fd00:10:96::/112"))
BALANCED = ("172.30.0.200-172.30.0.239", "fd30::200-fd30::2ff")
"""Addresses on the nodes' link for Services of type LoadBalancer."""

BEHIND_OUTSIDE = (IPv4Address("203.0.113.10"), IPv6Address("2001:db8:203::10"))
"""Addresses of the outside host that share no subnet with any node: as good as the Internet."""

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Place:
    """A host on the underlay: its namespace, its link in the underlay, its addresses and its router's."""

    name: str
    netns: str
    port: str
    interfaces: tuple[Interface, ...]
    routers: tuple[Interface, ...]

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses, IPv4 first."""
        return tuple(interface.ip for interface in self.interfaces)


@dataclass(frozen=True, slots=True)
class NodePlace(Place):
    """A node: a host with addresses for Pods."""

    number: int
    pod_cidrs: tuple[Network, ...]

    @property
    def directory(self) -> Path:
        """Where this node's agent keeps its socket, ledger, network configuration and log."""
        return RUN / self.name


def node(number: int, *, routed: bool = False) -> NodePlace:
    """Return the node with this number, 1 to MAX_NODES; routed: in a subnet of its own."""
    if not 1 <= number <= MAX_NODES:
        raise ValueError(f"node {number}: the lab has room for nodes 1 to {MAX_NODES}")
    subnet = number if routed else 0
    return NodePlace(
        name=f"node{number}",
        netns=f"{LAB}-node{number}",
        port=f"podwall-node{number}",
        interfaces=_interfaces(subnet, 10 + number),
        routers=_interfaces(subnet, 1),
        number=number,
        pod_cidrs=(ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:10:244:{number}::/64")),
    )


def outside() -> Place:
    """Return the host that is no part of the cluster."""
    return Place("outside", OUTSIDE, "podwall-outside", _interfaces(0, 5), _interfaces(0, 1))


def pod_netns(namespace: str, pod: str) -> str:
    """Return the name of a Pod's network namespace; unique, since a Namespace's name holds no dot."""
    return f"{LAB}-pod.{namespace}.{pod}"


def _interfaces(subnet: int, host: int) -> tuple[Interface, ...]:
    prefix6 = "fd30::" if subnet == 0 else f"fd30:0:0:{subnet}::"
    return (ip_interface(f"172.30.{subnet}.{host}/24"), ip_interface(f"{prefix6}{host}/64"))
