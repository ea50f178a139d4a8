"""Different spellings that mean the same compare equal; what means something else does not."""

from ipaddress import ip_address, ip_network

import pytest

from agent.nft.model import (
    ACCEPT,
    DROP,
    Assign,
    Bits,
    Chain,
    Hook,
    Match,
    Meta,
    NfProto,
    Payload,
    Proto,
    Range,
    Reject,
    Rule,
    Set,
    Statement,
    TableName,
    TcpFlag,
)
from agent.nft.normal import comparable, rule

TCP = Match(Meta("l4proto"), "==", Proto.TCP)
PORT = Match(Payload("tcp", "dport"), "==", 80)
TYPE = Payload("icmpv6", "type")
FLAGS = Payload("tcp", "flags")
TABLE = TableName("inet", "podwall")

SAME: dict[str, tuple[list[Statement], list[Statement]]] = {
    "implied protocol": ([TCP, PORT, ACCEPT], [PORT, ACCEPT]),
    "implied family": (
        [Match(Meta("nfproto"), "==", NfProto.IPV6), Match(TYPE, "==", 134), DROP],
        [Match(TYPE, "==", 134), DROP],
    ),
    "implied by reject": (
        [Match(Meta("nfproto"), "==", NfProto.IPV4), Reject("icmp", "host-unreachable")],
        [Reject("icmp", "host-unreachable")],
    ),
    "neighbouring numbers in an interval set": (
        [Match(TYPE, "==", frozenset({130, 131, Range(133, 137)})), DROP],
        [Match(TYPE, "==", frozenset({Range(130, 131), Range(133, 137)})), DROP],
    ),
    "neighbouring networks": (
        [
            Match(
                Payload("ip", "saddr"),
                "==",
                frozenset({ip_network("10.0.0.0/25"), ip_network("10.0.0.128/25")}),
            ),
            DROP,
        ],
        [Match(Payload("ip", "saddr"), "==", ip_network("10.0.0.0/24")), DROP],
    ),
    "one in a set": ([Match(Meta("mark"), "==", frozenset({5})), DROP], [Match(Meta("mark"), "==", 5), DROP]),
    "network of one address": (
        [Match(Payload("ip", "saddr"), "==", ip_network("1.2.3.4/32"))],
        [Match(Payload("ip", "saddr"), "==", ip_address("1.2.3.4"))],
    ),
    "no flag": ([Match(Bits(FLAGS, "&", TcpFlag.SYN), "==", 0)], [Match(FLAGS, "!", TcpFlag.SYN)]),
    "any flag": ([Match(Bits(FLAGS, "&", TcpFlag.SYN), "!=", 0)], [Match(FLAGS, "in", TcpFlag.SYN)]),
    "mask and bits": (
        [Assign(Meta("mark"), Bits(Bits(Meta("mark"), "&", 0xFF00), "|", 0x01))],
        [Assign(Meta("mark"), Bits(Bits(Meta("mark"), "&", 0xFF01), "|", 0x01))],
    ),
}
DIFFERENT: dict[str, tuple[list[Statement], list[Statement]]] = {
    "protocol that is not implied": (
        [TCP, Match(Payload("th", "dport"), "==", 80)],
        [Match(Payload("th", "dport"), "==", 80)],
    ),
    "protocol that is excluded": (
        [Match(Meta("l4proto"), "!=", Proto.TCP), PORT],
        [PORT],
    ),
    "other protocol": ([Match(Meta("l4proto"), "==", Proto.UDP), PORT], [PORT]),
    "plain neighbours stay two": (
        [Match(Meta("mark"), "==", frozenset({1, 2}))],
        [Match(Meta("mark"), "==", Range(1, 2))],
    ),
    "masked address": (
        [Match(Bits(Meta("mark"), "&", 1), "==", 0)],
        [Match(Meta("mark"), "!", 1)],
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same(case: str) -> None:
    left, right = SAME[case]
    assert rule(Rule(tuple(left))) == rule(Rule(tuple(right)))


@pytest.mark.parametrize("case", DIFFERENT)
def test_not_the_same(case: str) -> None:
    left, right = DIFFERENT[case]
    assert rule(Rule(tuple(left))) != rule(Rule(tuple(right)))


def test_what_old_versions_do_not_list_is_not_compared() -> None:
    set_of_packets = Set(TABLE, "s", ("mark",), flags=frozenset({"dynamic", "timeout"}))
    listed = Set(TABLE, "s", ("mark",), flags=frozenset({"timeout"}))
    assert comparable(set_of_packets) == comparable(listed)

    hooked = Chain(TABLE, "c", (), Hook("filter", "ingress", 0, device="lo"))
    assert comparable(hooked) == comparable(Chain(TABLE, "c", (), Hook("filter", "ingress", 0)))
    assert comparable(hooked) != comparable(Chain(TABLE, "c", (), Hook("filter", "ingress", 1)))
