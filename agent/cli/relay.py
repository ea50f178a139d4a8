"""`podwall relay`: a pipe to this node's agent; the command elsewhere runs it in the agents' Pods.

    {"call": "status", "body": {}}  a line on standard input  --> the agent's socket
    {"ok": ...} or {"error": "..."} a line on standard output <--

Whoever may execute programs in these Pods may ask; no agent listens on a port for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from agent.cli.ask import ask
from cni.wire import SOCKET


@click.command(hidden=True)
@click.option("--socket", type=click.Path(path_type=Path), default=Path(SOCKET), help="The agent's socket.")
def relay(socket: Path) -> None:
    """Pass questions, a line of JSON each, to this node's agent, and its answers back."""
    for line in sys.stdin:
        print(json.dumps(_answer(socket, line)), flush=True)


def _answer(socket: Path, line: str) -> object:
    try:
        question = json.loads(line)
        return {"ok": ask(socket, question["call"], question.get("body", {}))}
    except click.ClickException as error:
        return {"error": error.message}
    except (ValueError, KeyError, TypeError) as error:
        return {"error": f"this is no question: {error!r}"}
