"""ADD, DEL, CHECK, GC and STATUS with real links, a real ledger and rules that obey the test."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from agent.pods.attachments import Attachments
from agent.pods.ledger import Ledger
from agent.pods.wiring import Wiring
from cni import spec
from cni.spec import CniError
from tests.agent.pods.world import (
    CIDRS,
    Agent,
    Namespace,
    Namespaces,
    Rules,
    Settings,
    agent,
    fill,
    kernel_links,
    kernel_rows,
    key,
    request,
)
from tests.agent.waiting import eventually
from tests.linux import command


async def settled(a: Agent) -> None:
    """The ledger, the kernel and the rules say the same."""
    await eventually(lambda: not a.attachments.leaving)
    assert a.rows() == kernel_rows()
    assert {each.link for each in a.rules.pods} == set(a.rows())
    assert {each.link for each in a.attachments.current.values()} == set(a.rows())
    assert a.attachments.addresses.used == {
        address for each in a.attachments.current.values() for address in each.addresses
    }
    assert not a.attachments._locks


async def refused(
    a: Agent, container_id: str, pod: Namespace, code: int, message: str, **config: Any
) -> None:
    with pytest.raises(CniError, match=message) as caught:
        await a.add(container_id, pod, **config)
    assert caught.value.code == code, caught.value.msg


def test_add_and_del(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            with pod.descriptor() as fd:
                result = await a.attachments.add(request("ADD", "c1", pod.path), fd)
            attached = a.attachments.current[key("c1")]
            assert result.to_json("1.1.0") == {
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": attached.link, "mac": attached.host_mac, "mtu": 1450},
                    {"name": "eth0", "mac": attached.mac, "mtu": 1450, "sandbox": pod.path},
                ],
                "ips": [
                    {"interface": 1, "address": "10.244.1.1/32", "gateway": "169.254.1.1"},
                    {"interface": 1, "address": "fd00:10:244:1::1/128", "gateway": "fe80::1"},
                ],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
            }
            assert (attached.namespace, attached.pod, attached.pod_uid) == ("default", "pod-c1", "uid-c1")
            await settled(a)
            await a.delete("c1")
            await settled(a)
            assert kernel_links() == set()
            await a.attachments.delete(key("c1"))

    asyncio.run(main())


def test_two_hundred_at_once(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pods = [namespaces.new() for _ in range(200)]

    async def main() -> None:
        async with agent(tmp_path) as a:
            attached = await asyncio.gather(*(a.add(f"c{i}", pod) for i, pod in enumerate(pods)))
            addresses = [address for each in attached for address in each.addresses]
            assert len(set(addresses)) == len(addresses) == 400
            await settled(a)
            await asyncio.gather(*(a.delete(f"c{i}") for i in range(200)))
            await settled(a)
            assert kernel_links() == set()

    asyncio.run(main())


def test_del_when_the_namespace_is_gone(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            await a.add("c1", pod)
            namespaces.delete(pod)
            await eventually(lambda: not kernel_links())
            await a.delete("c1")
            await settled(a)

    asyncio.run(main())


def test_reap_ends_pods_that_vanished(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    gone, there = namespaces.new(), namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            await a.add("c1", gone)
            await a.add("c2", there)
            namespaces.delete(gone)
            await eventually(lambda: len(kernel_links()) == 1)
            assert await a.attachments.reap() == 1
            await settled(a)

    asyncio.run(main())


def test_a_second_add_is_refused_and_harms_nothing(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            attached = await a.add("c1", pod)
            await refused(
                a, "c1", pod, spec.FAILED, f"container c1 has interface eth0 already .link {attached.link}"
            )
            await refused(a, "c2", pod, spec.FAILED, "the Pod's namespace has an interface eth0 already")
            await settled(a)
            assert set(a.attachments.current) == {key("c1")}

    asyncio.run(main())


def test_add_again_when_the_namespace_was_replaced(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod, later = namespaces.new(), namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            await a.add("c1", pod)
            namespaces.delete(pod)
            await eventually(lambda: not kernel_links())
            await a.add("c1", later)
            await settled(a)

    asyncio.run(main())


def test_add_right_after_del_waits_for_the_link_to_go(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            for _ in range(3):
                await a.add("c1", pod)
                await a.attachments.delete(key("c1"))
            await a.add("c1", pod)
            await settled(a)

    asyncio.run(main())


def test_requests_of_one_container_wait_for_each_other(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod, other = namespaces.new(), namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            a.rules.hold = asyncio.Event()
            adding = asyncio.create_task(a.add("c1", pod))
            await eventually(lambda: bool(a.rules.pods))
            deleting = asyncio.create_task(a.attachments.delete(key("c1")))
            others = asyncio.create_task(a.add("c2", other))
            await eventually(lambda: len(a.rules.pods) == 2)
            assert not deleting.done()
            a.rules.hold.set()
            await others
            with contextlib.suppress(KeyError):  # DEL may be done before the answer of ADD is looked at
                await adding
            await deleting
            await settled(a)
            assert set(a.attachments.current) == {key("c2")}

    asyncio.run(main())


# What fails is undone


def rules_refuse(a: Agent) -> None:
    a.rules.fail_attached = "nft says no"


def rules_refuse_both_ways(a: Agent) -> None:
    a.rules.fail_attached = a.rules.fail_detached = "nft is gone"
    asyncio.get_running_loop().call_later(0.05, setattr, a.rules, "fail_detached", "")


def rules_never_come(a: Agent) -> None:
    a.rules.hold = asyncio.Event()


FAILURES: tuple[tuple[Callable[[Agent], None], int, str], ...] = (
    (rules_refuse, spec.FAILED, "Pod default/pod-c1: nft says no"),
    (rules_refuse_both_ways, spec.FAILED, "Pod default/pod-c1: nft is gone"),
    (rules_never_come, spec.TRY_AGAIN_LATER, "the rules of Pod default/pod-c1 were not in force after 0.3 s"),
)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure[0].__name__)
def test_an_add_whose_rules_fail_leaves_nothing(
    node: Namespace,
    namespaces: Namespaces,
    tmp_path: Path,
    failure: tuple[Callable[[Agent], None], int, str],
) -> None:
    pod = namespaces.new()
    break_it, code, message = failure

    async def main() -> None:
        async with agent(tmp_path, Settings(add_timeout_s=0.3)) as a:
            break_it(a)
            await refused(a, "c1", pod, code, message)
            assert kernel_links() == set()
            await settled(a)
            a.rules.fail_attached, a.rules.hold = "", None
            await a.add("c1", pod)
            await settled(a)

    asyncio.run(main())


def test_a_caller_that_goes_away_does_not_cut_an_add_in_two(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            a.rules.hold = asyncio.Event()
            adding = asyncio.create_task(a.add("c1", pod))
            await eventually(lambda: bool(a.rules.pods))
            adding.cancel()
            with contextlib.suppress(asyncio.CancelledError, KeyError):
                await adding
            a.rules.hold.set()
            await eventually(lambda: key("c1") in a.attachments.current)
            await settled(a)

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() == before


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_del_waits_for_the_rules_to_go(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            attached = await a.add("c1", pod)
            a.rules.fail_detached = "nft is gone"
            with pytest.raises(
                CniError, match="Pod default/pod-c1 is not cut off yet: nft is gone"
            ) as caught:
                await a.attachments.delete(key("c1"))
            assert caught.value.code == spec.TRY_AGAIN_LATER
            assert set(attached.addresses) <= a.attachments.addresses.used, (
                "not given again while rules speak of it"
            )
            with pytest.raises(CniError, match="nft is gone"):
                await a.attachments.delete(key("c1"))
            a.rules.fail_detached = ""
            await a.attachments.delete(key("c1"))
            await settled(a)

    asyncio.run(main())


def test_a_full_disk_refuses_add_but_not_del(
    node: Namespace, namespaces: Namespaces, tiny_disk: Path
) -> None:
    pods = [namespaces.new() for _ in range(3)]

    async def main() -> None:
        async with agent(tiny_disk) as a:
            await a.add("c0", pods[0])
            a.ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            filler = fill(tiny_disk)
            await refused(
                a,
                "c1",
                pods[1],
                spec.IO_FAILURE,
                "Pod default/pod-c1: ledger .* the disk is full; free some space",
            )
            assert kernel_links() == {a.attachments.current[key("c0")].link}
            await a.attachments.delete(key("c0"))
            await eventually(lambda: not kernel_links())
            filler.unlink()
            await a.add("c2", pods[2])
            await settled(a)

    asyncio.run(main())


# Host ports


def mapping(port: int, **fields: str) -> dict[str, Any]:
    return {"portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp", **fields}]}


def test_a_host_port_is_one_pods_until_it_is_cut_off(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pods = [namespaces.new() for _ in range(3)]
    taken = "Pod default/pod-c1: hostPort 8080/tcp on 10.0.0.1 is taken by Pod default/pod-c0 on this node"

    async def main() -> None:
        async with agent(tmp_path) as a:
            first = await a.add("c0", pods[0], runtimeConfig=mapping(8080))
            assert first.port_mappings == (spec.PortMapping(8080, 80, "tcp", ""),)
            used = a.attachments.addresses.used
            await refused(
                a, "c1", pods[1], spec.FAILED, taken, runtimeConfig=mapping(8080, hostIP="10.0.0.1")
            )
            assert a.attachments.addresses.used == used
            await a.add("c2", pods[2], runtimeConfig=mapping(8081))
            a.rules.fail_detached = "the kernel says no"
            with pytest.raises(CniError):
                await a.attachments.delete(key("c0"))
            await refused(a, "c1", pods[1], spec.FAILED, "is taken", runtimeConfig=mapping(8080))
            a.rules.fail_detached = ""
            await a.attachments.delete(key("c0"))
            await a.add("c1", pods[1], runtimeConfig=mapping(8080))
            await settled(a)

    asyncio.run(main())


@pytest.mark.parametrize("lost", [False, True], ids=["with its ledger", "without"])
def test_host_ports_after_a_restart(
    node: Namespace, namespaces: Namespaces, tmp_path: Path, lost: bool
) -> None:
    pods = [namespaces.new() for _ in range(2)]

    async def main() -> None:
        async with agent(tmp_path) as a:
            await a.add("c0", pods[0], runtimeConfig=mapping(8080, hostIP="127.0.0.1"))
        async with agent(tmp_path / "empty" if lost else tmp_path) as a:
            (kept,) = a.attachments.current.values()
            assert kept.port_mappings == (spec.PortMapping(8080, 80, "tcp", "127.0.0.1"),)
            await refused(a, "c1", pods[1], spec.FAILED, "is taken by", runtimeConfig=mapping(8080))

    asyncio.run(main())


# Not ready, exhausted, bad input


async def not_ready(a: Agent, pod: Namespace, reason: str) -> None:
    with pytest.raises(CniError, match=reason) as caught:
        a.attachments.status()
    assert caught.value.code == spec.NOT_AVAILABLE
    await refused(a, "c1", pod, spec.TRY_AGAIN_LATER, reason)


@pytest.mark.parametrize(
    ("cidrs", "reason"),
    [
        (None, "Node node-a is not known yet"),
        ((), "Node node-a has no spec.podCIDRs: the controller manager assigns them"),
        (
            ("10.1.0.0/24", "10.1.0.0/25"),
            "Node node-a, spec.podCIDRs: podCIDR 10.1.0.0/25 overlaps 10.1.0.0/24",
        ),
        (("10.1.0.0/32",), "Node node-a, spec.podCIDRs: podCIDR 10.1.0.0/32 is too small"),
    ],
)
def test_without_pod_cidrs(
    node: Namespace, namespaces: Namespaces, tmp_path: Path, cidrs: tuple[str, ...] | None, reason: str
) -> None:
    pod = namespaces.new()

    async def main() -> None:
        ledger, wiring = Ledger(tmp_path / "ledger.sqlite3", "boot-1"), Wiring()
        a = Agent(ledger, wiring, Rules(), Attachments(Settings(), ledger, wiring, Rules()))
        await not_ready(a, pod, "the agent is still looking at the Pods that are there")
        await a.attachments.recover()
        if cidrs is not None:
            a.attachments.set_pod_cidrs([ip_network(cidr) for cidr in cidrs])
        await not_ready(a, pod, reason)
        a.attachments.set_pod_cidrs(CIDRS)
        a.attachments.status()
        await a.add("c1", pod)
        await a.attachments.close()
        await wiring.close()

    asyncio.run(main())


def test_other_reasons(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path, Settings(mtu=0)) as a:
            await not_ready(a, pod, "Node node-a: the uplink's MTU is not known yet")
            a.rules.reason = "the rules were never committed"
            await not_ready(a, pod, "the rules were never committed")  # the cause before what follows from it
            a.rules.reason = ""
            a.attachments.set_mtu(1000)
            await not_ready(a, pod, "mtu 1000 is less than IPv6 needs .1280.")
            a.attachments.set_mtu(1400)
            a.attachments.set_pod_cidrs((), "Node node-a: spec.podCIDRs is no list")
            await not_ready(a, pod, "Node node-a: spec.podCIDRs is no list")
            a.attachments.set_pod_cidrs(CIDRS)
            assert (await a.add("c1", pod)).mtu == 1400

    asyncio.run(main())


def test_an_exhausted_range_names_itself(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pods = [namespaces.new() for _ in range(3)]

    async def main() -> None:
        async with agent(tmp_path, cidrs=[ip_network("10.1.0.0/30"), ip_network("fd00::/64")]) as a:
            await a.add("c0", pods[0])
            await a.add("c1", pods[1])
            message = r"Node node-a: no IPv4 address is free: podCIDR 10.1.0.0/30: 2 of 2 addresses in use"
            await refused(a, "c2", pods[2], spec.TRY_AGAIN_LATER, message)
            await settled(a)
            await a.delete("c0")
            await asyncio.sleep(Settings().address_rest_s)
            await a.add("c2", pods[2])

    asyncio.run(main())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("K8S_POD_NAMESPACE", "a b"),
        ("K8S_POD_NAME", "x\ny"),
        ("K8S_POD_UID", "u" * 254),
        ("K8S_POD_NAME", "../x"),
    ],
)
def test_names_that_are_none(
    node: Namespace, namespaces: Namespaces, tmp_path: Path, argument: str, value: str
) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            good = request("ADD", "c1", pod.path)
            with pod.descriptor() as fd, pytest.raises(CniError, match=f"CNI_ARGS: {argument} is ") as caught:
                await a.attachments.add(replace(good, args={**good.args, argument: value}), fd)
            assert caught.value.code == spec.INVALID_ENVIRONMENT
            await settled(a)

    asyncio.run(main())


# CHECK and GC


def test_check(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with agent(tmp_path) as a:
            with pod.descriptor() as fd:
                result = await a.attachments.add(request("ADD", "c1", pod.path), fd)
                previous = result.to_json("1.1.0")
                good = request("CHECK", "c1", pod.path, prevResult=previous)
                await a.attachments.check(good, fd)
                with pytest.raises(CniError, match="container c2 has no interface eth0 here") as caught:
                    await a.attachments.check(request("CHECK", "c2", pod.path, prevResult=previous), fd)
                assert caught.value.code == spec.UNKNOWN_CONTAINER
                other = request("CHECK", "c1", pod.path, prevResult={"ips": [{"address": "10.244.1.1/32"}]})
                with pytest.raises(CniError, match=r"prevResult lacks its address fd00:10:244:1::1"):
                    await a.attachments.check(other, fd)
                pod.exec("ip", "link", "set", "eth0", "down")
                with pytest.raises(CniError, match="Pod default/pod-c1: interface eth0 in the Pod is down"):
                    await a.attachments.check(good, fd)

    asyncio.run(main())


def test_gc_keeps_what_is_valid_and_what_is_another_networks(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pods = [namespaces.new() for _ in range(4)]

    async def main() -> None:
        async with agent(tmp_path) as a:
            for i, pod in enumerate(pods):
                await a.add(f"c{i}", pod, name="other" if i == 3 else "podwall")
            valid = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "unknown", "ifname": "eth0"}]
            await a.attachments.collect(request("GC", "", **{"cni.dev/valid-attachments": valid}))
            await settled(a)
            assert set(a.attachments.current) == {key("c1"), key("c3")}

    asyncio.run(main())


def test_bandwidth_of_the_runtime_lives_through_a_restart_and_goes_with_the_pod(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod = namespaces.new()
    rates = {
        "ingressRate": 8_000_000,
        "ingressBurst": 80_000,
        "egressRate": 4_000_000,
        "egressBurst": 4294967295,
    }

    async def main() -> None:
        async with agent(tmp_path) as a:
            attached = await a.add("c1", pod, runtimeConfig={"bandwidth": rates})
            assert kernel_links() == {attached.link, attached.shaper}
            assert " rate 8Mbit burst 10000b " in command("tc", "qdisc", "show", "dev", attached.link)
            assert " rate 4Mbit burst " in command("tc", "qdisc", "show", "dev", attached.shaper)
        async with agent(tmp_path) as a:
            assert a.attachments.current[key("c1")] == attached
            with pod.descriptor() as fd:
                assert await a.wiring.check(attached, fd) == []
            await a.delete("c1")
            assert kernel_links() == set()

    asyncio.run(main())


# The next agent


def test_a_restart_adopts_what_is_there_and_ends_what_is_not(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    gone, there, shaken = (namespaces.new() for _ in range(3))

    async def main() -> None:
        async with agent(tmp_path, Settings(address_rest_s=60)) as a:
            await a.add("c1", gone)
            await a.add("c2", there)
            await a.add("c3", shaken)
            before = dict(a.attachments.current)
        namespaces.delete(gone)
        await eventually(lambda: len(kernel_links()) == 2)
        command("ip", "route", "del", "10.244.1.3")
        command("ip", "link", "add", "podwall-vxlan", "type", "veth", "peer", "name", "theirs")
        async with agent(tmp_path, Settings(address_rest_s=60)) as a:
            del before[key("c1")]
            assert a.attachments.current == before
            await eventually(lambda: not a.attachments.leaving)
            assert a.rows() == kernel_rows()
            assert kernel_links() == {each.link for each in before.values()} | {"podwall-vxlan", "theirs"}
            for container, pod in (("c2", there), ("c3", shaken)):
                with pod.descriptor() as fd:
                    assert await a.wiring.check(before[key(container)], fd) == []
            later = await a.add("c4", namespaces.new())
            assert str(later.addresses[0]) == "10.244.1.4", "behind the last that was given"

    asyncio.run(main())


def test_addresses_rest_across_a_restart(node: Namespace, namespaces: Namespaces, tmp_path: Path) -> None:
    cidrs = [ip_network("10.1.0.0/30")]

    async def main() -> None:
        async with agent(tmp_path, Settings(address_rest_s=60), cidrs=cidrs) as a:
            await a.add("c1", namespaces.new())
            await a.delete("c1")
        async with agent(tmp_path, Settings(address_rest_s=60), cidrs=cidrs) as a:
            assert str((await a.add("c2", namespaces.new())).addresses[0]) == "10.1.0.2"
            await refused(
                a, "c3", namespaces.new(), spec.TRY_AGAIN_LATER, "1 of 2 addresses in use and 1 resting"
            )

    asyncio.run(main())


def lose(path: Path) -> None:
    for file in path.parent.iterdir():
        file.unlink()


def damage(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("harm", [lose, damage])
def test_a_ledger_that_is_no_more_is_rebuilt_from_the_links(
    node: Namespace, namespaces: Namespaces, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    pods = [namespaces.new() for _ in range(3)]
    long = "c" * 250

    async def main() -> None:
        async with agent(tmp_path) as a:
            for container, pod in zip(("c1", "c2", long), pods, strict=True):
                await a.add(container, pod)
            links = kernel_rows()
            used = a.attachments.addresses.used
        harm(tmp_path / "ledger.sqlite3")
        command("ip", "link", "add", "podwall00000001", "type", "veth", "peer", "name", "halfmade")
        async with agent(tmp_path) as a:
            assert kernel_rows() == a.rows() == links
            assert a.attachments.addresses.used == used
            adopted = a.attachments.current[key("c1")]
            assert (adopted.namespace, adopted.pod, adopted.pod_uid) == ("default", "pod-c1", "uid-c1")
            with pods[0].descriptor() as fd:
                assert await a.wiring.check(adopted, fd) == []
            for container in ("c1", "c2", long):
                await a.attachments.delete(key(container))
            await eventually(lambda: not kernel_links())
            assert not a.attachments.current

    asyncio.run(main())


def test_a_link_collision_takes_the_next_name(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    async def main() -> None:
        async with agent(tmp_path) as a:
            first = await a.add("c1", namespaces.new())
            await a.delete("c1")
            a.attachments._links.add(first.link)
            second = await a.add("c1", namespaces.new())
            a.attachments._shapers |= {first.shaper, second.shaper}
            assert second.link != first.link
            assert re.fullmatch(r"podwall[0-9a-f]{8}", second.link)

    asyncio.run(main())
