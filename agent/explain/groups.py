"""A matrix as a person can read it: what is alike of one workload is one row, or one column. Pure.

    shop/web-7d9f-abcde   yes  no            shop/web (2)   yes  no
    shop/web-7d9f-fghij   yes  no     -->    shop/db        no   yes
    shop/db-0             no   yes

A cell is a word: yes, no, part (some endpoints of a Service), v4 or v6 (only over this family), "." (a Pod
and itself), "-" (no address of a common family); with "!" behind it where something else was seen. Between
groups whose pairs are not all alike it is "some".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agent.cluster.model import Pod
from agent.explain.ends import workload_of
from agent.explain.matrix import Cell, Column, Matrix
from agent.explain.seen import Observed, attempt, differs
from agent.explain.world import Address, title

YES, NO, PART, SOME, SELF, NONE = "yes", "no", "part", "some", ".", "-"
OTHERWISE = "!"


class Group(NamedTuple):
    """Rows or columns that are shown as one, by their numbers."""

    label: str
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grouped:
    """The cells between groups of rows and groups of columns; a column's `ports` is such as "TCP 80,8080"."""

    rows: tuple[Group, ...]
    columns: tuple[Group, ...]
    ports: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def word(source: Pod, column: Column, cell: Cell, observed: Observed | None = None) -> str:
    """A pair in a word."""
    if not cell:
        return SELF if source is column.target else NONE
    seen = observed or {}
    wrong = any(differs(column, way, seen.get(attempt(source, column, way))) for way in cell)
    return _decided(cell) + (OTHERWISE if wrong else "")


def _decided(cell: Cell) -> str:
    allowed = [way for way in cell if way.allowed]
    if not allowed:
        return NO
    if len(allowed) < len(cell):
        return f"v{allowed[0].source.version}"
    return PART if any(way.cause == "policy-part" for way in cell) else YES


def grouped(
    matrix: Matrix, observed: Observed | None = None, *, every: bool = False, ports_apart: bool = False
) -> Grouped:
    """The matrix with its rows and columns grouped.

    `every`: each by itself. `ports_apart`: of columns only those of one port may be one.
    """
    words = tuple(
        tuple(word(source, *each, observed) for each in zip(matrix.columns, row, strict=True))
        for source, row in zip(matrix.sources, matrix.rows, strict=True)
    )
    turned = tuple(zip(*words, strict=True)) or ((),) * len(matrix.columns)
    kinds = [(each if every else (), *workload_of(pod)) for each, pod in enumerate(matrix.sources)]
    heads = [(each if every else (), *_kind(column)) for each, column in enumerate(matrix.columns)]
    rows, columns = _groups(kinds, words), _groups(heads, turned)
    if not every and not ports_apart:
        columns = _over_ports(matrix.columns, columns, turned)
    spaces = {pod.namespace for pod in (*matrix.sources, *_pods(matrix.columns))}
    namer = _Namer(with_namespace=len(spaces) > 1)
    return Grouped(
        tuple(Group(namer.pods([matrix.sources[i] for i in of], matrix.sources), of) for of in rows),
        tuple(Group(namer.columns([matrix.columns[i] for i in of], matrix.columns), of) for of in columns),
        tuple(_ports([matrix.columns[i] for i in of]) for of in columns),
        tuple(tuple(_together(words, row, column) for column in columns) for row in rows),
    )


def _over_ports(
    columns: Sequence[Column], groups: Sequence[tuple[int, ...]], lines: Sequence[Sequence[str]]
) -> list[tuple[int, ...]]:
    """Groups of the same targets at several ports are one, when they are alike."""
    targets = [(frozenset(title(columns[i].target) for i in of)) for of in groups]
    merged = _groups(targets, [lines[of[0]] for of in groups])
    return [tuple(member for group in of for member in groups[group]) for of in merged]


def _ports(columns: Iterable[Column]) -> str:
    """Such as "TCP 53,9153 UDP 53"."""
    numbers: dict[str, dict[int, None]] = defaultdict(dict)
    for each in columns:
        numbers[each.protocol][each.port] = None
    return " ".join(f"{protocol} {','.join(map(str, of))}" for protocol, of in numbers.items())


def _kind(column: Column) -> tuple[Hashable, ...]:
    """Columns of one kind may be shown as one, when they are alike."""
    target = column.target
    what = tuple(workload_of(target)) if isinstance(target, Pod) else (title(target),)
    return (*what, column.protocol, column.port)


def _groups(kinds: Sequence[Hashable], lines: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """The numbers of lines that are of one kind and alike, in order of the first of each."""
    found: dict[Hashable, list[list[int]]] = defaultdict(list)
    for number, kind in enumerate(kinds):
        for group in found[kind]:
            if _alike(lines[group[0]], lines[number]):
                group.append(number)
                break
        else:
            found[kind].append([number])
    return sorted(tuple(group) for groups in found.values() for group in groups)


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """What a Pod is to itself is like anything."""
    return one == other or all(a == b or SELF in (a, b) for a, b in zip(one, other, strict=True))


def _together(words: Sequence[Sequence[str]], rows: Iterable[int], columns: Iterable[int]) -> str:
    several = tuple(columns)
    found = {words[row][column] for row in rows for column in several} - {SELF}
    if len(found) > 1:
        return SOME + (OTHERWISE if any(each.endswith(OTHERWISE) for each in found) else "")
    return next(iter(found), SELF)


def _pods(columns: Iterable[Column]) -> Iterable[Pod]:
    return (each.target for each in columns if isinstance(each.target, Pod))


@dataclass(frozen=True, slots=True)
class _Namer:
    """What groups are called; with one namespace alone it needs no mention."""

    with_namespace: bool

    def pods(self, members: Sequence[Pod], everybody: Iterable[Pod]) -> str:
        """Such as web-0, web (3), web (2 of 3)."""
        made = workload_of(members[0])
        of_it = {pod.key for pod in everybody if workload_of(pod) == made}
        count = len({pod.key for pod in members})
        if (count == 1 and len(of_it) > 1) or made.kind == "Pod":
            return self._full(members[0].namespace, members[0].name)
        part = (
            "" if len(of_it) == 1 else f" ({count})" if count == len(of_it) else f" ({count} of {len(of_it)})"
        )
        return self._full(made.namespace, made.name) + part

    def columns(self, members: Sequence[Column], everybody: Iterable[Column]) -> str:
        """As the target is called, with its kind where it is no Pod."""
        target = members[0].target
        if isinstance(target, Pod):
            return self.pods(list(_pods(members)), _pods(everybody))
        return str(target.ip) if isinstance(target, Address) else title(target)

    def _full(self, namespace: str, name: str) -> str:
        return f"{namespace}/{name}" if self.with_namespace else name
