"""`podwall matrix`: who reaches whom on which port, as the policies say it and as it really is."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, cluster_options
from agent.cli.connection import PROTOCOL_NAMES, WORDS
from agent.cli.expectations import Verdict, read
from agent.cli.names import WORKLOAD, Takes, completes
from agent.cli.output import FORMATS, GAP, NEGATIVE, Coloured, Line, show
from agent.cli.probes import tried
from agent.cluster.model import Pod
from agent.explain.ends import WORKLOADS, columns_named, distinct, pods_named, port_of, takes_part
from agent.explain.expect import written
from agent.explain.groups import NO, OTHERWISE, Grouped, grouped
from agent.explain.imagined import with_addresses
from agent.explain.labels import SelectorError, selector
from agent.explain.matrix import Column, Matrix, Way, columns_of, matrix, sentence
from agent.explain.seen import Observed, arrived, attempt, differs
from agent.explain.world import UnknownNameError, World, title
from agent.log import printable

MOST_TOLD = 20  # differences, and Pods that are left out; -o json has all
COLOURS = {"yes": "green", NO: "red"}
DIFFERENT = "yellow"
EXPECT = "expect"
ROWS = ("Pod", WORKLOAD)
POD_WORDS = {word: kind for word, kind in WORDS.items() if kind == "Pod"}
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("matrix")
@click.option("-A", "--all-namespaces", is_flag=True, help="The Pods of all namespaces.")
@click.option("-l", "--selector", default="", help="Only Pods with these labels: app=web, tier in (a,b), !x.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="NAME",
    help="Only these rows; may be given several times.",
    shell_complete=completes(Takes(ROWS, {**POD_WORDS, **WORKLOADS})),
)
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="NAME[:PORT]",
    help="Only these columns; may be given several times.",
    shell_complete=completes(Takes(ROWS, WORDS, ports="all")),
)
@click.option("--port", metavar="PORT", help="This port of every target, instead of those they declare.")
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOL_NAMES), case_sensitive=False),
    help="Only its ports; of --port NUMBER it is tcp unless said.",
)
@click.option("--probe", is_flag=True, help="Also connect, from inside of the Pods, and compare.")
@click.option("--expect", type=FILE, metavar="FILE", help="Hold what this file expects against it.")
@click.option("--picture", type=FILE, metavar="FILE", help="Also draw it, as SVG.")
@click.option(
    "-o",
    "--output",
    type=click.Choice([*FORMATS, EXPECT]),
    default="table",
    show_default=True,
    help="How to say it; expect: as a file for --expect.",
)
@cluster_options
def matrix_command(
    asked: Asked, output: str, probe: bool, expect: Path | None, picture: Path | None, **options: Any
) -> None:
    """Say who reaches whom on which port.

    A row is a source Pod, a column a port of a target; Pods of one workload that may do the same share one
    (-o wide shows each). Rows and columns are the Pods of the namespace (-n, or -A for all), or those that
    --from and --to name: shop/web is a Pod, or all Pods of a Deployment, StatefulSet, ...; shop/* all of a
    namespace; svc/shop/web a Service, node/worker:22 a node, 203.0.113.10:443 an address.

    \b
    podwall matrix -n shop
    podwall matrix -A --to svc/shop/api --port 80
    podwall matrix -n shop --from web --to 203.0.113.10:443
    podwall matrix -A --probe
    podwall matrix -n shop -o expect >shop.yaml
    podwall matrix --expect shop.yaml --probe

    It is computed from the cluster's objects. With --probe the agents of the source Pods' nodes connect as
    well, from inside of the Pods; a refusal counts as reached. Ends with 1 when something was seen to be
    otherwise than computed or an expectation does not hold, and with 3 when an agent could not be asked.
    """
    if probe and not asked.live:
        raise click.UsageError("--probe needs a cluster: manifests (-f) have no agents to ask")
    if expect is not None:
        _refuse_with_expect(output, picture, options)
    world, given = _world(asked)
    shown: Report | Verdict
    if expect is not None:
        checks = read(world, expect, asked.namespace)
        seen = tried(asked, (each.pairs for each in checks)) if probe else {}
        shown = Verdict(world, expect, checks, seen, given)
    else:
        picked = _picked(world, asked.namespace, options)
        decided = matrix(world, picked.sources, picked.columns)
        seen = tried(asked, (decided,)) if probe else {}
        shown = Report(world, decided, seen, (*given, *picked.notes))
        if picture is not None:
            _draw(picture, decided, seen)
        if output == EXPECT:
            click.echo(written(world, decided, grouped(decided, ports_apart=True)), nl=False)
            return
    show(output, shown.content() if output in ("json", "yaml") else None, lambda: shown.lines(output))
    shown.end()


def _refuse_with_expect(output: str, picture: Path | None, options: dict[str, Any]) -> None:
    """A file says itself what it is about. Raises UsageError."""
    if picture is not None or output == EXPECT or any(options.values()):
        raise click.UsageError("--expect goes with -n, --probe and -o table, wide, json or yaml alone")


def _draw(path: Path, decided: Matrix, seen: Observed) -> None:
    """Raises UsageError."""
    from agent.explain.picture import picture  # noqa: PLC0415 - only this needs it

    try:
        path.write_text(picture(grouped(decided, seen), tried=bool(seen)), encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{path} cannot be written: {error.strerror}") from error


def _world(asked: Asked) -> tuple[World, tuple[str, ...]]:
    """The cluster, and what is said of it; what manifests leave open is imagined."""
    snapshot, made = asked.with_templates()
    if asked.live:
        return World(snapshot), ()
    notes = []
    if made:
        notes.append(f"Pods as their workloads' templates describe them: {_few(sorted(map(_name, made)))}")
    snapshot, given = with_addresses(snapshot)
    if given:
        notes.append(f"addresses made up: {len(given)}, so that an ipBlock may be misjudged")
    return World(snapshot), tuple(notes)


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows and columns, and what is said of Pods that are neither."""

    sources: tuple[Pod, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]


def _picked(world: World, namespace: str, options: dict[str, Any]) -> Picked:
    """The rows and columns that are asked for. Raises UsageError."""
    try:
        return _named(world, namespace, options)
    except (UnknownNameError, SelectorError) as error:
        raise click.UsageError(printable(str(error))) from error


def _named(world: World, namespace: str, options: dict[str, Any]) -> Picked:
    protocol = PROTOCOL_NAMES.get(options["protocol"] or "")
    port = port_of(options["port"]) if options["port"] else None
    there = world.snapshot.pods if options["all_namespaces"] else world.snapshot.pods_in(namespace)
    wanted = selector(options["selector"])
    scope = [pod for _, pod in sorted(there.items()) if wanted.matches(pod.labels)]
    alive = [pod for pod in scope if takes_part(pod)]
    notes = _left_out(scope)
    if not alive and not (options["sources"] and options["targets"]):
        where = "any namespace" if options["all_namespaces"] else f"namespace {namespace}"
        raise UnknownNameError(f"no such Pod has an address in {where}: -n NAMESPACE, or -A for all")
    sources = _unique(pod for text in options["sources"] for pod in pods_named(world, text, namespace))
    columns = distinct(
        column
        for text in options["targets"]
        for column in columns_named(world, text, namespace, port=port, protocol=protocol)
    )
    if not columns:
        columns = columns_of(alive, port=port, protocol=protocol)
        notes += _without_column(alive, columns)
    if not columns:
        raise UnknownNameError("none of these Pods has such a port: --port PORT asks for one of all")
    return Picked(sources or tuple(alive), columns, tuple(notes))


def _unique(pods: Iterable[Pod]) -> tuple[Pod, ...]:
    return tuple({pod.key: pod for pod in pods}.values())


def _left_out(pods: Iterable[Pod]) -> list[str]:
    waiting = [_name(pod) for pod in pods if not pod.finished and not pod.ips]
    return [f"without an address yet, so left out: {_few(waiting)}"] if waiting else []


def _without_column(pods: Sequence[Pod], columns: Sequence[Column]) -> list[str]:
    shown = {title(column.target) for column in columns}
    bare = [_name(pod) for pod in pods if title(pod) not in shown]
    return [f"without such a port, so no column (--port PORT asks for one): {_few(bare)}"] if bare else []


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
    return ", ".join(names[:MOST_TOLD]) + more


def _name(pod: Pod) -> str:
    return f"{pod.namespace}/{pod.name}"


@dataclass(frozen=True, slots=True)
class Report:
    """What is said of a matrix, and how the command ends."""

    world: World
    decided: Matrix
    observed: Observed
    notes: tuple[str, ...]

    def end(self) -> None:
        """Exit when the answer is negative, or an agent could not be asked."""
        if self._different():
            raise SystemExit(NEGATIVE)
        if self._not_tried():
            raise SystemExit(Unreachable.exit_code)

    def content(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "connections": [
                self._connection(source, column, way)
                for source, column, cell in self.decided.cells()
                for way in cell
            ],
            "differences": [self._sentence(*of) for of in self._different()],
            "notes": [*self.notes, *self._not_tried()],
        }

    def _connection(self, source: Pod, column: Column, way: Way) -> dict[str, Any]:
        seen = self.observed.get(attempt(source, column, way))
        return {
            "source": _name(source),
            "target": title(column.target),
            "source_address": str(way.source),
            "address": str(way.destination),
            "protocol": column.protocol,
            "port": column.port,
            "allowed": way.allowed,
            "cause": way.cause,
            "seen": seen.verdict if seen else None,
            "words": seen.words if seen else "",
            "differs": differs(column, way, seen),
        }

    def lines(self, output: str) -> Iterator[Line]:
        """The table, what is told of Pods that are not in it, and what was seen to be otherwise."""
        yield from table(grouped(self.decided, self.observed, every=output == "wide"), _width(output))
        yield from ("", *self.notes) if self.notes else ()
        if self.observed:
            yield ""
            yield from self._compared()

    def _compared(self) -> Iterator[Line]:
        different, failed = self._different(), self._not_tried()
        count = len(self.observed)
        if not different and not failed:
            yield Coloured(f"{count} connections tried, all as computed", "green")
        if unknown := self._unknown():
            yield f"of {unknown} it cannot be known (UDP without an answer, or refused by a Service)"
        yield from (Coloured(f"not tried: {each}", DIFFERENT) for each in failed)
        if different:
            yield Coloured(f"{len(different)} of {count} connections are not as computed:", DIFFERENT)
            yield from (f"  {self._sentence(*of)}" for of in different[:MOST_TOLD])
        if len(different) > MOST_TOLD:
            yield f"  and {len(different) - MOST_TOLD} more (-o json has all)"

    def _sentence(self, source: Pod, column: Column, way: Way) -> str:
        seen = self.observed[attempt(source, column, way)]
        words = f" ({seen.words})" if seen.words else ""
        said = sentence(self.world, source, column, way)
        return (
            f"{_name(source)} to {title(column.target)} {way.destination} {column.protocol} {column.port}: "
            f"seen {seen.verdict}{words}, but computed {said}"
        )

    def _different(self) -> list[tuple[Pod, Column, Way]]:
        return [
            (source, column, way)
            for source, column, cell in (self.decided.cells() if self.observed else ())
            for way in cell
            if differs(column, way, self.observed.get(attempt(source, column, way)))
        ]

    def _unknown(self) -> int:
        """How many that shall arrive were tried, and nothing tells whether they did."""
        return sum(
            way.allowed and seen.verdict != "failed" and arrived(column, seen) is None
            for source, column, cell in self.decided.cells()
            for way in cell
            if (seen := self.observed.get(attempt(source, column, way))) is not None
        )

    def _not_tried(self) -> list[str]:
        """Why connections were not tried, and how many for each reason."""
        reasons = Counter(seen.words for seen in self.observed.values() if seen.verdict == "failed")
        return [f"{words} ({count} connections)" for words, count in reasons.items()]


# The table


def _width(output: str) -> int | None:
    """How wide columns' names may make the table; wide: as wide as they are."""
    return None if output == "wide" else max(shutil.get_terminal_size((110, 24)).columns, 60)


def table(shown: Grouped, width: int | None) -> Iterator[Line]:
    """Rows, and columns under their names, or under numbers that a list below explains."""
    names = [printable(column.label) for column in shown.columns]
    labels = [printable(row.label) for row in shown.rows]
    left = max(map(len, ("FROM", *labels)))
    room = [max(len(name), len(port), 4) for name, port in zip(names, shown.ports, strict=True)]
    if width is None or left + sum(each + len(GAP) for each in room) <= width:
        heads = [["FROM", *names], ["", *shown.ports]]
        yield from (_joined(head, [left, *room]) for head in heads)
        yield from (_row(label, row, [left, *room]) for label, row in zip(labels, shown.cells, strict=True))
        return
    numbers = [str(each) for each in range(1, len(names) + 1)]
    room = [max(len(each), 4) for each in numbers]
    yield _joined(["FROM", *numbers], [left, *room])
    yield from (_row(label, row, [left, *room]) for label, row in zip(labels, shown.cells, strict=True))
    yield ""
    for number, name, port in zip(numbers, names, shown.ports, strict=True):
        yield f"{number:>4}{GAP}{name} {port}"


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return GAP.join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _row(label: str, words: Sequence[str], widths: Sequence[int]) -> Line:
    parts: list[str | Coloured] = [f"{label:<{widths[0]}}"]
    for word, width in zip(words, widths[1:], strict=True):
        colour = DIFFERENT if word.endswith(OTHERWISE) else COLOURS.get(word)
        parts += [GAP, Coloured(word, colour) if colour else word, " " * (width - len(word))]
    return parts[:-1]
