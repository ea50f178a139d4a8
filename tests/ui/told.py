"""A cluster that says what a test tells it to: objects, and what the agents answer; and the page for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from agent.cli.agents import Agents, SilentError
from agent.cluster.store import Snapshot
from agent.ui.live import Cluster, Live
from agent.ui.server import PageServer

NOTHING: Mapping[str, Any] = {
    "flows": {"flows": [], "total": 0},
    "denials": {"denials": [], "total": 0, "lost": 0},
    "settings": {
        "services": True,
        "external_ips": [],
        "node_port_addresses": [],
        "pools": [],
        "announced": [],
        "tunnels": [],
    },
}


@dataclass
class Told:
    """answers: by node and call; a text is why an agent is silent."""

    snapshot: Snapshot
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    where: str = "a test"
    live: bool = True
    namespace: str = "default"
    problems: tuple[str, ...] = ()

    def objects(self, tell: Callable[[str], None] | None = None) -> tuple[Snapshot, Mapping[Any, Any]]:
        for problem in self.problems:
            assert tell is not None
            tell(problem)
        return self.snapshot, {}

    def agents(self) -> Agents:
        return Agents({node: (lambda node=node: Line(self.answers[node])) for node in self.answers})  # type: ignore[misc]


@dataclass
class Line:
    """The way to one agent."""

    answers: Mapping[str, Any]

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        answer = self.answers.get(call, NOTHING.get(call, f"nothing is known of {call}"))
        if isinstance(answer, str):
            raise SilentError(answer)
        return answer

    def close(self) -> None:
        pass


@contextmanager
def serving(cluster: Cluster) -> Iterator[PageServer]:
    """The page's server for a cluster, in a thread."""
    server = PageServer(Live(cluster), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.live.close()


def flow(source: tuple[str, int, str], destination: tuple[str, int, str], **other: Any) -> dict[str, Any]:
    """A flow as an agent tells it; an end is address, port and Pod."""
    ends = [dict(zip(("address", "port", "pod"), end, strict=True)) for end in (source, destination)]
    told = {"protocol": "tcp", "asked": None, "seen_source": None, "icmp": None, "status": 0b1110}
    return {**told, "source": ends[0], "destination": ends[1], **other}


def denial(source: str, destination: str, dport: int, **other: Any) -> dict[str, Any]:
    """A denial as an agent tells it."""
    told = {
        "time": 0.0,
        "last_time": 0.0,
        "count": 1,
        "direction": "ingress",
        "pod": "",
        "peer": "",
        "class": "c",
        "protocol": "tcp",
        "sport": 40000,
        "icmp_type": None,
        "fragment": False,
        "policies": [],
        "audit": False,
        "in": "",
        "out": "",
    }
    return {**told, "source": source, "destination": destination, "dport": dport, **other}
