"""Any ruleset to any other: by a pure reading of the commands, and by the kernel."""

import asyncio
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.nft import diff
from agent.nft.kernel import Kernel
from agent.nft.model import (
    ACCEPT,
    DROP,
    Chain,
    ChainName,
    Counter,
    Element,
    Hook,
    Item,
    Match,
    Meta,
    Named,
    Payload,
    Rule,
    Ruleset,
    Set,
    SetName,
    Table,
    TableName,
    Verdict,
    VerdictMap,
)
from agent.nft.normal import comparable

TABLES = (TableName("inet", "podwall"), TableName("inet", "podwall_services"))
SADDR = Payload("ip", "saddr")

# Rulesets in which chains, sets, maps and elements refer to each other in every way that nft allows

KINDS = (
    {"type": ("ipv4_addr",)},
    {"type": ("ipv4_addr",), "flags": frozenset({"interval"})},
    {"type": ("mark",)},
    {"type": ("ipv4_addr",), "data": ("verdict",)},
    {"type": ("ipv4_addr",), "data": ("mark",)},
)
HOOKS = (Hook("filter", "forward", 0), Hook("filter", "forward", 5, "drop"), Hook("filter", "input", 0))
NETWORKS = (
    "10.0.0.0/8",
    "10.0.0.0/9",
    "10.128.0.0/9",
    "10.1.0.0/16",
    "11.0.0.0/8",
    "12.0.0.1/32",
    "0.0.0.0/0",
)
ADDRESSES = tuple(IPv4Address(f"10.0.0.{last}") for last in range(1, 5))


@st.composite
def rulesets(draw: st.DrawFn) -> Ruleset:
    tables = draw(st.lists(st.sampled_from(TABLES), unique=True))
    return Ruleset(item for table in tables for item in _table(draw, table))


def _table(draw: st.DrawFn, table: TableName) -> Iterator[Item]:
    yield Table(*table)
    names = draw(st.lists(st.sampled_from(["c0", "c1", "c2", "c3"]), unique=True).map(sorted))
    hooks = {name: draw(st.one_of(st.none(), st.sampled_from(HOOKS))) for name in names}
    sets = [
        Set(table, name, **draw(st.sampled_from(KINDS)))
        for name in draw(st.lists(st.sampled_from(["s0", "s1", "s2", "c0"]), unique=True))
    ]
    yield from sets
    for name in names:
        targets = [other for other in names if other > name and hooks[other] is None]
        rules = draw(st.lists(_rules(sets, targets), max_size=3).map(tuple))
        yield Chain(table, name, rules, hooks[name])
    for each in sets:
        yield from _elements(draw, each, [name for name in names if hooks[name] is None])


def _rules(sets: list[Set], targets: list[str]) -> st.SearchStrategy[Rule]:
    choices = [
        st.just(Rule((Counter(), DROP))),
        st.sampled_from([1, 2]).map(lambda mark: Rule((Match(Meta("mark"), "==", mark), ACCEPT))),
    ]
    choices += [
        st.just(Rule((Match(SADDR, "==", Named(each.name)), DROP), each.name))
        for each in sets
        if each.type == ("ipv4_addr",) and not each.data
    ]
    choices += [
        st.just(Rule((Match(Meta("mark"), "==", Named(each.name)), DROP)))
        for each in sets
        if each.type == ("mark",)
    ]
    choices += [
        st.just(Rule((VerdictMap(SADDR, Named(each.name)),))) for each in sets if each.data == ("verdict",)
    ]
    choices += [
        st.sampled_from(["jump", "goto"]).map(lambda kind, name=name: Rule((Verdict(kind, name),)))
        for name in targets
    ]
    return st.one_of(choices)


def _elements(draw: st.DrawFn, of: Set, targets: list[str]) -> Iterator[Element]:
    if of.flags:
        kept: list[IPv4Network] = []
        for network in map(IPv4Network, draw(st.lists(st.sampled_from(NETWORKS), unique=True))):
            if not any(network.overlaps(other) for other in kept):
                kept.append(network)
                yield Element(of.id, network, comment=draw(st.sampled_from(["", "x"])))
        return
    keys = (1, 2, 3) if of.type == ("mark",) else ADDRESSES
    data: st.SearchStrategy[Any] = st.none()
    if of.data == ("mark",):
        data = st.sampled_from([1, 2])
    elif of.data == ("verdict",):
        # no way in a circle: a verdict map leads to the last chain only, which jumps nowhere
        last = [name for name in targets if name == "c3"]
        data = st.sampled_from([ACCEPT, DROP, *(Verdict("goto", name) for name in last)])
    for key in draw(st.lists(st.sampled_from(keys), unique=True)):
        yield Element(of.id, key, draw(data), draw(st.sampled_from(["", "x"])))


def _settle(rules: Ruleset) -> Ruleset:
    """c3 must not look into a verdict map, which may lead to it."""
    for name, chain in list(rules.chains.items()):
        if name.name == "c3":
            kept = tuple(rule for rule in chain.rules if not isinstance(rule.statements[0], VerdictMap))
            rules.add(Chain(chain.table, chain.name, kept, chain.hook))
    return rules


settled = rulesets().map(_settle)

# A pure reading of the commands, as strict as the kernel


class Tables:
    """What the commands make of a ruleset; a command that the kernel would refuse fails an assertion."""

    def __init__(self, rules: Ruleset) -> None:
        self.rules = Ruleset(rules.items())

    def do(self, command: diff.Command) -> None:  # noqa: PLR0912 - one branch for each command
        of = command.of
        match command.word:
            case "add table":
                assert of.id not in self.rules.tables
                self.rules.add(of)
            case "delete table":
                self._delete_table(of.id)
            case "add set":
                assert of.table in self.rules.tables
                assert of.id not in self.rules.sets
                self.rules.add(of)
            case "add chain":
                assert of.table in self.rules.tables
                assert of.id not in self.rules.chains
                self.rules.add(Chain(of.table, of.name, (), of.hook))
            case "flush chain":
                here = self.rules.chains[of.id]
                self.rules.add(Chain(here.table, here.name, (), here.hook))
            case "add rule":
                here = self.rules.chains[of.id]
                self.rules.add(Chain(here.table, here.name, here.rules + of.rules, here.hook))
                for name in diff.references(of):
                    assert (
                        ChainName(of.table, name) in self.rules.chains
                        or SetName(of.table, name) in self.rules.sets
                    )
            case "delete set":
                assert of.name not in self._referred_to(of.table, chains=False)
                del self.rules.sets[of.id]
                self.rules.elements.pop(of.id, None)
            case "delete chain":
                assert not self.rules.chains[of.id].rules
                assert of.name not in self._referred_to(of.table, chains=True)
                del self.rules.chains[of.id]
            case "add element":
                self._add_elements(of, command.elements)
            case "delete element":
                for element in command.elements:
                    del self.rules.elements[of.id][element.key]
                if not self.rules.elements[of.id]:
                    del self.rules.elements[of.id]

    def _delete_table(self, table: TableName) -> None:
        del self.rules.tables[table]
        for of in (self.rules.chains, self.rules.sets, self.rules.elements):
            for name in [name for name in of if name.table == table]:
                del of[name]

    def _add_elements(self, of: Set, elements: tuple[Element, ...]) -> None:
        assert of.id in self.rules.sets
        for element in elements:
            assert element.key not in self.rules.elements.get(of.id, {})
            if isinstance(element.data, Verdict) and element.data.chain:
                assert ChainName(of.table, element.data.chain) in self.rules.chains
            self.rules.add(element)

    def _referred_to(self, table: TableName, chains: bool) -> set[str]:
        names = {
            name
            for chain in self.rules.chains.values()
            if chain.table == table
            for name in diff.references(chain)
        }
        if chains:
            names |= {
                element.data.chain
                for name, of in self.rules.elements.items()
                if name.table == table
                for element in of.values()
                if isinstance(element.data, Verdict)
            }
        else:
            names -= {name for chain in self.rules.chains.values() for name in _jumps(chain)} - {
                name for chain in self.rules.chains.values() for name in _looks_into(chain)
            }
        return names


def _jumps(chain: Chain) -> set[str]:
    return {each.chain for rule in chain.rules for each in rule.statements if isinstance(each, Verdict)}


def _looks_into(chain: Chain) -> set[str]:
    return set(diff.references(chain)) - _jumps(chain)


def _compared(rules: Ruleset) -> Ruleset:
    return Ruleset(comparable(item) for item in rules.items())


@settings(max_examples=400, deadline=None)
@given(settled, settled)
def test_any_to_any_other(have: Ruleset, want: Ruleset) -> None:
    tables = Tables(have)
    for command in diff.commands(diff.difference(have, want), want):
        tables.do(command)
    assert _compared(tables.rules) == _compared(want)


@settings(max_examples=100, deadline=None)
@given(settled)
def test_nothing_to_do(rules: Ruleset) -> None:
    changes = diff.difference(rules, Ruleset(rules.items()))
    assert changes == {}
    assert diff.transaction(changes, rules) == ""


def test_any_to_any_other_in_the_kernel(netns: None) -> None:
    with asyncio.Runner() as runner:
        kernel = Kernel()
        runner.run(kernel.start())
        state = Ruleset()

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(settled)
        def goes_on(want: Ruleset) -> None:
            nonlocal state
            runner.run(kernel.commit(diff.transaction(diff.difference(state, want), want)))
            state = want
            there = runner.run(kernel.read(TABLES))
            assert diff.difference(there, want) == {}

        try:
            goes_on()
        finally:
            runner.run(kernel.stop())


# What a change costs

INET = TABLES[0]
PEERS = Set(INET, "peers", ("ipv4_addr",))
DECIDE = Chain(INET, "decide", (Rule((Match(SADDR, "==", Named("peers")), ACCEPT)), Rule((DROP,))))
BASE = (Table(*INET), PEERS, DECIDE)


def _peer(number: int, comment: str = "") -> Element:
    return Element(PEERS.id, IPv4Address(0x0A000000 + number), comment=comment)


def _transaction(have: tuple[Item, ...], want: tuple[Item, ...]) -> str:
    after = Ruleset(want)
    return diff.transaction(diff.difference(Ruleset(have), after), after)


CASES: dict[str, tuple[tuple[Item, ...], tuple[Item, ...], str]] = {
    "one more element": (
        (*BASE, *map(_peer, range(1000))),
        (*BASE, *map(_peer, range(1001))),
        "add element inet podwall peers { 10.0.3.232 }\n",
    ),
    "one element fewer": (
        (*BASE, _peer(1), _peer(2)),
        (*BASE, _peer(2)),
        "delete element inet podwall peers { 10.0.0.1 }\n",
    ),
    "another comment": (
        (*BASE, _peer(1)),
        (*BASE, _peer(1, "default/web")),
        "delete element inet podwall peers { 10.0.0.1 }\n"
        'add element inet podwall peers { 10.0.0.1 comment "default/web" }\n',
    ),
    "another rule": (
        BASE,
        (Table(*INET), PEERS, Chain(INET, "decide", DECIDE.rules[:1])),
        "flush chain inet podwall decide\nadd rule inet podwall decide ip saddr @peers accept\n",
    ),
    "a table goes with all that is in it": ((*BASE, _peer(1)), (), "delete table inet podwall\n"),
    "a set of another type takes its users along": (
        (*BASE, _peer(1)),
        (Table(*INET), Set(INET, "peers", ("ipv4_addr",), flags=frozenset({"interval"})), DECIDE, _peer(1)),
        "flush chain inet podwall decide\n"
        "delete set inet podwall peers\n"
        "add set inet podwall peers { type ipv4_addr; flags interval; }\n"
        "add element inet podwall peers { 10.0.0.1 }\n"
        "add rule inet podwall decide ip saddr @peers accept\n"
        "add rule inet podwall decide drop\n",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_differences(case: str) -> None:
    have, want, text = CASES[case]
    assert _transaction(have, want) == text


def test_ten_thousand_elements_are_one_transaction(with_kernel: Callable[..., Any]) -> None:
    wanted = Ruleset((*BASE, *map(_peer, range(10_000))))

    async def body(kernel: Kernel) -> None:
        await kernel.commit(diff.transaction(diff.difference(Ruleset(), wanted), wanted))
        assert diff.difference(await kernel.read([INET]), wanted) == {}
        changes = diff.difference(wanted, Ruleset(BASE))
        await kernel.commit(diff.transaction(changes, Ruleset(BASE)))
        assert diff.difference(await kernel.read([INET]), Ruleset(BASE)) == {}

    with_kernel(body)
