"""Listings of libnftables (JSON) as the typed model.

A listing says the same thing in several ways (a number or a name, a bare element or one with a comment, one
flag or a list); here each becomes the one value that `agent.nft.render` would have written. Counters'
counts, handles and elements' remaining time are left out: they are no part of what is wanted. What is not
understood becomes `Unparsed` and thereby differs from everything that is wanted, so it is replaced.
"""

# ruff: noqa: PLR0911 - a match over the kinds of JSON returns once for each

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypeAlias

import msgspec

from agent.nft.model import (
    Address,
    Assign,
    Bits,
    Chain,
    ChainName,
    Concat,
    Counter,
    Ct,
    Element,
    Expression,
    Exthdr,
    Fib,
    Hash,
    Hook,
    Key,
    Limit,
    Log,
    Lookup,
    Match,
    Meta,
    Named,
    Nat,
    Notrack,
    Numgen,
    Payload,
    Range,
    Reject,
    Rule,
    Ruleset,
    Scalar,
    Set,
    Statement,
    Table,
    TableName,
    Unparsed,
    Update,
    Verdict,
    VerdictMap,
    Wildcard,
)
from agent.nft.symbols import INTEGER, number_of, types

Json: TypeAlias = Any  # what a JSON decoder yields
UNPARSED_TYPE = "unparsed"

_VERDICTS = frozenset({"accept", "drop", "continue", "return", "jump", "goto"})
_BITS = frozenset({"&", "|", "^", "<<", ">>"})
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_HASH = re.compile(r"jhash (\w+ \w+) mod (\d+) seed (\w+)")
_UPDATE = re.compile(r"(add|update|delete) @(\S+) \{ (.+?)(?: timeout (\w+))?(?: : (.+))? \}")


class TornError(Exception):
    """The kernel gave some elements twice and as many not at all: it was rehashing the set meanwhile.

    A listing of a hash is many small walks that each skip as many elements as were given before; when the
    order changes in between, what was skipped is not what was given.
    """


class _UnknownError(Exception):
    """The listing holds something that the model has no value for."""


def ruleset(*listings: bytes | str) -> Ruleset:
    """The tables of one or more listings; TornError when one does not hold together."""
    rules = Ruleset()
    for listing in listings:
        for entry in msgspec.json.decode(listing)["nftables"]:
            _enter(rules, entry)
    return rules


def _enter(rules: Ruleset, entry: Json) -> None:
    match entry:
        case {"table": {"family": family, "name": name}}:
            rules.add(Table(family, name))
        case {"chain": chain}:
            rules.add(_chain(chain))
        case {"rule": rule}:
            where = ChainName(TableName(rule["family"], rule["table"]), rule["chain"])
            before = rules.chains[where]
            rules.add(msgspec.structs.replace(before, rules=(*before.rules, _rule(rule))))
        case {"set": of} | {"map": of}:
            _enter_set(rules, of)


def _chain(of: Json) -> Chain:
    hook = None
    if "hook" in of:
        device = of.get("dev", "")
        hook = Hook(of["type"], of["hook"], of["prio"], of.get("policy", "accept"), _one_device(device))
    return Chain(TableName(of["family"], of["table"]), of["name"], (), hook)


def _one_device(device: Json) -> str:
    return device if isinstance(device, str) else ",".join(device)


# Sets


def _enter_set(rules: Ruleset, of: Json) -> None:
    made = Set(
        TableName(of["family"], of["table"]),
        of["name"],
        _type(of["type"]),
        _type(of["map"]) if "map" in of else (),
        frozenset(_listed(of.get("flags", []))),
        of.get("size", 0),
        of.get("timeout", 0),
        of.get("gc-interval", 0),
        of.get("comment", ""),
    )
    rules.add(made)
    read_key, read_data = _reader(made.type), _data_reader(made.data)
    where = made.id
    entries = of.get("elem", ())
    for entry in entries:
        left, right = entry if made.data else (entry, None)
        comment = ""
        if isinstance(left, dict) and "elem" in left:
            comment = left["elem"].get("comment", "")
            left = left["elem"]["val"]
        rules.add(Element(where, read_key(left), None if right is None else read_data(right), comment))
    if "dynamic" not in made.flags and len(rules.elements.get(where, ())) != len(entries):
        raise TornError(f"set {made.name}: {len(entries)} elements, some of them twice")


def _type(of: Json) -> tuple[str, ...]:
    """ "ipv4_addr", ["mark", "mark"], or for the data of maps by nft 1.0.6 "ipv4_addr . inet_service"."""
    if isinstance(of, str):
        return tuple(of.split(" . "))
    if isinstance(of, list):
        return tuple(of)
    return (UNPARSED_TYPE,)


def _listed(of: Json) -> list[str]:
    return [of] if isinstance(of, str) else of


def _data_reader(kinds: tuple[str, ...]) -> "Callable[[Json], Key | Verdict]":
    return _map_verdict if kinds == ("verdict",) else _reader(kinds)


def _map_verdict(of: Json) -> "Verdict | Key":
    try:
        return _verdict(of)
    except _UnknownError:
        return str(of)


def _reader(kinds: tuple[str, ...]) -> Callable[[Json], Key]:
    """A function that reads elements of these types; made once for a set, called for each element."""

    def several(of: Json) -> Key:
        return tuple(_scalar(part, kind) for part, kind in zip(of["concat"], kinds, strict=True))

    def one(of: Json) -> Key:
        return _scalar(of, kinds[0])

    def read(of: Json) -> Key:
        try:
            return chosen(of)
        except (_UnknownError, ValueError, TypeError, KeyError):
            return str(of)

    chosen = several if len(kinds) > 1 else one
    return read


def _key(of: Json, kinds: tuple[str, ...]) -> Key:
    if isinstance(of, dict) and "concat" in of:
        return tuple(_scalar(part, kind) for part, kind in zip(of["concat"], kinds, strict=True))
    return _scalar(of, kinds[0])


def _scalar(of: Json, kind: str) -> Scalar:
    if isinstance(of, int):
        return of
    if isinstance(of, str):
        return _text(of, kind)
    match of:
        case {"prefix": {"addr": address, "len": length}}:
            return _network(_text(address, kind), length)
        case {"range": [low, high]}:
            return _range(_scalar(low, kind), _scalar(high, kind))
        case {"|": parts} | [*parts]:
            bits = 0
            for part in parts:
                bits |= _integer(_scalar(part, kind))
            return bits
    raise _UnknownError(of)


def _text(of: str, kind: str) -> Scalar:
    if kind == "ipv4_addr":
        return IPv4Address(of)
    if kind == "ipv6_addr":
        return IPv6Address(of)
    if kind == "ifname":
        return Wildcard(of[:-1]) if of.endswith("*") else of
    if kind in {"ether_addr", "iface_index"}:
        return of
    number = number_of(kind, of)
    if number is None:
        raise _UnknownError(of)
    return number


def _network(address: Scalar, length: int) -> IPv4Network | IPv6Network:
    if isinstance(address, IPv4Address):
        return IPv4Network((address, length))
    if isinstance(address, IPv6Address):
        return IPv6Network((address, length))
    raise _UnknownError(address)


def _range(low: Scalar, high: Scalar) -> Range:
    if isinstance(low, (int, IPv4Address, IPv6Address)) and isinstance(high, type(low)):
        return Range(low, high)
    raise _UnknownError(low)


def _integer(of: Json) -> int:
    if isinstance(of, int):
        return of
    raise _UnknownError(of)


# Rules


def _rule(of: Json) -> Rule:
    return Rule(tuple(_statement(each) for each in of.get("expr", ())), of.get("comment", ""))


def _statement(of: Json) -> Statement:
    try:
        if isinstance(of, str):
            return _update_text(of)
        ((word, argument),) = of.items()
        return _verdict(of) if word in _VERDICTS else _STATEMENTS[word](argument)
    except (_UnknownError, ValueError, KeyError, TypeError, AttributeError):
        return Unparsed(msgspec.json.encode(of).decode())


def _verdict(of: Json) -> Verdict:
    ((word, argument),) = of.items()
    if word not in _VERDICTS:
        raise _UnknownError(of)
    return Verdict(word, argument["target"] if argument else "")


def _match(of: Json) -> Match:
    left = _expression(of["left"])
    return Match(left, of["op"], _right(of["right"], types(left)))


def _right(of: Json, kinds: tuple[str, ...]) -> "Key | frozenset[Key] | Named":
    if isinstance(of, str) and of.startswith("@"):
        return Named(of[1:])
    if isinstance(of, dict) and "set" in of:
        return frozenset(_key(member, kinds) for member in of["set"])
    return _key(of, kinds)


def _assign(of: Json) -> Assign:
    target = _expression(of["key"])
    if not isinstance(target, (Meta, Ct, Payload)):
        raise _UnknownError(of)
    return Assign(target, _value(of["value"], types(target)[0]))


def _value(of: Json, kind: str) -> "Expression | int":
    if isinstance(of, (int, str)):
        return _integer(_scalar(of, kind))
    return _expression(of, kind)


def _verdict_map(of: Json) -> VerdictMap:
    by = _expression(of["key"])
    data = of["data"]
    if isinstance(data, str):
        return VerdictMap(by, Named(data.removeprefix("@")))
    return VerdictMap(by, frozenset((_key(key, types(by)), _verdict(value)) for key, value in data["set"]))


def _nat(kind: str) -> Callable[[Json], Nat]:
    def read(of: Json) -> Nat:
        of = of or {}
        family = of.get("family", "")
        address = of.get("addr")
        port = of.get("port")
        return Nat(
            kind,  # type: ignore[arg-type]  # the keys of _STATEMENTS
            family,
            None if address is None else _nat_address(address, family),
            None if port is None else _nat_port(port),
            frozenset(_listed(of.get("flags", []))),
        )

    return read


def _nat_address(of: Json, family: str) -> "Expression | Address | Range":
    kind = _address_type(of, family)
    if isinstance(of, str):
        value = _text(of, kind)
        if isinstance(value, (IPv4Address, IPv6Address)):
            return value
        raise _UnknownError(of)
    if "range" in of:
        low, high = of["range"]
        return _range(_text(low, kind), _text(high, kind))
    return _expression(of, kind)


def _address_type(of: Json, family: str) -> str:
    if family:
        return {"ip": "ipv4_addr", "ip6": "ipv6_addr"}[family]
    return "ipv6_addr" if ":" in str(of) and isinstance(of, str) else "ipv4_addr"


def _nat_port(of: Json) -> "Expression | int | Range":
    if isinstance(of, int):
        return of
    if "range" in of:
        low, high = of["range"]
        return Range(_integer(low), _integer(high))
    return _expression(of, INTEGER)


def _reject(of: Json) -> Reject:
    of = of or {}
    if of.get("type") == "tcp reset":
        return Reject("tcp reset", "")
    code = of.get("expr", "port-unreachable")
    if not isinstance(code, str):
        raise _UnknownError(of)
    return Reject(of.get("type", "icmpx"), code)


def _log(of: Json) -> Log:
    of = of or {}
    return Log(of.get("prefix", ""), of.get("group"), of.get("snaplen", 0), of.get("queue-threshold", 0))


def _limit(of: Json) -> Limit:
    if of.get("rate_unit", "packets") != "packets":
        raise _UnknownError(of)
    return Limit(of["rate"], of["per"], of.get("burst", 5), of.get("inv", False))


def _update(of: Json) -> Update:
    entry, timeout = of["elem"], 0
    if isinstance(entry, dict) and "elem" in entry:
        entry, timeout = entry["elem"]["val"], entry["elem"].get("timeout", 0)
    statements = tuple(_statement(each) for each in of.get("stmt", ()))
    if not all(isinstance(each, (Counter, Limit)) for each in statements):
        raise _UnknownError(of)
    data = of.get("data")
    return Update(
        of["op"],
        of.get("map", of.get("set")).removeprefix("@"),
        _expression(entry),
        None if data is None else _value(data, "mark"),
        timeout,
        statements,  # type: ignore[arg-type]  # checked above
    )


def _update_text(of: str) -> Update:
    """nft 1.0.6 has no JSON for the update of a map and lists the statement as text."""
    found = _UPDATE.fullmatch(of)
    if not found:
        raise _UnknownError(of)
    operator, name, by, timeout, data = found.groups()
    value = None if data is None else int(data, 0) if data[0].isdigit() else _worded(data)
    seconds = _seconds(timeout) if timeout else 0
    return Update(operator, name, _worded(by), value, seconds)  # type: ignore[arg-type]  # one of the three


def _worded(of: str) -> Expression:
    made = tuple(_word(part) for part in of.split(" . "))
    return made[0] if len(made) == 1 else Concat(made)


def _word(of: str) -> Expression:
    """One part of an expression that nft gave as text."""
    hashed = _HASH.fullmatch(of)
    if hashed:
        inner, mod, seed = hashed.groups()
        return Hash(_word(inner), int(mod), int(seed, 0))
    first, _, second = of.partition(" ")
    if not second or " " in second:
        raise _UnknownError(of)
    return _word_pair(first, second)


def _word_pair(first: str, second: str) -> Expression:
    if first == "meta":
        return Meta(second)
    return Ct(second) if first == "ct" else Payload(first, second)


def _seconds(of: str) -> int:
    found = _TIME.fullmatch(of)
    if not found:
        raise _UnknownError(of)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


_STATEMENTS: Mapping[str, Callable[[Json], Statement]] = {
    "match": _match,
    "mangle": _assign,
    "vmap": _verdict_map,
    "dnat": _nat("dnat"),
    "snat": _nat("snat"),
    "redirect": _nat("redirect"),
    "masquerade": _nat("masquerade"),
    "reject": _reject,
    "log": _log,
    "limit": _limit,
    "counter": lambda _: Counter(),
    "notrack": lambda _: Notrack(),
    "set": _update,
    "map": _update,
}


# Expressions


def _expression(of: Json, data_kind: str = INTEGER) -> Expression:
    """An expression; `data_kind` is the type of what a map inside rules holds."""
    match of:
        case {"meta": {"key": key}}:
            return Meta(key)
        case {"ct": ct}:
            return Ct(ct["key"], ct.get("dir", ""))
        case {"payload": {"protocol": protocol, "field": field}}:
            return Payload(protocol, field)
        case {"exthdr": header}:
            return Exthdr(header["name"], header.get("field", ""))
        case {"fib": {"result": result, "flags": flags}}:
            return Fib(tuple(_listed(flags)), result)
        case {"numgen": numbers}:
            return Numgen(numbers["mode"], numbers["mod"], numbers.get("offset", 0))
        case {"jhash": {"expr": inner, "mod": mod, "seed": seed}}:
            return Hash(_expression(inner), mod, seed)
        case {"concat": parts}:
            return Concat(tuple(_expression(part) for part in parts))
        case {"map": {"key": key, "data": data}}:
            return _lookup(_expression(key), data, data_kind)
    return _bits(of)


def _lookup(by: Expression, data: Json, kind: str) -> Lookup:
    if isinstance(data, str):
        return Lookup(by, Named(data.removeprefix("@")))
    pairs = frozenset((_key(key, types(by)), _key(value, (kind,))) for key, value in data["set"])
    return Lookup(by, pairs)


def _bits(of: Json) -> Bits:
    ((operator, operands),) = of.items()
    if operator not in _BITS:
        raise _UnknownError(of)
    left = _expression(operands[0])
    mask = _scalar(operands[1] if len(operands) == 2 else operands[1:], types(left)[0])
    return Bits(left, operator, _integer(mask))
