"""Listings as nft writes them, older and newer, become the same values."""

import json
from ipaddress import ip_address
from typing import Any

import pytest

from agent.nft import parse
from agent.nft.model import (
    Assign,
    Bits,
    Chain,
    ChainName,
    Concat,
    Counter,
    Ct,
    CtState,
    Element,
    Match,
    Meta,
    Payload,
    Proto,
    Reject,
    Set,
    SetName,
    Statement,
    TableName,
    TcpFlag,
    Unparsed,
    Update,
    Wildcard,
)

INET = TableName("inet", "podwall")
WHERE = {"family": "inet", "table": "podwall"}


def _match(op: str, left: Any, right: Any) -> Any:
    return {"match": {"op": op, "left": left, "right": right}}


STATE, FLAGS = {"ct": {"key": "state"}}, {"payload": {"protocol": "tcp", "field": "flags"}}
STICKY = Update("update", "sticky", Concat((Payload("ip", "saddr"), Meta("mark"))), Ct("mark"), timeout=10800)
SYN_OF_TWO = Match(Bits(Payload("tcp", "flags"), "&", TcpFlag.SYN | TcpFlag.ACK), "==", TcpFlag.SYN)

STATEMENTS: dict[str, tuple[Any, Statement]] = {
    "protocol by name": (
        _match("==", {"meta": {"key": "l4proto"}}, "tcp"),
        Match(Meta("l4proto"), "==", Proto.TCP),
    ),
    "protocol by number": (
        _match("==", {"meta": {"key": "l4proto"}}, 6),
        Match(Meta("l4proto"), "==", Proto.TCP),
    ),
    "protocol by its other name": (
        _match("==", {"meta": {"key": "l4proto"}}, "ipv6-icmp"),
        Match(Meta("l4proto"), "==", Proto.ICMPV6),
    ),
    "one state": (_match("in", STATE, "new"), Match(Ct("state"), "in", CtState.NEW)),
    "states as a list": (
        _match("in", STATE, ["established", "related"]),
        Match(Ct("state"), "in", CtState.ESTABLISHED | CtState.RELATED),
    ),
    "states as bits": (
        _match("!=", STATE, {"|": ["established", "related"]}),
        Match(Ct("state"), "!=", CtState.ESTABLISHED | CtState.RELATED),
    ),
    "mask as a list": (_match("==", {"&": [FLAGS, ["syn", "ack"]]}, "syn"), SYN_OF_TWO),
    "mask as bits": (_match("==", {"&": [FLAGS, {"|": ["syn", "ack"]}]}, "syn"), SYN_OF_TWO),
    "wildcard": (
        _match("==", {"meta": {"key": "iifname"}}, "podwall*"),
        Match(Meta("iifname"), "==", Wildcard("podwall")),
    ),
    "counter": ({"counter": {"packets": 5, "bytes": 300}}, Counter()),
    "reject without words": ({"reject": None}, Reject()),
    "map update as text": ("update @sticky { ip saddr . meta mark timeout 3h : ct mark }", STICKY),
    "map update as JSON": (
        {
            "map": {
                "op": "update",
                "elem": {
                    "elem": {
                        "val": {
                            "concat": [
                                {"payload": {"protocol": "ip", "field": "saddr"}},
                                {"meta": {"key": "mark"}},
                            ]
                        },
                        "timeout": 10800,
                    }
                },
                "data": {"ct": {"key": "mark"}},
                "map": "@sticky",
            }
        },
        STICKY,
    ),
    "set bits": (
        {"mangle": {"key": {"ct": {"key": "mark"}}, "value": {"|": [{"meta": {"key": "mark"}}, 5]}}},
        Assign(Ct("mark"), Bits(Meta("mark"), "|", 5)),
    ),
}
FOREIGN: dict[str, Any] = {
    "xtables": {"xt": None},
    "unknown statement": {"flow": {"op": "add", "flowtable": "@f"}},
    "unknown expression": _match("==", {"socket": {"key": "transparent"}}, 1),
    "unknown name": _match("==", {"meta": {"key": "l4proto"}}, "nosuch"),
    "text": "update @sticky { whatever this is }",
    "odd shape": {"match": 5},
}


def _parsed(statement: Any) -> Statement:
    listing = {
        "nftables": [
            {"metainfo": {"version": "9"}},
            {"chain": {**WHERE, "name": "c", "handle": 1}},
            {"rule": {**WHERE, "chain": "c", "handle": 2, "expr": [statement]}},
        ]
    }
    chain = parse.ruleset(json.dumps(listing)).chains[ChainName(INET, "c")]
    return chain.rules[0].statements[0]


@pytest.mark.parametrize("case", STATEMENTS)
def test_statements(case: str) -> None:
    listed, wanted = STATEMENTS[case]
    assert _parsed(listed) == wanted


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_understood_is_kept_as_such(case: str) -> None:
    assert isinstance(_parsed(FOREIGN[case]), Unparsed)


def _of_map(**more: Any) -> Any:
    made = {**WHERE, "name": "backends", "handle": 3, "type": ["mark", "mark"], **more}
    return parse.ruleset(json.dumps({"nftables": [{"map": made}]}))


@pytest.mark.parametrize("listed", ["ipv4_addr . inet_service", ["ipv4_addr", "inet_service"]])
def test_types_of_concatenated_data(listed: Any) -> None:
    rules = _of_map(map=listed, elem=[[{"concat": [7, 0]}, {"concat": ["10.0.0.1", 80]}]])

    name = SetName(INET, "backends")
    assert rules.sets[name] == Set(INET, "backends", ("mark", "mark"), ("ipv4_addr", "inet_service"))
    assert list(rules.elements[name].values()) == [Element(name, (7, 0), (ip_address("10.0.0.1"), 80))]


def test_a_type_that_is_not_understood_differs() -> None:
    made = _of_map(map={"typeof": {"payload": {}}}, elem=[[{"concat": [7, 0]}, "x"]])
    assert made.sets[SetName(INET, "backends")].data == (parse.UNPARSED_TYPE,)


def test_an_element_given_twice_means_that_another_is_missing() -> None:
    with pytest.raises(parse.TornError, match="backends: 2 elements"):
        _of_map(map="mark", elem=[[{"concat": [7, 0]}, 1], [{"concat": [7, 0]}, 1]])


def test_elements_that_packets_add_may_come_twice() -> None:
    twice = [[{"concat": [7, 0]}, 1], [{"concat": [7, 0]}, 1]]
    assert len(_of_map(map="mark", flags=["dynamic"], elem=twice).elements) == 1


def test_a_chain_without_rules() -> None:
    listing = {"nftables": [{"chain": {**WHERE, "name": "c", "handle": 1}}]}
    assert list(parse.ruleset(json.dumps(listing)).items()) == [Chain(INET, "c")]
