"""Numbers that stand for names in marks: short, and yet no two alike.

    ("shop", "web", "http", "TCP", "cluster")  --digest-->  0x5a1b2c3d

A number has 28 bits, so of tens of thousands of names some share their digest, and whoever may create
Services can find such names on purpose. Of those the first by order keeps the digest and the others get
numbers that no digest has, in order: numbers follow from the names alone, not from the order in which they
came. A name that comes or goes may thus give others another number; `take` and `drop` say which.
"""

from __future__ import annotations

from bisect import insort
from hashlib import blake2b
from typing import TypeAlias

Name: TypeAlias = tuple[str, ...]

BITS = 28
RESERVED = 1 << 20
"""Numbers below are no digest's; the first ones are for uses that have no name."""
FIRST_RESERVED = 16


def digest(name: Name) -> int:
    """A number from RESERVED to 2**28 - 1."""
    joined = "".join(f"{len(part)}:{part}" for part in name)
    number = int.from_bytes(blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    return RESERVED + number % ((1 << BITS) - RESERVED)


class Numbers:
    """The numbers of a set of names, with `magic` in the bits above."""

    def __init__(self, magic: int) -> None:
        self._magic = magic
        self._first: dict[int, Name] = {}  # who has the digest
        self._others: list[tuple[int, Name]] = []  # digest and name of those who share one, in order

    def of(self, name: Name) -> int:
        """The number of a name that was taken."""
        number = digest(name)
        if self._first[number] != name:
            number = FIRST_RESERVED + self._others.index((number, name))
        return self._magic | number

    def take(self, name: Name) -> set[Name]:
        """A name is there now; whose number changed besides."""
        number = digest(name)
        first = self._first.setdefault(number, name)
        if first == name:
            return set()
        if name < first:
            self._first[number] = name
        later = (number, max(name, first))
        insort(self._others, later)
        return {each for _, each in self._others[self._others.index(later) :]} - {name}

    def drop(self, name: Name) -> set[Name]:
        """A name is gone; whose number changed."""
        number = digest(name)
        gone = number, name
        if self._first[number] == name:
            heirs = (each for each in self._others if each[0] == number)
            gone = next(heirs, gone)
            if gone[1] == name:
                del self._first[number]
                return set()
            self._first[number] = gone[1]
        place = self._others.index(gone)
        changed = {each for _, each in self._others[place:]} - {name}
        del self._others[place]
        return changed
