"""How often somebody else changed podwall's tables, and when: each change is undone within a second. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from agent.nft.kernel import Foreign

HOUR_S = 3600.0
KEPT = 1000
"""Repairs that are remembered; more in an hour are told as so many."""


class Repair(NamedTuple):
    """When somebody's change was heard of, in seconds since the epoch, and the tables that it touched."""

    time: float
    tables: tuple[str, ...]


class Repairs:
    """The last repairs; `clock` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.total = 0
        self._clock = clock
        self._last: deque[Repair] = deque(maxlen=KEPT)

    def note(self, foreign: Foreign) -> None:
        """Somebody changed these tables, or, where notifications were lost, may have changed any."""
        tables = tuple(sorted(f"{table.family} {table.name}" for table in foreign.tables))
        self._last.append(Repair(self._clock(), tables))
        self.total += 1

    def of_last_hour(self) -> tuple[Repair, ...]:
        """Those of the last hour, oldest first."""
        begin = self._clock() - HOUR_S
        return tuple(each for each in self._last if each.time >= begin)

    def status(self) -> Mapping[str, object]:
        """For the socket: since the agent's start, in the last hour, when last, and of which tables."""
        recent: Iterable[Repair] = self.of_last_hour()
        return {
            "total": self.total,
            "last_hour": len(tuple(recent)),
            "last": self._last[-1].time if self._last else None,
            "tables": sorted({table for each in recent for table in each.tables}),
        }
