"""What NetworkPolicies allow: a chain per direction, family and set of policies.

All Pods of this node that have the same policies (a class) share a chain.

    ingress4_<id>:                                                     policies shop/api and shop/metrics
        tcp dport 8080 ip saddr @peer4_<id> counter accept             "shop/api/ingress[0]"
        tcp dport 9090 ip saddr 10.0.0.0/8 counter accept              "shop/metrics/ingress[0]"
        iifname . ip daddr @pod_links4 counter accept                  "to itself"
        counter limit log drop                                         the default of an isolated Pod

Policies add up, so their order means nothing.  In an egress chain what is allowed returns, and ingress of
the other end is judged next; in an ingress chain it is accepted.  A rule of a policy becomes a rule for
each of its peers and each way its ports can be said: one set of single ports, and a match for each range.

Ports are looked at first (a comparison, where a peer's set is a hash).  An interval set costs at least 16
KiB, so ranges and blocks are matches of their own until there are many; these become one set without a
name.

What cannot be understood (a `Problem`) matches nothing: the rule keeps its other members, and the Pod its
isolation. A Pod that is attached but of which the cluster says nothing (yet, or any more) may be selected
by any policy of its namespace, so it is isolated wherever one of them isolates, and allowed nothing: its
class has no policies.

An audit class holds all policies of its Pods, those in force too: its chain says of a packet what would be
if all were in force, and drops nothing (`agent.compile.audit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from agent.cluster.model import (
    Direction,
    Family,
    IPBlock,
    NetworkPolicy,
    PolicyPort,
    PolicyRule,
    Problem,
    Protocol,
    SelectorPeer,
)
from agent.compile import audit
from agent.compile.names import TABLE, comment
from agent.compile.packets import IP
from agent.compile.peers import PROTO, Peer, PortName, anybody, identity, peer_of
from agent.compile.verdicts import deny, to_itself
from agent.nft.model import (
    ACCEPT,
    RETURN,
    Chain,
    Concat,
    Counter,
    Key,
    Match,
    Meta,
    Named,
    Owner,
    Payload,
    Range,
    Rule,
)

MOST_MATCHES = 16  # ranges, blocks or excepts that are matches of their own; more become one interval set

PolicyKey: TypeAlias = tuple[str, str]
Condition: TypeAlias = tuple[Match, ...]
"""What must hold of a packet; () always does."""

Span: TypeAlias = tuple[int, int]
_ANY_PORT: Span = (0, 65535)


@dataclass(frozen=True, slots=True)
class PolicyClass:
    """What this node's Pods with the same policies have in common, for one direction and family.

    `ports` is what the policies' named ports are on these Pods (ingress; on egress they are the peers').
    Without policies: of Pods about which the cluster says nothing. `audit`: as if all were in force.
    """

    direction: Direction
    family: Family
    policies: tuple[PolicyKey, ...]
    ports: tuple[tuple[PortName, int], ...] = ()
    audit: bool = False
    id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        keys = (part for key in self.policies for part in ("policy", *key))
        ports = (part for (name, number) in self.ports for part in ("port", *name, str(number)))
        object.__setattr__(self, "id", identity(self.direction, *keys, *ports))

    @property
    def chain(self) -> str:
        """The name of its chain."""
        return f"{'audit_' if self.audit else ''}{self.direction.lower()}{self.family}_{self.id}"

    @property
    def owner(self) -> Owner:
        """Who owns its chain."""
        return ("class", self.chain)


@dataclass(frozen=True, slots=True)
class Allow:
    """What one rule of a policy allows, as conditions any of which suffices."""

    policy: PolicyKey
    direction: Direction
    index: int
    conditions: tuple[Condition, ...]

    @property
    def comment(self) -> str:
        """Where in the policy this stands."""
        return comment(*self.policy, f"{self.direction.lower()}[{self.index}]")


def chain(of: PolicyClass, policies: Mapping[PolicyKey, NetworkPolicy]) -> Chain:
    """The chain of a class; `policies` has at least those of the class."""
    verdict = RETURN if of.direction == "Egress" else ACCEPT
    allowed = (
        Rule((*condition, Counter(), verdict), allow.comment)
        for allow in allows(of, policies)
        for condition in allow.conditions
    )
    end = (audit.would_deny if of.audit else deny)(of.direction.lower(), of.id)
    return Chain(TABLE, of.chain, (*allowed, to_itself(of.family), *end))


def peers(of: PolicyClass, policies: Mapping[PolicyKey, NetworkPolicy]) -> dict[str, Peer]:
    """The peers whose sets the chain of a class looks up, by their ids."""
    return {peer.id: peer for _, _, far in _far_ends(of, policies) for peer in far.peers()}


def allows(of: PolicyClass, policies: Mapping[PolicyKey, NetworkPolicy]) -> Iterator[Allow]:
    """What a class is allowed, rule by rule of its policies."""
    numbers = dict(of.ports)
    for key, index, far in _far_ends(of, policies):
        yield Allow(key, of.direction, index, tuple(far.conditions(numbers)))


def _far_ends(
    of: PolicyClass, policies: Mapping[PolicyKey, NetworkPolicy]
) -> Iterator[tuple[PolicyKey, int, _FarEnd]]:
    for key in of.policies:
        for index, rule in enumerate(rules_of(policies[key], of.direction)):
            yield key, index, _FarEnd(key[0], of.direction, of.family, rule)


def rules_of(policy: NetworkPolicy, direction: Direction) -> tuple[PolicyRule, ...]:
    """A policy's rules for a direction."""
    return policy.ingress if direction == "Ingress" else policy.egress


def named_ports_of(policy: NetworkPolicy) -> frozenset[PortName]:
    """The named ports that its ingress rules use: what they are decides about a Pod's class."""
    return frozenset(name for rule in policy.ingress for name in _names(rule))


@dataclass(frozen=True, slots=True)
class _FarEnd:
    """One rule of a policy, seen from the Pod that it is about."""

    namespace: str
    direction: Direction
    family: Family
    rule: PolicyRule

    def conditions(self, numbers: Mapping[PortName, int]) -> Iterator[Condition]:
        far = tuple(self._addresses())
        for port in port_conditions(self.rule.ports, numbers):
            for address in far:
                yield (*port, *address)
        yield from self._at_named_ports()

    def peers(self) -> Iterator[Peer]:
        if self._numbered:
            yield from (peer_of(self.namespace, of) for of in self._selectors)
        if self._looked_up:
            yield from (peer_of(self.namespace, of, self._looked_up) for of in self._selectors)
            if self._blocks or not self.rule.peers:
                yield anybody(self._looked_up)

    def _addresses(self) -> Iterator[Condition]:
        """The other end's address, whatever the port."""
        if not self.rule.peers:
            yield ()
        for of in self._selectors:
            yield (Match(self._address, "==", Named(peer_of(self.namespace, of).name(self.family))),)
        yield from block_conditions(self._address, self._blocks)

    def _at_named_ports(self) -> Iterator[Condition]:
        """Egress: the other end's address and port together, as the receiving Pods name their ports."""
        if not self._looked_up:
            return
        key = Concat((self._address, Meta("l4proto"), Payload("th", "dport")))
        for of in self._selectors:
            peer = peer_of(self.namespace, of, self._looked_up)
            yield (Match(key, "==", Named(peer.name(self.family))),)
        at_any = Match(key, "==", Named(anybody(self._looked_up).name(self.family)))
        if not self.rule.peers:
            yield (at_any,)
        for block in block_conditions(self._address, self._blocks):
            yield (*block, at_any)

    @property
    def _address(self) -> Payload:
        return Payload(IP[self.family], "saddr" if self.direction == "Ingress" else "daddr")

    @property
    def _selectors(self) -> list[SelectorPeer]:
        return [of for of in self.rule.peers or () if isinstance(of, SelectorPeer)]

    @property
    def _blocks(self) -> list[IPBlock]:
        of_family = (of for of in self.rule.peers or () if isinstance(of, IPBlock))
        return [of for of in of_family if of.cidr.version == self.family]

    @property
    def _looked_up(self) -> tuple[PortName, ...]:
        return tuple(sorted(_names(self.rule))) if self.direction == "Egress" else ()

    @property
    def _numbered(self) -> bool:
        """Whether any port, or none at all, is asked for by number (on ingress names become numbers)."""
        if self.direction == "Ingress" or not self.rule.ports:
            return True
        return any(isinstance(of, PolicyPort) and not isinstance(of.port, str) for of in self.rule.ports)


def _names(rule: PolicyRule) -> Iterator[PortName]:
    for of in rule.ports or ():
        if isinstance(of, PolicyPort) and isinstance(of.port, str):
            yield of.protocol, of.port


# Ports


def port_conditions(
    ports: Sequence[PolicyPort | Problem] | None, numbers: Mapping[PortName, int]
) -> Iterator[Condition]:
    """The ways to say that a packet goes to one of these ports; a name without a number is none of them."""
    if not ports:
        yield ()
        return
    spans = _port_spans((of for of in ports if isinstance(of, PolicyPort)), numbers)
    whole = frozenset(PROTO[protocol] for protocol, of in spans.items() if of == [_ANY_PORT])
    if whole:
        yield (Match(Meta("l4proto"), "==", _one_or_set(whole)),)
    partial = {protocol: of for protocol, of in spans.items() if of != [_ANY_PORT]}
    yield from _single_ports(partial)
    for protocol, of in partial.items():
        yield from _port_ranges(protocol, [Range(low, high) for low, high in of if low < high])


def _port_spans(ports: Iterable[PolicyPort], numbers: Mapping[PortName, int]) -> dict[Protocol, list[Span]]:
    spans: dict[Protocol, list[Span]] = {}
    for of in ports:
        if of.port is None:
            spans.setdefault(of.protocol, []).append(_ANY_PORT)
            continue
        first = numbers.get((of.protocol, of.port)) if isinstance(of.port, str) else of.port
        if first is not None:
            spans.setdefault(of.protocol, []).append((first, of.end_port or first))
    return {protocol: _without_covered(of) for protocol, of in spans.items()}


def _without_covered(spans: list[Span]) -> list[Span]:
    """Overlapping spans joined; neighbours stay apart, as single ports need no interval set."""
    joined: list[Span] = []
    for low, high in sorted(spans, key=lambda of: (of[0], -of[1])):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return joined


def _single_ports(spans: Mapping[Protocol, list[Span]]) -> Iterator[Condition]:
    singles = {protocol: frozenset(low for low, high in of if low == high) for protocol, of in spans.items()}
    singles = {protocol: of for protocol, of in singles.items() if of}
    if len(singles) == 1:
        ((protocol, ports),) = singles.items()
        yield (Match(_dport(protocol), "==", _one_or_set(ports)),)
    elif singles:
        pairs = frozenset((PROTO[protocol], port) for protocol, of in singles.items() for port in of)
        yield (Match(Concat((Meta("l4proto"), Payload("th", "dport"))), "==", pairs),)


def _port_ranges(protocol: Protocol, ranges: list[Range]) -> Iterator[Condition]:
    if len(ranges) > MOST_MATCHES:
        yield (Match(_dport(protocol), "==", frozenset(ranges)),)
    else:
        yield from ((Match(_dport(protocol), "==", each),) for each in ranges)


def _dport(protocol: Protocol) -> Payload:
    return Payload(protocol.lower(), "dport")


def _one_or_set(values: frozenset[int]) -> Key | frozenset[Key]:
    return next(iter(values)) if len(values) == 1 else frozenset[Key](values)


# Addresses


def block_conditions(address: Payload, blocks: Sequence[IPBlock]) -> Iterator[Condition]:
    """The ways to say that an address is in one of these blocks (of one family) and not in its excepts."""
    if len(blocks) > MOST_MATCHES or any(len(of.excepts) > MOST_MATCHES for of in blocks):
        yield from _block_set(address, blocks)
        return
    for of in blocks:
        inside = (Match(address, "==", of.cidr),) if of.cidr.prefixlen else ()
        yield (*inside, *(Match(address, "!=", part) for part in of.excepts))


def _block_set(address: Payload, blocks: Sequence[IPBlock]) -> Iterator[Condition]:
    spans = _without_covered([span for of in blocks for span in _block_spans(of)])
    of = type(blocks[0].cidr.network_address)
    if spans:
        yield (Match(address, "==", frozenset[Key](Range(of(low), of(high)) for low, high in spans)),)


def _block_spans(of: IPBlock) -> Iterator[Span]:
    """What is left of a block without its excepts."""
    low = int(of.cidr.network_address)
    for first, last in _without_covered(
        [(int(part.network_address), int(part.broadcast_address)) for part in of.excepts]
    ):
        if low < first:
            yield low, first - 1
        low = last + 1
    if low <= int(of.cidr.broadcast_address):
        yield low, int(of.cidr.broadcast_address)
