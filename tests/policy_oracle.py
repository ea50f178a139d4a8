"""What the NetworkPolicy documentation says about a packet, read literally: slow, simple, sharing no code.

It reads Kubernetes objects as they are written in manifests and answers from the definitions alone: for each
question it goes through all policies and all Pods.  It knows nothing of nodes, sets, rules or changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

Object = Mapping[str, Any]

NAME_LABEL = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Probe:
    """The first packet of something new; `port` is None for what has no ports (ICMP and others)."""

    source: str
    target: str
    protocol: str = "TCP"
    port: int | None = None


class Oracle:
    """Answers for these objects."""

    def __init__(self, objects: Iterable[Object]) -> None:
        objects = list(objects)
        self._namespaces = {
            each["metadata"]["name"]: _labels(each) | {NAME_LABEL: each["metadata"]["name"]}
            for each in objects
            if each["kind"] == "Namespace"
        }
        self._pods = [each for each in objects if each["kind"] == "Pod"]
        self._policies = [each for each in objects if each["kind"] == "NetworkPolicy"]

    def allows(self, probe: Probe) -> bool:
        """Whether the packet may leave its source and enter its target."""
        return self.allows_egress(probe) and self.allows_ingress(probe)

    def allows_egress(self, probe: Probe) -> bool:
        """Whether the policies of the source's Pod let it out; who is no Pod may send everything."""
        return self._allows("Egress", probe, mine=probe.source, theirs=probe.target)

    def allows_ingress(self, probe: Probe) -> bool:
        """Whether the policies of the target's Pod let it in."""
        return self._allows("Ingress", probe, mine=probe.target, theirs=probe.source)

    def _allows(self, direction: str, probe: Probe, mine: str, theirs: str) -> bool:
        pod = self.pod_at(mine)
        if pod is None or self.pod_at(theirs) is pod:  # a Pod cannot block access to itself
            return True
        isolating = [policy for policy in self._selecting(pod) if direction in _policy_types(policy)]
        if not isolating:
            return True
        peers = "from" if direction == "Ingress" else "to"
        receiver = pod if direction == "Ingress" else self.pod_at(theirs)
        return any(
            self._is_peer_of(policy, rule.get(peers), theirs) and _is_port_of(rule, receiver, probe)
            for policy in isolating
            for rule in policy["spec"].get(direction.lower()) or []
        )

    def pod_at(self, address: str) -> Object | None:
        """The Pod that has this address now, not counting those that have ended or have the node's."""
        for pod in self._pods:
            if ip_address(address) in map(ip_address, pod_addresses(pod)):
                return pod
        return None

    def _selecting(self, pod: Object) -> Iterator[Object]:
        for policy in self._policies:
            selector = policy["spec"].get("podSelector") or {}
            if _namespace(policy) == _namespace(pod) and _selects(selector, _labels(pod)):
                yield policy

    def _is_peer_of(self, policy: Object, peers: list[Object] | None, address: str) -> bool:
        return not peers or any(self._is_peer(policy, peer, address) for peer in peers)

    def _is_peer(self, policy: Object, peer: Object, address: str) -> bool:
        if peer.get("ipBlock") is not None:
            block = peer["ipBlock"]
            excepted = any(_in(address, part) for part in block.get("except") or [])
            return _in(address, block["cidr"]) and not excepted
        pod = self.pod_at(address)
        if pod is None:
            return False
        if peer.get("podSelector") is not None and not _selects(peer["podSelector"], _labels(pod)):
            return False
        if peer.get("namespaceSelector") is None:
            return _namespace(pod) == _namespace(policy)
        labels = self._namespaces.get(_namespace(pod))
        return labels is not None and _selects(peer["namespaceSelector"], labels)


def pod_addresses(pod: Object) -> list[str]:
    """The addresses that are a Pod's own."""
    status = pod.get("status") or {}
    if pod["spec"].get("hostNetwork") or status.get("phase") in {"Succeeded", "Failed"}:
        return []
    return [each["ip"] for each in status.get("podIPs") or []]


def _labels(of: Object) -> dict[str, str]:
    return dict(of["metadata"].get("labels") or {})


def _namespace(of: Object) -> str:
    return str(of["metadata"].get("namespace", "default"))


def _policy_types(policy: Object) -> list[str]:
    """Missing: always Ingress, and Egress if the policy has any egress rules."""
    given = policy["spec"].get("policyTypes")
    if given:
        return list(given)
    return ["Ingress", "Egress"] if policy["spec"].get("egress") else ["Ingress"]


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions") or []:
        key, there = term["key"], term["key"] in labels
        holds = {
            "In": there and labels.get(key) in (term.get("values") or []),
            "NotIn": not there or labels[key] not in (term.get("values") or []),
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not holds[term["operator"]]:
            return False
    return True


def _is_port_of(rule: Object, receiver: Object | None, probe: Probe) -> bool:
    ports = rule.get("ports")
    return not ports or any(_is_port(port, receiver, probe) for port in ports)


def _is_port(port: Object, receiver: Object | None, probe: Probe) -> bool:
    if port.get("protocol", "TCP") != probe.protocol or probe.port is None:
        return False
    wanted = port.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        number = None if receiver is None else _named(receiver, wanted, probe.protocol)
        return number == probe.port
    return bool(wanted <= probe.port <= port.get("endPort", wanted))


def _named(pod: Object, name: str, protocol: str) -> int | None:
    """The Pod's port of this name, of the first container that has one."""
    for container in pod["spec"].get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == name and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _in(address: str, cidr: str) -> bool:
    of, network = ip_address(address), ip_network(cidr, strict=False)
    return of.version == network.version and of in network
