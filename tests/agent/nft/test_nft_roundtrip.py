"""What is rendered, loaded and listed is what was wanted: every construct, through a real kernel."""

from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from agent.nft import diff, render
from agent.nft.kernel import Kernel, NftError
from agent.nft.model import (
    ACCEPT,
    CONTINUE,
    DROP,
    RETURN,
    ArpOperation,
    Assign,
    Bits,
    Chain,
    Concat,
    Counter,
    Ct,
    CtDirection,
    CtState,
    CtStatus,
    Element,
    EtherType,
    Exthdr,
    Fib,
    FibType,
    Hook,
    Icmp6Type,
    IcmpType,
    Limit,
    Log,
    Lookup,
    Match,
    Meta,
    Named,
    Nat,
    NfProto,
    Notrack,
    Numgen,
    PacketType,
    Payload,
    Proto,
    Range,
    Reject,
    Rule,
    Ruleset,
    Set,
    SetName,
    Table,
    TableName,
    TcpFlag,
    Update,
    Verdict,
    VerdictMap,
    Wildcard,
)

INET, IP, IP6, ARP, NETDEV = (
    TableName(family, "podwall") for family in ("inet", "ip", "ip6", "arp", "netdev")
)
INTERVAL = frozenset({"interval"})
TCP = Match(Meta("l4proto"), "==", Proto.TCP)
TRANSPORTS = Match(Meta("l4proto"), "==", frozenset({Proto.TCP, Proto.UDP, Proto.SCTP}))
MARKS = Concat((Meta("mark"), Ct("mark")))
IP_SADDR, IP_DADDR, IP6_SADDR = Payload("ip", "saddr"), Payload("ip", "daddr"), Payload("ip6", "saddr")
DPORT = Payload("th", "dport")

# The sets and chains that the rules below refer to.
WORLD = (
    Set(INET, "links4", ("ifname", "ipv4_addr")),
    Set(INET, "ranges4", ("ipv4_addr",), flags=INTERVAL),
    Set(INET, "ranges6", ("ipv6_addr",), flags=INTERVAL, comment="all of them"),
    Set(INET, "ports", ("inet_proto", "inet_service"), flags=INTERVAL),
    Set(INET, "peers", ("ipv4_addr", "ipv4_addr", "inet_service"), flags=INTERVAL),
    Set(
        INET,
        "seen",
        ("ipv4_addr",),
        flags=frozenset({"dynamic", "timeout"}),
        size=100,
        timeout=60,
        gc_interval=10,
    ),
    Set(INET, "frontends", ("ipv4_addr", "inet_proto", "inet_service"), ("mark",)),
    Set(INET, "balance", ("mark",), ("mark",)),
    Set(INET, "chains", ("mark",), ("verdict",)),
    Set(INET, "backends4", ("mark", "mark"), ("ipv4_addr", "inet_service")),
    Set(INET, "backends6", ("mark", "mark"), ("ipv6_addr", "inet_service")),
    Set(
        INET, "sticky", ("ipv4_addr", "mark"), ("mark",), flags=frozenset({"dynamic", "timeout"}), size=65535
    ),
    Set(INET, "classes", ("ipv4_addr",), ("verdict",)),
    Chain(INET, "other"),
    Chain(INET, "one_of_3"),
)

ELEMENTS = {
    "interface and address": Element(SetName(INET, "links4"), ("podwall0", ip_address("10.0.0.1"))),
    "address": Element(SetName(INET, "ranges4"), ip_address("1.2.3.4")),
    "network": Element(SetName(INET, "ranges4"), ip_network("10.0.0.0/24")),
    "the network beside it": Element(SetName(INET, "ranges4"), ip_network("10.0.1.0/24")),
    "network of one address": Element(SetName(INET, "ranges4"), ip_network("9.9.9.9/32")),
    "range": Element(SetName(INET, "ranges4"), Range(ip_address("11.0.0.3"), ip_address("11.0.0.9"))),
    "range that is a network": Element(
        SetName(INET, "ranges4"), Range(ip_address("12.0.0.0"), ip_address("12.0.0.7"))
    ),
    "everything": Element(SetName(INET, "ranges6"), ip_network("::/0")),
    "protocol and port": Element(SetName(INET, "ports"), (Proto.TCP, 80), comment="default/web/http"),
    "protocol and ports": Element(SetName(INET, "ports"), (Proto.SCTP, Range(1000, 2000))),
    "protocol without a name": Element(SetName(INET, "ports"), (200, 0)),
    "network, address, ports": Element(
        SetName(INET, "peers"), (ip_network("10.0.0.0/8"), ip_address("1.2.3.4"), Range(80, 90))
    ),
    "frontend": Element(SetName(INET, "frontends"), (ip_address("10.96.0.1"), Proto.TCP, 443), 7),
    "balance": Element(SetName(INET, "balance"), 7, 3),
    "verdict goto": Element(SetName(INET, "chains"), 3, Verdict("goto", "one_of_3")),
    "verdict drop": Element(SetName(INET, "chains"), 4, DROP, "nobody there"),
    "backend": Element(SetName(INET, "backends4"), (7, 0), (ip_address("10.244.0.2"), 8080)),
    "backend 6": Element(SetName(INET, "backends6"), (7, 0), (ip_address("fd00::2"), 8080)),
    "class": Element(SetName(INET, "classes"), ip_address("10.244.0.2"), Verdict("jump", "other")),
}

STATEMENTS = {
    # sets, maps, verdict maps
    "in a set": [Match(IP_SADDR, "==", Named("ranges4")), ACCEPT],
    "not in a set": [Match(Concat((Meta("iifname"), IP_SADDR)), "!=", Named("links4")), DROP],
    "two parts in a set": [Match(Concat((Meta("l4proto"), DPORT)), "==", Named("ports")), ACCEPT],
    "three parts in a set": [Match(Concat((IP_SADDR, IP_DADDR, DPORT)), "==", Named("peers")), ACCEPT],
    "mark from a map": [
        Assign(Meta("mark"), Lookup(Concat((IP_DADDR, Meta("l4proto"), DPORT)), Named("frontends")))
    ],
    "connection mark from a map": [Assign(Ct("mark"), Lookup(Meta("mark"), Named("balance")))],
    "verdict map": [VerdictMap(Ct("mark"), Named("chains"))],
    "verdict map inside": [
        VerdictMap(
            IP_DADDR,
            frozenset({(ip_address("1.2.3.4"), Verdict("jump", "other")), (ip_network("2.0.0.0/8"), DROP)}),
        )
    ],
    "verdict map of states": [
        VerdictMap(Ct("state"), frozenset({(CtState.ESTABLISHED, ACCEPT), (CtState.INVALID, DROP)}))
    ],
    "map inside": [Assign(Meta("mark"), Lookup(IP_SADDR, frozenset({(ip_address("1.2.3.4"), 5)})))],
    "random": [Assign(Ct("mark"), Numgen("random", 3)), Verdict("goto", "one_of_3")],
    "counting": [Assign(Ct("mark"), Numgen("inc", 3, 2))],
    "random from a map": [
        Nat(
            "dnat",
            "ip",
            Lookup(Numgen("random", 2), frozenset({(0, ip_address("1.1.1.1")), (1, ip_address("1.1.1.2"))})),
        )
    ],
    # dynamic sets
    "remember the address": [Update("update", "seen", IP_SADDR, timeout=10, statements=(Counter(),))],
    "limit by address": [Update("add", "seen", IP_SADDR, statements=(Limit(5),)), ACCEPT],
    "forget the address": [Update("delete", "seen", IP_SADDR)],
    "sticky": [Update("update", "sticky", Concat((IP_SADDR, Meta("mark"))), Ct("mark"), timeout=10800)],
    # address translation
    "dnat to a backend": [TRANSPORTS, Nat("dnat", "ip", Lookup(MARKS, Named("backends4")))],
    "dnat to a backend 6": [TRANSPORTS, Nat("dnat", "ip6", Lookup(MARKS, Named("backends6")))],
    "dnat to address and port": [TCP, Nat("dnat", "ip", ip_address("10.0.0.1"), 80)],
    "dnat to address and port 6": [TCP, Nat("dnat", "ip6", ip_address("fd00::1"), 80)],
    "dnat to an address": [Nat("dnat", "ip6", ip_address("fd00::1"))],
    "snat to a range": [
        Nat(
            "snat",
            "ip",
            Range(ip_address("1.2.3.4"), ip_address("1.2.3.9")),
            flags=frozenset({"fully-random"}),
        )
    ],
    "masquerade": [Match(Meta("mark"), "==", 0x4000), Nat("masquerade")],
    "masquerade at random": [Nat("masquerade", flags=frozenset({"random", "persistent"}))],
    "masquerade to ports": [TCP, Nat("masquerade", port=Range(1024, 65535))],
    # connections
    "states": [Match(Ct("state"), "in", CtState.ESTABLISHED | CtState.RELATED), ACCEPT],
    "one state": [Match(Ct("state"), "in", CtState.INVALID), DROP],
    "set of states": [Match(Ct("state"), "==", frozenset({CtState.NEW, CtState.UNTRACKED})), ACCEPT],
    "not this state": [Match(Ct("state"), "!=", CtState.ESTABLISHED), DROP],
    "neither state": [Match(Ct("state"), "!=", CtState.ESTABLISHED | CtState.RELATED), DROP],
    "none of the states": [Match(Ct("state"), "!", CtState.ESTABLISHED | CtState.RELATED), DROP],
    "status": [Match(Ct("status"), "in", CtStatus.DNAT | CtStatus.SNAT), ACCEPT],
    "direction": [Match(Ct("direction"), "==", CtDirection.REPLY), ACCEPT],
    "original address": [Match(Ct("ip daddr", "original"), "==", ip_address("10.96.0.1")), ACCEPT],
    "original address 6": [Match(Ct("ip6 saddr", "reply"), "==", ip_address("fd00::1")), ACCEPT],
    "original port": [TCP, Match(Ct("proto-dst", "original"), "==", 80), ACCEPT],
    "set the mark": [Assign(Meta("mark"), 0x10)],
    "clear the mark": [Assign(Meta("mark"), 0)],
    "change some bits of the mark": [Assign(Meta("mark"), Bits(Meta("mark"), "&", 0xFFFF00FF))],
    "set some bits of the mark": [Assign(Ct("mark"), Bits(Bits(Meta("mark"), "&", 0xFFFF00FF), "|", 0x100))],
    "some bits of the mark": [Match(Bits(Meta("mark"), "&", 0xFF), "!=", 5), ACCEPT],
    "untracked": [Notrack()],
    # headers
    "network": [Match(IP_SADDR, "==", ip_network("10.0.0.0/8")), ACCEPT],
    "not this network": [Match(IP6_SADDR, "!=", ip_network("fe80::/10")), ACCEPT],
    "range": [Match(IP_SADDR, "==", Range(ip_address("10.0.0.3"), ip_address("10.0.0.9"))), ACCEPT],
    "networks": [Match(IP_DADDR, "!=", frozenset({ip_address("1.2.3.4"), ip_network("2.0.0.0/8")})), DROP],
    "neighbouring networks": [
        Match(IP_DADDR, "==", frozenset({ip_network("2.0.0.0/24"), ip_network("2.0.1.0/24")})),
        DROP,
    ],
    "family": [Match(Meta("nfproto"), "==", NfProto.IPV6), ACCEPT],
    "implied family": [Match(Meta("nfproto"), "==", NfProto.IPV4), Match(IP_SADDR, "==", Named("ranges4"))],
    "protocol": [TCP, ACCEPT],
    "protocols": [
        Match(Meta("l4proto"), "!=", frozenset({Proto.TCP, Proto.UDP, Proto.ICMP, Proto.ICMPV6, 200})),
        DROP,
    ],
    "one protocol in a set": [Match(Meta("l4proto"), "==", frozenset({Proto.TCP})), DROP],
    "implied protocol": [TCP, Match(Payload("tcp", "dport"), "==", 80), ACCEPT],
    "port": [Match(DPORT, "==", 80), ACCEPT],
    "ports": [Match(DPORT, "==", frozenset({80, Range(90, 99)})), ACCEPT],
    "high ports": [Match(DPORT, ">=", 1024), ACCEPT],
    "not these ports": [Match(Payload("udp", "sport"), "!=", Range(67, 68)), ACCEPT],
    "pairs inside": [
        Match(
            Concat((Meta("l4proto"), DPORT)), "==", frozenset({(Proto.TCP, 80), (Proto.UDP, Range(90, 99))})
        ),
        ACCEPT,
    ],
    "SYN alone": [
        Match(
            Bits(Payload("tcp", "flags"), "&", TcpFlag.FIN | TcpFlag.SYN | TcpFlag.RST | TcpFlag.ACK),
            "!=",
            TcpFlag.SYN,
        ),
        DROP,
    ],
    "no SYN": [Match(Payload("tcp", "flags"), "!", TcpFlag.SYN), DROP],
    "any of the flags": [Match(Payload("tcp", "flags"), "in", TcpFlag.SYN | TcpFlag.FIN), DROP],
    "fragment": [Match(Bits(Payload("ip", "frag-off"), "&", 0x1FFF), "!=", 0), DROP],
    "fragment header": [Match(Exthdr("frag"), "==", True), DROP],
    "no hop-by-hop header": [Match(Exthdr("hbh"), "==", False), DROP],
    "routing header 0": [Match(Exthdr("rt", "type"), "==", 0), DROP],
    "fragment offset": [Match(Exthdr("frag", "frag-off"), "!=", 0), DROP],
    "echo": [Match(Payload("icmp", "type"), "==", IcmpType.ECHO_REQUEST), ACCEPT],
    "unreachable port": [
        Match(Payload("icmp", "type"), "==", IcmpType.DESTINATION_UNREACHABLE),
        Match(Payload("icmp", "code"), "==", 3),
        ACCEPT,
    ],
    "neighbours": [
        Match(Meta("nfproto"), "==", NfProto.IPV6),
        Match(Meta("l4proto"), "==", Proto.ICMPV6),
        Match(Payload("icmpv6", "type"), "==", frozenset({Icmp6Type.ROUTER_ADVERT, Icmp6Type.REDIRECT, 148})),
        DROP,
    ],
    "neighbours and ranges": [
        Match(Payload("icmpv6", "type"), "==", frozenset({130, 131, Range(133, 137), 143})),
        DROP,
    ],
    # interfaces, routes, frames
    "interface": [Match(Meta("iifname"), "==", "eth0"), ACCEPT],
    "interfaces": [Match(Meta("oifname"), "==", frozenset({"eth0", Wildcard("podwall")})), ACCEPT],
    "interface wildcard": [
        Match(Meta("iifname"), "==", Wildcard("podwall")),
        Match(Meta("iifname"), "!=", Wildcard("podwall-")),
        ACCEPT,
    ],
    "local address": [Match(Fib(("daddr",), "type"), "==", FibType.LOCAL), ACCEPT],
    "local address of the interface": [
        Match(Fib(("daddr", "iif"), "type"), "!=", frozenset({FibType.LOCAL, FibType.BROADCAST})),
        ACCEPT,
    ],
    "no way back": [Match(Fib(("saddr", "iif"), "oif"), "==", False), DROP],
    "broadcast": [Match(Meta("pkttype"), "==", PacketType.BROADCAST), DROP],
    "link-layer protocol": [
        Match(Meta("protocol"), "!=", frozenset({EtherType.IP, EtherType.IP6, 0x88A8})),
        DROP,
    ],
    "link-layer address": [Match(Payload("ether", "saddr"), "==", "02:00:00:00:00:01"), DROP],
    # what becomes of the packet
    "reset": [TCP, Reject("tcp reset", "")],
    "port unreachable": [Reject()],
    "prohibited": [Reject("icmpx", "admin-prohibited")],
    "unreachable 4": [Reject("icmp", "host-unreachable")],
    "unreachable 6": [Match(Meta("nfproto"), "==", NfProto.IPV6), Reject("icmpv6", "no-route")],
    "log to a group": [Limit(10, "second", 20), Log("denied default/web ", 5, 128, 3)],
    "log": [Log("podwall ")],
    "too much": [Limit(100, "minute", over=True), DROP],
    "count": [Counter(), DROP],
    "return": [RETURN],
    "continue": [CONTINUE],
    "jump": [Verdict("jump", "other")],
}

OTHER_FAMILIES = {
    "arp request": (ARP, [Match(Payload("arp", "operation"), "==", ArpOperation.REQUEST), DROP]),
    "arp sender": (ARP, [Match(Payload("arp", "saddr ip"), "!=", ip_address("1.2.3.4")), DROP]),
    "arp on a link": (ARP, [Match(Meta("iifname"), "==", Wildcard("podwall")), Counter(), DROP]),
    "ip": (IP, [Match(IP_SADDR, "==", ip_address("1.2.3.4")), Reject("icmp", "port-unreachable")]),
    "ip snat": (IP, [Nat("snat", "", ip_address("1.2.3.4"))]),
    "ip6": (IP6, [Match(IP6_SADDR, "==", ip_address("fd00::1")), ACCEPT]),
    "netdev": (NETDEV, [Match(Meta("protocol"), "!=", frozenset({EtherType.IP, EtherType.ARP})), DROP]),
    "netdev implied": (
        NETDEV,
        [Match(Meta("protocol"), "==", EtherType.IP), Match(IP_SADDR, "==", ip_address("1.1.1.1"))],
    ),
    "netdev vlan": (NETDEV, [Match(Payload("ether", "type"), "==", EtherType.VLAN), DROP]),
}

HOOKS = {
    "filter": Chain(INET, "hooked", (), Hook("filter", "forward", 0, "drop")),
    "raw": Chain(INET, "hooked", (), Hook("filter", "prerouting", -300)),
    "nat": Chain(INET, "hooked", (), Hook("nat", "postrouting", 100)),
    "route": Chain(INET, "hooked", (), Hook("route", "output", -150)),
    "before defragmentation": Chain(INET, "hooked", (), Hook("filter", "prerouting", -450)),
    "ingress": Chain(NETDEV, "hooked", (), Hook("filter", "ingress", -10, "drop", "lo")),
}

WithKernel = Callable[[Callable[[Kernel], Any]], Any]


async def _holds(kernel: Kernel, wanted: Ruleset) -> None:
    """Load it, and find no difference; load its block form, and find none either."""
    tables = list(wanted.tables)
    await kernel.commit(diff.transaction(diff.difference(Ruleset(), wanted), wanted))
    assert diff.difference(await kernel.read(tables), wanted) == {}
    deletions = "".join(f"delete table {render.table_name(name)}\n" for name in tables)
    await kernel.commit(deletions + render.ruleset(wanted))
    assert diff.difference(await kernel.read(tables), wanted) == {}
    await kernel.commit(deletions)


def test_each_statement(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> list[str]:
        wrong = []
        for name, statements in STATEMENTS.items():
            rule = Rule(tuple(statements), f"the case: {name}")
            try:
                await _holds(kernel, Ruleset((Table(*INET), *WORLD, Chain(INET, "rules", (rule,)))))
            except (AssertionError, NftError) as problem:
                wrong.append(f"{name}: {render.rule(rule)}: {problem}")
        return wrong

    assert with_kernel(body) == []


def test_each_element(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> list[str]:
        wrong = []
        for name, element in ELEMENTS.items():
            try:
                await _holds(kernel, Ruleset((Table(*INET), *WORLD, element)))
            except (AssertionError, NftError) as problem:
                wrong.append(f"{name}: {problem}")
        return wrong

    assert with_kernel(body) == []


def test_everything_at_once(with_kernel: WithKernel) -> None:
    rules = tuple(Rule(tuple(statements), name) for name, statements in STATEMENTS.items())
    wanted = Ruleset((Table(*INET), *WORLD, *ELEMENTS.values(), Chain(INET, "rules", rules)))

    with_kernel(lambda kernel: _holds(kernel, wanted))


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_families(with_kernel: WithKernel, name: str) -> None:
    table, statements = OTHER_FAMILIES[name]
    wanted = Ruleset((Table(*table), Chain(table, "rules", (Rule(tuple(statements), name),))))

    with_kernel(lambda kernel: _holds(kernel, wanted))


@pytest.mark.parametrize("name", HOOKS)
def test_hooks(with_kernel: WithKernel, name: str) -> None:
    chain = HOOKS[name]

    with_kernel(lambda kernel: _holds(kernel, Ruleset((Table(*chain.table), chain))))


def test_a_table_of_others_with_flags_does_not_disturb(with_kernel: WithKernel) -> None:
    """nft 1.0.6 aborts when it lists such a table as JSON."""
    wanted = Ruleset((Table(*INET), *WORLD))

    async def body(kernel: Kernel) -> None:
        await kernel.commit("add table inet others { flags dormant; }")
        await _holds(kernel, wanted)

    with_kernel(body)


def test_what_packets_put_into_a_dynamic_set_is_no_difference(with_kernel: WithKernel) -> None:
    wanted = Ruleset((Table(*INET), *WORLD))

    async def body(kernel: Kernel) -> None:
        await kernel.commit(diff.transaction(diff.difference(Ruleset(), wanted), wanted))
        await kernel.commit("add element inet podwall sticky { 1.2.3.4 . 7 timeout 3h : 1 }")
        there = await kernel.read([INET])
        assert there.elements
        assert diff.difference(there, wanted) == {}

    with_kernel(body)


def test_a_table_that_is_not_there_is_left_out(with_kernel: WithKernel) -> None:
    async def body(kernel: Kernel) -> Ruleset:
        await kernel.commit("add table inet other { chain c { }; }")
        return await kernel.read()

    assert with_kernel(body) == Ruleset()
