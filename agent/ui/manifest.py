"""A policy written as the manifest it may have come from, so that it can be read and edited. Pure.

Everything that decides is written; labels, annotations and fields that podwall could not use are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from agent.cluster.model import (
    MODE_ANNOTATION,
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    PolicyPort,
    PolicyRule,
    Problem,
    SelectorPeer,
)


def policy_text(policy: NetworkPolicy) -> str:
    """The policy as YAML; what could not be used of it stands at its head as comments."""
    head = "".join(f"# cannot be used: {_one_line(str(problem))}\n" for problem in policy.problems)
    return f"{head}{written(policy_document(policy))}"


def written(document: Mapping[str, Any]) -> str:
    """A document as YAML."""
    return str(yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=False))


def policy_document(policy: NetworkPolicy) -> dict[str, Any]:
    """The policy as plain data."""
    spec: dict[str, Any] = {
        "podSelector": _selector(policy.pod_selector),
        "policyTypes": sorted(policy.policy_types, reverse=True),
    }
    if ingress := [_rule(rule, "from") for rule in policy.ingress if _admits(rule)]:
        spec["ingress"] = ingress
    if egress := [_rule(rule, "to") for rule in policy.egress if _admits(rule)]:
        spec["egress"] = egress
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": policy.namespace, "name": policy.name, **_mode(policy)},
        "spec": spec,
    }


def _mode(policy: NetworkPolicy) -> dict[str, Any]:
    return {"annotations": {MODE_ANNOTATION: policy.mode}} if policy.mode != "enforce" else {}


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _admits(rule: PolicyRule) -> bool:
    """Whether it lets anything pass: an empty list admits everybody, one that nothing is left of nobody."""
    return all(not members or _usable(members) for members in (rule.peers, rule.ports))


def _rule(rule: PolicyRule, peers: str) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if rule.peers:
        written[peers] = [_peer(peer) for peer in _usable(rule.peers)]
    if rule.ports:
        written["ports"] = [_port(port) for port in _usable(rule.ports)]
    return written


def _usable(members: Iterable[Any]) -> list[Any]:
    return [member for member in members if not isinstance(member, Problem)]


def _peer(peer: SelectorPeer | IPBlock) -> dict[str, Any]:
    if isinstance(peer, IPBlock):
        excepts = {"except": [*map(str, peer.excepts)]} if peer.excepts else {}
        return {"ipBlock": {"cidr": str(peer.cidr), **excepts}}
    selectors = {"namespaceSelector": peer.namespace_selector, "podSelector": peer.pod_selector}
    return {name: _selector(selector) for name, selector in selectors.items() if selector is not None}


def _port(port: PolicyPort) -> dict[str, Any]:
    written: dict[str, Any] = {"protocol": port.protocol}
    if port.port is not None:
        written["port"] = port.port
    if port.end_port is not None:
        written["endPort"] = port.end_port
    return written


def _selector(selector: LabelSelector) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if selector.match_labels:
        written["matchLabels"] = dict(selector.match_labels)
    if selector.match_expressions:
        written["matchExpressions"] = [
            {
                "key": each.key,
                "operator": each.operator,
                **({"values": [*each.values]} if each.values else {}),
            }
            for each in selector.match_expressions
        ]
    return written
