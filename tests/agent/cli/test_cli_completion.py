"""Completion as a person meets it: Tab in a real bash, and what kubectl reads of its plugin."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli.completion import candidates
from agent.cli.main import main

PROGRAMS = {
    "podwall": "from agent.cli.main import main; main(prog_name='podwall')",
    "kubectl-podwall": "from agent.cli.main import kubectl; kubectl()",
    "kubectl_complete-podwall": "from agent.cli.completion import for_kubectl; for_kubectl()",
}
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the programs as they are installed."""
    directory = tmp_path_factory.mktemp("programs")
    for name, script in PROGRAMS.items():
        path = directory / name
        path.write_text(f"#!{sys.executable}\n{script}\n")
        path.chmod(0o755)
    return directory


def environment(programs: Path) -> dict[str, str]:
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PS1": "ready> ",
        "TERM": "dumb",
        "HISTFILE": "",
    }


class Terminal:
    """A bash that a person types into."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], variables)  # noqa: S606 - no shell between
        self.seen = ""

    def type(self, text: str, until: str) -> str:
        """Type; return what is on the screen since, once it ends like this."""
        before = len(self.seen)
        os.write(self._screen, text.encode())
        end = time.monotonic() + LIMIT_S
        while not self.seen[before:].rstrip("\x07").endswith(until):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._screen], [], [], left)[0]:
                raise TimeoutError(f"no {until!r}: {self.seen[before:]!r}")
            self.seen += os.read(self._screen, 65536).decode(errors="replace")
        return self.seen[before:]

    def close(self) -> None:
        os.close(self._screen)  # bash hears that its terminal is gone
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(programs: Path) -> Iterator[Terminal]:
    made = Terminal(environment(programs))
    try:
        made.type("", "ready> ")
        made.type("source <(podwall completion bash); echo sour''ced\n", "sourced\r\nready> ")
        yield made
    finally:
        made.close()


def test_tab_completes_a_command_in_bash(terminal: Terminal) -> None:
    terminal.type("podwall compl\t", "podwall completion ")
    terminal.type("z\t", "zsh ")
    assert "source <(podwall" in terminal.type("\x15podwall completion --he\t", "--help ") + terminal.type(
        "\n", "ready> "
    )


def test_tab_completes_an_option_in_bash(terminal: Terminal) -> None:
    terminal.type("podwall why --exit\t", "podwall why --exit-code ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_PODWALL_COMPLETE={shell}_complete" in done.output
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=done.output, text=True, check=True)


def test_another_shell_is_wrong_usage() -> None:
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == 2


KUBECTL = [
    (["compl"], ["completion\tThe script that completes commands in a shell."], ":4"),
    (["completion", ""], ["bash", "fish", "zsh"], ":4"),
    (["why", "--exit"], ["--exit-code\tEnd with 1 when the connection is denied."], ":4"),
    (["why", "-f", ""], [], ":0"),
    (["nothing", "of", "this"], [], ":4"),
]


@pytest.mark.parametrize(
    ("words", "lines", "directive"), KUBECTL, ids=[" ".join(case[0]) for case in KUBECTL]
)
def test_what_kubectl_reads(words: list[str], lines: list[str], directive: str) -> None:
    *found, last = candidates(words)
    assert (sorted(found), last) == (lines, directive)


def test_kubectl_finds_the_plugin_and_its_completion(programs: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl here")
    variables = environment(programs)
    done = subprocess.run(
        ["kubectl", "podwall", "--help"], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: kubectl podwall ")
    done = subprocess.run(
        ["kubectl", "__complete", "podwall", "compl"],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0].startswith("completion")
