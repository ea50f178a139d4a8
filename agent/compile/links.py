"""Who may say what on a Pod's link, and what leaves the cluster under the node's address.

What happens to a packet (priorities in brackets; defragmentation is at -400, connection tracking at -200):

    from a Pod's link                                   to a Pod's link
      |                                                   |
      v  inet prerouting [-450]                           v  inet forward [0], output [300]
    is `link . source` in pod_links? no: drop           is `link . destination` in pod_links? no: drop
    (from any other: source in pod_addresses: drop)
      |                                                   |
      v  connection tracking, then prerouting [-150]      v
    neighbour and router discovery, redirect,           policy, then the Pod
    stray fragment: drop
      |
      v  Services, then inet forward, input [0]
    broadcast, multicast: drop
      |
      v  policy (agent.compile.verdicts, which has the chains of forward and input)
      |
      v  inet postrouting [100]
    back to the link it came from (a Pod reached itself through a Service): masquerade
    from pod_cidrs to outside `cluster`: masquerade

    ARP on a Pod's link, either way: drop

Both addresses are checked on every packet, the source before defragmentation: after it a fragment sent under
another Pod's address could have been joined with that Pod's own. The destination is checked where the packet
has been routed: what a node forwards, and what it sends itself, is all that can go to a link, and nothing
changes it afterwards. Each check is one rule for the usual packet, and no base chain is there for one check
alone: of what the rules cost a packet, this is most (docs/decisions/0009-hot-path.md).

Neighbour discovery is looked for later, because only a whole packet shows its type, and `icmpv6 type` looks
behind extension headers. Connection tracking makes no flow of it, nor of a fragment that fits no others, so
packets that are part of a flow or begin one are not looked at. None of what is dropped is needed: both ends
of a link know each other by permanent neighbour entries and have no link-local address, so DHCP, multicast,
ARP, a link-local or unspecified source all die, here or in routing where nobody takes them. Frames that are
neither IP nor ARP (VLAN tags, unknown types) have no receiver on the host.

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
    ACCEPT,
    DROP,
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
BEHIND_FILTERS = 300
SOURCE_NAT = 100

STATIC: Owner = ("links",)
CLUSTER: Owner = ("cluster",)

POD_LINKS = {4: SetName(TABLE, "pod_links4"), 6: SetName(TABLE, "pod_links6")}
POD_ADDRESSES = {4: SetName(TABLE, "pod_addresses4"), 6: SetName(TABLE, "pod_addresses6")}
POD_CIDRS = {4: SetName(TABLE, "pod_cidrs4"), 6: SetName(TABLE, "pod_cidrs6")}
CLUSTER_RANGES = {4: SetName(TABLE, "cluster4"), 6: SetName(TABLE, "cluster6")}

NOT_TO_ONE, TO_LINK = "not_to_one", "to_link"

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
    hook = Hook("filter", "prerouting", BEFORE_DEFRAGMENTATION)
    yield Chain(TABLE, "link_source", tuple(_source()), hook)
    flow = Rule((Match(Ct("state"), "in", CtState.ESTABLISHED | CtState.NEW), ACCEPT))
    control = Rule((*on_pod_link("iifname"), Verdict("goto", "control_from_link")))
    hook = Hook("filter", "prerouting", BEHIND_CONNTRACK)
    yield Chain(TABLE, "link_control", (flow, control), hook)
    yield Chain(TABLE, "control_from_link", tuple(_control()))
    to_link = Rule((*on_pod_link("oifname"), Verdict("jump", TO_LINK)))
    yield Chain(TABLE, "link_output", (to_link,), Hook("filter", "output", BEHIND_FILTERS))
    yield Chain(TABLE, TO_LINK, tuple(_not_of_the_link()))
    yield Chain(TABLE, NOT_TO_ONE, tuple(_not_to_one()))


def _source() -> Iterator[Rule]:
    """Who comes by a Pod's link must have its address; who comes by any other must not have a Pod's."""
    for version, name in POD_LINKS.items():
        yield Rule((Match(link_and("iifname", version, "saddr"), "==", Named(name.name)), ACCEPT))
    yield _drop(*on_pod_link("iifname"), why="source address is not of this link")
    for version, name in POD_ADDRESSES.items():
        known = Match(Payload(IP[version], "saddr"), "==", Named(name.name))
        yield _drop(known, why="source address is of a Pod of this node")


def to_its_link(version: int) -> Match:
    """That a packet goes to a Pod's link and to an address of this very link."""
    return Match(link_and("oifname", version, "daddr"), "==", Named(POD_LINKS[version].name))


def _control() -> Iterator[Rule]:
    """What only routers and neighbours say, to whom a Pod cannot speak, and fragments nobody could join.

    The rules of policy ask for connections' states, so fragments that fit have been joined before.
    """
    yield _drop(Match(Payload("icmpv6", "type"), "==", LINK_CONTROL), why="neighbour or router discovery")
    yield _drop(Match(Payload("icmp", "type"), "==", ROUTER_MESSAGES), why="redirect or router discovery")
    yield _drop(Match(Exthdr("frag"), "==", True), why="a fragment that does not fit the others")


def _not_to_one() -> Iterator[Rule]:
    """What a Pod may say neither to its node nor to anybody beyond it."""
    yield _drop(Match(Meta("pkttype"), "!=", PacketType.HOST), why="not addressed to the node's end")
    yield _drop(Match(Fib(("daddr",), "type"), "==", TO_MANY), why="to many")


def _not_of_the_link() -> Iterator[Rule]:
    for version, name in POD_LINKS.items():
        other = Match(link_and("oifname", version, "daddr"), "!=", Named(name.name))
        yield _drop(other, why="destination address is not of this link")


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
