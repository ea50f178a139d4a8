"""The matrix: every Pod and node to every Pod and the outside, on every port, over both families. Pure.

    what connects  --trials-->  probes  --run at once-->  seen   --compared with-->  expected

A cell holds a mark per family: `4` and `6` where every port answered, `+` where some did, `-` where none did,
`!` where what was seen is not what was expected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lab.names import Address
from lab.probe import CONNECTED, PROTOCOLS, SCTP, Outcome, Probe

GREEN, RED, YELLOW, DIM, BOLD, PLAIN = "\033[32m", "\033[1;31m", "\033[33m", "\033[2m", "\033[1m", "\033[0m"
_NOTED = 20


@dataclass(frozen=True, slots=True)
class Host:
    """A Pod, a node or the outside: where it is and what it answers on; ports are TCP's and UDP's."""

    name: str
    netns: Path
    addresses: tuple[Address, ...]
    ports: tuple[int, ...] = ()
    where: str = ""
    sctp_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """One connection to try, and whether it should connect; None: that is not known."""

    source: str
    target: str
    address: Address
    port: int
    protocol: str
    netns: Path
    expected: bool | None = None

    @property
    def probe(self) -> Probe:
        """What tries it."""
        return Probe(self.netns, self.address, self.port, self.protocol)


@dataclass(frozen=True, slots=True)
class Result:
    """A trial and what became of it."""

    trial: Trial
    outcome: Outcome

    @property
    def connected(self) -> bool:
        """Whether the target itself answered."""
        return self.outcome.verdict == CONNECTED and self.outcome.answer == self.trial.target

    @property
    def good(self) -> bool:
        """Whether what was seen is what was expected; an answer of somebody else never is."""
        if self.outcome.verdict == CONNECTED and not self.connected:
            return False
        return self.trial.expected in (None, self.connected)

    def to_json(self) -> dict[str, object]:
        """Return it for machines."""
        trial, outcome = self.trial, self.outcome
        return {
            "source": trial.source,
            "target": trial.target,
            "address": str(trial.address),
            "port": trial.port,
            "protocol": trial.protocol,
            "expected": trial.expected,
            "verdict": outcome.verdict,
            "answer": outcome.answer,
            "ok": self.good,
        }

    def __str__(self) -> str:
        trial, outcome = self.trial, self.outcome
        wanted = "" if trial.expected is None else f", expected {'connected' if trial.expected else 'denied'}"
        who = (
            f", answered by {outcome.answer!r}" if outcome.verdict == CONNECTED and not self.connected else ""
        )
        return (
            f"{trial.source} -> {trial.target} {trial.address} {trial.protocol} {trial.port}: "
            f"{outcome.verdict}{who}{wanted}"
        )


Expectation = Callable[[Trial], bool | None]
"""Says of a trial, whose own `expected` is still None, whether it should connect."""


def everything(_trial: Trial) -> bool:
    """Expect all to connect."""
    return True


def unknown(_trial: Trial) -> None:
    """Expect nothing in particular."""


def trials(sources: Iterable[Host], targets: Sequence[Host], expected: Expectation) -> Iterator[Trial]:
    """Yield every connection to try, from everybody to everybody else."""
    for source in sources:
        families = {address.version for address in source.addresses}
        for target in targets:
            for address in target.addresses if target.name != source.name else ():
                for port, protocol in _served(target) if address.version in families else ():
                    trial = Trial(source.name, target.name, address, port, protocol, source.netns)
                    yield replace(trial, expected=expected(trial))


def _served(target: Host) -> Iterator[tuple[int, str]]:
    for port in target.ports:
        for protocol in PROTOCOLS:
            yield port, protocol
    for port in target.sctp_ports:
        yield port, SCTP


@dataclass(frozen=True, slots=True)
class Matrix:
    """What was seen when everybody tried to reach everybody."""

    sources: tuple[Host, ...]
    targets: tuple[Host, ...]
    results: tuple[Result, ...]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether everything was as expected."""
        return all(result.good for result in self.results)

    def render(self, *, colour: bool = False) -> str:
        """Return it as a table for people."""
        return Table(self.sources, self.targets, self.results, colour=colour).render(self.seconds)


class Table:
    """The results as a table for people."""

    def __init__(
        self, sources: Sequence[Host], targets: Sequence[Host], results: Sequence[Result], *, colour: bool
    ) -> None:
        self._sources = sources
        self._targets = targets
        self._results = results
        self._colour = colour
        self._numbers = {target.name: str(number) for number, target in enumerate(targets, 1)}
        self._name_width = max((len(host.name) for host in sources), default=0)
        self._where_width = max((len(host.where) for host in sources), default=0)
        self._cells: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
        for result in results:
            trial = result.trial
            self._cells[trial.source, trial.target, trial.address.version].append(result)

    def render(self, seconds: float) -> str:
        """Return the table, what its marks mean, and what was not as expected in so many seconds."""
        rows = [self._header(), *(self._row(source) for source in self._sources)]
        named = {source.name for source in self._sources}
        rows += [f"{number:>3} {name}" for name, number in self._numbers.items() if name not in named]
        return "\n".join([*rows, "", *_summary(self._results, seconds, self._colour)])

    def _header(self) -> str:
        columns = "".join(f"{self._numbers[target.name]:>4}" for target in self._targets)
        return _paint(self._label("", "from \\ to", "") + columns, BOLD, self._colour)

    def _row(self, source: Host) -> str:
        cells = ("  " + self._cell(source, target) for target in self._targets)
        return self._label(self._numbers.get(source.name, ""), source.name, source.where) + "".join(cells)

    def _label(self, number: str, name: str, where: str) -> str:
        return f"{number:>3} {name:<{self._name_width}}  {where:<{self._where_width}} "

    def _cell(self, source: Host, target: Host) -> str:
        found = ((version, self._cells.get((source.name, target.name, version), ())) for version in (4, 6))
        return "".join(_mark(results, version, self._colour) for version, results in found)


def _mark(results: Sequence[Result], version: int, colour: bool) -> str:
    if not results:
        return _paint("·", DIM, colour)
    if not all(result.good for result in results):
        return _paint("!", RED, colour)
    connected = sum(result.connected for result in results)
    if connected == len(results):
        return _paint(str(version), GREEN, colour)
    return _paint("+", YELLOW, colour) if connected else _paint("-", DIM, colour)


def _summary(results: Sequence[Result], seconds: float, colour: bool) -> Iterator[str]:
    tried = sorted({(trial.protocol == SCTP, trial.port) for trial in (result.trial for result in results)})
    ports = ", ".join(f"{SCTP} {port}" if sctp else str(port) for sctp, port in tried)
    yield f"4, 6: connected over IPv4, IPv6 on every port (TCP and UDP {ports})"
    yield "   +: on some ports   -: on none   !: not as expected"
    took = f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    bad = [result for result in results if not result.good]
    known = any(result.trial.expected is not None for result in results)
    if bad:
        yield _paint(f"{len(bad)} of {len(results)} connections are not as expected:", RED, colour)
        yield from (f"  {result}" for result in bad[:_NOTED])
        if len(bad) > _NOTED:
            yield f"  and {len(bad) - _NOTED} more (-o json lists all)"
    elif known:
        yield _paint(f"{len(results)} connections tried in {took}, all as expected", GREEN, colour)
    else:
        connected = sum(result.connected for result in results)
        yield f"{len(results)} connections tried in {took}, {connected} connected"


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{PLAIN}" if colour else text
