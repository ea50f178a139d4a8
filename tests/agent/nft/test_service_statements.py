"""What only the rules of Services need: hashes, sets without typed keys, entries that packets delete."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from agent.nft import parse, render
from agent.nft.evaluate import Evaluator
from agent.nft.model import (
    Assign,
    Chain,
    Concat,
    Ct,
    Element,
    Hash,
    Hook,
    Item,
    Lookup,
    Meta,
    Named,
    Nat,
    Payload,
    Range,
    Rule,
    Ruleset,
    Set,
    Statement,
    Table,
    TableName,
    Update,
)
from agent.nft.packet import Packet

TABLE = TableName("inet", "podwall_test")
CLIENT = Concat((Hash(Payload("ip6", "saddr"), 100, 0x1A), Ct("mark")))
MARK = Meta("mark")


def _judge(*rules: tuple[Statement, ...], items: tuple[Item, ...] = (), version: int = 6) -> Any:
    chain = Chain(TABLE, "c", tuple(map(Rule, rules)), Hook("nat", "prerouting", -100))
    source, target = ("fd00::1", "fd00::2") if version == 6 else ("10.0.0.1", "10.0.0.2")
    packet = Packet(ip_address(source), ip_address(target), sport=1, dport=2)
    ruleset = Ruleset((Table(*TABLE), _clients(), chain, *items))
    return Evaluator(ruleset).judge(packet, ("prerouting",))


def _clients() -> Set:
    return Set(TABLE, "clients", ("integer", "mark"), ("mark",), flags=frozenset({"dynamic", "timeout"}))


def test_a_hash_is_written_and_read_in_a_rule_and_in_an_update() -> None:
    text = "jhash ip6 saddr mod 100 seed 0x1a . ct mark"
    assert render.expression(CLIENT) == text
    update = Update("update", "clients", CLIENT, MARK, 60)
    assert render.statement(update) == f"update @clients {{ {text} timeout 60s : meta mark }}"
    listed = {"concat": [{"jhash": {"mod": 100, "seed": 26, "expr": _payload("ip6", "saddr")}}, _ct("mark")]}
    assert parse._expression(listed) == CLIENT
    assert parse._statement(f"update @clients {{ {text} timeout 1m : meta mark }}") == update


def _payload(protocol: str, field: str) -> Any:
    return {"payload": {"protocol": protocol, "field": field}}


def _ct(key: str) -> Any:
    return {"ct": {"key": key}}


def test_a_key_without_a_type_is_declared_by_expressions() -> None:
    assert render.add_set(_clients()) == (
        "add map inet podwall_test clients { typeof numgen random mod 2 . ct mark : ct mark; "
        "flags dynamic,timeout; }"
    )


def test_marks_in_a_range_are_written_as_marks() -> None:
    assert render.scalar(Range(0x10, 0x1F), "mark") == "0x10-0x1f"


def _remember(mark: int) -> tuple[Statement, ...]:
    return Assign(MARK, mark), Update("update", "clients", CLIENT, MARK, 60)


_FORGET = (Assign(MARK, 0), Update("delete", "clients", CLIENT, MARK))
_RECALL = (Assign(MARK, 99), Assign(MARK, Lookup(CLIENT, Named("clients"))))
ENTRIES = {
    "what a packet put there is found": ((_remember(5), _RECALL), 5),
    "an update leaves the datum of an entry": ((_remember(5), _remember(6), _RECALL), 5),
    "a deleted entry is not found": ((_remember(5), _FORGET, _RECALL), 99),
    "after deleting there is a new one": ((_remember(5), _FORGET, _remember(6), _RECALL), 6),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_packets_make(name: str) -> None:
    rules, expected = ENTRIES[name]
    assert _judge(*rules).packet.mark == expected


def test_an_entry_that_is_there_can_be_deleted() -> None:
    key = Hash(Payload("ip6", "saddr"), 100, 0x1A)
    made = Set(TABLE, "known", ("mark",), ("mark",), flags=frozenset({"dynamic"}))
    number = _judge((Assign(MARK, key),)).packet.mark
    recall = (Assign(MARK, 99), Assign(MARK, Lookup(key, Named("known"))))
    there = made, Element(made.id, number, 7)
    assert _judge(recall, items=there).packet.mark == 7
    assert _judge((Update("delete", "known", key, MARK),), recall, items=there).packet.mark == 99


@pytest.mark.parametrize(("version", "expected"), [(4, "10.9.9.9"), (6, "fd00::9")])
def test_a_translation_of_the_other_family_goes_on(version: int, expected: str) -> None:
    rules = (Nat("dnat", "ip", ip_address("10.9.9.9")),), (Nat("dnat", "ip6", ip_address("fd00::9")),)
    assert str(_judge(*rules, version=version).packet.target) == expected
