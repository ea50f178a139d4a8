"""docs/commands.md says what the commands themselves say."""

from __future__ import annotations

from agent.cli.reference import reference
from tests.docs.blocks import ROOT


def test_the_reference_is_of_these_commands() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == reference(), "make reference"
