"""Which endpoints of a Service answer: those of one port, in one reach, as one node sees them. Pure.

    slices of the Service, all of them, of one family
      |  port: its name and protocol; its number may be another in every slice
      v
    candidates: address and port once, however many slices have it
      |  reach "cluster": any node's    "local": this node's
      v
    ready ones; where there is none, those that still serve though they are terminating

Hints narrow the reach "cluster" (EndpointSlice hints, set for trafficDistribution and topology mode): when
every ready endpoint says for which nodes it is and some are for this node, those; else when every ready
endpoint says for which zones it is and some are for this node's zone, those; else all.

`ready` is what the slice says: with publishNotReadyAddresses it says so of Pods that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address
from typing import Literal, TypeAlias

from agent.cluster.model import Endpoint, EndpointSlice, Family, IPAddress, ServicePort

Backend: TypeAlias = tuple[IPAddress, int]
"""An endpoint's address and port."""

_BROADCAST = IPv4Address("255.255.255.255")

Reach: TypeAlias = Literal["cluster", "local"]


@dataclass(frozen=True, slots=True)
class Here:
    """The node that asks: its name, and its label topology.kubernetes.io/zone ("" when it has none)."""

    node: str
    zone: str = ""


def candidates(
    slices: Iterable[EndpointSlice], port: ServicePort, family: Family
) -> Mapping[Backend, Endpoint]:
    """Every endpoint of a port by its address and port number, usable or not in its state.

    An endpoint may be in several slices while it moves from one to another: the better state counts.
    """
    found: dict[Backend, Endpoint] = {}
    for of in slices:
        numbers = [
            each.port
            for each in of.ports
            if each.port is not None and (each.name, each.protocol) == (port.name, port.protocol)
        ]
        for endpoint in of.endpoints if numbers else ():
            if not endpoint.addresses or endpoint.addresses[0].version != family:
                continue  # the addresses of one endpoint are one Pod's; clients may use the first alone
            if unusable(endpoint.addresses[0]):
                continue
            for number in numbers:
                backend = endpoint.addresses[0], number
                known = found.get(backend)
                if known is None or _state(endpoint) > _state(known):
                    found[backend] = endpoint
    return found


def choose(found: Mapping[Backend, Endpoint], reach: Reach, here: Here) -> tuple[Backend, ...]:
    """Those that get traffic, in the order of their addresses."""
    if reach == "local":
        found = {backend: each for backend, each in found.items() if each.node and each.node == here.node}
        chosen = [backend for backend, each in found.items() if each.ready]
    else:
        meant = _hinted([each for each in found.values() if each.ready], here)
        chosen = [backend for backend, each in found.items() if each.ready and meant(each)]
    if not chosen:
        chosen = [backend for backend, each in found.items() if each.serving and each.terminating]
    return tuple(sorted(chosen, key=lambda of: (int(of[0]), of[1])))


def ready_here(slices: Iterable[EndpointSlice], here: Here) -> int:
    """How many ready endpoints this node has, for healthCheckNodePort; a Pod of two families counts once."""
    ready = {
        endpoint.addresses[0]
        for of in slices
        for endpoint in of.endpoints
        if endpoint.ready and endpoint.addresses and endpoint.node and endpoint.node == here.node
    }
    return max(sum(address.version == family for address in ready) for family in (4, 6))


@lru_cache(maxsize=1 << 16)
def unusable(address: IPAddress) -> str:
    """Why traffic must not be led to an address, "" when it may.

    It would reach the node itself or its neighbours instead of what the address says (CVE-2021-25737).
    """
    plain = getattr(address, "ipv4_mapped", None) or address
    if plain.is_loopback or plain.is_link_local or plain.is_unspecified:
        return "is a loopback, link-local or unspecified address"
    if plain.is_multicast or plain == _BROADCAST:
        return "is a multicast or broadcast address"
    return ""


def has_hints(slices: Iterable[EndpointSlice]) -> bool:
    """Whether the choice depends on the node's name or zone."""
    return any(endpoint.zone_hints for of in slices for endpoint in of.endpoints)


def _state(endpoint: Endpoint) -> tuple[bool, bool, bool]:
    return endpoint.ready, endpoint.serving, endpoint.terminating


def _hinted(ready: Sequence[Endpoint], here: Here) -> Callable[[Endpoint], bool]:
    """Whether a ready endpoint is meant for this node."""
    if all(each.node_hints for each in ready) and any(here.node in each.node_hints for each in ready):
        return lambda of: here.node in of.node_hints
    if not here.zone:
        return lambda of: True
    if all(each.zone_hints for each in ready) and any(here.zone in each.zone_hints for each in ready):
        return lambda of: here.zone in of.zone_hints
    return lambda of: True
