"""`podwall bench`: how fast the network between Pods is, beside a veth pair without any rules.

    rounds, in each of them every way in turn:
      raw      client ---- a veth pair, nothing between ---- server          of the node --from
      pod      client -- link, rules, routes, rules, link -- server          of the node --from
      service  client -- link, Service, ... -- whoever serves it             with --service
      node     client -- link, rules --> other node -- rules, link -- server of the node --to

The agents make client and server and take them away again (`agent.bench`), also when nobody tells them to.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from agent.cli.agents import NOBODY, Agents, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, live_cluster_options
from agent.cli.names import NODE, Takes, completes
from agent.cli.output import Column, output_option, show, table
from agent.cluster.model import Service
from agent.log import printable

LEAST_ROUNDS = 5
WHATS = ("connections", "requests", "throughput")
LEAST_S, MOST_S = 0.05, 1.0
RAW = "raw"

Figures = dict[str, float]


@dataclass
class Way:
    """One way to a server, and what each round measured on it."""

    name: str
    text: str
    address: str
    port: int = 0
    whats: Sequence[str] = WHATS
    rounds: list[dict[str, Figures]] = field(default_factory=list)
    error: str = ""

    def median(self, what: str, figure: str) -> float | None:
        """Of all rounds; None where it was not measured."""
        taken = [each[what][figure] for each in self.rounds if what in each]
        return statistics.median(taken) if taken else None

    def of(self, base: Way, what: str, figure: str) -> float | None:
        """Its share of the base's figure, in percent: the median of the rounds' shares."""
        shares = [
            mine[what][figure] / theirs[what][figure] * 100
            for mine, theirs in zip(self.rounds, base.rounds, strict=False)
            if what in mine and what in theirs
        ]
        return statistics.median(shares) if shares else None


@click.command("bench")
@click.option(
    "--from",
    "from_",
    metavar="NODE",
    default="",
    help="Where the client is; else the first node.",
    shell_complete=completes(NODE),
)
@click.option(
    "--to",
    metavar="NODE",
    default="",
    help="Where the server behind the nodes' network is.",
    shell_complete=completes(NODE),
)
@click.option(
    "--service",
    metavar="NAME:PORT",
    default="",
    help="Connect to this Service as well.",
    shell_complete=completes(Takes(("Service",), ports="numbers")),
)
@click.option(
    "--duration",
    type=click.FloatRange(1, 120),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Of all measurements together.",
)
@output_option
@live_cluster_options
def bench(asked: Asked, output: str, duration: float, **named: str) -> None:
    """Measure how fast the network between Pods is, beside a veth pair without any rules.

    The agent of the node --from attaches two Pods of nobody's, wired as all Pods are, with addresses of the
    node's range; the agent of --to (else of any other node) two more. Processes of the agents' own connect
    from one to the other. All of it is gone afterwards, also when this is interrupted: after ten seconds
    without a question the agents take it away. No image and no tool is needed, and no Service is made: name
    one with --service to measure it. It is only connected to: its endpoints see connections that are reset.

    \b
    connections  new TCP connections a second, one after the other, at most 2,000 in a turn
    requests     a byte there and back on one connection: how long it takes
    throughput   one connection, as much as goes through

    The ways take turns in each of at least five rounds, and a share is their median: what else the
    machine does falls on all alike. The programs are in Python, which takes a part of each figure: what
    counts is one way beside another, on one node and at one time.

    \b
    podwall bench
    podwall bench --from node1 --to node2 --duration 30
    podwall bench -n shop --service web:80
    """
    target = service_of(asked, named["service"]) if named["service"] else None
    with asked.agents() as agents:
        try:
            client, server = nodes_of(agents, named["from_"], named["to"])
            ways = measured(agents, client, server, target, duration)
        except SilentError as error:
            raise Unreachable(printable(str(error))) from error
    show(output, content(client, server, duration, ways), lambda: lines(ways, wide=output == "wide"))


def nodes_of(agents: Agents, client: str, server: str) -> tuple[str, str]:
    """Where the client is, and another node's server; "" without one. Raises UsageError, Unreachable."""
    nodes = agents.nodes
    if not nodes:
        raise Unreachable(NOBODY)
    agents.named([each for each in (client, server) if each])
    client = client or next(node for node in nodes if node != server or len(nodes) == 1)
    if client == server:
        raise click.UsageError("--from and --to are the same node: Pods of one node are measured anyway")
    return client, server or next((node for node in nodes if node != client), "")


def service_of(asked: Asked, text: str) -> tuple[str, str, int]:
    """The Service's name, ClusterIP and port. Raises UsageError."""
    name, _, port = text.rpartition(":")
    if not name or not port.isdecimal():
        raise click.UsageError(f"--service {text!r}: a name and a port are asked for, such as web:80")
    namespace, _, name = name.rpartition("/")
    key = namespace or asked.namespace, name.removeprefix("svc/")
    found: Service | None = asked.snapshot().services.get(key)
    if found is None:
        raise click.UsageError(printable(f"there is no Service {'/'.join(key)}"))
    if not found.cluster_ips:
        raise click.UsageError(printable(f"Service {'/'.join(key)} has no ClusterIP"))
    return "/".join(key), str(found.cluster_ips[0]), int(port)


# Measuring


@contextmanager
def _session(agents: Agents, node: str) -> Iterator[Mapping[str, Any]]:
    """What a node's agent made for this, until the end, which may come while it is being made."""
    named = {"id": secrets.token_hex(8)}
    try:
        yield agents.ask(node, "bench.open", named) | named
    finally:
        with contextlib.suppress(SilentError):  # it ends by itself
            agents.ask(node, "bench.close", named)


def measured(
    agents: Agents, client: str, server: str, service: tuple[str, str, int] | None, duration: float
) -> list[Way]:
    """All ways, measured. Raises SilentError."""
    with ExitStack() as stack:
        here = stack.enter_context(_session(agents, client))
        ways = [
            Way(RAW, f"a veth pair on {client}, no rules", here["raw"]),
            Way("pod", f"Pod to Pod on {client}", here["addresses"][0]),
        ]
        if service:
            name, address, port = service
            ways.append(Way("service", f"Service {name}:{port}", address, port, WHATS[:1]))
        if server:
            there = stack.enter_context(_session(agents, server))
            ways.append(Way("node", f"Pod on {client} to Pod on {server}", there["addresses"][0]))
        turns = sum(len(way.whats) for way in ways)
        rounds = max(LEAST_ROUNDS, math.ceil(duration / turns / MOST_S))
        seconds = max(LEAST_S, duration / turns / rounds)
        for number in range(rounds):
            _round(agents, client, here["id"], _turned(ways, number), seconds)
            if server:  # its client is never asked, but its agent must know that somebody is there
                agents.ask(server, "bench.stay", {"id": there["id"]})
    return ways


def _turned(ways: Sequence[Way], number: int) -> Sequence[Way]:
    start = number % len(ways)
    return [*ways[start:], *ways[:start]]


def _round(agents: Agents, client: str, session: str, ways: Sequence[Way], seconds: float) -> None:
    for way in ways:
        found: dict[str, Figures] = {}
        for what in way.whats if not way.error else ():
            body = {"id": session, "what": what, "seconds": seconds, "address": way.address}
            answer = agents.ask(client, "bench.measure", body | ({"port": way.port} if way.port else {}))
            if "error" in answer:
                way.error = str(answer["error"])
                break
            found[what] = answer
        way.rounds.append(found)


# What is told


def content(client: str, server: str, duration: float, ways: Sequence[Way]) -> dict[str, Any]:
    return {
        "from": client,
        "to": server or None,
        "duration_s": duration,
        "rounds": len(ways[0].rounds),
        "ways": [_way(way, ways[0]) for way in ways],
    }


def _way(way: Way, base: Way) -> dict[str, Any]:
    figures = {
        "connections": ("per_second", "p50_us", "p99_us"),
        "requests": ("per_second", "p50_us", "p99_us"),
        "throughput": ("bits_per_second",),
    }
    told: dict[str, Any] = {"way": way.name, "text": way.text, "address": way.address, "error": way.error}
    for what, names in figures.items():
        measured = {name: way.median(what, name) for name in names}
        share = way.of(base, what, names[0])
        told[what] = None if share is None else {**measured, "percent_of_raw": share}
    return told


def lines(ways: Sequence[Way], *, wide: bool) -> Iterator[str]:
    base = ways[0]
    columns: list[Column[Way]] = [
        Column("WAY", lambda way: way.text),
        Column("CONNECTIONS/S", lambda way: _number(way.median("connections", "per_second"))),
        Column("OF RAW", lambda way: _share(way.of(base, "connections", "per_second"))),
        Column("P50", lambda way: _micro(way.median("connections", "p50_us"))),
        Column("P99", lambda way: _micro(way.median("connections", "p99_us"))),
        Column("REQUESTS/S", lambda way: _number(way.median("requests", "per_second")), wide=True),
        Column("REQUEST P50", lambda way: _micro(way.median("requests", "p50_us"))),
        Column("P99", lambda way: _micro(way.median("requests", "p99_us"))),
        Column("THROUGHPUT", lambda way: _bits(way.median("throughput", "bits_per_second"))),
        Column("OF RAW", lambda way: _share(way.of(base, "throughput", "bits_per_second"))),
    ]
    yield from table(ways, columns, wide=wide)
    for way in ways:
        if way.error:
            yield f"{way.text}: {way.error}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _micro(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} us"


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f} Gbit/s"
