"""Who may speak through the tunnel, and how Pods reach nodes that are behind one.

The kernel takes whatever comes to the VXLAN port for a frame of a peer: it looks neither at the outer source
nor at whose the inner one is. A Pod that sends such a packet to its own node, or to another, would put any
packet it likes on podwall-vxlan, where no link says what its source may be. So:

    input    [-10]  to the VXLAN port, from an address that is no Node's: drop
    forward  [-10]  from a Pod's link to the VXLAN port of anything but a Pod: drop

The second is needed because a packet that leaves the cluster is masqueraded and would arrive with the address
of a Node. Both stand behind destination NAT, so a Service cannot lead around them. A Pod may send to that
port of another Pod, and loses that of hosts outside; another `vxlan_port` gives it back.

    postrouting [101]  from a Pod to a Node that is reached by tunnel: masquerade

A packet to a Node's own address cannot go through the tunnel (there the tunnel's own packets go), and a
router that knows no Pods would drop it for its source. Its node's address gets it there and the answer back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from agent.cluster.model import IPAddress, Node
from agent.compile.links import POD_CIDRS
from agent.compile.names import TABLE
from agent.compile.packets import ADDRESS_TYPES, FAMILIES, IP, on_pod_link
from agent.nft.model import (
    DROP,
    Chain,
    Counter,
    Element,
    Hook,
    Item,
    Match,
    Named,
    Nat,
    Owner,
    Payload,
    Rule,
    Set,
    SetName,
)
from agent.routes.plan import Plan

TUNNEL: Owner = ("tunnel",)
BEFORE_FILTER = -10
AFTER_SOURCE_NAT = 101

PEERS = {4: SetName(TABLE, "tunnel_peers4"), 6: SetName(TABLE, "tunnel_peers6")}
BEHIND = {4: SetName(TABLE, "behind_tunnel4"), 6: SetName(TABLE, "behind_tunnel6")}


def items(own: str, nodes: Iterable[Node], plan: Plan, masquerade: bool = True) -> Iterator[Item]:
    """What the tunnel of this plan needs in `inet podwall`; nothing without one (mode `direct`)."""
    if plan.vxlan is None:
        return
    nodes = tuple(nodes)
    yield from guard(own, nodes, plan.vxlan.port)
    for version, kind in ADDRESS_TYPES.items():
        yield Set(TABLE, BEHIND[version].name, (kind,))
    yield _postrouting(masquerade)
    yield from (Element(BEHIND[ip.version], ip) for ip in _behind(nodes, plan))


def guard(own: str, nodes: Iterable[Node], port: int) -> Iterator[Item]:
    """What keeps everybody but Nodes from speaking into a tunnel at this port."""
    for version, kind in ADDRESS_TYPES.items():
        yield Set(TABLE, PEERS[version].name, (kind,))
    yield _input(port)
    yield _forward(port)
    peers = {ip for node in nodes if node.name != own for ip in node.internal_ips}
    yield from (Element(PEERS[ip.version], ip) for ip in peers)


def _behind(nodes: Iterable[Node], plan: Plan) -> set[IPAddress]:
    """The addresses of Nodes whose Pods of the same family are reached by tunnel."""
    tunnelled = {(path.node, path.cidr.version) for path in plan.paths if path.way == "vxlan"}
    return {
        ip
        for node in nodes
        for ip in (*node.internal_ips, *node.external_ips)
        if (node.name, ip.version) in tunnelled
    }


def _input(port: int) -> Chain:
    rules = tuple(
        Rule((*_vxlan(port), _source(version, "!=", PEERS[version]), Counter(), DROP), "VXLAN from no Node")
        for version in FAMILIES
    )
    return Chain(TABLE, "tunnel_input", rules, Hook("filter", "input", BEFORE_FILTER))


def _forward(port: int) -> Chain:
    rules = tuple(
        Rule(
            (
                *_vxlan(port),
                *on_pod_link("iifname"),
                Match(Payload(IP[version], "daddr"), "!=", Named(POD_CIDRS[version].name)),
                Counter(),
                DROP,
            ),
            "VXLAN from a Pod",
        )
        for version in FAMILIES
    )
    return Chain(TABLE, "tunnel_forward", rules, Hook("filter", "forward", BEFORE_FILTER))


def _postrouting(on: bool) -> Chain:
    rules = tuple(
        Rule(
            (
                _source(version, "==", POD_CIDRS[version]),
                Match(Payload(IP[version], "daddr"), "==", Named(BEHIND[version].name)),
                Counter(),
                Nat("masquerade", flags=frozenset({"fully-random"})),
            ),
            "from a Pod to a Node behind the tunnel",
        )
        for version in FAMILIES
    )
    chain = Hook("nat", "postrouting", AFTER_SOURCE_NAT)
    return Chain(TABLE, "to_node_behind_tunnel", rules if on else (), chain)


def _vxlan(port: int) -> tuple[Match, ...]:
    return (Match(Payload("udp", "dport"), "==", port),)


def _source(version: int, operator: Literal["==", "!="], name: SetName) -> Match:
    return Match(Payload(IP[version], "saddr"), operator, Named(name.name))
