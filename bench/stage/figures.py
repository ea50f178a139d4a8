"""What benchmarks print: the machine, percentiles, tables, and whether targets were met."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and what it must not exceed (or, `at_least`, must reach)."""

    what: str
    figure: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def __str__(self) -> str:
        relation = "at least" if self.at_least else "at most"
        verdict = "met   " if self.met else "MISSED"
        return f"{verdict} {self.what}: {self.figure:.3g} {self.unit} ({relation} {self.limit:g})"


def percentile(taken: Sequence[float], of: int) -> float:
    """The value that `of` percent of these do not exceed."""
    return sorted(taken)[min(len(taken) - 1, len(taken) * of // 100)]


def machine() -> list[str]:
    """The machine, its load and how the benchmark was called."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return [
        " ".join(["$ .venv/bin/python", *sys.argv]),
        f"machine: {os.cpu_count()} cores, {model or platform.machine()}, Linux {platform.release()}",
        f"load average before the run: {os.getloadavg()[0]:.2f}",
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A Markdown table; numbers stand right."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts, strict=True)]
    yield _line(head, widths)
    yield _line(
        ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)], widths
    )
    yield from (_line(row, widths) for row in texts)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(padded)} |"


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def say(text: str) -> None:
    """Tell who waits at a terminal what is under way."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def report(targets: Iterable[Target]) -> None:
    """Print what was met and what was not."""
    print(*targets, sep="\n", flush=True)
