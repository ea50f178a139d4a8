"""What a Service does to a connection: which port of it is meant, and which endpoints may get it. Pure.

svc/web:80, 10.96.0.7:80, node2:30080, 198.51.100.7:80  --frontend-->  a Service's port, met one way
that, and who asks                                        --route-->     its endpoints, or why there are none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from agent.cluster.model import Family, IPAddress, Node, Pod, Service, ServicePort
from agent.compile.endpoints import Backend, Here, Reach, candidates, choose
from agent.explain.empty import undeclared, why_empty
from agent.explain.question import Question
from agent.explain.world import Address, End, World, title

MOST_NAMED = 3
ZONE = "topology.kubernetes.io/zone"

Met = Literal["ClusterIP", "NodePort", "LoadBalancer", "externalIP", "headless"]


class NoFrontend(NamedTuple):
    """What was asked for is a Service, but nothing of it that takes this connection."""

    cause: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Frontend:
    """A port of a Service, met by one of its addresses, or by a node's (`node`)."""

    service: Service
    port: ServicePort
    met: Met
    family: Family
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connection ends; `seen_source` is whom it seems to come from there, for a reason, or None."""

    address: IPAddress
    port: int
    title: str
    seen_source: IPAddress | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """The endpoints that may be chosen, or the cause why there is none; `doubt` is what is odd about them."""

    targets: tuple[Target, ...]
    sentence: str
    cause: str = ""
    doubt: str = ""


def frontend(world: World, question: Question, source: IPAddress) -> Frontend | NoFrontend | None:
    """The Service's port that a question means; None when no Service is concerned."""
    target, family = question.target, _family(source)
    if isinstance(target, Node):
        return _node_port(world, target, question, family)
    if not isinstance(target, Service):
        return None
    if target.type == "ExternalName":
        said = f"{title(target)} is an alias: its name answers {target.external_name} (CNAME); ask about that"
        return NoFrontend("external-name", said)
    port = _port(target, question)
    if port is None:
        return NoFrontend("no-such-port", _no_such_port(target, question))
    if not target.headless and not any(each.version == family for each in target.cluster_ips):
        return NoFrontend("no-address", f"{title(target)} has no IPv{family} cluster address")
    return Frontend(target, port, _met(target, question.address), family)


def _node_port(world: World, node: Node, question: Question, family: Family) -> Frontend | None:
    for service in sorted(world.snapshot.services.values(), key=lambda each: each.key):
        for each in service.ports:
            if each.node_port and each.node_port == question.port and each.protocol == question.protocol:
                return Frontend(service, each, "NodePort", family, node)
    return None


def _port(service: Service, question: Question) -> ServicePort | None:
    ports = [each for each in service.ports if each.protocol == question.protocol]
    if question.port is None:
        return ports[0] if len(ports) == 1 else None
    return next((each for each in ports if question.port in (each.port, each.name)), None)


def _no_such_port(service: Service, question: Question) -> str:
    said = ", ".join(_port_name(each) for each in service.ports) or "none"
    if question.port is None:
        return f"{title(service)} has not just one {question.protocol} port, but {said}: say which"
    return (
        f"{title(service)} has no {question.protocol} port {question.port}; it has {said}, and refuses others"
    )


def _family(address: IPAddress) -> Family:
    return 4 if address.version == 4 else 6


def _port_name(port: ServicePort) -> str:
    return f"{port.protocol} {port.port}" + (f" ({port.name})" if port.name else "")


def _met(service: Service, address: IPAddress | None) -> Met:
    if service.headless:
        return "headless"
    if address in service.external_ips:
        return "externalIP"
    if any(each.ip == address for each in service.load_balancer if each.ip is not None):
        return "LoadBalancer"
    return "ClusterIP"


# Where it goes


def route(world: World, front: Frontend, source: End) -> Route:
    """The endpoints among which a connection from here is spread."""
    service, port = front.service, front.port
    entry = _entry(world, front, source)
    reach = _reach(front, source, entry)
    found = candidates(world.snapshot.slices_of(service.key).values(), port, front.family)
    chosen = choose(found, reach, entry)
    if not chosen:
        return _nowhere(world, front, reach, entry, choose(found, "cluster", entry))
    targets = tuple(_target(world, backend, source, entry) for backend in chosen)
    pods = [pod for pod in (world.pod_at(each.address) for each in targets) if pod is not None]
    return Route(targets, _spread(front, targets, reach), doubt=undeclared(service, port, pods))


def _entry(world: World, front: Frontend, source: End) -> Here:
    """The node that chooses the endpoint: the one where the first packet is translated."""
    name = ""
    if isinstance(source, Pod):
        name = source.node
    elif isinstance(source, Node):
        name = source.name
    if front.node is not None and (not name or front.service.external_traffic_policy == "Local"):
        name = front.node.name
    node = world.snapshot.nodes.get(name)
    return Here(name, node.labels.get(ZONE, "") if node else "")


def _reach(front: Frontend, source: End, entry: Here) -> Reach:
    service = front.service
    if front.met == "ClusterIP":
        return "local" if service.internal_traffic_policy == "Local" and entry.node else "cluster"
    from_elsewhere = isinstance(source, Address) or _node_of(source) != entry.node
    if (
        front.met != "headless"
        and service.external_traffic_policy == "Local"
        and from_elsewhere
        and entry.node
    ):
        return "local"
    return "cluster"


def _node_of(end: End) -> str:
    return end.node if isinstance(end, Pod) else end.name if isinstance(end, Node) else ""


def _nowhere(
    world: World, front: Frontend, reach: Reach, entry: Here, elsewhere: tuple[Backend, ...]
) -> Route:
    service = front.service
    if reach == "local" and elsewhere:
        policy = "internalTrafficPolicy" if front.met == "ClusterIP" else "externalTrafficPolicy"
        said = (
            f"{title(service)} has {policy}: Local and no ready endpoint on {entry.node}; "
            f"{len(elsewhere)} on other nodes do not count"
        )
        return Route((), said, "traffic-policy-local")
    empty = why_empty(world, service, front.port)
    return Route((), empty.sentence, empty.cause)


def _target(world: World, backend: Backend, source: End, entry: Here) -> Target:
    ip, port = backend
    pod = world.pod_at(ip)
    name = title(pod) if pod is not None else title(world.node_at(ip) or Address(ip))
    if isinstance(source, Address) and entry.node and (pod is None or pod.node != entry.node):
        node = world.snapshot.nodes[entry.node]
        own = next((each for each in node.internal_ips if each.version == ip.version), None)
        return Target(ip, port, name, own, f"the endpoint is not on {entry.node}, where it comes in")
    return Target(ip, port, name)


def _spread(front: Frontend, targets: tuple[Target, ...], reach: Reach) -> str:
    names = ", ".join(f"{each.title} ({_at(each)})" for each in targets[:MOST_NAMED])
    more = f" and {len(targets) - MOST_NAMED} more" if len(targets) > MOST_NAMED else ""
    where = " of the same node" if reach == "local" else ""
    sticky = ", the same for the same client" if front.service.session_affinity == "ClientIP" else ""
    port = front.port.node_port if front.met == "NodePort" else front.port.port
    what = f"{title(front.service)}, {front.met} port {port},"
    return f"{what} goes to one of {len(targets)}{where}{sticky}: {names}{more}"


def _at(target: Target) -> str:
    return (
        f"[{target.address}]:{target.port}"
        if target.address.version == 6
        else f"{target.address}:{target.port}"
    )
