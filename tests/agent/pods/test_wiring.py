"""A Pod's link in a real kernel: what it is made of, what a check sees, and how it goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from agent.pods.model import Attachment
from agent.pods.rtnetlink import PROTOCOL
from agent.pods.wiring import RETIRED, Wiring, WiringError
from cni.spec import Bandwidth
from lab import netns
from tests.agent.pods.world import Namespace, Namespaces, attachment, kernel_links, kernel_rows
from tests.linux import command


@contextlib.asynccontextmanager
async def wiring() -> AsyncIterator[Wiring]:
    made = Wiring()
    try:
        yield made
    finally:
        await made.close()


async def attach(made: Wiring, a: Attachment, pod: Namespace) -> None:
    with pod.descriptor() as fd:
        await made.attach(a, fd)


def as_json(*words: str) -> Any:
    return json.loads(command(*words) or "[]")


def test_the_link_is_as_designed(node: Namespace, namespaces: Namespaces) -> None:
    pod, a = namespaces.new(), attachment()

    async def main() -> None:
        async with wiring() as made:
            await attach(made, a, pod)

    asyncio.run(main())
    (inside,) = as_json("ip", "-n", pod.name, "-j", "-d", "addr", "show", "dev", "eth0")
    assert inside["address"] == a.mac
    assert inside["mtu"] == a.mtu
    assert [(i["local"], i["prefixlen"], i.get("tentative")) for i in inside["addr_info"]] == [
        ("10.244.1.5", 32, None),
        ("fd00::5", 128, None),
    ]
    (outside,) = as_json("ip", "-j", "-d", "addr", "show", "dev", a.link)
    assert outside["address"] == a.host_mac
    assert outside["mtu"] == a.mtu
    assert outside["addr_info"] == []
    assert outside["ifalias"] == "container-5 eth0 uid-5 default/web-5"

    assert [(r["dst"], r.get("gateway"), r["protocol"]) for r in routes(pod.name)] == [
        ("default", "169.254.1.1", str(PROTOCOL)),
        ("169.254.1.1", None, str(PROTOCOL)),
        ("default", "fe80::1", str(PROTOCOL)),
    ]
    assert [(r["dst"], r["dev"], r["protocol"]) for r in routes(node.name)] == [
        ("10.244.1.5", a.link, str(PROTOCOL)),
        ("fd00::5", a.link, str(PROTOCOL)),
    ]
    assert neighbours(pod.name) == {("169.254.1.1", a.host_mac), ("fe80::1", a.host_mac)}
    assert neighbours(node.name) == {("10.244.1.5", a.mac), ("fd00::5", a.mac)}
    for namespace, device in ((pod, "eth0"), (node, a.link)):
        settings = f"/proc/sys/net/ipv6/conf/{device}"
        assert namespace.exec("cat", f"{settings}/accept_ra", f"{settings}/addr_gen_mode").split() == [
            "0",
            "1",
        ]


def routes(namespace: str) -> list[Any]:
    found = [
        *as_json("ip", "-n", namespace, "-j", "route"),
        *as_json("ip", "-n", namespace, "-j", "-6", "route"),
    ]
    return [route for route in found if route["protocol"] != "kernel"]


def neighbours(namespace: str) -> set[tuple[str, str]]:
    found = as_json("ip", "-n", namespace, "-j", "neigh")
    assert all(each["state"] == ["PERMANENT"] for each in found)
    return {(each["dst"], each["lladdr"]) for each in found}


def test_the_addresses_work_at_once(node: Namespace, namespaces: Namespaces) -> None:
    pod, a = namespaces.new(), attachment()

    async def main() -> None:
        async with wiring() as made:
            await attach(made, a, pod)
            command("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
            command("ip", "addr", "add", "2001:db8::1/128", "dev", "lo", "nodad")
            for address in ("192.0.2.1", "2001:db8::1"):
                assert await asyncio.to_thread(transfer, pod, 10, True, address) < 0.5
                assert await asyncio.to_thread(transfer, pod, 10, False, address) < 0.5

    asyncio.run(main())


def test_the_addresses_are_the_pods_at_once_while_other_links_go(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    """The kernel makes an IPv6 address its own in the background, when nobody else holds its network lock."""
    others = namespaces.new("others")
    pods = [namespaces.new() for _ in range(20)]
    links = tmp_path / "links"
    links.write_text("link add name a type veth peer name b\nlink del dev a\n" * 2000)

    async def story() -> list[str]:
        missing = []
        async with wiring() as made:
            for number, pod in enumerate(pods, 1):
                a = attachment(number)
                await attach(made, a, pod)
                if not is_local(pod, a.addresses[1]):
                    missing.append(a.pod)
        return missing

    churn = subprocess.Popen(["ip", "-n", others.name, "-batch", str(links)])
    try:
        assert asyncio.run(story()) == []
        assert churn.poll() is None, "the links were gone too early"
    finally:
        churn.kill()
        churn.wait()


def is_local(pod: Namespace, address: IPv4Address | IPv6Address) -> bool:
    """Whether the Pod's kernel takes packets to this IPv6 address for itself (RTF_LOCAL)."""
    table = netns.run(Path(pod.path), Path("/proc/thread-self/net/ipv6_route").read_text)
    rows = [line.split() for line in table.splitlines()]
    return any(row[0] == address.packed.hex() and int(row[8], 16) & 0x80000000 for row in rows)


@pytest.mark.parametrize("version", [4, 6])
def test_a_single_family(node: Namespace, namespaces: Namespaces, version: int) -> None:
    pod = namespaces.new()
    a = attachment(addresses=tuple(each for each in attachment().addresses if each.version == version))

    async def main() -> None:
        async with wiring() as made:
            await attach(made, a, pod)
            with pod.descriptor() as fd:
                assert await made.check(a, fd) == []

    asyncio.run(main())


def test_ipv6_that_is_off_by_default_is_turned_on_for_the_link(
    node: Namespace, namespaces: Namespaces
) -> None:
    pod, a = namespaces.new(), attachment()
    for namespace in (node, pod):
        namespace.exec("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")

    async def main() -> list[str]:
        async with wiring() as made:
            await attach(made, a, pod)
            with pod.descriptor() as fd:
                return await made.check(a, fd)

    assert asyncio.run(main()) == []


BREAKS: dict[str, tuple[Callable[[str, str, Attachment], object], str]] = {
    "link deleted": (lambda _, __, a: command("ip", "link", "del", a.link), "link {link} is gone"),
    "link down": (lambda _, __, a: command("ip", "link", "set", a.link, "down"), "link {link} is down"),
    "host MTU": (
        lambda _, __, a: command("ip", "link", "set", a.link, "mtu", "1400"),
        "link {link} has MTU 1400, not 1450",
    ),
    "host MAC": (
        lambda _, __, a: command("ip", "link", "set", a.link, "address", "02:00:00:00:00:09"),
        "link {link} has hardware address 02:00:00:00:00:09, not ",
    ),
    "host route": (
        lambda _, __, a: command("ip", "route", "del", "10.244.1.5"),
        "link {link} has lost the route 10.244.1.5",
    ),
    "host neighbour": (
        lambda _, __, a: command(
            "ip", "neigh", "replace", "fd00::5", "lladdr", "02:00:00:00:00:09", "dev", a.link
        ),
        "link {link} has lost the neighbour fd00::5 at ",
    ),
    "Pod's address": (
        lambda pod, *_: command("ip", "-n", pod, "addr", "del", "fd00::5/128", "dev", "eth0"),
        "interface eth0 in the Pod has lost address fd00::5",
    ),
    "Pod's route": (
        lambda pod, *_: command("ip", "-n", pod, "route", "del", "default"),
        "interface eth0 in the Pod has lost the route default via 169.254.1.1",
    ),
    "Pod's neighbour": (
        lambda pod, *_: command("ip", "-n", pod, "neigh", "del", "fe80::1", "dev", "eth0"),
        "interface eth0 in the Pod has lost the neighbour fe80::1 at ",
    ),
    "Pod's name": (
        lambda pod, *_: (
            command("ip", "-n", pod, "link", "set", "eth0", "down"),
            command("ip", "-n", pod, "link", "set", "eth0", "name", "eth9"),
        ),
        "interface eth0 in the Pod is gone",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_check_names_what_is_different(node: Namespace, namespaces: Namespaces, name: str) -> None:
    pod, a = namespaces.new(), attachment()
    act, message = BREAKS[name]

    async def main() -> list[str]:
        async with wiring() as made:
            await attach(made, a, pod)
            with pod.descriptor() as fd:
                assert await made.check(a, fd) == []
                act(pod.name, node.name, a)
                return await made.check(a, fd)

    found = asyncio.run(main())
    assert any(message.format(link=a.link) in each for each in found), found


def test_restore_repairs_the_hosts_side(node: Namespace, namespaces: Namespaces) -> None:
    pod, a = namespaces.new(), attachment()

    async def main() -> None:
        async with wiring() as made:
            await attach(made, a, pod)
            command("ip", "link", "set", a.link, "down")
            await made.restore(a)
            with pod.descriptor() as fd:
                assert await made.check(a, fd) == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/null", "CNI_NETNS is not a network namespace"),
        ("/proc/self/ns/mnt", "CNI_NETNS is not a network namespace"),
        ("/proc/thread-self/ns/net", "CNI_NETNS is the node's own network namespace"),
    ],
)
def test_what_is_no_pods_namespace(node: Namespace, path: str, message: str) -> None:
    async def main() -> None:
        async with wiring() as made:
            fd = os.open(path, os.O_RDONLY)
            try:
                with pytest.raises(WiringError, match=message):
                    await made.attach(attachment(), fd)
            finally:
                os.close(fd)

    asyncio.run(main())
    assert kernel_links() == set()


def test_an_mtu_that_ipv6_cannot_use(node: Namespace, namespaces: Namespaces) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with wiring() as made:
            with pytest.raises(WiringError, match="MTU 1200 is less than IPv6 needs"):
                await attach(made, attachment(mtu=1200), pod)

    asyncio.run(main())


def test_an_interface_that_is_there_already(node: Namespace, namespaces: Namespaces) -> None:
    pod = namespaces.new()

    async def main() -> None:
        async with wiring() as made:
            await attach(made, attachment(5), pod)
            with pytest.raises(WiringError, match="the Pod's namespace has an interface eth0 already"):
                await attach(made, attachment(6), pod)

    asyncio.run(main())


def test_retired_links_are_out_at_once_and_removed_together(node: Namespace, namespaces: Namespaces) -> None:
    pods = [namespaces.new() for _ in range(6)]
    made_of = [attachment(number) for number in range(1, 7)]

    async def main() -> None:
        async with wiring() as made:
            for a, pod in zip(made_of, pods, strict=True):
                await attach(made, a, pod)
            begun = time.perf_counter()
            await made.retire([a.link for a in made_of[:5]])
            retiring = time.perf_counter() - begun
            assert kernel_rows()[made_of[0].link] == (), "no route leads to it"
            assert {f.link for f in await made.find() if f.retired} == {a.link for a in made_of[:5]}
            await made.remove()
            assert kernel_links() == {made_of[5].link}
            await made.retire([a.link for a in made_of[:5]])
            await made.remove()
            assert retiring < 0.1

    asyncio.run(main())


def test_another_programs_link_in_the_group_is_not_removed(node: Namespace) -> None:
    command("ip", "link", "add", "theirs", "group", str(RETIRED), "type", "veth", "peer", "name", "theirs2")

    async def main() -> None:
        async with wiring() as made:
            with pytest.raises(
                WiringError, match=r"device theirs is in link group 0x706f6477, podwall's: move it out"
            ):
                await made.remove()

    asyncio.run(main())
    assert "theirs" in kernel_links()


def test_find_tells_whose_a_link_is(node: Namespace, namespaces: Namespaces) -> None:
    pod, nameless = namespaces.new(), namespaces.new()
    a = attachment()
    long = attachment(6, container_id="c" * 250)

    async def main() -> None:
        async with wiring() as made:
            await attach(made, a, pod)
            await attach(made, long, nameless)
            command("ip", "link", "add", "podwall-vxlan", "type", "veth", "peer", "name", "podwall0000000g")
            first, second = sorted(await made.find(), key=lambda found: found.addresses[0])
            assert (first.link, first.key, first.addresses) == (a.link, a.key, a.addresses)
            assert (first.namespace, first.pod, first.pod_uid) == ("default", "web-5", "uid-5")
            assert (first.mac, first.host_mac, first.mtu, first.up) == (a.mac, a.host_mac, a.mtu, True)
            assert (second.link, second.key, second.addresses) == (long.link, None, long.addresses)

    asyncio.run(main())


def test_bandwidth_is_limited_both_ways_outside_the_pod(node: Namespace, namespaces: Namespaces) -> None:
    pod = namespaces.new()
    rate = 16_000_000  # 2 MB/s
    a = attachment(bandwidth=Bandwidth(rate, 400_000, rate, 400_000))
    command("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")

    async def main() -> None:
        async with wiring() as made:
            await attach(made, a, pod)
            with pod.descriptor() as fd:
                assert await made.check(a, fd) == []
            assert as_json("ip", "-n", pod.name, "-j", "-d", "link", "show", "eth0")[0]["qdisc"] == "noqueue"
            for send_inside in (True, False):
                seconds = await asyncio.to_thread(transfer, pod, 1_000_000, send_inside)
                assert 0.3 < seconds < 3, f"1 MB at 2 MB/s, sent from the {'Pod' if send_inside else 'node'}"
            await made.retire([a.link])
            await made.remove()
            assert kernel_links() == set()

    asyncio.run(main())


def transfer(pod: Namespace, size: int, send_inside: bool, address: str = "192.0.2.1") -> float:
    """Seconds for so many bytes between a program in the Pod and this one."""
    program = f"import socket,sys\ns=socket.create_connection(('{address}',4000),1)\nn={size}\n" + (
        "s.sendall(bytes(n)); s.shutdown(1); s.recv(1)\n"
        if send_inside
        else "while n>0: n-=len(s.recv(65536))\ns.sendall(b'x')\n"
    )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 4000), family=family) as server:
        server.settimeout(10)
        with subprocess.Popen(["ip", "netns", "exec", pod.name, sys.executable, "-ISc", program]) as process:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(10)
                begun = time.perf_counter()
                if send_inside:
                    while connection.recv(65536):
                        pass
                    seconds = time.perf_counter() - begun
                    connection.sendall(b"x")
                else:
                    connection.sendall(bytes(size))
                    connection.recv(1)
                    seconds = time.perf_counter() - begun
        assert process.returncode == 0
    return seconds


def test_orphaned_shaping_devices_go(node: Namespace, namespaces: Namespaces) -> None:
    pod, kept = namespaces.new(), namespaces.new()
    limits = Bandwidth(0, 0, 8_000_000, 80_000)

    async def main() -> None:
        async with wiring() as made:
            a, b = attachment(5, bandwidth=limits), attachment(6, bandwidth=limits)
            await attach(made, a, pod)
            await attach(made, b, kept)
            command("ip", "link", "del", a.link)
            await made.retire_shapers([b.link])
            await made.remove()
            assert kernel_links() == {b.link, b.shaper}

    asyncio.run(main())


def test_settings_that_cannot_be_written_are_named(
    node: Namespace, namespaces: Namespaces, tmp_path: Path
) -> None:
    pod = namespaces.new()

    async def main() -> None:
        made = Wiring(sysctl=tmp_path)
        try:
            with pytest.raises(WiringError, match="disable_ipv6 is missing: the kernel runs without IPv6"):
                await attach(made, attachment(), pod)
        finally:
            await made.close()

    asyncio.run(main())
