"""`podwall doctor`: what is wrong with this node or cluster, worst first, and what mends it.

the nodes' agents, asked for facts --+
the cluster's objects ---------------+--> agent.explain.findings --> one sentence each, and a command
--here: this node's own kernel ------+
"""

from __future__ import annotations

import os
import socket as sockets
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from agent.cli.agents import Agents, Silent, SilentError, SocketLine
from agent.cli.cluster import Asked, cluster_options
from agent.cli.names import NODE, completes
from agent.cli.output import NEGATIVE, Coloured, output_option, show
from agent.cluster.errors import ApiError, NotFound
from agent.explain.findings import (
    CHECKED,
    CHECKED_HERE,
    CHECKED_OBJECTS,
    ERROR,
    NOTE,
    SEVERITIES,
    WARNING,
    Cluster,
    Finding,
    findings,
    listed,
    wrong,
)

COLOURS = {ERROR: "red", WARNING: "yellow", NOTE: "blue"}
KUBE_PROXY = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-proxy"


@click.command("doctor")
@click.option(
    "--node",
    "only",
    multiple=True,
    metavar="NODE",
    help="Only this node; may be given several times.",
    shell_complete=completes(NODE),
)
@click.option("--here", is_flag=True, help="This machine alone, also without a running agent.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --here: the agent's configuration file.",
)
@output_option
@cluster_options
def doctor(asked: Asked, only: tuple[str, ...], here: bool, config: Path | None, output: str) -> None:
    """Say what is wrong with the nodes or the cluster, and what mends it; end with 1 when something is.

    Each finding is a sentence that names the cause, the worst first, with the command that mends it below.
    Nothing is changed. Packets are sent only as ICMP echoes between nodes, to measure how much a path takes.

    \b
    podwall doctor                     all nodes of the cluster, or of the lab
    podwall doctor --node worker-1     one of them
    podwall doctor --here              on a node itself, as root, also when no agent runs there
    podwall doctor -f DIR              what manifests alone can tell
    """
    if config and not here:
        raise click.UsageError("--config goes with --here; agents elsewhere have theirs")
    found, names = _here(config) if here else examine(asked, only)
    checked = CHECKED_HERE if here else CHECKED if asked.live else CHECKED_OBJECTS
    content = {
        "ok": not wrong(found),
        "nodes": names,
        "findings": [each.to_json() for each in found],
        "checked": list(checked),
    }
    show(output, content, lambda: lines(found, names, checked))
    if wrong(found):
        raise SystemExit(NEGATIVE)


def lines(
    found: Iterable[Finding], names: list[str], checked: Iterable[str] = CHECKED
) -> Iterator[str | Coloured]:
    """The findings as a person reads them, and what was looked at."""
    found = tuple(found)
    alike: dict[tuple[str, str], list[Finding]] = {}
    for each in found:
        alike.setdefault((each.severity, each.cause), []).append(each)
    for (severity, cause), group in alike.items():
        where = f"{listed([each.node for each in group])}: " if group[0].node else ""
        yield Coloured(f"{severity}: {where}{cause}", COLOURS[severity])
        if group[0].mend:
            yield f"    {group[0].mend}"
    if found:
        yield ""
    if wrong(found):
        counts = [(sum(each.severity == kind for each in found), kind) for kind in SEVERITIES]
        yield ", ".join(f"{count} {kind}{'s' * (count != 1)}" for count, kind in counts if count)
    else:
        yield f"nothing is wrong{_on(names)}"
    yield f"checked{_on(names)}: {'; '.join(checked)}"


def _on(names: list[str]) -> str:
    return f" on {len(names)} node{'s' * (len(names) != 1)} ({listed(names)})" if names else ""


# A cluster


def examine(asked: Asked, only: tuple[str, ...] = ()) -> tuple[tuple[Finding, ...], list[str]]:
    """The findings of a cluster, and the nodes that were looked at. Raises Unreachable, UsageError."""
    with asked.agents() as agents, ThreadPoolExecutor(2) as threads:
        nodes = agents.named(only)
        kube_proxy = threads.submit(_kube_proxy, asked)
        snapshot = threads.submit(asked.snapshot)
        answers, asked_at = _facts(agents, nodes)
        silent = {name: each.why for name, each in answers.items() if isinstance(each, Silent)}
        facts = {name: each for name, each in answers.items() if not isinstance(each, Silent)}
        cluster = Cluster(snapshot.result(), kube_proxy.result(), silent, asked_at)
    found = findings(facts, cluster)
    return tuple(each for each in found if not only or each.node in ("", *only)), sorted(answers)


def _facts(agents: Agents, nodes: Iterable[str]) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Each node's facts, and between which moments of our clock they were told."""
    asked_at: dict[str, tuple[float, float]] = {}

    def one(node: str) -> Any:
        agents.ask(node, "status")  # calls the agent, so that only the question itself is timed
        began = time.time()
        answer = agents.ask(node, "doctor")
        asked_at[node] = (began, time.time())
        return answer

    return agents.each(one, nodes), asked_at


def _kube_proxy(asked: Asked) -> bool | None:
    """Whether the cluster runs kube-proxy; None where that cannot be told."""
    client = asked.client()
    if client is None:
        return None
    try:
        return bool(client.read(KUBE_PROXY)["status"].get("desiredNumberScheduled"))
    except NotFound:
        return False
    except ApiError:
        return None
    finally:
        client.close()


# This machine


def _here(config: Path | None) -> tuple[tuple[Finding, ...], list[str]]:
    from agent import config as configuration  # noqa: PLC0415 - only --here needs the agent's side
    from agent.doctor import Known, facts, routed  # noqa: PLC0415

    arguments = ["--config", str(config)] if config else []
    if "PODWALL_NODE_NAME" not in os.environ:
        arguments += ["--node-name", sockets.gethostname().lower()]
    try:
        settings = configuration.load(arguments, os.environ)
    except configuration.ConfigError as error:
        raise click.UsageError(str(error)) from error
    silent: Mapping[str, str] = {}
    try:
        seen: Any = SocketLine(settings.socket).ask("doctor", {})
        name = str(seen["node"])
    except SilentError as error:
        name = settings.node_name
        seen, silent = facts(Known(settings, pod_cidrs=routed())), {name: str(error)}
    return findings({name: seen}, Cluster(silent=silent)), [name]
