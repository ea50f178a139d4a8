"""What Services need to know of the nodes: where this one is, its address, and whose addresses are whose.

own_address          this node's, for what goes on to another node's endpoint
nodes4, nodes6       other nodes' addresses: a NodePort there is translated here
pod_cidrs4, ...6     from these it is the cluster's Pods who speak
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from agent.cluster.model import Node
from agent.compile import service_chains as chains
from agent.compile.endpoints import Here, unusable
from agent.compile.links import outermost
from agent.compile.names import comment
from agent.nft.model import Element, Item

ZONE_LABEL = "topology.kubernetes.io/zone"


class Moved(NamedTuple):
    """What a changed Node changes."""

    addresses: bool
    zone: bool


class KnownNodes:
    """What is known of the nodes: where this one is, and whose addresses are whose."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._nodes: dict[str, Node] = {}

    @property
    def here(self) -> Here:
        return here_of(self._own, self._nodes.get(self._own))

    def take(self, name: str, node: Node | None) -> Moved:
        before = self._nodes.pop(name, None)
        if node is not None:
            self._nodes[name] = node
        zone = name == self._own and _zone(before) != _zone(node)
        return Moved(_addresses(before) != _addresses(node), zone)

    def items(self) -> Iterator[Item]:
        own = self._nodes.get(self._own)
        first = {address.version: address for address in reversed(own.internal_ips if own else ())}
        yield chains.own_address({version: first[version] for version in sorted(first)})
        yield from self._others(own)
        ranges = {network for node in self._nodes.values() for network in node.pod_cidrs}
        yield from (Element(chains.POD_CIDRS[network.version], network) for network in outermost(ranges))

    def _others(self, own: Node | None) -> Iterator[Element]:
        named = {
            address: node.name
            for node in sorted(self._nodes.values(), key=lambda each: each.name, reverse=True)
            for address in (*node.internal_ips, *node.external_ips)
            if not unusable(address)
        }
        mine = {*own.internal_ips, *own.external_ips} if own else set()
        for address in named.keys() - mine:
            yield Element(chains.NODES[address.version], address, comment=comment(named[address]))


def here_of(name: str, node: Node | None) -> Here:
    """Where the node of this name is."""
    return Here(name, _zone(node))


def _zone(node: Node | None) -> str:
    return node.labels.get(ZONE_LABEL, "") if node else ""


def _addresses(node: Node | None) -> tuple[object, ...]:
    return (node.internal_ips, node.external_ips, node.pod_cidrs) if node else ()
