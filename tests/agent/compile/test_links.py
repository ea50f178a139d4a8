"""What is compiled for Pods' links and for the cluster's ranges, as a reviewer reads it."""

import os
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster.model import Node
from agent.compile import links, names
from agent.nft import render
from agent.nft.model import Element, Ruleset, SetName

GOLDEN = Path(__file__).parent / "golden"

NODES = (
    Node(
        "node-1",
        pod_cidrs=(ip_network("10.244.0.0/24"), ip_network("fd00:10:244::/64")),
        internal_ips=(ip_address("192.168.10.1"), ip_address("fd00:10::1")),
    ),
    Node(
        "node-2",
        pod_cidrs=(ip_network("10.244.1.0/24"), ip_network("fd00:10:244:1::/64")),
        internal_ips=(ip_address("192.168.10.2"), ip_address("fd00:10::2")),
        external_ips=(ip_address("203.0.113.2"),),
    ),
)
PODS = (
    ("podwall0a1b2c3d", ("10.244.0.7", "fd00:10:244::7"), "default", "web-0"),
    ("podwall4e5f6071", ("10.244.0.8",), "shop", "api-5d9c"),
)
ATTACHED = tuple(
    item
    for link, addresses, namespace, pod in PODS
    for item in links.link(link, map(ip_address, addresses), namespace, pod)
)


def _golden(name: str, text: str) -> None:
    """Equal to the file; UPDATE_GOLDEN=1 writes it, for the reviewer to read the difference."""
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_two_nodes_and_two_pods() -> None:
    _golden("links.nft", render.ruleset(Ruleset((*links.static(), *ATTACHED, *links.cluster(NODES)))))


def test_no_masquerade_leaves_what_a_pod_sends_to_itself() -> None:
    with_, without = Ruleset(links.static(masquerade=True)), Ruleset(links.static(masquerade=False))
    changed = {name for name, chain in with_.chains.items() if without.chains[name] != chain}
    assert {name.name for name in changed} == {"leave_cluster"}
    assert [rule.comment for rule in without.chains[changed.pop()].rules] == [
        "from a Pod to itself through a Service"
    ] * 2


OVERLAPS = {
    "same range twice": (["10.244.0.0/24", "10.244.0.0/24"], ["10.244.0.0/24"]),
    "one in the other": (
        ["10.244.1.0/24", "10.244.0.0/16", "10.245.0.0/24"],
        ["10.244.0.0/16", "10.245.0.0/24"],
    ),
    "everything": (["0.0.0.0/0", "10.244.0.0/24"], ["0.0.0.0/0"]),
    "neighbours stay apart": (["10.244.0.0/24", "10.244.1.0/24"], ["10.244.0.0/24", "10.244.1.0/24"]),
    "none": ([], []),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_ranges_never_overlap(case: str) -> None:
    """The kernel refuses overlapping ranges, and with them the whole transaction."""
    given_, kept = OVERLAPS[case]
    nodes = [Node(f"n{number}", pod_cidrs=(ip_network(cidr),)) for number, cidr in enumerate(given_)]
    assert _ranges(nodes, "pod_cidrs4") == {ip_network(cidr) for cidr in kept}


NETWORKS = st.builds(
    lambda start, length: ip_network((start, length), strict=False),
    st.integers(0x0AF40000, 0x0AF403FF),
    st.integers(8, 32),
)


@given(st.lists(NETWORKS, max_size=12))
def test_ranges_cover_the_same_and_do_not_overlap(networks: list[links.Network]) -> None:
    nodes = [Node(f"n{number}", pod_cidrs=(network,)) for number, network in enumerate(networks)]
    kept = [ip_network(key) for key in _ranges(nodes, "pod_cidrs4")]
    assert all(any(network.subnet_of(other) for other in kept) for network in networks)
    assert not any(one.overlaps(other) for one in kept for other in kept if one is not other)


def _ranges(nodes: list[Node], name: str) -> set[object]:
    return {
        item.key
        for item in links.cluster(nodes)
        if isinstance(item, Element) and item.set == SetName(names.TABLE, name)
    }


def test_a_node_address_inside_a_pod_range_of_another_node() -> None:
    nodes = [*NODES, Node("liar", internal_ips=(ip_address("10.244.1.5"),))]
    assert _ranges(nodes, "cluster4") == _ranges(list(NODES), "cluster4")


# Names and comments


COMMENTS = {
    "plain": (("default", "web-0"), "default/web-0"),
    "quote": (("default", 'a"; flush ruleset; "'), "default/a?; flush ruleset; ?"),
    "backslash, newline, other letters": (("d", "a\\b\nc\u00e9\u2028"), "d/a?b?c??"),
    "nothing": (("",), ""),
}


@pytest.mark.parametrize("case", COMMENTS)
def test_comments(case: str) -> None:
    parts, text = COMMENTS[case]
    assert names.comment(*parts) == text


def test_long_comments_are_shortened_and_stay_apart() -> None:
    one, other = names.comment("n" * 63, "p" * 253, "a"), names.comment("n" * 63, "q" + "p" * 252, "a")
    assert len(one) == len(other) == render.COMMENT_BYTES
    assert one != other
    assert one.startswith("nnn")
    assert one.endswith("ppp/a")


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_comment_can_be_quoted(parts: list[str]) -> None:
    render.quoted(names.comment(*parts), render.COMMENT_BYTES)


def test_digests_of_different_parts_differ() -> None:
    assert names.digest("a", "b/c") != names.digest("a/b", "c")
    assert names.digest("a", "b") == names.digest("a", "b")
