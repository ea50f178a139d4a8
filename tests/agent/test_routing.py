"""The order in which the way to other nodes is made, and what is said while there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.cluster.model import IPAddress, Node
from agent.config import Config
from agent.datapath import Datapath
from agent.routes.kernel import Changes, RouteError, RouteKernel
from agent.routes.plan import Plan, Uplink
from agent.routing import Routing
from tests.agent.waiting import eventually

OWN = Node("a", internal_ips=(ip_address("192.0.2.1"),), pod_cidrs=(ip_network("10.244.1.0/24"),))
OTHER = Node("b", internal_ips=(ip_address("192.0.2.2"),), pod_cidrs=(ip_network("10.244.2.0/24"),))
UPLINK = Uplink("eth0", 7, 1450, OWN.internal_ips, (ip_network("192.0.2.0/24"),))


@dataclass
class World:
    """A kernel and a datapath that write down what they are asked for."""

    sysctls: Path
    nodes: tuple[Node, ...] = (OWN, OTHER)
    no_uplink: str = ""
    steps: list[str] = field(default_factory=list)

    async def uplink(self, node_ips: Sequence[IPAddress]) -> Uplink:
        if self.no_uplink:
            raise RouteError(self.no_uplink)
        return UPLINK

    async def sync(self, plan: Plan) -> Changes:
        self.steps.append(f"routes to {', '.join(path.node for path in plan.paths)}")
        return Changes(problems=("a foreign route is in the way",))

    async def guard(self, plan: Plan) -> None:
        self.steps.append("guard")

    def no_plan(self) -> None:
        self.steps.append("no plan")

    def routing(self, **settings: Any) -> Routing:
        store = SimpleNamespace(
            snapshot=SimpleNamespace(nodes={each.name: each for each in self.nodes}), synced={"Node"}
        )
        datapath = SimpleNamespace(store=store, guard=self.guard, no_plan=self.no_plan)
        made = Routing(
            Config(node_name="a", cluster="manifests:/x", sysctl_dir=self.sysctls, **settings),
            cast("RouteKernel", self),
            cast("Datapath", datapath),
            found=lambda uplink: self.steps.append(f"uplink {uplink.name}"),
            routed=lambda: self.steps.append(f"mtu {made.pod_mtu}"),
        )
        return made

    def tried(self, routing: Routing) -> Routing:
        """The same, after it was brought into the kernel once."""

        async def story() -> None:
            work = asyncio.create_task(routing.reconciler.loop())
            settled = asyncio.create_task(routing.reconciler.settle("routes"))
            await eventually(lambda: settled.done() or routing.reconciler.error)
            for task in (work, settled):
                task.cancel()
            await asyncio.wait([work, settled])

        asyncio.run(story())
        return routing


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_tunnel_is_guarded_before_there_are_routes(world: World) -> None:
    """Pods' MTU leaves room for a tunnel in mode auto, also while every path is direct."""
    routing = world.routing()
    assert routing.not_ready() == "the routes are not in the kernel yet: first sync under way"
    world.tried(routing)
    assert world.steps == ["uplink eth0", "guard", "routes to b", "mtu 1400"]
    assert routing.not_ready() == ""
    assert [path.node for path in routing.plan.paths] == ["b"]
    assert routing.problems == ("a foreign route is in the way",)
    assert "net.ipv4.ip_forward" in {each.sysctl.name for each in routing.sysctl_problems}


def test_the_mtu_that_is_configured_is_the_pods(world: World) -> None:
    assert world.tried(world.routing(mtu=1300)).pod_mtu == 1300


def test_without_an_uplink_nobody_waits_for_a_plan(world: World) -> None:
    world.no_uplink = "no interface holds 192.0.2.1"
    routing = world.tried(world.routing())
    assert world.steps == ["no plan"]
    assert routing.not_ready() == "the routes are not in the kernel yet: no interface holds 192.0.2.1"


def test_without_an_own_node_nobody_waits_for_a_plan(world: World) -> None:
    world.nodes = (OTHER,)
    routing = world.tried(world.routing())
    assert world.steps == ["no plan"]
    assert routing.not_ready() == "the routes are not in the kernel yet: first sync under way"
