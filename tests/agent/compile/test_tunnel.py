"""What the tunnel needs in nftables: whose packets it takes, and which Nodes are behind it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from agent.cluster.model import Node
from agent.compile import links, tunnel
from agent.nft import render
from agent.nft.model import Element, Item, Ruleset
from agent.routes.plan import Mode, Plan, Uplink, plan_routes


def node(name: str, number: int, subnet: int) -> Node:
    return Node(
        name=name,
        internal_ips=(ip_address(f"192.168.{subnet}.{number}"), ip_address(f"fd{subnet}::{number}")),
        external_ips=(ip_address(f"203.0.113.{number}"),),
        pod_cidrs=(ip_network(f"10.244.{number}.0/24"), ip_network(f"fd00:10:{number}::/64")),
    )


NODES = (node("a", 1, 77), node("b", 2, 77), node("far", 9, 88))
UPLINK = Uplink(
    "eth0",
    2,
    1500,
    (ip_address("192.168.77.1"), ip_address("fd77::1")),
    (ip_network("192.168.77.0/24"), ip_network("fd77::/64")),
)


def planned(mode: Mode) -> Plan:
    return plan_routes("a", NODES, UPLINK, mode, vxlan_id=9619, vxlan_port=4789)


def elements(items: list[Item]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for item in items:
        if isinstance(item, Element):
            found.setdefault(item.set.name, set()).add(str(item.key))
    return found


def test_without_a_tunnel_nothing_is_said() -> None:
    assert list(tunnel.items("a", NODES, planned("direct"))) == []


def test_only_other_nodes_are_peers_and_only_the_distant_are_behind() -> None:
    assert elements(list(tunnel.items("a", NODES, planned("auto")))) == {
        "tunnel_peers4": {"192.168.77.2", "192.168.88.9"},
        "tunnel_peers6": {"fd77::2", "fd88::9"},
        "behind_tunnel4": {"192.168.88.9", "203.0.113.9"},
        "behind_tunnel6": {"fd88::9"},
    }
    everyone = elements(list(tunnel.items("a", NODES, planned("vxlan"))))
    assert everyone["behind_tunnel6"] == {"fd77::2", "fd88::9"}


def test_the_rules_read_like_their_purpose() -> None:
    items = [*links.static(), *tunnel.items("a", NODES, planned("auto"))]
    text = " ".join(render.ruleset(Ruleset(items)).split())
    for rule in (
        "udp dport 4789 ip saddr != @tunnel_peers4 counter drop",
        "udp dport 4789 ip6 saddr != @tunnel_peers6 counter drop",
        'udp dport 4789 iifname "podwall*" iifname != "podwall-*" ip daddr != @pod_cidrs4 counter drop',
        "ip saddr @pod_cidrs4 ip daddr @behind_tunnel4 counter masquerade fully-random",
    ):
        assert rule in text, text


def test_without_masquerade_the_network_beneath_knows_the_pods() -> None:
    items = [*links.static(), *tunnel.items("a", NODES, planned("auto"), masquerade=False)]
    chain = render.ruleset(Ruleset(items)).split("to_node_behind_tunnel")[1].split("}")[0]
    assert "masquerade" not in chain
