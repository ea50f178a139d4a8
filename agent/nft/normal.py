"""One form for one meaning: what is compared when the kernel's rules are held against the wanted ones.

nft adds conditions that others imply, hides them again in listings, folds constants and reorders sets, and
not every version lists everything. Both sides of a comparison pass through here first:

    meta l4proto tcp  tcp dport 80            ->  tcp dport 80
    icmpv6 type { 130, 131, 133-137 }         ->  icmpv6 type { 130-131, 133-137 }
    meta l4proto { tcp }                      ->  meta l4proto tcp
    tcp flags & syn == 0                      ->  tcp flags ! syn
    meta mark set meta mark & 0xff00 | 0x01   ->  meta mark set meta mark & 0xff01 | 0x01

Not compared, because nft 1.0.6 does not list them as JSON: a netdev chain's device, a set's flag dynamic,
and a table's flags.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from msgspec.structs import replace

from agent.nft.model import (
    Assign,
    Bits,
    Chain,
    Concat,
    EtherType,
    Expression,
    Hash,
    Item,
    Key,
    Lookup,
    Match,
    Meta,
    NfProto,
    Payload,
    Proto,
    Range,
    Reject,
    Rule,
    Scalar,
    Set,
    Statement,
    Table,
    Update,
    VerdictMap,
    settled,
)
from agent.nft.symbols import FLAG_TYPES, types

_IPV4, _IPV6 = (Meta("nfproto"), NfProto.IPV4), (Meta("nfproto"), NfProto.IPV6)
_ETHER_IPV4, _ETHER_IPV6 = (Meta("protocol"), EtherType.IP), (Meta("protocol"), EtherType.IP6)
_IMPLIED: dict[str, frozenset[tuple[Expression, int]]] = {
    "ip": frozenset({_IPV4, _ETHER_IPV4}),
    "ip6": frozenset({_IPV6, _ETHER_IPV6}),
    "icmp": frozenset({_IPV4, _ETHER_IPV4, (Meta("l4proto"), Proto.ICMP)}),
    "icmpv6": frozenset({_IPV6, _ETHER_IPV6, (Meta("l4proto"), Proto.ICMPV6)}),
    "tcp": frozenset({(Meta("l4proto"), Proto.TCP)}),
    "udp": frozenset({(Meta("l4proto"), Proto.UDP)}),
    "sctp": frozenset({(Meta("l4proto"), Proto.SCTP)}),
    "arp": frozenset({(Meta("protocol"), EtherType.ARP)}),
}


def comparable(item: Item) -> Item:
    """The item in the form in which two are equal when they mean the same."""
    match item:
        case Chain():
            hook = replace(item.hook, device="") if item.hook else None
            return replace(item, rules=tuple(map(rule, item.rules)), hook=hook)
        case Set():
            return replace(item, flags=item.flags - {"dynamic"})
        case Table():
            return replace(item, flags=frozenset())
    return item


def rule(of: Rule) -> Rule:
    """The rule without what other statements of it imply, every statement in its one form."""
    statements = [_statement(each) for each in of.statements]
    implied = frozenset(fact for each in statements for fact in _implications(each))
    return Rule(tuple(each for each in statements if not _is_implied(each, implied)), of.comment)


def _is_implied(of: Statement, implied: frozenset[tuple[Expression, int]]) -> bool:
    return isinstance(of, Match) and of.operator == "==" and (of.left, of.right) in implied


def _implications(of: Statement) -> Iterator[tuple[Expression, int]]:
    for payload in _payloads(of):
        yield from _IMPLIED.get(payload.protocol, ())
    if isinstance(of, Reject):
        yield from _IMPLIED.get(of.kind, ()) if of.kind == "icmp" else ()
        yield from (_IPV6, _ETHER_IPV6) if of.kind == "icmpv6" else ()


def _payloads(of: "Statement | Expression | object") -> Iterator[Payload]:
    match of:
        case Payload():
            yield of
        case Concat(parts):
            for part in parts:
                yield from _payloads(part)
        case (
            Match(left=inner) | Bits(left=inner) | Hash(of=inner) | Lookup(key=inner) | VerdictMap(key=inner)
        ):
            yield from _payloads(inner)
        case Assign(value=inner):
            yield from _payloads(inner)
        case Update(key=inner, data=data):
            yield from _payloads(inner)
            yield from _payloads(data)


def _statement(of: Statement) -> Statement:
    match of:
        case Match():
            return _match(of)
        case Assign(target, Bits(Bits(inner, "&", mask), "|", bits)):
            return Assign(target, Bits(Bits(inner, "&", mask | bits), "|", bits))
    return of


def _match(of: Match) -> Match:
    if isinstance(of.left, Bits) and of.left.operator == "&" and of.right == 0:
        operator = {"==": "!", "!=": "in"}.get(of.operator)
        if operator in {"!", "in"} and types(of.left)[0] in FLAG_TYPES:
            return Match(of.left.left, operator, of.left.right)  # type: ignore[arg-type]  # one of the two
    if isinstance(of.right, frozenset):
        return Match(of.left, of.operator, _members(of.right))
    return of


def _members(members: frozenset[Key]) -> "Key | frozenset[Key]":
    if any(isinstance(member, (Range, IPv4Network, IPv6Network)) for member in members):
        joined = _joined(member for member in members if not isinstance(member, tuple))
        members = frozenset(settled(member) for member in joined)
    if len(members) == 1:
        (only,) = members
        return only
    return members


def _joined(values: Iterable[Scalar]) -> Iterator[Scalar]:
    """Intervals joined where they touch, as nft does for the sets inside rules."""
    bounds = sorted((_bounds(value) for value in values), key=lambda pair: (int(pair[0]), int(pair[1])))
    low, high = bounds[0]
    for next_low, next_high in bounds[1:]:
        if int(next_low) > int(high) + 1:
            yield Range(low, high)
            low, high = next_low, next_high
        else:
            high = max(high, next_high, key=int)
    yield Range(low, high)


Bound = int | IPv4Address | IPv6Address


def _bounds(value: Scalar) -> tuple[Bound, Bound]:
    match value:
        case Range(low, high):
            return low, high
        case IPv4Network() | IPv6Network():
            return value.network_address, value.broadcast_address
        case int() | IPv4Address() | IPv6Address():
            return value, value
    raise ValueError(f"{value!r} cannot stand in a set with intervals")
