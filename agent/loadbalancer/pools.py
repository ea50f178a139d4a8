"""Pools of addresses for Services of type LoadBalancer, as the configuration says them.

    load_balancer_pools:
      - name: office                            # required, one of its kind
        addresses:                              # required: CIDRs, FIRST-LAST, single addresses, both families
          - 192.0.2.192/26
          - 2001:db8:7::100-2001:db8:7::1ff
        namespaces: [web]                       # only Services of these; default: of all
        service_selector: {tier: public}        # only Services with these labels; default: any
        auto_assign: true                       # false: only for Services that name the pool or its address

A range written FIRST-LAST has exactly those addresses.  A CIDR leaves out those that some equipment does not
take for a host: with IPv4 the addresses that end in .0 or .255, with IPv6 the first (the subnet's routers,
RFC 4291 section 2.6.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network, summarize_address_range
from itertools import combinations

from agent.cluster import values
from agent.cluster.model import IPAddress, IPNetwork

_FIELDS = ("name", "addresses", "namespaces", "service_selector", "auto_assign")
_UNUSABLE = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "::ffff:0:0/96",
        "fe80::/10",
        "ff00::/8",
    )
)


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses from first to last, both of one family; `edges` says whether those at subnets' ends count."""

    first: IPAddress
    last: IPAddress
    edges: bool = True

    @property
    def family(self) -> int:
        return self.first.version

    @property
    def size(self) -> int:
        """How many addresses can be given."""
        first, last = int(self.first), int(self.last)
        count = last - first + 1
        if self.edges:
            return count
        if self.family == 6:
            return count - 1
        return count - sum(_ending(end, first, last) for end in (0, 255))

    def __contains__(self, address: IPAddress) -> bool:
        if address.version != self.family or not int(self.first) <= int(address) <= int(self.last):
            return False
        return self.edges or not self._is_edge(address)

    def __iter__(self) -> Iterator[IPAddress]:
        for number in range(int(self.first), int(self.last) + 1):
            address = type(self.first)(number)
            if self.edges or not self._is_edge(address):
                yield address

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def networks(self) -> Iterator[IPNetwork]:
        """All addresses from first to last."""
        yield from summarize_address_range(self.first, self.last)

    def overlaps(self, other: AddressRange) -> bool:
        return (
            self.family == other.family
            and int(self.first) <= int(other.last)
            and int(other.first) <= int(self.last)
        )

    def _is_edge(self, address: IPAddress) -> bool:
        return address == self.first if self.family == 6 else int(address) & 255 in (0, 255)


@dataclass(frozen=True, slots=True)
class Pool:
    """Some addresses, and which Services may have them; empty `namespaces` and `service_selector` are all."""

    name: str
    ranges: tuple[AddressRange, ...]
    namespaces: frozenset[str] = frozenset()
    service_selector: Mapping[str, str] = field(default_factory=dict)
    auto_assign: bool = True

    def __contains__(self, address: IPAddress) -> bool:
        return any(address in each for each in self.ranges)

    def serves(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether a Service of this namespace with these labels may have addresses of the pool."""
        if self.namespaces and namespace not in self.namespaces:
            return False
        return all(labels.get(key) == value for key, value in self.service_selector.items())

    def networks(self) -> Iterator[IPNetwork]:
        """The addresses in CIDRs, with those that are never given."""
        for each in self.ranges:
            yield from each.networks()

    def size(self, family: int) -> int:
        """How many addresses of a family the pool has."""
        return sum(each.size for each in self.ranges if each.family == family)


def parse_pools(value: object) -> tuple[Pool, ...]:
    """Pools from YAML's lists and mappings, or from their JSON.

    Raises ValueError with what is allowed in the place that is wrong.
    """
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of pools, each with a name and addresses")
    pools = tuple(_pool(item, f"[{index}]") for index, item in enumerate(value))
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"a list of pools in which only one is called {name!r}")
    ranges = [(pool.name, each) for pool in pools for each in pool.ranges]
    for (one, first), (other, second) in combinations(ranges, 2):
        if first.overlaps(second):
            raise ValueError(
                f"a list of pools without overlaps: {first} of {one!r} and {second} of {other!r} do overlap"
            )
    return pools


def _from_json(text: str) -> object:
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"a list of pools as JSON ({error})") from None


def _pool(item: object, place: str) -> Pool:
    if isinstance(item, Pool):
        return item
    if not isinstance(item, dict):
        raise ValueError(f"a list of pools in which {place} has a name and addresses")
    for key in item:
        if key not in _FIELDS:
            raise ValueError(f"a list of pools in which {place} has only {', '.join(_FIELDS)}, not {key!r}")
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a list of pools in which {place}.name is a word")
    addresses = _strings(item.get("addresses"), f"{place}.addresses")
    if not addresses:
        raise ValueError(f"a list of pools in which {place}.addresses names at least one address")
    auto = item.get("auto_assign", True)
    if not isinstance(auto, bool):
        raise ValueError(f"a list of pools in which {place}.auto_assign is true or false")
    return Pool(
        name=name,
        ranges=tuple(_range(text, f"{place}.addresses[{at}]") for at, text in enumerate(addresses)),
        namespaces=frozenset(_strings(item.get("namespaces"), f"{place}.namespaces")),
        service_selector=_labels(item.get("service_selector"), f"{place}.service_selector"),
        auto_assign=auto,
    )


def _strings(value: object, place: str) -> Sequence[str]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"a list of pools in which {place} is a list of words")
    return value


def _labels(value: object, place: str) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in (*value, *value.values())):
        raise ValueError(f"a list of pools in which {place} is labels, such as {{tier: public}}")
    return value


def _range(text: str, place: str) -> AddressRange:
    found = _parse_range(text)
    if found is None:
        raise ValueError(
            f"a list of pools in which {place} is a CIDR, FIRST-LAST or an address, not {text!r}"
        )
    for network in _UNUSABLE:
        if found.overlaps(AddressRange(network[0], network[-1])):
            raise ValueError(f"a list of pools in which {place} has no address of {network}, as {text!r} has")
    return found


def _parse_range(text: str) -> AddressRange | None:
    if "/" in text:
        network = values.network(text.strip(), "", [])
        if network is None:
            return None
        return AddressRange(network[0], network[-1], edges=network.max_prefixlen - network.prefixlen < 2)
    first, dash, last = text.partition("-")
    low = values.address(first.strip(), "", [])
    high = values.address(last.strip(), "", []) if dash else low
    if low is None or high is None or low.version != high.version or int(low) > int(high):
        return None
    return AddressRange(low, high)


def _ending(octet: int, first: int, last: int) -> int:
    """How many numbers from first to last end in this octet."""
    return (last - octet) // 256 - (first - octet - 1) // 256
