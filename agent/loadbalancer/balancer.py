"""Services of type LoadBalancer without a cloud: what of it one node's agent does.

    Services --elected agent--> allocation --> Services' statuses            Lease podwall-load-balancer
    Services' statuses, Nodes, EndpointSlices --> shards --> announcer       Leases podwall-lb-...
                                                               |
    uplink --> speaker: ARP, NDP  <----------------------------+

Every agent sees the statuses by its watch and translates packets to these addresses, wherever they come in
(table inet podwall_services); which node they come in at is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from agent.cluster.errors import ApiError
from agent.cluster.model import EndpointSlice, Event, IPAddress, Kind, Node, Service, Synced
from agent.cluster.store import Changed, Store
from agent.config import Config
from agent.loadbalancer.allocation import Name, addresses_of, allocate
from agent.loadbalancer.allocator import Allocator
from agent.loadbalancer.announcer import RESIGN_S, Announcer, observe_every
from agent.loadbalancer.candidate import Candidate
from agent.loadbalancer.claim import Timing
from agent.loadbalancer.shards import node_addresses, order, shards
from agent.reconcile import Reconciler
from agent.reports import Reports
from agent.sources import Source

KINDS: tuple[Kind, ...] = ("Node", "Service", "EndpointSlice")
LEASE = "podwall-load-balancer"
TIMING = Timing(duration_s=6, renew_s=2.0, observe_s=2.0, margin_s=1.0)
"""Of the elected one: nothing that works waits for it."""

STATUSES, ADDRESSES = "statuses", "addresses"  # the only keys of their reconcilers


class LoadBalancer:
    """All that one agent does for LoadBalancer Services; `not_able` is why its node could not answer now."""

    def __init__(
        self, config: Config, store: Store, source: Source, reports: Reports, not_able: Callable[[], str]
    ) -> None:
        self._node = config.node_name
        self._pools = config.load_balancer_pools
        self._store = store
        self._services: dict[Name, Service] = {}
        self._elected = Candidate(
            LEASE, self._node, source.leases, TIMING, changed=lambda: self._statuses.mark(STATUSES)
        )
        self._allocator = Allocator(self._pools, source, reports, lambda: self._elected.held)
        self._announcer = Announcer(self._node, source.leases, not_able)
        self._statuses = Reconciler[str]("load-balancer-statuses", self._sync_statuses, expected=ApiError)
        self._addresses = Reconciler[str]("load-balancer-addresses", self._sync_addresses)

    # What the agent tells

    def take(self, event: Event, changed: Iterable[Changed]) -> None:
        """Take what an event has changed in the store."""
        if isinstance(event, Synced) and event.kind in KINDS:
            self._statuses.mark(STATUSES)
            self._addresses.mark(ADDRESSES)
        for each in changed:
            if each.kind == "Service" and self._is_ours(each):
                self._statuses.mark(STATUSES)
                self._addresses.mark(ADDRESSES)
            elif each.kind == "Node" or (each.kind == "EndpointSlice" and self._is_of_ours(each)):
                self._addresses.mark(ADDRESSES)
            if each.kind == "Node" and _addresses(each.before) != _addresses(each.after):
                self._statuses.mark(STATUSES)

    def use_link(self, name: str, index: int) -> None:
        """The node's uplink, on which it answers."""
        self._announcer.use_link(name, index)

    # Life

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._elected.run())
            tasks.create_task(self._statuses.loop())
            tasks.create_task(self._addresses.loop())
            tasks.create_task(self._announcer.run())

    async def close(self) -> None:
        """Hand everything over to other nodes."""
        await asyncio.gather(self._announcer.close(), self._elected.resign(RESIGN_S))

    def announced(self) -> Mapping[IPAddress, str]:
        """The addresses that this node answers for, and the Lease of each."""
        return self._announcer.answered()

    def status(self) -> Mapping[str, object]:
        """Pools and who announces what, for people."""
        allocation = allocate(self._pools, self._services.values())
        return {
            "elected": self._elected.holder,
            "pools": [
                {
                    "name": pool.name,
                    "family": family,
                    "used": allocation.used(pool, family),
                    "size": pool.size(family),
                }
                for pool in self._pools
                for family in sorted({each.family for each in pool.ranges})
            ],
            "announced": {str(ip): lease for ip, lease in self._announcer.answered().items()},
            "leases": dict(self._announcer.leases()),
            "silent_because": self._announcer.reason(),
        }

    # Work

    async def _sync_statuses(self, _: frozenset[str]) -> None:
        if self._listed():
            taken = node_addresses(self._store.snapshot.nodes.values())
            await self._allocator.sync(self._services.values(), taken)

    async def _sync_addresses(self, _: frozenset[str]) -> None:
        if not self._listed():
            return
        snapshot = self._store.snapshot
        nodes = tuple(snapshot.nodes.values())
        self._announcer.plan(
            shards(self._pools, self._services.values(), nodes, lambda key: snapshot.slices_of(key).values())
        )
        self._stand_for_election(nodes)

    def _stand_for_election(self, nodes: Iterable[Node]) -> None:
        """Ready nodes can be elected; when there is none, any."""
        ready = [node.name for node in nodes if node.ready]
        names = order(LEASE, ready or [node.name for node in nodes])
        rank = names.index(self._node) if self._node in names else None
        self._elected.want(rank, observe_every(rank, len(names)))

    def _listed(self) -> bool:
        return all(kind in self._store.synced for kind in KINDS)

    def _is_ours(self, changed: Changed) -> bool:
        """Whether the change is about a Service that has or may have addresses; note what it is now."""
        known = self._services.pop(changed.key, None) if isinstance(changed.key, tuple) else None
        service = changed.after
        if isinstance(service, Service) and (service.type == "LoadBalancer" or addresses_of(service)):
            self._services[service.key] = service
            return True
        return known is not None

    def _is_of_ours(self, changed: Changed) -> bool:
        """Whether the endpoints are those of a Service that only nodes with endpoints answer for."""
        for item in (changed.before, changed.after):
            if isinstance(item, EndpointSlice):
                service = self._services.get((item.namespace, item.service))
                if service is not None and service.external_traffic_policy == "Local":
                    return True
        return False


def _addresses(node: object) -> frozenset[IPAddress]:
    return node_addresses((node,)) if isinstance(node, Node) else frozenset()
