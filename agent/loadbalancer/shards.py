"""Which Lease decides about which address, and which nodes may hold it, first choice first.

    address, externalTrafficPolicy Cluster --hash--> podwall-lb-00 ... podwall-lb-15    any node
    address, externalTrafficPolicy Local   --Pods--> podwall-lb-local-3f09...           nodes with an endpoint

The Leases bound what the API server must do: a holder writes once a second, so sixteen Leases are at most
sixteen writes a second, however many addresses and nodes there are. Local addresses need a Lease for each set
of Pods, since only their nodes may answer. Only the first few nodes of the order watch a Lease closely.

The order is a hash of Lease and node (rendezvous hashing): another for each Lease, and a node's coming or
going moves nobody else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from agent.cluster.model import EndpointSlice, IPAddress, Node, Service
from agent.loadbalancer.allocation import addresses_of, age, is_ours
from agent.loadbalancer.pools import Pool

SHARDS = 16
EXCLUDED = "node.kubernetes.io/exclude-from-external-load-balancers"

SlicesOf = Callable[[tuple[str, str]], Iterable[EndpointSlice]]


@dataclass(frozen=True, slots=True)
class Shard:
    """The addresses of one Lease, each with the nodes that can answer for it (None: all of them).

    `candidates` are the nodes that may hold the Lease, in order.
    """

    lease: str
    addresses: Mapping[IPAddress, frozenset[str] | None]
    candidates: tuple[str, ...]

    def can_answer(self, node: str, ip: IPAddress) -> bool:
        """Whether a node answers for one of the addresses when it holds the Lease."""
        nodes = self.addresses[ip]
        return nodes is None or node in nodes

    def rank(self, node: str) -> int | None:
        """The node's place in the order; None when it may not hold the Lease."""
        return self.candidates.index(node) if node in self.candidates else None


def shards(
    pools: Sequence[Pool], services: Iterable[Service], nodes: Iterable[Node], slices_of: SlicesOf
) -> dict[str, Shard]:
    """Every Lease that there must be, by its name."""
    willing = tuple(nodes)
    taken = node_addresses(willing)
    claims: dict[str, dict[IPAddress, list[Service]]] = defaultdict(lambda: defaultdict(list))
    lease_of: dict[IPAddress, str] = {}
    for service in sorted(filter(is_ours, services), key=age):
        for ip in addresses_of(service):
            if ip not in taken and any(ip in pool for pool in pools):
                lease = lease_of.setdefault(ip, _lease(service, ip))
                if lease == _lease(service, ip):  # else an older Service has it, and this one will lose it
                    claims[lease][ip].append(service)
    return {lease: _shard(lease, claimed, willing, slices_of) for lease, claimed in claims.items()}


def node_addresses(nodes: Iterable[Node]) -> frozenset[IPAddress]:
    """What nodes answer for themselves, whatever a pool says."""
    return frozenset(ip for node in nodes for ip in (*node.internal_ips, *node.external_ips))


def order(lease: str, nodes: Iterable[str]) -> tuple[str, ...]:
    """Nodes in the order in which they may take a Lease."""
    return tuple(sorted(nodes, key=lambda node: _digest(lease, node)))


def eligible(nodes: Iterable[Node]) -> frozenset[str]:
    """The nodes that may answer: ready ones; cordoned ones only when there is no other; else any at all."""
    allowed = [node for node in nodes if EXCLUDED not in node.labels]
    ready = [node for node in allowed if node.ready]
    calm = [node for node in ready if not node.unschedulable and not node.deleting]
    return frozenset(node.name for node in calm or ready or allowed)


def _lease(service: Service, ip: IPAddress) -> str:
    if service.external_traffic_policy != "Local":
        return f"podwall-lb-{int(_digest(ip.packed), 16) % SHARDS:02d}"
    pods = sorted(service.selector.items()) if service.selector else ["service", service.name]
    return f"podwall-lb-local-{_digest(service.namespace, pods, ip.version)[:12]}"


def _shard(
    lease: str, claimed: Mapping[IPAddress, Sequence[Service]], nodes: Sequence[Node], slices_of: SlicesOf
) -> Shard:
    addresses = {ip: _answering(ip, services, slices_of) for ip, services in claimed.items()}
    answers = {node.name: 0 for node in nodes}
    for those in addresses.values():
        for name in answers:
            answers[name] += those is None or name in those
    most = max(answers.values(), default=0)
    able = [node for node in nodes if most and answers[node.name] == most]
    return Shard(lease, addresses, order(lease, eligible(able)))


def _answering(ip: IPAddress, services: Sequence[Service], slices_of: SlicesOf) -> frozenset[str] | None:
    """The nodes with usable endpoints of all the Services that share an address."""
    if services[0].external_traffic_policy != "Local":
        return None
    found = [_nodes_with_endpoints(ip.version, slices_of(service.key)) for service in services]
    return frozenset.intersection(*found) or frozenset.union(*found)


def _nodes_with_endpoints(family: int, slices: Iterable[EndpointSlice]) -> frozenset[str]:
    """Nodes with ready endpoints; where there is none at all, with those that still serve while they end."""
    endpoints = [
        endpoint
        for each in slices
        if each.address_type == f"IPv{family}"
        for endpoint in each.endpoints
        if endpoint.node and endpoint.addresses
    ]
    ready = {endpoint.node for endpoint in endpoints if endpoint.ready}
    ending = {endpoint.node for endpoint in endpoints if endpoint.serving and endpoint.terminating}
    return frozenset(ready or ending)


def _digest(*parts: object) -> str:
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return blake2b(text, digest_size=8).hexdigest()
