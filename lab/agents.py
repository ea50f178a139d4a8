"""The nodes' agents: `python -m agent.main` inside each node's namespace, and when one is ready.

An agent is ready when the plugin it stands behind says so: it has written the network configuration, last of
all, and STATUS answers without an error. That is how a container runtime learns it, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping

from lab import netns, processes
from lab.limits import SLOWNESS
from lab.names import RUN, NodePlace
from lab.runtime import PluginError, Runtime

READY_LIMIT = 30.0 * SLOWNESS
HTTP_ADDRESS = "127.0.0.1:9619"
_LAST_LINES = 20
_POLL = 0.02


class Agent:
    """One node's agent; it outlives the command that started it."""

    def __init__(self, node: NodePlace, runtime: Runtime, flags: Mapping[str, str]) -> None:
        """flags are further settings of the agent, by their names."""
        self.node = node
        self.runtime = runtime
        self.log = node.directory / "agent.log"
        self.socket = node.directory / "agent.sock"
        self.state_dir = node.directory / "state"
        self._flags = dict(flags)
        self._process: processes.Process | None = None

    def start(self) -> None:
        """Start it; does not wait until it is ready."""
        for directory in (self.state_dir, self.runtime.conf_dir):
            directory.mkdir(parents=True, exist_ok=True)
        self._process = processes.start(netns.path(self.node.netns), self._arguments(), self.log)

    def stop(self, *, kill: bool = False) -> None:
        """End it by SIGTERM, or by SIGKILL, with whatever else runs in the node's namespace."""
        processes.stop_in([netns.path(self.node.netns)], 0.0 if kill else processes.GRACE)
        if self._process:
            self._process.wait()
            self._process = None

    @property
    def alive(self) -> bool:
        """Whether any process of it is there."""
        if self._process and self._process.poll() is not None:
            return False
        return processes.alive(netns.path(self.node.netns)) > 0

    def not_ready(self) -> str:
        """Return why the node is not ready, or nothing when it is."""
        if self.runtime.configuration() is None:
            return f"{self.node.name} has no network configuration in {self.runtime.conf_dir}"
        try:
            self.runtime.call_once("STATUS")
        except PluginError as error:
            return f"{self.node.name}: {error}"
        return ""

    def last_lines(self) -> str:
        """Return the end of the log."""
        if not self.log.exists():
            return "(no log)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:]) or "(the log is empty)"

    def _arguments(self) -> list[str]:
        settings = {
            "node-name": self.node.name,
            "cluster": f"manifests:{RUN / 'cluster'}",
            "socket": str(self.socket),
            "state-dir": str(self.state_dir),
            "cni-conf-dir": str(self.runtime.conf_dir),
            "http-address": HTTP_ADDRESS,
            **self._flags,
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [sys.executable, "-m", "agent.main", *flags]


def wait_until_ready(agents: Iterable[Agent], seconds: float = READY_LIMIT) -> None:
    """Wait for all agents. Raises LabError with the log's end of the first that ended or took too long."""
    deadline = time.monotonic() + seconds
    for agent in agents:
        while reason := agent.not_ready():
            if not agent.alive:
                raise processes.LabError(_failed(agent, "the agent ended"))
            if time.monotonic() > deadline:
                raise processes.LabError(_failed(agent, f"not ready after {seconds:.0f} s: {reason}"))
            time.sleep(_POLL)


def _failed(agent: Agent, what: str) -> str:
    return f"{agent.node.name}: {what}; the end of its log, {agent.log}:\n{agent.last_lines()}"
