"""How an endpoint of a list is picked: chains that all lists of one length share.

    balance     0x5a1b2c3d  ->  3                 any of three
                0x5c4d3e2f  ->  0x800f0002        one of two, for 60 s the same for a client
    balancers   3           ->  jump any_of_3     (as a packet's `meta mark`)

A chain is there as long as a list of its kind is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.cluster.model import Family
from agent.compile.names import SERVICES_TABLE
from agent.compile.packets import IP
from agent.compile.service_chains import BALANCERS, CT_MARK, LISTS, MARK, SERVING, STICKY_CLIENTS
from agent.nft.model import (
    Assign,
    Chain,
    Concat,
    Element,
    Expression,
    Hash,
    Item,
    Lookup,
    Match,
    Named,
    Numgen,
    Owner,
    Payload,
    Rule,
    Update,
    Verdict,
)

STICKY = 0x8000_0000  # beside it the timeout in seconds and the count
COUNT_BITS = 14
MOST_STICKY = (1 << COUNT_BITS) - 1
HASH_MOD, HASH_SEED = 0x7FFF_FFFF, 0x706F_6477


@dataclass(frozen=True, slots=True, order=True)
class Balancer:
    """How an endpoint of a list is picked: any of `count`, with `timeout` (seconds) a client's own."""

    count: int
    timeout: int = 0

    @property
    def mark(self) -> int:
        """What stands for it in the map `balance`."""
        return STICKY | self.timeout << COUNT_BITS | self.count if self.timeout else self.count

    def chain(self, family: Family) -> str:
        """The chain that picks."""
        if self.timeout:
            return f"sticky_of_{self.count}_for_{self.timeout}s_ipv{family}"
        return f"any_of_{self.count}_ipv{family}"

    def owner(self, family: Family) -> Owner:
        """Who owns the chain."""
        return ("balancer", str(family), str(self.count), str(self.timeout))


def balancer_of(owner: Owner) -> tuple[Balancer, Family]:
    """What an owner ("balancer", ...) stands for."""
    _, family, count, timeout = owner
    return Balancer(int(count), int(timeout)), 4 if family == "4" else 6


def balancer(of: Balancer, family: Family) -> Iterator[Item]:
    """The chain that picks an endpoint, and what leads to it."""
    yield Element(BALANCERS[family], of.mark, Verdict("jump", of.chain(family)))
    rules = _pick_sticky(of, family) if of.timeout else _pick(of, family)
    yield Chain(SERVICES_TABLE, of.chain(family), tuple(rules))


def _pick(of: Balancer, family: Family) -> Iterator[Rule]:
    yield Rule((Assign(CT_MARK, _any(of, family)), Verdict("goto", f"to_endpoint_ipv{family}")))


def _any(of: Balancer, family: Family) -> Lookup:
    return Lookup(Concat((CT_MARK, Numgen("random", of.count))), Named(LISTS[family].name))


def _pick_sticky(of: Balancer, family: Family) -> Iterator[Rule]:
    """The chain goes on where the set of clients is full: they get any endpoint each time.

    An update refreshes the time of an entry but leaves its endpoint (kernel 6.18), so an entry whose endpoint
    is gone is deleted first.
    """
    sticky = STICKY_CLIENTS[family].name
    client = Concat((_client(family), CT_MARK))
    remember = Update("update", sticky, client, MARK, of.timeout)
    go = (Assign(CT_MARK, MARK), Verdict("goto", f"to_endpoint_ipv{family}"))
    before = Assign(MARK, Lookup(client, Named(sticky)))
    serves = Match(Concat((CT_MARK, MARK)), "==", Named(SERVING[family].name))
    yield Rule((before, serves, remember, *go), "the same as before")
    yield Rule((Update("delete", sticky, client, MARK),))
    yield Rule((Assign(MARK, _any(of, family)),))
    yield Rule((remember,))
    yield Rule(go)


def _client(family: Family) -> Expression:
    """Who asks; of IPv6 addresses a hash.

    libnftables 1.0.6 lets the datum of an update overwrite keys of more than 16 bytes, or aborts. Two clients
    with the same hash go to the same endpoint.
    """
    source = Payload(IP[family], "saddr")
    return source if family == 4 else Hash(source, HASH_MOD, HASH_SEED)
