"""Policies' rules in words, as a person would read them out. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from agent.cluster.model import (
    NAMESPACE_NAME_LABEL,
    Direction,
    IPBlock,
    LabelSelector,
    PolicyPort,
    PolicyRule,
    Problem,
    SelectorPeer,
)
from agent.compile.selectors import Selector

MOST_WORDS = 3  # peers or ports that are told; of more only the number


def rule_in_words(rule: PolicyRule, direction: Direction) -> str:
    """Such as "from Pods app=web on TCP 8080"."""
    way = "from" if direction == "Ingress" else "to"
    peers = _joined(map(_peer, rule.peers or ())) or "everybody"
    ports = _joined(map(_port, rule.ports or ())) or "every port"
    return f"{way} {peers} on {ports}"


def _peer(of: SelectorPeer | IPBlock | Problem) -> str:
    if isinstance(of, Problem):
        return f"nobody ({of})"
    if isinstance(of, IPBlock):
        excepts = f" except {', '.join(map(str, of.excepts))}" if of.excepts else ""
        return f"{of.cidr}{excepts}"
    pods = _selected(of.pod_selector)
    if of.namespace_selector is None:
        return f"{pods} of its own namespace"
    names = dict(of.namespace_selector.match_labels)
    if list(names) == [NAMESPACE_NAME_LABEL] and not of.namespace_selector.match_expressions:
        return f"{pods} of namespace {names[NAMESPACE_NAME_LABEL]}"
    spaces = Selector(of.namespace_selector)
    return f"{pods} of namespaces {spaces}" if spaces.requirements else f"{pods} of all namespaces"


def _selected(of: LabelSelector | None) -> str:
    selector = Selector(of) if of is not None else None
    return f"Pods {selector}" if selector and selector.requirements else "all Pods"


def _port(of: PolicyPort | Problem) -> str:
    if isinstance(of, Problem):
        return f"no port ({of})"
    if of.port is None:
        return f"every {of.protocol} port"
    return f"{of.protocol} {of.port}" + (f"-{of.end_port}" if of.end_port else "")


def _joined(parts: Iterable[str]) -> str:
    said = list(parts)
    if len(said) > MOST_WORDS:
        return f"{', '.join(said[:MOST_WORDS])} and {len(said) - MOST_WORDS} more"
    return " or ".join(said)
