"""What policies say of a first packet to each place where it may end, in one answer. Pure.

packet, endpoints --judge--> a view of each: egress, ingress --> the sentence, steps and changes
                                                             --> what each node's rules have to do (legs)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agent.cluster.model import IPAddress
from agent.compile.endpoints import Backend
from agent.explain.answer import Answer, Stage, Step
from agent.explain.fields import Field
from agent.explain.legs import Leg
from agent.explain.near import elsewhere, miss, nearest
from agent.explain.policy import Judgement, Packet, RuleView, judge
from agent.explain.question import Question
from agent.explain.remedy import Change, change_for
from agent.explain.route import Target
from agent.explain.words import rule_in_words
from agent.explain.world import World, is_node, node_of, title

NEAREST = 3  # rules of a denial that are told
MOST_LEGS = 8  # nodes that are asked about one connection


@dataclass(frozen=True, slots=True)
class Sent:
    """A first packet as it is sent: from whom, to what; node `entry` chooses its end, "" is unknown."""

    question: Question
    source: IPAddress
    entry: str
    address: IPAddress | None
    number: int
    sticky: bool = False

    @property
    def own(self) -> str:
        """The node that sends it, "" for who is outside."""
        return node_of(self.question.source)

    @property
    def asks_another(self) -> bool:
        """Whether the sender's node lets it through as it is, to the one that chooses its end."""
        return bool(self.own and self.entry) and self.own != self.entry and self.address is not None

    def leg(
        self,
        ends: dict[Backend, bool],
        *,
        silent: bool = False,
        node: str = "",
        seen: IPAddress | None = None,
    ) -> Leg:
        """What a node has to do, by default the one that chooses the end; seen: its sender there."""
        assert self.address is not None
        local = is_node(self.question.source) and self.own == (node or self.entry)
        return Leg(
            node=node or self.entry,
            source=seen or self.source,
            target=self.address,
            port=self.number,
            protocol=self.question.protocol,
            ends=ends,
            local=local,
            sticky=self.sticky,
            silent=silent,
        )


def judged(world: World, way: Sent, targets: Sequence[Target], before: tuple[Step, ...]) -> Answer:
    """What the policies say of each target; allowed when at least one may be reached."""
    views = [_View.of(world, way, target) for target in targets]
    open_ones = [view for view in views if view.allowed]
    shown = (open_ones or views)[0]
    what = f"{way.question.protocol} {shown.packet.port}"
    told = Answer(
        allowed=bool(open_ones),
        cause="allowed",
        sentence="",
        steps=(*before, *(step for view in _distinct(views) for step in view.steps(world))),
        legs=tuple(_legs(way, views)),
        targets=tuple((view.target, view.allowed) for view in views),
    )
    if not open_ones:
        changes = tuple(change for change in shown.changes(world) if change is not None)
        cause = f"{shown.denial.direction.lower()}-denied"
        denial = _denial(shown, what)
        sentence = f"denied: {denial}{_because(world, shown)}"
        return replace(told, cause=cause, sentence=sentence, changes=changes, denial=denial)
    if len(open_ones) < len(views):
        text = f"allowed in part: {len(open_ones)} of {len(views)} endpoints let it in on {what}"
        return replace(told, cause="policy-part", sentence=text)
    return replace(told, sentence=_allowed(shown, what))


def kept_in(world: World, way: Sent, before: tuple[Step, ...]) -> Answer | None:
    """The denial of a packet that does not come to the node that would choose its end; None: it comes."""
    if not way.asks_another or way.address is None:
        return None
    node = Target(way.address, way.number, title(way.question.target))
    answer = judged(world, way, (node,), before)
    return None if answer.allowed else replace(answer, legs=answer.legs[:1])


@dataclass(frozen=True, slots=True)
class _View:
    """One packet to one target, and what both directions' policies say of it."""

    source: str
    target: Target
    packet: Packet
    asked_port: int
    judgements: tuple[Judgement, ...]

    @classmethod
    def of(cls, world: World, way: Sent, target: Target) -> _View:
        packet = Packet(way.source, target.address, way.question.protocol, target.port)
        leaves = packet
        if way.asks_another and way.address is not None:
            leaves = packet._replace(destination=way.address, port=way.number)
        egress = judge(world, "Egress", leaves)
        seen = packet._replace(source=target.seen_source or way.source)
        ingress = judge(world, "Ingress", seen)
        return cls(title(way.question.source), target, seen, way.number, (egress, ingress))

    @property
    def allowed(self) -> bool:
        return all(each.allowed for each in self.judgements)

    @property
    def denial(self) -> Judgement:
        return next(each for each in self.judgements if not each.allowed)

    def allowed_on(self, node: str) -> bool:
        """Whether the Pods of this node, alone, let it pass."""
        return all(each.allowed for each in self.judgements if each.pod is not None and each.pod.node == node)

    @property
    def home(self) -> str:
        """The node of the Pod that it ends at, "" for no Pod."""
        pod = self.judgements[1].pod
        return pod.node if pod is not None else ""

    def changes(self, world: World) -> Iterator[Change | None]:
        for each in self.judgements:
            yield change_for(world, each, self.packet)

    def steps(self, world: World) -> Iterator[Step]:
        if self.target.seen_source is not None:
            yield Step(
                "masquerade", None, f"its source becomes {self.target.seen_source}: {self.target.reason}"
            )
        for each in self.judgements:
            if each.pod is not None:
                stage: Stage = "egress" if each.direction == "Egress" else "ingress"
                yield Step(stage, each.allowed, self._said(world, each), tuple(_decides(each)))
            if each.audit is not None:
                said = f"with {_audited(each.audit)} enforced: {self._said(world, each.audit)}"
                yield Step("audit", None, said, tuple(_decides(each.audit)))

    def _said(self, world: World, of: Judgement) -> str:
        pod = title(of.pod) if of.pod else ""
        if not of.isolating:
            return f"allowed: no policy isolates {pod} for {of.direction.lower()}"
        if of.reason:
            return f"allowed: {of.reason}"
        if of.admitting:
            said = rule_in_words(of.admitting.rule, of.direction)
            return f"allowed: {_named(of.admitting)} admits it ({said})"
        names = ", ".join("/".join(policy.key) for policy in of.isolating)
        near = "; ".join(
            f"{_named(rule)} is {rule_in_words(rule.rule, rule.direction)}: {self.misses(world, rule)}"
            for rule in nearest(of)[:NEAREST]
        )
        return f"denied: {pod} is isolated by {names}" + (f"; {near}" if near else ", which admits nothing")

    def misses(self, world: World, rule: RuleView) -> str:
        """Why a rule does not admit it."""
        return miss(world, rule, self.packet, self.asked_port)


def _legs(way: Sent, views: Sequence[_View]) -> Iterator[Leg]:
    """The node that chooses the end, then those of the Pods where it may end."""
    question = way.question
    first = views[0]
    seen: set[str] = {way.entry}
    if way.asks_another and way.address is not None:
        seen.add(way.own)
        yield way.leg({(way.address, way.number): first.allowed_on(way.own)}, node=way.own)
    if way.entry and way.address is not None:
        ends = {(each.target.address, each.target.port): each.allowed_on(way.entry) for each in views}
        as_it_comes = way.asks_another or way.address == first.target.address
        yield way.leg(ends, seen=first.target.seen_source if as_it_comes else None)
    for view in views:
        if view.home and view.home not in seen and len(seen) <= MOST_LEGS:
            seen.add(view.home)
            end = view.target.address, view.target.port
            allowed = {end: view.allowed_on(view.home)}
            yield Leg(view.home, view.packet.source, *end, question.protocol, allowed)


def _decides(of: Judgement) -> Iterator[Field]:
    """The rule that admits it; else the rules that came nearest, or the policies without any."""
    if not of.isolating or of.reason:
        return
    rules = [of.admitting] if of.admitting else nearest(of)[:NEAREST]
    for rule in rules:
        yield Field("NetworkPolicy", *rule.policy.key, ("spec", rule.direction.lower(), rule.index))
    if not rules:
        for policy in of.isolating:
            yield Field("NetworkPolicy", *policy.key, ("spec", "podSelector"))


def _distinct(views: Sequence[_View]) -> Iterator[_View]:
    """One view of those that are judged alike: the replicas of one workload mostly are."""
    seen: set[tuple[object, ...]] = set()
    for view in views:
        kind = tuple(
            (of.allowed, tuple(each.key for each in of.isolating))
            for each in view.judgements
            for of in (each, each.audit)
            if of is not None
        )
        if kind not in seen:
            seen.add(kind)
            yield view


def _named(rule: RuleView) -> str:
    return f"{'/'.join(rule.policy.key)} {rule.field}"


def _audited(of: Judgement) -> str:
    """The policies in audit mode among those of a judgement."""
    return ", ".join("/".join(policy.key) for policy in of.isolating if policy.mode == "audit")


def _denial(view: _View, what: str) -> str:
    denial = view.denial
    names = ", ".join("/".join(policy.key) for policy in denial.isolating)
    policies = f"{'policy' if len(denial.isolating) == 1 else 'policies'} {names}"
    theirs, does = view.target.title, "does not" if len(denial.isolating) == 1 else "do not"
    if denial.direction == "Egress":
        return f"egress {policies} of {view.source} {does} let it out to {theirs} on {what}"
    return f"ingress {policies} of {theirs} {does} let {view.source} in on {what}"


def _because(world: World, view: _View) -> str:
    """What is wrong, where one thing alone is: a policy that stands elsewhere, or a rule that nearly fits."""
    denial = view.denial
    if moved := elsewhere(world, denial, view.packet):
        return (
            f"; {'/'.join(moved.key)} would, but it stands in namespace {moved.namespace}, "
            f"where it selects no Pod, not in {denial.pod.namespace if denial.pod else ''}"
        )
    rule = _the_nearest(denial)
    return f": {_of_rule(denial, rule)}{view.misses(world, rule)}" if rule else ""


def _the_nearest(denial: Judgement) -> RuleView | None:
    """The rule that was meant for this, if one alone can be: by its port, else by its peers."""
    rules = nearest(denial)
    for meant in (
        [rule for rule in rules if rule.port_fits and rule.rule.ports],
        [rule for rule in rules if rule.peer_fits or rule.port_fits],
        rules,
    ):
        if len(meant) == 1:
            return meant[0]
    return None


def _of_rule(denial: Judgement, rule: RuleView) -> str:
    return "" if len(denial.isolating) == 1 else f"of {'/'.join(rule.policy.key)}, "


def _allowed(view: _View, what: str) -> str:
    rules = [each.admitting for each in view.judgements if each.isolating and not each.reason]
    by = " and ".join(_named(rule) for rule in rules if rule is not None)
    reason = f"by {by}" if by else "no policy isolates either end in this direction"
    would = next((each.audit for each in view.judgements if each.audit and not each.audit.allowed), None)
    but = f"; it would be denied if {_audited(would)} were enforced (audit mode)" if would else ""
    return f"allowed: {view.source} may connect to {view.target.title} on {what} ({reason}){but}"
