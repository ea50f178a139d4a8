"""Which Service of type LoadBalancer has which address: a pure function of the pools and the Services.

    1  what a Service has (its status) and may have, it keeps        the oldest first, so that the oldest wins
    2  what a Service asks for by address, it gets, or nothing       the oldest first
    3  the rest get the lowest free address of the first pool that is for them and gives of its own accord

A Service asks by annotations:

    podwall.dev/load-balancer-ips: 192.0.2.200,2001:db8:7::100    these addresses, at most one of a family
    podwall.dev/load-balancer-pool: office                        an address of this pool
    podwall.dev/sharing-key: dns                                  may share an address with others of this key

or by spec.loadBalancerIP, which the annotation overrides.  Sharing needs disjoint ports, and the same nodes
to answer: externalTrafficPolicy Cluster with all, or Local with all and the same Pods behind them.

Services of another loadBalancerClass are nobody's business here.  What stays without an address is told in a
sentence that names the field.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from agent.cluster import values
from agent.cluster.model import Family, IPAddress, Problem, Service
from agent.loadbalancer.pools import Pool

CLASS = "podwall.dev/pool"
ADDRESSES = "podwall.dev/load-balancer-ips"
POOL = "podwall.dev/load-balancer-pool"
SHARING_KEY = "podwall.dev/sharing-key"

_SINCE_EVER = datetime.min.replace(tzinfo=UTC)

Name = tuple[str, str]


def is_ours(service: Service) -> bool:
    """Whether podwall gives the Service its addresses."""
    return service.type == "LoadBalancer" and service.load_balancer_class in (None, CLASS)


def addresses_of(service: Service) -> tuple[IPAddress, ...]:
    """The addresses in a Service's status at which nodes answer."""
    return tuple(each.ip for each in service.load_balancer if each.ip and each.ip_mode == "VIP")


def age(service: Service) -> tuple[datetime, Name]:
    """What sorts Services oldest first."""
    return service.created or _SINCE_EVER, service.key


@dataclass(frozen=True, slots=True)
class Allocation:
    """What statuses shall say (of every Service that podwall writes), what is wrong, and who has what."""

    addresses: Mapping[Name, tuple[IPAddress, ...]]
    problems: Mapping[Name, tuple[str, ...]]
    holders: Mapping[IPAddress, tuple[Name, ...]]

    def used(self, pool: Pool, family: int) -> int:
        """How many addresses of a pool are given."""
        return sum(each.version == family and each in pool for each in self.holders)


def allocate(
    pools: Sequence[Pool], services: Iterable[Service], taken: Container[IPAddress] = ()
) -> Allocation:
    """Give each Service its addresses; none that is `taken`, by a Node."""
    services = sorted(services, key=age)
    book = _Book(pools, taken)
    wishes = [_wish(service) for service in services if is_ours(service)]
    for wish in wishes:
        _keep(wish, book)
    for wish in wishes:
        _grant_requests(wish, book)
    for wish in wishes:
        _grant_any(wish, book)
    given = {
        wish.service.key: tuple(wish.given[f] for f in wish.families if f in wish.given) for wish in wishes
    }
    left = {each.key: () for each in services if each.type != "LoadBalancer" and _holds_any(each, pools)}
    return Allocation(
        addresses={**left, **given},
        problems={wish.service.key: tuple(wish.problems) for wish in wishes if wish.problems},
        holders={ip: tuple(sorted(each.key for each in held)) for ip, held in book.holders.items()},
    )


def _holds_any(service: Service, pools: Iterable[Pool]) -> bool:
    return any(ip in pool for pool in pools for ip in addresses_of(service))


@dataclass(slots=True)
class _Wish:
    """What a Service wants and what it has so far; `granted` False: it gets nothing, a request is bad."""

    service: Service
    families: tuple[Family, ...]
    requested: dict[int, IPAddress] = field(default_factory=dict)
    pool: str = ""
    granted: bool = True
    given: dict[int, IPAddress] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def refuse(self, problem: str) -> None:
        self.granted = False
        self.problems.append(problem)

    @property
    def missing(self) -> list[Family]:
        """The families for which it has nothing yet; none for a Service that is being deleted."""
        if not self.granted or self.service.deleting:
            return []
        return [family for family in self.families if family not in self.given]


class _Book:
    """Who has which address; the lowest free one of each pool is found without looking at one twice."""

    def __init__(self, pools: Sequence[Pool], taken: Container[IPAddress]) -> None:
        self.pools = pools
        self._taken = taken
        self.holders: dict[IPAddress, list[Service]] = {}
        self._shared: dict[str, list[IPAddress]] = defaultdict(list)
        self._free: dict[tuple[str, int], Iterator[IPAddress]] = {}

    def pool_of(self, address: IPAddress) -> Pool | None:
        return next((pool for pool in self.pools if address in pool), None)

    def give(self, address: IPAddress, wish: _Wish) -> None:
        holders = self.holders.setdefault(address, [])
        if not holders and (key := _sharing_key(wish.service)):
            self._shared[key].append(address)
        holders.append(wish.service)
        wish.given[address.version] = address

    def objection(self, address: IPAddress, service: Service) -> str:
        """Why the Service cannot have the address beside those who have it; "" when it can."""
        if address in self._taken:
            return "it is the address of a Node"
        for other in self.holders.get(address, ()):
            if reason := _collision(service, other):
                return f"Service {'/'.join(other.key)} has it{reason}"
        return ""

    def shared(self, key: str, family: int) -> list[IPAddress]:
        return [address for address in self._shared.get(key, ()) if address.version == family]

    def lowest_free(self, pool: Pool, family: int) -> IPAddress | None:
        place = (pool.name, family)
        if place not in self._free:
            self._free[place] = (ip for each in pool.ranges if each.family == family for ip in each)
        return next(
            (ip for ip in self._free[place] if ip not in self.holders and ip not in self._taken), None
        )


def _sharing_key(service: Service) -> str:
    return service.annotations.get(SHARING_KEY, "")


def _collision(one: Service, other: Service) -> str:
    key = _sharing_key(one)
    if not key or key != _sharing_key(other):
        return f", and they have no common annotation {SHARING_KEY}"
    ports = {(port.protocol, port.port) for port in one.ports}
    for port in other.ports:
        if (port.protocol, port.port) in ports:
            return f", and both have port {port.port}/{port.protocol}"
    if one.external_traffic_policy != other.external_traffic_policy:
        return ", with another externalTrafficPolicy"
    alike = one.namespace == other.namespace and one.selector and one.selector == other.selector
    if one.external_traffic_policy == "Local" and not alike:
        return ", and with externalTrafficPolicy Local only Services with the same selector can share it"
    return ""


# What a Service wants


def _wish(service: Service) -> _Wish:
    wish = _Wish(service, _families(service), pool=service.annotations.get(POOL, ""))
    for problem in service.problems:
        if problem.field == "spec.loadBalancerIP" and ADDRESSES not in service.annotations:
            wish.refuse(str(problem))
    for place, ip in _requests(service, wish):
        if ip.version not in wish.families:
            wish.refuse(f"{place}: {ip} is of none of the Service's ipFamilies")
        elif ip.version in wish.requested:
            wish.refuse(f"{place}: {ip} is a second address of its family, and a Service has one of each")
        else:
            wish.requested[ip.version] = ip
    return wish


def _families(service: Service) -> tuple[Family, ...]:
    families: tuple[Family, ...] = service.ip_families or tuple(
        dict.fromkeys(ip.version for ip in service.cluster_ips)
    )
    return (families or (4,))[: 1 if service.ip_family_policy == "SingleStack" else 2]


def _requests(service: Service, wish: _Wish) -> Iterator[tuple[str, IPAddress]]:
    if ADDRESSES not in service.annotations:
        if service.load_balancer_ip is not None:
            yield "spec.loadBalancerIP", service.load_balancer_ip
        return
    place = f"metadata.annotations[{ADDRESSES}]"
    found: list[Problem] = []
    for text in service.annotations[ADDRESSES].split(","):
        ip = values.address(text.strip(), place, found)
        if ip is not None:
            yield place, ip
    for problem in found:
        wish.refuse(str(problem))


# What it gets


def _keep(wish: _Wish, book: _Book) -> None:
    for ip in addresses_of(wish.service):
        if not wish.granted or ip.version not in wish.families or ip.version in wish.given:
            continue
        pool = book.pool_of(ip)
        if pool is None or not _may_use(wish, pool) or wish.requested.get(ip.version, ip) != ip:
            continue
        if not book.objection(ip, wish.service):
            book.give(ip, wish)


def _may_use(wish: _Wish, pool: Pool) -> bool:
    return pool.serves(wish.service.namespace, wish.service.labels) and wish.pool in ("", pool.name)


def _grant_requests(wish: _Wish, book: _Book) -> None:
    for family in wish.missing:
        if ip := wish.requested.get(family):
            pool = book.pool_of(ip)
            if pool is None or not _may_use(wish, pool):
                wish.problems.append(f"{ip} was asked for, but is in no pool that is for this Service")
            elif reason := book.objection(ip, wish.service):
                wish.problems.append(f"{ip} was asked for, but {reason}")
            else:
                book.give(ip, wish)


def _grant_any(wish: _Wish, book: _Book) -> None:
    missing = [family for family in wish.missing if family not in wish.requested]
    without_pool = []
    for family in missing:
        pools = _pools_for(wish, book, family)
        address = _any(wish, book, pools, family)
        if address is not None:
            book.give(address, wish)
        elif pools:
            names = ", ".join(pool.name for pool in pools)
            wish.problems.append(f"no IPv{family} address is free for it: add addresses to pool {names}")
        else:
            without_pool.append(family)
    for family in without_pool:
        if not wish.given or wish.service.ip_family_policy != "PreferDualStack":
            wish.problems.append(_no_pool(wish, family))


def _any(wish: _Wish, book: _Book, pools: Sequence[Pool], family: int) -> IPAddress | None:
    for ip in book.shared(_sharing_key(wish.service), family):
        if any(ip in pool for pool in pools) and not book.objection(ip, wish.service):
            return ip
    free = (book.lowest_free(pool, family) for pool in pools)
    return next((ip for ip in free if ip is not None), None)


def _pools_for(wish: _Wish, book: _Book, family: int) -> list[Pool]:
    """The pools that may serve it of their own accord; the one of its other address comes first."""
    pools = [
        pool
        for pool in book.pools
        if pool.size(family) and _may_use(wish, pool) and (pool.auto_assign or wish.pool)
    ]
    return sorted(pools, key=lambda pool: not any(ip in pool for ip in wish.given.values()))


def _no_pool(wish: _Wish, family: int) -> str:
    if wish.pool:
        return (
            f"metadata.annotations[{POOL}]: no pool {wish.pool!r} has IPv{family} addresses for this Service"
        )
    return f"no pool of load_balancer_pools gives IPv{family} addresses to this Service"
