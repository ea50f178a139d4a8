"""Following a real API server through all that befalls it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_network
from typing import Any

from agent.cluster.client import ApiClient, Selection
from agent.cluster.credentials import CredentialSource
from agent.cluster.model import Event, Kind, Node, Remove, Synced, Upsert
from agent.cluster.store import Store
from agent.cluster.watch import ApiSource, Timing
from tests.agent import waiting

LIMIT_S = 60.0
TIMING = Timing()

eventually = partial(waiting.eventually, limit_s=LIMIT_S)


class Follower:
    """A source, the store it fills, and all that it said."""

    def __init__(self, source: ApiSource) -> None:
        self.source = source
        self.store = Store()
        self.events: list[Event] = []
        self.threads: set[int] = set()

    def take(self, event: Event) -> None:
        self.threads.add(threading.get_ident())
        self.events.append(event)
        self.store.apply(event)

    def said(self, *kinds: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kinds)]


@contextlib.asynccontextmanager
async def following(
    client: ApiClient, kinds: Iterable[Kind] = ("Node",), timing: Timing = TIMING, **options: Any
) -> AsyncIterator[Follower]:
    follower = Follower(ApiSource(client, kinds, timing=timing, **options))
    task = asyncio.create_task(follower.source.run(follower.take))
    try:
        await eventually(lambda: follower.store.synced >= set(kinds) or task.done(), what="synced")
        yield follower
    finally:
        begun = time.monotonic()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert time.monotonic() - begun < 1.0, "cancelling took too long"
        client.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("podwall-watch")]


def node(name: str, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDRs": ["10.244.7.0/24", "fd00:7::/64"]},
    }


def names(follower: Follower) -> set[str]:
    return set(follower.store.snapshot.nodes)


def test_lists_then_follows(cluster: Any) -> None:
    async def story() -> None:
        cluster.b.create("/api/v1/nodes", node("first"))
        async with following(cluster.client()) as follower:
            assert names(follower) == {"first"}
            assert follower.events[-1] == Synced("Node")
            cidrs = follower.store.snapshot.nodes["first"].pod_cidrs
            assert cidrs == (ip_network("10.244.7.0/24"), ip_network("fd00:7::/64"))
            cluster.b.create("/api/v1/nodes", node("second"))
            await eventually(lambda: names(follower) == {"first", "second"})
            cluster.b.call("PATCH", "/api/v1/nodes/second", {"metadata": {"labels": {"zone": "x"}}})
            await eventually(lambda: follower.store.snapshot.nodes["second"].labels.get("zone") == "x")
            cluster.b.call("DELETE", "/api/v1/nodes/first")
            await eventually(lambda: names(follower) == {"second"})
            assert follower.events[-1] == Remove("Node", "first")
            assert follower.threads == {threading.get_ident()}

    asyncio.run(story())


def test_only_the_selected(cluster: Any) -> None:
    async def story() -> None:
        for name in ("mine", "other"):
            cluster.b.create("/api/v1/nodes", node(name))
        selections: dict[Kind, Selection] = {"Node": Selection(fields="metadata.name=mine")}
        async with following(cluster.client(), selections=selections) as follower:
            assert names(follower) == {"mine"}

    asyncio.run(story())


def test_two_thousand_objects_in_pages(cluster: Any) -> None:
    def create(number: int) -> None:
        body = {
            "metadata": {"name": f"web-{number}", "labels": {"app": f"a{number % 7}"}},
            "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}]},
        }
        cluster.b.create("/api/v1/namespaces/default/pods", body)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(2000)))

    async def story() -> None:
        requests = Requests(cluster.client())
        async with following(requests.client, ("Pod",), Timing(page=300)) as follower:
            assert len(follower.store.snapshot.pods) == 2000
            assert requests.lists() == 7
            assert len(follower.said(Upsert)) == 2000
            cluster.b.call("DELETE", "/api/v1/namespaces/default/pods?gracePeriodSeconds=0")
            await eventually(lambda: not follower.store.snapshot.pods)

    asyncio.run(story())


def test_a_closed_watch_goes_on_where_it_was(cluster: Any) -> None:
    async def story() -> None:
        cluster.b.create("/api/v1/nodes", node("first"))
        async with following(cluster.client(), timing=Timing(watch_s=(1, 1))) as follower:
            state = follower.source.states["Node"]
            await eventually(lambda: state.watches >= 4)
            cluster.b.create("/api/v1/nodes", node("second"))
            await eventually(lambda: names(follower) == {"first", "second"})
            assert (state.lists, state.failures) == (1, 0)
            assert len(follower.said(Upsert)) == 2

    asyncio.run(story())


def test_bookmarks_move_the_version_on(cluster: Any) -> None:
    """The selected Node does not change, only others do: the server says so before it ends the watch."""

    async def story() -> None:
        cluster.b.create("/api/v1/nodes", node("mine"))
        selections: dict[Kind, Selection] = {"Node": Selection(fields="metadata.name=mine")}
        timing = Timing(watch_s=(4, 4))
        async with following(cluster.client(), timing=timing, selections=selections) as follower:
            state = follower.source.states["Node"]
            listed = state.version
            for number in range(3):
                cluster.b.create("/api/v1/nodes", node(f"other-{number}"))
            await eventually(lambda: int(state.version) > int(listed), what="a bookmark")
            assert (state.lists, state.events) == (1, 0)

    asyncio.run(story())


def test_killed_and_started_again(cluster: Any) -> None:
    async def story() -> None:
        cluster.b.create("/api/v1/nodes", node("stays"))
        cluster.b.create("/api/v1/nodes", node("goes"))
        async with following(cluster.client(), ("Node", "Namespace")) as follower:
            state = follower.source.states["Node"]
            cluster.a.kill()
            await eventually(lambda: state.failures >= 2)
            assert "Connection refused" in state.error
            cluster.b.call("DELETE", "/api/v1/nodes/goes")
            cluster.b.create("/api/v1/nodes", node("comes"))
            assert names(follower) == {"stays", "goes"}
            await asyncio.to_thread(cluster.a.start)
            await eventually(lambda: names(follower) == {"stays", "comes"})
            assert follower.said(Remove) == [Remove("Node", "goes")]
            assert len(follower.said(Synced)) == 2
            assert state.lists <= 2

    asyncio.run(story())


def test_gone_lists_that_kind_once(cluster: Any) -> None:
    """While the server is away Nodes change, then history is forgotten: the Nodes' version is gone."""

    async def story() -> None:
        cluster.b.create("/api/v1/nodes", node("goes"))
        async with following(cluster.client(), ("Node", "Namespace")) as follower:
            state = follower.source.states["Node"]
            cluster.a.kill()
            cluster.b.call("DELETE", "/api/v1/nodes/goes")
            for number in range(5):
                cluster.b.create("/api/v1/nodes", node(f"comes-{number}"))
            cluster.compact()
            await asyncio.to_thread(cluster.a.start)
            await eventually(lambda: names(follower) == {f"comes-{number}" for number in range(5)})
            assert state.lists == 2
            assert follower.said(Remove) == [Remove("Node", "goes")]
            cluster.b.create("/api/v1/nodes", node("later"))
            await eventually(lambda: "later" in names(follower))
            assert state.lists == 2
            assert len(follower.said(Synced)) == 2

    asyncio.run(story())


def test_a_frozen_server_is_left(cluster: Any) -> None:
    """Its connections stay open and silent; the watch notices, and goes on when the server does."""

    async def story() -> None:
        cluster.b.create("/api/v1/nodes", node("first"))
        async with following(cluster.client(), timing=Timing(silence_s=1.0)) as follower:
            state = follower.source.states["Node"]
            cluster.a.send(signal.SIGSTOP)
            try:
                await eventually(lambda: "no answer in time" in state.error)
                assert names(follower) == {"first"}
                cluster.b.create("/api/v1/nodes", node("second"))
            finally:
                cluster.a.send(signal.SIGCONT)
            await eventually(lambda: names(follower) == {"first", "second"})
            assert state.lists == 1

    asyncio.run(story())


def test_rotated_token(cluster: Any, tmp_path: Any) -> None:
    """The old token is not accepted any more; the new one is in the file, and is taken from there."""
    from agent.cluster.credentials import from_service_account

    (tmp_path / "ca.crt").write_bytes((cluster.directory / "ca.crt").read_bytes())
    token = tmp_path / "token"
    token.write_text("podwall-old-token")
    cluster.write_tokens("podwall-test-token", "podwall-old-token")
    cluster.a.kill()
    cluster.a.start()
    client = ApiClient(CredentialSource(lambda: from_service_account(tmp_path, cluster.a.url)))

    async def story() -> None:
        async with following(client) as follower:
            state = follower.source.states["Node"]
            cluster.write_tokens("podwall-test-token")
            cluster.a.kill()
            await asyncio.to_thread(cluster.a.start)
            await eventually(lambda: "401" in state.error)
            token.write_text("podwall-test-token")
            cluster.b.create("/api/v1/nodes", node("after"))
            await eventually(lambda: "after" in names(follower))

    asyncio.run(story())


def test_no_server_at_start(cluster: Any) -> None:
    async def story() -> None:
        cluster.a.kill()
        follower = Follower(ApiSource(cluster.client(), ("Node",)))
        task = asyncio.create_task(follower.source.run(follower.take))
        await eventually(lambda: follower.source.states["Node"].failures >= 3)
        assert not follower.events
        await asyncio.to_thread(cluster.a.start)
        await eventually(lambda: "Node" in follower.store.synced)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(story())


def test_cancelled_while_the_server_is_frozen(cluster: Any) -> None:
    async def story() -> None:
        async with following(cluster.client(), ("Node", "Pod", "Namespace")):
            cluster.a.send(signal.SIGSTOP)

    try:
        asyncio.run(story())
    finally:
        cluster.a.send(signal.SIGCONT)


def test_a_slow_taker_holds_the_thread_back_not_the_loop(cluster: Any) -> None:
    for number in range(40):
        cluster.b.create("/api/v1/nodes", node(f"n{number}"))

    async def story() -> None:
        taken: list[Event] = []

        def take(event: Event) -> None:
            time.sleep(0.002)
            taken.append(event)

        task = asyncio.create_task(ApiSource(cluster.client(), ("Node",)).run(take))
        await eventually(lambda: len(taken) == 41)
        assert [e.object.name for e in taken if isinstance(e, Upsert) and isinstance(e.object, Node)]
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(story())


def test_a_taker_that_fails_ends_the_source(cluster: Any) -> None:
    def take(_: Event) -> None:
        raise RuntimeError("cannot take it")

    async def story() -> str:
        try:
            await asyncio.wait_for(ApiSource(cluster.client(), ("Namespace",)).run(take), LIMIT_S)
        except RuntimeError as error:
            return str(error)
        return ""

    assert asyncio.run(story()) == "cannot take it"


class Requests:
    """Counts what a client's connections ask."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client
        self.asked: list[str] = []
        make = client.connection

        def counted() -> Any:
            connection = make()
            request = connection.request

            def asked(method: str, target: str, *rest: Any, **options: Any) -> Any:
                self.asked.append(target)
                return request(method, target, *rest, **options)

            connection.request = asked  # type: ignore[method-assign]
            return connection

        client.connection = counted  # type: ignore[method-assign]

    def lists(self) -> int:
        return sum("limit=" in target for target in self.asked)
