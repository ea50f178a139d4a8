"""Which address a Pod gets: one of each family that the Node's podCIDRs have.

    first        cursor                                    last
      | given before |  never given since the start  ------>|   the cursor goes through the range once,
      +--------------+-------------------------------------+   past what it finds in use or resting
                        freed --> rests --> given again, the longest freed first

So an address comes back as late as the range allows, and giving one costs the same in a /28 as in a /64.
The network address is never given (it is the node's own on the VXLAN device, and IPv6's anycast for
routers), nor IPv4's broadcast address.

Pure: times are seconds of one monotonic clock, given by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network


class BadCidrsError(ValueError):
    """The Node's podCIDRs cannot be used; the message names which and why."""


class ExhaustedError(Exception):
    """No address of a family is free; the message names every range of it and what became of it."""


class Use(NamedTuple):
    """How many addresses of a range are Pods', rest, and can be given at all."""

    cidr: IPNetwork
    used: int
    resting: int
    size: int


def check_cidrs(cidrs: Sequence[IPNetwork]) -> None:
    """Raise BadCidrsError for a range that has no address for a Pod, and for ranges that overlap."""
    for i, cidr in enumerate(cidrs):
        if reason := _unusable(cidr):
            raise BadCidrsError(f"podCIDR {cidr} {reason}")
        for other in cidrs[:i]:
            if cidr.version == other.version and cidr.overlaps(other):
                raise BadCidrsError(f"podCIDR {cidr} overlaps {other}")


def _unusable(cidr: IPNetwork) -> str:
    if cidr.is_loopback or cidr.is_multicast or cidr.is_link_local or cidr.network_address.is_unspecified:
        return "is not a range of unicast addresses that can be routed"
    if _size(cidr) < 1:
        return "is too small to hold an address for a Pod"
    return ""


def _size(cidr: IPNetwork) -> int:
    return cidr.num_addresses - (2 if cidr.version == 4 else 1)


class _Range:
    """One podCIDR; addresses are numbers inside it, 1 is the first that is given."""

    __slots__ = ("_base", "_next", "_unseen", "cidr", "resting", "used")

    def __init__(self, cidr: IPNetwork) -> None:
        self.cidr = cidr
        self.used: set[int] = set()
        self.resting: dict[int, float] = {}  # until when, in the order of that
        self._base = int(cidr.network_address)
        self._next = 1
        self._unseen = _size(cidr)

    def address(self, offset: int) -> IPAddress:
        return self.cidr.network_address + offset

    def offset(self, address: IPAddress) -> int:
        return int(address) - self._base

    def begin_behind(self, offset: int) -> None:
        """Let the cursor start there; it still goes through the whole range."""
        if 1 <= offset <= _size(self.cidr):
            self._next = offset % _size(self.cidr) + 1
            self._unseen = _size(self.cidr)

    def find(self, now: float) -> int | None:
        """The number to be given next; the cursor stays on it."""
        while self._unseen:
            if self._next not in self.used and self._next not in self.resting:
                return self._next
            self._next = self._next % _size(self.cidr) + 1
            self._unseen -= 1
        oldest = next(iter(self.resting.items()), None)
        return oldest[0] if oldest and oldest[1] <= now else None

    def __str__(self) -> str:
        rest = f" and {len(self.resting)} resting" if self.resting else ""
        return f"podCIDR {self.cidr}: {len(self.used)} of {_size(self.cidr)} addresses in use{rest}"


class Addresses:
    """The addresses of this node's Pods. `rest_s` is how many seconds a freed one is not given again."""

    def __init__(self, rest_s: float) -> None:
        self._rest_s = rest_s
        self._ranges: list[_Range] = []
        self._last: tuple[IPAddress, ...] = ()
        self._used_elsewhere: set[IPAddress] = set()
        self._resting_elsewhere: dict[IPAddress, float] = {}

    @property
    def cidrs(self) -> tuple[IPNetwork, ...]:
        """The ranges that addresses are given from."""
        return tuple(each.cidr for each in self._ranges)

    @property
    def used(self) -> frozenset[IPAddress]:
        """Every address in use, also those of ranges that are no longer the Node's."""
        return frozenset(self._used_elsewhere).union(
            each.address(offset) for each in self._ranges for offset in each.used
        )

    def use(self) -> tuple[Use, ...]:
        """What became of each range."""
        return tuple(Use(r.cidr, len(r.used), len(r.resting), _size(r.cidr)) for r in self._ranges)

    def set_cidrs(self, cidrs: Sequence[IPNetwork]) -> None:
        """Give from these ranges from now on; what is in use stays so. Raises BadCidrsError."""
        check_cidrs(cidrs)
        used = self.used
        resting = self._resting_elsewhere | {
            each.address(offset): until for each in self._ranges for offset, until in each.resting.items()
        }
        known = {each.cidr: each for each in self._ranges}
        self._ranges = [known.get(cidr) or self._new(cidr) for cidr in cidrs]
        self._used_elsewhere, self._resting_elsewhere = set(), {}
        for each in self._ranges:
            each.resting.clear()
        for address in used:
            self.hold(address)
        for address, until in sorted(resting.items(), key=lambda item: item[1]):
            self._rest(address, until)

    def take(self, now: float) -> tuple[IPAddress, ...]:
        """Return one address of each family, IPv4 first. Raises ExhaustedError, nothing taken."""
        chosen = [self._find(version, now) for version in (4, 6) if self._of(version)]
        for range_, offset in chosen:
            range_.resting.pop(offset, None)
            range_.used.add(offset)
        return tuple(range_.address(offset) for range_, offset in chosen)

    def hold(self, address: IPAddress) -> None:
        """This address is in use already."""
        if range_ := self._range(address):
            range_.resting.pop(range_.offset(address), None)
            range_.used.add(range_.offset(address))
        else:
            self._resting_elsewhere.pop(address, None)
            self._used_elsewhere.add(address)

    def free(self, addresses: Iterable[IPAddress], now: float) -> None:
        """These addresses, in use until now, may be given again after their rest."""
        for address in addresses:
            self.rest(address, now)

    def rest(self, address: IPAddress, since: float) -> None:
        """This address was freed then; calls come in the order of that."""
        self._rest(address, since + self._rest_s)

    def begin_behind(self, addresses: Iterable[IPAddress]) -> None:
        """These were given last, before the start: go on behind them, also in ranges that come later."""
        self._last = tuple(addresses)
        for address in self._last:
            if range_ := self._range(address):
                range_.begin_behind(range_.offset(address))

    def _new(self, cidr: IPNetwork) -> _Range:
        range_ = _Range(cidr)
        for address in self._last:
            if address in cidr:
                range_.begin_behind(range_.offset(address))
        return range_

    def _rest(self, address: IPAddress, until: float) -> None:
        if range_ := self._range(address):
            offset = range_.offset(address)
            range_.used.discard(offset)
            range_.resting.pop(offset, None)
            range_.resting[offset] = until
        else:
            self._used_elsewhere.discard(address)
            self._resting_elsewhere[address] = until

    def _of(self, version: int) -> list[_Range]:
        return [each for each in self._ranges if each.cidr.version == version]

    def _range(self, address: IPAddress) -> _Range | None:
        return next((each for each in self._ranges if address in each.cidr), None)

    def _find(self, version: int, now: float) -> tuple[_Range, int]:
        ranges = self._of(version)
        for range_ in ranges:
            offset = range_.find(now)
            if offset is not None:
                return range_, offset
        raise ExhaustedError(f"no IPv{version} address is free: " + "; ".join(map(str, ranges)))
