"""Whatever happens between a server and a watch, the store ends as a fresh list would make it.

The server is a model: objects, versions, a log of changes.  It closes watches, cuts lines, forgets history,
ends lists half-way and changes things between any two requests, as the test's data say.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.cluster.client import EVERY
from agent.cluster.errors import ApiError, Gone, Unreachable
from agent.cluster.model import Event, Synced
from agent.cluster.store import Store
from agent.cluster.watch import Timing, WatchState, _Watch

NAMES = ["a", "b", "c", "d", "e"]


class ModelServer:
    """What an API server holds of one kind; `choose` decides all that may go either way."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.version = 1
        self.objects: dict[str, int] = {}
        self.log: list[tuple[int, str, str]] = []
        self.oldest = 0
        self.calm = False

    def choose(self, *options: Any) -> Any:
        return options[0] if self.calm else self.draw(st.sampled_from(options))

    def change(self) -> None:
        for _ in range(self.choose(0, 1, 3)):
            name = self.draw(st.sampled_from(NAMES))
            self.version += 1
            if name in self.objects and self.choose(True, False):
                del self.objects[name]
                self.log.append((self.version, "DELETED", name))
            else:
                self.log.append((self.version, "MODIFIED" if name in self.objects else "ADDED", name))
                self.objects[name] = self.version
        if self.choose(False, False, False, True):
            self.oldest = self.version

    def item(self, name: str, version: int) -> dict[str, Any]:
        return {"metadata": {"name": name, "resourceVersion": str(version), "labels": {"v": str(version)}}}

    def page(self, query: dict[str, str]) -> bytes:
        """Pages are all of one version, as the API promises."""
        if "continue" in query:
            version, after = json.loads(query["continue"])
            if version < self.oldest or self.choose(False, False, True):
                raise Gone("too old", 410)
            objects = self.at(version)
        else:
            version, after, objects = self.version, "", dict(self.objects)
        left = sorted(name for name in objects if name > after)
        names = left[:2]
        more = json.dumps([version, names[-1]]) if len(left) > 2 else ""
        meta = {"resourceVersion": str(version), "continue": more}
        return json.dumps({"metadata": meta, "items": [self.item(n, objects[n]) for n in names]}).encode()

    def at(self, version: int) -> dict[str, int]:
        objects: dict[str, int] = {}
        for when, what, name in self.log:
            if when <= version:
                objects.pop(name, None) if what == "DELETED" else objects.update({name: when})
        return objects

    def watch(self, query: dict[str, str]) -> Iterator[list[bytes]]:
        since = int(query["resourceVersion"])
        if since < self.oldest:
            yield [b'{"type":"ERROR","object":{"code":410,"message":"too old"}}']
            return
        while True:
            waiting = [entry for entry in self.log if entry[0] > since]
            sent = waiting if self.calm else waiting[: self.draw(st.integers(0, len(waiting)))]
            lines = [self.line(*entry) for entry in sent]
            since = sent[-1][0] if sent else since
            if len(sent) == len(waiting) and self.choose(True, False):
                since = self.version
                lines.append(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d"}}}' % since)
            if lines:
                yield lines
            end = self.choose("closed", "cut", "more", "broken")
            if end == "broken":
                raise Unreachable("the connection broke")
            if end == "cut" and len(sent) < len(waiting):
                yield [self.line(*waiting[len(sent)])[:25]]
            if end != "more":
                return
            self.change()

    def line(self, version: int, what: str, name: str) -> bytes:
        return json.dumps({"type": what, "object": self.item(name, version)}).encode()


class ModelConnection:
    """A connection to the model server."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.open = True

    def request(self, method: str, target: str) -> dict[str, str]:
        self.server.change()
        if self.server.choose(False, False, False, True):
            raise Unreachable("no answer")
        return {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}

    def read(self, query: dict[str, str]) -> bytes:
        return self.server.page(query)

    def lines(self, query: dict[str, str], _: float) -> Iterator[list[bytes]]:
        return self.server.watch(query)

    def close(self) -> None:
        self.open = False


class ModelClient:
    """Hands out connections to the model server."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server

    def connection(self) -> ModelConnection:
        return ModelConnection(self.server)


class Taker:
    """Takes what a watch hands over."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.store = Store()
        self.events: list[Event] = []

    def reached(self, _: WatchState, version: str) -> None:
        """What was handed over is what there was at that version, nothing less and nothing later."""
        assert versions_in(self.store) == self.server.at(int(version))

    def put(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.append(event)
            self.store.apply(event)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_history_ends_as_a_fresh_list(data: st.DataObject) -> None:
    server, state = ModelServer(data.draw), WatchState()
    taker = Taker(server)
    watch: Any = _Watch(
        ModelClient(server),  # type: ignore[arg-type]
        "Node",
        selection=EVERY,
        timing=Timing(),
        state=state,
        handover=taker,  # type: ignore[arg-type]
    )
    for _ in range(data.draw(st.integers(1, 8))):
        _once(watch)
    server.calm = True
    for _ in range(4):  # a list that went stale, a watch that is gone, a list, a watch
        _once(watch)
    assert versions_in(taker.store) == server.objects
    assert taker.events.count(Synced("Node")) == 1


def versions_in(store: Store) -> dict[str, int]:
    return {name: int(node.labels["v"]) for name, node in store.snapshot.nodes.items()}


def _once(watch: Any) -> None:
    """One connection's life; closing watches at once counts as trouble, so this always ends."""
    with contextlib.suppress(ApiError):
        watch._follow()
