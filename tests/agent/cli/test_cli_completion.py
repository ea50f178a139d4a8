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
from click.shell_completion import CompletionItem
from click.testing import CliRunner

from agent.cli.completion import VARIABLE, Bash, candidates, together
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


SHOP = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIP: 10.96.0.7, ports: [{name: http, port: 80}, {name: metrics, port: 9090}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-7d9c5b8f4-x2xkq, namespace: shop}
spec: {nodeName: worker, containers: [{name: a, image: a}]}
status: {podIPs: [{ip: 10.244.1.7}], phase: Running}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}}
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of the working directory: a name that leaves a line of a terminal room for the rest."""
    (tmp_path / "shop.yaml").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    return "shop.yaml"


TYPED = [
    ("a Pod", "why -n shop we", "web-7d9c5b8f4-x2xkq "),
    ("a namespace, to go on with", "why sh", "shop/"),
    ("a name of a namespace", "why shop/w", "shop/web-7d9c5b8f4-x2xkq "),
    ("a target, to go on with", "why -n shop web svc/", "svc/api"),
    ("a port", "why -n shop web svc/api:h", "svc/api:http "),
    ("a port by its number", "why -n shop web svc/api:8", "svc/api:80 "),
    ("what comes after a port", "why -n shop web svc/api:80 --proto", "--protocol "),
    ("a name behind =", "why --namespace=sh", "--namespace=shop "),
    ("a name after it", "why --namespace=shop we", "web-7d9c5b8f4-x2xkq "),
    ("a target after an address", "why -n shop ::1 svc/", "svc/api"),
    ("a port behind =", "matrix -n shop --to=svc/api:h", "--to=svc/api:http "),
]


@pytest.mark.parametrize(("typed", "whole"), [case[1:] for case in TYPED], ids=[case[0] for case in TYPED])
def test_tab_completes_names_in_bash(shop: str, terminal: Terminal, typed: str, whole: str) -> None:
    command, *rest = typed.split()
    line = f"podwall {command} -f {shop} {' '.join(rest)}"
    terminal.type(line, rest[-1])
    terminal.type("\t", whole[len(rest[-1]) :])
    shown = terminal.type("\x01echo \x05.\n", ".\r\nready> ")
    assert shown.split("\r\n")[-2] == f"{line[: -len(rest[-1])]}{whole}."


def test_two_tabs_show_all_ports_in_bash(shop: str, terminal: Terminal) -> None:
    line = f"podwall why -f {shop} -n shop web svc/api:"
    terminal.type(line, "svc/api:")
    shown = terminal.type("\t\t", "svc/api:")
    assert sorted(shown.strip("\x07").split("ready> ")[0].split()) == ["80", "9090", "http", "metrics"]


def test_tab_completes_what_is_deleted_or_a_file_in_bash(shop: str, terminal: Terminal) -> None:
    terminal.type(f"podwall plan --from {shop} -n shop --delete net\t", "netpol/deny ")
    terminal.type(f"\x15podwall plan --from {shop} -n shop --delete {shop[:-5]}\t", "shop.yaml ")


def test_who_cannot_be_asked_says_nothing_in_bash(terminal: Terminal) -> None:
    terminal.type("podwall why --kubeconfig /nonexistent ", "/nonexistent ")
    assert terminal.type("\tx", "x").lstrip("\x07") == "x"


BROKEN = [
    (["podwall", "why", "svc/api", ":"], ["podwall", "why", "svc/api:"]),
    (["podwall", "why", "svc/api", ":", "80"], ["podwall", "why", "svc/api:80"]),
    (["podwall", "why", "svc/api", ":", "80", ""], ["podwall", "why", "svc/api:80", ""]),
    (["podwall", "why", "svc/api", ":", ""], ["podwall", "why", "svc/api:", ""]),
    (["--from", "=", "a", "b"], ["--from=a", "b"]),
    (["[fd00", "::", "1]", ":", "80"], ["[fd00::1]:80"]),
    (["why", "::", "1"], ["why", "::1"]),
    (["", ""], ["", ""]),
]


@pytest.mark.parametrize(("broken", "whole"), BROKEN, ids=["+".join(case[0]) for case in BROKEN])
def test_words_that_bash_broke_are_put_together(broken: list[str], whole: list[str]) -> None:
    assert list(together(broken)) == whole


QUOTED = [
    ("nothing yet", ["why", ""], 2, "", "web"),
    ("an open quote", ["why", '"we'], 2, "we", "web"),
    ("a quoted target and its port", ["why", '"web:h'], 2, "web:h", "web:http"),
    ("a port", ["why", "web", ":", "h"], 4, "web:h", "http"),
    ("an option's value", ["why", "--via", "=", "we"], 4, "--via=we", "web"),
    ("words behind the cursor", ["why", "we", "-n", "shop"], 2, "we", "web"),
    ("nothing yet, and words behind the cursor", ["why", "", "-n", "shop"], 2, "", "web"),
]


@pytest.mark.parametrize(
    ("typed", "cursor", "incomplete", "put"), [case[1:] for case in QUOTED], ids=[case[0] for case in QUOTED]
)
def test_bash_gets_what_it_replaces(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], cursor: int, incomplete: str, put: str
) -> None:
    monkeypatch.setenv("COMP_WORDS", "\n".join(["podwall", *typed]))
    monkeypatch.setenv("COMP_CWORD", str(cursor))
    bash = Bash(main, {}, "podwall", VARIABLE)
    assert bash.get_completion_args() == (["why"], incomplete)
    whole = CompletionItem("web:http" if ":" in incomplete else "web")
    assert bash.format_completion(whole) == f"plain,{put}"


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


NAMED = [
    (["why", "-n", "shop", "web-"], ["web-7d9c5b8f4-x2xkq\tPod"], ":4"),
    (["why", "sh"], ["shop/\tNamespace"], ":6"),
    (["why", "-n", "shop", "web", "svc/"], ["svc/api\tService"], ":6"),
    (["why", "-n", "shop", "web", "svc/api:8"], ["svc/api:80\tTCP http"], ":4"),
    (["matrix", "-n", "shop", "--to=svc/a"], ["svc/api\tService"], ":6"),
]


@pytest.mark.parametrize(("words", "lines", "directive"), NAMED, ids=[" ".join(case[0]) for case in NAMED])
def test_what_kubectl_reads_of_names(shop: str, words: list[str], lines: list[str], directive: str) -> None:
    *found, last = candidates([words[0], "-f", shop, *words[1:]])
    assert (sorted(found), last) == (lines, directive)


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
