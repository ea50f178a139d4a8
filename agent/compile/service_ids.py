"""Numbers that stand for lists and endpoints in marks: short, and yet no two alike.

    ("shop", "web", "http", "TCP", "cluster")  --digest-->  0x5a1b2c3d
    (10.244.1.7, 5353)                         --digest-->  0x5e0f1a2b

A number has 28 bits, so of tens of thousands of names some share their digest, and whoever may create
Services can find such names on purpose. Of those the first by order keeps the digest and the others get
numbers that no digest has, in order: numbers follow from the names alone, not from the order in which they
came. A name that comes or goes may thus give others another number; `take` and `drop` say which.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable
from hashlib import blake2b
from typing import Any, Generic, TypeAlias, TypeVar

Name: TypeAlias = tuple[str, ...]
N = TypeVar("N", bound=Hashable)  # names of one kind, which have an order

BITS = 28
RESERVED = 1 << 20
"""Numbers below are no digest's; the first ones are for uses that have no name."""
FIRST_RESERVED = 16


def name_digest(name: Name) -> int:
    """A number from RESERVED to 2**28 - 1."""
    return _digest("".join(f"{len(part)}:{part}" for part in name).encode("utf-8", "surrogatepass"))


def backend_digest(backend: tuple[Any, int]) -> int:
    """The same for an address and a port."""
    return _digest(backend[0].packed + backend[1].to_bytes(2))


def _digest(text: bytes) -> int:
    return RESERVED + int.from_bytes(blake2b(text, digest_size=8).digest()) % ((1 << BITS) - RESERVED)


class Numbers(Generic[N]):
    """The numbers of a set of names, with `magic` in the bits above."""

    def __init__(self, magic: int, digest: Callable[[N], int]) -> None:
        self._magic, self._digest = magic, digest
        self._first: dict[int, N] = {}  # who has the digest
        self._others: list[tuple[int, N]] = []  # digest and name of those who share one, in order

    def of(self, name: N) -> int:
        """The number of a name that was taken."""
        number = self._digest(name)
        if self._first[number] != name:
            number = FIRST_RESERVED + self._others.index((number, name))
        return self._magic | number

    def take(self, name: N) -> set[N]:
        """A name is there now; whose number changed besides."""
        number = self._digest(name)
        first = self._first.setdefault(number, name)
        if first == name:
            return set()
        later = first
        if _before(name, first):
            self._first[number] = name
        else:
            later = name
        insort(self._others, (number, later))
        return {each for _, each in self._others[self._others.index((number, later)) :]} - {name}

    def drop(self, name: N) -> set[N]:
        """A name is gone; whose number changed."""
        number = self._digest(name)
        gone = name
        if self._first[number] == name:
            gone = next((each for digest, each in self._others if digest == number), name)
            if gone == name:
                del self._first[number]
                return set()
            self._first[number] = gone
        place = self._others.index((number, gone))
        changed = {each for _, each in self._others[place:]} - {name}
        del self._others[place]
        return changed


def _before(one: Any, other: Any) -> bool:
    return bool(one < other)
