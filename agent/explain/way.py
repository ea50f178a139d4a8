"""Why a connection is allowed or denied: one sentence, then the way step by step. Pure.

    who and whom --> the Service's port and endpoints --> egress of the source --> ingress of each endpoint
                       none: why not                         the rule, or how near each came

Answers hold for the first packet of a flow, judged by the objects alone; whether the kernel's rules say the
same is for who can read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.cluster.model import Direction, IPAddress, Pod, Service
from agent.compile.peers import named_ports
from agent.explain import service as services
from agent.explain.policy import Judgement, Packet, RuleView, judge
from agent.explain.question import CannotAnswerError, Question
from agent.explain.remedy import Change, change_for
from agent.explain.service import Target
from agent.explain.words import rule_in_words
from agent.explain.world import Address, End, World, addresses_of, title

Stage = Literal["name", "service", "endpoint", "masquerade", "egress", "ingress"]

DIRECTIONS: tuple[Direction, Direction] = ("Egress", "Ingress")
NEAREST = 3  # rules of a denial that are told


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the way; `ok` is whether the packet comes past it, None when nothing is decided there."""

    stage: Stage
    ok: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the connection can be made; `cause` is a word for what decides, `changes` would allow it."""

    allowed: bool
    cause: str
    sentence: str
    steps: tuple[Step, ...] = ()
    changes: tuple[Change, ...] = ()


def why(world: World, question: Question) -> Answer:
    """The answer for the first family that both ends have. Raises CannotAnswerError."""
    if isinstance(question.source, Service):
        raise CannotAnswerError(f"{title(question.source)} sends nothing: ask about one of its Pods")
    source = _source_address(question)
    frontend = services.frontend(world, question, source)
    ends = Step("name", None, f"{_described(question.source, source)} to {title(question.target)}")
    if isinstance(frontend, services.NoFrontend):
        return Answer(False, frontend.cause, f"denied: {frontend.sentence}", (ends,))
    if frontend is None:
        target = _direct(question, source)
        return _judged(world, question, source, (target,), (ends,))
    return _through(world, question, source, frontend, ends)


def _through(
    world: World, question: Question, source: IPAddress, frontend: services.Frontend, ends: Step
) -> Answer:
    """By a Service: to whichever endpoint it chooses."""
    route = services.route(world, frontend, question.source)
    steps = (ends, Step("service", bool(route.targets), route.sentence))
    if not route.targets:
        return Answer(False, route.cause, f"denied: {route.sentence}", steps)
    answer = _judged(world, question, source, route.targets, steps)
    if answer.allowed and route.doubt:
        return Answer(False, "target-port", f"doubtful: {route.doubt}", answer.steps)
    return answer


# Ends


def _source_address(question: Question) -> IPAddress:
    mine = addresses_of(question.source)
    theirs = (question.address,) if question.address else addresses_of(question.target)
    families = {each.version for each in theirs} or {4, 6}
    wanted = families if question.family is None else families & {question.family}
    for address in mine:
        if address.version in wanted:
            return address
    if not mine:
        raise CannotAnswerError(f"{title(question.source)} has no address yet")
    raise CannotAnswerError(f"{title(question.source)} and {title(question.target)} share no address family")


def _described(end: End, address: IPAddress) -> str:
    where = f" on {end.node}" if isinstance(end, Pod) and end.node else ""
    return str(end) if isinstance(end, Address) else f"{title(end)} ({address}){where}"


def _direct(question: Question, source: IPAddress) -> Target:
    """The target itself, at its own port. Raises CannotAnswerError."""
    target = question.target
    for address in (question.address,) if question.address else addresses_of(target):
        if address.version == source.version:
            return Target(address, _port_of(target, question), title(target))
    raise CannotAnswerError(f"{title(target)} has no IPv{source.version} address yet")


def _port_of(target: End, question: Question) -> int:
    port = question.port
    if isinstance(port, int):
        return port
    ports = named_ports(target.ports) if isinstance(target, Pod) else {}
    if isinstance(port, str):
        if (question.protocol, port) in ports:
            return ports[question.protocol, port]
        raise CannotAnswerError(f"{title(target)} has no {question.protocol} port named {port!r}")
    if isinstance(target, Pod):
        declared = sorted({each.port for each in target.ports if each.protocol == question.protocol})
        if len(declared) == 1:
            return declared[0]
        said = f" (it declares {', '.join(map(str, declared))})" if declared else ""
        raise CannotAnswerError(f"which port of {title(target)}?{said} Write it as {target.name}:PORT")
    raise CannotAnswerError(f"which port of {title(target)}? Write it as NAME:PORT")


# Judgement


def _judged(
    world: World,
    question: Question,
    source: IPAddress,
    targets: Sequence[Target],
    before: tuple[Step, ...],
) -> Answer:
    """What the policies say of each target; allowed when at least one may be reached."""
    views = [_View.of(world, question, source, target) for target in targets]
    open_ones = [view for view in views if view.allowed]
    shown = (open_ones or views)[0]
    steps = (*before, *(step for view in _distinct(views) for step in view.steps()))
    what = f"{question.protocol} {shown.packet.port}"
    if not open_ones:
        denial = shown.denial
        changes = tuple(change for change in shown.changes(world) if change is not None)
        return Answer(
            False, f"{denial.direction.lower()}-denied", _denied(shown, denial, what), steps, changes
        )
    if len(open_ones) < len(views):
        text = f"allowed in part: {len(open_ones)} of {len(views)} endpoints let it in on {what}"
        return Answer(True, "policy-part", text, steps)
    return Answer(True, "allowed", _allowed(shown, what), steps)


@dataclass(frozen=True, slots=True)
class _View:
    """One packet to one target, and what both directions' policies say of it."""

    source: str
    target: Target
    packet: Packet
    judgements: tuple[Judgement, ...]

    @classmethod
    def of(cls, world: World, question: Question, source: IPAddress, target: Target) -> _View:
        packet = Packet(source, target.address, question.protocol, target.port)
        egress = judge(world, "Egress", packet)
        seen = packet._replace(source=target.seen_source or source)
        ingress = judge(world, "Ingress", seen)
        return cls(title(question.source), target, seen, (egress, ingress))

    @property
    def allowed(self) -> bool:
        return all(each.allowed for each in self.judgements)

    @property
    def denial(self) -> Judgement:
        return next(each for each in self.judgements if not each.allowed)

    def changes(self, world: World) -> Iterator[Change | None]:
        for each in self.judgements:
            yield change_for(world, each, self.packet)

    def steps(self) -> Iterator[Step]:
        if self.target.seen_source is not None:
            yield Step(
                "masquerade", None, f"its source becomes {self.target.seen_source}: {self.target.reason}"
            )
        for each in self.judgements:
            if each.pod is not None:
                yield Step(_stage(each.direction), each.allowed, _said(each))


def _stage(direction: Direction) -> Stage:
    return "egress" if direction == "Egress" else "ingress"


def _distinct(views: Sequence[_View]) -> Iterator[_View]:
    """One view of those that are judged alike: the replicas of one workload mostly are."""
    seen: set[tuple[object, ...]] = set()
    for view in views:
        kind = tuple((each.allowed, tuple(of.key for of in each.isolating)) for each in view.judgements)
        if kind not in seen:
            seen.add(kind)
            yield view


def _said(of: Judgement) -> str:
    pod = title(of.pod) if of.pod else ""
    if not of.isolating:
        return f"allowed: no policy isolates {pod} for {of.direction.lower()}"
    if of.reason:
        return f"allowed: {of.reason}"
    if of.admitting:
        return f"allowed: {_named(of.admitting)} admits it ({rule_in_words(of.admitting.rule, of.direction)})"
    names = ", ".join("/".join(policy.key) for policy in of.isolating)
    near = "; ".join(map(_miss, _nearest(of)))
    return f"denied: {pod} is isolated by {names}" + (f"; {near}" if near else ", which admits nothing")


def _nearest(of: Judgement) -> list[RuleView]:
    return sorted(of.rules, key=lambda rule: not (rule.peer_fits or rule.port_fits))[:NEAREST]


def _miss(rule: RuleView) -> str:
    """Why a rule did not fit."""
    said = rule_in_words(rule.rule, rule.direction)
    half = (
        "the port does not fit"
        if rule.peer_fits
        else "the peer does not fit"
        if rule.port_fits
        else "neither fits"
    )
    return f"{_named(rule)} is {said}: {half}"


def _named(rule: RuleView) -> str:
    return f"{'/'.join(rule.policy.key)} {rule.field}"


def _denied(view: _View, denial: Judgement, what: str) -> str:
    names = ", ".join("/".join(policy.key) for policy in denial.isolating)
    policies = f"{'policy' if len(denial.isolating) == 1 else 'policies'} {names}"
    theirs = view.target.title
    if denial.direction == "Egress":
        return f"denied: egress {policies} of {view.source} does not let it out to {theirs} on {what}"
    return f"denied: ingress {policies} of {theirs} does not let {view.source} in on {what}"


def _allowed(view: _View, what: str) -> str:
    rules = [each.admitting for each in view.judgements if each.isolating and not each.reason]
    by = " and ".join(_named(rule) for rule in rules if rule is not None)
    reason = f"by {by}" if by else "no policy isolates either end in this direction"
    return f"allowed: {view.source} may connect to {view.target.title} on {what} ({reason})"
