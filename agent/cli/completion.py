"""Shell completion: `podwall completion SHELL` prints click's script; kubectl asks kubectl_complete-podwall.

bash, zsh, fish   the script runs `podwall` with _PODWALL_COMPLETE=bash_complete at each press of Tab;
                  bash breaks words at ':' and '=' and replaces what is behind them: svc/api:8 is three
kubectl           runs kubectl_complete-podwall WORD... with the unfinished word, maybe empty, at the end,
                  and reads a line per candidate, `value<tab>help`, then `:number`: what the shell shall do
                  (cobra's directives, as `kubectl __complete` prints them)
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ShellComplete,
    get_completion_class,
    split_arg_string,
)

VARIABLE = "_PODWALL_COMPLETE"
SHELLS = ("bash", "zsh", "fish")

FILES, NO_SPACE, NO_FILES, DIRECTORIES = 0, 2, 4, 16
"""Cobra's directives: complete files when nothing is offered; let the cursor at the word, as something may
follow; offer nothing else; offer directories."""

BREAKS = frozenset(":=@")
"""Of COMP_WORDBREAKS what stands in names and options."""

_ADDRESS = re.compile(r"\[?[0-9A-Fa-f:.]+")


class Bash(BashComplete):
    """bash, with words put together again, and no space after a word that goes on."""

    source_template = BashComplete.source_template.replace(
        "        elif [[ $type == 'plain' ]]; then\n",
        "        elif [[ $type == 'open' ]]; then\n"
        "            compopt -o nospace\n"
        "            COMPREPLY+=($value)\n"
        "        elif [[ $type == 'plain' ]]; then\n",
    )
    _before = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the cursor's, and that."""
        typed = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
        *args, incomplete = map(_unquoted, together(typed))
        last = "" if set(typed[-1]) <= BREAKS else _unquoted(typed[-1])
        value = incomplete.partition("=")[2] if incomplete.startswith("--") else incomplete
        self._before = value.removesuffix(last)
        return args[1:], incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """A line for the script: what kind it is, and the part that bash puts in."""
        kind = "open" if item.open else item.type
        return f"{kind},{str(item.value).removeprefix(self._before)}"


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes podwall's commands, options and names in a shell.

    Names are those of the cluster, lab or manifests that the line says, in the namespace of -n: Pods,
    workloads (deploy/web), Services (svc/api) and their ports (svc/api:http), nodes, namespaces, policies,
    contexts. Who does not answer within two seconds offers none.

    \b
    bash   source <(podwall completion bash)             # for good: into ~/.bashrc
    zsh    source <(podwall completion zsh)              # for good: into ~/.zshrc
    fish   podwall completion fish > ~/.config/fish/completions/podwall.fish

    `kubectl podwall` completes by itself, with kubectl's own completion, where kubectl_complete-podwall is on
    the PATH (kubectl 1.26 and newer).
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(_program(), {}, "podwall", VARIABLE).source())


def for_kubectl() -> None:
    """The program kubectl_complete-podwall."""
    for line in candidates(sys.argv[1:]):
        click.echo(line)


def candidates(words: Sequence[str]) -> Iterator[str]:
    """What kubectl reads: how the words may go on, of which the last is unfinished."""
    *done, unfinished = words or ("",)
    items = ShellComplete(_program(), {}, "kubectl podwall", VARIABLE).get_completions(done, unfinished)
    yield from (_line(item) for item in items if item.type == "plain")
    yield f":{_directive(items)}"


def _unquoted(word: str) -> str:
    return " ".join(split_arg_string(word))


def together(words: Sequence[str]) -> Iterator[str]:
    """Words as they were typed, of those that bash broke; an empty one at the end has a space before it."""
    found, joins = "", False
    for number, word in enumerate(words):
        breaks = bool(word) and set(word) <= BREAKS
        begins = not word or (word == "::" and _ADDRESS.fullmatch(found) is None)
        if number and (begins or not (breaks or joins)):
            yield found
            found = ""
        found, joins = found + word, breaks
    yield found


def _line(item: CompletionItem[str]) -> str:
    return f"{item.value}\t{item.help}" if item.help else str(item.value)


def _directive(items: Sequence[CompletionItem[str]]) -> int:
    kinds = {item.type for item in items}
    space = NO_SPACE if any(item.open for item in items) else 0
    return space | (FILES if "file" in kinds else DIRECTORIES if "dir" in kinds else NO_FILES)


def _program() -> click.Command:
    from agent.cli.main import main  # noqa: PLC0415 - it names this module

    return main
