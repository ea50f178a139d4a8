"""Every command on every page says where it runs, and is found by those who run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import Block, Command, as_said, blocks, pages

TOOLS = ("podwall ", "kubectl ", "make ", ".venv/bin/", "kind ", "docker ")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_say_where_they_run(page: Path) -> None:
    assert all(block.commands for block in blocks(page))
    indented = [
        f"{page.name}:{number}"
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if line.startswith("    ") and line.strip().startswith(TOOLS)
    ]
    assert indented == [], "a command outside a fenced block is run by nobody"


def test_a_block_that_does_not_say_where_it_runs_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\nls\n```\n")
    with pytest.raises(ValueError, match=r"page\.md:1"):
        list(blocks(page))


def test_what_is_typed_and_what_is_printed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```console lab\n$ echo a \\\n  b\na b\n\n$ true\n```\n```yaml\nkind: Pod\n```\n")
    assert list(blocks(page)) == [
        Block(page, 2, "lab", (Command("echo a \\\n  b", ["a b", ""]), Command("true")))
    ]


@pytest.mark.parametrize(
    ("printed", "said", "same"),
    [
        ("a b\n", ["a  b"], True),
        ("pod 10.0.0.7 is well\n", ["pod ... is well"], True),
        ("a\nb\nc\n", ["a", "...", "c"], True),
        ("a\nb\n", ["a"], False),
        ("a.b\n", ["axb"], False),
    ],
)
def test_three_dots_stand_for_anything(printed: str, said: list[str], same: bool) -> None:
    assert as_said(printed, said) is same
