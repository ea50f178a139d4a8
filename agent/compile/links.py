"""Who may say what on a Pod's link, and what leaves the cluster under the node's address.

What happens to a packet (priorities in brackets; defragmentation is at -400, connection tracking at -200):

    from a Pod's link                                   to a Pod's link
      |                                                   |
      v  inet prerouting [-450]                           v  inet postrouting [-450]
    is `link . source` in pod_links? no: drop           is `link . destination` in pod_links? no: drop
    (from any other: source in pod_addresses: drop)
      |                                                   |
      v  connection tracking, then prerouting [-150]:     v
    neighbour and router discovery, redirect,           the Pod
    broadcast, multicast, stray fragment: drop
      |
      v  Services, policy (their own chains, later in the hooks)
      |
      v  inet postrouting [100]
    back to the link it came from (a Pod reached itself through a Service): masquerade
    from pod_cidrs to outside `cluster`: masquerade

    ARP on a Pod's link, either way: drop

The source is checked before defragmentation: after it a fragment sent under another Pod's address could
have been joined with that Pod's own. Neighbour discovery is checked after it, because only a whole packet
shows its type, and `icmpv6 type` looks behind extension headers; and after connection tracking, to spare the
packets of known flows, whose first packet was looked at. Neither is needed: both ends of a link
know each other by permanent neighbour entries and have no link-local address, so DHCP, multicast, ARP, a
link-local or unspecified source all die here, counted. Frames that are neither IP nor ARP (VLAN tags,
unknown types) have no receiver on the host.

A Pod's link is `podwall` and eight hexadecimal digits; podwall's own devices have a dash there (podwall-
vxlan) and are no Pod's.

Owners: ("links",) owns what is static, ("link", container id, interface) the elements of one attachment,
("cluster",) the ranges of all nodes. Ranges are compiled together because ranges in a set must not overlap:
a node that claims another's range must not make the whole transaction fail.
"""

from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from typing import Literal

from agent.cluster.model import Node
from agent.compile.names import ARP_TABLE, TABLE, comment
from agent.compile.packets import ADDRESS_TYPES, FAMILIES, IP, Interface, link_and, on_pod_link
from agent.nft.model import (
    DROP,
    RETURN,
    Address,
    Chain,
    Counter,
    Ct,
    CtState,
    CtStatus,
    Element,
    Exthdr,
    Fib,
    FibType,
    Hook,
    IcmpType,
    Item,
    Match,
    Meta,
    Named,
    Nat,
    Network,
    Owner,
    PacketType,
    Payload,
    Range,
    Rule,
    Set,
    SetName,
    Table,
    Verdict,
)

BEFORE_DEFRAGMENTATION = -450
BEHIND_CONNTRACK = -150
FILTER = 0
SOURCE_NAT = 100

STATIC: Owner = ("links",)
CLUSTER: Owner = ("cluster",)

POD_LINKS = {4: SetName(TABLE, "pod_links4"), 6: SetName(TABLE, "pod_links6")}
POD_ADDRESSES = {4: SetName(TABLE, "pod_addresses4"), 6: SetName(TABLE, "pod_addresses6")}
POD_CIDRS = {4: SetName(TABLE, "pod_cidrs4"), 6: SetName(TABLE, "pod_cidrs6")}
CLUSTER_RANGES = {4: SetName(TABLE, "cluster4"), 6: SetName(TABLE, "cluster6")}

# Multicast listener and neighbour discovery, redirect and router renumbering (130-138), inverse discovery and
# MLDv2 (141-143), SEND (148, 149), multicast router discovery (151-153).
LINK_CONTROL = frozenset({Range(130, 138), Range(141, 143), Range(148, 149), Range(151, 153)})

ROUTER_MESSAGES = frozenset({IcmpType.REDIRECT, IcmpType.ROUTER_ADVERTISEMENT, IcmpType.ROUTER_SOLICITATION})
TO_MANY = frozenset({FibType.BROADCAST, FibType.MULTICAST})


def link_owner(container_id: str, ifname: str) -> Owner:
    """Who owns the elements of an attachment."""
    return ("link", container_id, ifname)


def static(masquerade: bool = True) -> tuple[Item, ...]:
    """The tables, sets and chains that every node has, whatever is in the cluster."""
    return (*_tables(), *_sets(), *_link_chains(), _masquerade(masquerade), *_arp_chains())


def link(host_link: str, addresses: Iterable[Address], namespace: str, pod: str) -> tuple[Item, ...]:
    """The elements of one attachment: these addresses, and no others, are at home on this link."""
    of = comment(namespace, pod)
    return tuple(
        element
        for address in addresses
        for element in (
            Element(POD_LINKS[address.version], (host_link, address), comment=of),
            Element(POD_ADDRESSES[address.version], address, comment=of),
        )
    )


def cluster(nodes: Iterable[Node]) -> tuple[Item, ...]:
    """The ranges that are not left by masquerade: the Pods' and the nodes' own addresses.

    A range inside another one is left out, so that no two overlap.
    """
    nodes = tuple(nodes)
    pods = {network for node in nodes for network in node.pod_cidrs}
    hosts = {ip_network(address) for node in nodes for address in (*node.internal_ips, *node.external_ips)}
    return (*_ranges(POD_CIDRS, pods), *_ranges(CLUSTER_RANGES, pods | hosts))


def _ranges(sets: dict[int, SetName], networks: set[Network]) -> Iterator[Element]:
    for version, name in sets.items():
        for network in outermost(network for network in networks if network.version == version):
            yield Element(name, network)


def outermost(networks: Iterable[Network]) -> Iterator[Network]:
    """Networks that lie in no other; two networks overlap only when one lies in the other."""
    last = family = -1
    for network in sorted(networks, key=lambda of: (of.version, int(of.network_address), of.prefixlen)):
        if network.version != family or int(network.broadcast_address) > last:
            last, family = int(network.broadcast_address), network.version
            yield network


def _tables() -> Iterator[Item]:
    yield Table(*TABLE)
    yield Table(*ARP_TABLE)


def _sets() -> Iterator[Item]:
    for version, kind in ADDRESS_TYPES.items():
        yield Set(TABLE, POD_LINKS[version].name, ("ifname", kind))
        yield Set(TABLE, POD_ADDRESSES[version].name, (kind,))
        yield Set(TABLE, POD_CIDRS[version].name, (kind,), flags=frozenset({"interval"}))
        yield Set(TABLE, CLUSTER_RANGES[version].name, (kind,), flags=frozenset({"interval"}))


def _link_chains() -> Iterator[Item]:
    yield _source()
    yield _hooked("link_control", "prerouting", BEHIND_CONNTRACK, "iifname", "control_from_link")
    yield _hooked("link_destination", "postrouting", BEFORE_DEFRAGMENTATION, "oifname", "to_link")
    yield Chain(TABLE, "from_link", tuple(_not_of_the_link("iifname", "saddr", "source")))
    yield Chain(TABLE, "to_link", tuple(_not_of_the_link("oifname", "daddr", "destination")))
    yield Chain(TABLE, "control_from_link", tuple(_control()))


def _source() -> Chain:
    """Who comes by a Pod's link must have its address; who comes by any other must not have a Pod's."""
    rules = [Rule((*on_pod_link("iifname"), Verdict("goto", "from_link")))]
    for version, name in POD_ADDRESSES.items():
        key = Payload(IP[version], "saddr")
        rules.append(_drop(Match(key, "==", Named(name.name)), why="source address is of a Pod of this node"))
    return Chain(TABLE, "link_source", tuple(rules), Hook("filter", "prerouting", BEFORE_DEFRAGMENTATION))


def _control() -> Iterator[Rule]:
    """What only routers and neighbours say, to whom a Pod cannot speak, and fragments nobody could join.

    The rules of policy ask for connections' states, so fragments that fit have been joined before.
    """
    yield Rule((Match(Ct("state"), "in", CtState.ESTABLISHED), RETURN))
    yield _drop(Match(Payload("icmpv6", "type"), "==", LINK_CONTROL), why="neighbour or router discovery")
    yield _drop(Match(Payload("icmp", "type"), "==", ROUTER_MESSAGES), why="redirect or router discovery")
    yield _drop(Match(Meta("pkttype"), "!=", PacketType.HOST), why="not addressed to the node's end")
    yield _drop(Match(Fib(("daddr",), "type"), "==", TO_MANY), why="to many")
    yield _drop(Match(Exthdr("frag"), "==", True), why="a fragment that does not fit the others")


def _hooked(
    name: str, hook: Literal["prerouting", "postrouting"], priority: int, interface: Interface, target: str
) -> Chain:
    """A base chain that sends packets of Pods' links to another chain and lets all others pass at once."""
    rule = Rule((*on_pod_link(interface), Verdict("jump", target)))
    return Chain(TABLE, name, (rule,), Hook("filter", hook, priority))


def _not_of_the_link(interface: Interface, field: Literal["saddr", "daddr"], word: str) -> Iterator[Rule]:
    for version, name in POD_LINKS.items():
        key = link_and(interface, version, field)
        yield _drop(Match(key, "!=", Named(name.name)), why=f"{word} address is not of this link")


def _drop(*matches: Match, why: str) -> Rule:
    return Rule((*matches, Counter(), DROP), why)


def _masquerade(on: bool) -> Chain:
    rules = (*map(_hairpin, FAMILIES), *(map(_leaving, FAMILIES) if on else ()))
    return Chain(TABLE, "leave_cluster", rules, Hook("nat", "postrouting", SOURCE_NAT))


def _hairpin(version: int) -> Rule:
    """Under its own address the Pod would answer itself, and nobody would translate the answer back."""
    back = Match(link_and("oifname", version, "saddr"), "==", Named(POD_LINKS[version].name))
    translated = Match(Ct("status"), "in", CtStatus.DNAT)
    return Rule(
        (translated, back, Counter(), Nat("masquerade", flags=frozenset({"fully-random"}))),
        "from a Pod to itself through a Service",
    )


def _leaving(version: int) -> Rule:
    return Rule(
        (
            Match(Payload(IP[version], "saddr"), "==", Named(POD_CIDRS[version].name)),
            Match(Payload(IP[version], "daddr"), "!=", Named(CLUSTER_RANGES[version].name)),
            Counter(),
            Nat("masquerade", flags=frozenset({"fully-random"})),
        ),
        "from a Pod to outside the cluster",
    )


def _arp_chains() -> Iterator[Item]:
    yield _no_arp("input", "iifname")
    yield _no_arp("output", "oifname")


def _no_arp(hook: Literal["input", "output"], interface: Interface) -> Chain:
    rule = Rule((*on_pod_link(interface), Counter(), DROP), "neighbours on Pod links are permanent")
    return Chain(ARP_TABLE, f"link_{hook}", (rule,), Hook("filter", hook, FILTER))
