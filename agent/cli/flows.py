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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import click

from agent.cli.agents import NOBODY, Agents, Silent
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, live_cluster_options
from agent.cli.follower import Follower, Wanted, in_order
from agent.cli.names import NODE, Takes, completes
from agent.cli.output import GAP, Column, output_option, say, show, table
from agent.explain.observed import Event, Names, Seen, denial, flow, join
from agent.explain.world import World
from agent.log import printable

POLL_S = 0.5
WIDTHS = {"TIME": 12, "EVENT": 6, "PROTOCOL": 8, "SOURCE": 24, "SERVICE": 24, "DESTINATION": 24}
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


@click.command("flows")
@click.option("--follow", is_flag=True, help="Go on telling what happens, until interrupted.")
@click.option("--denied", is_flag=True, help="Denied packets alone.")
@click.option("--allowed", is_flag=True, help="Connections alone.")
@click.option(
    "--pod",
    metavar="[NS/]NAME",
    default="",
    help="Those that this Pod is an end of.",
    shell_complete=completes(Takes(("Pod",))),
)
@click.option(
    "--service",
    metavar="[NS/]NAME",
    default="",
    help="Those to this Service or its endpoints.",
    shell_complete=completes(Takes(("Service",))),
)
@click.option(
    "--node",
    multiple=True,
    metavar="NAME",
    help="What this node saw; may be given several times.",
    shell_complete=completes(NODE),
)
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="The last N alone.")
@click.option("--since", metavar="AGE|TIME", default="", help="Such as 30s, 5m, 2h, or an RFC 3339 time.")
@output_option
@live_cluster_options
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
    both = denied == allowed
    wanted = Wanted(
        denied or both,
        allowed or both,
        _full_name(options["pod"], asked.namespace),
        _full_name(options["service"], asked.namespace),
        since(options["since"], time.time()),
    )
    with asked.agents() as agents:
        nodes = agents.named(options["node"])
        if not nodes:
            raise Unreachable(NOBODY)
        if not follow:
            _say_all(_Listing(asked, agents, nodes, wanted), output, options["last"])
            return
        follower = Follower(agents, nodes, asked, wanted)
        click.echo(f"following {', '.join(nodes)}; Ctrl-C ends it", err=True)

        def old() -> list[Event]:
            if not (options["last"] or options["since"]):
                return []
            return _Listing(asked, agents, nodes, wanted).events[-(options["last"] or 0) :]

        _say_on(follower, _Stream(output), old)


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


def _say_on(follower: Follower, stream: _Stream, old: Callable[[], Iterable[Event]]) -> None:
    """What there was, then what comes, until interrupted."""
    try:
        stream.events(each for each in old() if each.time)
        _follow(follower, stream)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        _forget_output()
    finally:
        with suppress(KeyboardInterrupt):
            follower.close()


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
