"""`podwall status`: what the agent of this node says of itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click

from agent.cli.ask import ask
from agent.log import printable
from cni.wire import SOCKET


@click.command()
@click.option("--socket", type=click.Path(path_type=Path), default=Path(SOCKET), help="The agent's socket.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text")
def status(socket: Path, output: str) -> None:
    """Say whether Pods can be put on this node, and what is in the way. Exit status 1 when they cannot."""
    state = cast("dict[str, Any]", ask(socket, "status", {}))
    if output == "json":
        click.echo(json.dumps(state, indent=2))
    else:
        for line in _lines(state):
            click.echo(printable(line))
    if state["not_ready"]:
        raise SystemExit(1)


def _lines(state: dict[str, Any]) -> Iterator[str]:
    yield f"Node {state['node']}: {'not ready' if state['not_ready'] else 'ready'}"
    yield from (f"  not ready: {reason}" for reason in state["not_ready"])
    yield from (f"  problem: {problem}" for problem in state["problems"])
    for each in state.get("object_problems", ()):
        yield f"  {each['kind']} {each['object']}: {each['problem']}"
    if (left := state.get("object_problems_total", 0) - len(state.get("object_problems", ()))) > 0:
        yield f"  and {left} more problems of objects"
    yield f"  podwall {state['version']}, kernel {state['kernel']}, up {_ago(state['started'])}"
    yield f"  Pods: {state['pods']}"
    for each in state["addresses"]:
        yield f"  {each['cidr']}: {each['used']} of {each['size']} in use, {each['resting']} rest"
    for path in state["paths"]:
        yield f"  to {path['cidr']} on {path['node']}: {path['way']}"
    yield from _services(state.get("services"))
    yield from _load_balancer(state.get("load_balancer"))
    yield f"  commits: {state['commits']}, last {_ago(state['last_commit'])} ago"


def _services(state: dict[str, Any] | None) -> Iterator[str]:
    if state is None:
        return
    yield f"  Services: {state['state']} ({state['why']}), {state['services']} in the cluster"
    for service, problems in state["problems"].items():
        yield from (f"  Service {service}: {problem}" for problem in problems)


def _load_balancer(state: dict[str, Any] | None) -> Iterator[str]:
    if state is None:
        return
    for pool in state["pools"]:
        yield f"  pool {pool['name']}, IPv{pool['family']}: {pool['used']} of {pool['size']} in use"
    if state["silent_because"]:
        yield f"  answers for no LoadBalancer address: {state['silent_because']}"
    elif state["announced"]:
        yield f"  answers for {', '.join(state['announced'])}"


def _ago(when: float | None) -> str:
    if when is None:
        return "never"
    seconds = max(0, int(time.time() - when))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
