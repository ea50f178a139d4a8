"""The turns that `podwall bench` asks the agents for, and what it makes of their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from agent.cli.agents import Agents, SilentError
from agent.cli.ask import Unreachable
from agent.cli.bench import LEAST_ROUNDS, Way, content, lines, measured, nodes_of, service_of
from agent.cli.cluster import Asked
from agent.cli.main import main

SERVER = {"node1": "10.244.1.9", "node2": "10.244.2.9"}
RAW = "198.18.0.2"
SPEED = {RAW: 100.0, "10.244.1.9": 80.0, "10.244.2.9": 50.0, "10.96.0.7": 75.0}


class Node:
    """An agent that measures as SPEED says."""

    def __init__(self, name: str, failing: Mapping[str, str] | None = None) -> None:
        self.name, self.failing = name, failing or {}
        self.asked: list[tuple[str, Mapping[str, Any]]] = []

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        self.asked.append((call, body))
        assert body["id"] == self.asked[0][1]["id"]
        return getattr(self, call.removeprefix("bench."), lambda _: None)(body)

    def open(self, body: Mapping[str, object]) -> dict[str, object]:
        return {"addresses": [SERVER[self.name], "fd00::9"], "raw": RAW, "ports": {}}

    def measure(self, body: Mapping[str, object]) -> dict[str, object]:
        address = str(body["address"])
        if address in self.failing:
            return {"error": self.failing[address]}
        speed = SPEED[address]
        if body["what"] == "throughput":
            return {"bits_per_second": speed * 1e8}
        return {"per_second": speed, "p50_us": 1e4 / speed, "p99_us": 1e5 / speed}

    def close(self, _: object = None) -> None:
        pass

    def calls(self, name: str) -> list[Mapping[str, Any]]:
        return [body for call, body in self.asked if call == name]


def run(*nodes: Node, service: tuple[str, str, int] | None = None, duration: float = 10.0) -> Sequence[Way]:
    with Agents({node.name: lambda node=node: node for node in nodes}) as agents:  # type: ignore[misc]
        client, server = nodes_of(agents, "", "")
        return measured(agents, client, server, service, duration)


def test_each_round_takes_every_way_and_the_first_is_another_each_time() -> None:
    one, two = Node("node1"), Node("node2")

    run(one, two)

    turns = [(body["address"], body["what"]) for body in one.calls("bench.measure")]
    per_round = len(turns) // LEAST_ROUNDS
    rounds = [turns[number * per_round : (number + 1) * per_round] for number in range(LEAST_ROUNDS)]
    assert all(sorted(each) == sorted(rounds[0]) for each in rounds)
    assert [each[0][0] for each in rounds[:3]] == [RAW, SERVER["node1"], SERVER["node2"]]
    assert two.calls("bench.measure") == []
    assert len(two.calls("bench.stay")) == LEAST_ROUNDS, "its agent must not take it away meanwhile"


@pytest.mark.parametrize(("duration", "rounds", "seconds"), [(9.0, 5, 0.2), (1.0, 5, 0.05), (90.0, 10, 1.0)])
def test_the_duration_is_shared_by_all_turns(duration: float, rounds: int, seconds: float) -> None:
    one = Node("node1")

    ways = run(one, Node("node2"), duration=duration)

    assert {body["seconds"] for body in one.calls("bench.measure")} == {seconds}
    assert {len(way.rounds) for way in ways} == {rounds}


def test_every_session_is_closed() -> None:
    one, two = Node("node1"), Node("node2")

    run(one, two)

    assert (one.asked[-1][0], two.asked[-1][0]) == ("bench.close", "bench.close")


def test_also_when_a_turn_gets_no_answer() -> None:
    class Lost(Node):
        def measure(self, body: Mapping[str, object]) -> dict[str, object]:
            raise SilentError("gone")

    one, two = Lost("node1"), Node("node2")
    with pytest.raises(SilentError):
        run(one, two)

    assert (one.asked[-1][0], two.asked[-1][0]) == ("bench.close", "bench.close")


def test_also_when_it_is_interrupted_before_the_answer() -> None:
    class Slow(Node):
        def open(self, body: Mapping[str, object]) -> dict[str, object]:
            raise KeyboardInterrupt

    one, two = Node("node1"), Slow("node2")
    with pytest.raises(KeyboardInterrupt):
        run(one, two)

    for node in (one, two):
        assert [call for call, _ in node.asked] == ["bench.open", "bench.close"]


def test_figures_stand_beside_the_bare_pair() -> None:
    ways = run(Node("node1"), Node("node2"), service=("shop/web", "10.96.0.7", 80))

    told = content("node1", "node2", 10.0, ways)
    assert [each["way"] for each in told["ways"]] == ["raw", "pod", "service", "node"]
    assert [each["connections"]["percent_of_raw"] for each in told["ways"]] == [100, 80, 75, 50]
    assert [each["requests"] and each["requests"]["p50_us"] for each in told["ways"]] == [100, 125, None, 200]
    head, _, _, web, node = lines(ways, wide=False)
    assert head.split()[:3] == ["WAY", "CONNECTIONS/S", "OF"]
    assert "Service shop/web:80" in web
    assert web.split()[-1] == "<none>"
    assert "Pod on node1 to Pod on node2" in node
    assert node.endswith("5.0 Gbit/s    50 %")


def test_a_way_that_fails_is_told_and_hides_no_other() -> None:
    ways = run(Node("node1", {"10.244.2.9": "Connection refused"}), Node("node2"))

    told = content("node1", "node2", 10.0, ways)["ways"]
    assert [each["error"] for each in told] == ["", "", "Connection refused"]
    assert [each["connections"] is None for each in told] == [False, False, True]
    assert list(lines(ways, wide=True))[-1] == "Pod on node1 to Pod on node2: Connection refused"


def test_a_cluster_of_one_node() -> None:
    assert [way.name for way in run(Node("node1"))] == ["raw", "pod"]


CHOSEN = {
    "none": (("", ""), ("node1", "node2")),
    "the server": (("", "node1"), ("node2", "node1")),
    "the client": (("node2", ""), ("node2", "node1")),
    "both": (("node2", "node1"), ("node2", "node1")),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_which_nodes(case: str) -> None:
    named, chosen = CHOSEN[case]
    with Agents({"node1": lambda: Node("node1"), "node2": lambda: Node("node2")}) as agents:
        assert nodes_of(agents, *named) == chosen


WRONG = {
    "unknown": (("node7", ""), "node node7 has no podwall agent; these have: node1, node2"),
    "the same": (("node1", "node1"), "--from and --to are the same node"),
}


@pytest.mark.parametrize("case", WRONG)
def test_nodes_that_cannot_be(case: str) -> None:
    named, why = WRONG[case]
    with (
        Agents({"node1": lambda: Node("node1"), "node2": lambda: Node("node2")}) as agents,
        pytest.raises(click.UsageError, match=why),
    ):
        nodes_of(agents, *named)


def test_a_cluster_without_agents_is_said_to_be_one() -> None:
    with Agents({}) as agents, pytest.raises(Unreachable, match="is podwall installed"):
        nodes_of(agents, "", "")


def test_manifests_cannot_be_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "-f", str(tmp_path)])
    assert (done.exit_code, "No such option '-f'" in done.output) == (2, True)


SERVICES = {"web": "such as web:80", "web:80": "there is no Service default/web"}


@pytest.mark.parametrize("text", SERVICES)
def test_a_service_that_cannot_be_asked(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n")
    asked = Asked((tmp_path,), lab=False, kubeconfig=None, context="", namespace="default")
    with pytest.raises(click.UsageError, match=SERVICES[text]):
        service_of(asked, text)
