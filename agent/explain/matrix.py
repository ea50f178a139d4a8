"""Who reaches whom, and on which port: every pair of many Pods and targets at once. Pure.

              columns: a target's port each
            +--------------------------------- egress: which columns a source's policies let it out to
    sources |  Way per family                  ingress: which sources a column's policies let in
            +---------------------------------

Asked pair by pair each rule would be looked at once for each pair. Here each rule is looked at once for each
end: which columns it lets out to and which sources it lets in are integers with a bit for each, and an end's
rules are joined. Whether a rule fits is decided by `agent.explain.policy`, as for one connection alone.
What is no Pod, such as a Service, is asked of `agent.explain.way`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from agent.cluster.model import Direction, Family, IPAddress, NetworkPolicy, Pod, PolicyRule, Protocol
from agent.compile.peers import named_ports
from agent.compile.policy import rules_of
from agent.explain.policy import Packet, any_peer_fits, any_port_fits, exempt, isolated_by
from agent.explain.question import CannotAnswerError, Question
from agent.explain.way import why
from agent.explain.world import Address, End, World, addresses_of

FAMILIES: tuple[Family, ...] = (4, 6)
ALLOWED = "allowed"


class Way(NamedTuple):
    """One pair over one family; `cause` is the word that `why` has for what decides."""

    source: IPAddress
    destination: IPAddress
    cause: str
    allowed: bool


Cell: TypeAlias = tuple[Way, ...]
"""The ways of one pair, IPv4 before IPv6; none from a Pod to itself, and without a common family."""


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One port of one target."""

    target: End
    protocol: Protocol
    port: int

    def question(self, source: Pod, family: Family) -> Question:
        """The same pair as `why` is asked about it."""
        target = self.target
        return Question(
            source=source,
            target=target,
            port=self.port,
            protocol=self.protocol,
            family=family,
            address=target.ip if isinstance(target, Address) else None,
        )


@dataclass(frozen=True, slots=True)
class Matrix:
    """Each source's cells, one for each column."""

    sources: tuple[Pod, ...]
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def cells(self) -> Iterator[tuple[Pod, Column, Cell]]:
        """Every pair that has a way."""
        for source, row in zip(self.sources, self.rows, strict=True):
            for column, cell in zip(self.columns, row, strict=True):
                if cell:
                    yield source, column, cell


def matrix(world: World, sources: Iterable[Pod], columns: Iterable[Column]) -> Matrix:
    """Decide every pair of these."""
    rows, heads = tuple(sources), tuple(columns)
    by_family = [_Reach(world, family, rows, heads) for family in FAMILIES]
    cells = tuple(
        tuple(
            tuple(way for reach in by_family if (way := reach.way(i, j)) is not None)
            if isinstance(column.target, Pod)
            else tuple(_asked(world, source, column))
            for j, column in enumerate(heads)
        )
        for i, source in enumerate(rows)
    )
    return Matrix(rows, heads, cells)


def sentence(world: World, source: Pod, column: Column, way: Way) -> str:
    """What `why` says of a way."""
    return why(world, column.question(source, 4 if way.source.version == 4 else 6)).sentence


def met(end: End, family: Family) -> IPAddress | None:
    """An end's address of a family."""
    return next((each for each in addresses_of(end) if each.version == family), None)


def _asked(world: World, source: Pod, column: Column) -> Iterator[Way]:
    for family in FAMILIES:
        mine, theirs = met(source, family), met(column.target, family)
        if mine is None or theirs is None:
            continue
        try:
            answer = why(world, column.question(source, family))
        except CannotAnswerError:
            continue
        yield Way(mine, theirs, answer.cause, answer.allowed)


class _End(NamedTuple):
    """Whom policies see at an address: the Pod whose own it is, or nobody."""

    address: IPAddress
    pod: Pod | None


class _Reach:
    """All pairs of Pods over one family."""

    def __init__(
        self, world: World, family: Family, sources: Sequence[Pod], columns: Sequence[Column]
    ) -> None:
        self._world = world
        self._isolated: dict[tuple[Direction, tuple[str, str]], tuple[NetworkPolicy, ...]] = {}
        self._to: dict[tuple[str, PolicyRule], int] = {}
        self._from: dict[tuple[str, PolicyRule], int] = {}
        self._pods = sources, tuple(each.target for each in columns)
        self._sources = [self._end(each, family) for each in sources]
        self._targets = [
            self._end(each.target, family) if isinstance(each.target, Pod) else None for each in columns
        ]
        self._packets = [
            Packet(end.address, end.address, each.protocol, each.port) if end else None
            for end, each in zip(self._targets, columns, strict=True)
        ]
        self._out = [self._egress(end) for end in self._sources]
        self._in = [self._ingress(number) for number in range(len(columns))]

    def way(self, row: int, column: int) -> Way | None:
        """How a pair is decided; None when it has no way over this family."""
        source, target = self._sources[row], self._targets[column]
        if source is None or target is None or self._pods[0][row] is self._pods[1][column]:
            return None
        if not self._out[row] >> column & 1:
            return Way(source.address, target.address, "egress-denied", False)
        if not self._in[column] >> row & 1:
            return Way(source.address, target.address, "ingress-denied", False)
        return Way(source.address, target.address, ALLOWED, True)

    def _end(self, pod: Pod, family: Family) -> _End | None:
        address = met(pod, family)
        return None if address is None else _End(address, self._world.pod_at(address))

    def _egress(self, source: _End | None) -> int:
        """The columns to which a source's own policies let it out."""
        isolating = self._isolating("Egress", source)
        if source is None or source.pod is None or not isolating:
            return -1
        allowed = self._excused("Egress", source.pod, self._targets)
        for policy in isolating:
            for rule in rules_of(policy, "Egress"):
                allowed |= self._columns(policy.namespace, rule)
        return allowed

    def _ingress(self, column: int) -> int:
        """The sources that the policies of a column's Pod let in."""
        target, packet = self._targets[column], self._packets[column]
        isolating = self._isolating("Ingress", target)
        if target is None or target.pod is None or packet is None or not isolating:
            return -1
        allowed = self._excused("Ingress", target.pod, self._sources)
        for policy in isolating:
            for rule in rules_of(policy, "Ingress"):
                if any_port_fits(rule, packet, target.pod):
                    allowed |= self._peers(policy.namespace, rule)
        return allowed

    def _isolating(self, direction: Direction, end: _End | None) -> tuple[NetworkPolicy, ...]:
        if end is None or end.pod is None:
            return ()
        asked = direction, end.pod.key
        if asked not in self._isolated:
            self._isolated[asked] = isolated_by(self._world, direction, end.pod)
        return self._isolated[asked]

    def _columns(self, namespace: str, rule: PolicyRule) -> int:
        """The columns to which an egress rule lets out."""
        asked = namespace, rule
        if asked not in self._to:
            self._to[asked] = _bits(
                end is not None
                and packet is not None
                and any_port_fits(rule, packet, end.pod)
                and any_peer_fits(self._world, namespace, rule, end.address, end.pod)
                for end, packet in zip(self._targets, self._packets, strict=True)
            )
        return self._to[asked]

    def _peers(self, namespace: str, rule: PolicyRule) -> int:
        """The sources that an ingress rule lets in, at its ports."""
        asked = namespace, rule
        if asked not in self._from:
            self._from[asked] = _bits(
                end is not None and any_peer_fits(self._world, namespace, rule, end.address, end.pod)
                for end in self._sources
            )
        return self._from[asked]

    def _excused(self, direction: Direction, pod: Pod, others: Sequence[_End | None]) -> int:
        """The other ends about which its policies are not asked: itself, and its node."""
        return _bits(
            end is not None
            and (end.pod is None or end.pod.key == pod.key)
            and bool(exempt(self._world, direction, pod, end.pod, end.address))
            for end in others
        )


def _bits(each: Iterable[bool]) -> int:
    return sum(1 << number for number, is_set in enumerate(each) if is_set)


# Columns


def columns_of(
    pods: Iterable[Pod], *, port: int | str | None = None, protocol: Protocol | None = None
) -> tuple[Column, ...]:
    """The ports that Pods declare, of one protocol or all; or the port that is asked for, of all Pods.

    A port asked for by its name is a column of the Pods that have one of this name.
    """
    return tuple(
        Column(pod, *each) for pod in pods for each in sorted(set(_ports(pod, port, protocol)), key=_order)
    )


def _ports(pod: Pod, port: int | str | None, protocol: Protocol | None) -> Iterator[tuple[Protocol, int]]:
    if isinstance(port, int):
        yield protocol or "TCP", port
    elif isinstance(port, str):
        for (of, name), number in named_ports(pod.ports).items():
            if name == port and protocol in (None, of):
                yield of, number
    else:
        for each in pod.ports:
            if each.role != "init" and protocol in (None, each.protocol):
                yield each.protocol, each.port


def _order(port: tuple[Protocol, int]) -> tuple[int, str]:
    return port[1], port[0]
