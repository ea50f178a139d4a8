"""Paths of known size, measured by real packets between two network namespaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from agent.path_mtu import measure
from lab import netns
from tests.linux import command

FIRST, ROUTER, SECOND = "podwall-tmtu1", "podwall-tmtu2", "podwall-tmtu3"
ADDRESS = {4: "172.31.2.2", 6: "fd31:2::2"}


def inside(name: str, *words: str) -> None:
    netns.run(netns.path(name), command, *words)


@pytest.fixture(scope="module")
def router() -> Iterator[Callable[[int], None]]:
    """Two hosts behind a bridge that drops larger frames without a word; returns what sets its size."""
    made = []
    try:
        for name in (FIRST, ROUTER, SECOND):
            netns.create(name)
            made.append(name)
        inside(ROUTER, "ip", "link", "add", "name", "bridge0", "type", "bridge", "mcast_snooping", "0")
        inside(ROUTER, "ip", "link", "set", "bridge0", "up")
        for number, name in ((1, FIRST), (2, SECOND)):
            words = ["ip", "link", "add", f"p{number}", "type", "veth", "peer", "eth0", "netns", name]
            inside(ROUTER, *words)
            inside(ROUTER, "ip", "link", "set", f"p{number}", "master", "bridge0", "up", "mtu", "9000")
            inside(name, "ip", "link", "set", "eth0", "up", "mtu", "9000")
            inside(name, "ip", "addr", "add", f"172.31.2.{number}/24", "dev", "eth0")
            inside(name, "ip", "addr", "add", f"fd31:2::{number}/64", "dev", "eth0", "nodad")
        yield lambda mtu: inside(ROUTER, "ip", "link", "set", "p2", "mtu", str(mtu))
    finally:
        for name in made:
            netns.remove(name)


CASES = [(9000, 9000, 9000), (1500, 1500, 1500), (1500, 9000, 1500), (1400, 1450, 1400), (1281, 9000, 1281)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("mtu", "asked", "takes"), CASES, ids=str)
def test_what_a_path_takes(
    router: Callable[[int], None], mtu: int, asked: int, takes: int, version: int
) -> None:
    router(mtu)
    target = ip_address(ADDRESS[version])

    (path,) = netns.run(netns.path(FIRST), measure, {target: asked}).values()

    assert (path.asked, path.takes) == (asked, takes)


def test_what_this_node_itself_cannot_send(router: Callable[[int], None]) -> None:
    router(9000)
    target = ip_address(ADDRESS[4])
    assert netns.run(netns.path(FIRST), measure, {target: 9100})[target].takes == 9000


def test_nobody_there(router: Callable[[int], None]) -> None:
    nobody, far = ip_address("172.31.2.9"), ip_address("192.0.2.1")
    found = netns.run(netns.path(FIRST), measure, {nobody: 1500, far: 1500})
    assert [found[nobody].takes, found[far].takes] == [0, 0]
