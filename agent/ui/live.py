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
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import click

from agent.cli.agents import Agents, Silent
from agent.cli.why import Looked, looked_at, settings_of
from agent.cluster.store import Snapshot
from agent.explain.imagined import with_addresses
from agent.explain.observed import Names, Seen, denial, flow, join
from agent.explain.world import World
from agent.ui.entities import cluster_json
from agent.ui.traffic import Traffic

if TYPE_CHECKING:
    from agent.cli.cluster import Places

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

    def objects(self, tell: Callable[[str], None] | None = None) -> tuple[Snapshot, Places]:
        """All objects and where they stand; `tell` gets what is wrong in them. Raises ClickException."""

    def agents(self) -> Agents:
        """The nodes' agents. Raises ClickException."""


class Live:
    """Reads a cluster for several threads, one at a time."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._lock = threading.Lock()
        self._agents = Agents({})
        self._settings: Mapping[str, Any] = {}
        self._looked: Looked | None = None
        self._names: Names | None = None
        self._cluster_json: dict[str, Any] = {}
        self._changes = 0
        self._problems: list[str] = []
        self._failure = ""
        self._objects_at = self._traffic_at = self._agents_at = float("-inf")
        self._traffic = Traffic()
        self._flows: list[Seen] = []
        self._silent: dict[str, str] = {}
        self._unseen: list[str] = []

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._agents.__exit__(None, None, None)

    def looked(self) -> Looked:
        """The objects, and the agents to ask more. Raises ClickException when it never could be read."""
        with self._lock:
            return self._read_objects()

    def flows(self) -> list[Seen]:
        """The flows that the nodes know now. Raises ClickException."""
        with self._lock:
            self._read_objects()
            self._read_traffic()
            return self._flows

    def state(self) -> Mapping[str, Any]:
        """Everything the page shows. Raises ClickException when the objects have never been read."""
        with self._lock:
            self._read_objects()
            self._read_traffic()
            state = {
                "where": self.cluster.where,
                "live": self.cluster.live,
                "namespace": self.cluster.namespace,
                "problems": [*filter(None, [self._failure]), *self._unseen, *self._problems[:MOST_PROBLEMS]],
                "silent": self._silent,
                "cluster": self._cluster_json,
                "changes": self._changes,
                "rows": self._traffic.rows(),
            }
        version = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        return {"version": version, "time": time.time(), **state}

    def _read_objects(self) -> Looked:
        if self._looked is not None and time.monotonic() - self._objects_at <= OBJECTS_S:
            return self._looked
        problems: list[str] = []
        try:
            self._call_agents()
            snapshot, places = self.cluster.objects(problems.append)
        except click.ClickException as error:
            if self._looked is None:
                raise
            self._failure = f"what is shown is of some time ago: {error.message}"
        else:
            if not self.cluster.live:
                snapshot, _ = with_addresses(snapshot)
            self._failure, self._problems = "", problems
            same = self._looked is not None and self._looked.world.snapshot == snapshot
            self._looked = looked_at(snapshot, places, self._agents, self._settings)
            if not same:
                self._take_objects(self._looked.world)
        self._objects_at = time.monotonic()
        return self._looked

    def _take_objects(self, world: World) -> None:
        """Make what follows from the objects alone; the page asks for its matrix again when they changed."""
        self._names = Names(world)
        self._cluster_json = cluster_json(world)
        self._changes += 1

    def _call_agents(self) -> None:
        """Look now and then which agents there are: a silent one's Pod may be a new one by now."""
        age = time.monotonic() - self._agents_at
        if not self.cluster.live or (age <= AGENTS_S if self._silent else self._agents.nodes):
            return
        self._agents.__exit__(None, None, None)
        self._agents = self.cluster.agents()
        self._settings = settings_of(self._agents)
        self._agents_at = time.monotonic()

    def _read_traffic(self) -> None:
        if not self.cluster.live or time.monotonic() - self._traffic_at <= TRAFFIC_S:
            return
        assert self._names is not None
        now = time.time()
        answers = {call: self._agents.ask_all(call) for call in ("flows", "denials")}
        self._silent = {
            node: answer.why
            for by_node in answers.values()
            for node, answer in by_node.items()
            if isinstance(answer, Silent)
        }
        self._unseen = [*_unseen(answers)]
        seen = list(_seen(answers))
        self._flows = [each for each in seen if not each.is_denial]
        self._traffic.take(map(self._names.event, join(seen, now)), now)
        self._traffic_at = time.monotonic()


def _unseen(answers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is missing of the traffic, and why."""
    for call, by_node in answers.items():
        for node, answer in by_node.items():
            if isinstance(answer, Silent):
                continue
            if (untold := answer["total"] - len(answer[call])) > 0:
                yield f"{node} has {untold} more {call} than it could tell"
            if answer.get("lost") or answer.get("not_logged"):
                yield f"{node} denied more packets than are shown: more came at once than are logged"


def _seen(answers: Mapping[str, Mapping[str, Any]]) -> Iterator[Seen]:
    for call, seen in (("flows", flow), ("denials", denial)):
        for node, answer in answers[call].items():
            if not isinstance(answer, Silent):
                yield from (seen(node, each) for each in answer[call])
