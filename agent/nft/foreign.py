"""Others' chains at the hooks that Pods' packets pass, read for one question: do they drop them?

    GETCHAIN --> which chains there are, with hook and policy          (nothing of podwall's own tables)
    GETRULE  --> the rules of those at a hook, and of chains they jump to, as far as `Rule` tells

Read from netlink and not through libnftables: no program is needed on the node, and a table of ten thousand
chains is no more than its names. A rule is reduced to what it says of a Pod's packet in general: whether its
conditions fit any such packet, and what then becomes of it. Layouts: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network

from agent import nfnetlink
from agent.cluster.model import IPNetwork
from agent.explain.filters import HOOKS, Chain, Rule, Rules
from agent.pods.rtnetlink import attribute, attributes

FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
MOST_CHAINS = 200
"""So many chains' rules are read at most."""

GET_CHAIN, GET_RULE = 4, 7
_DUMP_BYTES = 1 << 18
_NFGENMSG = 4
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_VERDICTS = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return"}
_IIFNAME, _OIFNAME, _NFPROTO = 6, 7, 15
_ADDRESSES = {(12, 4): 4, (16, 4): 4, (8, 16): 6, (24, 16): 6}
"""Where source and destination stand in the header of the network, and the address's version."""

_CONDITIONS = {"cmp", "lookup", "range", "match", "limit", "quota", "connlimit"}


def read(own: Iterable[tuple[str, str]], pod_cidrs: Iterable[IPNetwork]) -> Rules:
    """All chains but those of own tables, given by family and name. Raises OSError."""
    ranges, without = tuple(pod_cidrs), set(own)
    with nfnetlink.connect() as sock:
        chains = {
            (each.family, each.table, each.name): each
            for each in map(_chain, _dump(sock, GET_CHAIN))
            if each and (each.family, each.table) not in without
        }
        rules: dict[Chain, tuple[Rule, ...]] = {}
        todo = list(Rules(chains).at_hooks())
        while todo and len(rules) < MOST_CHAINS:
            chain = todo.pop()
            if chain in rules:
                continue
            rules[chain] = _rules_of(sock, chain, ranges)
            names = {rule.to for rule in rules[chain] if rule.to and rule.fits}
            todo += [found for name in names if (found := chains.get((chain.family, chain.table, name)))]
    return Rules(chains, rules)


def _rules_of(sock: socket.socket, chain: Chain, ranges: tuple[IPNetwork, ...]) -> tuple[Rule, ...]:
    names = {_RULE_TABLE: chain.table, _RULE_CHAIN: chain.name}
    content = b"".join(attribute(number, name.encode() + b"\0") for number, name in names.items())
    family = next(number for number, name in FAMILIES.items() if name == chain.family)
    bodies = _dump(sock, GET_RULE, family, content)
    return tuple(rule(attributes(body, _NFGENMSG)[_RULE_EXPRESSIONS], ranges) for body in bodies)


def _dump(sock: socket.socket, kind: int, family: int = 0, content: bytes = b"") -> Iterator[bytes]:
    """Each message of a listing, whole before the next one is asked for."""
    sock.send(
        nfnetlink.message(nfnetlink.NFTABLES, kind, content, sequence=1, flags=nfnetlink.DUMP, family=family)
    )
    while True:
        for received in nfnetlink.messages(sock.recv(_DUMP_BYTES)):
            if received.kind == nfnetlink.DONE:
                return
            if received.kind == nfnetlink.ERROR:
                error = nfnetlink.error_of(received)
                if error and error.errno != errno.ENOENT:
                    raise error
                return
            yield received.body


def _chain(body: bytes) -> Chain | None:
    values = attributes(body, _NFGENMSG)
    if body[0] not in FAMILIES:
        return None
    hook = attributes(values.get(_CHAIN_HOOK, b""))
    number = _number(hook[_HOOK_NUMBER]) if hook else len(HOOKS)
    return Chain(
        family=FAMILIES[body[0]],
        table=_text(values[_CHAIN_TABLE]),
        name=_text(values[_CHAIN_NAME]),
        hook=HOOKS[number] if number < len(HOOKS) else "",
        priority=_number(hook[_HOOK_PRIORITY]) if hook else 0,
        policy="drop" if _number(values.get(_CHAIN_POLICY, b"\0\0\0\1")) == 0 else "accept",
        kind=_text(values.get(_CHAIN_TYPE, b"")),
    )


def rule(expressions: bytes, ranges: tuple[IPNetwork, ...]) -> Rule:
    """What a rule's expressions say of a packet whose other end is a Pod of these ranges."""
    loaded: dict[int, _Loaded] = {}
    fits, verdict, to = True, "", ""
    for name, data in _each(expressions):
        if name in _LOADS:
            register = _number(data[_LOADS[name]])
            before = loaded.get(_number(data[1])) if name == "bitwise" else None
            loaded[register] = _load(name, data, before)
        elif name == "cmp":
            fits = fits and _compare(loaded.get(_number(data[1])), data, ranges)
        elif name in _CONDITIONS:
            fits = False
        elif name == "immediate":
            found = attributes(attributes(data[2]).get(_DATA_VERDICT, b""))
            if found:
                verdict = _VERDICTS.get(_signed(found[_VERDICT_CODE]), "")
                to = _text(found.get(_VERDICT_CHAIN, b""))
        elif name == "reject" or (name == "target" and _text(data[1]) in ("REJECT", "DROP")):
            verdict = "drop"
    return Rule(fits, verdict, to)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a register holds: a link's name, the family, or an address with the bits that are looked at."""

    what: str
    version: int = 4
    mask: bytes = b""


_LOADS = {"meta": 1, "payload": 1, "ct": 1, "fib": 1, "rt": 1, "socket": 1, "bitwise": 2}
"""Expressions that fill a register, and the attribute that names it."""


def _load(name: str, data: Mapping[int, bytes], before: _Loaded | None) -> _Loaded:
    other = _Loaded("other")
    if name == "meta" and 2 in data:
        what = {_IIFNAME: "link", _OIFNAME: "link", _NFPROTO: "family"}
        return _Loaded(what.get(_number(data[2]), "other"))
    if name == "payload" and 4 in data and _number(data[2]) == 1:
        start, length = _number(data[3]), _number(data[4])
        for (offset, size), version in _ADDRESSES.items():
            if start == offset and length <= size:  # a whole number of bytes of a prefix is loaded alone
                return _Loaded("address", version, b"\xff" * length)
    if name == "bitwise" and before and before.what == "address":
        mask = attributes(data.get(4, b"")).get(_DATA_VALUE, b"")
        return _Loaded("address", before.version, mask)
    return other


def _compare(loaded: _Loaded | None, data: Mapping[int, bytes], ranges: tuple[IPNetwork, ...]) -> bool:
    """Whether a comparison holds for every packet of some Pod."""
    unlike = _number(data[2]) == 1
    value = attributes(data[3]).get(_DATA_VALUE, b"")
    if loaded is None or loaded.what == "other":
        return False
    if loaded.what == "family":
        return True
    if loaded.what == "link":
        return value.startswith(b"podwall") is not unlike
    return any(each.overlaps(_network(loaded, value)) for each in _alike(loaded, ranges)) is not unlike


def _alike(loaded: _Loaded, ranges: tuple[IPNetwork, ...]) -> Iterator[IPNetwork]:
    return (each for each in ranges if each.version == loaded.version)


def _network(loaded: _Loaded, value: bytes) -> IPNetwork:
    size = 4 if loaded.version == 4 else 16
    length = int.from_bytes(loaded.mask, "big").bit_count()
    return ip_network((value.ljust(size, b"\0")[:size], length), strict=False)


def _each(expressions: bytes) -> Iterator[tuple[str, Mapping[int, bytes]]]:
    offset = 0
    while offset + 4 <= len(expressions):
        size = struct.unpack_from("=H", expressions, offset)[0]
        if size < 4:
            return
        values = attributes(expressions[offset + 4 : offset + size])
        yield _text(values[_EXPRESSION_NAME]), attributes(values.get(_EXPRESSION_DATA, b""))
        offset += (size + 3) & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value: bytes) -> int:
    return int.from_bytes(value[:4], "big")


def _signed(value: bytes) -> int:
    return int.from_bytes(value[:4], "big", signed=True)
