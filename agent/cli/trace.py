"""`podwall trace SRC DST[:PORT]`: one real packet, followed through the rules of the nodes on its way.

    source's node   a socket in the Pod's namespace, its packets marked --+
    other nodes     the same flow marked as it comes in                   +--> connect --> what each rule did
    the end, however it comes: every agent forgets, and the kernel with it

An end outside of the cluster cannot be made to send: the packet is waited for then.
"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import click

from agent.cli.agents import Agents, Silent, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, live_cluster_options
from agent.cli.connection import asked_about, connection_options
from agent.cli.output import MARKS, NEGATIVE, Coloured, output_option, show
from agent.cli.signals import handled, interrupt
from agent.cluster.model import IPAddress, Pod, Protocol
from agent.explain.answer import Answer
from agent.explain.legs import Leg
from agent.explain.observed import Names
from agent.explain.pairs import Questions, one_of, taken_in_words
from agent.explain.question import CannotAnswerError, Question
from agent.explain.traced import Account, Told, account
from agent.explain.way import why
from agent.explain.world import End, UnknownNameError, World, addresses_of, node_of, title
from agent.log import printable

MOST_NODES, MOST_ENDS = 16, 8
SEND_S, WAIT_S = 1.5, 30.0
MOST_SEND_S = 6.0
SETTLE_S = 0.3  # from the packet to the last node's account of it
POLL_S = 0.5
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Flow:
    """Which packet: from whom and to what, as it leaves the client; `ends` are where it may arrive.

    taken: which Pods of workloads it is about, "" where none was asked about.
    """

    source: End
    address: IPAddress
    target: IPAddress
    port: int
    protocol: Protocol
    ends: tuple[tuple[IPAddress, int], ...] = ()
    taken: str = ""


@click.command("trace")
@connection_options
@click.option("--wait", is_flag=True, help="Send nothing; wait for a packet that somebody else sends.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 600),
    metavar="SECONDS",
    help=f"For an answer ({SEND_S:g}, {MOST_SEND_S:g} at most), or for the packet to come ({WAIT_S:g}).",
)
@click.option("--exit-code", is_flag=True, help="End with 1 when it was not answered, or did not pass.")
@output_option
@live_cluster_options
def trace(
    asked: Asked, wait: bool, timeout: float | None, exit_code: bool, output: str, **connection: Any
) -> None:
    """Follow one real packet through the kernel's rules, and tell what each had to do with it.

    SRC and DST are named as for `podwall why`. The agent connects from inside of the Pod SRC, or from the
    node SRC; nothing is needed in the Pod's image. Of a workload, such as deploy/web, the first Pod that runs
    is taken, and it is said which. For an address outside of the cluster, and with --wait, it waits for the
    packet: connect from there yourself meanwhile.

    \b
    podwall trace shop/web svc/api:80
    podwall trace deploy/web db-0:5432 --protocol tcp -o json
    podwall trace 203.0.113.10 node/worker:30080 --timeout 60

    Rules of others are told as well, where they drop the packet. Nothing is left behind, also when
    interrupted or killed.
    """
    click.get_current_context().with_resource(handled(signal.SIGTERM, by=interrupt))
    world = World(asked.snapshot())
    questions = _questions(world, asked.namespace, connection)
    with asked.agents() as agents:
        flow = _flow(world, questions, agents.nodes)
        following = Following(agents, world)
        try:
            verdict, words = _followed(following, flow, wait=wait, timeout_s=timeout)
        except SilentError as error:
            raise Unreachable(printable(str(error))) from error
        except KeyboardInterrupt:
            click.echo("interrupted; nothing is left on the nodes", err=True)
            raise SystemExit(INTERRUPTED) from None
        finally:
            following.close()
    found = account(Names(world), following.heard, (str(flow.target), flow.port), verdict, words)
    content = _content(flow, following, found, verdict)
    show(output, content, lambda: _lines(found, flow.taken, following.notes))
    if exit_code and found.cause not in ("answered", "passed"):
        raise SystemExit(NEGATIVE)


# What to send


def _questions(world: World, namespace: str, connection: Mapping[str, Any]) -> Questions:
    """Raises UsageError."""
    try:
        return asked_about(world, namespace, **connection)
    except UnknownNameError as error:
        raise click.UsageError(printable(str(error))) from error


def _flow(world: World, questions: Questions, agents: Sequence[str]) -> Flow:
    """The packet that is asked for, by the objects; `agents` are the nodes with one. Raises UsageError."""
    try:
        question = one_of(questions, agents)
        answer = why(world, question)
    except CannotAnswerError as error:
        raise click.UsageError(printable(str(error))) from error
    ends = tuple((each.address, each.port) for each, _ in answer.targets)
    flow = _unserved(question, answer, ends) if not answer.legs else _of_leg(question, answer.legs[0], ends)
    return replace(flow, taken=taken_in_words(questions, question))


def _of_leg(question: Question, leg: Leg, ends: tuple[tuple[IPAddress, int], ...]) -> Flow:
    return Flow(question.source, leg.source, leg.target, leg.port, leg.protocol, ends)


def _unserved(question: Question, answer: Answer, ends: tuple[tuple[IPAddress, int], ...]) -> Flow:
    """A packet that nothing of the cluster is there for: sent all the same, where it says enough."""
    targets = (question.address,) if question.address else addresses_of(question.target)
    port = question.port
    for mine, theirs in product(addresses_of(question.source), targets):
        fits = mine.version == theirs.version and question.family in (None, mine.version)
        if fits and isinstance(port, int):
            return Flow(question.source, mine, theirs, port, question.protocol, ends)
    raise click.UsageError(printable(f"no packet can be sent: {answer.sentence}"))


# Following it


def _followed(following: Following, flow: Flow, *, wait: bool, timeout_s: float | None) -> tuple[str, str]:
    """Hear of the packet; where it was sent, what the client saw of it, else "". Raises SilentError."""
    waits = wait or not node_of(flow.source)
    following.open(flow, waits=waits)
    if waits:
        if flow.taken:
            click.echo(printable(flow.taken), err=True)
        following.wait(timeout_s or WAIT_S)
        return "", ""
    return following.send(min(timeout_s or SEND_S, MOST_SEND_S))


@dataclass(slots=True)
class Following:
    """What all agents asked hear of the packet; `close` makes them forget."""

    agents: Agents
    world: World
    heard: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _id: str = field(default_factory=lambda: secrets.token_hex(8))  # of the session on each node
    _asked: list[str] = field(default_factory=list)
    _sender: str = ""

    def open(self, flow: Flow, *, waits: bool) -> None:
        """Mark the packet on every node that it may come by. Raises SilentError without the first."""
        first = node_of(flow.source)
        others = [node for node in self._nodes(flow, waits=waits) if node != first]
        sport: int | None = None
        source = str(flow.address)
        if first:
            body = _sending(flow) if not waits else {"matches": [_to(flow, source)]}
            self._asked.append(first)
            answer = self.agents.ask(first, "trace.open", {"id": self._id, **body})
            self.heard[first] = []
            self._sender = first
            sport, source = answer.get("sport"), answer.get("source", source)
        hiding = self._hiding(flow, others)
        body = {"id": self._id, **_matching(flow, source, sport, hiding)}
        self._asked += others
        for node, answer in self.agents.ask_all("trace.open", body, others).items():
            if isinstance(answer, Silent):
                self.notes.append(f"{node} was not asked: {answer.why}")
            else:
                self.heard[node] = []
        if not self.heard:
            raise SilentError("; ".join(self.notes) or "no node on the packet's way has an agent")

    def send(self, wait_s: float) -> tuple[str, str]:
        """Let the packet go, and hear of it; what the client saw. Raises SilentError."""
        body = {"id": self._id, "wait_s": wait_s}
        answer = self.agents.ask(self._sender, "trace.send", body)
        time.sleep(SETTLE_S)
        self._read()
        return answer["verdict"], answer["words"]

    def wait(self, limit_s: float) -> None:
        """Hear of the first packet that comes."""
        click.echo(f"waiting {limit_s:g} s for the packet: connect now; Ctrl-C ends it", err=True)
        deadline = time.monotonic() + limit_s
        while not any(self.heard.values()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._read()
        time.sleep(SETTLE_S)
        self._read()

    def close(self) -> None:
        """Let every agent forget at once; those that do not hear it forget by themselves."""
        asked, self._asked = self._asked, []
        with suppress(KeyboardInterrupt):
            self.agents.ask_all("trace.close", {"id": self._id}, asked)

    def _read(self) -> None:
        for node, answer in self.agents.ask_all("trace.read", {"id": self._id}, self.heard).items():
            if isinstance(answer, Silent):
                self.notes.append(f"{node} does not tell what it heard: {answer.why}")
                continue
            self.heard[node] += answer["steps"]
            if answer["lost"]:
                self.notes.append(f"{node}: the kernel had to drop a part of its account")

    def _hiding(self, flow: Flow, nodes: Sequence[str]) -> Sequence[str]:
        """The addresses that may take the client's place on the way: those of the nodes it comes in by."""
        entry = node_of(self.world.at(flow.target)) if node_of(flow.source) else ""
        known = self.world.snapshot.nodes
        found = [known[node] for node in nodes if node in known and entry in ("", node)]
        version = flow.target.version
        return [str(ip) for node in found for ip in node.internal_ips if ip.version == version]

    def _nodes(self, flow: Flow, *, waits: bool) -> Sequence[str]:
        """The nodes that the packet may come by."""
        world = self.world
        places = [world.at(address) for address in (flow.target, *(end for end, _ in flow.ends))]
        found = dict.fromkeys(filter(None, map(node_of, places)))
        if waits and not node_of(flow.source):
            found |= dict.fromkeys(self.agents.nodes)
        nodes = [node for node in found if node in self.agents.nodes]
        if len(nodes) > MOST_NODES:
            self.notes.append(
                f"{len(nodes) - MOST_NODES} of {len(nodes)} nodes on its possible way were not asked"
            )
        return nodes[:MOST_NODES]


def _sending(flow: Flow) -> dict[str, Any]:
    pod = flow.source if isinstance(flow.source, Pod) and not flow.source.host_network else None
    return {
        "from": {"namespace": pod.namespace, "name": pod.name} if pod else {},
        "destination": str(flow.target),
        "port": flow.port,
        "protocol": flow.protocol,
    }


def _matching(flow: Flow, source: str, sport: int | None, hiding: Sequence[str]) -> dict[str, Any]:
    """The packet as other nodes meet it: to what was asked or to an endpoint, maybe from a node's address."""
    match = {"protocol": flow.protocol, "source": source}
    ends = [{"destination": str(address), "dport": port} for address, port in flow.ends[:MOST_ENDS]]
    hidden = [{"protocol": flow.protocol, "source": node, **end} for node in hiding for end in ends]
    if sport is not None:
        return {"matches": [{**match, "sport": sport}, *hidden]}
    return {"matches": [_to(flow, source), *({**match, **end} for end in ends), *hidden]}


def _to(flow: Flow, source: str) -> dict[str, Any]:
    return {"protocol": flow.protocol, "source": source, "destination": str(flow.target), "dport": flow.port}


# What is told


def _content(flow: Flow, following: Following, found: Account, verdict: str) -> dict[str, Any]:
    return {
        "source": {"name": title(flow.source), "address": str(flow.address)},
        "destination": {"address": str(flow.target), "port": flow.port, "protocol": flow.protocol},
        "cause": found.cause,
        "sentence": found.sentence,
        "verdict": verdict,
        "steps": [
            {"node": each.node, "stage": each.stage, "ok": each.ok, "text": each.text} for each in found.steps
        ],
        "taken": flow.taken,
        "notes": following.notes,
        "rules": following.heard,
    }


def _lines(found: Account, taken: str, notes: Sequence[str]) -> Iterator[str | Coloured]:
    yield Coloured(found.sentence, "green" if found.cause in ("answered", "passed") else "red")
    if taken:
        yield taken
    node = ""
    width = max((len(each.stage) for each in found.steps), default=0)
    for each in found.steps:
        if each.node != node:
            node = each.node
            yield ""
            yield f"on {node}"
        yield _line(each, width)
    for note in dict.fromkeys(notes):
        yield ""
        yield f"note: {note}"


def _line(of: Told, width: int) -> str:
    return f"  {MARKS[of.ok]}  {of.stage:<{width}}  {of.text}"
