"""A Pod's ADD waits for every policy that its namespace has: they may come later than the Pod."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import flows
from agent.cluster import watch as module
from agent.cluster.client import ApiClient
from agent.cluster.credentials import Credentials, CredentialSource
from agent.cluster.current import Current
from agent.cluster.errors import ApiError, Refused, Unreachable
from agent.cluster.model import Event, Kind, Upsert
from agent.cluster.watch import ApiSource, Timing
from agent.config import Config
from agent.datapath import KINDS, Datapath
from agent.reports import Reports
from lab import netns
from tests.agent.cluster.scripted import Scripted, answer, chunks, line, listing
from tests.agent.pods.world import attachment
from tests.agent.waiting import eventually

LIMIT_S = 10.0
LAG_S = 0.2
POLICY_KINDS: tuple[Kind, ...] = ("NetworkPolicy", "Namespace")
POLICIES, POLICIES_WATCH = "networkpolicies:list", "networkpolicies:watch"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)


def policies_at(*versions: int) -> bytes:
    """The policies of a namespace with these versions; the list's own is far ahead, as in a busy cluster."""
    items = [
        {"metadata": {"name": f"p{v}", "namespace": "shop", "resourceVersion": str(v)}} for v in versions
    ]
    return answer(200, json.dumps({"metadata": {"resourceVersion": "900"}, "items": items}).encode())


def namespace_at(version: int) -> bytes:
    body = {"metadata": {"name": "shop", "resourceVersion": str(version)}}
    return answer(200, json.dumps(body).encode())


def policy_line(version: str) -> bytes:
    """A watch's line: a policy `deny` that isolates everything in namespace shop."""
    meta = {"name": "deny", "namespace": "shop", "resourceVersion": version}
    return (
        json.dumps({"type": "ADDED", "object": {"metadata": meta, "spec": {"podSelector": {}}}}).encode()
        + b"\n"
    )


class Follower:
    """A source that is followed, and what it delivered."""

    def __init__(self, server: Scripted) -> None:
        given = Credentials(server.url)
        self.client = ApiClient(CredentialSource(lambda: given))
        self.source = ApiSource(self.client, POLICY_KINDS, timing=Timing(silence_s=60.0, lag_s=LAG_S))
        self.current = Current(self.client, self.source)
        self.events: list[Event] = []

    def policies(self) -> list[Any]:
        return [each.object.key for each in self.events if isinstance(each, Upsert)]


@contextlib.asynccontextmanager
async def following(server: Scripted) -> AsyncIterator[Follower]:
    """Both kinds are listed at version 5; the namespaces' watch says nothing."""
    server.say(POLICIES, listing("5"))
    server.say("namespaces:list", listing("5"))
    server.say("namespaces:watch", chunks(end=False))
    follower = Follower(server)
    task = asyncio.create_task(follower.source.run(follower.events.append))
    try:
        await eventually(lambda: all(state.delivered == 5 for state in follower.source.states.values()))
        yield follower
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        follower.client.close()


def story(server: Scripted, play: Callable[[Follower], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(LIMIT_S), following(server) as follower:
            await play(follower)

    asyncio.run(whole())


def test_a_policy_that_the_watch_has_not_brought_is_waited_for(server: Scripted) -> None:
    async def play(follower: Follower) -> None:
        server.say(POLICIES, policies_at(3, 9))
        server.say("shop:list", namespace_at(4))
        waiting = asyncio.create_task(follower.current.reach("shop"))
        await eventually(lambda: server.count("shop:list"))
        done, _ = await asyncio.wait([waiting], timeout=LAG_S / 2)
        assert (done, follower.policies()) == (set(), [])
        server.say(POLICIES_WATCH, chunks(policy_line("9"), end=False))
        await waiting
        assert follower.policies() == [("shop", "deny")]

    story(server, play)


def test_labels_that_the_watch_has_not_brought_are_waited_for(server: Scripted) -> None:
    async def play(follower: Follower) -> None:
        server.say(POLICIES, policies_at())
        server.say("shop:list", namespace_at(7))
        waiting = asyncio.create_task(follower.current.reach("shop"))
        await eventually(lambda: server.count("shop:list"))
        done, _ = await asyncio.wait([waiting], timeout=LAG_S / 2)
        assert not done
        server.say("namespaces:watch", chunks(line("MODIFIED", "7", "shop"), end=False))
        await waiting  # the silent watch was begun anew, and told it

    story(server, play)


def test_what_is_known_already_is_not_waited_for(server: Scripted) -> None:
    async def play(follower: Follower) -> None:
        server.say(POLICIES, policies_at(2, 5))
        server.say("shop:list", namespace_at(5))
        await follower.current.reach("shop")

    story(server, play)


def test_a_bookmark_tells_as_well(server: Scripted) -> None:
    async def play(follower: Follower) -> None:
        server.say(POLICIES, policies_at(9))
        server.say("shop:list", namespace_at(5))
        server.say(POLICIES_WATCH, chunks(line("BOOKMARK", "12"), end=False))
        await follower.current.reach("shop")

    story(server, play)


def test_a_namespace_that_is_gone_is_no_error(server: Scripted) -> None:
    async def play(follower: Follower) -> None:
        server.say(POLICIES, policies_at())
        server.say("shop:list", answer(404, b'{"code":404}'))
        await follower.current.reach("shop")

    story(server, play)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (answer(500, b"oops"), Refused),
        (answer(403, b'{"code":403}'), Refused),
        (answer(200, b"<html>proxy</html>"), Unreachable),
        (
            answer(
                200, b'{"metadata":{"resourceVersion":"9"},"items":[{"metadata":{"resourceVersion":"x"}}]}'
            ),
            Unreachable,
        ),
    ],
    ids=["failing", "forbidden", "no API", "versions that cannot be compared"],
)
def test_no_answer_is_an_error(server: Scripted, said: bytes, error: type[ApiError]) -> None:
    async def play(follower: Follower) -> None:
        server.say(POLICIES, said)
        with pytest.raises(error):
            await follower.current.reach("shop")

    story(server, play)


def test_fifty_pods_at_once_cost_two_questions(server: Scripted) -> None:
    """The second is for those who came while the first was under way."""

    async def play(follower: Follower) -> None:
        first = asyncio.create_task(follower.current.reach("shop"))
        await eventually(lambda: server.count(POLICIES) == 2)  # the list of all, and the first question
        others = [asyncio.create_task(follower.current.reach("shop")) for _ in range(49)]
        for _ in range(2):
            server.say(POLICIES, policies_at(4))
            server.say("shop:list", namespace_at(5))
        await asyncio.gather(first, *others)
        assert (server.count(POLICIES), server.count("shop:list")) == (3, 2)

    story(server, play)


def test_one_namespace_does_not_wait_for_another(server: Scripted) -> None:
    async def play(follower: Follower) -> None:
        stuck = asyncio.create_task(follower.current.reach("shop"))
        await eventually(lambda: server.count(POLICIES) == 2)
        server.say(POLICIES, policies_at(50))
        server.say("shop:list", namespace_at(5))
        await eventually(lambda: server.count("shop:list"))
        server.say(POLICIES, policies_at(4))
        server.say("other:list", namespace_at(5))
        await follower.current.reach("other")
        stuck.cancel()

    story(server, play)


# The whole ADD, as far as rules go: policy and Pod are created at once, and the policy's watch is late


@pytest.fixture
def node() -> Iterator[Path]:
    yield netns.create("podwall-currenttest")
    netns.remove("podwall-currenttest")


@pytest.fixture
def server_inside(node: Path) -> Iterator[Scripted]:
    scripted = netns.run(node, Scripted)
    yield scripted
    scripted.close()


def test_a_pod_is_isolated_when_its_add_answers(server_inside: Scripted, node: Path) -> None:
    server = server_inside
    pod = {
        "metadata": {"name": "api", "namespace": "shop", "uid": "u1", "resourceVersion": "8"},
        "spec": {"nodeName": "node1", "containers": []},
    }
    api = attachment(namespace="shop", pod="api", pod_uid="u1")

    async def add() -> None:
        given = Credentials(server.url)
        client = ApiClient(CredentialSource(lambda: given))
        source = ApiSource(client, KINDS, timing=Timing(silence_s=60.0))
        datapath = Datapath(
            Config(node_name="node1"),
            reach=Current(client, source).reach,
            find_pod=no_pod,
            local_addresses=no_addresses,
            reports=Reports(no_event),
            committed=lambda: None,
        )
        for kind in ("nodes", "namespaces", "networkpolicies", "pods"):
            server.say(f"{kind}:list", listing("5"))
        server.say(
            "pods:watch", chunks(json.dumps({"type": "ADDED", "object": pod}).encode() + b"\n", end=False)
        )
        server.say(POLICIES, policies_at(7))
        server.say("shop:list", namespace_at(5))
        await datapath.kernel.start()
        datapath.adopt([])
        datapath.no_plan()
        tasks = [
            asyncio.create_task(source.run(lambda event: ignore(datapath.take(event)))),
            asyncio.create_task(datapath.reconcile()),
        ]
        try:
            await eventually(lambda: ("shop", "api") in datapath.store.snapshot.pods)
            await eventually(lambda: server.count(POLICIES))  # whoever asks again is the ADD
            adding = asyncio.create_task(datapath.attached(api))
            await eventually(lambda: server.count("shop:list"))
            done, _ = await asyncio.wait([adding], timeout=0.2)
            assert not done
            server.say(POLICIES_WATCH, chunks(policy_line("7"), end=False))
            await adding
            assert flows.isolated(datapath.rules.ruleset) == set(api.addresses)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await datapath.kernel.stop()
            client.close()

    async def whole() -> None:
        async with asyncio.timeout(LIMIT_S):
            await add()

    netns.run(node, asyncio.run, whole())


async def no_pod(namespace: str, name: str) -> None:
    raise AssertionError(f"{namespace}/{name} was in the store")


async def no_addresses() -> frozenset[Any]:
    return frozenset()


async def no_event(report: Any) -> None:
    raise AssertionError(report)


def ignore(_: object) -> None:
    """What was delivered is in the store."""
