"""A policy as something to draw: the Pods it selects, who may reach them, whom they may reach. Pure.

    peers --ports--> [ selected Pods ] --ports--> peers
    ingress rules                                 egress rules

A direction that the policy says nothing about is not restricted by it.
"""

from __future__ import annotations

from typing import Any

from agent.cluster.model import Direction, IPBlock, NetworkPolicy, Pod, PolicyRule, Problem, SelectorPeer
from agent.compile.policy import rules_of
from agent.compile.selectors import Selector
from agent.explain.policy import peer_fits
from agent.explain.words import peer_in_words, pods_in_words, port_in_words
from agent.explain.world import World
from agent.ui.entities import on_pod_network, pod_id
from agent.ui.manifest import policy_text

MOST_PODS = 60


def drawing(world: World, policy: NetworkPolicy) -> dict[str, Any]:
    """The drawing of one policy, with its manifest."""
    selector = Selector(policy.pod_selector)
    selected = [
        pod
        for pod in on_pod_network(world.snapshot)
        if pod.namespace == policy.namespace and selector.matches(pod.labels)
    ]
    return {
        "key": "/".join(policy.key),
        "namespace": policy.namespace,
        "name": policy.name,
        "selects": f"{pods_in_words(policy.pod_selector)} of namespace {policy.namespace}",
        "selected": _members(selected),
        "ingress": _direction(world, policy, "Ingress"),
        "egress": _direction(world, policy, "Egress"),
        "audit": policy.mode == "audit",
        "problems": [*map(str, policy.problems)],
        "manifest": policy_text(policy),
    }


def _direction(world: World, policy: NetworkPolicy, direction: Direction) -> dict[str, Any]:
    isolates = direction in policy.policy_types
    rules = rules_of(policy, direction) if isolates else ()
    return {
        "isolates": isolates,
        "rules": [_rule(world, policy, direction, *each) for each in enumerate(rules)],
    }


def _rule(
    world: World, policy: NetworkPolicy, direction: Direction, index: int, rule: PolicyRule
) -> dict[str, Any]:
    return {
        "field": f"spec.{direction.lower()}[{index}]",
        "ports": [port_in_words(port) for port in rule.ports or ()] or ["every port"],
        "peers": [_peer(world, policy, peer) for peer in rule.peers or ()]
        or [{"kind": "everybody", "words": "everybody", "pods": _members([])}],
    }


def _peer(world: World, policy: NetworkPolicy, of: SelectorPeer | IPBlock | Problem) -> dict[str, Any]:
    kind = {SelectorPeer: "pods", IPBlock: "block", Problem: "problem"}[type(of)]
    pods = [
        pod
        for pod in on_pod_network(world.snapshot)
        if any(peer_fits(world, policy.namespace, of, ip, pod) for ip in pod.ips)
    ]
    return {"kind": kind, "words": peer_in_words(of), "pods": _members(pods)}


def _members(pods: list[Pod]) -> dict[str, Any]:
    return {"total": len(pods), "ids": [pod_id(pod) for pod in pods[:MOST_PODS]]}
