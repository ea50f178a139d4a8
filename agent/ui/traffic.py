"""What was seen of connections, as rows that stay comparable from one look to the next. Pure.

    flows and denials of all nodes --joined, named: agent.explain.observed--> events
    events --a row per (who, whom, protocol, port, verdict)--> how many, which Service, when last

Verdicts are allowed, denied, and audit: passed, though policies in audit mode would deny it. Kernels forget
connections that have ended, people do not: a row stays for `KEPT_S`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent.explain.observed import End, Event

KEPT_S = 600.0
MOST_KEPT = 20_000
PORTLESS = frozenset({"icmp", "ipv6-icmp", "icmpv6"})


class Key(NamedTuple):
    """What makes a row: ids of both ends, upper-case protocol, the port connected to (0: it has none)."""

    verdict: str
    source: str
    target: str
    protocol: str
    port: int


class _Connection(NamedTuple):
    """One flow from one look to the next."""

    key: Key
    address: str
    sport: int


@dataclass(slots=True)
class _Flow:
    services: frozenset[str]
    answered: bool
    first: float
    last: float


class Traffic:
    """Remembers connections; `take` is called with everything that is known at one time."""

    def __init__(self) -> None:
        self._flows: dict[_Connection, _Flow] = {}
        self._denials: list[Event] = []
        self._now = 0.0

    def take(self, events: Iterable[Event], now: float) -> None:
        """Take what all agents know now; `now` in seconds since the epoch."""
        self._now = now
        self._denials = []
        for event in events:
            if not event.denied:
                self._take_flow(event)
            elif now - (event.last_time or now) <= KEPT_S:
                self._denials.append(event)
        oldest_first = sorted(self._flows.items(), key=lambda item: item[1].last)
        kept = [item for item in oldest_first if now - item[1].last <= KEPT_S]
        self._flows = dict(kept[-MOST_KEPT:])

    def rows(self) -> list[dict[str, Any]]:
        """All rows, sorted by their ids; times are seconds since the epoch."""
        return sorted((*self._allowed(), *self._denied()), key=lambda row: str(row["id"]))

    def _take_flow(self, event: Event) -> None:
        connection = _Connection(_key("allowed", event), event.source.address, event.source.port)
        known = self._flows.get(connection)
        first = known.first if known else self._now
        self._flows[connection] = _Flow(_services(event), bool(event.answered), first, self._now)

    def _allowed(self) -> Iterator[dict[str, Any]]:
        by_key: dict[Key, list[_Flow]] = {}
        for connection, flow in self._flows.items():
            by_key.setdefault(connection.key, []).append(flow)
        for key, flows in by_key.items():
            yield {
                **_row(key),
                "count": len(flows),
                "open": sum(flow.last == self._now for flow in flows),
                "unanswered": sum(not flow.answered for flow in flows),
                "services": sorted(frozenset().union(*(flow.services for flow in flows))),
                "first": min(flow.first for flow in flows),
                "last": max(flow.last for flow in flows),
            }

    def _denied(self) -> Iterator[dict[str, Any]]:
        by_key: dict[Key, list[Event]] = {}
        for event in self._denials:
            by_key.setdefault(_key(event.event, event), []).append(event)
        for key, events in by_key.items():
            yield {
                **_row(key),
                "count": sum(event.count for event in events),
                "direction": events[-1].direction,
                "policies": sorted({of for event in events for of in event.policies}),
                "services": sorted(frozenset().union(*map(_services, events))),
                "first": min(event.time or self._now for event in events),
                "last": max(event.last_time or self._now for event in events),
            }


def id_of(end: End) -> str:
    """The id of an end: a name that `podwall why` understands."""
    if end.pod:
        return f"pod/{end.pod.split(',')[0]}"
    return f"node/{end.node}" if end.node else end.address


def _key(verdict: str, event: Event) -> Key:
    port = 0 if event.protocol in PORTLESS else event.destination.port
    return Key(verdict, id_of(event.source), id_of(event.destination), event.protocol.upper(), port)


def _services(event: Event) -> frozenset[str]:
    """The Service that was asked, or the address where it was no Service's."""
    if event.met:
        return frozenset((f"{event.met.service}:{event.met.port}",))
    return frozenset((str(event.asked),)) if event.asked else frozenset()


def _row(key: Key) -> dict[str, Any]:
    return {"id": " ".join(map(str, key)), **key._asdict()}
