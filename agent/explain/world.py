"""The cluster as a question about a connection sees it: who is at an address, and whose names mean what.

"web", "svc/web", "data/db-0", "web.hello.svc.cluster.local", "node2", "203.0.113.10"  --named-->  an End
10.244.1.7 --at--> the Pod, node or Service that has it, or nobody that the cluster knows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import NamedTuple, TypeAlias

from msgspec import Struct

from agent.cluster.model import IPAddress, Node, Pod, Service, ServicePort
from agent.cluster.store import Snapshot
from agent.compile.service import Claim, Frontend, ServiceSettings, age, frontends, served

CLUSTER_DOMAIN = "cluster.local"
KINDS = {
    "pod": "Pod",
    "pods": "Pod",
    "po": "Pod",
    "service": "Service",
    "services": "Service",
    "svc": "Service",
    "node": "Node",
    "nodes": "Node",
    "no": "Node",
}
"""The words that kubectl knows these kinds by."""


class UnknownNameError(Exception):
    """Nothing, or more than one thing, has this name; the message says which names there are."""


class NobodyError(UnknownNameError):
    """Nothing has this name."""


class Address(NamedTuple):
    """An address that no Pod, node or Service of the cluster has."""

    ip: IPAddress

    def __str__(self) -> str:
        return f"{self.ip} (outside the cluster)"


End: TypeAlias = Pod | Node | Service | Address


class World(Struct, frozen=True):
    """The objects of a cluster, asked by name and address.

    `settings` is what the nodes' agents are configured to, by node; `usual` holds for all others. `tunnels`
    are the nodes that each node reaches by tunnel.
    """

    snapshot: Snapshot
    settings: Mapping[str, ServiceSettings] = {}
    usual: ServiceSettings = ServiceSettings()
    tunnels: Mapping[str, frozenset[str]] = {}

    def settings_of(self, node: str) -> ServiceSettings:
        """What the agent of a node is configured to; of no node in particular: what holds for most."""
        return self.settings.get(node) or next(iter(self.settings.values()), self.usual)

    def pod_at(self, ip: IPAddress) -> Pod | None:
        """The Pod whose own address this is: neither one that has ended nor one on its node's network."""
        pods = self.snapshot.pods_at(ip).values()
        return next((pod for pod in pods if not pod.finished and not pod.host_network), None)

    def node_at(self, ip: IPAddress) -> Node | None:
        """The node that has this address."""
        nodes = self.snapshot.nodes.values()
        return next((node for node in nodes if ip in (*node.internal_ips, *node.external_ips)), None)

    def service_at(self, ip: IPAddress) -> Service | None:
        """The Service that says it has this address, of whatever kind.

        Of several the oldest, those that podwall serves there before others.
        """
        found = [each for each in self.snapshot.services.values() if ip in service_addresses(each)]
        return min(found, key=lambda of: (not self._serves(of, ip), age(of), of.key), default=None)

    def holder(self, claim: Claim) -> tuple[Service, Frontend] | None:
        """The Service that is served at a port of an address, or at a NodePort: the oldest that wants it."""
        wants = [
            (service, way)
            for service in self.snapshot.services.values()
            if any(_may_claim(service, number, claim) for number in service.ports)
            for way in self._ways(service)
            if way.claim == claim
        ]
        return min(wants, key=lambda of: (age(of[0]), of[0].key), default=None)

    def _serves(self, service: Service, ip: IPAddress) -> bool:
        return any(way.claim.address == ip for way in self._ways(service))

    def _ways(self, service: Service) -> Iterator[Frontend]:
        return frontends(service, self.settings_of("")) if served(service) else iter(())

    def at(self, ip: IPAddress) -> End:
        """Who has this address."""
        return self.pod_at(ip) or self.service_at(ip) or self.node_at(ip) or Address(ip)

    def named(self, text: str, namespace: str) -> End:
        """Who is meant by a name as people type it; names without a namespace are of this one.

        Raises UnknownNameError; NobodyError when nothing has it.
        """
        try:
            return self.at(ip_address(text))
        except ValueError:
            pass
        found = list(_distinct(self._candidates(text, namespace)))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(sorted(title(each) for each in found))
            raise UnknownNameError(f"{text!r} may be {names}: put pod/, svc/ or node/ before it")
        raise NobodyError(self._not_found(text, namespace))

    def _candidates(self, text: str, namespace: str) -> Iterator[End]:
        kinds, rest = _kinds_and_name(text)
        space, name = rest.split("/", 1) if "/" in rest else (namespace, rest)
        if "Pod" in kinds:
            yield from _present(self.snapshot.pods.get((space, name)))
        if "Service" in kinds:
            yield from _present(self.snapshot.services.get((space, name)))
        if "Node" in kinds and "/" not in rest:
            yield from _present(self.snapshot.nodes.get(name))
        if "/" not in rest and "." in rest:
            yield from self._by_dns(rest.rstrip("."), kinds)

    def _by_dns(self, text: str, kinds: frozenset[str]) -> Iterator[End]:
        """`service.namespace[.svc[.cluster.local]]`, with a Pod's hostname before it for headless ones."""
        labels = text.removesuffix(f".{CLUSTER_DOMAIN}").removesuffix(".svc").split(".")
        if len(labels) == 2 and "Service" in kinds:
            yield from _present(self.snapshot.services.get((labels[1], labels[0])))
        if len(labels) == 3 and "Pod" in kinds:
            hostname, subdomain, namespace = labels
            for pod in self.snapshot.pods_in(namespace).values():
                if pod.subdomain == subdomain and (pod.hostname or pod.name) == hostname:
                    yield pod

    def _not_found(self, text: str, namespace: str) -> str:
        _, rest = _kinds_and_name(text)
        space, name = rest.split("/", 1) if "/" in rest else (namespace, rest)
        if space not in self.snapshot.namespaces:
            return f"{text!r}: there is no namespace {space}"
        elsewhere = [
            title(each)
            for objects in (self.snapshot.pods, self.snapshot.services)
            for (_, other), each in objects.items()
            if other == name
        ]
        if elsewhere:
            return f"{text!r} is not in namespace {space}, but there is {', '.join(sorted(elsewhere))}"
        alike = sorted(pod for _, pod in self.snapshot.pods_in(space) if pod.startswith(f"{name}-"))
        if alike:
            return f"{text!r} is no Pod, Service or node; did you mean pod/{space}/{alike[0]}?"
        outside = "; of a name outside of the cluster ask about an address" if "." in rest else ""
        return f"{text!r} is no Pod, Service or node in namespace {space}, nor an address{outside}"


def _may_claim(service: Service, port: ServicePort, claim: Claim) -> bool:
    """Cheaper than to work out all its ways: whether one of them may be this."""
    number = port.node_port if claim.address is None else port.port
    if (number, port.protocol) != (claim.port, claim.protocol):
        return False
    return claim.address is None or claim.address in service_addresses(service)


def service_addresses(service: Service) -> tuple[IPAddress, ...]:
    """Every address that is a Service's own: of the cluster, external, and of its load balancer."""
    balancer = (each.ip for each in service.load_balancer if each.ip is not None)
    return (*service.cluster_ips, *service.external_ips, *balancer)


def addresses_of(end: End) -> tuple[IPAddress, ...]:
    """The addresses at which an end is met; a Service's only its cluster addresses."""
    match end:
        case Pod(ips=ips):
            return ips
        case Node(internal_ips=ips):
            return ips
        case Service(cluster_ips=ips):
            return ips
    return (end.ip,)


def node_of(end: End) -> str:
    """The name of the node that an end is on, "" for a Service and for who is outside."""
    match end:
        case Pod(node=node):
            return node
        case Node(name=name):
            return name
    return ""


def is_node(end: End) -> bool:
    """Whether its packets are the node's own: it is a node, or a Pod on its node's network."""
    return isinstance(end, Node) or (isinstance(end, Pod) and end.host_network)


def title(end: End) -> str:
    """How an end is called in answers."""
    match end:
        case Pod() | Service():
            return f"{type(end).__name__} {end.namespace}/{end.name}"
        case Node(name=name):
            return f"Node {name}"
    return str(end)


def with_port(address: IPAddress | str, port: int) -> str:
    """An address and a port as they are written together."""
    text = str(address)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _kinds_and_name(text: str) -> tuple[frozenset[str], str]:
    head, _, rest = text.partition("/")
    if rest and head.lower() in KINDS:
        return frozenset((KINDS[head.lower()],)), rest
    return frozenset(KINDS.values()), text


def _present(found: End | None) -> Iterator[End]:
    if found is not None:
        yield found


def _distinct(found: Iterator[End]) -> Iterator[End]:
    seen: set[str] = set()
    for each in found:
        if title(each) not in seen:
            seen.add(title(each))
            yield each
