"""The agents of a cluster are asked all at once, and one that is silent hides none of the others."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.cli.agents import Agents, Line, Silent, SilentError, answered, by_sockets
from agent.cluster.errors import Unreachable
from cni import wire


class Echo:
    """A line that answers with what it was asked, and counts."""

    def __init__(self, node: str) -> None:
        self.node, self.asked, self.closed = node, 0, 0

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        self.asked += 1
        return {"node": self.node, "call": call, **body}

    def close(self) -> None:
        self.closed += 1


class Broken(Echo):
    """A line that breaks at each question."""

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        self.asked += 1
        raise Unreachable("connection reset")


class Interrupted(Echo):
    """A line at which somebody presses Ctrl-C before the answer has come."""

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        raise KeyboardInterrupt


def test_each_node_is_asked_and_named() -> None:
    with Agents({name: lambda name=name: Echo(name) for name in ("b", "a")}) as agents:  # type: ignore[misc]
        assert agents.nodes == ["a", "b"]
        answers = agents.ask_all("flows", {"last": 3})
    assert answers == {name: {"node": name, "call": "flows", "last": 3} for name in ("a", "b")}


def test_a_line_is_made_once_and_hung_up_at_the_end() -> None:
    made: list[Echo] = []

    def way() -> Line:
        made.append(Echo("a"))
        return made[-1]

    with Agents({"a": way}) as agents:
        agents.ask("a", "status")
        agents.ask("a", "status")
    assert [(line.asked, line.closed) for line in made] == [(2, 1)]


def test_a_broken_line_is_hung_up_and_made_anew() -> None:
    lines: list[Echo] = [Broken("a"), Echo("a")]
    ways = iter(lines)
    with Agents({"a": lambda: next(ways)}) as agents:
        with pytest.raises(SilentError, match="the agent of a cannot be asked: connection reset"):
            agents.ask("a", "status")
        assert agents.ask("a", "status")["node"] == "a"
    assert [line.closed for line in lines] == [1, 1]


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next() -> None:
    lines: list[Echo] = [Interrupted("a"), Echo("a")]
    ways = iter(lines)
    with Agents({"a": lambda: next(ways)}) as agents:
        with pytest.raises(KeyboardInterrupt):
            agents.ask("a", "bench.open")
        assert agents.ask("a", "bench.close")["call"] == "bench.close"
    assert [line.closed for line in lines] == [1, 1]


def test_one_silent_agent_hides_none() -> None:
    with Agents({"a": lambda: Echo("a"), "b": lambda: Broken("b")}) as agents:
        answers = agents.ask_all("status")
    assert answers["a"]["node"] == "a"
    assert isinstance(answers["b"], Silent)
    assert "connection reset" in answers["b"].why


def test_a_node_without_an_agent_is_named() -> None:
    with Agents({}) as agents, pytest.raises(SilentError, match="node c has no podwall agent"):
        agents.ask("c", "status")


def test_nobody_asked_is_nobody_answering() -> None:
    with Agents({}) as agents:
        assert agents.ask_all("status") == {}


LINES = {
    "no JSON": b"OCI runtime exec failed",
    "no object": b"[1]",
    "neither": b"{}",
    "a number": b"7",
}


@pytest.mark.parametrize("case", LINES)
def test_what_is_no_answer_is_told_as_it_came(case: str) -> None:
    with pytest.raises(SilentError, match="no answer"):
        answered(LINES[case])


def test_a_refusal_is_in_the_agents_own_words() -> None:
    with pytest.raises(SilentError, match="no such call 'x'"):
        answered(b'{"error": "no such call \'x\'"}')
    assert answered(b'{"ok": null}') is None


# Sockets of this machine


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """One agent that answers, one that refuses, and one whose socket nobody listens on."""
    answers = {"yes": wire.Answer({"ready": True}), "no": wire.Failure(50, "not yet")}
    with ExitStack() as stack:
        for name, answer in answers.items():
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(tmp_path / name))
            listening.listen()
            thread = threading.Thread(target=_serve, args=(listening, answer.encode()), daemon=True)
            thread.start()
            stack.callback(thread.join, 5)
            stack.callback(listening.shutdown, socket.SHUT_RDWR)
        yield {name: tmp_path / name for name in (*answers, "gone")}


def _serve(listening: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)


def test_sockets_answer_refuse_or_are_silent(sockets: dict[str, Path]) -> None:
    with by_sockets(sockets) as agents:
        answers = agents.ask_all("status")
    assert answers["yes"] == {"ready": True}
    assert answers["no"] == Silent("not yet")
    assert str(sockets["gone"]) in answers["gone"].why
