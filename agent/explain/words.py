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
    peers = _joined(map(peer_in_words, rule.peers or ())) or "everybody"
    ports = _joined(map(port_in_words, rule.ports or ())) or "every port"
    return f"{way} {peers} on {ports}"


def peer_in_words(of: SelectorPeer | IPBlock | Problem) -> str:
    """Such as "Pods app=web of its own namespace"."""
    if isinstance(of, Problem):
        return f"nobody ({of})"
    if isinstance(of, IPBlock):
        excepts = f" except {', '.join(map(str, of.excepts))}" if of.excepts else ""
        return f"{of.cidr}{excepts}"
    pods = pods_in_words(of.pod_selector)
    if of.namespace_selector is None:
        return f"{pods} of its own namespace"
    names = dict(of.namespace_selector.match_labels)
    if list(names) == [NAMESPACE_NAME_LABEL] and not of.namespace_selector.match_expressions:
        return f"{pods} of namespace {names[NAMESPACE_NAME_LABEL]}"
    spaces = Selector(of.namespace_selector)
    return f"{pods} of namespaces {spaces}" if spaces.requirements else f"{pods} of all namespaces"


def pods_in_words(of: LabelSelector | None) -> str:
    """Such as "Pods app=web"; None selects all."""
    selector = Selector(of) if of is not None else None
    return f"Pods {selector}" if selector and selector.requirements else "all Pods"


def port_in_words(of: PolicyPort | Problem) -> str:
    """Such as "TCP 8080-8090"."""
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
