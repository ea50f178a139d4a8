"""What is wrong with objects of the cluster, told once: a log line, a metric, a Kubernetes Event.

    set(object, topic, problems) --> the problems that there are now     (current, podwall_object_problems)
                                      +--new--> a line in the log
                                      +--new--> waiting --a pause, at most so many a second--> Event

It is level-triggered: who compiles an object says each time what is wrong with it, and only what is new is
told. An Event's name follows from the object and the problem, so that the agents of all nodes make it once,
and a restarted agent does not make it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import Counter as Count
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeAlias

from msgspec import Struct
from prometheus_client import Counter, Gauge

from agent.cluster.errors import ApiError, Conflict
from agent.cluster.model import Key

MOST_TOLD = 10
"""Problems of one object and topic in the log and as Events; the rest is one sentence with their number."""
MOST_WAITING = 1000
PAUSE_S = 5.0
"""An Event is made after some part of this, by chance: where every node sees the problem, one is first."""
EVENTS_PER_S = 5.0

REASONS: Mapping[str, str] = {
    "fields": "UnusableFields",
    "policy": "UnusablePolicy",
    "service": "UnusableService",
    "pool": "NoLoadBalancerAddress",
}
"""The reason that an Event of a topic has."""

PROBLEMS = Gauge("podwall_object_problems", "Problems of cluster objects that there are now", ["kind"])
UNTOLD = Counter("podwall_events_untold_total", "Kubernetes Events that could not be made")

log = logging.getLogger(__name__)


class Report(Struct, frozen=True):
    """One problem of one object; `key` is (namespace, name), or the name of what has no namespace."""

    kind: str
    key: Key
    uid: str
    topic: str
    problem: str

    @property
    def reason(self) -> str:
        return REASONS.get(self.topic, "Unusable")

    @property
    def object(self) -> str:
        return self.key if isinstance(self.key, str) else "/".join(self.key)

    def to_json(self) -> dict[str, str]:
        """For the socket's status."""
        return {"kind": self.kind, "object": self.object, "topic": self.topic, "problem": self.problem}

    @property
    def event_name(self) -> str:
        """The same on every node, another for every object (also one of the same name) and problem."""
        parts = (self.kind, str(self.key), self.uid, self.topic, self.problem)
        digest = hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:16]
        name = self.key if isinstance(self.key, str) else self.key[1]
        return f"{name[:200].rstrip('.-')}.{digest}"


class _Place(NamedTuple):
    kind: str
    key: Key
    topic: str


Tell: TypeAlias = Callable[[Report], Awaitable[None]]


class Reports:
    """The problems that there are; while `run` is awaited, `tell` makes Events of them or raises ApiError."""

    def __init__(self, tell: Tell, *, pause_s: float = PAUSE_S, per_s: float = EVENTS_PER_S) -> None:
        self._tell = tell
        self._pause_s = pause_s
        self._between_s = 1 / per_s
        self._current: dict[_Place, tuple[Report, ...]] = {}
        self._numbers: Count[str] = Count()
        self._waiting: asyncio.Queue[Report] = asyncio.Queue(MOST_WAITING)

    def set(self, kind: str, key: Key, uid: str, topic: str, problems: tuple[str, ...]) -> None:
        """These are all the problems of an object under a topic now; none for an object that is gone."""
        place = _Place(kind, key, topic)
        before = self._current.get(place, ())
        if not problems and not before:
            return
        now = tuple(Report(kind, key, uid, topic, problem) for problem in _first(problems))
        if now:
            self._current[place] = now
        else:
            del self._current[place]
        self._count(kind, len(now) - len(before))
        for report in now:
            if report not in before:
                self._new(report)

    def current(self) -> tuple[Report, ...]:
        """Everything that is wrong now, by kind and name."""
        places = sorted(self._current, key=lambda place: (place.kind, str(place.key), place.topic))
        return tuple(report for place in places for report in self._current[place])

    async def run(self) -> None:
        """Make Events until cancelled; one that fails is logged and lost, the others go on."""
        idle = True
        while True:
            report = await self._waiting.get()
            await asyncio.sleep(random.uniform(0, self._pause_s) if idle else self._between_s)
            if self._is_current(report):
                await self._make_event(report)
            idle = self._waiting.empty()

    async def _make_event(self, report: Report) -> None:
        try:
            await self._tell(report)
        except Conflict:
            return  # another node's agent was first
        except ApiError as error:
            UNTOLD.inc()
            log.warning(
                "event=event-not-made kind=%s object=%s error=%r", report.kind, report.object, str(error)
            )

    def _is_current(self, report: Report) -> bool:
        return report in self._current.get(_Place(report.kind, report.key, report.topic), ())

    def _count(self, kind: str, more: int) -> None:
        self._numbers[kind] += more
        PROBLEMS.labels(kind).set(self._numbers[kind])

    def _new(self, report: Report) -> None:
        log.warning(
            "event=object-problem kind=%s object=%s topic=%s problem=%r",
            report.kind,
            report.object,
            report.topic,
            report.problem,
        )
        if self._waiting.full():
            UNTOLD.inc()
            return
        self._waiting.put_nowait(report)


def _first(problems: tuple[str, ...]) -> tuple[str, ...]:
    if len(problems) <= MOST_TOLD:
        return tuple(dict.fromkeys(problems))
    shown = problems[: MOST_TOLD - 1]
    return (*dict.fromkeys(shown), f"and {len(problems) - len(shown)} more problems")
