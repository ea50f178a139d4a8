"""How a packet finds its Service, and the Service an endpoint: rules that are the same for all Services.

Only the first packet of a flow passes here (chains of type nat); connection tracking translates the others.

    address . protocol . port
      |
      v  in `frontends`: that list, whoever asks        (ClusterIP, load balancer and external addresses)
      v  in `restricted`: it matters who asks           (source ranges, externalTrafficPolicy Local)
      |    source ranges that do not hold the sender: drop
      |    from outside the cluster: `outside`          (endpoints of this node alone)
      |    from a Pod, or the node itself: the list in `restricted`
      |
    from a Pod of this node, or the node itself   from another node's Pod, or from anywhere else
      |                                             |
      v  a NodePort of another node: `node_ports`   v  a NodePort of this node: `outside_node_ports`
      |                                             |     (with Local endpoints of this node alone)
      +---------------------------------------------+
      v  an own address of this node: `node_ports`, then ports that Pods have of the node (`host_ports`)
      v  an address of `cluster_ips` or `pool_addresses`, with a port that no Service has: refuse
    no Service's: untouched

What is found is a list of endpoints, and of the list an endpoint; their numbers stand in `ct mark`:

    frontends   10.96.0.10 . udp . 53  ->  0x5a1b2c3d      a list
    balance     0x5a1b2c3d             ->  3               how one of the list is picked: any of three
    balancers   3                      ->  jump any_of_3   (0: refuse, 0x7fffffff: drop, 0x8.......: sticky)
    lists       0x5a1b2c3d . 1         ->  0x5e0f1a2b      an endpoint
    endpoints   0x5e0f1a2b             ->  10.244.1.7 . 5353

so a Service is elements of maps: no chain, no rule, no verdict per Service, and a change costs its elements.
Chains like `any_of_3` are shared by all lists of that length. A list is the same one whichever way it was
reached, and an endpoint the same in whichever list.

Session affinity. `sticky` remembers which endpoint of a list a client got. That is not its place in the
list, so others' coming and going moves nobody. When it goes itself it is no longer in `serving`, and the
client gets another one.

    sticky      192.0.2.7 . 0x5a1b2c3d ->  0x5e0f1a2b      (made by packets; ends after the timeout)
    serving     0x5a1b2c3d . 0x5e0f1a2b

Marks. `meta mark` holds the way of picking, or an endpoint, for a few rules and is 0 before anything else
sees the packet. A `ct mark` whose first four bits are 0101 is podwall's and is 0 again in postrouting or
input.

Sources stay as they are inside the cluster. What came from outside (or from another node) and goes on to an
endpoint of another node leaves with this node's address, because the answer must come back here. A packet
that TCP's connection tracking finds invalid would not be translated back and would reach a client under the
endpoint's address, which answers with a reset: it is dropped (kubernetes issue 74839), here where it is for
the node itself, on Pods' links by the rules of policy (agent.compile.verdicts).
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Literal

from agent.cluster.model import Family
from agent.compile.links import outermost
from agent.compile.names import SERVICES_TABLE
from agent.compile.packets import ADDRESS_TYPES, FAMILIES, IP, on_pod_link
from agent.nft.model import (
    DROP,
    RETURN,
    Address,
    Assign,
    Chain,
    Concat,
    Counter,
    Ct,
    CtState,
    Element,
    Fib,
    FibType,
    Hook,
    Item,
    Lookup,
    Match,
    Meta,
    Named,
    Nat,
    Network,
    NfProto,
    Owner,
    Payload,
    Proto,
    Range,
    Reject,
    Rule,
    Set,
    SetName,
    Table,
    Verdict,
    VerdictMap,
)

STATIC: Owner = ("services",)
NODE_ADDRESSES: Owner = ("node-addresses",)

DESTINATION_NAT = -100
BEFORE_SOURCE_NAT = 99
FILTER = 0

MAGIC = 0x5000_0000
OWN_MARKS = Range(MAGIC, MAGIC | 0x0FFF_FFFF)
NOWHERE = MAGIC  # the list to which nothing is led: it drops
REFUSE, DROP_ALL = 0, 0x7FFF_FFFF
MOST_CLIENTS = 1 << 17  # remembered by `sticky`, of one family; later ones get any endpoint each time

_OWN_ALONE: dict[int, tuple[Network, ...]] = {
    4: (IPv4Network("127.0.0.0/8"),),
    6: (IPv6Network("::1/128"), IPv6Network("fe80::/10")),
}
_TRANSPORTS = frozenset({Proto.TCP, Proto.UDP, Proto.SCTP})
MARK, CT_MARK = Meta("mark"), Ct("mark")
_PORT = ("inet_proto", "inet_service")
_TO = (Meta("l4proto"), Payload("th", "dport"))


def _names(name: str) -> dict[int, SetName]:
    return {family: SetName(SERVICES_TABLE, f"{name}{family}") for family in FAMILIES}


FRONTENDS, RESTRICTED, OUTSIDE = _names("frontends"), _names("restricted"), _names("outside")
NODE_PORTS, OUTSIDE_NODE_PORTS = _names("node_ports"), _names("outside_node_ports")
BALANCE, BALANCERS = _names("balance"), _names("balancers")
LISTS, ENDPOINTS = _names("lists"), _names("endpoints")
STICKY_CLIENTS, SERVING = _names("sticky"), _names("serving")
RANGED, ADMITTED = _names("ranged"), _names("admitted")
CLUSTER_IPS, NODES, POD_CIDRS = _names("cluster_ips"), _names("nodes"), _names("pod_cidrs")
NODE_PORT_ADDRESSES = _names("node_port_addresses")
POOL_ADDRESSES = _names("pool_addresses")
HOST_PORTS, HOST_PORTS_AT = _names("host_ports"), _names("host_ports_at")
LOCAL_NODE_PORTS = SetName(SERVICES_TABLE, "local_node_ports")


def static(
    services: bool, node_port_addresses: tuple[Network, ...] = (), pools: tuple[Network, ...] = ()
) -> tuple[Item, ...]:
    """The table, its maps and chains; without `services` only what ports of the node for Pods need.

    `pools` are the addresses that podwall gives to Services of type LoadBalancer.
    """
    items: list[Item] = [Table(*SERVICES_TABLE), *_host_port_sets()]
    if not services:
        return (*items, *_host_port_chains())
    return (
        *items,
        *_sets(),
        *_node_port_addresses(node_port_addresses),
        *(Element(POOL_ADDRESSES[network.version], network) for network in outermost(pools)),
        *_chains(limited=bool(node_port_addresses)),
        *_fixed_balancers(),
    )


def own_address(addresses: dict[int, Address]) -> Chain:
    """The chain that gives what leaves for another node's endpoint this node's address."""
    random = frozenset({"fully-random"})
    known = [
        Rule((Nat("snat", IP[family], addresses[family], flags=random),)) for family in sorted(addresses)
    ]
    unknown = [Rule((Nat("masquerade", flags=random),))] if len(addresses) < len(FAMILIES) else []
    return Chain(SERVICES_TABLE, "own_address", (*known, *unknown))


# Sets and maps


def _sets() -> Iterator[Set]:
    for family, kind in ADDRESS_TYPES.items():
        at = (kind, *_PORT)
        yield _set(FRONTENDS[family], at, "mark")
        yield _set(RESTRICTED[family], at, "mark")
        yield _set(OUTSIDE[family], at, "mark")
        yield _set(NODE_PORTS[family], _PORT, "mark")
        yield _set(OUTSIDE_NODE_PORTS[family], _PORT, "mark")
        yield _set(BALANCE[family], ("mark",), "mark")
        yield _set(BALANCERS[family], ("mark",), "verdict")
        yield Set(
            SERVICES_TABLE,
            STICKY_CLIENTS[family].name,
            ("integer" if family == 6 else kind, "mark"),
            ("mark",),
            flags=frozenset({"dynamic", "timeout"}),
            size=MOST_CLIENTS,
        )
        yield _set(SERVING[family], ("mark", "mark"))
        yield _set(LISTS[family], ("mark", "integer"), "mark")
        yield _set(ENDPOINTS[family], ("mark",), kind, "inet_service")
        yield _set(RANGED[family], at)
        yield _ranges(ADMITTED[family], (*at, kind))
        yield _set(CLUSTER_IPS[family], (kind,))
        yield _ranges(POOL_ADDRESSES[family], (kind,))
        yield _set(NODES[family], (kind,))
        yield _ranges(POD_CIDRS[family], (kind,))
    yield _set(LOCAL_NODE_PORTS, _PORT)


def _host_port_sets() -> Iterator[Set]:
    for family, kind in ADDRESS_TYPES.items():
        yield _set(HOST_PORTS[family], _PORT, kind, "inet_service")
        yield _set(HOST_PORTS_AT[family], (kind, *_PORT), kind, "inet_service")


def _set(name: SetName, key: tuple[str, ...], *data: str) -> Set:
    return Set(name.table, name.name, key, data)


def _ranges(name: SetName, key: tuple[str, ...]) -> Set:
    return Set(name.table, name.name, key, flags=frozenset({"interval"}))


def _node_port_addresses(networks: tuple[Network, ...]) -> Iterator[Item]:
    """None given: every own address. Some given: no other one, of either family."""
    for family, kind in ADDRESS_TYPES.items() if networks else ():
        yield _ranges(NODE_PORT_ADDRESSES[family], (kind,))
    for network in outermost(networks):
        yield Element(NODE_PORT_ADDRESSES[network.version], network)


# Chains


def _chains(limited: bool) -> Iterator[Chain]:
    """`limited`: NodePorts are served on some of the node's addresses only."""
    yield _hooked("services_prerouting", "nat", "prerouting", DESTINATION_NAT, _by_family("prerouting"))
    yield _hooked("services_output", "nat", "output", DESTINATION_NAT, _by_family("output"))
    for family in FAMILIES:
        where = _node_port_address(family, limited)
        yield _chain(f"prerouting_ipv{family}", _prerouting(family, where))
        yield _chain(f"output_ipv{family}", _output(family))
        yield _chain(f"restricted_ipv{family}", _restricted(family))
        yield _chain(f"admitted_ipv{family}", _admitted(family))
        yield _chain(f"from_here_ipv{family}", _from_here(family, where))
        yield _chain(f"not_frontend_ipv{family}", _not_frontend(family))
        yield _chain(f"to_node_ipv{family}", (*_to_node_port(family, where), *_to_host_port(family)))
        yield _chain(f"balance_ipv{family}", _balance(family))
        yield _chain(f"to_endpoint_ipv{family}", _to_endpoint(family))
    yield _chain("refuse", _refuse())
    yield _chain("drop_all", (Rule((Assign(MARK, 0), Counter(), DROP)),))
    yield _chain("lost", _lost())
    yield _hooked(
        "services_postrouting",
        "nat",
        "postrouting",
        BEFORE_SOURCE_NAT,
        (Rule((Match(CT_MARK, "==", OWN_MARKS), Verdict("goto", "leaving"))),),
    )
    yield _hooked(
        "services_input",
        "nat",
        "input",
        BEFORE_SOURCE_NAT,
        (Rule((Match(CT_MARK, "==", OWN_MARKS), Assign(CT_MARK, 0))),),
    )
    yield _chain("leaving", _leaving())
    yield _invalid()


def _host_port_chains() -> Iterator[Chain]:
    yield _hooked("services_prerouting", "nat", "prerouting", DESTINATION_NAT, _by_family("not_frontend"))
    yield _hooked("services_output", "nat", "output", DESTINATION_NAT, _by_family("output"))
    for family in FAMILIES:
        yield _chain(
            f"output_ipv{family}", (_to_host_port_on_loopback(family), _to(f"not_frontend_ipv{family}"))
        )
        yield _chain(f"not_frontend_ipv{family}", (_own_address(family),))
        yield _chain(f"to_node_ipv{family}", _to_host_port(family))


def _fixed_balancers() -> Iterator[Element]:
    for family in FAMILIES:
        yield Element(BALANCERS[family], REFUSE, Verdict("goto", "refuse"))
        yield Element(BALANCERS[family], DROP_ALL, Verdict("goto", "drop_all"))
        yield Element(BALANCE[family], NOWHERE, DROP_ALL)


def _by_family(name: str) -> tuple[Rule, Rule]:
    v4 = Match(Meta("nfproto"), "==", NfProto.IPV4)
    return Rule((v4, Verdict("goto", f"{name}_ipv4"))), Rule((Verdict("goto", f"{name}_ipv6"),))


def _prerouting(family: Family, where: tuple[Match, ...]) -> Iterator[Rule]:
    """Another node's Pod asks for a port of this node only with externalTrafficPolicy Local.

    Otherwise its own node has translated it. So nothing it sends leaves here under this node's address.
    """
    yield from _frontends(family, "restricted")
    yield _to(f"from_here_ipv{family}", *on_pod_link("iifname"))
    yield _found(family, OUTSIDE_NODE_PORTS, Concat(_TO), *_to_own_address(family), *where)
    yield _to(f"not_frontend_ipv{family}")


def _output(family: Family) -> Iterator[Rule]:
    yield from _frontends(family, "admitted")
    yield _to_host_port_on_loopback(family)
    yield _to(f"from_here_ipv{family}")


def _frontends(family: Family, restricted: str) -> Iterator[Rule]:
    """The usual way comes first: a ClusterIP is the same for everybody."""
    yield _found(family, FRONTENDS, _address_and_port(family))
    yield _found(family, RESTRICTED, _address_and_port(family), then=restricted)


def _restricted(family: Family) -> Iterator[Rule]:
    yield _not_admitted(family)
    for pod in (on_pod_link("iifname"), (_from(family, POD_CIDRS),)):
        yield _to(f"balance_ipv{family}", *pod)
    yield _found(family, OUTSIDE, _address_and_port(family))
    yield _to(f"balance_ipv{family}")


def _admitted(family: Family) -> Iterator[Rule]:
    yield _not_admitted(family)
    yield _to(f"balance_ipv{family}")


def _not_admitted(family: Family) -> Rule:
    """A sender that loadBalancerSourceRanges does not hold."""
    ranged = Match(_address_and_port(family), "==", Named(RANGED[family].name))
    parts = (*_address_and_port(family).parts, Payload(IP[family], "saddr"))
    other = Match(Concat(parts), "!=", Named(ADMITTED[family].name))
    return Rule((ranged, other, Counter(), DROP), "not in loadBalancerSourceRanges")


def _from_here(family: Family, where: tuple[Match, ...]) -> Iterator[Rule]:
    """NodePorts of other nodes are translated here already, so that policies see who really speaks.

    Not with externalTrafficPolicy Local: that node's own endpoints are asked for.
    """
    other_node = Match(Payload(IP[family], "daddr"), "==", Named(NODES[family].name))
    only_there = Match(Concat(_TO), "!=", Named(LOCAL_NODE_PORTS.name))
    yield _found(family, NODE_PORTS, Concat(_TO), other_node, *where, only_there)
    yield _to(f"not_frontend_ipv{family}")


def _not_frontend(family: Family) -> Iterator[Rule]:
    yield _own_address(family)
    target = Payload(IP[family], "daddr")
    unused = (
        (Match(target, "==", Named(CLUSTER_IPS[family].name)),),
        # A pool that holds a Node's address is a mistake that must not cut the node off.
        (
            Match(target, "==", Named(POOL_ADDRESSES[family].name)),
            Match(target, "!=", Named(NODES[family].name)),
        ),
    )
    for where in unused:
        yield Rule((*where, Verdict("goto", "refuse")), "a port that no Service has")


def _own_address(family: Family) -> Rule:
    return _to(f"to_node_ipv{family}", *_to_own_address(family))


def _to_own_address(family: Family) -> Iterator[Match]:
    """An address of this node that others can send to as well."""
    target = Payload(IP[family], "daddr")
    yield Match(Fib(("daddr",), "type"), "==", FibType.LOCAL)
    for network in _OWN_ALONE[family]:
        yield Match(target, "!=", network)


def _to_node_port(family: Family, where: tuple[Match, ...]) -> Iterator[Rule]:
    yield _found(family, NODE_PORTS, Concat(_TO), *where)


def _to_host_port_on_loopback(family: Family) -> Rule:
    """A port that a Pod has of the loopback address, for who speaks from another address of the node.

    In the output hook alone: on its way in a packet is translated before the kernel refuses it as a martian.
    """
    source, target = Payload(IP[family], "saddr"), Payload(IP[family], "daddr")
    loopback = _OWN_ALONE[family][0]
    ways = Match(target, "==", loopback), Match(source, "!=", loopback)
    found = Lookup(_address_and_port(family), Named(HOST_PORTS_AT[family].name))
    return Rule((*ways, Match(Meta("l4proto"), "==", _TRANSPORTS), Nat("dnat", IP[family], found)))


def _to_host_port(family: Family) -> Iterator[Rule]:
    for found in (
        Lookup(_address_and_port(family), Named(HOST_PORTS_AT[family].name)),
        Lookup(Concat(_TO), Named(HOST_PORTS[family].name)),
    ):
        yield Rule((Match(Meta("l4proto"), "==", _TRANSPORTS), Nat("dnat", IP[family], found)))


def _balance(family: Family) -> Iterator[Rule]:
    how = Lookup(CT_MARK, Named(BALANCE[family].name))
    yield Rule((Assign(MARK, how), VerdictMap(MARK, Named(BALANCERS[family].name))))
    yield _to("lost")


def _to_endpoint(family: Family) -> Iterator[Rule]:
    yield Rule((Assign(MARK, 0),))
    # nft wants to know that there are ports before it translates one.
    ports = Match(Meta("l4proto"), "==", _TRANSPORTS)
    yield Rule((ports, Nat("dnat", IP[family], Lookup(CT_MARK, Named(ENDPOINTS[family].name)))))
    yield _to("lost")


def _lost() -> Iterator[Rule]:
    """A packet that met the rules of before a commit and the maps of after it: its sender sends it again.

    The kernel takes rules of one generation for a packet, but looks into maps as they are at that moment. Let
    through, it would leave untranslated, and so would all that follow it.
    """
    yield Rule((Assign(MARK, 0), Counter(), DROP), "changed meanwhile")


def _refuse() -> Iterator[Rule]:
    yield Rule((Assign(MARK, 0), Assign(CT_MARK, 0), Counter()))  # the answer belongs to the connection too
    yield Rule((Match(Meta("l4proto"), "==", Proto.TCP), Reject("tcp reset", "")))
    yield Rule((Reject(),))


def _leaving() -> Iterator[Rule]:
    yield Rule((Assign(CT_MARK, 0),))
    yield Rule((*on_pod_link("iifname"), RETURN), "from a Pod of this node")
    yield Rule((*on_pod_link("oifname"), RETURN), "to a Pod of this node")
    yield Rule((Match(Fib(("saddr",), "type"), "==", FibType.LOCAL), RETURN), "from the node itself")
    yield _to("own_address")


def _invalid() -> Chain:
    invalid = (Match(Ct("state"), "in", CtState.INVALID), Match(Meta("l4proto"), "==", Proto.TCP))
    from_pods = (Rule((*invalid, _from(family, POD_CIDRS), Counter(), DROP)) for family in FAMILIES)
    return _hooked("services_invalid", "filter", "input", FILTER, tuple(from_pods))


# Parts of rules


def _found(
    family: Family, where: dict[int, SetName], key: Concat, *conditions: Match, then: str = "balance"
) -> Rule:
    found = Assign(CT_MARK, Lookup(key, Named(where[family].name)))
    return Rule((*conditions, found, Verdict("goto", f"{then}_ipv{family}")))


def _from(family: Family, ranges: dict[int, SetName]) -> Match:
    return Match(Payload(IP[family], "saddr"), "==", Named(ranges[family].name))


def _address_and_port(family: Family) -> Concat:
    return Concat((Payload(IP[family], "daddr"), *_TO))


def _node_port_address(family: Family, limited: bool) -> tuple[Match, ...]:
    target = Payload(IP[family], "daddr")
    return (Match(target, "==", Named(NODE_PORT_ADDRESSES[family].name)),) if limited else ()


def _to(chain: str, *conditions: Match) -> Rule:
    return Rule((*conditions, Verdict("goto", chain)))


def _chain(name: str, rules: Iterator[Rule] | tuple[Rule, ...]) -> Chain:
    return Chain(SERVICES_TABLE, name, tuple(rules))


def _hooked(
    name: str,
    kind: Literal["filter", "nat"],
    hook: Literal["prerouting", "input", "forward", "output", "postrouting"],
    priority: int,
    rules: tuple[Rule, ...],
) -> Chain:
    return Chain(SERVICES_TABLE, name, rules, Hook(kind, hook, priority))
