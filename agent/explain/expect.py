"""Expectations of who reaches whom, as a file says them, held against the policies and what was seen. Pure.

    - from: shop/web                                     names, as `agent.explain.ends` reads them
      to: shop/api:8080
      allowed: true
    - from: {namespace: shop, selector: "app in (a,b)"}  or labels; namespace "*" is all of them
      to: {namespace: data, selector: app=db, port: 5432}
      protocol: TCP                                      TCP when it is not said
      allowed: false

Allowed means that every pair may connect, over each family that both ends have; not allowed that none may. A
Service of which only some endpoints let a source in is neither.
Without a port it is about all ports that the targets declare. An expectation about nobody does not hold: a
name that was misspelt shall not pass for a policy that works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import yaml

from agent.cluster.model import PROTOCOLS, Node, Pod, Protocol
from agent.explain.ends import ALL, columns_named, pods_named, takes_part, workload_of
from agent.explain.groups import NO, NONE, SELF, YES, Grouped
from agent.explain.labels import SelectorError, selector
from agent.explain.matrix import Column, Matrix, Way, columns_of, matrix
from agent.explain.seen import Observed, arrived, attempt
from agent.explain.world import Address, UnknownNameError, World, title
from agent.log import printable

_FIELDS = frozenset({"from", "to", "protocol", "allowed"})
_END_FIELDS = frozenset({"namespace", "selector", "port"})


class ExpectationError(ValueError):
    """A file does not say what is expected; the message says where and why."""


class Labelled(NamedTuple):
    """Pods by their labels; of a target the port as well."""

    namespace: str
    labels: str
    port: int | str | None = None

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        space = f"{self.namespace}/" if self.namespace else ""
        return f"{space}[{self.labels or 'all Pods'}]{port}"


Ends: TypeAlias = str | Labelled


@dataclass(frozen=True, slots=True)
class Expectation:
    """One of a file, and the line where it begins."""

    line: int
    source: Ends
    target: Ends
    allowed: bool
    protocol: Protocol | None = None

    def __str__(self) -> str:
        what = f" over {self.protocol}" if self.protocol else ""
        return f"{self.source} to {self.target}{what}"


@dataclass(frozen=True, slots=True)
class Checked:
    """An expectation and the pairs that it is about; `problem` says why there are none."""

    expectation: Expectation
    pairs: Matrix
    problem: str = ""

    def broken(self, observed: Observed) -> tuple[tuple[Pod, Column, Way], ...]:
        """The ways that are not as expected: decided otherwise, or seen to be otherwise."""
        return tuple(
            (source, column, way)
            for source, column, cell in self.pairs.cells()
            for way in cell
            if self._is_broken(column, way, observed.get(attempt(source, column, way)))
        )

    def _is_broken(self, column: Column, way: Way, seen: Any) -> bool:
        if way.cause == "policy-part":  # sometimes is neither
            return True
        wanted = self.expectation.allowed
        came = arrived(column, seen) if seen is not None else None
        return way.allowed != wanted or came is (not wanted)


# Reading


def expectations(text: str) -> tuple[Expectation, ...]:
    """What a file expects. Raises ExpectationError."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.SequenceNode):
            raise ExpectationError("it is no list: each expectation begins with `- from:`")
        said = [(item.start_mark.line + 1, loader.construct_object(item, deep=True)) for item in node.value]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ExpectationError(str(error)) from error
    if not said:
        raise ExpectationError("it expects nothing")
    return tuple(_expectation(line, each) for line, each in said)


def _expectation(line: int, said: Any) -> Expectation:
    try:
        if not isinstance(said, dict) or not {"from", "to", "allowed"} <= said.keys() <= _FIELDS:
            raise ExpectationError("it has from, to, allowed and perhaps protocol, and nothing else")
        if not isinstance(said["allowed"], bool):
            raise ExpectationError(f"allowed is true or false, not {said['allowed']!r}")
        source = _ends(said["from"], "from")
        if isinstance(source, Labelled) and source.port is not None:
            raise ExpectationError("from has no port")
        return Expectation(line, source, _ends(said["to"], "to"), said["allowed"], _protocol(said))
    except ExpectationError as error:
        raise ExpectationError(f"line {line}: {error}") from error


def _ends(said: Any, field: str) -> Ends:
    if isinstance(said, str) and said:
        return said
    if not isinstance(said, dict) or not said or not said.keys() <= _END_FIELDS:
        raise ExpectationError(f"{field} is a name, or has namespace, selector and port")
    port = said.get("port")
    if port is not None and not _is_port(port):
        raise ExpectationError(f"{field}.port is a number from 1 to 65535 or a name, not {port!r}")
    labels = str(said.get("selector", ""))
    try:
        selector(labels)
    except SelectorError as error:
        raise ExpectationError(f"{field}.selector: {error}") from error
    return Labelled(str(said.get("namespace", "")), labels, port)


def _is_port(port: Any) -> bool:
    return isinstance(port, str) or (type(port) is int and 1 <= port <= 65535)


def _protocol(said: Mapping[str, Any]) -> Protocol | None:
    protocol = said.get("protocol")
    if protocol is None:
        return None
    for known in PROTOCOLS:
        if str(protocol).upper() == known:
            return known
    raise ExpectationError(f"protocol is {', '.join(PROTOCOLS)}, not {protocol!r}")


# Checking


def checked(world: World, expectation: Expectation, namespace: str) -> Checked:
    """What the policies say of each pair of an expectation; names that say no namespace are of this one."""
    nothing = Matrix((), (), ())
    try:
        sources = _sources(world, expectation.source, namespace)
        columns = _columns(world, expectation, namespace)
    except UnknownNameError as error:
        return Checked(expectation, nothing, str(error))
    pairs = matrix(world, sources, columns)
    if not any(cell for _, _, cell in pairs.cells()):
        return Checked(expectation, nothing, "they are one Pod, or have no address of a common family")
    return Checked(expectation, pairs)


def _sources(world: World, ends: Ends, namespace: str) -> tuple[Pod, ...]:
    return pods_named(world, ends, namespace) if isinstance(ends, str) else _labelled(world, ends, namespace)


def _columns(world: World, expectation: Expectation, namespace: str) -> tuple[Column, ...]:
    target, protocol = expectation.target, expectation.protocol
    if isinstance(target, str):
        return columns_named(world, target, namespace, protocol=protocol)
    columns = columns_of(_labelled(world, target, namespace), port=target.port, protocol=protocol)
    if not columns:
        raise UnknownNameError(f"none of {target} has or declares such a port")
    return columns


def _labelled(world: World, ends: Labelled, namespace: str) -> tuple[Pod, ...]:
    space = ends.namespace or namespace
    wanted = selector(ends.labels)
    there = world.snapshot.pods if space == ALL else world.snapshot.pods_in(space)
    found = tuple(pod for _, pod in sorted(there.items()) if takes_part(pod) and wanted.matches(pod.labels))
    if not found:
        where = "any namespace" if space == ALL else f"namespace {space}"
        raise UnknownNameError(f"no Pod of {where} has {ends.labels or 'an address'}")
    return found


# Writing


def written(world: World, of: Matrix, shown: Grouped) -> str:
    """A file that expects what the matrix says; what a file cannot say stands in it as a comment.

    `shown` has its ports apart.
    """
    said = "".join(_entries(world, of, shown))
    return f"# Who reaches whom; check it with: podwall matrix --expect FILE\n{said}"


def _entries(world: World, of: Matrix, shown: Grouped) -> Iterator[str]:
    targets = [_targets(world, [of.columns[i] for i in group.members]) for group in shown.columns]
    for row, words in zip(shown.rows, shown.cells, strict=True):
        sources = _names(world, [of.sources[i] for i in row.members])
        for column, names, word in zip(shown.columns, targets, words, strict=True):
            if word in (SELF, NONE):
                continue
            if word not in (YES, NO) or not sources or not names:
                yield f"# {printable(row.label)} to {printable(column.label)}: {word}; no entry says that\n"
                continue
            protocol = of.columns[column.members[0]].protocol
            for source, target in product(sources, names):
                yield _entry(source, target, protocol, word == YES)


def _entry(source: str, target: str, protocol: Protocol, allowed: bool) -> str:
    said: dict[str, Any] = {"from": source, "to": target}
    if protocol != "TCP":
        said["protocol"] = protocol
    return str(yaml.safe_dump([{**said, "allowed": allowed}], sort_keys=False, allow_unicode=False))


def _names(world: World, pods: Iterable[Pod]) -> list[str]:
    """By which these Pods, and no others, are meant; none when no name says that."""
    wanted = {pod.key: pod for pod in pods}
    workload = workload_of(next(iter(wanted.values())))
    together = f"{workload.namespace}/{workload.name}"
    if _means(world, together) == set(wanted):
        return [together]
    alone = [f"pod/{namespace}/{name}" for namespace, name in wanted]
    return alone if all(_means(world, each) == {key} for each, key in zip(alone, wanted, strict=True)) else []


def _means(world: World, name: str) -> set[tuple[str, str]]:
    try:
        return {pod.key for pod in pods_named(world, name, "")}
    except UnknownNameError:
        return set()


def _targets(world: World, columns: list[Column]) -> list[str]:
    target, port = columns[0].target, columns[0].port
    if isinstance(target, Pod):
        names = _names(world, [each.target for each in columns if isinstance(each.target, Pod)])
    elif isinstance(target, Address):
        names = [f"[{target.ip}]" if target.ip.version == 6 else str(target.ip)]
    elif isinstance(target, Node):
        names = [f"node/{target.name}"]
    else:
        names = [f"svc/{target.namespace}/{target.name}"]
    said = [f"{name}:{port}" for name in names]
    meant = {end for text in said for end in _meant(world, text, columns[0].protocol)}
    return said if meant == {title(each.target) for each in columns} else []


def _meant(world: World, text: str, protocol: Protocol) -> set[str]:
    try:
        return {title(each.target) for each in columns_named(world, text, "", protocol=protocol)}
    except UnknownNameError:
        return set()
