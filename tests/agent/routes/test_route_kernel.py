"""Routes in real kernels: four nodes, one behind a router, Pods that ping each other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from agent.cluster.model import Node
from agent.routes.diff import steps
from agent.routes.kernel import Changes, RouteError, RouteKernel
from agent.routes.plan import Mode, Plan, plan_routes

World = Any  # tests/agent/routes/conftest.py
Kernels = dict[str, RouteKernel]


async def planned(
    kernel: RouteKernel, name: str, nodes: Iterable[Node], mode: Mode, port: int = 4789
) -> Plan:
    known = {node.name: node for node in nodes}
    uplink = await kernel.uplink(known[name].internal_ips)
    return plan_routes(name, known.values(), uplink, mode, vxlan_id=9619, vxlan_port=port)


@contextlib.asynccontextmanager
async def open_kernels(kernels: Kernels) -> AsyncIterator[Kernels]:
    try:
        yield kernels
    finally:
        for kernel in kernels.values():
            await kernel.close()


async def everywhere(world: World, kernels: Kernels, mode: Mode) -> dict[str, Changes]:
    changes = {}
    for name, kernel in kernels.items():
        plan = await planned(kernel, name, world.nodes.values(), mode)
        changes[name] = await kernel.sync(plan)
        present = await kernel.read(plan)
        assert steps(plan, present) == (), "what was written reads back as planned"
    return changes


def unreached(world: World, names: Iterable[str]) -> list[tuple[str, str, int]]:
    return [
        (source, target, version)
        for source, target in itertools.permutations(names, 2)
        for version in (4, 6)
        if not world.pings(f"pod-{source}", world.pod_address(target, version))
    ]


def test_auto_reaches_every_pod_direct_or_by_tunnel(world: World, kernels: Kernels) -> None:
    async def story() -> None:
        async with open_kernels(kernels):
            changes = await everywhere(world, kernels, "auto")
            assert all(change.problems == () for change in changes.values())

    asyncio.run(story())
    routes = world.places["a"].ip("route") + world.places["a"].ip("-6", "route")
    assert "10.244.2.0/24 via 192.168.77.2 dev eth0 proto 112" in routes
    assert "fd00:10:2::/64 via fd77::2 dev eth0 proto 112" in routes
    assert "10.244.4.0/24 via 10.244.4.0 dev podwall-vxlan proto 112 onlink" in routes
    assert unreached(world, world.nodes) == []


def test_vxlan_reaches_every_pod_at_full_size(world: World, kernels: Kernels) -> None:
    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, "vxlan")

    asyncio.run(story())
    assert unreached(world, world.nodes) == []
    assert world.pings("pod-a", world.pod_address("far", 4), size=1430)
    assert world.pings("pod-a", world.pod_address("far", 6), size=1430)
    assert "mtu 1450" in world.places["a"].ip("link", "show", "podwall-vxlan")


def test_vxlan_over_an_ipv6_underlay(world: World, kernels: Kernels) -> None:
    for name, node in world.nodes.items():
        world.nodes[name] = replace(node, internal_ips=node.internal_ips[1:])
        world.places[name].ip("-4", "addr", "flush", "dev", "eth0")

    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, "vxlan")

    asyncio.run(story())
    assert unreached(world, world.nodes) == []
    assert "mtu 1430" in world.places["a"].ip("link", "show", "podwall-vxlan")


def test_direct_with_ipv4_pods_over_ipv6_nodes(world: World, kernels: Kernels) -> None:
    for name, node in world.nodes.items():
        world.nodes[name] = replace(node, internal_ips=node.internal_ips[1:])
        world.places[name].ip("-4", "addr", "flush", "dev", "eth0")

    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, "direct")

    asyncio.run(story())
    assert "10.244.2.0/24 via inet6 fd77::2 dev eth0" in world.places["a"].ip("route")
    assert unreached(world, ["a", "b", "c"]) == []


def test_a_node_speaks_to_remote_pods_with_its_tunnel_address(world: World, kernels: Kernels) -> None:
    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, "auto")

    asyncio.run(story())
    for version in (4, 6):
        assert world.pings("a", world.pod_address("b", version))
        assert world.pings("a", world.pod_address("far", version))
    assert "src 10.244.1.0 " in world.places["a"].ip("route", "get", "10.244.4.5")
    assert "src fd00:10:1:: " in world.places["a"].ip("-6", "route", "get", "fd00:10:4::5")


def test_absent_pods_are_unreachable_and_never_leave_by_the_default_route(
    world: World, kernels: Kernels
) -> None:
    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, "auto")

    asyncio.run(story())
    for target in ("10.244.2.77", "fd00:10:2::77"):
        with pytest.raises(OSError, match=r"No route to host|Permission denied|Network is unreachable"):
            world.pings("pod-a", target)
    own = world.places["b"].run("ip", "route", "get", "10.244.2.77")
    assert own.returncode
    assert "No route to host" in own.stderr


def test_a_second_sync_and_a_restart_change_nothing(world: World, kernels: Kernels) -> None:
    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, "auto")
            again = await everywhere(world, kernels, "auto")
            assert all(change.done == () for change in again.values())
            reborn = world.places["a"].inside(RouteKernel)
            async with open_kernels({"a": reborn}):
                plan = await planned(reborn, "a", world.nodes.values(), "auto")
                assert (await reborn.sync(plan)).done == ()

    asyncio.run(story())


CHANGES: list[tuple[Mode, Mode]] = [("direct", "vxlan"), ("vxlan", "direct"), ("auto", "vxlan")]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_change_of_mode_loses_no_packet(world: World, kernels: Kernels, before: Mode, after: Mode) -> None:
    """Both ends can receive either way while one changes, so a ping every 5 ms never misses."""

    async def story() -> None:
        async with open_kernels(kernels):
            await everywhere(world, kernels, before)
            if before == "direct":
                await everywhere(world, kernels, "auto")  # has the device, and sends as before
            pings = [
                asyncio.to_thread(world.pinged, "pod-a", world.pod_address("b", version), 300, 0.005)
                for version in (4, 6)
            ]
            answers = asyncio.gather(*pings)
            await everywhere(world, kernels, "auto" if after == "direct" else after)
            assert not answers.done()
            assert await answers == [300, 300]
            await everywhere(world, kernels, after)

    asyncio.run(story())
    assert unreached(world, ["a", "b", "c"]) == []


def test_nodes_come_change_and_go(world: World, kernels: Kernels) -> None:
    kernel = kernels["a"]
    far = world.nodes["far"]
    moved = replace(far, internal_ips=(ip_address("192.168.88.9"),))
    renumbered = replace(far, pod_cidrs=(ip_network("10.244.40.0/24"),))
    near = replace(far, internal_ips=(ip_address("192.168.77.9"), ip_address("fd77::9")))

    async def story() -> None:
        async with open_kernels(kernels):
            for nodes in ([], [far], [moved], [far], [renumbered], [far], [near], [far], []):
                plan = await planned(kernel, "a", [world.nodes["a"], *nodes], "auto")
                changes = await kernel.sync(plan)
                assert changes.problems == ()
                assert steps(plan, await kernel.read(plan)) == ()
            await kernel.sync(Plan())

    asyncio.run(story())
    left = "".join(
        world.places["a"].ip(*words.split()) for words in ("route", "-6 route", "neigh", "-6 neigh", "link")
    )
    assert "10.244.4" not in left
    assert "podwall-vxlan" not in left
    assert "unreachable" not in left
    assert "10.244.1.5 dev podwall1 proto 112" in left, "a Pod's own route is not ours to remove"


def test_foreign_routes_stay_and_are_reported(world: World, kernels: Kernels) -> None:
    place = world.places["a"]
    place.batch(
        """route add 10.244.2.0/24 via 192.168.77.3 proto static
        route add fd00:10:3::/64 via fd77::2 metric 512
        route add 172.30.0.0/16 via 192.168.77.3"""
    )

    async def story() -> None:
        async with open_kernels(kernels):
            plan = await planned(kernels["a"], "a", world.nodes.values(), "auto")
            changes = await kernels["a"].sync(plan)
            assert len(changes.problems) == 2
            assert "10.244.2.0/24 via 192.168.77.3 dev eth0 proto 4; remove it" in changes.problems[0]
            assert "fd00:10:3::/64 via fd77::2 dev eth0" in changes.problems[1]
            await kernels["a"].sync(Plan())

    asyncio.run(story())
    left = place.ip("route") + place.ip("-6", "route")
    assert "10.244.2.0/24 via 192.168.77.3 dev eth0 proto static" in left
    assert "fd00:10:3::/64 via fd77::2" in left
    assert "172.30.0.0/16" in left


def test_what_was_damaged_is_mended(world: World, kernels: Kernels) -> None:
    place = world.places["a"]
    damages = [
        "route del 10.244.2.0/24",
        "-6 route del fd00:10:4::/64",
        "link set podwall-vxlan down",
        "link del podwall-vxlan",
        "link set podwall-vxlan mtu 1200",
        "addr del 10.244.1.0/32 dev podwall-vxlan",
        "addr add 10.99.0.1/32 dev podwall-vxlan",
        "neigh flush dev podwall-vxlan nud permanent",
        "route replace 10.244.2.0/24 via 192.168.77.3 proto 112",
        "link set eth0 down",
    ]

    async def story() -> None:
        async with open_kernels(kernels):
            plan = await planned(kernels["a"], "a", world.nodes.values(), "auto")
            for damage in damages:
                await kernels["a"].sync(plan)
                place.ip(*damage.split())
                if damage == "link set eth0 down":
                    place.batch("link set eth0 up\naddr replace fd77::1/64 dev eth0 nodad")
                changes = await kernels["a"].sync(plan)
                assert changes.done, damage
                assert changes.problems == (), damage
                assert steps(plan, await kernels["a"].read(plan)) == (), damage

    asyncio.run(story())


def test_a_taken_vxlan_port_is_named_and_direct_routes_go_on(world: World, kernels: Kernels) -> None:
    world.places["a"].batch("link add other type vxlan id 9619 dstport 4789 local 192.168.77.1")

    async def story() -> None:
        async with open_kernels(kernels):
            plan = await planned(kernels["a"], "a", world.nodes.values(), "auto")
            changes = await kernels["a"].sync(plan)
            assert len(changes.problems) == 1, changes.problems
            assert "see who has VXLAN 9619 and UDP port 4789" in changes.problems[0]

    asyncio.run(story())
    assert "10.244.2.0/24 via 192.168.77.2" in world.places["a"].ip("route")


def test_the_uplink_and_its_changes(world: World, kernels: Kernels) -> None:
    place, kernel = world.places["a"], kernels["a"]
    ips = world.nodes["a"].internal_ips

    async def story() -> None:
        async with open_kernels(kernels):
            uplink = await kernel.uplink(ips)
            assert (uplink.name, uplink.mtu) == ("eth0", 1500)
            assert set(ips) <= set(uplink.addresses)
            assert {ip_network("192.168.77.0/24"), ip_network("fd77::/64")} <= set(uplink.subnets)
            changes = kernel.changes()
            waiting = asyncio.ensure_future(anext(changes))
            while not waiting.done():  # until the watch listens
                place.batch("link set eth0 mtu 1400\nlink set eth0 mtu 1390")
                await asyncio.wait([waiting], timeout=0.2)
            assert (await kernel.uplink(ips)).mtu == 1390
            await changes.aclose()
            with pytest.raises(RouteError, match=r"InternalIP \(203\.0\.113\.1\); set kubelet's --node-ip"):
                await kernel.uplink([ip_address("203.0.113.1")])
            place.batch("addr add 203.0.113.1/32 dev lo")
            routed = await kernel.uplink([ip_address("203.0.113.1")])
            assert routed.name == "eth0"
            assert ip_address("203.0.113.1") in routed.addresses

    asyncio.run(story())


def test_pods_that_come_and_go_do_not_wake_the_routes(world: World, kernels: Kernels) -> None:
    place, kernel = world.places["a"], kernels["a"]

    async def woken(batch: str) -> bool:
        changes = kernel.changes()
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)  # it begins, so that on the same thread
        await kernel.read()  # this comes behind the watch's own start
        place.batch(batch)
        await asyncio.wait([waiting], timeout=0.5)
        heard = waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        await changes.aclose()
        return heard

    async def story() -> None:
        async with open_kernels(kernels):
            plan = await planned(kernel, "a", world.nodes.values(), "auto")
            await kernel.sync(plan)
            async with asyncio.timeout(20.0):
                while await woken(""):  # the kernel tells of the new tunnel's carrier when it has time
                    continue
            assert not await woken(
                """link add name podwall0badcafe type veth peer name eth9 netns POD
                link set podwall0badcafe addrgenmode none
                link set podwall0badcafe up
                route add 10.244.1.9 dev podwall0badcafe proto 112
                route del 10.244.1.9 dev podwall0badcafe proto 112
                link del podwall0badcafe""".replace("POD", world.places["pod-b"].netns)
            )
            for batch in (
                "route del 10.244.2.0/24",
                "route add 10.50.0.0/16 via 192.168.77.2",
                "addr add 192.168.78.1/24 dev eth0",
                "link set podwall-vxlan down",
            ):
                assert await woken(batch), batch

    asyncio.run(story())
