"""The network between the lab's hosts: a bridge that all share, or a router with a subnet per node.

Links are made from inside the underlay's namespace with their other end born in the host's, so that nothing
ever passes through the machine's own network.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_interface
from typing import Any

from pyroute2 import IPRoute

from lab import netns
from lab.names import BEHIND_OUTSIDE, BRIDGE, OUTSIDE, UNDERLAY, Address, Interface, NodePlace, Place

UPLINK = "eth0"
"""What every host calls its link to the underlay."""


def build(nodes: Iterable[NodePlace], outside: Place) -> None:
    """Make the underlay, the outside host and the nodes, with addresses and default routes."""
    netns.create(UNDERLAY)
    netns.create(OUTSIDE)
    netns.run(netns.path(UNDERLAY), _build_bridge, outside)
    add_host(outside)
    for node in nodes:
        add_node(node)
    netns.run(netns.path(OUTSIDE), _add_addresses, "lo", _hosts(BEHIND_OUTSIDE))


def add_node(node: NodePlace) -> None:
    """Make a node's namespace and connect it."""
    netns.create(node.netns)
    add_host(node)


def add_host(place: Place) -> None:
    """Connect a namespace that exists to the underlay."""
    netns.run(netns.path(UNDERLAY), _add_port, place)
    netns.run(netns.path(place.netns), _configure_host, place)


def set_uplink(place: Place, state: str) -> None:
    """Set a host's cable "up" or "down", seen from the underlay's side."""
    netns.run(netns.path(UNDERLAY), _set_state, place.port, state)


def _build_bridge(outside: Place) -> None:
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        netns.set_sysctl(setting, "1")
    with IPRoute() as kernel:
        kernel.link("add", ifname=BRIDGE, kind="bridge", br_stp_state=0, br_forward_delay=0)
        _configure(kernel, BRIDGE, outside.routers)
        bridge = _index(kernel, BRIDGE)
        for behind, via in zip(BEHIND_OUTSIDE, outside.addresses, strict=True):
            kernel.route("add", dst=str(behind), gateway=str(via), oif=bridge)


def _add_port(place: Place) -> None:
    with IPRoute() as kernel, netns.path(place.netns).open("rb") as namespace:
        peer: dict[str, Any] = {"ifname": UPLINK, "net_ns_fd": namespace.fileno()}
        kernel.link("add", ifname=place.port, kind="veth", peer=peer)
        if _on_bridge(kernel, place):
            kernel.link("set", index=_index(kernel, place.port), master=_index(kernel, BRIDGE), state="up")
        else:
            _configure(kernel, place.port, place.routers)


def _on_bridge(kernel: IPRoute, place: Place) -> bool:
    bridge = {str(interface.ip) for interface in place.routers}
    found = {message.get_attr("IFA_ADDRESS") for message in kernel.get_addr(index=_index(kernel, BRIDGE))}
    return bridge <= found


def _configure_host(place: Place) -> None:
    with IPRoute() as kernel:
        _configure(kernel, UPLINK, place.interfaces)
        for router in place.routers:
            default = "0.0.0.0/0" if router.version == 4 else "::/0"
            kernel.route("add", dst=default, gateway=str(router.ip), oif=_index(kernel, UPLINK))


def _configure(kernel: IPRoute, link: str, interfaces: Iterable[Interface]) -> None:
    """Give a link its addresses, usable at once: without waiting for duplicate address detection."""
    for setting in ("accept_dad", "accept_ra", "router_solicitations"):
        netns.set_sysctl(f"ipv6/conf/{link}/{setting}", "0")
    _add_addresses_with(kernel, link, interfaces)
    kernel.link("set", index=_index(kernel, link), state="up")


def _add_addresses(link: str, interfaces: Iterable[Interface]) -> None:
    with IPRoute() as kernel:
        _add_addresses_with(kernel, link, interfaces)


def _add_addresses_with(kernel: IPRoute, link: str, interfaces: Iterable[Interface]) -> None:
    for interface in interfaces:
        kernel.addr(
            "add",
            index=_index(kernel, link),
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
        )


def _set_state(link: str, state: str) -> None:
    with IPRoute() as kernel:
        kernel.link("set", index=_index(kernel, link), state=state)


def _hosts(addresses: Iterable[Address]) -> tuple[Interface, ...]:
    return tuple(ip_interface(str(address)) for address in addresses)


def _index(kernel: IPRoute, link: str) -> int:
    index: int = kernel.link_lookup(ifname=link)[0]
    return index


def exists() -> bool:
    """Whether a lab's underlay is there."""
    return netns.path(UNDERLAY).exists()
