"""What of a link's ARP and Neighbour Discovery reaches the agent: a filter in the kernel (classic BPF).

    ethertype, operation or ICMPv6 type wrong  -> drop
    last 32 bits of the address are one of ours -> pass
    otherwise                                   -> drop

So a busy link costs the agent nothing: only questions about addresses that this node answers for wake it,
and ARP of others that claim one of them. What passes is read in full by `frames`. Offsets are those of an
Ethernet frame; instructions are those of linux/filter.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from agent.cluster.model import IPAddress

MOST_COMPARED = 1000
"""Addresses in one filter; with more of them everything of its kind passes (the kernel takes 4,096
instructions)."""

_LOAD_HALF, _LOAD_BYTE, _LOAD_WORD = 0x28, 0x30, 0x20  # from an absolute offset
_EQUAL, _RETURN = 0x15, 0x06
_WHOLE = 0xFFFF
_INSTRUCTION = struct.Struct("=HBBI")

_ARP_SENDER, _ARP_TARGET = 14 + 14, 14 + 24
_NS_TARGET_END = 14 + 40 + 8 + 12


def nothing() -> bytes:
    """A filter that passes no frame."""
    return _code([(_RETURN, 0, 0, 0)])


def arp(addresses: Iterable[IPAddress]) -> bytes:
    """Passes ARP about, or from who claims to have, one of these IPv4 addresses."""
    words = sorted({int(ip) for ip in addresses})
    checks = [(_LOAD_HALF, 12, 0x0806)]
    return _code([*_guards(checks), *_compare(_ARP_TARGET, words), *_compare(_ARP_SENDER, words), *_end()])


def solicitations(addresses: Iterable[IPAddress]) -> bytes:
    """Passes Neighbour Solicitations whose target may be one of these IPv6 addresses."""
    words = sorted({int(ip) & 0xFFFFFFFF for ip in addresses})
    checks = [
        (_LOAD_HALF, 12, 0x86DD),
        (_LOAD_BYTE, 14 + 6, 58),  # next header: no extension header may come before
        (_LOAD_BYTE, 14 + 40, 135),
    ]
    return _code([*_guards(checks), *_compare(_NS_TARGET_END, words), *_end()])


_Instruction = tuple[int, int, int, int]


def _guards(checks: Iterable[tuple[int, int, int]]) -> list[_Instruction]:
    """Drop the frame unless each place has its value."""
    code: list[_Instruction] = []
    for load, offset, value in checks:
        code += [(load, 0, 0, offset), (_EQUAL, 1, 0, value), (_RETURN, 0, 0, 0)]
    return code


def _compare(offset: int, words: list[int]) -> list[_Instruction]:
    """Pass the frame when the word at the offset is one of these."""
    if len(words) > MOST_COMPARED:
        return [(_RETURN, 0, 0, _WHOLE)]
    code: list[_Instruction] = [(_LOAD_WORD, 0, 0, offset)]
    for word in words:
        code += [(_EQUAL, 0, 1, word), (_RETURN, 0, 0, _WHOLE)]
    return code


def _end() -> list[_Instruction]:
    return [(_RETURN, 0, 0, 0)]


def _code(instructions: Iterable[_Instruction]) -> bytes:
    return b"".join(_INSTRUCTION.pack(code, jt, jf, k) for code, jt, jf, k in instructions)
