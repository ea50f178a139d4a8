"""`podwall plan -f FILE`: what a change would open, close and cut, without touching anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from agent.cli.agents import Silent
from agent.cli.ask import Unreachable
from agent.cli.cluster import FILES, Asked, cluster_options_from
from agent.cli.names import Takes, completes
from agent.cli.output import NEGATIVE, Coloured, Column, Line, output_option, show, table
from agent.cluster.manifests import load
from agent.cluster.model import Kind, kind_of
from agent.cluster.store import Snapshot
from agent.explain.change import Change, Gone, applied, change_of
from agent.explain.ends import WORKLOADS, Workload, workload_of
from agent.explain.imagined import with_addresses
from agent.explain.plan import Backing, Cut, LiveFlow, Plan, Row, live_flows, plan
from agent.explain.reach import EVERYWHERE, Group, takes_part
from agent.explain.spans import in_words, pieces
from agent.explain.world import World, with_port
from agent.log import printable

MOST_NAMED = 4
MOST_CUT = 20  # connections that are told one by one; -o wide has all
NOTHING = "Nothing changes: everything is there already."
COLOURS = {"closes": "red", "opens": "green"}
_WORDS: dict[Kind, tuple[str, ...]] = {
    "NetworkPolicy": ("networkpolicy", "networkpolicies", "netpol"),
    "Namespace": ("namespace", "namespaces", "ns"),
    "Pod": ("pod", "pods", "po"),
    "Service": ("service", "services", "svc"),
}
WORDS: dict[str, Kind] = {word: kind for kind, words in _WORDS.items() for word in words}
"""The words that kubectl knows these kinds by."""


@click.command("plan")
@click.option(
    "-f",
    "--filename",
    "files",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help=f"Objects as they would be applied: {FILES}",
)
@click.option(
    "--delete",
    "gone",
    multiple=True,
    metavar="FILE|KIND/NAME",
    help="What would be deleted: the objects of a file, or one such as netpol/deny, netpol/shop/deny or "
    "deploy/web; may be given several times.",
    shell_complete=completes(Takes(words={**WORDS, **WORKLOADS}, files=True)),
)
@click.option("--enforce-audit", is_flag=True, help="As if the policies in audit mode were enforced.")
@click.option("--flows/--no-flows", default=True, help="Whether to ask the agents for live connections.")
@click.option("--exit-code", is_flag=True, help="End with 1 when anything that works now would not.")
@output_option
@cluster_options_from
def plan_command(
    asked: Asked,
    files: tuple[Path, ...],
    gone: tuple[str, ...],
    output: str,
    **options: bool,
) -> None:
    """Rehearse a change: say what it would open, close and cut, and touch nothing.

    The objects of -f are laid over those that there are, as `kubectl apply` would: NetworkPolicies,
    Namespaces, Pods and workloads with other labels, Services. Those of --delete are taken away. It says what
    each policy means, which ways open and close on which ports, which Services get other endpoints, and
    which live connections would end.

    \b
    podwall plan -f deny.yaml                        what would default-deny close?
    podwall plan -f shop/ --delete netpol/shop/old --exit-code
    podwall plan --enforce-audit                     what do the policies in audit mode wait for?
    podwall plan -f deny.yaml --from cluster.yaml    manifests instead of a cluster
    """
    if not files and not gone and not options["enforce_audit"]:
        raise click.UsageError("say what would change: -f FILE, --delete FILE|KIND/NAME, --enforce-audit")
    change = _change(files, asked.namespace)
    made = _rehearse(asked, change, _gone(gone, asked.namespace), options["enforce_audit"], options["flows"])
    show(output, made.content(), lambda: made.lines(wide=output == "wide"))
    if options["exit_code"] and made.plan.closes:
        raise SystemExit(NEGATIVE)


# What is asked


def _change(files: Iterable[Path], namespace: str) -> Change:
    """What files say; what they leave open is of the namespace that is asked. Raises UsageError."""
    found = load(files)
    change = change_of(found.documents, namespace)
    if errors := found.errors or change.errors:
        raise click.UsageError(printable("\n".join(map(str, errors))))
    return change


def _gone(texts: Iterable[str], namespace: str) -> Gone:
    """What files have, and what is named. Raises UsageError."""
    found = [
        _of_file(Path(each), namespace) if Path(each).exists() else _named(each, namespace) for each in texts
    ]
    return Gone(
        places=tuple(place for each in found for place in each.places),
        workloads=tuple(workload for each in found for workload in each.workloads),
        notes=tuple(note for each in found for note in each.notes),
    )


def _of_file(path: Path, namespace: str) -> Gone:
    """Raises UsageError."""
    of = _change([path], namespace)
    return Gone(tuple((kind_of(each), each.key) for each in of.objects), tuple(of.templates), of.notes)


def _named(text: str, namespace: str) -> Gone:
    """`netpol/deny`, `deploy/shop/web`, `ns/shop`. Raises UsageError."""
    head, *names = text.split("/")
    word = head.lower()
    if word not in {**WORDS, **WORKLOADS} or len(names) not in (1, 2) or not all(names):
        known = "netpol, pod, deploy, sts, ds, job, svc or ns"
        raise click.UsageError(f"--delete {printable(text)}: no such file, and no KIND/NAME with {known}")
    space, name = names if len(names) == 2 else (namespace, names[0])
    if word in WORKLOADS:
        return Gone(workloads=(Workload(WORKLOADS[word], space, name),))
    return Gone(((WORDS[word], names[0] if WORDS[word] == "Namespace" else (space, name)),))


def _rehearse(asked: Asked, change: Change, gone: Gone, enforce_audit: bool, ask_flows: bool) -> _Made:
    snapshot, notes = _present(asked)
    laid, told = applied(snapshot, change, gone, enforce_audit=enforce_audit)
    flows, complaints = _flows(asked) if asked.live and ask_flows else ([], [])
    before, after = World(snapshot), World(laid.snapshot)
    found = plan(before, after, laid.changed, flows)
    return _Made(found, after, len(flows), asked.live and ask_flows, (*notes, *told, *complaints))


def _present(asked: Asked) -> tuple[Snapshot, list[str]]:
    """The cluster as it is, and what is said of it; what manifests leave open is imagined."""
    snapshot, made = asked.with_templates()
    notes = [f"{_counted(len(made), 'Pod')} as the workloads' templates describe them"] if made else []
    snapshot, given = with_addresses(snapshot)
    if given:
        notes.append(
            f"{_counted(len(given), 'Pod')} without an address yet: what an ipBlock says of them is not known"
        )
    return snapshot, notes


def _flows(asked: Asked) -> tuple[list[LiveFlow], list[str]]:
    """What the agents know; who cannot be asked only makes the answer smaller, and that is said."""
    try:
        with asked.agents() as agents:
            answers = agents.ask_all("flows")
    except Unreachable as error:
        return [], [f"live connections are not known: {error.message}"]
    found: list[LiveFlow] = []
    complaints: list[str] = []
    for node, answer in answers.items():
        if isinstance(answer, Silent):
            complaints.append(f"live connections of node {node} are not known: {answer.why}")
            continue
        found += live_flows((node, each) for each in answer["flows"])
        if (left := answer["total"] - len(answer["flows"])) > 0:
            complaints.append(f"node {node} has {left} connections more than it could tell")
    return found, complaints


# What is said


@dataclass(frozen=True, slots=True)
class _Made:
    """A plan, and what a person needs beside it to read it."""

    plan: Plan
    after: World
    flows: int
    asked_flows: bool
    notes: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """All of it, as plain data."""
        of = self.plan
        return {
            "closes": of.closes,
            "changes": list(of.sentences),
            "ways": [_row_json(row) for row in of.rows],
            "services": [_backing_json(each) for each in of.services],
            "connections": [self._cut_json(cut) for cut in of.cuts],
            "connections_asked": self.flows if self.asked_flows else None,
            "unusable": list(of.unusable),
            "notes": list(self.notes),
        }

    def lines(self, *, wide: bool) -> Iterator[Line]:
        """For a person: what it means first, then what follows from it."""
        yield self._summary()
        yield ""
        nothing = "Nothing that is looked at changes." if self.notes else NOTHING
        yield from self.plan.sentences or (nothing,)
        yield from (Coloured(f"not usable: {problem}", "yellow") for problem in self.plan.unusable)
        yield from self._ways(wide)
        yield from self._services(wide)
        yield from self._cuts(wide)
        if self.notes:
            yield ""
        yield from (f"note: {note}" for note in self.notes)

    def _summary(self) -> Line:
        of = self.plan
        pairs = {word: _pairs(row for row in of.rows if row.change == word) for word in COLOURS}
        said = [f"{word} ways of {_counted(count, 'pair')}" for word, count in pairs.items() if count]
        said = said or ["opens and closes no way"]
        if nobody := sum(each.closes for each in of.services):
            said.append(f"leaves {_counted(nobody, 'port')} of Services without endpoints")
        if self.asked_flows:
            said.append(f"ends {len(of.cuts) or 'none'} of {_counted(self.flows, 'live connection')}")
        text = f"It {', '.join(said)}."
        return Coloured(text, "red") if of.closes else text

    def _ways(self, wide: bool) -> Iterator[Line]:
        rows = self.plan.rows
        if not rows:
            return
        names = _Names(self.after, wide)
        columns: Sequence[Column[Row]] = (
            Column("CHANGE", lambda row: row.change),
            Column("FROM", lambda row: names.of(row.sources, row.targets)),
            Column("TO", lambda row: names.of(row.targets, ())),
            Column("PORTS", lambda row: in_words(row.spans) + (f" (IPv{row.family})" if row.family else "")),
            Column("DECLARED", lambda row: [f"{protocol} {port}" for protocol, port in row.declared]),
        )
        head, *lines = table(rows, columns)
        yield ""
        yield head
        yield from (Coloured(line, COLOURS[row.change]) for row, line in zip(rows, lines, strict=True))

    def _services(self, wide: bool) -> Iterator[Line]:
        if self.plan.services:
            yield ""
        for each in self.plan.services:
            was, now = (_some(of, wide) or "nobody" for of in (each.before, each.after))
            line = f"Service {'/'.join(each.service)} {each.port.protocol} {each.port.port}: {was} -> {now}"
            yield Coloured(line, "red") if each.closes else line

    def _cuts(self, wide: bool) -> Iterator[Line]:
        if self.plan.cuts:
            yield ""
            yield "Live connections that would end:"
        shown = self.plan.cuts if wide else self.plan.cuts[:MOST_CUT]
        for cut in shown:
            flow = cut.flow
            ends = f"{self._end(flow.source, flow.sport)} -> {self._end(flow.destination, flow.dport)}"
            yield f"  {flow.protocol} {ends}: {cut.reason}"
        if len(shown) < len(self.plan.cuts):
            yield f"  and {len(self.plan.cuts) - len(shown)} more; -o wide has all"

    def _end(self, address: Any, port: int) -> str:
        name = self._pod(address)
        place = with_port(address, port)
        return f"{name} ({place})" if name else place

    def _pod(self, address: Any) -> str:
        pod = self.after.pod_at(address)
        return "/".join(pod.key) if pod else ""

    def _cut_json(self, cut: Cut) -> dict[str, Any]:
        flow = cut.flow
        ends = {"source": (flow.source, flow.sport), "destination": (flow.destination, flow.dport)}
        return {
            "node": flow.node,
            "protocol": flow.protocol,
            **{
                name: {"address": str(address), "port": port, "pod": self._pod(address)}
                for name, (address, port) in ends.items()
            },
            "reason": cut.reason,
        }


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _pairs(rows: Iterable[Row]) -> int:
    """How many different ends are concerned: a Pod to a Pod, a node, or what is outside."""
    pairs = {
        (source, target)
        for row in rows
        for from_group in row.sources
        for to_group in row.targets
        for source in from_group.names
        for target in to_group.names
        if source != target
    }
    return len(pairs)


class _Names:
    """What groups are called together; where they are everybody it is said so."""

    def __init__(self, world: World, wide: bool) -> None:
        self._wide = wide
        self._of_namespace: dict[str, set[str]] = {}
        self._of_workload: dict[object, set[str]] = {}
        for pod in world.snapshot.pods.values():
            if takes_part(world, pod):
                self._of_namespace.setdefault(pod.namespace, set()).add("/".join(pod.key))
                self._of_workload.setdefault(workload_of(pod), set()).add("/".join(pod.key))

    def of(self, groups: Sequence[Group], besides: Sequence[Group]) -> str:
        """Their names; `besides` are in it anyway, as a Pod has no way to itself that could change."""
        alone = {name for group in besides for name in group.names}
        alone = alone if len(alone) == 1 else set()
        pods = {"/".join(pod.key): workload_of(pod) for group in groups for pod in group.members}
        said = list(self._pods(pods, alone))
        if any(group.kind == "nodes" for group in groups):
            said.append("other nodes" if besides else "nodes")
        outside = [group.names[0] for group in groups if group.kind == "outside"]
        if outside:
            everywhere = {str(each) for each in EVERYWHERE.values()}
            said.append(
                "outside the cluster"
                if everywhere & set(outside)
                else f"outside ({_some(outside, self._wide)})"
            )
        return _some(said, self._wide)

    def _pods(self, names: Mapping[str, object], alone: set[str]) -> Iterator[str]:
        left = set(names)
        everybody = set().union(*self._of_namespace.values()) if self._of_namespace else set()
        if len(left) > 1 and everybody <= left | alone:
            yield "every Pod"
            return
        for space, there in sorted(self._of_namespace.items()):
            if len(there & left) > 1 and there <= left | alone:
                yield f"every Pod of {space}"
                left -= there
        for workload in sorted({names[name] for name in left}, key=str):
            yield self._workload(workload, sorted(name for name in left if names[name] == workload))

    def _workload(self, workload: Any, members: list[str]) -> str:
        if workload.kind == "Pod" or (len(members) == 1 < len(self._of_workload.get(workload, ()))):
            return members[0]
        all_of_it = len(self._of_workload.get(workload, ()))
        count = f"{len(members)}" if len(members) == all_of_it else f"{len(members)} of {all_of_it}"
        return f"{workload.namespace}/{workload.name}" + (f" ({count})" if all_of_it > 1 else "")


def _some(names: Sequence[str], wide: bool) -> str:
    if wide or len(names) <= MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more"


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "change": row.change,
        "from": [{"kind": group.kind, "names": list(group.names)} for group in row.sources],
        "to": [{"kind": group.kind, "names": list(group.names)} for group in row.targets],
        "ports": [of._asdict() for of in pieces(row.spans)],
        "declared": [{"protocol": protocol, "port": port} for protocol, port in row.declared],
        "family": row.family or None,
    }


def _backing_json(of: Backing) -> dict[str, Any]:
    return {
        "service": "/".join(of.service),
        "port": of.port.port,
        "protocol": of.port.protocol,
        "before": list(of.before),
        "after": list(of.after),
    }
