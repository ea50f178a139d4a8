"""The cluster as it is now, read from wherever the command was pointed to, and shared by all who look.

    asked --objects, every few seconds--> World
          --agents: flows, denials------> Traffic --> one state, with a version that changes when it does

It is read only while somebody asks: a page that is closed or hidden costs the cluster nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import click

from agent.cli.agents import Agents, Silent
from agent.cluster.store import Snapshot
from agent.explain.world import World
from agent.ui.entities import cluster_json, names_by_address
from agent.ui.traffic import Traffic

TRAFFIC_S = 1.0
OBJECTS_S = 3.0
AGENTS_S = 30.0
"""How old each may be before it is read again."""
MOST_PROBLEMS = 20


class Cluster(Protocol):
    """What is asked: `agent.cli.cluster.Asked`, or a test's own."""

    @property
    def where(self) -> str:
        """Its name for a person."""

    @property
    def live(self) -> bool:
        """Whether it has agents."""

    @property
    def namespace(self) -> str:
        """Of names that say none."""

    def snapshot(self, tell: Any) -> Snapshot:
        """All objects; `tell` gets what is wrong in them. Raises ClickException."""

    def agents(self) -> Agents:
        """The nodes' agents. Raises ClickException."""


class Live:
    """Reads a cluster for several threads, one at a time; a context manager that hangs up at its end."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._lock = threading.Lock()
        self._world: World | None = None
        self._cluster_json: dict[str, Any] = {}
        self._problems: list[str] = []
        self._failure = ""
        self._objects_at = self._traffic_at = self._agents_at = float("-inf")
        self._agents: Agents | None = None
        self._traffic = Traffic()
        self._silent: dict[str, str] = {}

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._drop_agents()

    def world(self) -> World:
        """The objects. Raises ClickException when they have never been read."""
        with self._lock:
            return self._read_objects()

    @contextmanager
    def agents(self) -> Iterator[Agents]:
        """The nodes' agents, for one who asks them something else. Raises ClickException."""
        with self._lock:
            self._call_agents()
            assert self._agents is not None
            yield self._agents

    def state(self) -> Mapping[str, Any]:
        """Everything the page shows. Raises ClickException when the objects have never been read."""
        with self._lock:
            self._read_objects()
            self._read_traffic()
            state = {
                "where": self.cluster.where,
                "live": self.cluster.live,
                "namespace": self.cluster.namespace,
                "problems": [*filter(None, [self._failure]), *self._problems[:MOST_PROBLEMS]],
                "silent": self._silent,
                "cluster": self._cluster_json,
                "rows": self._traffic.rows(),
            }
        version = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        return {"version": version, "time": time.time(), **state}

    def _read_objects(self) -> World:
        now = time.monotonic()
        if self._world is None or now - self._objects_at > OBJECTS_S:
            problems: list[str] = []
            try:
                self._world = World(self.cluster.snapshot(problems.append))
            except click.ClickException as error:
                if self._world is None:
                    raise
                self._failure = f"these are the objects of some time ago: {error.message}"
            else:
                self._failure, self._problems = "", problems
                self._cluster_json = cluster_json(self._world)
            self._objects_at = time.monotonic()
        return self._world

    def _read_traffic(self) -> None:
        now = time.monotonic()
        if not self.cluster.live or now - self._traffic_at <= TRAFFIC_S:
            return
        assert self._world is not None
        try:
            self._call_agents()
            assert self._agents is not None
            flows, denials = (self._agents.ask_all(call) for call in ("flows", "denials"))
        except click.ClickException as error:
            self._silent = {"all": error.message}
        else:
            answers = [*flows.items(), *denials.items()]
            self._silent = {node: answer.why for node, answer in answers if isinstance(answer, Silent)}
            self._traffic.take(
                _listed(flows, "flows"),
                _listed(denials, "denials"),
                names_by_address(self._world.snapshot),
                time.time(),
            )
        self._traffic_at = time.monotonic()

    def _call_agents(self) -> None:
        """Look again which agents there are when one has been silent for a while: its Pod may be new."""
        outdated = bool(self._silent) and time.monotonic() - self._agents_at > AGENTS_S
        if self._agents is None or outdated:
            self._drop_agents()
            self._agents = self.cluster.agents()
            self._agents_at = time.monotonic()

    def _drop_agents(self) -> None:
        if self._agents is not None:
            self._agents.__exit__(None, None, None)
            self._agents = None


def _listed(answers: Mapping[str, Any], what: str) -> Iterator[Mapping[str, Any]]:
    for answer in answers.values():
        if not isinstance(answer, Silent):
            yield from answer[what]
