"""Text for nft: what it looks like, and what never gets into it."""

from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

import pytest

from agent.nft import diff, render
from agent.nft.model import (
    ACCEPT,
    DROP,
    Assign,
    Chain,
    Concat,
    Counter,
    Ct,
    Element,
    Fib,
    Hook,
    Item,
    Log,
    Match,
    Meta,
    Named,
    Nat,
    Payload,
    Range,
    Reject,
    Rule,
    Ruleset,
    Set,
    Statement,
    Table,
    TableName,
    Unparsed,
    Update,
    Verdict,
    Wildcard,
)

TABLE = TableName("inet", "podwall")
POISON = (
    '"; flush ruleset; add rule inet podwall x comment "',
    "x; flush ruleset",
    "x\nflush ruleset",
    "x }",
    "$(reboot)",
    "a b",
    "x\0y",
    "\u201cx\u201d",
    "",
)
QUOTED_POISON = ('"', 'a"; flush ruleset; "', "\\", "a\nb", "a\rb", "a\x00b", "a\x1bb", "\u00e9", "x" * 128)

RULE = Set(TABLE, "s", ("ipv4_addr",))


def _rule(*statements: Statement) -> str:
    return render.rule(Rule(statements))


NAMES: dict[str, Callable[[str], object]] = {
    "table": lambda text: render.add_table(Table("inet", text)),
    "family": lambda text: render.add_table(Table(text, "podwall")),  # type: ignore[arg-type]
    "chain": lambda text: render.add_chain(Chain(TABLE, text)),
    "set": lambda text: render.add_set(Set(TABLE, text, ("mark",))),
    "type of a set": lambda text: render.add_set(Set(TABLE, "s", (text,))),
    "flag of a set": lambda text: render.add_set(Set(TABLE, "s", ("mark",), flags=frozenset({text}))),
    "set of a rule": lambda text: _rule(Match(Meta("mark"), "==", Named(text))),
    "set that is updated": lambda text: _rule(Update("update", text, Meta("mark"))),
    "jump": lambda text: _rule(Verdict("jump", text)),
    "verdict": lambda text: _rule(Verdict(text)),  # type: ignore[arg-type]
    "meta key": lambda text: _rule(Match(Meta(text), "==", 1)),
    "connection key": lambda text: _rule(Assign(Ct(text), 1)),
    "header": lambda text: _rule(Match(Payload(text, "saddr"), "==", 1)),
    "field": lambda text: _rule(Match(Payload("ip", text), "==", 1)),
    "fib": lambda text: _rule(Match(Fib((text,), "type"), "==", 1)),
    "reject code": lambda text: _rule(Reject("icmpx", text)),
    "nat flag": lambda text: _rule(Nat("masquerade", flags=frozenset({text}))),
    "hook": lambda text: render.add_chain(Chain(TABLE, "c", (), Hook("filter", text, 0))),  # type: ignore[arg-type]
}
QUOTED: dict[str, Callable[[str], object]] = {
    "comment of a rule": lambda text: render.rule(Rule((ACCEPT,), text)),
    "comment of a set": lambda text: render.add_set(Set(TABLE, "s", ("mark",), comment=text)),
    "comment of an element": lambda text: render.element(
        Element(RULE.id, ip_address("1.2.3.4"), comment=text), RULE
    ),
    "log prefix": lambda text: _rule(Log(text)),
    "interface": lambda text: _rule(Match(Meta("iifname"), "==", text)),
    "interface in a set": lambda text: _rule(Match(Meta("iifname"), "==", frozenset({"eth0", text}))),
    "wildcard": lambda text: _rule(Match(Meta("iifname"), "==", Wildcard(text))),
    "device": lambda text: render.add_chain(Chain(TABLE, "c", (), Hook("filter", "ingress", 0, device=text))),
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("place", NAMES)
def test_a_name_that_is_none_is_refused(place: str, poison: str) -> None:
    if place == "field" and poison == "a b":
        pytest.skip("two plain words do no harm, and arp has fields of two words")
    with pytest.raises(ValueError, match=r".+"):
        NAMES[place](poison)


@pytest.mark.parametrize("poison", QUOTED_POISON)
@pytest.mark.parametrize("place", QUOTED)
def test_what_quotes_cannot_hold_is_refused(place: str, poison: str) -> None:
    with pytest.raises(ValueError, match=r"quotes|interface"):
        QUOTED[place](poison)


@pytest.mark.parametrize(
    "value",
    ["localhost", "example.com", "1.2.3.4", "10.0.0.041", "fe80::1%eth0", "@other", "podwall0*", ""],
)
def test_an_address_is_an_address_object(value: str) -> None:
    """libnftables would ask DNS about any other text."""
    element = Element(RULE.id, value)
    with pytest.raises(ValueError, match=r".+"):
        render.element(element, RULE)
    with pytest.raises(ValueError, match=r".+"):
        _rule(Match(Payload("ip", "saddr"), "==", value))


WRONG: dict[str, Callable[[], object]] = {
    "other family": lambda: _rule(Match(Payload("ip", "saddr"), "==", ip_address("fd00::1"))),
    "other family in a set": lambda: render.element(Element(RULE.id, ip_address("fd00::1")), RULE),
    "scope": lambda: _rule(Match(Payload("ip6", "saddr"), "==", IPv6Address("fe80::1%eth0"))),
    "negative number": lambda: _rule(Match(Payload("th", "dport"), "==", -1)),
    "too few parts": lambda: _rule(Match(Concat((Meta("iifname"), Payload("ip", "saddr"))), "==", "eth0")),
    "too many parts": lambda: render.element(Element(RULE.id, (ip_address("1.2.3.4"), 80)), RULE),
    "port as an address": lambda: render.element(Element(RULE.id, 80), RULE),
    "range of two families": lambda: _rule(
        Match(Payload("ip", "saddr"), "==", Range(ip_address("1.2.3.4"), ip_address("fd00::1")))
    ),
    "not understood": lambda: _rule(Unparsed('{"xt": null}')),
    "a word of nft": lambda: render.add_chain(Chain(TABLE, "masquerade")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        WRONG[case]()


def test_a_transaction_with_one_bad_item_is_not_rendered_at_all() -> None:
    items: tuple[Item, ...] = (
        Table(*TABLE),
        Chain(TABLE, "good", (Rule((Counter(), DROP)),)),
        Chain(TABLE, "bad", (Rule((DROP,), 'a"b'),)),
    )
    wanted = Ruleset(items)
    with pytest.raises(ValueError, match='a"b'):
        diff.transaction(diff.difference(Ruleset(), wanted), wanted)
