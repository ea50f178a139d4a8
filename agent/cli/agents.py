"""The agents of a cluster, wherever they are: each node's is asked by its name, all of them at the same time.

    lab       each agent's socket on this machine
    cluster   `podwall relay` executed in the agent's Pod through the API server, for as long as one asks

An agent that does not answer is told apart from what the others say: one broken node hides none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from urllib.parse import urlencode

import click

from agent.cli.ask import ask
from agent.cluster.errors import ApiError
from agent.log import printable

if TYPE_CHECKING:  # a lab needs none of it
    from agent.cluster.client import ApiClient

T = TypeVar("T")

NOBODY = (
    "there is no podwall agent in the cluster: is podwall installed? "
    "`kubectl -n kube-system get daemonset podwall`"
)
SELECTOR = "app.kubernetes.io/name=podwall"
CONTAINER = "agent"
RELAY = ("podwall", "relay")
LIMIT_S = 15.0
MOST_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Silent:
    """An agent that gave no answer, and why."""

    why: str


class SilentError(Exception):
    """An agent gave no answer; the message says why."""


class Line(Protocol):
    """The way to one agent."""

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        """The answer to a call. Raises SilentError."""

    def close(self) -> None:
        """Hang up."""


class Agents:
    """All agents; a context manager that hangs up at its end."""

    def __init__(self, ways: Mapping[str, Callable[[], Line]]) -> None:
        """Takes each node's name and how its agent is called; it is called when first asked."""
        self._ways = dict(ways)
        self._lines: dict[str, Line] = {}
        self._locks = {node: threading.Lock() for node in ways}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines.values():
            line.close()

    @property
    def nodes(self) -> Sequence[str]:
        """The nodes that have an agent, sorted."""
        return sorted(self._ways)

    def named(self, names: Sequence[str]) -> Sequence[str]:
        """The nodes of these names; without any, all. Raises UsageError for one that has no agent."""
        for name in names:
            if name not in self._ways:
                known = ", ".join(self.nodes) or "none"
                raise click.UsageError(printable(f"node {name} has no podwall agent; these have: {known}"))
        return names or self.nodes

    def ask(self, node: str, call: str, body: Mapping[str, object] | None = None) -> Any:
        """One agent's answer, plain data. Raises SilentError."""
        if node not in self._ways:
            raise SilentError(f"node {node} has no podwall agent")
        with self._locks[node]:
            try:
                if node not in self._lines:
                    self._lines[node] = self._ways[node]()
                return self._lines[node].ask(call, body or {})
            except ApiError as error:
                self._hang_up(node)
                raise SilentError(f"the agent of {node} cannot be asked: {error}") from error
            except KeyboardInterrupt:
                self._hang_up(node)  # the answer that is still to come must not be taken for the next one's
                raise

    def _hang_up(self, node: str) -> None:
        if line := self._lines.pop(node, None):
            line.close()

    def ask_all(
        self, call: str, body: Mapping[str, object] | None = None, nodes: Iterable[str] | None = None
    ) -> dict[str, Any | Silent]:
        """Each node's answer, asked at the same time; Silent where none came."""
        return self.each(lambda node: self.ask(node, call, body), nodes)

    def ask_each(self, call: str, bodies: Mapping[str, Mapping[str, object]]) -> dict[str, Any | Silent]:
        """As ask_all, with a body for each node."""
        return self.each(lambda node: self.ask(node, call, bodies[node]), bodies)

    def each(self, told: Callable[[str], T], nodes: Iterable[str] | None = None) -> dict[str, T | Silent]:
        """What `told` returns for each node, called at the same time; Silent where it raises SilentError."""
        asked = sorted(self._ways if nodes is None else nodes)
        if not asked:
            return {}

        def one(node: str) -> T | Silent:
            try:
                return told(node)
            except SilentError as error:
                return Silent(str(error))

        with ThreadPoolExecutor(min(len(asked), MOST_AT_ONCE)) as threads:
            return dict(zip(asked, threads.map(one, asked), strict=True))


@dataclass(frozen=True, slots=True)
class SocketLine:
    """An agent's socket on this machine."""

    socket: Path

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        """The answer to a call. Raises SilentError."""
        try:
            return ask(self.socket, call, body)
        except click.ClickException as error:
            raise SilentError(error.message) from error

    def close(self) -> None:
        """Nothing is held."""


class RelayLine:
    """`podwall relay` in an agent's Pod; one question at a time."""

    def __init__(self, client: ApiClient, namespace: str, pod: str) -> None:
        """Raises ApiError."""
        from agent.cluster.execute import Execution  # noqa: PLC0415 - it brings the API client with it

        self._execution = Execution(
            client, namespace, pod, container=CONTAINER, command=RELAY, limit_s=LIMIT_S
        )

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        """The answer to a call. Raises SilentError, ApiError."""
        self._execution.write(json.dumps({"call": call, "body": dict(body)}))
        return answered(self._execution.read_line())

    def close(self) -> None:
        """End the program."""
        self._execution.close()


def answered(line: str | bytes) -> Any:
    """What a line of `podwall relay` answers. Raises SilentError, also for what is no answer."""
    try:
        answer = json.loads(line)
        if "error" in answer:
            raise SilentError(str(answer["error"]))
        return answer["ok"]
    except (ValueError, KeyError, TypeError) as error:
        raise SilentError(f"`podwall relay` said what is no answer: {line[:200]!r}") from error


def by_sockets(sockets: Mapping[str, Path]) -> Agents:
    """The agents behind these sockets of this machine, by their nodes."""
    return Agents({node: lambda socket=socket: SocketLine(socket) for node, socket in sockets.items()})  # type: ignore[misc]


def by_api(client: ApiClient) -> Agents:
    """The agents that run as Pods of this cluster. Raises ApiError."""
    query = urlencode({"labelSelector": SELECTOR, "fieldSelector": "status.phase=Running"})
    pods = client.read(f"/api/v1/pods?{query}")["items"]

    def way(namespace: str, pod: str) -> Callable[[], Line]:
        return lambda: RelayLine(client, namespace, pod)

    return Agents(
        {
            pod["spec"]["nodeName"]: way(pod["metadata"]["namespace"], pod["metadata"]["name"])
            for pod in pods
            if "deletionTimestamp" not in pod["metadata"]
        }
    )
