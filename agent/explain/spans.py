"""Every port there is as a number on one line, so that what policies allow can be joined and compared. Pure.

    0 ........ 65535 | 65536 .... 131071 | 131072 .... 196607 | 196608
    TCP                UDP                 SCTP                 what has no ports (ICMP and others)

What may pass is a row of spans of that line, in order and apart from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from agent.cluster.model import PROTOCOLS, PolicyPort, Problem, Protocol
from agent.compile.peers import PortName

Spans: TypeAlias = tuple[tuple[int, int], ...]

_PORTS = 1 << 16
_FIRST: dict[Protocol, int] = {protocol: number * _PORTS for number, protocol in enumerate(PROTOCOLS)}
_OTHERS = len(PROTOCOLS) * _PORTS

NOTHING: Spans = ()
EVERYTHING: Spans = ((0, _OTHERS),)
OTHER = "other"
MOST_WORDS = 4


class Piece(NamedTuple):
    """Ports of one protocol, the last included; both 0 where there are none ("other")."""

    protocol: str
    first: int
    last: int


def spans_of(ports: Sequence[PolicyPort | Problem] | None, numbers: Mapping[PortName, int]) -> Spans:
    """The ports that a rule means; `numbers` are the receiver's named ones."""
    if not ports:
        return EVERYTHING
    return joined((_of_port(of, numbers),) for of in ports if isinstance(of, PolicyPort))


def _of_port(of: PolicyPort, numbers: Mapping[PortName, int]) -> tuple[int, int]:
    start = _FIRST[of.protocol]
    if of.port is None:
        return start, start + _PORTS - 1
    first = numbers.get((of.protocol, of.port)) if isinstance(of.port, str) else of.port
    if first is None:
        return 1, 0  # no port at all
    return start + first, start + (of.end_port or first)


def joined(parts: Iterable[Spans]) -> Spans:
    """What is in any of them."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(span for part in parts for span in part if span[0] <= span[1]):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return tuple(found)


def common(one: Spans, other: Spans) -> Spans:
    """What is in both."""
    if EVERYTHING in (one, other):
        return other if one == EVERYTHING else one
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple(sorted(span for span in both if span[0] <= span[1]))


def without(one: Spans, other: Spans) -> Spans:
    """What is in the first alone."""
    return common(one, _rest(other))


def _rest(of: Spans) -> Spans:
    low, found = 0, []
    for first, last in of:
        if low < first:
            found.append((low, first - 1))
        low = last + 1
    return (*found, (low, _OTHERS)) if low <= _OTHERS else tuple(found)


def contains(of: Spans, protocol: Protocol, port: int) -> bool:
    """Whether a port is among them."""
    number = _FIRST[protocol] + port
    return any(low <= number <= high for low, high in of)


def pieces(of: Spans) -> Iterator[Piece]:
    """The same, protocol by protocol."""
    for protocol, start in _FIRST.items():
        for low, high in common(of, ((start, start + _PORTS - 1),)):
            yield Piece(protocol, low - start, high - start)
    if of and of[-1][1] == _OTHERS:
        yield Piece(OTHER, 0, 0)


def in_words(of: Spans) -> str:
    """Such as "TCP 80, UDP 53", "every port but TCP 8080"."""
    if of == EVERYTHING:
        return "every port"
    inside, outside = list(pieces(of)), list(pieces(_rest(of)))
    if len(outside) < len(inside) or (len(outside) == 1 and of[-1][1] == _OTHERS):
        return f"every port but {_listed(outside)}"
    return _listed(inside)


def _listed(of: Sequence[Piece]) -> str:
    said = ", ".join(map(_said, of[:MOST_WORDS]))
    return f"{said} and {len(of) - MOST_WORDS} more" if len(of) > MOST_WORDS else said


def _said(of: Piece) -> str:
    if of.protocol == OTHER:
        return "ICMP and the like"
    if (of.first, of.last) == (0, _PORTS - 1):
        return f"every {of.protocol} port"
    return f"{of.protocol} {of.first}" + (f"-{of.last}" if of.last > of.first else "")
