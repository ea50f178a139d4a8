"""`podwall why SRC DST[:PORT]`: whether a connection is allowed, by what, and what would change it.

objects -----------------------> the answer, and what each node's rules have to do with the packet
agents --settings, asked while --^                                 |
       --packet, for each node on the way-------------------> what they do: the same?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import click

from agent.cli.agents import Agents, Silent, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, cluster_options
from agent.cli.connection import asked_about, connection_options
from agent.cli.lines import Lines
from agent.cli.names import NODE, completes
from agent.cli.output import MARKS, NEGATIVE, Coloured, Line, output_option, show
from agent.cluster.model import IPAddress, Service
from agent.cluster.store import Snapshot
from agent.compile.service import ServiceSettings
from agent.explain.answer import Answer, Step
from agent.explain.fields import Field
from agent.explain.legs import Leg, differences
from agent.explain.pairs import Pair, Pairs, Questions, each_asked
from agent.explain.question import CannotAnswerError, Question
from agent.explain.world import Address, UnknownNameError, World, service_addresses, title
from agent.log import printable

if TYPE_CHECKING:
    from agent.cli.cluster import Places

MOST_ASKED_AHEAD = 8  # nodes whose agents are asked before it is known which of them matter
LINES_UP = 17  # the column at which what belongs to a step goes on


@click.command("why")
@connection_options
@click.option(
    "--via",
    metavar="NODE",
    default="",
    help="The node where a packet from outside comes in.",
    shell_complete=completes(NODE),
)
@click.option("--exit-code", is_flag=True, help="End with 1 when the connection is denied.")
@click.option("--objects-only", is_flag=True, help="Do not compare with the rules in the nodes' kernels.")
@output_option
@cluster_options
def why_command(
    asked: Asked, objects_only: bool, exit_code: bool, output: str, via: str, **connection: Any
) -> None:
    """Say in one sentence whether SRC may connect to DST, then the way step by step.

    SRC and DST are Pods, Services, nodes, DNS names or addresses, addresses outside of the cluster too. A
    PORT is a number or a name; an IPv6 address with a port is written [ADDRESS]:PORT. deploy/web, sts/web,
    ds/web, rs/web and job/web are all Pods of a workload, and so is its name alone where nothing else has it:
    each Pod is asked about, and where they differ the answer is that of one that is denied.

    \b
    podwall why web svc/api:80
    podwall why deploy/web sts/data/db:5432
    podwall why shop/web api.shop.svc.cluster.local:http
    podwall why 203.0.113.10 node/worker:30080
    podwall why -f manifests/ web [fd00:10:96::7]:53 --protocol udp

    Of a cluster or a lab the agents of the nodes on the way are asked what the rules in their kernels do with
    the packet, and it is said where they do something else than the objects say.
    """
    with looked(asked, ask=asked.live and not objects_only) as seen:
        try:
            pairs = seen.asked(asked_about(seen.world, asked.namespace, **connection), via)
        except (UnknownNameError, CannotAnswerError) as error:
            raise click.UsageError(printable(str(error))) from error
        nodes = seen.compared(pairs.told.answer.legs)
    content = answer_json(pairs, nodes, seen.lines)
    show(output, content, lambda: lines(pairs, nodes, seen.lines, output == "wide"))
    if exit_code and not content["allowed"]:
        raise SystemExit(NEGATIVE)


# The nodes


@dataclass(frozen=True, slots=True)
class Compared:
    """What a node's rules do otherwise than the objects say; `silent` is why nobody could compare, or ""."""

    node: str
    differs: tuple[str, ...] = ()
    silent: str = ""
    passes: bool = True


@dataclass(slots=True)
class Looked:
    """A cluster's objects, what its agents are configured to, and a way to ask them more."""

    world: World
    lines: Lines
    agents: Agents
    announced: Mapping[str, str]

    def __enter__(self) -> Looked:
        return self

    def __exit__(self, *_: object) -> None:
        self.agents.__exit__(None, None, None)

    def asked(self, questions: Questions, via: str = "") -> Pairs:
        """What the objects say of each pair, as a client asks. Raises CannotAnswerError."""
        first = replace(questions.first, by_name=questions.first.address is None, via=via)
        return each_asked(self.world, replace(questions, first=self.known_to_come_in(first)))

    def known_to_come_in(self, question: Question) -> Question:
        """With the node that answers for the target's address, for who asks from outside."""
        source, target = question.source, question.target
        if question.via or not isinstance(source, Address):
            return question
        addresses: tuple[IPAddress, ...] = (question.address,) if question.address else ()
        if not addresses and isinstance(target, Service):
            addresses = service_addresses(target)
        family = [str(each) for each in addresses if each.version == source.ip.version]
        return replace(question, via=next((self.announced[ip] for ip in family if ip in self.announced), ""))

    def compared(self, legs: Sequence[Leg]) -> tuple[Compared, ...]:
        """What the nodes on the way do with the packet, asked at the same time."""
        if not legs or not self.agents.nodes:
            return ()
        with ThreadPoolExecutor(len(legs)) as threads:
            return tuple(threads.map(self._compared, legs))

    def _compared(self, leg: Leg) -> Compared:
        try:
            told = self.agents.ask(leg.node, "packet", leg.body())
        except SilentError as error:
            return Compared(leg.node, silent=str(error))
        if told["undecided"]:
            return Compared(leg.node, silent=f"it has rules that cannot be judged: {told['undecided']}")
        passes = any(way["outcome"] == "accept" for way in told["ways"])
        return Compared(leg.node, tuple(dict.fromkeys(differences(leg, told))), passes=passes)


def looked(asked: Asked, *, ask: bool) -> Looked:
    """Everything that is needed, fetched at the same time. Raises Unreachable."""
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(_settings, asked) if ask else None
        snapshot, places = asked.objects()
        agents, settings = asking.result() if asking else (Agents({}), {})
    return looked_at(snapshot, places, agents, settings)


def looked_at(snapshot: Snapshot, places: Places, agents: Agents, settings: Mapping[str, Any]) -> Looked:
    """What was fetched, put together; `settings` are the agents' answers to `settings`."""
    known = {node: _read(said) for node, said in settings.items()}
    announced = {address: node for node, said in settings.items() for address in said["announced"]}
    tunnels = {node: frozenset(said["tunnels"]) for node, said in settings.items()}
    return Looked(World(snapshot, known, tunnels=tunnels), Lines(places), agents, announced)


def _settings(asked: Asked) -> tuple[Agents, dict[str, Any]]:
    """The agents, and what some of them are configured to: all of them in a small cluster, else one.

    None when nobody may ask them: the objects have an answer of their own.
    """
    try:
        agents = asked.agents()
    except Unreachable:
        return Agents({}), {}
    return agents, settings_of(agents)


def settings_of(agents: Agents) -> dict[str, Any]:
    """What the agents are configured to, of those that answer."""
    some = agents.nodes if len(agents.nodes) <= MOST_ASKED_AHEAD else agents.nodes[:1]
    told = agents.ask_all("settings", nodes=some)
    return {node: said for node, said in told.items() if not isinstance(said, Silent)}


def _read(said: Mapping[str, Any]) -> ServiceSettings:
    def networks(name: str) -> tuple[Any, ...]:
        return tuple(map(ip_network, said[name]))

    return ServiceSettings(
        enabled=said["services"],
        external_ips=networks("external_ips"),
        node_port_addresses=networks("node_port_addresses"),
        pools=networks("pools"),
    )


def in_the_kernel(answer: Answer, nodes: Sequence[Compared]) -> Answer:
    """With what the nodes do otherwise before all else: that is what happens to the packet."""
    differing = next((each for each in nodes if each.differs), None)
    if differing is None:
        return answer
    sentence = (
        f"{'denied' if not differing.passes or not answer.allowed else 'allowed'}: the rules on "
        f"{differing.node} differ from what the policies and Services say: {'; '.join(differing.differs)} "
        f"(by the objects: {answer.sentence})"
    )
    allowed = answer.allowed and differing.passes
    return replace(answer, allowed=allowed, cause="rules-differ", sentence=sentence)


# The answer


def lines(pairs: Pairs, nodes: Sequence[Compared], where: Lines, wide: bool = False) -> Iterator[Line]:
    """The answer as a person reads it: the sentence first, then how the workload's other Pods are."""
    answer = in_the_kernel(pairs.told.answer, nodes)
    yield Coloured(answer.sentence, "green" if answer.allowed else "red")
    if others := beside(pairs, answer):
        yield others
    if answer.steps:
        yield ""
    for step in answer.steps:
        yield f"  {MARKS[step.ok]}  {step.stage:<10} {step.text}"
        yield from (f"{'':{LINES_UP}}{place}" for place in _places(step, where, wide))
    for each in nodes:
        yield f"  {_mark(each)}  {'rules':<10} {_said(each)}"
    for change in answer.changes:
        yield ""
        yield "It would be allowed with:"
        yield from (f"  {line}" for line in change.text().splitlines())


def beside(pairs: Pairs, answer: Answer) -> str:
    """How the others are; only of the one that is told the nodes were asked."""
    others = pairs.in_words()
    return f"by the objects {others}" if others and answer.cause == "rules-differ" else others


def _places(step: Step, where: Lines, wide: bool) -> Iterator[str]:
    """Where what decides a step stands: in files by the line, else by the field's path in the wide form."""
    for each in step.fields:
        found = where.of(each)
        if found is not None:
            yield f"{found[0]}:{found[1]}: {each.kind} {each.object} {each.text}"
        elif wide:
            yield f"{each.kind} {each.object} {each.text}"


def _mark(of: Compared) -> str:
    return MARKS[None] if of.silent else MARKS[not of.differs]


def _said(of: Compared) -> str:
    if of.silent:
        return f"those on {of.node} were not compared: {of.silent}"
    return f"on {of.node}: {'; '.join(of.differs)}" if of.differs else f"those on {of.node} do just this"


def answer_json(pairs: Pairs, nodes: Sequence[Compared], where: Lines) -> dict[str, Any]:
    """The whole answer as plain data."""
    answer = in_the_kernel(pairs.told.answer, nodes)
    return {
        "allowed": answer.allowed,
        "cause": answer.cause,
        "sentence": answer.sentence,
        "steps": [
            {
                "stage": step.stage,
                "ok": step.ok,
                "text": step.text,
                "fields": [_field_json(each, where) for each in step.fields],
            }
            for step in answer.steps
        ],
        "changes": [
            {"policy": "/".join(change.policy), "path": list(change.path), "add": change.value}
            for change in answer.changes
        ],
        "nodes": [
            {
                "node": each.node,
                "agrees": None if each.silent else not each.differs,
                "differs": list(each.differs),
                "silent": each.silent,
            }
            for each in nodes
        ],
        "pairs": _pairs_json(pairs, beside(pairs, answer)),
    }


def _field_json(of: Field, where: Lines) -> dict[str, Any]:
    found = where.of(of)
    return {
        "kind": of.kind,
        "object": of.object,
        "field": of.text,
        "file": str(found[0]) if found else None,
        "line": found[1] if found else None,
    }


def _pairs_json(pairs: Pairs, text: str) -> dict[str, Any]:
    """The pairs that were asked; `total` counts those that were not as well."""
    return {
        "total": pairs.questions.total,
        "asked": len(pairs.asked),
        "allowed": pairs.allowed,
        "alike": pairs.alike,
        "text": text,
        "each": [_pair_json(each) for each in pairs.asked],
    }


def _pair_json(of: Pair) -> dict[str, Any]:
    return {
        "source": title(of.question.source),
        "target": title(of.question.target),
        "allowed": of.answer.allowed,
        "cause": of.answer.cause,
    }
