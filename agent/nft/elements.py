"""Transactions of elements alone, in the kernel's own bytes: the short way for what changes most often.

    add and delete element, plain sets and maps --> one batch of netlink messages --> committed, or not at all
    anything else, and what the kernel refuses  --> None: libnftables takes the text, and says what is wrong

libnftables first lists all tables, chains and sets, in every command: with the 1,500 sets of a thousand
policies that is 4 ms where the kernel needs a tenth of one. A changed label or endpoint is elements alone.

A batch is [begin][one message for each set][end]. The kernel answers while it is sent: an error for each
message that it refuses, and an acknowledgement for one that asked for it, here the last.

Layouts: linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h; comments are libnftnl's user data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from agent.nfnetlink import ACK, ERROR, NFTABLES, error_of, message, messages
from agent.nft.diff import Command
from agent.nft.model import Element, Key, Set, Verdict
from agent.pods.rtnetlink import attribute, nest

MOST = 500  # elements; what is more is slow enough either way

_BATCH_BEGIN, _BATCH_END = 16, 17
_NEW_ELEMENTS, _DELETE_ELEMENTS = 12, 14
_CREATE = 0x400
_FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}

_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _ELEMENT = 1, 2, 3, 1
_KEY, _DATA, _USER_DATA = 1, 2, 6
_VALUE, _VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_VERDICTS = {"accept": 1, "drop": 0, "continue": -1, "jump": -3, "goto": -4, "return": -5}
_COMMENT = 0  # of user data

_ADDRESSES = {"ipv4_addr": 4, "ipv6_addr": 6}
_NUMBERS = {"inet_service": ">H", "inet_proto": "B", "mark": "=I", "integer": "=I"}
_IFNAMSIZ = 16

Words: TypeAlias = Sequence[str]


class _CannotSayError(Exception):
    """The text is needed for this."""


def batch(commands: Iterable[Command]) -> bytes | None:
    """The messages of a transaction, None when it is not of elements alone or not of these types."""
    commands = list(commands)
    if not commands or sum(len(command.elements) for command in commands) > MOST:
        return None
    try:
        body = [_message(command, number, len(commands)) for number, command in enumerate(commands, 1)]
    except _CannotSayError:
        return None
    return b"".join((_edge(_BATCH_BEGIN, 0), *body, _edge(_BATCH_END, len(commands) + 1)))


def committed(answers: Iterable[bytes]) -> bool:
    """Whether all answers to a batch say that it is in force."""
    errors = [error_of(each) for data in answers for each in messages(data) if each.kind == ERROR]
    return bool(errors) and not any(errors)


def _edge(kind: int, sequence: int) -> bytes:
    return message(0, kind, b"", sequence=sequence, resource=NFTABLES)


def _message(command: Command, number: int, last: int) -> bytes:
    of, adds = command.of, command.word == "add element"
    if not (adds or command.word == "delete element") or not isinstance(of, Set) or of.flags:
        raise _CannotSayError
    elements = (nest(_ELEMENT, *_element(each, of, adds)) for each in command.elements)
    content = (
        attribute(_LIST_TABLE, of.table.name.encode() + b"\0"),
        attribute(_LIST_SET, of.name.encode() + b"\0"),
        _long_nest(_LIST_ELEMENTS, b"".join(elements)),
    )
    return message(
        NFTABLES,
        _NEW_ELEMENTS if adds else _DELETE_ELEMENTS,
        b"".join(content),
        sequence=number,
        flags=(_CREATE if adds else 0) | (ACK if number == last else 0),
        family=_FAMILIES[of.table.family],
    )


def _long_nest(kind: int, content: bytes) -> bytes:
    try:
        return nest(kind, content)
    except struct.error:  # longer than the 16 bits of its length can say
        raise _CannotSayError from None


def _element(of: Element, where: Set, adds: bool) -> Iterable[bytes]:
    yield nest(_KEY, attribute(_VALUE, _packed(of.key, where.type)))
    if not adds:
        return
    if isinstance(of.data, Verdict):
        yield nest(_DATA, nest(_VERDICT, *_verdict(of.data)))
    elif of.data is not None:
        yield nest(_DATA, attribute(_VALUE, _packed(of.data, where.data)))
    if of.comment:
        text = of.comment.encode() + b"\0"
        yield attribute(_USER_DATA, bytes((_COMMENT, len(text))) + text)


def _verdict(of: Verdict) -> Iterable[bytes]:
    yield attribute(_VERDICT_CODE, struct.pack(">i", _VERDICTS[of.kind]))
    if of.chain:
        yield attribute(_VERDICT_CHAIN, of.chain.encode() + b"\0")


def _packed(key: Key, kinds: Words) -> bytes:
    """A value, or those of a concatenation, each padded to the 32 bits of a register."""
    if not isinstance(key, tuple):
        key = (key,)
    if len(key) != len(kinds):
        raise _CannotSayError
    if len(kinds) == 1:
        return _scalar(key[0], kinds[0])
    values = (_scalar(value, kind) for value, kind in zip(key, kinds, strict=True))
    return b"".join(value + bytes(-len(value) % 4) for value in values)


def _scalar(value: object, kind: str) -> bytes:
    if kind in _NUMBERS and isinstance(value, int) and not isinstance(value, bool):
        try:
            return struct.pack(_NUMBERS[kind], value)
        except struct.error:
            raise _CannotSayError from None
    if kind in _ADDRESSES and getattr(value, "version", 0) == _ADDRESSES[kind]:
        packed = getattr(value, "packed", None)  # a network has none
        if isinstance(packed, bytes):
            return packed
    if kind == "ifname" and isinstance(value, str) and 0 < len(value.encode()) < _IFNAMSIZ:
        return value.encode().ljust(_IFNAMSIZ, b"\0")
    raise _CannotSayError
