"""`podwall matrix --expect FILE`: which expectations hold, and for those that do not, the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from agent.cli.ask import Unreachable
from agent.cli.output import NEGATIVE, Coloured, Line
from agent.cluster.model import Pod
from agent.explain.expect import Checked, ExpectationError, checked, expectations
from agent.explain.matrix import Column, Way, sentence
from agent.explain.seen import Observed, attempt
from agent.explain.world import World, title
from agent.log import printable

MOST_REASONS = 3  # of one expectation; -o json has all


def read(world: World, path: Path, namespace: str) -> tuple[Checked, ...]:
    """What a file expects, held against the policies. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
        return tuple(checked(world, each, namespace) for each in expectations(text))
    except (ExpectationError, OSError, UnicodeDecodeError) as error:
        raise click.UsageError(printable(f"{path}: {error}")) from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of a file's expectations, and how the command ends."""

    world: World
    path: Path
    checks: Sequence[Checked]
    observed: Observed
    notes: tuple[str, ...] = ()

    def end(self) -> None:
        """Exit when one does not hold, or an agent could not be asked."""
        if any(self._reasons(each) for each in self.checks):
            raise SystemExit(NEGATIVE)
        if any(seen.verdict == "failed" for seen in self.observed.values()):
            raise SystemExit(Unreachable.exit_code)

    def content(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "file": str(self.path),
            "expectations": [
                {
                    "line": each.expectation.line,
                    "from": str(each.expectation.source),
                    "to": str(each.expectation.target),
                    "protocol": each.expectation.protocol,
                    "allowed": each.expectation.allowed,
                    "holds": not (reasons := self._reasons(each)),
                    "connections": sum(len(cell) for _, _, cell in each.pairs.cells()),
                    "reasons": reasons,
                }
                for each in self.checks
            ],
            "not_tried": self._not_tried(),
            "notes": list(self.notes),
        }

    def lines(self, output: str) -> Iterator[Line]:
        """Those that do not hold (wide: all), with the reasons, and how many do."""
        good = 0
        for each in self.checks:
            reasons = self._reasons(each)
            good += not reasons
            if reasons or output == "wide":
                yield from self._told(each, reasons)
        yield from (Coloured(f"not tried: {each}", "yellow") for each in self._not_tried())
        yield from self.notes
        colour = "green" if good == len(self.checks) else "red"
        yield Coloured(f"{good} of {len(self.checks)} expectations hold", colour)

    def _told(self, of: Checked, reasons: Sequence[str]) -> Iterator[Line]:
        said = of.expectation
        wanted = "allowed" if said.allowed else "denied"
        mark = Coloured("no", "red") if reasons else Coloured("ok", "green")
        yield (mark, f"  {self.path}:{said.line}: {said} shall be {wanted}")
        yield from (f"      {reason}" for reason in reasons[:MOST_REASONS])
        if len(reasons) > MOST_REASONS:
            yield f"      and {len(reasons) - MOST_REASONS} more connections"

    def _reasons(self, of: Checked) -> list[str]:
        """Why it does not hold; nothing when it does."""
        if of.problem:
            return [of.problem]
        return [self._reason(of, *each) for each in of.broken(self.observed)]

    def _reason(self, of: Checked, source: Pod, column: Column, way: Way) -> str:
        said = sentence(self.world, source, column, way)
        seen = self.observed.get(attempt(source, column, way))
        if seen is None or way.allowed != of.expectation.allowed:
            return said
        ends = f"{source.namespace}/{source.name} to {title(column.target)} {way.destination}"
        return f"{ends} was seen {seen.verdict}, but computed {said}"

    def _not_tried(self) -> list[str]:
        return sorted({seen.words for seen in self.observed.values() if seen.verdict == "failed"})
