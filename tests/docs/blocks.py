"""The commands in README and docs as blocks to run, and what they are said to print.

A block is fenced, and its first line says where it runs:

    ```sh lab          in a lab of this machine, all such blocks of a page one after the other
    ```sh cluster      with kubectl and podwall at a real cluster
    ```sh checkout     in a checkout of the project: make's targets
    ```sh elsewhere    where a tool is needed that the tests have not; only read, never run

`console` instead of `sh`: lines that begin with "$ " are typed, the others are what is printed; "..." in them
stands for anything. A line that ends with a backslash goes on in the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORLDS = ("lab", "cluster", "checkout", "elsewhere")
_FENCE = re.compile(r"^```(\S*)\s*(.*)$")
_COMMANDS = frozenset({"sh", "bash", "shell", "console"})
_PROMPT = "$ "


@dataclass(slots=True)
class Command:
    """What is typed, and the lines that it prints; none: nothing is said about them."""

    text: str
    printed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Block:
    """Commands that stand together: the page, the line where they begin, and the world they run in."""

    page: Path
    line: int
    world: str
    commands: tuple[Command, ...]

    @property
    def place(self) -> str:
        """Where it stands, as an editor opens it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Everything that a user reads."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of commands of a page, in order. ValueError: one does not say where it runs."""
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        if not (fence := _FENCE.match(line)):
            continue
        content = []
        for _, inside in lines:
            if inside.startswith("```"):
                break
            content.append(inside)
        kind, world = fence[1], fence[2].strip()
        if kind in _COMMANDS:
            if world not in WORLDS:
                raise ValueError(f"{page.name}:{number}: {world!r} is none of {', '.join(WORLDS)}")
            yield Block(page, number, world, tuple(_commands(content, prompted=kind == "console")))


def _commands(lines: list[str], *, prompted: bool) -> Iterator[Command]:
    command: Command | None = None
    unfinished = False
    for line in lines:
        if command is not None and unfinished:
            command.text += "\n" + line
        elif line.startswith(_PROMPT) if prompted else line.strip():
            if command is not None:
                yield command
            command = Command(line.removeprefix(_PROMPT) if prompted else line)
        elif prompted and command is not None:
            command.printed.append(line)
            continue
        else:
            continue
        unfinished = line.endswith("\\")
    if command is not None:
        yield command


def as_said(printed: str, said: list[str]) -> bool:
    """Whether what was printed is what the page says; "..." stands for anything, also for several lines."""
    pattern = re.escape("\n".join(said).strip()).replace(re.escape("..."), ".*")
    spaced = re.sub(r"(\\ )+", r"\\s+", pattern)
    return re.fullmatch(spaced, printed.strip(), re.DOTALL) is not None
