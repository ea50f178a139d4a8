"""Services from the store to the kernel: what is committed when, what is left alone, and who serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from agent import datapath, kube_proxy, metrics
from agent.cluster.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Event,
    IPAddress,
    Node,
    Remove,
    Service,
    ServicePort,
    Synced,
    Upsert,
)
from agent.cluster.store import Store
from agent.compile import links
from agent.config import Config
from agent.nft.diff import Changes
from agent.nft.kernel import Kernel, NftError
from agent.pods.model import Attachment
from agent.reports import Reports
from agent.rules import Rules
from agent.services import KINDS, Services
from cni.spec import PortMapping
from tests.agent.pods.world import attachment
from tests.linux import command, own_netns

LIMIT_S = 20.0
NODE = Node(
    name="node1", internal_ips=(ip_address("172.18.0.2"),), pod_cidrs=(ip_network("10.244.1.0/24"),), uid="n"
)
WEB = Service(
    namespace="default",
    name="web",
    uid="w",
    cluster_ips=(ip_address("10.96.0.10"), ip_address("fd00:96::10")),
    ip_families=(4, 6),
    ports=(ServicePort(80, name="http", target_port=8080),),
    selector={"app": "web"},
)
STICKY = replace(
    WEB, name="sticky", uid="s", cluster_ips=(ip_address("10.96.0.11"),), session_affinity="ClientIP"
)
TABLE = ("inet", "podwall_services")
POD = attachment(
    addresses=(ip_address("10.244.1.9"), ip_address("fd00:244:1::9")),
    port_mappings=(PortMapping(5432, 5433, "tcp", ""), PortMapping(53, 5353, "udp", "172.18.0.2")),
)


def endpoints(*addresses: str, of: Service = WEB, **fields: Any) -> EndpointSlice:
    version = ip_address(addresses[0]).version if addresses else 4
    return EndpointSlice(
        namespace=of.namespace,
        name=f"{of.name}-{version}",
        uid=f"slice-{of.name}-{version}",
        service=of.name,
        address_type="IPv6" if version == 6 else "IPv4",
        endpoints=tuple(Endpoint(addresses=(ip_address(each),), node="node1") for each in addresses),
        ports=(EndpointPort("http", 8080),),
        **fields,
    )


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """A network namespace of the test's own, with its loopback."""
    with own_netns():
        command("ip", "link", "set", "lo", "up")
        yield


def there(name: str) -> bool:
    words = ("nft", "list", "table", "inet", name)
    return subprocess.run(words, capture_output=True, timeout=30, check=False).returncode == 0


def elements(name: str) -> list[Any]:
    """What a set or map of the table holds, as nft lists it."""
    listed = json.loads(command("nft", "-j", "list", "map", *TABLE, name))["nftables"]
    (found,) = (each["map"] for each in listed if "map" in each)
    return found.get("elem", [])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is the kernel's state
        await asyncio.sleep(0.005)


@dataclass
class World:
    """A cluster's store, a kernel, and an agent's Services on them."""

    kernel: Kernel
    store: Store = field(default_factory=Store)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reports = Reports(self._tell)
        self.services = self._new()

    def _new(self) -> Services:
        settings = {"node_name": "node1", "services": "on", **self.settings}
        return Services(
            Config(**settings),
            self.store,
            self.kernel,
            local_addresses=self._local,
            reports=self.reports,
            committed=lambda: None,
        )

    async def _tell(self, _: object) -> None:
        """Nobody reads Events here."""

    async def _local(self) -> frozenset[IPAddress]:
        return frozenset({ip_address("172.18.0.2"), ip_address("127.0.0.1")})

    def give(self, *events: Event) -> None:
        for event in events:
            self.services.take(event, self.store.apply(event))

    def upsert(self, *objects: Node | Service | EndpointSlice) -> None:
        self.give(*(Upsert(type(each).__name__, each) for each in objects))  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def running(self, *adopted: Attachment) -> AsyncIterator[None]:
        self.services.adopt(adopted)
        task = asyncio.create_task(self.services.run())
        try:
            yield
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])

    def restart(self) -> None:
        """Another agent, which begins with what its watches bring."""
        self.services = self._new()
        if all(kind in self.store.synced for kind in KINDS):
            self.services.take(Synced("Node"), ())

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """The kernel refuses every commit of the Services' table."""
        real = self.kernel.commit

        async def refuse(text: str, batch: bytes | None = None) -> None:
            if TABLE[1] in text:
                raise NftError("timeout", "no answer", text)
            await real(text, batch)

        self.kernel.commit = refuse  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.kernel.commit = real  # type: ignore[method-assign]

    async def settled(self) -> None:
        work, rules = self.services.reconciler, self.services.rules
        await until(lambda: work.error is not None or (rules.last_check is not None and work.clean))
        assert work.error is None

    def synced(self) -> None:
        self.give(*(Synced(kind) for kind in KINDS))


def story(body: Callable[[World], Any], **settings: Any) -> None:
    """Run a story in a world with a started kernel, within a limit."""

    async def limited() -> None:
        async with Kernel() as kernel, asyncio.timeout(LIMIT_S):
            await body(World(kernel, settings=settings))

    asyncio.run(limited())


# What is committed


def test_nothing_is_committed_before_every_kind_was_listed() -> None:
    async def body(world: World) -> None:
        async with world.running():
            world.upsert(NODE, WEB, endpoints("10.244.1.7"))
            world.give(Synced("Node"), Synced("Service"))
            await asyncio.sleep(0.05)
            assert world.services.not_ready() == "waiting for the first list of EndpointSlice from api"
            assert not there(TABLE[1])
            world.give(Synced("EndpointSlice"))
            await world.settled()
            assert world.services.not_ready() == ""
            assert len(elements("frontends4")) == 1

    story(body)


def test_a_change_costs_its_elements() -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7", "10.244.2.7"))
        world.upsert(
            *(replace(WEB, name=f"web-{n}", cluster_ips=(ip_address(f"10.97.0.{n}"),)) for n in range(1, 200))
        )
        world.synced()
        async with world.running():
            await world.settled()
            before = world.services.rules.commits
            sizes = watched(world)
            world.upsert(endpoints("10.244.1.7", "10.244.2.8"))
            await world.settled()
            assert world.services.rules.commits == before + 1
            assert 0 < sizes[-1] <= 4
            world.give(Remove("Service", ("default", "web-7")))
            await world.settled()
            assert 0 < sizes[-1] <= 8

    story(body)


def watched(world: World) -> list[int]:
    """How many items each commit from now on changes."""
    sizes: list[int] = []
    real = world.services.rules.run

    async def counted(owners: Any) -> Changes:
        changes = await real(owners)
        sizes.append(len(changes))
        return changes

    world.services.rules.run = counted  # type: ignore[method-assign]
    return sizes


def test_a_restart_commits_only_what_differs_and_leaves_clients_with_their_endpoints() -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, STICKY, endpoints("10.244.1.7"), endpoints("10.244.1.8", of=STICKY))
        world.synced()
        async with world.running(POD):
            await world.settled()
        command("nft", f"add element {' '.join(TABLE)} sticky4 {{ 192.0.2.1 . 7 timeout 1h : 9 }}")
        listed = command("nft", "-s", "list", "table", *TABLE)
        world.restart()
        sizes = watched(world)
        async with world.running(POD):
            await world.settled()
            assert world.services.rules.commits == 0
            assert sizes == [0]
            assert without_times(command("nft", "-s", "list", "table", *TABLE)) == without_times(listed)
        world.restart()
        world.upsert(endpoints("10.244.1.9"))
        sizes = watched(world)
        async with world.running(POD):
            await world.settled()
            assert world.services.rules.commits == 1
            assert 0 < sizes[0] <= 4
        assert "192.0.2.1" in json.dumps(elements("sticky4"))

    story(body)


def without_times(listed: str) -> str:
    return "\n".join(line.split(" expires ")[0] for line in listed.splitlines())


def test_host_ports_come_and_go_with_their_pod() -> None:
    async def body(world: World) -> None:
        if world.settings["services"] == "on":
            world.upsert(NODE)
            world.synced()
        async with world.running():
            await world.services.attached(POD)
            assert len(elements("host_ports4")) == len(elements("host_ports6")) == 1
            assert "172.18.0.2" in json.dumps(elements("host_ports_at4"))
            await world.services.detached(POD)
            assert elements("host_ports4") == elements("host_ports_at4") == []

    for setting in ("on", "off"):
        story(body, services=setting)


def test_foreign_changes_are_undone() -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7"))
        world.synced()
        async with world.running():
            await world.settled()
            changes = world.kernel.changes()
            for spoil in (
                "delete table inet podwall_services",
                "flush map inet podwall_services frontends4",
                "add element inet podwall_services frontends4 { 10.96.0.99 . 6 . 80 : 7 }",
                "flush chain inet podwall_services services_output",
            ):
                before = command("nft", "-s", "list", "table", *TABLE)
                command("nft", spoil)
                foreign = await anext(changes)
                assert {table.name for table in foreign.tables} == {"podwall_services"}
                world.services.resync()
                await world.settled()
                assert command("nft", "-s", "list", "table", *TABLE) == before, spoil

    story(body)


def test_a_failed_transaction_stops_no_pod_and_is_tried_again() -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7"))
        world.synced()
        async with world.running():
            await world.settled()
            with world.refusing():
                world.upsert(endpoints("10.244.1.8"))
                await until(lambda: world.services.reconciler.error is not None)
                assert "10.244.1.7" in json.dumps(elements("endpoints4")), "the old rules are in force"
                assert world.services.not_ready() == ""
                pods = Rules(world.kernel, lambda _: links.static(), datapath.TABLES)
                await pods.run(frozenset({links.STATIC}))
                assert pods.commits == 1
            await until(lambda: world.services.reconciler.error is None)
            assert "10.244.1.8" in json.dumps(elements("endpoints4"))

    story(body)


def test_a_service_that_is_refused_stays_as_it_was_and_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, good = "10.97.0.13", "10.97.0.200"

    def numbered(number: int) -> Service:
        return replace(WEB, name=f"web-{number}", cluster_ips=(ip_address(f"10.97.0.{number}"),))

    async def body(world: World) -> None:
        world.upsert(NODE, *map(numbered, range(1, 30)))
        world.synced()
        real = world.kernel.commit

        async def refuse(text: str, batch: bytes | None = None) -> None:
            if f"add element inet podwall_services frontends4 {{ {bad}" in text or f", {bad} " in text:
                raise NftError("refused", "no room", text)
            await real(text, batch)

        world.kernel.commit = refuse  # type: ignore[method-assign]
        async with world.running():
            await world.settled()
            served = json.dumps(elements("frontends4"))
            assert len(elements("frontends4")) == 28
            assert bad not in served
            (report,) = world.reports.current()
            assert (report.key, report.problem) == (
                ("default", "web-13"),
                "nftables refuses its rules: no room",
            )
            world.upsert(replace(numbered(13), cluster_ips=(ip_address(good),)), numbered(31))
            await world.settled()
            assert len(elements("frontends4")) == 30
            assert world.reports.current() == ()
            world.upsert(numbered(13), numbered(32))
            await world.settled()
            served = json.dumps(elements("frontends4"))
            assert good in served, "what was in force stays"
            assert "10.97.0.32" in served
            world.kernel.commit = real  # type: ignore[method-assign]
            await until(lambda: world.reports.current() == ())
            served = json.dumps(elements("frontends4"))
            assert (bad in served, good in served) == (True, False)

    monkeypatch.setattr("agent.services.BEHIND_EVERY_S", 0.5)
    story(body)


# On or off


@pytest.mark.parametrize(
    ("made", "removed"),
    [
        ("nft add table ip kube-proxy", "nft delete table ip kube-proxy"),
        ("iptables-nft -t nat -N KUBE-SERVICES", "iptables-nft -t nat -X KUBE-SERVICES"),
    ],
    ids=["nftables", "iptables"],
)
def test_auto_steps_aside_for_kube_proxy_and_comes_back(
    made: str, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_proxy, "LOOK_EVERY_S", 0.05)

    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7"))
        world.synced()
        command("sh", "-c", made)
        async with world.running(POD):
            await world.settled()
            status = world.services.status()
            assert status["state"] == "off"
            assert "kube-proxy" in str(status["why"])
            assert "frontends4" not in command("nft", "list", "table", *TABLE)
            assert len(elements("host_ports4")) == 1, "ports of Pods are not kube-proxy's"
            command("sh", "-c", removed)
            await until(lambda: world.services.serving)
            await world.settled()
            assert len(elements("frontends4")) == 1
            assert world.services.status()["state"] == "on"
            command("sh", "-c", made)
            await until(lambda: not world.services.serving)
            await world.settled()
            assert "frontends4" not in command("nft", "list", "table", *TABLE)
            assert len(elements("host_ports4")) == 1

    story(body, services="auto")


@pytest.mark.parametrize(("setting", "state"), [("on", "on"), ("off", "off")])
def test_who_says_so_is_not_asked_again(setting: str, state: str) -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7"))
        world.synced()
        command("nft", "add table ip kube-proxy")
        async with world.running():
            await world.settled()
            status = world.services.status()
            assert (status["state"], status["why"]) == (state, f"services: {setting}")
            assert ("frontends4" in command("nft", "list", "table", *TABLE)) is (state == "on")

    story(body, services=setting)


def test_what_cannot_be_looked_for_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7"))
        world.synced()
        async with world.running():
            await world.settled()
            assert world.services.status()["state"] == "on"

    def fail() -> str:
        raise PermissionError(1, "no")

    monkeypatch.setattr(kube_proxy, "seen", fail)
    story(body, services="auto")


# What follows a commit


def test_health_checks_follow_local_endpoints() -> None:
    async def body(world: World) -> None:
        local = replace(
            WEB, type="LoadBalancer", external_traffic_policy="Local", health_check_node_port=31000
        )
        world.upsert(NODE, local, endpoints("10.244.1.7"))
        world.synced()
        async with world.running():
            await world.settled()
            assert await asked() == 200
            world.upsert(replace(endpoints("10.244.2.7"), endpoints=(elsewhere("10.244.2.7"),)))
            await world.settled()
            assert await asked() == 503
            world.give(Remove("Service", ("default", "web")))
            await world.settled()
            with pytest.raises(OSError, match="refused"):
                await asked()

    story(body)


def elsewhere(address: str) -> Endpoint:
    return Endpoint(addresses=(ip_address(address),), node="node2")


async def asked() -> int:
    """The status that the health check answers."""

    def get() -> int:
        try:
            with urllib.request.urlopen("http://127.0.0.1:31000/", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    return await asyncio.to_thread(get)


def test_what_cannot_be_served_is_reported_until_it_can() -> None:
    def said(world: World) -> list[tuple[str, str, str]]:
        return [(each.kind, each.object, each.problem) for each in world.reports.current()]

    async def body(world: World) -> None:
        other = replace(WEB, name="later", uid="l", created=datetime(2030, 1, 1, tzinfo=UTC))
        world.upsert(NODE, replace(WEB, created=datetime(2020, 1, 1, tzinfo=UTC)), other)
        world.synced()
        async with world.running():
            await world.settled()
            assert {(kind, name) for kind, name, _ in said(world)} == {("Service", "default/later")}
            assert "Service default/web is older" in said(world)[0][2]
            world.give(Remove("Service", ("default", "web")))
            await world.settled()
            assert said(world) == []

    story(body)


def test_a_slice_for_no_service_is_reported_when_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.services.ORPHANS_EVERY_S", 0.02)

    async def body(world: World) -> None:
        world.upsert(NODE, endpoints("10.244.1.7"))
        world.synced()
        async with world.running():
            await until(lambda: bool(world.reports.current()))
            (report,) = world.reports.current()
            assert (report.kind, report.key) == ("EndpointSlice", ("default", "web-4"))
            assert "there is no Service default/web" in report.problem
            world.upsert(WEB)
            await until(lambda: not world.reports.current())

    story(body)


def test_how_long_a_change_took_is_measured() -> None:
    def count() -> float:
        (family,) = metrics.SERVICES_PROGRAMMING_SECONDS.collect()
        return next(each.value for each in family.samples if each.name.endswith("_count"))

    async def body(world: World) -> None:
        name = "endpoints.kubernetes.io/last-change-trigger-time"
        old = endpoints("10.244.1.7", annotations={name: "2020-01-01T00:00:00Z"})
        world.upsert(NODE, WEB, old)
        world.synced()
        async with world.running():
            await world.settled()
            before = count()
            now = datetime.now(UTC).isoformat()
            world.upsert(endpoints("10.244.1.8", annotations={name: now}))
            await world.settled()
            world.upsert(endpoints("10.244.1.9", annotations={name: now}))
            await world.settled()
            world.upsert(endpoints("10.244.1.9", annotations={name: "no time"}))
            await world.settled()
            assert count() == before + 1

    story(body)
