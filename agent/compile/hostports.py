"""Ports of the node that lead to a Pod (hostPort), as elements of the maps of `agent.compile.service_chains`.

    host_ports     tcp . 8080               -> 10.244.1.7 . 80    on every address of the node
    host_ports_at  10.0.0.1 . udp . 53      -> 10.244.1.7 . 5353  on this one alone

They are asked after the Services, and only for addresses of the node itself: on a loopback address only those
that name it, and only for who speaks from another address of the node (a Pod cannot answer 127.0.0.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from agent.compile import service_chains as chains
from agent.compile.endpoints import unusable
from agent.compile.names import comment
from agent.nft.model import Address, Element, Proto
from cni.spec import PortMapping


def host_ports(
    addresses: Iterable[Address], mappings: Iterable[PortMapping], namespace: str, pod: str
) -> Iterator[Element]:
    """The elements of one attachment: each mapping for each address of the family that it is for."""
    mappings, of = tuple(mappings), comment(namespace, pod)
    for address in addresses:
        for mapping in mappings:
            yield from _mapping(address, mapping, of)


def _mapping(to: Address, mapping: PortMapping, of: str) -> Iterator[Element]:
    port = Proto[mapping.protocol.upper()], mapping.host_port
    backend = to, mapping.container_port
    at = ip_address(mapping.host_ip) if mapping.host_ip else None
    if at is None or (at.is_unspecified and at.version == to.version):
        yield Element(chains.HOST_PORTS[to.version], port, backend, of)
    elif at.version == to.version and (at.is_loopback or not unusable(at)):
        yield Element(chains.HOST_PORTS_AT[to.version], (at, *port), backend, of)
