"""Following all agents: their news joined, so that each event is told once, in order, and every loss is said.

each agent --denials, flows, until when that is all--> wait for the slowest --> join --> events up to then
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.cli.agents import NOBODY, Agents, Silent
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked
from agent.explain.observed import Event, Names, Seen, Wire, denial, flow, join
from agent.explain.world import World

REFRESH_S = 10.0  # how old the objects may be that name what is followed
MOST_TOLD = 50_000  # flows whose end is waited for
LATE_LEG_S = 5.0

LOST = {
    "denials": "logged packets or denials came too fast to be taken",
    "not_logged": "denied packets were counted but not logged: the rules log 10 a second of each policy set",
    "flows": "flows came too fast to be taken",
    "flow_overruns": "times the kernel dropped flow events, nobody knows how many",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events; pod and service are "namespace/name", "" any; since: seconds since the epoch."""

    denied: bool
    allowed: bool
    pod: str = ""
    service: str = ""
    since: float = 0.0

    def takes(self, event: Event) -> bool:
        """Whether an event is one of them."""
        if not (self.denied if event.denied else self.allowed):
            return False
        if self.pod and self.pod not in (*event.source.pod.split(","), *event.destination.pod.split(",")):
            return False
        if self.service and self.service not in (event.met.service if event.met else "", *event.endpoint_of):
            return False
        return event.time is None or event.time >= self.since


def in_order(events: Iterable[Event]) -> list[Event]:
    """By their times; what is there now comes last."""
    return sorted(events, key=lambda each: (each.time is None, each.time or 0.0, _who(each)))


def _who(event: Event) -> tuple[str, ...]:
    return event.source.name, event.destination.name, str(event.destination), str(event.source)


class Follower:
    """News of all agents, joined: each event once, in order, when every agent has told what was before it."""

    def __init__(self, agents: Agents, nodes: Sequence[str], asked: Asked, wanted: Wanted) -> None:
        """Raises Unreachable when no agent answers."""
        self._agents, self._nodes, self._asked, self._wanted = agents, nodes, asked, wanted
        self._sessions: dict[str, str] = {}
        self._lost: dict[str, Mapping[str, int]] = {}
        self._silent: dict[str, str] = {}
        self._pending: list[Seen] = []
        self._legs: OrderedDict[tuple[str, Any], float] = OrderedDict()  # of told ones, on other nodes
        self._told: OrderedDict[tuple[str, Any], None] = OrderedDict()  # begun, and at which node
        self._denied: OrderedDict[Wire, Seen] = OrderedDict()  # flows whose packets are still tried again
        self._names: Names | None = None
        self._named_at = 0.0
        self._first: tuple[float, list[dict[str, Any]]] | None = self._news()
        if not self._sessions:
            raise Unreachable("; ".join(self._silent.values()) or NOBODY)

    def close(self) -> None:
        """Let the agents keep nothing more for it."""
        bodies = {node: {"session": session} for node, session in self._sessions.items()}
        self._agents.ask_each("unfollow", bodies)

    def poll(self) -> tuple[list[Event], list[dict[str, Any]]]:
        """What happened since, and what was lost."""
        until, notices = self._first or self._news()
        self._first = None
        return self._release(until), notices

    def _news(self) -> tuple[float, list[dict[str, Any]]]:
        """Ask everybody; until when everything is known, and what was lost."""
        notices: list[dict[str, Any]] = []
        until = time.time()
        bodies = {node: {"session": self._sessions.get(node, ""), "flows": True} for node in self._nodes}
        for node, answer in self._agents.ask_each("follow", bodies).items():
            if isinstance(answer, Silent):
                notices += self._fell_silent(node, answer.why)
                continue
            notices += self._answered(node, answer)
            until = min(until, answer["until"])
            self._pending += (denial(node, each) for each in answer["denials"])
            self._pending += (flow(node, each) for each in answer["flows"])
        return until, notices

    def _fell_silent(self, node: str, why: str) -> Iterator[dict[str, Any]]:
        if node not in self._silent:
            yield {"event": "lost", "node": node, "what": "agent", "count": None, "why": why}
        self._silent[node] = why

    def _answered(self, node: str, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        known = self._sessions.get(node)
        if known not in (None, answer["session"]) or self._silent.pop(node, ""):
            why = "its agent answers again; what happened meanwhile is not known"
            yield {"event": "lost", "node": node, "what": "agent", "count": None, "why": why}
            self._lost.pop(node, None)
        self._sessions[node] = answer["session"]
        before = self._lost.get(node, {})
        for what, count in answer["lost"].items():
            if more := count - before.get(what, 0):
                yield {"event": "lost", "node": node, "what": what, "count": more, "why": LOST[what]}
        self._lost[node] = answer["lost"]

    def _release(self, until: float) -> list[Event]:
        now = time.time()
        while self._legs and next(iter(self._legs.values())) < now:
            self._legs.popitem(last=False)
        while len(self._denied) > MOST_TOLD:
            self._denied.popitem(last=False)
        self._pending = [each for each in self._pending if not self._is_known(each)]
        found: list[Event] = []
        gone: set[int] = set()
        for connection in join(self._pending, now, self._denied):
            if (connection.time or 0.0) > until:
                continue
            if connection.denial and not connection.first.is_denial:
                self._denied[connection.denial.leaving] = connection.first
                self._denied |= {part.leaving: connection.first for part in connection.parts}
            gone.update(id(part) for part in connection.parts)
            if self._remember(connection.first, connection.parts, denied=connection.denial is not None):
                found.append(self._named().event(connection))
        self._pending = [each for each in self._pending if id(each) not in gone]
        return in_order(each for each in found if self._wanted.takes(each))

    def _is_known(self, seen: Seen) -> bool:
        """Whether it is another node's late view of what has been told."""
        if seen.is_denial or seen.event != "begun":
            return False
        return (seen.node, seen.entering) in self._legs

    def _remember(self, first: Seen, parts: Sequence[Seen], *, denied: bool) -> bool:
        """Whether it is to be told: ends only of what was told to begin, by the node that said so."""
        if first.event == "ended":
            return any(self._forget(part) for part in parts)
        if first.event == "begun" and not denied:
            self._told[first.node, first.entering] = None
            if len(self._told) > MOST_TOLD:
                self._told.popitem(last=False)
        until = time.time() + LATE_LEG_S
        wires = {wire for part in parts if not part.is_denial for wire in (part.entering, part.leaving)}
        for node in self._nodes:
            for wire in wires:
                if node not in {part.node for part in parts}:
                    self._legs[node, wire] = until
        return True

    def _forget(self, ended: Seen) -> bool:
        """Whether this node had said that it begins."""
        key = ended.node, ended.entering
        if key not in self._told:
            return False
        del self._told[key]
        return True

    def _named(self) -> Names:
        """The objects, not too old; asked for only when there is something to name."""
        if self._names is None or time.monotonic() - self._named_at > REFRESH_S:
            self._names = Names(World(self._asked.snapshot()))
            self._named_at = time.monotonic()
        return self._names
