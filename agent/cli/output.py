"""What every command says, and in which form: table, wide, json or yaml; for a terminal or for a program.

    rows --columns--> table (wide: all columns)      json, yaml: the plain data itself, whole

Names of Pods, policies and labels are chosen by whoever may make them: nothing of them reaches a terminal
unescaped. Exit statuses: 0 as asked, 1 a negative answer, 2 wrong usage, 3 the cluster cannot be reached.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import click

from agent.log import printable

T = TypeVar("T")

NEGATIVE = 1
FORMATS = ("table", "wide", "json", "yaml")
GAP = "   "
NOTHING = "<none>"
MARKS = {True: "ok", False: "no", None: "  "}
"""Whether a packet comes past a step of its way; None where nothing is decided."""

output_option = click.option(
    "-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True, help="How to say it."
)


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """One column of a table: its title and what it says of a row; `wide`: only in the wide table."""

    title: str
    value: Callable[[T], object]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Coloured:
    """Text in one of click's colours where a person reads it; elsewhere, and with NO_COLOR, plain."""

    text: str
    colour: str


Line: TypeAlias = str | Coloured | Sequence[str | Coloured]
"""One line; of several colours where it is a sequence of parts."""


def show(output: str, content: Any, text: Callable[[], Iterable[Line]]) -> None:
    """Print content as json or yaml, or else the lines made of it; `content` is plain data."""
    if output == "json":
        click.echo(json.dumps(content, indent=2))
    elif output == "yaml":
        import yaml  # noqa: PLC0415 - only this form needs it

        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where libyaml is there
        click.echo(str(yaml.dump(content, Dumper=dumper, sort_keys=False)).rstrip())
    else:
        for line in text():
            say(line)


def say(line: Line) -> None:
    """Print one line, escaped."""
    parts = (line,) if isinstance(line, (str, Coloured)) else line
    click.echo("".join(map(_part, parts)))


def _part(of: str | Coloured) -> str:
    if isinstance(of, str):
        return printable(of)
    plain = bool(os.environ.get("NO_COLOR"))
    return printable(of.text) if plain else click.style(printable(of.text), fg=of.colour)


def table(rows: Sequence[T], columns: Sequence[Column[T]], *, wide: bool = False) -> list[str]:
    """The lines of a table, as kubectl prints one; what has no value is <none>."""
    shown = [column for column in columns if wide or not column.wide]
    cells = [[column.title for column in shown]]
    cells += [[printable(_cell(column.value(row))) for column in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _cell(value: object) -> str:
    if value is None or value in ("", [], ()):
        return NOTHING
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


def age(when: float | None) -> str:
    """How long ago a time in seconds since the epoch was, as kubectl says it: 5s, 3m, 2h, 4d."""
    if when is None:
        return "never"
    seconds = max(0, int(time.time() - when))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
