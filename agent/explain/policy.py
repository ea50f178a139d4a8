"""Whether policies let a first packet out of a Pod or into one, and which rule decides. Pure.

    judge(world, "Ingress", packet) --> no policy selects the Pod: open
                                        a rule admits it:          that rule
                                        none does:                 how near each rule came

It asks what the rules of nftables ask, by the same definitions (selectors, peers, named ports and spans of
`agent.compile`), one policy after the other, so that it can name the one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from agent.cluster.model import (
    Direction,
    IPAddress,
    IPBlock,
    NetworkPolicy,
    Pod,
    PolicyPort,
    PolicyRule,
    Problem,
    SelectorPeer,
)
from agent.compile.peers import named_ports, peer_of
from agent.compile.policy import rules_of
from agent.compile.selectors import Selector
from agent.explain.world import World


class Packet(NamedTuple):
    """The first packet of a flow between real addresses; `port` None is a protocol without ports."""

    source: IPAddress
    destination: IPAddress
    protocol: str
    port: int | None


@dataclass(frozen=True, slots=True)
class RuleView:
    """One rule of one policy, and which of its two halves fit the packet."""

    policy: NetworkPolicy
    direction: Direction
    index: int
    rule: PolicyRule
    peer_fits: bool
    port_fits: bool

    @property
    def admits(self) -> bool:
        """Whether it lets the packet pass."""
        return self.peer_fits and self.port_fits

    @property
    def field(self) -> str:
        """Its path in the policy, as kubectl writes it."""
        return f"spec.{self.direction.lower()}[{self.index}]"


class Judgement(NamedTuple):
    """What one direction's policies say of a packet.

    pod: whose policies these are, None when that end is no Pod. reason: why nothing was asked, "" otherwise.
    isolating: the policies that isolate it. rules: all of theirs. audit: what it would be if its policies in
    audit mode were in force too; None where it has none.
    """

    direction: Direction
    pod: Pod | None
    isolating: tuple[NetworkPolicy, ...] = ()
    rules: tuple[RuleView, ...] = ()
    reason: str = ""
    audit: Judgement | None = None

    @property
    def allowed(self) -> bool:
        """Whether the packet may pass."""
        return not self.isolating or bool(self.reason) or any(rule.admits for rule in self.rules)

    @property
    def admitting(self) -> RuleView | None:
        """The first rule that lets it pass."""
        return next((rule for rule in self.rules if rule.admits), None)


def judge(world: World, direction: Direction, packet: Packet) -> Judgement:
    """What the policies of the source's Pod (Egress) or the destination's (Ingress) say of a packet."""
    mine, theirs = packet.source, packet.destination
    if direction == "Ingress":
        mine, theirs = theirs, mine
    pod, other = world.pod_at(mine), world.pod_at(theirs)
    if pod is None:
        return Judgement(direction, None, reason="policies are for Pods")
    selecting = selected_by(world, direction, pod)
    in_force = tuple(policy for policy in selecting if policy.mode == "enforce")
    reason = exempt(world, direction, pod, other, theirs) if selecting else ""

    def by(policies: tuple[NetworkPolicy, ...]) -> Judgement:
        if not policies:
            return Judgement(direction, pod)
        views = tuple(_views(world, direction, policies, packet, (pod, other)))
        return Judgement(direction, pod, policies, views, reason)

    return by(in_force) if in_force == selecting else by(in_force)._replace(audit=by(selecting))


def isolated_by(world: World, direction: Direction, pod: Pod) -> tuple[NetworkPolicy, ...]:
    """The policies that isolate a Pod in a direction, in order of their names; those in audit mode do not."""
    return tuple(policy for policy in selected_by(world, direction, pod) if policy.mode == "enforce")


def selected_by(world: World, direction: Direction, pod: Pod) -> tuple[NetworkPolicy, ...]:
    """The policies that select a Pod for a direction, whatever their mode, in order of their names."""
    policies = sorted(world.snapshot.policies_in(pod.namespace).items())
    return tuple(
        policy
        for _, policy in policies
        if direction in policy.policy_types and Selector(policy.pod_selector).matches(pod.labels)
    )


def exempt(world: World, direction: Direction, pod: Pod, other: Pod | None, theirs: IPAddress) -> str:
    """Why policies are not asked although they select the Pod; "" when they are."""
    if other is not None and other.key == pod.key:
        return "a Pod cannot be cut off from itself"
    node = world.node_at(theirs)
    if direction == "Ingress" and node is not None and node.name == pod.node:
        return "a node always reaches its own Pods"
    return ""


def _views(
    world: World,
    direction: Direction,
    policies: tuple[NetworkPolicy, ...],
    packet: Packet,
    pods: tuple[Pod, Pod | None],
) -> Iterator[RuleView]:
    pod, other = pods
    theirs = packet.source if direction == "Ingress" else packet.destination
    receiver = pod if direction == "Ingress" else other
    for policy in policies:
        for index, rule in enumerate(rules_of(policy, direction)):
            peer = any_peer_fits(world, policy.namespace, rule, theirs, other)
            yield RuleView(policy, direction, index, rule, peer, any_port_fits(rule, packet, receiver))


def any_peer_fits(
    world: World, namespace: str, rule: PolicyRule, theirs: IPAddress, other: Pod | None
) -> bool:
    """Whether an address, and the Pod that has it, is a peer of a rule of a policy in this namespace."""
    if not rule.peers:
        return True
    return any(peer_fits(world, namespace, of, theirs, other) for of in rule.peers)


def peer_fits(
    world: World, namespace: str, of: SelectorPeer | IPBlock | Problem, theirs: IPAddress, other: Pod | None
) -> bool:
    """Whether an address, and the Pod that has it, is one of a rule's peers."""
    if isinstance(of, IPBlock):
        same = of.cidr.version == theirs.version
        return same and theirs in of.cidr and not any(theirs in part for part in of.excepts)
    if isinstance(of, Problem) or other is None:
        return False
    peer = peer_of(namespace, of)
    return _in_scope(world, peer.scope, other) and peer.matches(other)


def _in_scope(world: World, scope: str | Selector | None, pod: Pod) -> bool:
    if isinstance(scope, Selector):
        namespace = world.snapshot.namespaces.get(pod.namespace)
        return namespace is not None and scope.matches(namespace.labels)
    return scope is None or scope == pod.namespace


def any_port_fits(rule: PolicyRule, packet: Packet, receiver: Pod | None) -> bool:
    """Whether a packet goes to a port of a rule; names are the receiving Pod's."""
    if not rule.ports:
        return True
    return any(isinstance(of, PolicyPort) and port_fits(of, packet, receiver) for of in rule.ports)


def port_fits(of: PolicyPort, packet: Packet, receiver: Pod | None) -> bool:
    """Whether a packet goes to a port that a rule names; names are the receiving Pod's."""
    if of.protocol != packet.protocol:
        return False
    if of.port is None:
        return True
    if packet.port is None:
        return False
    first: int | None
    if isinstance(of.port, str):
        first = named_ports(receiver.ports).get((of.protocol, of.port)) if receiver else None
    else:
        first = of.port
    return first is not None and first <= packet.port <= (of.end_port or first)
