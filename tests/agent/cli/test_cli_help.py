"""`podwall --help` is quick: nothing heavy is imported before a command is chosen."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from agent.cli.main import COMMANDS

HEAVY = (
    "agent.cluster",
    "asyncio",
    "http",
    "kubernetes",
    "lab",
    "msgspec",
    "pyroute2",
    "ssl",
    "websocket",
    "yaml",
)
IMPORTED = """
import sys
before = set(sys.modules)
sys.argv = ["podwall", *{words!r}]
from agent.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("\\n" + " ".join(sys.modules.keys() - before))
"""
LIMIT_S = 0.150


def imported(*words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(words=words)], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_imports_nothing_heavy(word: str) -> None:
    found = imported(word)
    assert [name for name in sorted(found) if name.startswith(tuple(f"{each}." for each in HEAVY))] == []
    assert found.isdisjoint(HEAVY)


def test_help_takes_little_time() -> None:
    """In CPU time, the best of some, so that a busy machine makes no difference."""
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "agent.cli.main", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < LIMIT_S


@pytest.mark.parametrize("name", sorted(name for name in COMMANDS if COMMANDS[name][2]))
def test_every_command_has_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli.main", name, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: ")
