"""Paths between nodes tried with real packets: those that pass, and what is said of those that do not.

here 10.244.1.0/24 -- eth0 172.31.0.1 ======= eth0 172.31.0.2 -- there 10.244.2.0/24, and the same in IPv6
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent import reachability
from agent.cluster.model import Node
from agent.reachability import Seen, Trial
from agent.routes.plan import Path as Way
from agent.routes.plan import Plan
from lab import netns
from lab.processes import until

PREFIX = f"podwall-t{os.getpid()}-reach"
HERE, THERE = f"{PREFIX}-here", f"{PREFIX}-there"
CIDRS = {4: ("10.244.1.0/24", "10.244.2.0/24"), 6: ("fd00:244:1::/64", "fd00:244:2::/64")}
LINK = {4: ("172.31.0.1", "172.31.0.2"), 6: ("fd31::1", "fd31::2")}
MTU = 1500


def ip(name: str, *words: str) -> None:
    subprocess.run(("ip", "-n", name, *words), check=True, capture_output=True, timeout=10)


def nft(name: str, text: str) -> None:
    netns.run(netns.path(name), lambda: subprocess.run(["nft", text], check=True, timeout=10))


@pytest.fixture
def link() -> Iterator[None]:
    """Two nodes, routed to each other; `there` has no address of its own Pod range."""
    for name in (HERE, THERE):
        netns.create(name)
    try:
        ip(HERE, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", THERE)
        for at, name in enumerate((HERE, THERE)):
            netns.run(netns.path(name), netns.set_sysctl, "ipv6/conf/eth0/accept_dad", "0")
            ip(name, "link", "set", "eth0", "up")
            netns.run(netns.path(name), netns.set_sysctl, "ipv4/ip_forward", "1")
            netns.run(netns.path(name), netns.set_sysctl, "ipv6/conf/all/forwarding", "1")
            for family, length in ((4, 24), (6, 64)):
                nodad = ("nodad",) if family == 6 else ()
                ip(name, "addr", "add", f"{LINK[family][at]}/{length}", "dev", "eth0", *nodad)
                ip(name, "route", "add", "unreachable", CIDRS[family][at])
                ip(name, "route", "add", CIDRS[family][1 - at], "via", LINK[family][1 - at])
        for name, address in ((HERE, LINK[6][0]), (THERE, LINK[6][1])):
            _wait_until_found(name, address)
        yield
    finally:
        for name in list(netns.names(PREFIX)):
            netns.remove(name)


def _wait_until_found(name: str, address: str) -> None:
    """Wait until a neighbour can find an IPv6 address: the kernel joins its group in the background."""
    group = "ff0200000000000000000001ff" + ip_address(address).packed[-3:].hex()
    groups = Path("/proc/thread-self/net/igmp6")
    until(
        lambda: group in netns.run(netns.path(name), groups.read_text), 5, lambda: f"{address} is in no group"
    )


def trial(family: int, **changed: object) -> Trial:
    known = frozenset(map(ip_address, (LINK[family][1], CIDRS[family][1].split("/")[0])))
    fields: dict[str, object] = {
        "node": "there",
        "cidr": ip_network(CIDRS[family][1]),
        "way": "direct",
        "source": ip_network(CIDRS[family][0]).network_address,
        "known": known,
        "mtu": MTU,
    }
    return Trial(**{**fields, **changed})  # type: ignore[arg-type]


def tried(*trials: Trial) -> list[dict[str, object]]:
    async def work() -> list[Seen]:
        return await reachability.tried(trials)

    seen = netns.run(netns.path(HERE), lambda: asyncio.run(work()))
    return [reachability.told(*each) for each in zip(trials, seen, strict=True)]


@pytest.mark.parametrize("family", [4, 6])
def test_a_node_without_tunnel_answers_by_its_own_range(link: None, family: int) -> None:
    (found,) = tried(trial(family))
    assert (found["ok"], found["reason"], found["by"], found["bytes"]) == (True, "", "eth0", MTU)
    assert isinstance(found["ms"], float)


@pytest.mark.parametrize("family", [4, 6])
def test_a_node_with_a_tunnel_answers_itself(link: None, family: int) -> None:
    address = CIDRS[family][1].split("/")[0]
    nodad = ("nodad",) if family == 6 else ()
    ip(THERE, "addr", "add", f"{address}/{32 if family == 4 else 128}", "dev", "lo", *nodad)
    (found,) = tried(trial(family))
    assert (found["ok"], found["reason"], found["bytes"]) == (True, "", MTU)


def test_silence_is_told_with_the_address_that_was_asked(link: None) -> None:
    ip(THERE, "link", "set", "eth0", "down")
    ip(HERE, "addr", "add", "172.31.0.9/24", "dev", "eth0")
    (found,) = tried(trial(4))
    assert not found["ok"]
    assert "10.244.2.0" in str(found["reason"])


def test_without_a_route_this_node_is_to_blame(link: None) -> None:
    ip(HERE, "route", "del", CIDRS[4][1])
    (found,) = tried(trial(4))
    assert found["reason"] == "this node cannot send to 10.244.2.0: Network is unreachable"


def test_one_direction_is_not_enough(link: None) -> None:
    """The other node gets the packet, but its answer for a Pod has no way back."""
    ip(THERE, "route", "del", CIDRS[4][0])
    (found,) = tried(trial(4))
    assert found["reason"] == "no answer from 10.244.2.0 within 1.2 s (direct)"


def test_somebody_elses_objection_is_no_answer(link: None) -> None:
    (found,) = tried(trial(4, known=frozenset()))
    assert found["reason"] == "172.31.0.2 says that 10.244.2.0 cannot be reached (direct)"


@pytest.mark.parametrize("family", [4, 6])
def test_large_packets_that_are_lost_are_told_apart(link: None, family: int) -> None:
    nft(THERE, "add table inet t; add chain inet t c { type filter hook prerouting priority -500; }")
    nft(THERE, f"add rule inet t c meta length > {MTU - 100} drop")
    (found,) = tried(trial(family))
    assert (found["ok"], found["bytes"] is not None) == (False, True)
    assert str(found["reason"]).startswith(f"small packets pass, those of {MTU} bytes, the Pods' MTU, do not")


def test_a_tunnelled_path_is_answered_through_the_tunnel(link: None) -> None:
    (found,) = tried(trial(4, way="vxlan"))
    assert found["reason"] == "the path is vxlan, but the answer came by eth0"


def test_all_paths_are_tried_at_once(link: None) -> None:
    lost = trial(4, node="gone", cidr=ip_network("10.244.9.0/24"))
    outcomes = tried(trial(4), lost, trial(6))
    assert [each["ok"] for each in outcomes] == [True, False, True]


# What there is to try. Pure.


def node(name: str, at: int, *families: int) -> Node:
    return Node(
        name,
        pod_cidrs=tuple(ip_network(CIDRS[family][at]) for family in families),
        internal_ips=tuple(ip_address(LINK[family][at]) for family in families),
    )


def test_paths_of_a_family_that_this_node_has_not_are_left_out() -> None:
    nodes = {"here": node("here", 0, 4), "there": node("there", 1, 4, 6)}
    paths = tuple(Way("there", ip_network(CIDRS[family][1]), "direct") for family in (4, 6))
    found = reachability.trials("here", nodes, Plan(paths=paths), MTU)
    assert [(each.family, str(each.source)) for each in found] == [(4, "10.244.1.0")]
    assert found[0].known == {
        ip_address("172.31.0.2"),
        ip_address("10.244.2.0"),
        ip_address("fd31::2"),
        ip_address("fd00:244:2::"),
    }


def test_nodes_without_a_path_are_named() -> None:
    nodes = {"here": node("here", 0, 4), "there": node("there", 1, 4), "lost": node("lost", 1)}
    plan = Plan(paths=(Way("there", ip_network(CIDRS[4][1]), "direct"),))
    assert reachability.without_path("here", nodes, plan) == ("lost",)
