"""Routes as a function of Nodes: which way, what is refused, and what does not matter."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster.model import Node
from agent.routes.diff import Present, Step, conflicts, steps
from agent.routes.plan import (
    Forwarding,
    Mode,
    Neighbour,
    Plan,
    Route,
    UnknownNode,
    Uplink,
    Vxlan,
    plan_routes,
    pod_mtu,
    vtep_link_local,
    vtep_mac,
)


def node(name: str, ips: str, cidrs: str) -> Node:
    return Node(
        name=name,
        internal_ips=tuple(map(ip_address, ips.split())),
        pod_cidrs=tuple(map(ip_network, cidrs.split())),
    )


def uplink(addresses: str, subnets: str, mtu: int = 1500) -> Uplink:
    return Uplink(
        "eth0", 2, mtu, tuple(map(ip_address, addresses.split())), tuple(map(ip_network, subnets.split()))
    )


A = node("a", "192.168.0.1 fd77::1", "10.244.1.0/24 fd00:10:1::/64")
B = node("b", "192.168.0.2 fd77::2", "10.244.2.0/24 fd00:10:2::/64")
FAR = node("far", "192.168.9.2 fd99::2", "10.244.9.0/24 fd00:10:9::/64")
DUAL = uplink("192.168.0.1 fd77::1 fe80::1", "192.168.0.0/24 fd77::/64 fe80::/64")
OWN_RANGES = {"unreachable 10.244.1.0/24", "unreachable fd00:10:1::/64"}


def made(*nodes: Node, mode: Mode = "auto", link: Uplink = DUAL) -> Plan:
    return plan_routes("a", nodes, link, mode, vxlan_id=7, vxlan_port=4789)


def shown(plan: Plan) -> set[str]:
    return {str(route) for route in plan.routes} - OWN_RANGES


def tunnel6(peer: str) -> str:
    return str(vtep_link_local(vtep_mac(peer)))


V4_ONLY = uplink("192.168.0.1", "192.168.0.0/24")
V6_ONLY = uplink("fd77::1", "fd77::/64")
HOSTS = uplink("192.168.0.1", "192.168.0.254/32")
A4 = node("a", "192.168.0.1", "10.244.1.0/24 fd00:10:1::/64")
A6 = node("a", "fd77::1", "10.244.1.0/24 fd00:10:1::/64")
B4 = node("b", "192.168.0.2", "10.244.2.0/24 fd00:10:2::/64")
B6 = node("b", "fd77::2", "10.244.2.0/24 fd00:10:2::/64")

DIRECT_B = {"10.244.2.0/24 via 192.168.0.2 dev eth0", "fd00:10:2::/64 via fd77::2 dev eth0"}
TUNNEL_B = {
    "10.244.2.0/24 via 10.244.2.0 dev podwall-vxlan onlink",
    f"fd00:10:2::/64 via {tunnel6('b')} dev podwall-vxlan",
}

WAYS: dict[str, tuple[Mode, Uplink, Node, Node, set[str]]] = {
    "direct on a shared link": ("direct", DUAL, A, B, DIRECT_B),
    "auto on a shared link": ("auto", DUAL, A, B, DIRECT_B),
    "vxlan on a shared link": ("vxlan", DUAL, A, B, TUNNEL_B),
    "auto behind a router": (
        "auto",
        DUAL,
        A,
        FAR,
        {
            "10.244.9.0/24 via 10.244.9.0 dev podwall-vxlan onlink",
            f"fd00:10:9::/64 via {tunnel6('far')} dev podwall-vxlan",
        },
    ),
    "direct behind a router is refused": ("direct", DUAL, A, FAR, set()),
    "IPv6 Pods over IPv4 nodes, auto": (
        "auto",
        V4_ONLY,
        A4,
        B4,
        {"10.244.2.0/24 via 192.168.0.2 dev eth0", f"fd00:10:2::/64 via {tunnel6('b')} dev podwall-vxlan"},
    ),
    "IPv6 Pods over IPv4 nodes, direct": (
        "direct",
        V4_ONLY,
        A4,
        B4,
        {"10.244.2.0/24 via 192.168.0.2 dev eth0"},
    ),
    "IPv4 Pods over IPv6 nodes, direct": (
        "direct",
        V6_ONLY,
        A6,
        B6,
        {"10.244.2.0/24 via inet6 fd77::2 dev eth0", "fd00:10:2::/64 via fd77::2 dev eth0"},
    ),
    "vxlan over IPv6 nodes": ("vxlan", V6_ONLY, A6, B6, TUNNEL_B),
    "direct where the uplink has no subnet": (
        "direct",
        HOSTS,
        A4,
        B4,
        {"10.244.2.0/24 via 192.168.0.2 dev eth0 onlink"},
    ),
    "auto where the uplink has no subnet": ("auto", HOSTS, A4, B4, TUNNEL_B),
    "peers without a common family": ("vxlan", V4_ONLY, A4, B6, set()),
}


@pytest.mark.parametrize(("mode", "link", "own", "peer", "expected"), WAYS.values(), ids=WAYS.keys())
def test_way_to_a_peer(mode: Mode, link: Uplink, own: Node, peer: Node, expected: set[str]) -> None:
    plan = made(own, peer, mode=mode, link=link)
    assert shown(plan) == expected
    assert {path.cidr for path in plan.paths} == {route.destination for route in plan.routes} - set(
        own.pod_cidrs
    )
    unreached = set(peer.pod_cidrs) - {path.cidr for path in plan.paths}
    assert all(any(str(cidr) in problem.message for problem in plan.problems) for cidr in unreached)


def test_a_tunnel_is_a_route_a_neighbour_and_a_forwarding_entry() -> None:
    plan = made(A, FAR)
    mac = vtep_mac("far")
    assert plan.vxlan == Vxlan(
        7,
        4789,
        ip_address("192.168.0.1"),
        vtep_mac("a"),
        1450,
        frozenset(map(ip_address, ["10.244.1.0", "fd00:10:1::"])),
    )
    assert plan.neighbours == {
        Neighbour(ip_address("10.244.9.0"), mac),
        Neighbour(vtep_link_local(mac), mac),
    }
    assert plan.forwarding == {Forwarding(mac, ip_address("192.168.9.2"))}


def test_the_mac_of_a_tunnel_end_is_known_everywhere_and_local_unicast() -> None:
    assert vtep_mac("worker-1") == vtep_mac("worker-1") != vtep_mac("worker-2")
    first = int(vtep_mac("worker-1")[:2], 16)
    assert first & 0x03 == 0x02
    assert str(vtep_link_local("02:00:5e:10:00:01")) == "fe80::5eff:fe10:1"


MTUS: dict[str, tuple[Mode, Uplink, Node, int]] = {
    "direct": ("direct", DUAL, A, 1500),
    "vxlan over IPv4": ("vxlan", DUAL, A, 1450),
    "auto, though every peer is direct": ("auto", DUAL, A, 1450),
    "vxlan over IPv6": ("vxlan", V6_ONLY, A6, 1430),
    "jumbo frames": ("auto", uplink("192.168.0.1", "192.168.0.0/24", mtu=9000), A4, 8950),
}


@pytest.mark.parametrize(("mode", "link", "own", "expected"), MTUS.values(), ids=MTUS.keys())
def test_mtu_of_pods(mode: Mode, link: Uplink, own: Node, expected: int) -> None:
    assert pod_mtu(mode, made(own, mode=mode, link=link), link.mtu) == expected


def test_an_uplink_too_small_for_ipv6_in_a_tunnel_is_reported() -> None:
    plan = made(A4, link=uplink("192.168.0.1", "192.168.0.0/24", mtu=1320))
    assert [str(problem) for problem in plan.problems] == [
        "Node a: eth0's MTU leaves 1270 bytes in VXLAN; IPv6 needs 1280"
    ]


REFUSED: dict[str, tuple[list[Node], set[str], list[str]]] = {
    "own range first": (
        [A, node("0", "192.168.0.9", "10.244.0.0/16")],
        set(),
        ["Node 0, a: spec.podCIDRs 10.244.0.0/16 overlaps 10.244.1.0/24 of Node a, which keeps it"],
    ),
    "then the first by name": (
        [A, node("c", "192.168.0.3", "10.244.2.128/25"), B4],
        {"10.244.2.0/24 via 192.168.0.2 dev eth0", f"fd00:10:2::/64 via {tunnel6('b')} dev podwall-vxlan"},
        ["Node c, b: spec.podCIDRs 10.244.2.128/25 overlaps 10.244.2.0/24 of Node b, which keeps it"],
    ),
    "the same range twice in one Node": (
        [A, node("b", "192.168.0.2", "10.244.2.0/24 10.244.2.0/25")],
        {"10.244.2.0/24 via 192.168.0.2 dev eth0"},
        ["Node b: spec.podCIDRs 10.244.2.0/25 overlaps 10.244.2.0/24 of Node b, which keeps it"],
    ),
    "everything": (
        [A, node("b", "192.168.0.2", "0.0.0.0/0")],
        set(),
        ["Node b: spec.podCIDRs 0.0.0.0/0 is no range for Pods"],
    ),
    "multicast": (
        [A, node("b", "192.168.0.2", "ff00::/16")],
        set(),
        ["Node b: spec.podCIDRs ff00::/16 is no range for Pods"],
    ),
    "the nodes' own link": (
        [A, node("b", "192.168.0.2", "192.168.0.128/25")],
        set(),
        ["Node b: spec.podCIDRs 192.168.0.128/25 overlaps 192.168.0.0/24, the link of eth0"],
    ),
    "another node's address": (
        [A, node("b", "192.168.0.2", "192.168.8.0/23"), node("far", "192.168.9.2", "")],
        set(),
        [
            "Node far: spec.podCIDRs is empty: its Pods get no routes until it is set",
            "Node b, far: spec.podCIDRs 192.168.8.0/23 holds the InternalIP of Node far",
        ],
    ),
    "an InternalIP of this node": (
        [A, node("b", "192.168.0.1", "10.244.2.0/24")],
        set(),
        [
            "Node b, a: both have InternalIP 192.168.0.1; a keeps it",
            "Node b: 10.244.2.0/24 has no route: no InternalIP of 192.168.0.1's family for VXLAN",
        ],
    ),
    "an InternalIP of two peers": (
        [A, node("c", "192.168.0.2", "10.244.3.0/24"), node("b", "192.168.0.2", "10.244.2.0/24")],
        {"10.244.2.0/24 via 192.168.0.2 dev eth0"},
        [
            "Node c, b: both have InternalIP 192.168.0.2; b keeps it",
            "Node c: 10.244.3.0/24 has no route: no InternalIP of 192.168.0.1's family for VXLAN",
        ],
    ),
    "no InternalIP": (
        [A, node("b", "", "10.244.2.0/24")],
        set(),
        ["Node b: 10.244.2.0/24 has no route: no InternalIP of 192.168.0.1's family for VXLAN"],
    ),
}


@pytest.mark.parametrize(("nodes", "routes", "problems"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_node_is_reported_and_the_others_go_on(
    nodes: list[Node], routes: set[str], problems: list[str]
) -> None:
    good = node("z", "192.168.0.26", "10.244.26.0/24")
    plan = made(*nodes, good)
    assert shown(plan) == routes | {"10.244.26.0/24 via 192.168.0.26 dev eth0"}
    assert sorted(map(str, plan.problems)) == sorted(problems)


def test_without_its_own_node_nothing_is_planned() -> None:
    with pytest.raises(UnknownNode, match="Node a is not among"):
        made(B)


def test_an_internal_ip_that_is_not_on_the_uplink_leaves_no_tunnel() -> None:
    plan = made(node("a", "203.0.113.1", "10.244.1.0/24"), B)
    assert plan.vxlan is None
    assert "no InternalIP is on eth0" in str(plan.problems[0])


NAMES = st.sampled_from("bcdef")
RANGES = st.sampled_from(
    ["10.244.2.0/24", "10.244.2.0/25", "10.244.0.0/16", "10.245.0.0/24", "10.246.0.0/24"]
)
ADDRESSES = st.sampled_from(["192.168.0.2", "192.168.0.3", "192.168.9.2", "192.168.9.3"])
PEERS = st.lists(st.builds(node, NAMES, ADDRESSES, RANGES), max_size=5, unique_by=lambda peer: peer.name)
MODES = st.sampled_from(["auto", "direct", "vxlan"])


@given(PEERS, st.randoms(), MODES)
def test_the_order_of_nodes_does_not_matter(peers: list[Node], random, mode: Mode) -> None:
    shuffled = [A, *peers]
    random.shuffle(shuffled)
    assert made(*shuffled, mode=mode) == made(A, *peers, mode=mode)


def applied(present: Present, todo: tuple[Step, ...]) -> Present:
    """What the kernel would hold: an independent, strict reading of the steps."""
    routes = {route.destination: route for route in present.routes}
    neighbours = {entry.address: entry for entry in present.neighbours}
    forwarding = {entry.mac: entry for entry in present.forwarding}
    vxlan = present.vxlan
    for step in todo:
        item = step.item
        if isinstance(item, Vxlan):
            assert (vxlan is None) == (step.action == "create")
            vxlan = None if step.action == "delete" else item
            if vxlan is None:
                routes = {key: route for key, route in routes.items() if route.device != "podwall-vxlan"}
                neighbours, forwarding = {}, {}
            continue
        table, key = (
            (routes, item.destination)
            if isinstance(item, Route)
            else (neighbours, item.address)
            if isinstance(item, Neighbour)
            else (forwarding, item.mac)
        )
        if step.action == "delete":
            del table[key]
        else:
            assert step.action == "replace" or key not in table
            if isinstance(item, Route) and item.device == "podwall-vxlan":
                assert item.gateway in neighbours, "a route before its neighbour loses packets"
            table[key] = item
    return Present(
        frozenset(routes.values()),
        present.foreign,
        vxlan,
        frozenset(neighbours.values()),
        frozenset(forwarding.values()),
    )


def as_present(plan: Plan) -> Present:
    return Present(plan.routes, {}, plan.vxlan, plan.neighbours, plan.forwarding)


@given(PEERS, MODES, PEERS, MODES)
def test_any_plan_becomes_any_other(before: list[Node], old: Mode, after: list[Node], new: Mode) -> None:
    first, second = made(A, *before, mode=old), made(A, *after, mode=new)
    present = as_present(first)
    todo = steps(second, present)
    assert applied(present, todo) == as_present(second)
    assert steps(second, as_present(second)) == ()
    changed = {step.item.destination for step in todo if isinstance(step.item, Route)}
    kept = {route.destination for route in first.routes & second.routes}
    assert not changed & kept


def test_a_foreign_route_is_left_and_reported() -> None:
    plan = made(A, B)
    foreign = {ip_network("10.244.2.0/24"): "10.244.2.0/24 via 192.168.0.99 dev eth0 proto 4"}
    present = Present(foreign=foreign)
    assert not any("10.244.2.0/24" in str(step) for step in steps(plan, present))
    assert conflicts(plan, present) == (
        "route 10.244.2.0/24 via 192.168.0.2 dev eth0 is kept out by a foreign one: 10.244.2.0/24 via "
        "192.168.0.99 dev eth0 proto 4; remove it, or give the Node another range",
    )


def test_another_port_makes_the_device_anew_with_all_that_is_on_it() -> None:
    plan = made(A, B, FAR)
    other = plan_routes("a", [A, B, FAR], DUAL, "auto", vxlan_id=7, vxlan_port=8472)
    todo = steps(other, as_present(plan))
    assert [str(step).split()[0] for step in todo[:2]] == ["delete", "create"]
    assert applied(as_present(plan), todo) == as_present(other)
    assert not any(isinstance(step.item, Route) and step.item.device == "eth0" for step in todo)
