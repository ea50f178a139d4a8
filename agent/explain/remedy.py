"""The smallest change of a policy that would let a packet pass. Pure.

    a rule whose peers fit, but not its ports --> one more port in it, unless its peers are everybody
    a rule whose ports fit, but not its peers --> one more peer in it
    neither                                   --> one more rule in the first policy that isolates the Pod

A change says what to add and where, as a JSON patch would: nothing that is there is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from agent.cluster.model import EVERYTHING, NAMESPACE_NAME_LABEL, NetworkPolicy, Pod, SelectorPeer
from agent.explain.fields import written
from agent.explain.policy import Judgement, Packet, RuleView
from agent.explain.world import World

GENERATED_LABELS = frozenset(
    {
        "pod-template-hash",
        "controller-revision-hash",
        "pod-template-generation",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/job-name",
        "batch.kubernetes.io/controller-uid",
        "job-name",
        "controller-uid",
    }
)
"""Labels that controllers put on Pods: another Pod of the same workload has another value, or soon will."""

NAMES = ("app.kubernetes.io/name", "app", "k8s-app", "name")
"""Labels that say by themselves what a Pod is."""


class Change(NamedTuple):
    """Something to add to a policy: at `path` (its last part "-" is the end of a list, which is made)."""

    policy: tuple[str, str]
    path: tuple[str | int, ...]
    value: Any

    @property
    def field(self) -> str:
        """The path as kubectl writes it."""
        return written(part for part in self.path if part != "-")

    def text(self) -> str:
        """The change as YAML, with a comment that says where it belongs."""
        body = yaml.safe_dump([self.value], sort_keys=False, default_flow_style=False)
        return f"# NetworkPolicy {'/'.join(self.policy)}: add to {self.field}\n{body}"

    def applied(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The policy's document with the change made."""
        whole: dict[str, Any] = _copied(document)
        at: Any = whole
        for part, following in zip(self.path, self.path[1:], strict=False):
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = [] if following == "-" or isinstance(following, int) else {}
            at = at[part]
        at.append(self.value)
        return whole


def change_for(world: World, judgement: Judgement, packet: Packet) -> Change | None:
    """What would make a denied direction allowed; None when it is allowed already."""
    if judgement.allowed:
        return None
    by_port = next((rule for rule in judgement.rules if rule.peer_fits and _names_peers(rule)), None)
    if by_port is not None and packet.port is not None:
        return Change(by_port.policy.key, (*_path(by_port), "ports", "-"), _port(packet))
    by_peer = next((rule for rule in judgement.rules if rule.port_fits and rule.rule.ports), None)
    if by_peer is not None:
        return Change(
            by_peer.policy.key,
            (*_path(by_peer), _peers(by_peer), "-"),
            _peer(world, by_peer.policy, judgement, packet),
        )
    policy = judgement.isolating[0]
    rule: dict[str, Any] = {_PEERS[judgement.direction]: [_peer(world, policy, judgement, packet)]}
    if packet.port is not None:
        rule["ports"] = [_port(packet)]
    return Change(policy.key, ("spec", judgement.direction.lower(), "-"), rule)


def _names_peers(rule: RuleView) -> bool:
    """Whether it is for some peers by their labels or addresses: one more port is open to these alone."""
    peers = rule.rule.peers or ()
    return bool(peers) and not any(isinstance(of, SelectorPeer) and _everything(of) for of in peers)


def _everything(of: SelectorPeer) -> bool:
    """Whether it means whole namespaces, and not one by its name."""
    pods = of.pod_selector is not None and of.pod_selector != EVERYTHING
    named = of.namespace_selector is not None and of.namespace_selector != EVERYTHING
    return not pods and not named


_PEERS = {"Ingress": "from", "Egress": "to"}


def _path(of: RuleView) -> tuple[str | int, ...]:
    return "spec", of.direction.lower(), of.index


def _peers(of: RuleView) -> str:
    return _PEERS[of.direction]


def _port(packet: Packet) -> dict[str, Any]:
    return {"protocol": packet.protocol, "port": packet.port}


def _peer(world: World, policy: NetworkPolicy, judgement: Judgement, packet: Packet) -> dict[str, Any]:
    """The other end of the packet, as narrow a peer as still means all replicas of it."""
    theirs = packet.source if judgement.direction == "Ingress" else packet.destination
    other = world.pod_at(theirs)
    if other is None:
        return {"ipBlock": {"cidr": f"{theirs}/{theirs.max_prefixlen}"}}
    peer: dict[str, Any] = {}
    if other.namespace != policy.namespace:
        peer["namespaceSelector"] = {"matchLabels": {NAMESPACE_NAME_LABEL: other.namespace}}
    peer["podSelector"] = {"matchLabels": labels} if (labels := telling_labels(other)) else {}
    return peer


def telling_labels(pod: Pod) -> dict[str, str]:
    """The labels by which one would select this Pod and those like it."""
    for name in NAMES:
        if name in pod.labels:
            return {name: pod.labels[name]}
    return {name: value for name, value in sorted(pod.labels.items()) if name not in GENERATED_LABELS}


def _copied(of: Any) -> Any:
    if isinstance(of, Mapping):
        return {key: _copied(value) for key, value in of.items()}
    return [_copied(each) for each in of] if isinstance(of, (list, tuple)) else of
