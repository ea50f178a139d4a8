"""Statuses of Services beside a directory of manifests: written by one agent, seen by all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.cluster.errors import Refused, Unreachable
from agent.cluster.model import Event, LoadBalancerIngress, Remove, Service, Upsert
from agent.sources import Manifests
from tests.agent.loadbalancer.onelink import until

FOUR, SIX = ip_address("192.0.2.7"), ip_address("2001:db8::7")


def write(directory: Path, uid: str = "1", **status: object) -> None:
    document = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default", "uid": uid},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]},
        "status": status,
    }
    (directory / "web.json").write_text(json.dumps(document))


class Seen:
    """The Service as one agent sees it last."""

    def __init__(self, directory: Path) -> None:
        self.source = Manifests(directory)
        self.service: Service | None = None
        self.events = 0

    def take(self, event: Event) -> None:
        self.events += 1
        if isinstance(event, Upsert) and isinstance(event.object, Service):
            self.service = event.object
        elif isinstance(event, Remove) and event.kind == "Service":
            self.service = None

    def addresses(self) -> list[str]:
        return [str(each.ip) for each in self.service.load_balancer] if self.service else []


def story(directory: Path, tell: Callable[[Seen, Seen], object]) -> None:
    """Two agents look at the directory while something is told."""

    async def both() -> None:
        agents = Seen(directory), Seen(directory)
        running = [asyncio.create_task(each.source.run(each.take)) for each in agents]
        await until(lambda: all(each.service for each in agents))
        told = tell(*agents)
        assert asyncio.iscoroutine(told)
        await told
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(both())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "cluster"
    made.mkdir()
    write(made)
    return made


def test_what_one_writes_all_see(directory: Path) -> None:
    async def tell(one: Seen, other: Seen) -> None:
        for wanted in ((FOUR, SIX), (SIX,), ()):
            assert one.service is not None
            await one.source.set_load_balancer(one.service, wanted)
            await until(lambda: one.addresses() == other.addresses() == [str(ip) for ip in wanted])  # noqa: B023
        assert other.service is not None
        assert other.service.ports, "the rest is the manifest's"

    story(directory, tell)


def test_a_new_service_of_the_name_has_no_status(directory: Path) -> None:
    async def tell(one: Seen, other: Seen) -> None:
        assert one.service is not None
        await one.source.set_load_balancer(one.service, (FOUR,))
        await until(lambda: other.addresses() == [str(FOUR)])
        write(directory, uid="2")
        await until(lambda: other.service and other.service.uid == "2")
        assert other.addresses() == []
        (directory / "web.json").unlink()
        await until(lambda: other.service is None)

    story(directory, tell)


def test_a_manifest_may_say_a_status_itself_until_an_agent_does(directory: Path) -> None:
    write(directory, loadBalancer={"ingress": [{"ip": str(SIX)}]})

    async def tell(one: Seen, other: Seen) -> None:
        await until(lambda: other.addresses() == [str(SIX)])
        assert one.service is not None
        assert one.service.load_balancer == (LoadBalancerIngress(SIX),)
        await one.source.set_load_balancer(one.service, (FOUR,))
        await until(lambda: other.addresses() == [str(FOUR)])

    story(directory, tell)


def test_what_cannot_be_written(directory: Path) -> None:
    (directory.parent / "status").write_text("")
    source = Manifests(directory)
    with pytest.raises(Unreachable, match=r"service_default_web.json cannot be written: File exists"):
        asyncio.run(source.set_load_balancer(Service("default", "web"), ()))
    with pytest.raises(Refused, match="no file can have its name"):
        asyncio.run(source.set_load_balancer(Service("default", "../web"), ()))
