"""Shell completion: `podwall completion SHELL` prints click's script; kubectl asks kubectl_complete-podwall.

bash, zsh, fish   the script runs `podwall` with _PODWALL_COMPLETE=bash_complete at each press of Tab
kubectl           runs kubectl_complete-podwall WORD... with the unfinished word, maybe empty, at the end,
                  and reads a line per candidate, `value<tab>help`, then `:number`: what the shell shall do
                  (cobra's directives, as `kubectl __complete` prints them)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

VARIABLE = "_PODWALL_COMPLETE"
SHELLS = ("bash", "zsh", "fish")

FILES, NO_FILES, DIRECTORIES = 0, 4, 16
"""Cobra's directives: complete files when nothing is offered; offer nothing else; offer directories."""


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes podwall's commands and options in a shell.

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


def _line(item: CompletionItem[str]) -> str:
    return f"{item.value}\t{item.help}" if item.help else str(item.value)


def _directive(items: Sequence[CompletionItem[str]]) -> int:
    kinds = {item.type for item in items}
    return FILES if "file" in kinds else DIRECTORIES if "dir" in kinds else NO_FILES


def _program() -> click.Command:
    from agent.cli.main import main  # noqa: PLC0415 - it names this module

    return main
