"""The Services as elements of nftables, compiled again only where a change can be felt.

    changed objects --apply--> owners whose items may have changed
    owner --items--> its items, from what is known now

    owner                                 owns
    ("services",)                         the table, its chains and maps
    ("service", namespace, name)          the elements of a Service
    ("balancer", family, count, timeout)  the chain that all lists of this length share
    ("node-addresses",)                   what is known of nodes: own address, others' addresses, Pod ranges

A change of a Service or of one of its slices costs that Service. It reaches others only where two claim one
address and port (the oldest has it) and where numbers of names collide (`agent.compile.service_ids`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import starmap
from math import inf
from types import MappingProxyType
from typing import NamedTuple, cast

from agent.cluster.model import EndpointSlice, Family, IPAddress, Node, Protocol, Service
from agent.cluster.store import Changed
from agent.compile import balancers
from agent.compile import service as of_service
from agent.compile import service_chains as chains
from agent.compile.balancers import Balancer
from agent.compile.endpoints import Backend, candidates, choose, has_hints, ready_here
from agent.compile.packets import FAMILIES
from agent.compile.service import (
    Backends,
    Claim,
    Frontend,
    ListOf,
    ServiceSettings,
    list_name,
    service_owner,
)
from agent.compile.service_claims import Claims, Endpoints, ServiceKey
from agent.compile.service_ids import Name, Numbers, name_digest
from agent.compile.service_nodes import KnownNodes
from agent.nft.model import Item, Owner


class ServiceName(NamedTuple):
    """The Service behind a frontend, and which of its ports."""

    namespace: str
    name: str
    port: str


@dataclass(frozen=True, slots=True)
class _Served:
    """A Service that is served, and what follows from it alone."""

    service: Service
    ways: tuple[Frontend, ...]
    lists: tuple[ListOf, ...]

    @property
    def names(self) -> set[Name]:
        return {list_name(self.service.key, port, reach) for port, _, reach in self.lists}


class ServiceCompiler:
    """Compiles the Services for one node; pure: it is fed, and asked what its owners own."""

    def __init__(self, node_name: str, settings: ServiceSettings) -> None:
        self._settings = settings
        self._nodes = KnownNodes(node_name)
        self._served: dict[ServiceKey, _Served] = {}
        self._slices: dict[ServiceKey, dict[ServiceKey, EndpointSlice]] = {}
        self._backends: dict[ServiceKey, tuple[Backends, ...]] = {}
        self._hinted: set[ServiceKey] = set()
        self._claims = Claims()
        self._numbers = Numbers[Name](chains.MAGIC, name_digest)
        self._endpoints = {family: Endpoints() for family in FAMILIES}
        self._balancers: Counter[tuple[Family, Balancer]] = Counter()
        self._problems: dict[ServiceKey, tuple[str, ...]] = {}
        self._health: dict[ServiceKey, tuple[int, int]] = {}

    @property
    def owners(self) -> frozenset[Owner]:
        """Every owner that owns something; a full compile is `items` of each of them."""
        if not self._settings.enabled:
            return frozenset((chains.STATIC,))
        services = (service_owner(*key) for key in self._served)
        balancers = (balancer.owner(family) for family, balancer in self._balancers)
        return frozenset((chains.STATIC, chains.NODE_ADDRESSES, *services, *balancers))

    def apply(self, changes: Iterable[Changed]) -> frozenset[Owner]:
        """Take changed objects; return the owners that have to be compiled again."""
        if not self._settings.enabled:
            return frozenset()
        dirty: set[Owner] = set()
        edited: set[ServiceKey] = set()  # those whose items differ for other reasons than endpoints
        touched: set[ServiceKey] = set()  # those whose endpoints may be others
        for change in changes:
            if change.kind == "Service":
                edited |= self._take_service(
                    cast("ServiceKey", change.key), cast("Service | None", change.after)
                )
            elif change.kind == "EndpointSlice":
                touched |= self._take_slice(change)
            elif change.kind == "Node":
                moved = self._nodes.take(cast("str", change.key), cast("Node | None", change.after))
                dirty |= {chains.NODE_ADDRESSES} if moved.addresses else set()
                touched |= self._hinted if moved.zone else set()
        return frozenset(dirty | self._settle(edited, touched))

    def items(self, owner: Owner) -> tuple[Item, ...]:
        """What an owner owns now, nothing if it is gone; () for the owners of others."""
        match owner:
            case chains.STATIC:
                settings = self._settings
                return chains.static(settings.enabled, settings.node_port_addresses, settings.pools)
            case chains.NODE_ADDRESSES if self._settings.enabled:
                return tuple(self._nodes.items())
            case ("service", namespace, name) if (namespace, name) in self._served:
                return tuple(self._items((namespace, name)))
            case ("balancer", _, _, _):
                balancer, family = balancers.balancer_of(owner)
                if (family, balancer) in self._balancers:
                    return tuple(balancers.balancer(balancer, family))
        return ()

    def problems(self) -> Mapping[ServiceKey, tuple[str, ...]]:
        """What of a Service is not served as it is written, in sentences that name the field."""
        return MappingProxyType(self._problems)

    def lists(self, key: ServiceKey) -> tuple[Backends, ...]:
        """The lists of a Service's endpoints as this node has them; () for one that is not served."""
        return self._backends.get(key, ())

    def health_checks(self) -> Mapping[ServiceKey, tuple[int, int]]:
        """The healthCheckNodePort of each Service that has one, and its number of ready endpoints here."""
        return MappingProxyType(self._health)

    def endpoints_of(
        self, address: IPAddress, protocol: Protocol, port: int, node_port: bool = False
    ) -> frozenset[Backend] | None:
        """Where a flow to this address and port may have been led, None where no Service is.

        With `node_port` the address is a node's, and only its family counts.
        """
        found = self._way(address, protocol, port, node_port)
        if found is None:
            return None
        key, way = found
        return frozenset(
            backend
            for each in self._backends[key]
            if each.port == way.port and each.family == address.version
            for backend in each.endpoints
        )

    def serving_at(
        self, address: IPAddress, protocol: Protocol, port: int, node_port: bool = False
    ) -> frozenset[Backend] | None:
        """Where a flow to this address and port may go on, None where no Service is.

        Also to endpoints that get no new flows, because they terminate or nearer ones are there.
        """
        found = self._way(address, protocol, port, node_port)
        if found is None:
            return None
        key, way = found
        there = candidates(self._slices.get(key, {}).values(), way.port, address.version)
        return frozenset(backend for backend, each in there.items() if each.ready or each.serving)

    def service_at(
        self, address: IPAddress, protocol: Protocol, port: int, node_port: bool = False
    ) -> ServiceName | None:
        """The Service that has this address and port, or with `node_port` this NodePort."""
        found = self._way(address, protocol, port, node_port)
        return ServiceName(*found[0], found[1].port.name) if found else None

    def _way(
        self, address: IPAddress, protocol: Protocol, port: int, node_port: bool
    ) -> tuple[ServiceKey, Frontend] | None:
        claim = Claim(None if node_port else address, protocol, port)
        key = self._claims.holder(claim)
        if key is None:
            return None
        return key, next(way for way in self._served[key].ways if way.claim == claim)

    # What comes

    def _take_service(self, key: ServiceKey, service: Service | None) -> set[ServiceKey]:
        """Take a Service; returns those whose items may differ: it, its rivals, those with other numbers."""
        before, after = self._served.get(key), self._serve(service)
        if after is not None:
            self._served[key] = after
        elif before is not None:
            del self._served[key]
        had, has = (each.names if each else set() for each in (before, after))
        renumbered = set().union(
            *(self._numbers.drop(name) for name in sorted(had - has)),
            *(self._numbers.take(name) for name in sorted(has - had)),
        )
        wanted, wants = ([way.claim for way in each.ways] if each else [] for each in (before, after))
        rivals = self._claims.move(key, of_service.age(service) if service else inf, wanted, wants)
        return {key} | rivals | {(name[0], name[1]) for name in renumbered}

    def _serve(self, service: Service | None) -> _Served | None:
        if service is None or not of_service.served(service):
            return None
        ways = tuple(of_service.frontends(service, self._settings))
        return _Served(service, ways, of_service.lists(service, ways))

    def _take_slice(self, change: Changed) -> set[ServiceKey]:
        """Take a slice; returns the Services that have other slices now."""
        touched: set[ServiceKey] = set()
        key = cast("ServiceKey", change.key)
        before, after = (cast("EndpointSlice | None", each) for each in (change.before, change.after))
        if before is not None and (service := service_of(before)) in self._slices:
            self._slices[service].pop(key, None)
            if not self._slices[service]:
                del self._slices[service]
            touched.add(service)
        if after is not None and (service := service_of(after)):
            self._slices.setdefault(service, {})[key] = after
            touched.add(service)
        return touched

    # What follows

    def _settle(self, edited: set[ServiceKey], touched: set[ServiceKey]) -> set[Owner]:
        dirty: set[Owner] = set()
        for key in edited | touched:
            before, after = self._backends.get(key, ()), self._choose(key)
            if after != before:
                self._backends[key] = after
                dirty |= self._rebalance(before, after)
                dirty |= set(starmap(service_owner, self._renumber(key, before, after)))
            elif key not in edited:
                continue
            dirty.add(service_owner(*key))
            if not after:
                self._backends.pop(key, None)
        for key in edited | touched:
            self._judge(key)
        return dirty

    def _choose(self, key: ServiceKey) -> tuple[Backends, ...]:
        """The lists of a Service as they should be now."""
        served, named = self._served.get(key), self._slices.get(key, {})
        slices = [named[name] for name in sorted(named)]
        self._hinted.discard(key)
        if served is None:
            return ()
        if has_hints(slices):
            self._hinted.add(key)
        chosen = []
        found = {
            (port, family): candidates(slices, port, family)
            for port, family in dict.fromkeys((port, family) for port, family, _ in served.lists)
        }
        for port, family, reach in served.lists:
            endpoints = choose(found[port, family], reach, self._nodes.here)
            how = of_service.balancer(served.service, len(endpoints))
            chosen.append(Backends(port, family, reach, how, endpoints))
        return tuple(chosen)

    def _rebalance(self, before: tuple[Backends, ...], after: tuple[Backends, ...]) -> set[Owner]:
        """Count who uses which way of picking; the owners of those that come or go."""
        had, has = (
            Counter((of.family, of.balancer) for of in each if of.endpoints) for each in (before, after)
        )
        dirty = set()
        for used in has.keys() | had.keys():
            family, balancer = used
            count = self._balancers[used]
            self._balancers[used] += has[used] - had[used]
            if bool(count) != bool(self._balancers[used]):
                dirty.add(balancer.owner(family))
            if not self._balancers[used]:
                del self._balancers[used]
        return dirty

    def _renumber(
        self, key: ServiceKey, before: tuple[Backends, ...], after: tuple[Backends, ...]
    ) -> set[ServiceKey]:
        """Number the endpoints; the Services that know one by another number now."""
        changed: set[ServiceKey] = set()
        for family, endpoints in self._endpoints.items():
            had, has = (
                {backend for of in each if of.family == family for backend in of.endpoints}
                for each in (before, after)
            )
            changed |= endpoints.move(key, had, has)
        return changed

    def _judge(self, key: ServiceKey) -> None:
        """Say what is wrong with a Service, and how healthy it is on this node."""
        served = self._served.get(key)
        problems = tuple(self._wrong_with(key, served)) if served else ()
        if problems:
            self._problems[key] = problems
        else:
            self._problems.pop(key, None)
        service = served.service if served else None
        if service and service.health_check_node_port and service.external_traffic_policy == "Local":
            ready = ready_here(self._slices.get(key, {}).values(), self._nodes.here)
            self._health[key] = service.health_check_node_port, ready
        else:
            self._health.pop(key, None)

    def _wrong_with(self, key: ServiceKey, served: _Served) -> Iterator[str]:
        for kind, field, address in of_service.addresses(served.service):
            if why := of_service.refused(kind, address, self._settings):
                yield f"{field}: {address} {why}: it is not served"
        for field, port in of_service.repeated(served.service):
            yield f"{field}: {port.port}/{port.protocol} is there already: the first of them counts"
        for way in served.ways:
            holder = self._claims.holder(way.claim)
            if holder is not None and holder != key:
                number = f"{way.claim.port}/{way.claim.protocol}"
                at = way.claim.address
                what = f"NodePort {number}" if at is None else f"port {number} of {at}"
                yield f"{way.field}: Service {'/'.join(holder)} is older and has {what}"
        for backends in self._backends.get(key, ()):
            if backends.balancer.count < len(backends.endpoints):
                yield (
                    f"spec.sessionAffinity: only the first {balancers.MOST_STICKY} of "
                    f"{len(backends.endpoints)} endpoints are used"
                )

    # What is owned

    def _items(self, key: ServiceKey) -> Iterator[Item]:
        served = self._served[key]
        service = served.service
        numbers = {name: self._numbers.of(name) for name in served.names}
        filled: set[ListOf] = set()  # the lists that have endpoints
        for of in self._backends[key]:
            named = list_name(key, of.port, of.reach)
            yield from of_service.backends(of, numbers[named], self._endpoints[of.family].numbers.of)
            if of.endpoints:
                filled.add((of.port, of.family, of.reach))
        yield from of_service.cluster_addresses(service)
        for way in served.ways:
            if self._claims.holder(way.claim) == key:
                yield from of_service.entrances(service, way, numbers, filled)


def service_of(of: EndpointSlice) -> ServiceKey | None:
    """The Service whose endpoints a slice has, None for one that somebody else serves."""
    if not of.service or any(label in of.labels for label in of_service.SOMEBODY_ELSES):
        return None
    return of.namespace, of.service
