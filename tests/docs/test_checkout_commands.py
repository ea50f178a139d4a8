"""What is typed in a checkout: every target is there, and the first command does what README promises."""

from __future__ import annotations

import re
import subprocess

import pytest

from lab import state
from tests.docs.blocks import ROOT, blocks, pages

TYPED = sorted(
    {
        command.text
        for page in pages()
        for block in blocks(page)
        if block.world == "checkout"
        for command in block.commands
    }
)


@pytest.mark.parametrize("typed", TYPED)
def test_it_can_be_typed(typed: str) -> None:
    """Make knows the target and would run it; a program of the project answers --help."""
    plain = typed.split(" #", maxsplit=1)[0].strip()
    if plain.startswith("make"):
        asked = ["make", "--dry-run", *plain.split()[1:2]]
    else:
        asked = [*re.split(r"\s+(?=--)", plain)[0].split(), "--help"]
    done = subprocess.run(asked, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_demonstration() -> None:
    done = subprocess.run(
        ["make", "demo"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all as expected" in done.stdout
    assert not state.remains()
