"""Following a server that says exactly what a script tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable

import pytest

from agent.cluster import watch as module
from agent.cluster.client import ApiClient
from agent.cluster.credentials import Credentials, CredentialSource
from agent.cluster.model import Event, Kind, Remove, Synced, Upsert
from agent.cluster.watch import ApiSource, Timing, back_off
from tests.agent.cluster.scripted import Scripted, answer, chunks, line, listing

GONE = json.dumps(
    {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}
).encode()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(module, "SHORTEST_WATCH_S", 0.0)


def follow(
    server: Scripted, until: Callable[[list[Event], ApiSource], object], kinds: tuple[Kind, ...] = ("Node",)
) -> tuple[list[Event], ApiSource]:
    """Follow until the condition holds."""

    async def story() -> tuple[list[Event], ApiSource]:
        given = Credentials(server.url)
        source = ApiSource(ApiClient(CredentialSource(lambda: given)), kinds, timing=Timing(silence_s=5.0))
        events: list[Event] = []
        task = asyncio.create_task(source.run(events.append))
        end = time.monotonic() + 20
        while not until(events, source):
            assert time.monotonic() < end, f"{events} {server.asked} {source.states[kinds[0]].error}"
            assert not task.done()
            await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return events, source

    return asyncio.run(story())


def told(events: list[Event]) -> list[str]:
    """Events in few words."""
    words = []
    for event in events:
        if isinstance(event, Upsert):
            words.append(f"+{event.object.key}")
        elif isinstance(event, Remove):
            words.append(f"-{event.key}")
        else:
            words.append("synced")
    return words


def has(name: str) -> Callable[[list[Event], ApiSource], bool]:
    return lambda events, _: f"+{name}" in told(events)


def test_pages_then_watch_from_the_lists_version(server: Scripted) -> None:
    server.say("nodes:list", listing("5", "a", "b", continues="next"))
    server.say("nodes:list", listing("5", "c"))
    server.say("nodes:watch", chunks(line("ADDED", "6", "d"), end=False))
    events, _ = follow(server, has("d"))
    assert told(events) == ["+a", "+b", "+c", "synced", "+d"]
    assert [query.get("continue") for _, query in server.asked] == [None, "next", None]
    assert server.asked[-1][1]["resourceVersion"] == "5"
    assert server.asked[-1][1]["allowWatchBookmarks"] == "true"


@pytest.mark.parametrize("how", ["event", "status"])
def test_gone_is_one_list_of_that_kind_only(server: Scripted, how: str) -> None:
    gone = chunks(line("ADDED", "6", "new"), GONE) if how == "event" else answer(410, b'{"code":410}')
    server.say("nodes:list", listing("5", "stays", "goes"))
    server.say("nodes:watch", gone)
    server.say("nodes:list", listing("9", "stays", "later"))
    server.say("nodes:watch", chunks(line("ADDED", "10", "last"), end=False))
    server.say("namespaces:list", listing("5", "default"))
    server.say("namespaces:watch", chunks(end=False))
    events, source = follow(server, has("last"), ("Node", "Namespace"))
    assert server.count("nodes:list") == 2
    assert server.count("namespaces:list") == 1
    assert (server.count("nodes:watch"), server.asked[-1][1]["resourceVersion"]) == (2, "9")
    nodes = [word for word in told(events) if word != "+default"]
    removed = {word for word in nodes if word.startswith("-")}
    assert removed == ({"-goes", "-new"} if how == "event" else {"-goes"})
    assert sum(isinstance(event, Synced) for event in events) == 2
    assert source.states["Node"].lists == 2


def test_a_page_that_comes_too_late_begins_the_list_anew(server: Scripted) -> None:
    server.say("nodes:list", listing("5", "a", continues="next"))
    server.say("nodes:list", answer(410, b'{"code":410,"reason":"Expired"}'))
    server.say("nodes:list", listing("7", "b"))
    server.say("nodes:watch", chunks(end=False))
    events, _ = follow(server, lambda events, _: "synced" in told(events))
    assert told(events) == ["+a", "+b", "-a", "synced"]


def test_bookmarks_count_when_a_watch_ends(server: Scripted) -> None:
    server.say("nodes:list", listing("5"))
    server.say("nodes:watch", chunks(line("BOOKMARK", "42")))
    server.say("nodes:watch", chunks(line("ADDED", "43", "a"), end=False))
    follow(server, has("a"))
    assert [query["resourceVersion"] for what, query in server.asked if what == "nodes:watch"] == ["5", "42"]


def test_a_line_cut_in_two_and_two_in_one(server: Scripted) -> None:
    first, second, third = (line("ADDED", str(6 + number), f"n{number}") for number in range(3))
    server.say("nodes:list", listing("5"))
    server.say("nodes:watch", chunks(first[:20], first[20:] + second + third[:1], third[1:], end=False))
    events, _ = follow(server, has("n2"))
    assert told(events) == ["synced", "+n0", "+n1", "+n2"]


def test_a_connection_that_breaks_within_a_line(server: Scripted) -> None:
    whole, cut = line("ADDED", "6", "a"), line("ADDED", "7", "b")
    server.say("nodes:list", listing("5"))
    server.say("nodes:watch", answer(200, whole + cut[:30], "Connection: close"))
    server.say("nodes:watch", chunks(cut, end=False))
    events, _ = follow(server, has("b"))
    assert told(events) == ["synced", "+a", "+b"]
    assert server.asked[-1][1]["resourceVersion"] == "6"
    assert server.count("nodes:list") == 1


def test_nonsense_is_no_event(server: Scripted) -> None:
    server.say("nodes:list", listing("5"))
    server.say("nodes:watch", chunks(line("ADDED", "6", "a") + b"<html>proxy error</html>\n"))
    server.say("nodes:watch", chunks(line("ADDED", "7", "b"), end=False))
    events, source = follow(server, has("b"))
    assert told(events) == ["synced", "+a", "+b"]
    assert source.states["Node"].failures == 1
    assert server.asked[-1][1]["resourceVersion"] == "6"


def test_an_object_that_cannot_be_used_is_counted_and_passed_over(server: Scripted) -> None:
    server.say("nodes:list", listing("5"))
    bad = json.dumps({"type": "ADDED", "object": {"metadata": {"name": 7, "resourceVersion": "6"}}}).encode()
    server.say("nodes:watch", chunks(bad + b"\n" + line("ADDED", "7", "a"), end=False))
    events, source = follow(server, has("a"))
    assert told(events) == ["synced", "+a"]
    assert source.states["Node"].refused == 1


def test_a_server_that_asks_to_wait(server: Scripted) -> None:
    server.say("nodes:list", answer(429, b"", "Retry-After: 1"))
    server.say("nodes:list", listing("5", "a"))
    begun = time.monotonic()
    follow(server, has("a"))
    assert time.monotonic() - begun >= 1.0


def test_a_version_from_the_future_is_listed_anew(server: Scripted) -> None:
    """After a restore from a backup the server's versions are older than ours."""
    server.say("nodes:list", listing("5000", "a", "lost"))
    server.say(
        "nodes:watch", answer(504, b'{"code":504,"reason":"Timeout","message":"Too large resource version"}')
    )
    server.say("nodes:list", listing("100", "a"))
    server.say("nodes:watch", chunks(line("ADDED", "101", "b"), end=False))
    events, _ = follow(server, has("b"))
    assert told(events) == ["+a", "+lost", "synced", "+a", "-lost", "+b"]


def test_a_refused_watch_keeps_its_version(server: Scripted) -> None:
    server.say("nodes:list", listing("5"))
    server.say("nodes:watch", answer(500, b"oops"))
    server.say("nodes:watch", answer(403, b'{"code":403,"message":"no"}'))
    server.say("nodes:watch", chunks(line("ADDED", "6", "a"), end=False))
    _, source = follow(server, has("a"))
    assert (server.count("nodes:list"), source.states["Node"].failures) == (1, 2)


def test_back_off_grows_to_its_limit_and_differs() -> None:
    assert 0.0 < back_off(1) <= module.FIRST_WAIT_S
    assert module.LONGEST_WAIT_S / 2 <= back_off(1000) <= module.LONGEST_WAIT_S
    assert len({back_off(10) for _ in range(10)}) > 1
