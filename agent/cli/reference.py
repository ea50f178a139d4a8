"""The reference of all commands, as docs/commands.md, made from the commands themselves: `make reference`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import cleandoc

import click

from agent.cli.main import main

HEAD = """# All commands

Made from the code by `make reference`. Every command answers `--help`. Exit statuses: 0 as asked,
1 a negative answer, 2 wrong usage, 3 the cluster or its agents cannot be reached.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_command(main, "podwall", None)]) + "\n"


def _command(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=path.rsplit(" ", 1)[-1], parent=parent)
    if parent is not None:
        yield f"## {path}\n"
        yield from _about(command, context, path)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            if not found.hidden:
                yield from _command(found, f"{path} {name}", context)


def _about(command: click.Command, context: click.Context, path: str) -> Iterator[str]:
    pieces = " ".join(command.collect_usage_pieces(context))
    yield _shown([f"{path} {pieces}"])
    yield from _prose(cleandoc(command.help or "").split("\f", maxsplit=1)[0])
    options = [each.get_help_record(context) for each in command.params if isinstance(each, click.Option)]
    shown = [each for each in options if each]
    if shown:
        yield "| option | |\n|---|---|"
        yield from (f"| `{_cell(names)}` | {_cell(about)} |" for names, about in shown)
        yield ""


def _prose(text: str) -> Iterator[str]:
    """Paragraphs; those that click is told not to wrap are shown as they are."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("\b"):
            lines = paragraph.splitlines()[1:]
            yield _shown(lines)
        elif paragraph.strip():
            yield paragraph.strip() + "\n"


def _shown(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```", ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
