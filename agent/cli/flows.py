"""`podwall flows`: connections and denied packets of all nodes, each once, in order, with the objects' names.

    listing   each agent's last denials, then the flows its kernel knows     --join--> a table
    --follow  each agent is asked for news twice a second; what all have told up to a time is joined and said

Whatever was lost on the way (a limit on logging, a full buffer, an agent that does not answer) is said on
standard error, or as an event of its own where events are objects.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

from agent.cli.agents import Agents, Silent
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, cluster_options
from agent.cli.output import GAP, Column, output_option, say, show, table
from agent.explain.observed import Event, Names, Seen, Wire, denial, flow, join
from agent.explain.world import World
from agent.log import printable

POLL_S = 0.5
REFRESH_S = 10.0  # how old the objects may be that name what is followed
MOST_TOLD = 50_000  # flows whose end is waited for
LATE_LEG_S = 5.0
WIDTHS = {"TIME": 12, "EVENT": 6, "PROTOCOL": 8, "SOURCE": 24, "SERVICE": 24, "DESTINATION": 24}
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


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


@click.command("flows")
@click.option("--follow", is_flag=True, help="Go on telling what happens, until interrupted.")
@click.option("--denied", is_flag=True, help="Denied packets alone.")
@click.option("--allowed", is_flag=True, help="Connections alone.")
@click.option("--pod", metavar="[NS/]NAME", default="", help="Those that this Pod is an end of.")
@click.option("--service", metavar="[NS/]NAME", default="", help="Those to this Service or its endpoints.")
@click.option("--node", multiple=True, metavar="NAME", help="What this node saw; may be given several times.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="The last N alone.")
@click.option("--since", metavar="AGE|TIME", default="", help="Such as 30s, 5m, 2h, or an RFC 3339 time.")
@output_option
@cluster_options
def flows(asked: Asked, output: str, follow: bool, denied: bool, allowed: bool, **options: Any) -> None:
    """Show who connects to whom, by which Service, and who was denied by which policies.

    Connections are those that the nodes' kernels know now, closed ones for two minutes more. Denied packets
    are the last 1,000 of each node; the same within a second are one. What two nodes see of one connection is
    shown once. With --follow begins and ends of connections are told as they come, and no old ones unless
    --last or --since ask for them.

    \b
    podwall flows --denied --since 5m
    podwall flows --follow --pod shop/web
    podwall flows --service shop/api -o json
    """
    if not asked.live:
        raise click.UsageError("flows are the agents' to tell, not manifests': leave -f away")
    both = denied == allowed
    wanted = Wanted(
        denied or both,
        allowed or both,
        _full_name(options["pod"], asked.namespace),
        _full_name(options["service"], asked.namespace),
        since(options["since"], time.time()),
    )
    with asked.agents() as agents:
        nodes = _nodes(agents, options["node"])
        if not follow:
            _say_all(_Listing(asked, agents, nodes, wanted), output, options["last"])
            return
        say_now = _Stream(output)
        follower = Follower(agents, nodes, asked, wanted)
        click.echo(f"following {', '.join(nodes)}; Ctrl-C ends it", err=True)
        try:
            if options["last"] or options["since"]:
                old = _Listing(asked, agents, nodes, wanted)
                say_now.events(each for each in old.events[-(options["last"] or 0) :] if each.time)
            _follow(follower, say_now)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:
            _forget_output()
        finally:
            with suppress(KeyboardInterrupt):
                follower.close()


def since(text: str, now: float) -> float:
    """A time that was said as an age or as RFC 3339, in seconds since the epoch. Raises UsageError."""
    if not text:
        return 0.0
    found = _DURATION.fullmatch(text)
    if found:
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return now - hours * 3600 - minutes * 60 - seconds
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"{printable(text)!r} is no age such as 5m, nor a time such as 2026-01-31T12:00:00Z"
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _full_name(text: str, namespace: str) -> str:
    return text if "/" in text or not text else f"{namespace}/{text}"


def _nodes(agents: Agents, named: Sequence[str]) -> Sequence[str]:
    unknown = set(named) - set(agents.nodes)
    if unknown:
        known = ", ".join(agents.nodes) or "none"
        missing = ", ".join(map(printable, sorted(unknown)))
        raise click.UsageError(f"no agent on {missing}; there are: {known}")
    return named or agents.nodes


# What there is now


class _Listing:
    """What all agents hold now."""

    def __init__(self, asked: Asked, agents: Agents, nodes: Sequence[str], wanted: Wanted) -> None:
        """Raises Unreachable when no agent answers."""
        self.silent: dict[str, str] = {}
        self.notes: list[str] = []
        self.lost: dict[str, dict[str, int]] = {}
        seen: list[Seen] = []
        denials = self._asked(agents.ask_all("denials", nodes=nodes))
        for node, answer in denials.items():
            seen += (denial(node, each) for each in answer["denials"])
            self._note(node, "denials", answer)
        for node, answer in self._asked(agents.ask_all("flows", nodes=denials)).items():
            seen += (flow(node, each) for each in answer["flows"])  # denials' too: they know the Service
            if wanted.allowed:
                self._note(node, "flows", answer)
        if self.silent and not denials:
            raise Unreachable("; ".join(self.silent.values()))
        names = Names(World(asked.snapshot()))
        events = map(names.event, join(seen, time.time()))
        self.events = in_order(each for each in events if wanted.takes(each))

    def _asked(self, answers: Mapping[str, Any | Silent]) -> dict[str, Any]:
        self.silent |= {node: each.why for node, each in answers.items() if isinstance(each, Silent)}
        return {node: each for node, each in answers.items() if not isinstance(each, Silent)}

    def _note(self, node: str, what: str, answer: Mapping[str, Any]) -> None:
        untold = answer["total"] - len(answer[what])
        lost = {"untold": untold, "unread": answer.get("lost", 0), "not_logged": answer.get("not_logged", 0)}
        counts = {f"{what}_{why}": count for why, count in lost.items() if count}
        self.lost.setdefault(node, {}).update(counts)
        if untold:
            self.notes.append(f"{node}: {untold} more {what} had no room in its answer")
        if lost["unread"]:
            self.notes.append(
                f"{node}: {lost['unread']} logged packets came too fast to be read since its agent started"
            )
        if lost["not_logged"]:
            self.notes.append(
                f"{node}: at least {lost['not_logged']} denied packets were counted but not logged since its "
                "agent started: the rules log 10 a second of each set of policies"
            )


def in_order(events: Iterable[Event]) -> list[Event]:
    """By their times; what is there now comes last."""
    return sorted(events, key=lambda each: (each.time is None, each.time or 0.0, _who(each)))


def _who(event: Event) -> tuple[str, ...]:
    return event.source.name, event.destination.name, str(event.destination), str(event.source)


def _say_all(listing: _Listing, output: str, last: int | None) -> None:
    events = listing.events[-last:] if last else listing.events
    content = {
        "events": [each.to_json() for each in events],
        "lost": {node: lost for node, lost in listing.lost.items() if lost},
        "silent": listing.silent,
    }
    show(output, content, lambda: _lines(events, wide=output == "wide"))
    silent = (f"{node}: {why}" for node, why in listing.silent.items())
    for note in (*silent, *listing.notes):
        click.echo(printable(note), err=True)


def _lines(events: Sequence[Event], *, wide: bool) -> Iterator[str]:
    if events:
        yield from table(events, COLUMNS, wide=wide)
    else:
        yield "nothing of that kind is known now; --follow waits for it"


def _at(event: Event) -> str:
    if event.time is None:
        return "now"
    when = datetime.fromtimestamp(event.time).astimezone()
    today = when.date() == datetime.now(when.tzinfo).date()
    return when.strftime("%H:%M:%S.%f" if today else "%m-%d %H:%M:%S.%f")[:-3]


def _service(event: Event) -> str:
    if event.met:
        kind = "" if event.met.type == "ClusterIP" else f" ({event.met.type})"
        return f"{event.met.service}:{event.met.port}{kind}"
    if event.asked:
        return str(event.asked)
    return f"(endpoint of {', '.join(event.endpoint_of)})" if event.denied and event.endpoint_of else ""


def _remark(event: Event) -> str:
    """What is to be said about it: the reason of a denial, or that nobody answers."""
    repeats = f"{event.count} packets: " if event.count > 1 else ""
    if event.event == "audit":
        return f"{repeats}passed, in audit mode: {event.reason}"
    if event.denied:
        return f"{repeats}{event.reason}"
    if event.event == "begun":
        return ""
    if event.answered:
        return "answered"
    if event.event == "ended":
        return "ended without an answer"
    return "no answer yet"


COLUMNS: tuple[Column[Event], ...] = (
    Column("TIME", _at),
    Column("EVENT", lambda event: event.event),
    Column("PROTOCOL", lambda event: event.protocol),
    Column("SOURCE", lambda event: event.source if event.source.port == 0 else event.source.name),
    Column("SERVICE", _service),
    Column("DESTINATION", lambda event: event.destination),
    Column("NODE", lambda event: event.node, wide=True),
    Column("SOURCE ADDRESS", lambda event: f"{event.source.address} {event.source.port}", wide=True),
    Column("DESTINATION ADDRESS", lambda event: event.destination.address, wide=True),
    Column("REMARK", _remark),
)


# What happens


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
            raise Unreachable("; ".join(self._silent.values()) or "there is no agent to be asked")

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


LOST = {
    "denials": "logged packets or denials came too fast to be taken",
    "not_logged": "denied packets were counted but not logged: the rules log 10 a second of each policy set",
    "flows": "flows came too fast to be taken",
    "flow_overruns": "times the kernel dropped flow events, nobody knows how many",
}


class _Stream:
    """Says events as they come: rows under one head, or an object a line."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._headed = False

    def events(self, events: Iterable[Event]) -> None:
        """Say these."""
        for event in events:
            if self._output in ("json", "yaml"):
                self._object(event.to_json())
            else:
                self._row(event)

    def notices(self, notices: Iterable[Mapping[str, Any]]) -> None:
        """Say what was lost."""
        for notice in notices:
            if self._output in ("json", "yaml"):
                self._object(notice)
            else:
                count = "" if notice["count"] is None else f"{notice['count']} "
                click.echo(printable(f"{notice['node']}: {count}{notice['why']}"), err=True)

    def _object(self, content: Mapping[str, Any]) -> None:
        if self._output == "json":
            click.echo(json.dumps(content))
            return
        import yaml  # noqa: PLC0415 - only this form needs it

        click.echo("---\n" + str(yaml.safe_dump(dict(content), sort_keys=False)).rstrip())

    def _row(self, event: Event) -> None:
        shown = [column for column in COLUMNS if self._output == "wide" or not column.wide]
        if not self._headed:
            self._headed = True
            say(GAP.join(each.title.ljust(WIDTHS.get(each.title, 0)) for each in shown).rstrip())
        cells = (str(each.value(event) or "-").ljust(WIDTHS.get(each.title, 0)) for each in shown)
        say(GAP.join(map(printable, cells)).rstrip())


def _follow(follower: Follower, stream: _Stream) -> None:
    """Until interrupted, or until nobody reads any more."""
    reader = select.poll()
    with suppress(OSError, ValueError):
        reader.register(sys.stdout.fileno(), 0)  # tells the end of a pipe's reader, and nothing else
    while True:
        events, notices = follower.poll()
        stream.events(events)
        stream.notices(notices)
        sys.stdout.flush()
        if any(what & select.POLLERR for _, what in reader.poll(POLL_S * 1000)):
            raise BrokenPipeError


def _forget_output() -> None:
    """Nobody reads: what is still buffered must not fail at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
