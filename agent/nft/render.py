"""The typed model as text for nft: whole rulesets for a reader, single commands for a transaction.

Nothing reaches nft as text without a check here. Addresses are `ipaddress` objects (libnftables would ask
DNS about anything else), numbers are numbers, names match nft's own grammar for names, and what stands in
quotes (interface names, comments, log prefixes) holds no quote and no control character: there is no escape
in nft's quotes, so what could end them is refused. A value that does not fit raises ValueError, which names
it.
"""

# ruff: noqa: PLR0911 - a match over the kinds of the model returns once for each

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

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
    SetName,
    Statement,
    Table,
    TableName,
    Unparsed,
    Update,
    Verdict,
    VerdictMap,
    Wildcard,
)
from agent.nft.symbols import FLAG_TYPES, INTEGER, flag_names, name_of, types

_INTERFACES = frozenset({"ifname", "iface_index"})
_NO_NUMBERS = frozenset({"ifname", "ether_addr", "ipv4_addr", "ipv6_addr", "verdict"})

COMMENT_BYTES = 127  # the kernel keeps 128 with the terminating zero
INTERFACE_BYTES = 15
LOG_PREFIX_BYTES = 127

# Words of nft's grammar that would make good names, but cannot be any.
_RESERVED = re.compile(
    "accept|add|all|arp|bridge|chain|comment|continue|counter|ct|delete|dnat|drop|element|exists|fib|flags|goto|"
    "handle|hook|icmp|icmpv6|igmp|inet|ip|ip6|jump|limit|list|log|map|mark|masquerade|meta|missing|netdev|none|"
    "notrack|numgen|policy|priority|queue|quota|random|redirect|reject|reset|return|rule|sctp|set|size|snat|"
    "table|tcp|th|timeout|type|udp|update|vmap"
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,199}")
_WORD = re.compile(r"[a-z][a-z0-9_-]*")
_FIELD = re.compile(r"[a-z][a-z0-9_-]*( [a-z][a-z0-9_-]*)?")  # as in ct original "ip saddr"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_QUOTABLE = re.compile(r"[ !#-\[\]-~]*")  # printable ASCII but the quote and the backslash


# Whole rulesets


def ruleset(rules: Ruleset) -> str:
    """A ruleset as a file that nft loads, in the order of its names."""
    return "\n".join(_table_block(rules, rules.tables[name]) for name in sorted(rules.tables))


def _table_block(rules: Ruleset, of: Table) -> str:
    blocks = [
        _set_block(rules, rules.sets[name])
        for name in sorted(name for name in rules.sets if name.table == of.id)
    ]
    blocks += [
        _chain_block(rules.chains[name])
        for name in sorted(name for name in rules.chains if name.table == of.id)
    ]
    flags = [f"\tflags {_words(of.flags)};\n"] if of.flags else []
    return f"table {table_name(of.id)} {{\n" + "\n".join(flags + blocks) + "}\n"


def _set_block(rules: Ruleset, of: Set) -> str:
    lines = "".join(f"\t\t{line}\n" for line in _set_lines(of))
    members = sorted((element(member, of) for member in rules.elements.get(of.id, {}).values()), key=_natural)
    if members:
        lines += "\t\telements = {\n" + "".join(f"\t\t\t{member},\n" for member in members) + "\t\t}\n"
    return f"\t{set_or_map(of)} {name(of.name)} {{\n{lines}\t}}\n"


def _chain_block(of: Chain) -> str:
    lines = [_hook(of.hook)] if of.hook else []
    lines += [rule(each) for each in of.rules]
    return f"\tchain {name(of.name)} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


# Commands


def add_table(of: Table) -> str:
    """Command that makes a table."""
    flags = f" {{ flags {_words(of.flags)}; }}" if of.flags else ""
    return f"add table {table_name(of.id)}{flags}"


def add_chain(of: Chain) -> str:
    """Command that makes a chain, still without rules."""
    hook = f" {{ {_hook(of.hook)} }}" if of.hook else ""
    return f"add chain {path(of.id)}{hook}"


def add_rules(of: Chain) -> Iterator[str]:
    """Commands that add a chain's rules, in order."""
    prefix = f"add rule {path(of.id)} "
    return (prefix + rule(each) for each in of.rules)


def add_set(of: Set) -> str:
    """Command that makes a set or map, still without elements."""
    return f"add {set_or_map(of)} {path(of.id)} {{ {' '.join(_set_lines(of))} }}"


def add_elements(of: Set, members: Iterable[Element]) -> str:
    """Command that adds elements to one set or map."""
    return f"add element {path(of.id)} {{ {', '.join(element(member, of) for member in members)} }}"


def delete_elements(of: Set, members: Iterable[Element]) -> str:
    """Command that deletes elements of one set or map."""
    return f"delete element {path(of.id)} {{ {', '.join(key(member.key, of.type) for member in members)} }}"


# Names


def name(text: str) -> str:
    """A name of a table, chain or set, as it stands."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} cannot name a table, chain or set: letters, digits, '_', '.' and '-' can")
    if _RESERVED.fullmatch(text):
        raise ValueError(f"{text!r} is a word of nft and cannot name a table, chain or set")
    return text


def table_name(of: TableName) -> str:
    """Family and name."""
    return f"{_word(of.family)} {name(of.name)}"


def path(of: ChainName | SetName) -> str:
    """Family, table and name."""
    return f"{table_name(of.table)} {name(of.name)}"


def quoted(text: str, limit: int) -> str:
    """A text in quotes; ValueError where nft's quotes cannot hold it or it has more than `limit` bytes."""
    if not _QUOTABLE.fullmatch(text) or len(text) > limit:
        raise ValueError(
            f"{text!r} cannot stand in quotes: at most {limit} printable ASCII characters, no quote"
        )
    return f'"{text}"'


def _interface(text: str) -> str:
    if not text or "*" in text or "/" in text:
        raise ValueError(f"{text!r} is not the name of a network interface")
    return quoted(text, INTERFACE_BYTES)


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} is not a word of nft")
    return text


def _field(text: str) -> str:
    if not _FIELD.fullmatch(text):
        raise ValueError(f"{text!r} is not a field of nft")
    return text


def _words(texts: Iterable[str]) -> str:
    return ",".join(_word(text) for text in sorted(texts))


# Sets


def set_or_map(of: Set) -> str:
    """What nft calls it."""
    return "map" if of.data else "set"


def _set_lines(of: Set) -> list[str]:
    lines = [_types(of)]
    if of.flags:
        lines.append(f"flags {_words(of.flags)};")
    for word, seconds in (("timeout", of.timeout), ("gc-interval", of.gc_interval)):
        if seconds:
            lines.append(f"{word} {seconds:d}s;")
    if of.size:
        lines.append(f"size {of.size:d};")
    if of.comment:
        lines.append(f"comment {quoted(of.comment, COMMENT_BYTES)};")
    return lines


def _types(of: Set) -> str:
    """A number without a type has no name, so such a set is declared by expressions of its types."""
    if INTEGER not in of.type:
        data = f" : {_type(of.data)}" if of.data else ""
        return f"type {_type(of.type)}{data};"
    key, data = (" . ".join(_TYPE_OF[part] for part in parts) for parts in (of.type, of.data))
    return f"typeof {key}{data and ' : '}{data};"


_TYPE_OF = {
    "mark": "ct mark",
    "integer": "numgen random mod 2",
    "ipv4_addr": "ip daddr",
    "ipv6_addr": "ip6 daddr",
    "inet_service": "th dport",
}


def _type(parts: tuple[str, ...]) -> str:
    return " . ".join(_word(part) for part in parts)


def element(of: Element, where: Set) -> str:
    """One element of a set or map as it stands between the braces."""
    text = key(of.key, where.type)
    if of.comment:
        text += f" comment {quoted(of.comment, COMMENT_BYTES)}"
    if of.data is None:
        return text
    return f"{text} : {verdict(of.data) if isinstance(of.data, Verdict) else key(of.data, where.data)}"


def key(of: Key, kinds: tuple[str, ...] = ()) -> str:
    """A value or a concatenation of values."""
    parts = of if isinstance(of, tuple) else (of,)
    if len(kinds or parts) != len(parts):
        raise ValueError(f"{of!r} stands where nft expects {' . '.join(kinds)}")
    return " . ".join(
        scalar(part, kind) for part, kind in zip(parts, kinds or ("",) * len(parts), strict=True)
    )


def scalar(value: Scalar, kind: str = "") -> str:
    """One value; `kind` is its type where the name of a constant or the form depends on it."""
    if isinstance(value, (IPv4Address, IPv6Address, IPv4Network, IPv6Network)):
        return _address(value, kind)
    if isinstance(value, int):
        return _number(value, kind)
    if isinstance(value, Range):  # numbers: between names the dash would belong to them
        numbers = "" if isinstance(value.low, int) and kind != "mark" else kind
        return f"{scalar(value.low, numbers)}-{scalar(value.high, numbers)}"
    if isinstance(value, Wildcard) and kind in _INTERFACES:
        return _interface(value.prefix)[:-1] + '*"'
    if isinstance(value, str) and kind in _INTERFACES:
        return _interface(value)
    if isinstance(value, str) and kind == "ether_addr" and _MAC.fullmatch(value):
        return value
    raise ValueError(f"{value!r} stands where nft expects {kind or 'a number or an address'}")


def _address(value: Address | IPv4Network | IPv6Network, kind: str) -> str:
    if kind not in {"", f"ipv{value.version}_addr"}:
        raise ValueError(f"{value} stands where nft expects {kind}")
    if isinstance(value, IPv6Address) and value.scope_id:
        raise ValueError(f"{value} has a scope, which nft has no place for")
    return str(value)


def _number(value: int, kind: str) -> str:
    if kind in _NO_NUMBERS:
        raise ValueError(f"{value} stands where nft expects {kind}")
    if isinstance(value, bool) and kind in {"boolean", "iface_index"}:
        return "exists" if value else "missing"
    if value < 0:
        raise ValueError(f"{value} is negative")
    word = name_of(kind, value)
    if word is not None:
        return word
    return f"{value:#x}" if kind == "mark" else f"{value:d}"


# Rules


def rule(of: Rule) -> str:
    """One rule, with its comment."""
    text = " ".join(statement(each) for each in of.statements)
    return f"{text} comment {quoted(of.comment, COMMENT_BYTES)}" if of.comment else text


def verdict(of: Verdict) -> str:
    """A verdict, in a rule or in a map."""
    return f"{of.kind} {name(of.chain)}" if of.kind in {"jump", "goto"} else _word(of.kind)


def expression(of: Expression) -> str:
    """An expression."""
    match of:
        case Meta("iifname" | "oifname" as word):
            return word
        case Meta(word):
            return f"meta {_word(word)}"
        case Ct(word, direction):
            return f"ct {_word(direction)} {_field(word)}" if direction else f"ct {_word(word)}"
        case Payload(protocol, field):
            return f"{_word(protocol)} {_field(field)}"
        case Exthdr(header, field):
            return f"{_word(header)} {_word(field)}" if field else f"exthdr {_word(header)}"
        case Fib(flags, result):
            return f"fib {' . '.join(_word(flag) for flag in flags)} {_word(result)}"
        case Numgen(mode, mod, offset):
            return f"numgen {_word(mode)} mod {mod:d}" + (f" offset {offset:d}" if offset else "")
        case Hash(hashed, mod, seed):
            return f"jhash {expression(hashed)} mod {mod:d} seed {seed:#x}"
        case Concat(parts):
            return " . ".join(expression(part) for part in parts)
        case Lookup(by, data):
            return f"{expression(by)} map {_data(data, by)}"
        case Bits(left, operator, right):
            inner = f"({expression(left)})" if isinstance(left, Bits) else expression(left)
            return f"{inner} {operator} {_mask(right, types(left)[0])}"


def _mask(value: int, kind: str) -> str:
    names = flag_names(kind, value) if kind in FLAG_TYPES else None
    return f"({' | '.join(names)})" if names else f"{value:#x}"


def _data(data: "Named | frozenset[tuple[Key, Key]] | frozenset[tuple[Key, Verdict]]", by: Expression) -> str:
    if isinstance(data, Named):
        return f"@{name(data.name)}"
    kinds = types(by)
    entries = [
        f"{key(entry, kinds)} : {verdict(value) if isinstance(value, Verdict) else key(value)}"
        for entry, value in data
    ]
    return f"{{ {', '.join(sorted(entries))} }}"


def statement(of: Statement) -> str:
    """One statement of a rule."""
    match of:
        case Match():
            return _match(of)
        case Assign(target, value):
            return f"{expression(target)} set {_value(value, types(target)[0])}"
        case Verdict():
            return verdict(of)
        case VerdictMap(by, data):
            return f"{expression(by)} vmap {_data(data, by)}"
        case Nat():
            return _nat(of)
        case Reject(kind, code):
            return (
                "reject with tcp reset" if kind == "tcp reset" else f"reject with {_word(kind)} {_word(code)}"
            )
        case Log():
            return _log(of)
        case Limit(rate, per, burst, over):
            return f"limit rate {'over ' if over else ''}{rate:d}/{_word(per)} burst {burst:d} packets"
        case Counter():
            return "counter"
        case Notrack():
            return "notrack"
        case Update():
            return _update(of)
        case Unparsed(text):
            raise ValueError(f"{text!r} was read from the kernel and not understood; it cannot be written")


def _match(of: Match) -> str:
    left, kinds = expression(of.left), types(of.left)
    if isinstance(of.right, Named):
        return f"{left} {_unless_equal(of.operator)}@{name(of.right.name)}"
    if isinstance(of.right, frozenset):
        members = sorted((key(member, kinds) for member in of.right), key=_natural)
        return f"{left} {_unless_equal(of.operator)}{{ {', '.join(members)} }}"
    if kinds[0] in FLAG_TYPES and isinstance(of.right, int):
        return _flag_match(left, of.operator, of.right, kinds[0])
    return f"{left} {_unless_equal(of.operator)}{key(of.right, kinds)}"


def _unless_equal(operator: str) -> str:
    if operator in {"in", "!"}:
        raise ValueError(f"operator {operator!r} is for flags")
    return "" if operator == "==" else f"{operator} "


def _flag_match(left: str, operator: str, right: int, kind: str) -> str:
    names = flag_names(kind, right)
    if operator == "in" and names:
        return f"{left} {','.join(names)}"
    value = " | ".join(names) if names else f"{right:#x}"
    if operator in {"in", "!"}:
        return f"{left} & ({value}) {'!=' if operator == 'in' else '=='} 0"
    return f"{left} {operator} {value}"


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key under which 9 comes before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _value(value: "Expression | int | Address | Range", kind: str) -> str:
    if isinstance(value, (int, IPv4Address, IPv6Address, Range)):
        return scalar(value, kind)
    return expression(value)


def _nat(of: Nat) -> str:
    words = [_word(of.kind)]
    if of.address is not None:
        kind = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}.get(of.family, "")
        address = _value(of.address, kind)
        if of.port is not None and isinstance(of.address, IPv6Address):
            address = f"[{address}]"
        words += [_word(of.family)] if of.family else []
        words += ["to", address + ("" if of.port is None else f" : {_value(of.port, INTEGER)}")]
    elif of.port is not None:
        words += ["to", f":{_value(of.port, INTEGER)}"]
    return " ".join(words + ([_words(of.flags)] if of.flags else []))


def _log(of: Log) -> str:
    words = ["log"]
    if of.prefix:
        words += ["prefix", quoted(of.prefix, LOG_PREFIX_BYTES)]
    if of.group is not None:
        words += [f"group {of.group:d}"]
    if of.snaplen:
        words += [f"snaplen {of.snaplen:d}"]
    if of.queue_threshold:
        words += [f"queue-threshold {of.queue_threshold:d}"]
    return " ".join(words)


def _update(of: Update) -> str:
    inside = expression(of.key)
    if of.timeout:
        inside += f" timeout {of.timeout:d}s"
    inside += "".join(f" {statement(each)}" for each in of.statements)
    if of.data is not None:
        inside += f" : {_value(of.data, INTEGER)}"
    return f"{_word(of.operator)} @{name(of.set)} {{ {inside} }}"


def _hook(of: Hook) -> str:
    device = f" device {_interface(of.device)}" if of.device else ""
    return (
        f"type {_word(of.type)} hook {_word(of.hook)}{device} priority {of.priority:d}; "
        f"policy {_word(of.policy)};"
    )
