"""How near a rule came that did not admit a packet, and where the policy that would have stands. Pure.

peer   namespaceSelector asks for team=web, but namespace shop has team=frontend
       podSelector asks for app=friend, but Pod shop/client has app=client
       without a namespaceSelector it means Pods of namespace shop, but Pod web/client is in another
port   it admits TCP 80, the Service's port: policies see the Pod's, 8080
       its port 'metrics' is a name that no container of Pod shop/web declares
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from agent.cluster.model import (
    IPAddress,
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    Problem,
    Requirement,
)
from agent.compile.peers import named_ports
from agent.compile.selectors import Selector
from agent.explain.policy import Judgement, Packet, RuleView, judge
from agent.explain.words import port_in_words
from agent.explain.world import Address, World, title

MOST_REASONS = 2


def nearest(of: Judgement) -> list[RuleView]:
    """The rules of a denial, those first of which one half fits, of these the ones whose ports do."""
    return sorted(of.rules, key=lambda rule: (not rule.port_fits, not rule.peer_fits))


def miss(world: World, rule: RuleView, packet: Packet, asked_port: int | None = None) -> str:
    """Why a rule did not admit a packet; `asked_port` is the Service's port by which it came, if any."""
    reasons = []
    if not rule.peer_fits:
        reasons.append(_peers_miss(world, rule, packet))
    if not rule.port_fits:
        reasons.append(_ports_miss(world, rule, packet, asked_port))
    return " and ".join(reasons)


def elsewhere(world: World, judgement: Judgement, packet: Packet) -> NetworkPolicy | None:
    """A policy that would admit the packet in the Pod's namespace, and selects no Pod where it stands."""
    pod = judgement.pod
    if pod is None:
        return None
    for key, policy in sorted(world.snapshot.policies.items()):
        if policy.namespace == pod.namespace or judgement.direction not in policy.policy_types:
            continue
        selector = Selector(policy.pod_selector)
        if not selector.matches(pod.labels) or _selects_any(world, policy.namespace, selector):
            continue
        moved = replace(policy, namespace=pod.namespace)
        alone = replace(
            world.snapshot,
            policies={key: moved},
            policies_by_namespace={pod.namespace: {(pod.namespace, policy.name): moved}},
        )
        if judge(replace(world, snapshot=alone), judgement.direction, packet).allowed:
            return policy
    return None


def _selects_any(world: World, namespace: str, selector: Selector) -> bool:
    return any(selector.matches(each.labels) for each in world.snapshot.pods_in(namespace).values())


# Peers


def _peers_miss(world: World, rule: RuleView, packet: Packet) -> str:
    theirs = packet.source if rule.direction == "Ingress" else packet.destination
    other = world.pod_at(theirs)
    said = dict.fromkeys(
        _peer_miss(world, rule.policy.namespace, of, theirs, other) for of in rule.rule.peers or ()
    )
    return _some(said)


def _peer_miss(
    world: World, namespace: str, of: PolicyPeer | Problem, theirs: IPAddress, other: Pod | None
) -> str:
    if isinstance(of, Problem):
        return f"one of its peers cannot be used ({of})"
    if isinstance(of, IPBlock):
        part = next((part for part in of.excepts if theirs in part), None) if theirs in of.cidr else None
        return (
            f"its ipBlock {of.cidr} excepts {part}" if part else f"{theirs} is not in its ipBlock {of.cidr}"
        )
    if other is None:
        who = title(world.node_at(theirs) or Address(theirs))
        return f"it selects Pods, and {who} is none"
    reasons = []
    if of.namespace_selector is not None:
        labels = world.snapshot.namespaces[other.namespace].labels if _known(world, other) else {}
        wrong = differing(of.namespace_selector, labels)
        if wrong:
            reasons.append(
                f"its namespaceSelector asks for {wrong[0]}, but namespace {other.namespace} has {wrong[1]}"
            )
    elif other.namespace != namespace:
        reasons.append(
            f"without a namespaceSelector it means Pods of namespace {namespace}, "
            f"but {title(other)} is in another"
        )
    if of.pod_selector is not None and (wrong := differing(of.pod_selector, other.labels)):
        reasons.append(f"its podSelector asks for {wrong[0]}, but {title(other)} has {wrong[1]}")
    return " and ".join(reasons) or "its peer does not fit"


def _known(world: World, pod: Pod) -> bool:
    return pod.namespace in world.snapshot.namespaces


def differing(selector: LabelSelector, labels: Mapping[str, str]) -> tuple[str, str] | None:
    """What of a selector does not hold for these labels, and what they have instead; None when all holds."""
    wrong = [of for of in Selector(selector).requirements if not _holds(of, labels)]
    if not wrong:
        return None
    keys = dict.fromkeys(of.key for of in wrong)
    has = [f"{key}={labels[key]}" if key in labels else f"no label {key}" for key in keys]
    return str(_only(wrong)), ", ".join(has)


def _only(wrong: Iterable[Requirement]) -> Selector:
    return Selector(LabelSelector(match_expressions=tuple(wrong)))


def _holds(of: Requirement, labels: Mapping[str, str]) -> bool:
    return _only((of,)).matches(labels)


# Ports


def _ports_miss(world: World, rule: RuleView, packet: Packet, asked_port: int | None) -> str:
    receiver = world.pod_at(packet.destination)
    said = list(_said_of_ports(rule.rule.ports or (), packet, receiver, asked_port))
    if said:
        return _some(dict.fromkeys(said))
    admits = " or ".join(port_in_words(of) for of in (rule.rule.ports or ())[:MOST_REASONS])
    return f"it is for {admits} only"


def _said_of_ports(
    ports: Iterable[PolicyPort | Problem], packet: Packet, receiver: Pod | None, asked_port: int | None
) -> Iterator[str]:
    for of in ports:
        if isinstance(of, Problem):
            yield f"one of its ports cannot be used ({of})"
        elif of.protocol != packet.protocol:
            continue
        elif isinstance(of.port, str) and receiver is not None:
            if (of.protocol, of.port) not in named_ports(receiver.ports):
                yield f"its port {of.port!r} is a name that no container of {title(receiver)} declares"
        elif of.port == asked_port and asked_port != packet.port:
            yield f"it is for port {of.port}, the Service's, while policies see the Pod's port {packet.port}"


def _some(reasons: Iterable[str]) -> str:
    said = list(reasons)
    more = f", and {len(said) - MOST_REASONS} more reasons" if len(said) > MOST_REASONS else ""
    return " and ".join(said[:MOST_REASONS]) + more
