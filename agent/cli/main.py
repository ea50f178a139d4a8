"""`podwall`: the command. Its groups are imported when they are asked for, so that help is quick."""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import CompletionItem, add_completion_class

from agent.cli.completion import Bash

COMMANDS = {
    "bench": ("agent.cli.bench", "bench", "How fast Pods reach each other, beside a bare veth pair."),
    "bugreport": (
        "agent.cli.bugreport",
        "bugreport",
        "Everything that helps to find a fault, in one archive.",
    ),
    "completion": ("agent.cli.completion", "completion", "The script that completes commands in a shell."),
    "doctor": ("agent.cli.doctor", "doctor", "What is wrong with a node or the cluster, and what mends it."),
    "get": ("agent.cli.get", "get", "What the agents hold: pods, services, policies, nodes, addresses."),
    "install": (
        "agent.cli.install",
        "install",
        "Install podwall into a cluster, and wait until every node is ready.",
    ),
    "lab": ("agent.cli.lab", "lab", "A cluster without Kubernetes, in network namespaces of this machine."),
    "flows": ("agent.cli.flows", "flows", "Who connects to whom by which Service, and who was denied."),
    "uninstall": (
        "agent.cli.install",
        "uninstall",
        "Remove podwall from a cluster's nodes, and show that nothing is left.",
    ),
    "why": (
        "agent.cli.why",
        "why_command",
        "Whether a connection is allowed, by what, and what would change it.",
    ),
    "matrix": ("agent.cli.matrix", "matrix_command", "Who reaches whom on which port, computed and tried."),
    "plan": ("agent.cli.plan", "plan_command", "What a change would open, close and cut, touching nothing."),
    "relay": ("agent.cli.relay", "relay", ""),
    "status": ("agent.cli.status", "status", "Whether every node is well, proved by packets between them."),
    "trace": ("agent.cli.trace", "trace", "One real packet, followed through the rules of the nodes."),
    "ui": ("agent.cli.ui", "ui", "One local web page: flows, policies, why and plan."),
}
"""Each command's module, the name it has there, and what help says of it; "" for what programs alone call."""


add_completion_class(Bash)


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands' names, in order."""
        return sorted(name for name in COMMANDS if COMMANDS[name][2])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for a name nobody knows."""
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """The commands that begin so, without importing one, and the options."""
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=COMMANDS[name][2]) for name in names), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="podwall", prog_name="podwall")
def main() -> None:
    """See, ask and try podwall, the Kubernetes network plugin on nftables."""


def kubectl() -> None:
    """The program kubectl-podwall: the same command under kubectl's name for it."""
    main(prog_name="kubectl podwall", complete_var="_PODWALL_COMPLETE")


if __name__ == "__main__":
    main()
