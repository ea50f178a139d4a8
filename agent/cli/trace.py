"""`podwall trace SRC DST[:PORT]`: one real packet, followed through the rules of the nodes on its way.

    source's node   a socket in the Pod's namespace, its packets marked --+
    other nodes     the same flow marked as it comes in                   +--> connect --> what each rule did
    the end, however it comes: every agent forgets, and the kernel with it

An end outside of the cluster cannot be made to send: the packet is waited for then.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import click

from agent.cli.agents import Agents, Silent, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, cluster_options
from agent.cli.output import NEGATIVE, Coloured, output_option, show
from agent.cli.signals import handled, interrupt
from agent.cli.why import as_address, split_port
from agent.cluster.model import Family, IPAddress, Pod, Protocol
from agent.explain.answer import Answer
from agent.explain.observed import Names
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
_PROTOCOLS: dict[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}
_FAMILIES: dict[str | None, Family] = {"4": 4, "6": 6}
_MARKS = {True: "ok", False: "no", None: "  "}


@dataclass(frozen=True, slots=True)
class Flow:
    """Which packet: from whom and to what, as it leaves the client; `ends` are where it may arrive."""

    source: End
    address: IPAddress
    target: IPAddress
    port: int
    protocol: Protocol
    ends: tuple[tuple[IPAddress, int], ...] = ()


@click.command("trace")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST[:PORT]")
@click.option("--protocol", type=click.Choice(["tcp", "udp", "sctp"], case_sensitive=False), default="tcp")
@click.option("--family", type=click.Choice(["4", "6"]), help="IPv4 or IPv6; else the first both ends have.")
@click.option("--wait", is_flag=True, help="Send nothing; wait for a packet that somebody else sends.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 600),
    metavar="SECONDS",
    help=f"For an answer ({SEND_S:g}, {MOST_SEND_S:g} at most), or for the packet to come ({WAIT_S:g}).",
)
@click.option("--exit-code", is_flag=True, help="End with 1 when it was not answered, or did not pass.")
@output_option
@cluster_options
def trace(asked: Asked, source: str, target: str, output: str, **options: Any) -> None:
    """Follow one real packet through the kernel's rules, and tell what each had to do with it.

    SRC and DST are named as for `podwall why`. The agent connects from inside of the Pod SRC, or from the
    node SRC; nothing is needed in the Pod's image. For an address outside of the cluster, and with --wait, it
    waits for the packet: connect from there yourself meanwhile.

    \b
    podwall trace shop/web svc/api:80
    podwall trace web db-0:5432 --protocol tcp -o json
    podwall trace 203.0.113.10 node/worker:30080 --timeout 60

    Rules of others are told as well, where they drop the packet. Nothing is left behind, also when
    interrupted or killed.
    """
    if not asked.live:
        raise click.UsageError("a packet needs a cluster, not manifests: leave -f away; `podwall why` can")
    click.get_current_context().with_resource(handled(signal.SIGTERM, by=interrupt))
    world = World(asked.snapshot())
    flow = _flow(world, asked.namespace, source, target, options)
    waits = options["wait"] or not node_of(flow.source)
    with asked.agents() as agents:
        following = Following(agents, world)
        try:
            following.open(flow, waits=waits)
            verdict, words = "", ""
            if waits:
                following.wait(options["timeout"] or WAIT_S)
            else:
                verdict, words = following.send(min(options["timeout"] or SEND_S, MOST_SEND_S))
            to = str(flow.target), flow.port
            found = account(Names(world), following.heard, to, verdict, words)
        except SilentError as error:
            raise Unreachable(printable(str(error))) from error
        except KeyboardInterrupt:
            click.echo("interrupted; nothing is left on the nodes", err=True)
            raise SystemExit(INTERRUPTED) from None
        finally:
            following.close()
    content = _content(flow, following, found, verdict)
    show(output, content, lambda: _lines(found, following.notes))
    if options["exit_code"] and found.cause not in ("answered", "passed"):
        raise SystemExit(NEGATIVE)


# What to send


def _flow(world: World, namespace: str, source: str, target: str, options: Mapping[str, Any]) -> Flow:
    """The packet that is asked for, by the objects. Raises UsageError."""
    name, port = split_port(target)
    try:
        question = Question(
            source=world.named(source, namespace),
            target=world.named(name, namespace),
            port=port,
            protocol=_PROTOCOLS[options["protocol"].lower()],
            family=_FAMILIES.get(options["family"]),
            address=as_address(name),
        )
        answer = why(world, question)
    except (UnknownNameError, CannotAnswerError) as error:
        raise click.UsageError(printable(str(error))) from error
    ends = tuple((each.address, each.port) for each, _ in answer.targets)
    if answer.legs:
        leg = answer.legs[0]
        return Flow(question.source, leg.source, leg.target, leg.port, leg.protocol, ends)
    return _unserved(question, answer, ends)


def _unserved(question: Question, answer: Answer, ends: tuple[tuple[IPAddress, int], ...]) -> Flow:
    """A packet that nothing of the cluster is there for: sent all the same, where it says enough."""
    targets = (question.address,) if question.address else addresses_of(question.target)
    for mine in addresses_of(question.source):
        for theirs in targets:
            fits = question.family in (None, mine.version)
            if (
                fits
                and theirs is not None
                and mine.version == theirs.version
                and isinstance(question.port, int)
            ):
                return Flow(question.source, mine, theirs, question.port, question.protocol, ends)
    raise click.UsageError(printable(f"no packet can be sent: {answer.sentence}"))


# Following it


@dataclass(slots=True)
class Following:
    """What all agents asked hear of the packet; `close` makes them forget."""

    agents: Agents
    world: World
    heard: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _sessions: dict[str, str] = field(default_factory=dict)
    _sender: str = ""

    def open(self, flow: Flow, *, waits: bool) -> None:
        """Mark the packet on every node that it may come by. Raises SilentError without the first."""
        first = node_of(flow.source)
        others = [node for node in self._nodes(flow, waits=waits) if node != first]
        sport: int | None = None
        source = str(flow.address)
        if first:
            body = _sending(flow) if not waits else {"matches": [_to(flow, source)]}
            answer = self.agents.ask(first, "trace.open", body)
            self._opened(first, answer)
            self._sender = first
            sport, source = answer.get("sport"), answer.get("source", source)
        hiding = self._hiding(flow, others)
        bodies = {node: _matching(flow, source, sport, hiding) for node in others}
        for node, answer in self.agents.ask_each("trace.open", bodies).items():
            if isinstance(answer, Silent):
                self.notes.append(f"{node} was not asked: {answer.why}")
            else:
                self._opened(node, answer)
        if not self._sessions:
            raise SilentError("; ".join(self.notes) or "no node on the packet's way has an agent")

    def send(self, wait_s: float) -> tuple[str, str]:
        """Let the packet go, and hear of it; what the client saw. Raises SilentError."""
        body = {"id": self._sessions[self._sender], "wait_s": wait_s}
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
        bodies = {node: {"id": session} for node, session in self._sessions.items()}
        self._sessions = {}
        with suppress(KeyboardInterrupt):
            self.agents.ask_each("trace.close", bodies)

    def _opened(self, node: str, answer: Mapping[str, Any]) -> None:
        self._sessions[node] = answer["id"]
        self.heard[node] = []

    def _read(self) -> None:
        bodies = {node: {"id": session} for node, session in self._sessions.items()}
        for node, answer in self.agents.ask_each("trace.read", bodies).items():
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
        "notes": following.notes,
        "rules": following.heard,
    }


def _lines(found: Account, notes: Sequence[str]) -> Iterator[str | Coloured]:
    yield Coloured(found.sentence, "green" if found.cause in ("answered", "passed") else "red")
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
    return f"  {_MARKS[of.ok]}  {of.stage:<{width}}  {of.text}"
