"""What was seen of connections, as rows that stay comparable from one look to the next. Pure.

    flows of all nodes   --a row per (who, whom, protocol, port)--> allowed, how many are open, when last seen
    denials of all nodes -----------------------------------------> denied, how many packets, which way

A flow between two nodes is known to both and counted once. Kernels forget flows that have ended, people do
not: a row stays for `KEPT_S`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

KEPT_S = 600.0
MOST_KEPT = 20_000
PORTLESS = frozenset({"icmp", "ipv6-icmp", "icmpv6"})
SEEN_REPLY = 1 << 1  # IPS_SEEN_REPLY in the kernel's nf_conntrack_common.h

Name = Callable[[str], str]


class Key(NamedTuple):
    """What makes a row: ids of both ends, upper-case protocol, the port connected to (0: it has none)."""

    source: str
    target: str
    protocol: str
    port: int


class _Connection(NamedTuple):
    """One flow, wherever it was seen."""

    protocol: str
    source: str
    sport: int
    target: str
    port: int


@dataclass(slots=True)
class _Flow:
    key: Key
    asked: str
    answered: bool
    first: float
    last: float


class Traffic:
    """Remembers flows; `take` is called with what all agents say at one time."""

    def __init__(self) -> None:
        self._flows: dict[_Connection, _Flow] = {}
        self._denials: list[Mapping[str, Any]] = []
        self._now = 0.0

    def take(
        self,
        flows: Iterable[Mapping[str, Any]],
        denials: Iterable[Mapping[str, Any]],
        name: Name,
        now: float,
    ) -> None:
        """Take the agents' answers to `flows` and `denials`; `name` is who has an address."""
        self._now = now
        for each in flows:
            self._take_flow(each, name)
        oldest_first = sorted(self._flows.items(), key=lambda item: item[1].last)
        kept = [item for item in oldest_first if now - item[1].last <= KEPT_S]
        self._flows = dict(kept[-MOST_KEPT:])
        self._denials = [
            {**each, "row": _denial_key(each, name)} for each in denials if now - each["last_time"] <= KEPT_S
        ]

    def rows(self) -> list[dict[str, Any]]:
        """All rows, sorted by their ids; times are seconds since the epoch."""
        found = [*self._allowed(), *self._denied()]
        return sorted(found, key=lambda row: str(row["id"]))

    def _take_flow(self, flow: Mapping[str, Any], name: Name) -> None:
        source, target = flow["source"], flow["destination"]
        protocol = str(flow["protocol"])
        port = 0 if protocol in PORTLESS else target["port"]
        connection = _Connection(protocol, source["address"], source["port"], target["address"], port)
        known = self._flows.get(connection)
        answered = bool(flow["status"] & SEEN_REPLY)
        if known is not None:
            known.last, known.answered = self._now, answered
            return
        key = Key(name(source["address"]), name(target["address"]), protocol.upper(), port)
        asked = flow["asked"]["address"] if flow.get("asked") else ""
        self._flows[connection] = _Flow(key, asked, answered, self._now, self._now)

    def _allowed(self) -> Iterator[dict[str, Any]]:
        by_key: dict[Key, list[_Flow]] = {}
        for flow in self._flows.values():
            by_key.setdefault(flow.key, []).append(flow)
        for key, flows in by_key.items():
            yield {
                **_row(key, "allowed"),
                "count": len(flows),
                "open": sum(flow.last == self._now for flow in flows),
                "unanswered": sum(not flow.answered for flow in flows),
                "asked": sorted({flow.asked for flow in flows if flow.asked}),
                "first": min(flow.first for flow in flows),
                "last": max(flow.last for flow in flows),
            }

    def _denied(self) -> Iterator[dict[str, Any]]:
        by_key: dict[Key, list[Mapping[str, Any]]] = {}
        for denial in self._denials:
            by_key.setdefault(denial["row"], []).append(denial)
        for key, denials in by_key.items():
            latest = max(denials, key=lambda each: float(each["last_time"]))
            yield {
                **_row(key, "denied"),
                "count": sum(each["count"] for each in denials),
                "direction": latest["direction"],
                "policies": sorted({of for each in denials for of in each.get("policies", ())}),
                "first": min(each["time"] for each in denials),
                "last": latest["last_time"],
            }


def _row(key: Key, verdict: str) -> dict[str, Any]:
    return {"id": " ".join((verdict, *map(str, key))), "verdict": verdict, **key._asdict()}


def _denial_key(denial: Mapping[str, Any], name: Name) -> Key:
    protocol = str(denial["protocol"])
    port = 0 if protocol in PORTLESS else denial["dport"] or 0
    return Key(name(denial["source"]), name(denial["destination"]), protocol.upper(), port)
