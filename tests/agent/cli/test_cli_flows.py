"""`podwall flows --follow` with agents that say what a test lets them: order, once, ends, what is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from agent.cli.agents import Agents, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked
from agent.cli.flows import since
from agent.cli.follower import Follower, Wanted
from agent.cli.main import main

LONG_AGO = 1000.0
QUIET = {"denials": 0, "not_logged": 0, "flows": 0, "flow_overruns": 0}
CLIENT, WEB, CLUSTER = "10.244.0.2", "10.244.1.3", "10.96.0.7"
ALL = Wanted(denied=True, allowed=True)


class Told:
    """A node's agent: gives one answer after the other, then empty ones."""

    def __init__(self) -> None:
        self.answers: list[Mapping[str, Any] | str] = []
        self.asked: list[tuple[str, Mapping[str, object]]] = []

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        self.asked.append((call, body))
        answer = self.answers.pop(0) if self.answers else news()
        if isinstance(answer, str):
            raise SilentError(answer)
        return answer

    def close(self) -> None:
        pass


def news(
    *flows: Mapping[str, Any],
    denials: tuple[Mapping[str, Any], ...] = (),
    until: float = LONG_AGO,
    session: str = "s",
    **lost: int,
) -> dict[str, Any]:
    return {
        "session": session,
        "denials": list(denials),
        "flows": list(flows),
        "more": False,
        "until": until,
        "lost": {**QUIET, **lost},
    }


def flow(event: str, when: float, sport: int, *, asked: bool = False) -> dict[str, Any]:
    def end(address: str, port: int) -> dict[str, Any]:
        return {"address": address, "port": port, "pod": ""}

    return {
        "event": event,
        "time": when,
        "protocol": "tcp",
        "source": end(CLIENT, sport),
        "destination": end(WEB, 8080),
        "asked": end(CLUSTER, 80) if asked else None,
        "seen_source": None,
        "icmp": None,
        "status": 0,
    }


Nodes = tuple[Told, Told, Callable[[], Follower]]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    one, two = Told(), Told()
    with Agents({"one": lambda: one, "two": lambda: two}) as agents:
        asked = Asked((tmp_path,), False, None, "", "default")
        yield one, two, lambda: Follower(agents, agents.nodes, asked, ALL)


def told(follower: Follower) -> list[tuple[str, int]]:
    events, _ = follower.poll()
    return [(event.event, event.source.port) for event in events]


def test_nothing_is_told_before_all_have_said_what_was_before(nodes: Nodes) -> None:
    one, two, follow = nodes
    one.answers = [news(flow("begun", 105, 2), flow("begun", 110, 3), until=120)]
    two.answers = [news(until=107), news(flow("begun", 108, 4), until=130)]
    follower = follow()
    assert told(follower) == [("begun", 2)]
    assert told(follower) == [("begun", 4), ("begun", 3)]
    assert told(follower) == []


def test_what_both_nodes_see_is_told_once_also_when_the_second_is_late(nodes: Nodes) -> None:
    one, two, follow = nodes
    one.answers = [news(flow("begun", 100, 2, asked=True))]
    two.answers = [news(), news(flow("begun", 100.1, 2))]
    follower = follow()
    events, _ = follower.poll()
    assert [(event.node, event.asked.address if event.asked else "") for event in events] == [
        ("one", CLUSTER)
    ]
    assert told(follower) == []


def test_the_same_port_again_later_is_another_connection(nodes: Nodes) -> None:
    one, _, follow = nodes
    one.answers = [news(flow("begun", 100, 2)), news(flow("ended", 101, 2)), news(flow("begun", 102, 2))]
    follower = follow()
    assert [told(follower) for _ in range(3)] == [[("begun", 2)], [("ended", 2)], [("begun", 2)]]


def test_an_end_is_told_once_and_only_of_what_was_told_to_begin(nodes: Nodes) -> None:
    one, two, follow = nodes
    one.answers = [
        news(flow("ended", 99, 1), flow("begun", 100, 2, asked=True)),
        news(flow("ended", 101, 2, asked=True)),
    ]
    two.answers = [news(flow("begun", 100, 2)), news(flow("ended", 140, 2))]
    follower = follow()
    assert told(follower) == [("begun", 2)]
    assert told(follower) == [("ended", 2)]
    assert told(follower) == []


def test_what_is_lost_is_said_once_with_its_number(nodes: Nodes) -> None:
    one, _, follow = nodes
    one.answers = [news(not_logged=3), news(not_logged=3), news(not_logged=5)]
    follower = follow()
    counts = [[(each["what"], each["count"]) for each in follower.poll()[1]] for _ in range(3)]
    assert counts == [[("not_logged", 3)], [], [("not_logged", 2)]]


def test_a_silent_agent_is_said_once_and_stops_nobody(nodes: Nodes) -> None:
    one, two, follow = nodes
    two.answers = [news(), "gone", "gone", news(session="new")]
    one.answers = [news(), news(flow("begun", 100, 2)), news(), news()]
    follower = follow()
    said = []
    events = []
    for _ in range(4):
        found, notices = follower.poll()
        events += found
        said.append([(each["node"], each["why"]) for each in notices])
    assert [event.source.port for event in events] == [2]
    assert said[:3] == [[], [("two", "gone")], []]
    assert [node for node, why in said[3] if "answers again" in why] == ["two"]


def test_it_does_not_begin_when_nobody_answers(nodes: Nodes) -> None:
    one, two, follow = nodes
    one.answers, two.answers = ["gone"], ["gone"]
    with pytest.raises(Unreachable, match="gone"):
        follow()


def test_agents_are_told_the_end(nodes: Nodes) -> None:
    one, two, follow = nodes
    follow().close()
    assert one.asked[-1] == two.asked[-1] == ("unfollow", {"session": "s"})


TIMES = {
    "": 0.0,
    "30s": 9_970.0,
    "5m": 9_700.0,
    "1h30m": 4_600.0,
    "1970-01-01T01:00:00Z": 3_600.0,
    "1970-01-01T01:00:00": 3_600.0,
    "1970-01-01T02:00:00+01:00": 3_600.0,
}


@pytest.mark.parametrize("text", TIMES)
def test_since_is_an_age_or_a_time(text: str) -> None:
    assert since(text, 10_000.0) == TIMES[text]


@pytest.mark.parametrize("text", ["yesterday", "5", "m5", "-5m", "5m\x1b[2J"])
def test_what_is_neither_is_said(text: str) -> None:
    with pytest.raises(click.UsageError, match="is no age") as raised:
        since(text, 10_000.0)
    assert raised.value.message.isprintable()


def test_manifests_have_no_flows(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["flows", "-f", str(tmp_path)])
    assert (done.exit_code, "No such option '-f'" in done.output) == (2, True)


def test_a_cluster_without_agents_is_not_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asked, "agents", lambda _: Agents({}))
    done = CliRunner().invoke(main, ["flows"])
    assert (done.exit_code, "is podwall installed?" in done.output) == (3, True)
