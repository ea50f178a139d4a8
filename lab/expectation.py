"""What the NetworkPolicy documentation says about a packet, read literally: slow and simple. Pure.

    objects as manifests write them + who sends what to whom --> may it pass?

It answers from the definitions alone: for each question it goes through all policies. It shares no code with
what makes the rules and knows nothing of sets, rules or changes, so that both are not wrong in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from lab.matrix import Trial
from lab.names import Address, outside

Object = Mapping[str, Any]

NAME_LABEL = "kubernetes.io/metadata.name"
_NOT_OF_THE_API = (KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class FirstPacket:
    """The first packet of something new; port is None for what has no ports (ICMP and others)."""

    source: str
    target: str
    protocol: str = "TCP"
    port: int | None = None


class Oracle:
    """Answers for these objects; of two Pods with one address the first has it.

    Policies in audit mode do not count, but where the question is what would be (`audited`).
    """

    def __init__(self, objects: Iterable[Object], *, audited: bool = False) -> None:
        objects = list(objects)
        self._namespaces = {
            each["metadata"]["name"]: _labels(each) | {NAME_LABEL: each["metadata"]["name"]}
            for each in objects
            if each["kind"] == "Namespace"
        }
        self._policies = [
            each for each in objects if each["kind"] == "NetworkPolicy" and (audited or not _is_audited(each))
        ]
        self._pods: dict[Address, Object] = {}
        for each in objects:
            for address in pod_addresses(each) if each["kind"] == "Pod" else ():
                self._pods.setdefault(ip_address(address), each)

    def allows(self, packet: FirstPacket) -> bool:
        """Whether it may leave its source and enter its target."""
        return self.allows_egress(packet) and self.allows_ingress(packet)

    def allows_egress(self, packet: FirstPacket) -> bool:
        """Whether the policies of the source's Pod let it out; who is no Pod may send everything."""
        return self._allows("Egress", packet, mine=packet.source, theirs=packet.target)

    def allows_ingress(self, packet: FirstPacket) -> bool:
        """Whether the policies of the target's Pod let it in."""
        return self._allows("Ingress", packet, mine=packet.target, theirs=packet.source)

    def pod_at(self, address: str) -> Object | None:
        """The Pod that has this address now, not counting those that have ended or have the node's."""
        return self._pods.get(ip_address(address))

    def _allows(self, direction: str, packet: FirstPacket, mine: str, theirs: str) -> bool:
        pod = self.pod_at(mine)
        if pod is None or self.pod_at(theirs) is pod:  # a Pod cannot block access to itself
            return True
        isolating = [policy for policy in self._selecting(pod) if direction in _policy_types(policy)]
        if not isolating:
            return True
        peers = "from" if direction == "Ingress" else "to"
        receiver = pod if direction == "Ingress" else self.pod_at(theirs)
        return any(
            self._is_peer_of(policy, rule.get(peers), theirs) and _is_port_of(rule, receiver, packet)
            for policy in isolating
            for rule in policy["spec"].get(direction.lower()) or ()
        )

    def _selecting(self, pod: Object) -> Iterator[Object]:
        for policy in self._policies:
            selector = policy["spec"].get("podSelector") or {}
            if _namespace(policy) == _namespace(pod) and _selects(selector, _labels(pod)):
                yield policy

    def _is_peer_of(self, policy: Object, peers: Sequence[Object] | None, address: str) -> bool:
        return not peers or any(self._is_peer(policy, peer, address) for peer in peers)

    def _is_peer(self, policy: Object, peer: Object, address: str) -> bool:
        if peer.get("ipBlock") is not None:
            block = peer["ipBlock"]
            excepted = any(_in(address, part) for part in block.get("except") or ())
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


class Expected:
    """Says of a lab's trials whether they should connect; None where the API server would refuse a policy.

    A node always reaches its own Pods. Who has no address of a trial's family is not asked about.
    """

    def __init__(self, objects: Iterable[Object]) -> None:
        objects = list(objects)
        self._oracle = Oracle(objects)
        self._addresses = {"outside": tuple(map(str, outside().addresses))}
        self._node_of: dict[str, str] = {}
        self._is_node: set[str] = set()
        for each in objects:
            if each["kind"] == "Node":
                self._add_node(each)
            elif each["kind"] == "Pod":
                self._add_pod(each)

    def __call__(self, trial: Trial) -> bool | None:
        """Whether this should connect."""
        here, there = self._node_of.get(trial.source), self._node_of.get(trial.target)
        if trial.source in self._is_node and here == there:
            return True
        mine = (text for text in self._addresses[trial.source] if _version(text) == trial.address.version)
        packet = FirstPacket(next(mine), str(trial.address), trial.protocol, trial.port)
        try:
            return self._oracle.allows(packet)
        except _NOT_OF_THE_API:
            return None

    def _add_node(self, node: Object) -> None:
        name = node["metadata"]["name"]
        said = node["status"]["addresses"]
        self._addresses[name] = tuple(each["address"] for each in said if each["type"] == "InternalIP")
        self._node_of[name] = name
        self._is_node.add(name)

    def _add_pod(self, pod: Object) -> None:
        name = f"{_namespace(pod)}/{pod['metadata']['name']}"
        self._addresses[name] = tuple(each["ip"] for each in pod.get("status", {}).get("podIPs") or ())
        self._node_of[name] = pod["spec"].get("nodeName", "")
        if pod["spec"].get("hostNetwork"):
            self._is_node.add(name)


def pod_addresses(pod: Object) -> list[str]:
    """The addresses that are a Pod's own."""
    status = pod.get("status") or {}
    if pod["spec"].get("hostNetwork") or status.get("phase") in {"Succeeded", "Failed"}:
        return []
    return [each["ip"] for each in status.get("podIPs") or ()]


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
    for term in selector.get("matchExpressions") or ():
        key, there = term["key"], term["key"] in labels
        holds = {
            "In": there and labels.get(key) in (term.get("values") or ()),
            "NotIn": not there or labels[key] not in (term.get("values") or ()),
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not holds[term["operator"]]:
            return False
    return True


def _is_port_of(rule: Object, receiver: Object | None, packet: FirstPacket) -> bool:
    ports = rule.get("ports")
    return not ports or any(_is_port(port, receiver, packet) for port in ports)


def _is_port(port: Object, receiver: Object | None, packet: FirstPacket) -> bool:
    if port.get("protocol", "TCP") != packet.protocol or packet.port is None:
        return False
    wanted = port.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        number = None if receiver is None else _named(receiver, wanted, packet.protocol)
        return number == packet.port
    return bool(wanted <= packet.port <= port.get("endPort", wanted))


def _named(pod: Object, name: str, protocol: str) -> int | None:
    """The Pod's port of this name, of the first container that has one."""
    for container in pod["spec"].get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("name") == name and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _in(address: str, cidr: str) -> bool:
    of, network = ip_address(address), ip_network(cidr, strict=False)
    return of.version == network.version and of in network


def _is_audited(policy: Object) -> bool:
    annotations = policy["metadata"].get("annotations") or {}
    return bool(annotations.get("podwall.dev/mode") == "audit")


def _version(text: str) -> int:
    return ip_address(text).version
