"""What a ruleset does to a packet: the kernel's way through it, step by step, on the same values that were
loaded.

    packet, connection --hook by hook, chain by chain in order of priority--> accept | drop | reject, and why

A rule is a row of statements; a match that fails ends it, and so does a fact that the packet does not have
(a TCP port of an ICMP packet).  `accept` ends a base chain and the packet goes on to the next one; `drop`
ends everything. Chains of type nat are asked about a connection's first packet only, and what they
translate holds for the next hooks.

What is not decided here: limits always hold (and `limit over` never), counters count nothing, `numgen` and
`fib` are asked of the caller, hashes are others than the kernel's.  What this evaluator does not know raises
`UndecidedError`: an answer is exact or there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Literal, TypeAlias

from agent.nft.compare import bits, compare, covers, wide
from agent.nft.model import (
    Address,
    Assign,
    Bits,
    Chain,
    ChainName,
    Concat,
    Counter,
    Ct,
    CtState,
    CtStatus,
    Expression,
    Exthdr,
    Fib,
    Hash,
    Key,
    Limit,
    Log,
    Lookup,
    Match,
    Meta,
    Named,
    Nat,
    Notrack,
    Numgen,
    Payload,
    Range,
    Reject,
    Rule,
    Ruleset,
    SetName,
    Statement,
    TableName,
    Update,
    Verdict,
    VerdictMap,
)
from agent.nft.packet import (
    AbsentError,
    Connection,
    Packet,
    UndecidedError,
    Unknown,
    ct,
    given,
    meta,
    payload,
)

HookName: TypeAlias = Literal["prerouting", "input", "forward", "output", "postrouting"]
Outcome: TypeAlias = Literal["accept", "drop", "reject"]

FORWARDED: tuple[HookName, ...] = ("prerouting", "forward", "postrouting")
RECEIVED: tuple[HookName, ...] = ("prerouting", "input")
SENT: tuple[HookName, ...] = ("output", "postrouting")

_MOST_JUMPS = 16  # as in the kernel
_FAMILIES = {4: frozenset({"inet", "ip"}), 6: frozenset({"inet", "ip6"})}


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that was passed to its end, or at least to a counter or log, and what it decided."""

    chain: ChainName
    index: int
    rule: Rule
    verdict: Verdict | Nat | Reject | None = None


@dataclass(frozen=True, slots=True)
class Translation:
    """An address or port that a rule gave; None where it stays, or where the kernel chooses."""

    kind: Literal["dnat", "snat", "redirect", "masquerade"]
    address: Address | Range | None = None
    port: int | Range | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a packet: `step` is the rule that dropped or refused it, None for a chain's policy."""

    outcome: Outcome
    packet: Packet
    connection: Connection
    trace: tuple[Step, ...]
    step: Step | None = None
    chain: ChainName | None = None
    translations: tuple[Translation, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether it got through."""
        return self.outcome == "accept"


def no_fib(flags: tuple[str, ...], result: str, packet: Packet) -> Key:
    """For rulesets that ask nothing of the routing tables."""
    raise UndecidedError(f"fib {' . '.join(flags)} {result} of {packet}")


def no_numgen(of: Numgen) -> int:
    """For rulesets without random choices."""
    raise UndecidedError(f"{of}")


_DELETED = object()  # instead of an element's datum


class _EndError(Exception):
    """The packet's way ends here."""

    def __init__(self, outcome: Outcome, step: Step | None, chain: ChainName) -> None:
        self.outcome, self.step, self.chain = outcome, step, chain


class Evaluator:
    """Judges packets by one ruleset, which must not change meanwhile."""

    def __init__(
        self,
        ruleset: Ruleset,
        fib: Callable[[tuple[str, ...], str, Packet], Key] = no_fib,
        numgen: Callable[[Numgen], int] = no_numgen,
    ) -> None:
        self.ruleset, self.fib, self.numgen = ruleset, fib, numgen
        self._hooked: dict[tuple[HookName, int], list[Chain]] = {}
        self._intervals: dict[SetName, list[tuple[Key, Any]]] = {}

    def judge(
        self,
        packet: Packet,
        hooks: tuple[HookName, ...] = FORWARDED,
        connection: Connection | None = None,
    ) -> Result:
        """Send a packet through these hooks; UndecidedError when that cannot be told exactly."""
        way = _Way(self, packet, connection or Connection())
        try:
            for hook in hooks:
                for chain in self._chains(hook, packet.version):
                    way.enter(chain)
        except _EndError as end:
            return way.result(end.outcome, end.step, end.chain)
        return way.result("accept")

    def _chains(self, hook: HookName, family: int) -> list[Chain]:
        if (hook, family) not in self._hooked:
            self._hooked[hook, family] = sorted(
                (
                    chain
                    for chain in self.ruleset.chains.values()
                    if chain.hook and chain.hook.hook == hook and chain.table.family in _FAMILIES[family]
                ),
                key=lambda chain: (chain.hook.priority if chain.hook else 0, chain.table, chain.name),
            )
        return self._hooked[hook, family]

    def ranges(self, name: SetName) -> list[tuple[Key, Any]]:
        """The elements of a set with intervals, which have to be tried."""
        if name not in self._intervals:
            elements = self.ruleset.elements.get(name, {})
            self._intervals[name] = [(key, element.data) for key, element in elements.items() if wide(key)]
        return self._intervals[name]


class _Way:
    """One packet's way through a ruleset: what it and its connection are by now, and the rules it passed."""

    def __init__(
        self,
        host: Evaluator,
        packet: Packet,
        connection: Connection,
    ) -> None:
        self._host, self._ruleset = host, host.ruleset
        self._packet, self._connection = packet, connection
        self._trace: list[Step] = []
        self._translations: list[Translation] = []
        self._learned: dict[SetName, dict[Key, Any]] = {}  # what this packet put into dynamic sets
        self._translated: set[str] = set()

    def result(self, outcome: Outcome, step: Step | None = None, chain: ChainName | None = None) -> Result:
        return Result(
            outcome,
            self._packet,
            self._connection,
            tuple(self._trace),
            step,
            chain,
            tuple(self._translations),
        )

    def enter(self, chain: Chain) -> None:
        """Pass a base chain; raises _EndError where the packet ends."""
        if chain.hook is None:
            raise UndecidedError(f"{chain.id} has no hook")
        if chain.hook.type == "nat" and not self._translatable(chain.hook.hook):
            return
        verdict = self._pass(chain, 0)
        if verdict is None and chain.hook.policy == "drop":
            raise _EndError("drop", None, chain.id)

    def _translatable(self, hook: str) -> bool:
        """A connection's destination is translated once, and its source once, by its first packet."""
        side = "destination" if hook in {"prerouting", "output"} else "source"
        return bool(self._connection.state & CtState.NEW) and side not in self._translated

    def _pass(self, chain: Chain, depth: int) -> Verdict | None:
        """Pass a chain; ACCEPT when its base chain is done, None when the caller goes on."""
        if depth > _MOST_JUMPS:
            raise UndecidedError(f"{chain.id}: more than {_MOST_JUMPS} jumps")
        for index, rule in enumerate(chain.rules):
            verdict = self._apply(chain, index, rule)
            if verdict is None or verdict.kind == "continue":
                continue
            if verdict.kind in {"accept", "return"}:
                return verdict if verdict.kind == "accept" else None
            target = self._ruleset.chains.get(ChainName(chain.table, verdict.chain))
            if target is None:
                raise UndecidedError(f"{chain.id} leads to {verdict.chain}, which is not there")
            ended = self._pass(target, depth + 1)
            if ended is not None or verdict.kind == "goto":
                return ended
        return None

    def _apply(self, chain: Chain, index: int, rule: Rule) -> Verdict | None:
        """Apply a rule's statements as far as they hold; its verdict if they lead to one."""
        noted = False
        try:
            for statement in rule.statements:
                ended = self._do(chain.table, statement)
                noted = noted or isinstance(statement, (Log, Counter))
                if ended is not None:
                    return self._end(Step(chain.id, index, rule, ended))
        except AbsentError:
            if noted:
                self._trace.append(Step(chain.id, index, rule))
            return None
        self._trace.append(Step(chain.id, index, rule))
        return None

    def _end(self, step: Step) -> Verdict:
        self._trace.append(step)
        if isinstance(step.verdict, Verdict):
            if step.verdict.kind == "drop":
                raise _EndError("drop", step, step.chain)
            return step.verdict
        if isinstance(step.verdict, Reject):
            raise _EndError("reject", step, step.chain)
        return Verdict("accept")

    def _do(self, table: TableName, of: Statement) -> Verdict | Nat | Reject | None:
        """Do one statement: what it decides, None to go on; AbsentError ends the rule."""
        match of:
            case Match():
                if not self._matches(table, of):
                    raise AbsentError
            case Verdict() | Reject():
                return of
            case VerdictMap(key, data):
                found: object = self._found(table, data, self._value(table, key))
                if not isinstance(found, Verdict):
                    raise UndecidedError(f"{found!r} is no verdict")
                return found
            case Assign(target, value):
                self._assign(target, self._value_or_constant(table, value))
            case Nat():
                return of if self._translate(table, of) else None
            case Limit(over=True):
                raise AbsentError
            case Update():
                self._update(table, of)
            case Notrack():
                self._connection = replace(self._connection, state=CtState.UNTRACKED)
            case Counter() | Log() | Limit():
                pass
            case _:
                raise UndecidedError(f"{of!r}")
        return None

    # Values

    def _value_or_constant(self, table: TableName, of: Any) -> Any:
        if isinstance(of, (int, IPv4Address, IPv6Address, Range)):
            return of
        return self._value(table, of)

    def _value(self, table: TableName, of: Expression) -> Any:  # noqa: PLR0911  # a line for each
        """What an expression says of this packet; AbsentError where it says nothing."""
        match of:
            case Payload(protocol, name):
                return payload(self._packet, protocol, name)
            case Meta(key):
                return meta(self._packet, key)
            case Ct(key, direction):
                return ct(self._packet, self._connection, key, direction)
            case Concat(parts):
                return tuple(self._value(table, part) for part in parts)
            case Bits(left, operator, right):
                return bits(self._value(table, left), operator, right)
            case Lookup(key, data):
                return self._found(table, data, self._value(table, key))
            case Exthdr(name, ""):
                return name in self._packet.extensions
            case Exthdr(name, inside):
                if name not in self._packet.extensions:
                    raise AbsentError
                return given(self._packet, name, inside)
            case Fib(flags, result):
                return self._host.fib(flags, result, self._packet)
            case Numgen():
                return self._host.numgen(of)
            case Hash(inner, mod, seed):
                return _hash(self._value(table, inner), mod, seed)
        raise UndecidedError(f"{of!r}")

    # Matches, sets and maps

    def _matches(self, table: TableName, of: Match) -> bool:
        value, right = self._value(table, of.left), of.right
        if isinstance(right, (Named, frozenset)):
            if of.operator not in {"==", "!="}:
                raise UndecidedError(f"{of!r}")
            inside = self._is_in(table, value, right)
            return inside is (of.operator == "==")
        if isinstance(value, Unknown):
            raise UndecidedError(f"{of!r} of {self._packet}")
        return compare(value, of.operator, right)

    def _is_in(self, table: TableName, value: Any, of: Named | frozenset[Key]) -> bool:
        try:
            if isinstance(of, Named):
                self._in_named(SetName(table, of.name), value)
                return True
            return value in of or any(covers(key, value) for key in of if wide(key))
        except AbsentError:
            return False

    def _found(self, table: TableName, data: Named | frozenset[tuple[Key, Any]], value: Any) -> Any:
        """What a map holds for a value; AbsentError where it holds nothing."""
        if isinstance(data, Named):
            return self._in_named(SetName(table, data.name), value)
        for key, datum in data:
            if key == value or covers(key, value):
                return datum
        raise AbsentError

    def _in_named(self, name: SetName, value: Any) -> Any:
        """The datum of a named set's element, None in a set; AbsentError where there is no element."""
        if name not in self._ruleset.sets:
            raise UndecidedError(f"{name} is not there")
        learned = self._learned.get(name, {})
        if value in learned:
            if learned[value] is _DELETED:
                raise AbsentError
            return learned[value]
        element = self._ruleset.elements.get(name, {}).get(value)
        if element is not None:
            return element.data
        for key, data in self._host.ranges(name):
            if covers(key, value):
                return data
        raise AbsentError

    # What changes

    def _assign(self, target: Expression, value: Any) -> None:
        match target:
            case Meta("mark"):
                self._packet = replace(self._packet, mark=value)
            case Ct("mark"):
                self._connection = replace(self._connection, mark=value)
            case _:
                raise UndecidedError(f"setting {target!r}")

    def _update(self, table: TableName, of: Update) -> None:
        """Adding or refreshing an element that is there leaves its datum as it is."""
        name, key = SetName(table, of.set), self._value(table, of.key)
        elements = self._learned.setdefault(name, {})
        if of.operator == "delete":
            elements[key] = _DELETED
            return
        data = None if of.data is None else self._value_or_constant(table, of.data)
        try:
            self._in_named(name, key)
        except AbsentError:
            elements[key] = data

    def _translate(self, table: TableName, of: Nat) -> bool:
        """Translate, unless it is for packets of the other family: the kernel then goes on."""
        if of.family and of.family != {4: "ip", 6: "ip6"}[self._packet.version]:
            return False
        address = None if of.address is None else self._value_or_constant(table, of.address)
        port = None if of.port is None else self._value_or_constant(table, of.port)
        if isinstance(address, tuple):
            address, port = address
        self._translations.append(Translation(of.kind, address, port))
        flow = self._packet.flow
        original = self._connection.original or flow
        if of.kind == "dnat":
            self._translated.add("destination")
            flow = replace(flow, **_fixed(target=address, dport=port))
        elif of.kind == "redirect":
            raise UndecidedError("redirect: to which of the node's addresses?")
        else:
            self._translated.add("source")
            flow = replace(flow, **_fixed(source=address, sport=port))
        self._packet = replace(
            self._packet, source=flow.source, target=flow.target, sport=flow.sport, dport=flow.dport
        )
        status = self._connection.status | (CtStatus.DNAT if of.kind == "dnat" else CtStatus.SNAT)
        self._connection = replace(self._connection, original=original, reply=flow.back, status=status)
        return True


def _hash(value: Any, mod: int, seed: int) -> int:
    """Not the kernel's number, but as there the same for the same value."""
    digest = blake2b(str(value).encode(), digest_size=8, salt=seed.to_bytes(16)).digest()
    return int.from_bytes(digest) % mod


def _fixed(**values: Any) -> dict[str, Any]:
    """What is given and is one value; of a range the kernel chooses."""
    return {
        name: value for name, value in values.items() if value is not None and not isinstance(value, Range)
    }
