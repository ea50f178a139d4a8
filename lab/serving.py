"""Tells the lab's server which Pods to serve, and starts it."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import processes
from lab.limits import SLOWNESS
from lab.names import RUN

SOCKET = RUN / "server.sock"
LOG = RUN / "server.log"
_START_LIMIT = 10.0
_ANSWER_LIMIT = 20.0 * SLOWNESS


def start(where: Path) -> None:
    """Start the server; it lives in a namespace of the lab, so that it is found again by it."""
    process = processes.start(where, [sys.executable, "-m", "lab.server", str(SOCKET)], LOG)
    processes.until(
        lambda: _answers() or process.poll() is not None,
        _START_LIMIT,
        lambda: f"the lab's server did not start in {_START_LIMIT:.0f} s; see {LOG}",
    )
    if process.poll() is not None:
        raise processes.LabError(f"the lab's server ended: {LOG.read_text(errors='replace')[-2000:]}")


def serve(name: str, where: Path, ports: Sequence[int], sctp: Sequence[int] = ()) -> None:
    """Answer with a name on these ports of a namespace, and on others over SCTP.

    Raises LabError when a port is taken.
    """
    _ask({"serve": name, "netns": str(where), "ports": list(ports), "sctp": list(sctp)})


def stop(name: str) -> None:
    """Close a name's sockets and connections."""
    _ask({"stop": name})


def served() -> list[str]:
    """Return the names that are served."""
    return list(_ask({})["ok"])


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ANSWER_LIMIT)
            connection.connect(str(SOCKET))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
    except (OSError, ValueError) as cause:
        message = f"the lab's server does not answer ({cause}); see {LOG}, then `podwall lab down`"
        raise processes.LabError(message) from cause
    if "error" in answer:
        raise processes.LabError(answer["error"])
    return answer


def _answers() -> bool:
    try:
        served()
    except processes.LabError:
        return False
    return True
