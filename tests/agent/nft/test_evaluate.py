"""A packet on its way through a ruleset, statement by statement."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from agent.nft.evaluate import FORWARDED, RECEIVED, SENT, Evaluator, Result, Translation
from agent.nft.model import (
    ACCEPT,
    CONTINUE,
    DROP,
    RETURN,
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
    IcmpType,
    Item,
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
    Statement,
    Table,
    TableName,
    TcpFlag,
    Unparsed,
    Update,
    Verdict,
    VerdictMap,
    Wildcard,
)
from agent.nft.packet import Connection, Flow, Packet, UndecidedError

INET = TableName("inet", "podwall")
A, B, C = map(ip_address, ("10.0.0.1", "10.0.0.2", "203.0.113.9"))
A6, B6 = map(ip_address, ("fd00::1", "fd00::2"))
TCP = Packet(A, B, Proto.TCP, 40000, 80, TcpFlag.SYN, iifname="podwall0000000a", oifname="eth0")
TCP6 = Packet(A6, B6, Proto.TCP, 40000, 80, TcpFlag.SYN)
UDP = Packet(A, B, Proto.UDP, 40000, 53)
PING = Packet(A, B, Proto.ICMP, icmp_type=IcmpType.ECHO_REQUEST)
GRE = Packet(A, B, 47)

SADDR, DADDR, SADDR6 = Payload("ip", "saddr"), Payload("ip", "daddr"), Payload("ip6", "saddr")
DPORT, TH_DPORT = Payload("tcp", "dport"), Payload("th", "dport")
MARK, CT_MARK = Meta("mark"), Ct("mark")

SETS: tuple[Item, ...] = (
    Set(INET, "hosts", ("ipv4_addr",)),
    Element(SetName(INET, "hosts"), A),
    Set(INET, "ranges", ("ipv4_addr",), flags=frozenset({"interval"})),
    Element(SetName(INET, "ranges"), ip_network("10.0.0.0/30")),
    Element(SetName(INET, "ranges"), Range(ip_address("203.0.113.5"), ip_address("203.0.113.9"))),
    Set(INET, "services", ("ipv4_addr", "inet_proto", "inet_service"), flags=frozenset({"interval"})),
    Element(SetName(INET, "services"), (ip_network("10.0.0.0/24"), Proto.TCP, Range(80, 90))),
    Set(INET, "links", ("ifname", "ipv4_addr")),
    Element(SetName(INET, "links"), ("podwall0000000a", A)),
    Set(INET, "verdicts", ("ipv4_addr",), ("verdict",)),
    Element(SetName(INET, "verdicts"), A, DROP),
    Element(SetName(INET, "verdicts"), B, Verdict("jump", "allows")),
    Chain(INET, "allows", (Rule((ACCEPT,)),)),
    Chain(INET, "returns", (Rule((RETURN,)), Rule((DROP,)))),
    Chain(INET, "nothing", ()),
)


def judged(
    packet: Packet, *rules: tuple[Statement, ...], connection: Connection | None = None, **options: Any
) -> Result:
    """What a forward chain of these rules, and a drop after them, does."""
    chain = Chain(INET, "c", tuple(Rule(each) for each in (*rules, (DROP,))), Hook("filter", "forward", 0))
    return Evaluator(Ruleset((Table(*INET), *SETS, chain)), **options).judge(packet, FORWARDED, connection)


HOLDS: dict[str, tuple[Packet, Statement, bool]] = {
    "source": (TCP, Match(SADDR, "==", A), True),
    "other source": (TCP, Match(SADDR, "==", B), False),
    "not this source": (TCP, Match(SADDR, "!=", B), True),
    "other family": (TCP6, Match(SADDR, "==", A), False),
    "other family is not unequal either": (TCP6, Match(SADDR, "!=", A), False),
    "network": (TCP, Match(SADDR, "==", ip_network("10.0.0.0/8")), True),
    "not this network": (TCP, Match(SADDR, "!=", ip_network("10.0.0.0/8")), False),
    "network of the other family": (TCP6, Match(SADDR6, "==", ip_network("fd00::/8")), True),
    "range of addresses": (TCP, Match(SADDR, "==", Range(ip_address("10.0.0.0"), B)), True),
    "set inside": (TCP, Match(SADDR, "==", frozenset({A, C})), True),
    "not in the set inside": (TCP, Match(SADDR, "!=", frozenset({A, C})), False),
    "networks inside": (TCP, Match(SADDR, "==", frozenset({ip_network("10.0.0.0/24"), C})), True),
    "named set": (TCP, Match(SADDR, "==", Named("hosts")), True),
    "not in the named set": (TCP, Match(DADDR, "!=", Named("hosts")), True),
    "named ranges": (TCP, Match(DADDR, "==", Named("ranges")), True),
    "end of a range": (Packet(C, A), Match(SADDR, "==", Named("ranges")), True),
    "beyond a range": (Packet(ip_address("203.0.113.10"), A), Match(SADDR, "==", Named("ranges")), False),
    "concatenation": (TCP, Match(Concat((Meta("iifname"), SADDR)), "==", Named("links")), True),
    "concatenation of another": (TCP, Match(Concat((Meta("oifname"), SADDR)), "==", Named("links")), False),
    "concatenation of ranges": (
        TCP,
        Match(Concat((DADDR, Meta("l4proto"), TH_DPORT)), "==", Named("services")),
        True,
    ),
    "port beyond a concatenation of ranges": (
        UDP,
        Match(Concat((DADDR, Meta("l4proto"), TH_DPORT)), "==", Named("services")),
        False,
    ),
    "port": (TCP, Match(DPORT, "==", 80), True),
    "port of another protocol": (UDP, Match(DPORT, "==", 53), False),
    "port of another protocol is not unequal either": (UDP, Match(DPORT, "!=", 80), False),
    "ports": (TCP, Match(DPORT, "==", frozenset({22, Range(80, 90)})), True),
    "range of ports": (TCP, Match(DPORT, "==", Range(80, 80)), True),
    "pairs": (
        UDP,
        Match(Concat((Meta("l4proto"), TH_DPORT)), "==", frozenset({(Proto.UDP, 53), (Proto.TCP, 80)})),
        True,
    ),
    "no ports in a pair": (
        PING,
        Match(Concat((Meta("l4proto"), TH_DPORT)), "==", frozenset({(Proto.UDP, 53)})),
        False,
    ),
    "high port": (TCP, Match(DPORT, ">=", 80), True),
    "higher port": (TCP, Match(DPORT, ">", 80), False),
    "lower port": (TCP, Match(DPORT, "<", 81), True),
    "low port": (TCP, Match(DPORT, "<=", 79), False),
    "SYN alone": (TCP, Match(Bits(Payload("tcp", "flags"), "&", 0x17), "==", TcpFlag.SYN), True),
    "any of the flags": (TCP, Match(Payload("tcp", "flags"), "in", TcpFlag.SYN | TcpFlag.RST), True),
    "none of the flags": (TCP, Match(Payload("tcp", "flags"), "!", TcpFlag.SYN), False),
    "flags of UDP": (UDP, Match(Payload("tcp", "flags"), "!", TcpFlag.SYN), False),
    "interface": (TCP, Match(Meta("oifname"), "==", "eth0"), True),
    "interfaces": (TCP, Match(Meta("iifname"), "==", Wildcard("podwall")), True),
    "not these interfaces": (TCP, Match(Meta("iifname"), "!=", Wildcard("podwall-")), True),
    "protocol": (PING, Match(Meta("l4proto"), "==", frozenset({Proto.ICMP, Proto.ICMPV6})), True),
    "unknown protocol": (GRE, Match(Meta("l4proto"), "==", 47), True),
    "family": (TCP6, Match(Meta("nfproto"), "==", NfProto.IPV6), True),
    "link-layer protocol": (TCP, Match(Meta("protocol"), "==", EtherType.IP), True),
    "packet type": (TCP, Match(Meta("pkttype"), "!=", PacketType.HOST), False),
    "echo": (PING, Match(Payload("icmp", "type"), "==", IcmpType.ECHO_REQUEST), True),
    "ICMPv6 of an IPv4 packet": (PING, Match(Payload("icmpv6", "type"), "==", 8), False),
    "ICMP code": (PING, Match(Payload("icmp", "code"), "==", 0), True),
    "IP protocol": (TCP, Match(Payload("ip", "protocol"), "==", Proto.TCP), True),
    "VLAN": (TCP, Match(Payload("vlan", "id"), "==", 1), False),
    "extension header": (
        Packet(A6, B6, extensions=frozenset({"frag"})),
        Match(Exthdr("frag"), "==", True),
        True,
    ),
    "no extension header": (TCP6, Match(Exthdr("frag"), "==", False), True),
    "field of no extension header": (TCP6, Match(Exthdr("rt", "type"), "!=", 0), False),
    "any other field": (Packet(A, B, fields={("ip", "ttl"): 3}), Match(Payload("ip", "ttl"), "<", 5), True),
    "state": (TCP, Match(Ct("state"), "in", CtState.NEW | CtState.RELATED), True),
    "other state": (TCP, Match(Ct("state"), "in", CtState.ESTABLISHED), False),
    "set of states": (TCP, Match(Ct("state"), "==", frozenset({CtState.NEW, CtState.UNTRACKED})), True),
    "direction": (TCP, Match(Ct("direction"), "==", CtDirection.REPLY), False),
    "status": (TCP, Match(Ct("status"), "in", CtStatus.DNAT), False),
    "original source": (TCP, Match(Ct("ip saddr", "original"), "==", A), True),
    "source of the reply": (TCP, Match(Ct("ip saddr", "reply"), "==", B), True),
    "original source of the other family": (TCP, Match(Ct("ip6 saddr", "original"), "!=", A6), False),
    "original port": (TCP, Match(Ct("proto-dst", "original"), "==", 80), True),
    "bits of the mark": (Packet(A, B, mark=0x105), Match(Bits(MARK, "&", 0xFF), "==", 5), True),
    "map inside": (TCP, Match(Lookup(SADDR, frozenset({(A, 7)})), "==", 7), True),
    "nothing in the map inside": (TCP, Match(Lookup(DADDR, frozenset({(A, 7)})), "==", 7), False),
    "count": (TCP, Counter(), True),
    "log": (TCP, Log("podwall", 5), True),
    "limit": (TCP, Limit(1), True),
    "over the limit": (TCP, Limit(1, over=True), False),
    "continue": (TCP, CONTINUE, False),
}


@pytest.mark.parametrize("name", HOLDS)
def test_each_condition(name: str) -> None:
    packet, condition, expected = HOLDS[name]

    assert judged(packet, (condition, ACCEPT)).accepted is expected


UNDECIDED: dict[str, tuple[Packet, Statement]] = {
    "unparsed": (TCP, Unparsed("something new")),
    "missing set": (TCP, Match(SADDR, "==", Named("gone"))),
    "missing chain": (TCP, Verdict("jump", "gone")),
    "field that the packet's description lacks": (TCP, Match(Payload("ip", "ttl"), "==", 1)),
    "bytes where GRE has no port": (GRE, Match(TH_DPORT, "==", 80)),
    "fact beside the packet": (TCP, Match(Meta("cpu"), "==", 0)),
    "routing tables": (TCP, Match(Fib(("daddr",), "type"), "==", FibType.LOCAL)),
    "chance": (TCP, Assign(MARK, Numgen("random", 2))),
    "connection's fact without a direction": (TCP, Match(Ct("ip saddr"), "==", A)),
    "redirect": (TCP, Nat("redirect", port=80)),
    "another field set": (TCP, Assign(Payload("ip", "dscp"), 1)),
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_it_does_not_know_it_does_not_answer(name: str) -> None:
    packet, statement = UNDECIDED[name]

    with pytest.raises(UndecidedError):
        judged(packet, (statement, ACCEPT))


def test_invalid_and_untracked_packets_have_only_a_state() -> None:
    for state in (CtState.INVALID, CtState.UNTRACKED):
        connection = Connection(state, mark=1)
        assert judged(TCP, (Match(Ct("state"), "in", state), ACCEPT), connection=connection).accepted
        assert not judged(TCP, (Match(CT_MARK, "!=", 2), ACCEPT), connection=connection).accepted


WAYS: dict[str, tuple[list[tuple[Statement, ...]], bool]] = {
    "jump, and back": ([(Verdict("jump", "returns"),), (ACCEPT,)], True),
    "jump to an accept": ([(Verdict("jump", "allows"),)], True),
    "jump to nothing": ([(Verdict("jump", "nothing"),), (ACCEPT,)], True),
    "goto, and no way back": ([(Verdict("goto", "nothing"),), (DROP,)], True),
    "return from a base chain": ([(RETURN,), (DROP,)], True),
    "verdict map": ([(VerdictMap(DADDR, Named("verdicts")),)], True),
    "verdict map that drops": ([(VerdictMap(SADDR, Named("verdicts")),), (ACCEPT,)], False),
    "verdict map without an entry": ([(VerdictMap(SADDR6, Named("verdicts")),), (ACCEPT,)], True),
    "verdict map inside": ([(VerdictMap(DPORT, frozenset({(Range(1, 99), ACCEPT)})),)], True),
    "marks": ([(Assign(MARK, 5),), (Match(MARK, "==", 5), Assign(CT_MARK, Bits(MARK, "|", 2))),
               (Match(CT_MARK, "==", 7), ACCEPT)], True),
    "untracked from here": ([(Notrack(),), (Match(Ct("state"), "==", CtState.UNTRACKED), ACCEPT)], True),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_each_way_through_chains(name: str) -> None:
    rules, expected = WAYS[name]

    assert judged(TCP, *rules).accepted is expected


def hooked(name: str, hook: Any, priority: int, *rules: tuple[Statement, ...], **more: Any) -> Chain:
    table = more.pop("table", INET)
    policy = more.pop("policy", "accept")
    kind = more.pop("type", "filter")
    return Chain(table, name, tuple(map(Rule, rules)), Hook(kind, hook, priority, policy))


def test_chains_in_order_of_priority() -> None:
    seen = Evaluator(
        Ruleset(
            (
                hooked("third", "forward", 10, (Match(MARK, "==", 2), ACCEPT), (DROP,)),
                hooked("first", "forward", -10, (Assign(MARK, 1),)),
                hooked("second", "forward", 0, (Match(MARK, "==", 1), Assign(MARK, 2))),
            )
        )
    ).judge(TCP)

    assert seen.accepted
    assert [step.chain.name for step in seen.trace] == ["first", "second", "third"]


def test_accept_ends_its_chain_and_the_next_one_may_still_drop() -> None:
    result = Evaluator(
        Ruleset((hooked("a", "forward", 0, (ACCEPT,)), hooked("b", "postrouting", 0, (DROP,))))
    ).judge(TCP)

    assert result.outcome == "drop"
    assert result.step is not None
    assert (result.step.chain.name, result.step.index) == ("b", 0)


def test_the_policy_of_a_chain() -> None:
    result = Evaluator(Ruleset((hooked("a", "forward", 0, policy="drop"),))).judge(TCP)

    assert (result.outcome, result.step) == ("drop", None)
    assert result.chain is not None
    assert result.chain.name == "a"


def test_a_refusal_ends_the_way() -> None:
    assert judged(TCP, (Reject("tcp reset"),)).outcome == "reject"


@pytest.mark.parametrize(
    ("family", "packet", "expected"),
    [("ip", TCP, False), ("ip", TCP6, True), ("ip6", TCP6, False), ("ip6", TCP, True), ("arp", TCP, True)],
)
def test_tables_of_a_family_see_its_packets(family: Any, packet: Packet, expected: bool) -> None:
    chain = hooked("a", "forward", 0, (DROP,), table=TableName(family, "t"))

    assert Evaluator(Ruleset((chain,))).judge(packet).accepted is expected


@pytest.mark.parametrize(("hooks", "expected"), [(FORWARDED, True), (RECEIVED, False), (SENT, True)])
def test_only_the_hooks_on_the_way(hooks: Any, expected: bool) -> None:
    assert Evaluator(Ruleset((hooked("a", "input", 0, (DROP,)),))).judge(TCP, hooks).accepted is expected


def test_the_caller_knows_the_routes() -> None:
    asked: list[tuple[tuple[str, ...], str]] = []

    def fib(flags: tuple[str, ...], result: str, packet: Packet) -> int:
        asked.append((flags, result))
        return FibType.LOCAL

    assert judged(TCP, (Match(Fib(("daddr",), "type"), "==", FibType.LOCAL), ACCEPT), fib=fib).accepted
    assert asked == [(("daddr",), "type")]


def test_the_trace_has_what_was_counted_before_it_ended() -> None:
    result = judged(TCP, (Match(DPORT, "==", 80), Counter(), Limit(1, over=True), DROP), (ACCEPT,))

    assert result.accepted
    assert [(step.index, step.verdict) for step in result.trace] == [(0, None), (1, ACCEPT)]


# Services: translation by maps

CT_TARGET = Ct("ip daddr", "original")
SERVICES: tuple[Item, ...] = (
    Table(*INET),
    Set(INET, "frontends", ("ipv4_addr", "inet_proto", "inet_service"), ("mark",)),
    Element(SetName(INET, "frontends"), (ip_address("10.96.0.1"), Proto.TCP, 80), 17),
    Set(INET, "balance", ("mark",), ("mark",)),
    Element(SetName(INET, "balance"), 17, 2),
    Set(INET, "chains", ("mark",), ("verdict",)),
    Element(SetName(INET, "chains"), 2, Verdict("jump", "random_2")),
    Set(INET, "backends", ("mark", "mark"), ("ipv4_addr", "inet_service")),
    Element(SetName(INET, "backends"), (17, 0), (A, 8080)),
    Element(SetName(INET, "backends"), (17, 1), (B, 9090)),
    Set(INET, "sticky", ("ipv4_addr", "mark"), ("mark",), flags=frozenset({"dynamic", "timeout"})),
    hooked(
        "services",
        "prerouting",
        -100,
        (Assign(MARK, Lookup(Concat((DADDR, Meta("l4proto"), TH_DPORT)), Named("frontends"))),),
        (Assign(CT_MARK, Lookup(MARK, Named("balance"))),),
        (VerdictMap(CT_MARK, Named("chains")),),
        type="nat",
    ),
    Chain(
        INET,
        "random_2",
        (
            Rule((Assign(CT_MARK, Numgen("random", 2)),)),
            Rule((Update("update", "sticky", Concat((SADDR, MARK)), CT_MARK, 3600),)),
            Rule((Match(Lookup(Concat((SADDR, MARK)), Named("sticky")), "<", 9), Verdict("goto", "dnat"))),
        ),
    ),
    Chain(
        INET, "dnat", (Rule((Nat("dnat", "ip", Lookup(Concat((MARK, CT_MARK)), Named("backends"))),)),)
    ),
    hooked("policy", "forward", 0, (Match(DADDR, "==", B), Match(DPORT, "==", 9090), ACCEPT), (DROP,)),
    hooked("late", "postrouting", 100, (Match(CT_TARGET, "==", C), DROP), (Nat("masquerade"),), type="nat"),
)  # fmt: skip
TO_SERVICE = Packet(A, ip_address("10.96.0.1"), Proto.TCP, 40000, 80, TcpFlag.SYN)


@pytest.mark.parametrize(
    ("number", "outcome", "target", "port"), [(0, "drop", A, 8080), (1, "accept", B, 9090)]
)
def test_what_is_translated_holds_for_the_hooks_after(
    number: int, outcome: str, target: Any, port: int
) -> None:
    result = Evaluator(Ruleset(SERVICES), numgen=lambda _: number).judge(TO_SERVICE)

    assert result.outcome == outcome
    assert (result.packet.target, result.packet.dport) == (target, port)
    assert result.translations[0] == Translation("dnat", target, port)
    assert (result.connection.original, result.connection.reply) == (
        Flow(A, ip_address("10.96.0.1"), 40000, 80),
        Flow(target, A, port, 40000),
    )
    if outcome == "accept":
        assert result.translations[1] == Translation("masquerade")


def test_a_known_connection_is_not_translated_again() -> None:
    result = Evaluator(Ruleset(SERVICES)).judge(TO_SERVICE, FORWARDED, Connection(CtState.ESTABLISHED))

    assert result.translations == ()


def test_what_is_no_service_is_left_alone() -> None:
    result = Evaluator(Ruleset(SERVICES)).judge(Packet(A, B, Proto.TCP, 40000, 9090))

    assert result.accepted
    assert result.translations == (Translation("masquerade"),)
