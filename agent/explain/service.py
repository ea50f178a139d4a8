"""What a Service does to a connection: which port of it is meant, and how it is met. Pure.

    svc/web:80, 10.96.0.7:80, 198.51.100.7:80  --frontend-->  a port of a Service, met by one of its addresses
    node2:30080                                               ... or by a node's
    node2:8080                                                a port that a Pod has of its node (hostPort)

What is served where, and who of several has it, is said by `agent.compile.service`, as for the rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from agent.cluster.model import ContainerPort, Family, IPAddress, Node, Pod, Service, ServicePort
from agent.compile import service as compiled
from agent.compile.service import SOMEBODY_ELSES, Claim, families, family_of
from agent.explain.question import Question
from agent.explain.world import Address, World, title

Met = Literal["ClusterIP", "NodePort", "LoadBalancer", "externalIP", "headless"]
_MET: dict[str, Met] = {
    "cluster": "ClusterIP",
    "external": "externalIP",
    "load balancer": "LoadBalancer",
    "node": "NodePort",
}


class NoFrontend(NamedTuple):
    """What was asked for is a Service, but nothing of it that takes this connection."""

    cause: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Frontend:
    """A port of a Service and the way by which it is met, None for a headless one.

    address: what is sent to. node: whose address that is, for a NodePort.
    """

    service: Service
    port: ServicePort
    family: Family
    way: compiled.Frontend | None
    address: IPAddress | None = None
    node: Node | None = None

    @property
    def met(self) -> Met:
        """By which of its kinds of address it is met."""
        return _MET[self.way.kind] if self.way else "headless"

    @property
    def number(self) -> int:
        """The port that is sent to."""
        return self.way.claim.port if self.way else self.port.port


class HostPort(NamedTuple):
    """A port of a node that leads to a Pod's."""

    node: Node
    pod: Pod
    port: ContainerPort
    family: Family
    address: IPAddress | None


Found = Frontend | HostPort | NoFrontend | None


def frontend(world: World, question: Question, source: IPAddress) -> Found:
    """What of a Service, or of a node, a question means; None when it means the target itself."""
    target, family = question.target, family_of(source)
    match target:
        case Node():
            return _of_node(world, target, question, family)
        case Service():
            return _of_service(world, target, question, family)
        case Address():
            return _unused(world, target.ip, question)
    return None


# Of a Service


def _of_service(world: World, service: Service, question: Question, family: Family) -> Frontend | NoFrontend:
    for label in SOMEBODY_ELSES:
        if label in service.labels and not service.headless:
            said = f"{title(service)} has the label {label}: podwall leaves it to another proxy"
            return NoFrontend("not-served", said)
    address = question.address
    if address is not None and isinstance(question.port, int):
        held = world.holder(Claim(address, question.protocol, question.port))
        if held is not None:
            return Frontend(held[0], held[1].port, family, held[1], address)
    port = _port(service, question)
    if port is None:
        return NoFrontend("no-such-port", _no_such_port(world, service, question))
    if service.headless:
        return Frontend(service, port, family, None)
    if address is None:
        address = next((each for each in _usual(world, service, question) if each.version == family), None)
    if address is None:
        return NoFrontend("no-address", f"{title(service)} has no IPv{family} cluster address")
    return _at(world, service, port, address)


def _usual(world: World, service: Service, question: Question) -> Iterator[IPAddress]:
    """The addresses at which a Service is met by its name, from outside those for the outside first."""
    if isinstance(question.source, Address):
        for kind, _, ip in compiled.addresses(service):
            if kind != "cluster" and not compiled.refused(kind, ip, world.settings_of("")):
                yield ip
    yield from service.cluster_ips


def _at(world: World, service: Service, port: ServicePort, address: IPAddress) -> Frontend | NoFrontend:
    """A Service met at one of its addresses; or why it is not."""
    held = world.holder(Claim(address, port.protocol, port.port))
    if held is not None and held[0].key == service.key:
        return Frontend(service, held[1].port, family_of(address), held[1], address)
    if held is not None:
        what = f"port {port.port}/{port.protocol} of {address}"
        said = f"{title(held[0])} is older and has {what}, so nothing of it comes to {title(service)}"
        return NoFrontend("address-conflict", said)
    return NoFrontend("not-served", _not_served(world, service, address))


def _not_served(world: World, service: Service, address: IPAddress) -> str:
    for kind, field, each in compiled.addresses(service):
        if each == address and (why := compiled.refused(kind, address, world.settings_of(""))):
            return f"{title(service)} is not served at {address}: its {field} {why}"
    for index, ingress in enumerate(service.load_balancer):
        if ingress.ip == address and ingress.ip_mode == "Proxy":
            return (
                f"{address} is no address of podwall's: status.loadBalancer.ingress[{index}] of "
                f"{title(service)} says ipMode: Proxy, so its load balancer sends to the nodes by itself"
            )
    return f"{title(service)} is not served at {address}: it is not of type LoadBalancer"


def _port(service: Service, question: Question) -> ServicePort | None:
    ports = [each for each in service.ports if each.protocol == question.protocol]
    if question.port is None:
        return ports[0] if len(ports) == 1 else None
    return next((each for each in ports if question.port in (each.port, each.name)), None)


def _no_such_port(world: World, service: Service, question: Question) -> str:
    said = ", ".join(_port_name(each) for each in service.ports) or "none"
    if question.port is None:
        return f"{title(service)} has not just one {question.protocol} port, but {said}: say which"
    asked = question.port if isinstance(question.port, int) else f"named {question.port!r}"
    refuses = ", and refuses others" if _refuses(world, service, question) else ""
    return f"{title(service)} has no {question.protocol} port {asked}; it has {said}{refuses}"


def _refuses(world: World, service: Service, question: Question) -> bool:
    """Whether podwall itself refuses a port that nobody has: at ClusterIPs, and at addresses of its pools."""
    if not isinstance(question.port, int) or service.headless:
        return False
    address = question.address
    pools = world.settings_of("").pools
    return address is None or address in service.cluster_ips or any(address in pool for pool in pools)


def _port_name(port: ServicePort) -> str:
    return f"{port.protocol} {port.port}" + (f" ({port.name})" if port.name else "")


def _unused(world: World, ip: IPAddress, question: Question) -> NoFrontend | None:
    """podwall refuses what is sent to addresses of its pools that no Service has."""
    if not any(ip in pool for pool in world.settings_of("").pools):
        return None
    what = f"{question.protocol} port {question.port}" if question.port else "port"
    return NoFrontend(
        "no-such-port", f"{ip} is in a pool of podwall's, but no Service has {what} of it: refused"
    )


# Of a node


def _of_node(world: World, node: Node, question: Question, family: Family) -> Frontend | HostPort | None:
    if not isinstance(question.port, int):
        return None
    address = question.address or next((ip for ip in node.internal_ips if ip.version == family), None)
    held = world.holder(Claim(None, question.protocol, question.port))
    if held is not None and family in families(held[0]) and _answers_node_ports(world, node, address):
        return Frontend(held[0], held[1].port, family, held[1], address, node)
    for pod in world.snapshot.pods_on(node.name).values():
        if pod.finished or pod.host_network:
            continue
        for port in pod.ports:
            if port.host_port == question.port and port.protocol == question.protocol:
                here = port.host_ip is None or port.host_ip.is_unspecified or port.host_ip == address
                if here and any(ip.version == family for ip in pod.ips):
                    return HostPort(node, pod, port, family, address)
    return None


def _answers_node_ports(world: World, node: Node, address: IPAddress | None) -> bool:
    """Whether NodePorts are served on this address: on all, unless the configuration says on which."""
    ranges = world.settings_of(node.name).node_port_addresses
    return not ranges or (address is not None and any(address in each for each in ranges))
