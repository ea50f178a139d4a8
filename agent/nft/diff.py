"""From what is to what should be: one transaction that holds only the differences.

nft commits all of a text or nothing, and a packet sees the rules before or after it, never between. What
matters is the order inside, because a chain or set can only go when nothing refers to it any more:

    add table            new ones
    flush chain          those whose rules change or that go: frees what their rules refer to
    delete element       those that go or change: frees the chains that a verdict map refers to
    delete set, chain    those that go or must be made anew (another type, another hook)
    add chain, set       empty
    add element
    add rule             all rules of each changed chain, in order
    delete table

A set or chain that is made anew takes along the chains and elements that refer to it: they are filled again.
Elements change singly, so the cost is the size of the change.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from agent.nft import render
from agent.nft.model import (
    Assign,
    Bits,
    Chain,
    ChainName,
    Element,
    Item,
    ItemId,
    Key,
    Lookup,
    Match,
    Named,
    Nat,
    Ruleset,
    Set,
    SetName,
    Statement,
    Table,
    Update,
    Verdict,
    VerdictMap,
)
from agent.nft.normal import comparable

ELEMENTS_PER_COMMAND = 500


class Change(NamedTuple):
    """An item before and after; None where there is none."""

    before: Item | None
    after: Item | None


Changes: TypeAlias = Mapping[ItemId, Change]


def difference(have: Ruleset, want: Ruleset) -> dict[ItemId, Change]:
    """Every item in which two rulesets differ; what packets put into dynamic sets is left out."""
    changes: dict[ItemId, Change] = {}
    _differ(changes, have.tables, want.tables)
    _differ(changes, have.chains, want.chains)
    _differ(changes, have.sets, want.sets)
    for name in have.elements.keys() | want.elements.keys():
        kept = want.sets.get(name)
        if kept is None or not kept.dynamic:
            _differ_in_elements(changes, have.elements.get(name, {}), want.elements.get(name, {}))
    return changes


Id = TypeVar("Id", bound=ItemId)


def _differ(changes: dict[ItemId, Change], have: Mapping[Id, Item], want: Mapping[Id, Item]) -> None:
    for name in have.keys() | want.keys():
        before, after = have.get(name), want.get(name)
        if before is None or after is None or comparable(before) != comparable(after):
            changes[name] = Change(before, after)


def _differ_in_elements(
    changes: dict[ItemId, Change], have: Mapping[Key, Element], want: Mapping[Key, Element]
) -> None:
    for key, before in have.items():
        after = want.get(key)
        if after != before:
            changes[before.id] = Change(before, after)
    for key, after in want.items():
        if key not in have:
            changes[after.id] = Change(None, after)


class Command(NamedTuple):
    """One command of a transaction; `add rule` stands for all rules of a chain, in order."""

    word: Literal[
        "add table",
        "flush chain",
        "delete element",
        "delete set",
        "delete chain",
        "add chain",
        "add set",
        "add element",
        "add rule",
        "delete table",
    ]
    of: Table | Chain | Set
    elements: tuple[Element, ...] = ()


def transaction(changes: Changes, want: Ruleset) -> str:
    """The text that brings the changes about, "" when there are none; `want` is the ruleset after them."""
    return "".join(f"{line}\n" for command in commands(changes, want) for line in _lines(command))


def commands(changes: Changes, want: Ruleset) -> list[Command]:
    """What `transaction` says, as values."""
    return list(_commands(_Sorted(changes, want)))


class _Sorted:
    """The changes by what has to be done for them."""

    def __init__(self, changes: Changes, want: Ruleset) -> None:
        self.want = want
        self.new_tables: list[Table] = []
        self.old_tables: list[Table] = []
        self.flushed: dict[ChainName, Chain] = {}
        self.filled: dict[ChainName, Chain] = {}
        self.old_chains: list[Chain] = []
        self.new_chains: list[Chain] = []
        self.old_sets: dict[SetName, Set] = {}
        self.new_sets: dict[SetName, Set] = {}
        self.old_elements: dict[SetName, list[Element]] = {}
        self.new_elements: dict[SetName, list[Element]] = {}
        for change in changes.values():
            self._sort(change)
        self._remake()
        self._leave_out_old_tables()

    def _sort(self, change: Change) -> None:
        before, after = change
        if isinstance(before, Element) or isinstance(after, Element):
            self._element(before, after)  # type: ignore[arg-type]  # one name, one kind of item
        elif isinstance(before, Chain) or isinstance(after, Chain):
            self._chain(before, after)  # type: ignore[arg-type]
        elif isinstance(before, Set) or isinstance(after, Set):
            self._set(before, after)  # type: ignore[arg-type]
        elif before is None and isinstance(after, Table):
            self.new_tables.append(after)
        elif isinstance(before, Table) and after is None:
            self.old_tables.append(before)

    def _element(self, before: Element | None, after: Element | None) -> None:
        if before is not None:
            self.old_elements.setdefault(before.set, []).append(before)
        if after is not None:
            self.new_elements.setdefault(after.set, []).append(after)

    def _chain(self, before: Chain | None, after: Chain | None) -> None:
        remade = before is not None and after is not None and before.hook != after.hook
        if before is not None:
            self.flushed[before.id] = before
            if after is None or remade:
                self.old_chains.append(before)
        if after is not None:
            self.filled[after.id] = after
            if before is None or remade:
                self.new_chains.append(after)

    def _set(self, before: Set | None, after: Set | None) -> None:
        if before is not None:
            self.old_sets[before.id] = before
        if after is not None:
            self.new_sets[after.id] = after

    def _remake(self) -> None:
        """What refers to a set or chain that is made anew is taken down and put up again with it."""
        sets = self.old_sets.keys() & self.new_sets.keys()
        chains = {chain.id for chain in self.old_chains} & {chain.id for chain in self.new_chains}
        if not sets and not chains:
            return
        names = {(name[0], name[1]) for name in (*sets, *chains)}
        for chain in self.want.chains.values():
            if chain.id not in self.filled and any(
                (chain.table, name) in names for name in references(chain)
            ):
                self.flushed[chain.id] = self.filled[chain.id] = chain
        for name in sets:
            self.new_elements[name] = list(self.want.elements.get(name, {}).values())
        for name, elements in self.want.elements.items():
            if name not in self.new_sets:
                self._refer_again(name, [each for each in elements.values() if _target(each) in chains])

    def _refer_again(self, name: SetName, elements: list[Element]) -> None:
        moving = {each.key for each in self.new_elements.get(name, ())}
        for each in elements:
            if each.key not in moving:
                self._element(each, each)

    def _leave_out_old_tables(self) -> None:
        """With a table goes all that is in it."""
        gone = {table.id for table in self.old_tables}
        if not gone:
            return
        self.flushed = {name: chain for name, chain in self.flushed.items() if name.table not in gone}
        self.old_chains = [chain for chain in self.old_chains if chain.table not in gone]
        self.old_sets = {name: each for name, each in self.old_sets.items() if name.table not in gone}
        self.old_elements = {name: each for name, each in self.old_elements.items() if name.table not in gone}


def _commands(todo: _Sorted) -> Iterator[Command]:
    yield from (Command("add table", each) for each in todo.new_tables)
    yield from (Command("flush chain", each) for each in todo.flushed.values())
    for name, elements in todo.old_elements.items():
        if name not in todo.old_sets:
            yield Command("delete element", todo.want.sets[name], tuple(elements))
    yield from (Command("delete set", each) for each in todo.old_sets.values())
    yield from (Command("delete chain", each) for each in todo.old_chains)
    yield from (Command("add chain", each) for each in todo.new_chains)
    yield from (Command("add set", each) for each in todo.new_sets.values())
    for name, elements in todo.new_elements.items():
        yield Command("add element", todo.want.sets[name], tuple(elements))
    yield from (Command("add rule", each) for each in todo.filled.values())
    yield from (Command("delete table", each) for each in todo.old_tables)


def _lines(command: Command) -> Iterator[str]:
    match command:
        case ("add table", Table() as table, _):
            yield render.add_table(table)
        case ("add chain", Chain() as chain, _):
            yield render.add_chain(chain)
        case ("add set", Set() as made, _):
            yield render.add_set(made)
        case ("add rule", Chain() as chain, _):
            yield from render.add_rules(chain)
        case ("add element", Set() as made, elements):
            yield from (render.add_elements(made, batch) for batch in _batches(elements))
        case ("delete element", Set() as made, elements):
            yield from (render.delete_elements(made, batch) for batch in _batches(elements))
        case ("delete set", Set() as made, _):
            yield f"delete {render.set_or_map(made)} {render.path(made.id)}"
        case ("flush chain" | "delete chain" as word, Chain() as chain, _):
            yield f"{word} {render.path(chain.id)}"
        case ("delete table", Table() as table, _):
            yield f"delete table {render.table_name(table.id)}"


def _batches(elements: tuple[Element, ...]) -> Iterator[tuple[Element, ...]]:
    for start in range(0, len(elements), ELEMENTS_PER_COMMAND):
        yield elements[start : start + ELEMENTS_PER_COMMAND]


# What refers to what


def references(chain: Chain) -> Iterator[str]:
    """The sets, maps and chains of its table that a chain's rules name."""
    for rule in chain.rules:
        for statement in rule.statements:
            yield from _named(statement)


def _named(of: "Statement | object") -> Iterator[str]:
    match of:
        case Named(name):
            yield name
        case Match(left=inner, right=other) | Lookup(key=inner, data=other):
            yield from _named(inner)
            yield from _named(other)
        case Assign(value=inner) | Bits(left=inner):
            yield from _named(inner)
        case VerdictMap(key=inner, data=Named(name)):
            yield name
            yield from _named(inner)
        case VerdictMap(data=frozenset() as entries):
            yield from (verdict.chain for _, verdict in entries if verdict.chain)
        case Nat(address=inner, port=other):
            yield from _named(inner)
            yield from _named(other)
        case Update(set=name):
            yield name
        case Verdict(chain=name) if name:
            yield name


def _target(of: Element) -> ChainName | None:
    return ChainName(of.set.table, of.data.chain) if isinstance(of.data, Verdict) and of.data.chain else None
