"""Where a connection to a Service goes: the node that chooses, and the endpoints that it chooses among. Pure.

    who asks, what is met  --entry-->  the node that translates its first packet
    entry, slices          --route-->  the endpoints, and whom each sees as the client; or why there are none

Endpoints are chosen by `agent.compile.endpoints`, as for the rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from agent.cluster.model import EndpointSlice, IPAddress, Node, Service
from agent.compile.endpoints import Backend, Here, Reach, candidates, choose
from agent.compile.service import balancer, reaches
from agent.compile.service_nodes import here_of
from agent.compile.services import service_of
from agent.explain.empty import undeclared, why_empty
from agent.explain.question import Question
from agent.explain.service import Frontend, HostPort
from agent.explain.world import Address, World, is_node, node_of, title, with_port

MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connection ends; `seen_source` is whom it seems to come from there, for a reason, or None."""

    address: IPAddress
    port: int
    title: str
    seen_source: IPAddress | None = None
    reason: str = ""

    @property
    def place(self) -> str:
        """Its address and port as they are written together."""
        return with_port(self.address, self.port)


@dataclass(frozen=True, slots=True)
class Route:
    """The endpoints that may be chosen, or none; `cause` is why there is none, or of `doubt`, what is odd.

    entry: the node that chooses, "" when nobody knows which. silent: what has no endpoint is dropped, else
    refused.
    """

    targets: tuple[Target, ...]
    sentence: str
    cause: str = ""
    doubt: str = ""
    entry: str = ""
    silent: bool = False


class Entry(NamedTuple):
    """The node that translates the first packet; outside: for it the packet is not of its own Pods."""

    here: Here
    outside: bool


def route(world: World, front: Frontend, question: Question, source: IPAddress) -> Route:
    """The endpoints among which a connection from here is spread."""
    if front.way is None:
        return _headless(world, front, question)
    entry = _entry(world, front, question)
    if not _admitted(front, source):
        said = f"loadBalancerSourceRanges of {title(front.service)} does not hold {source}: it is dropped"
        return Route((), said, "source-ranges", entry=entry.here.node, silent=True)
    reach = reaches(front.service, front.way)[-1 if entry.outside else 0]
    found = candidates(slices_of(world, front.service), front.port, front.family)
    # Where nobody knows where it comes in: with a Local policy only where endpoints are.
    chosen = choose(found, reach if entry.here.node else "cluster", entry.here)
    if not chosen:
        others = len(choose(found, "cluster", entry.here)) if reach == "local" else 0
        return _nowhere(world, front, entry, others)
    chosen = chosen[: balancer(front.service, len(chosen)).count]
    targets = tuple(_target(world, backend, question, entry) for backend in chosen)
    pods = [pod for pod in (world.pod_at(each.address) for each in targets) if pod is not None]
    doubt, cause = undeclared(front.service, front.port, pods), "target-port"
    if isinstance(question.source, Address) and front.met == "ClusterIP":
        doubt, cause = _inside_only(front), "cluster-ip"
    said = _spread(front, targets, reach)
    return Route(targets, said, cause if doubt else "", doubt, entry=entry.here.node)


def by_host_port(world: World, found: HostPort, question: Question) -> Route:
    """The one Pod that has a port of its node."""
    pod, port = found.pod, found.port
    address = next(ip for ip in pod.ips if ip.version == found.family)
    entry = Entry(_here(world, found.node.name), outside=node_of(question.source) != found.node.name)
    target = _target(world, (address, port.port), question, entry)
    said = f"hostPort {port.host_port} of {title(pod)} on {found.node.name} goes to it ({target.place})"
    return Route((target,), said, entry=found.node.name)


def direct(world: World, question: Question, ip: IPAddress, port: int) -> Target:
    """An end that is asked at its own address; behind a tunnel it sees a node under the tunnel's address."""
    pod, own = world.pod_at(ip), node_of(question.source)
    name = title(pod or world.node_at(ip) or Address(ip))
    node = world.snapshot.nodes.get(own)
    if (
        node is None
        or pod is None
        or not is_node(question.source)
        or pod.node not in world.tunnels.get(own, ())
    ):
        return Target(ip, port, name)
    seen = next((cidr.network_address for cidr in node.pod_cidrs if cidr.version == ip.version), None)
    return Target(ip, port, name, seen, f"{own} reaches Pods of {pod.node} by tunnel")


def slices_of(world: World, service: Service) -> Iterator[EndpointSlice]:
    """The slices of a Service that podwall goes by."""
    for of in world.snapshot.slices_of(service.key).values():
        if service_of(of) == service.key:
            yield of


def _headless(world: World, front: Frontend, question: Question) -> Route:
    """A name that answers the Pods' own addresses: nobody translates a port."""
    found = candidates(slices_of(world, front.service), front.port, front.family)
    chosen = choose(found, "cluster", Here(""))
    if not chosen:
        empty = why_empty(world, front.service, front.port)
        return Route((), empty.sentence, empty.cause)
    asked = question.port if isinstance(question.port, int) else None
    targets = tuple(direct(world, question, ip, asked or port) for ip, port in chosen)
    numbers = {port for _, port in chosen}
    doubt = ""
    if asked is not None and asked not in numbers:
        doubt = (
            f"{title(front.service)} is headless: its name answers the Pods' own addresses, and nobody "
            f"translates port {asked} to {', '.join(map(str, sorted(numbers)))}; connect to that"
        )
    return Route(targets, _spread(front, targets, "cluster"), "target-port" if doubt else "", doubt)


def _inside_only(front: Frontend) -> str:
    ports = [each.node_port for each in front.service.ports if each.node_port]
    has = f"; it has NodePort {', '.join(map(str, ports))}" if ports else ", and it has no NodePort"
    if front.service.type == "LoadBalancer":
        has += ", and no address of a load balancer yet"
    return (
        f"{title(front.service)} is met at its ClusterIP {front.address} from inside of the cluster: nothing "
        f"leads there from outside, unless somebody routes it to a node{has}"
    )


def _entry(world: World, front: Frontend, question: Question) -> Entry:
    """Pods and nodes are served by their own node; a NodePort with a Local policy by the one it is of."""
    own = node_of(question.source)
    only_there = front.service.external_traffic_policy == "Local" or not own
    if front.node is not None and front.node.name != own and only_there:
        return Entry(_here(world, front.node.name), outside=True)
    return Entry(_here(world, own or question.via), outside=not own)


def _here(world: World, node: str) -> Here:
    return here_of(node, world.snapshot.nodes.get(node))


def _admitted(front: Frontend, source: IPAddress) -> bool:
    ranges = front.service.source_ranges
    if ranges is None or front.met != "LoadBalancer":
        return True
    return any(source in each for each in ranges)


def _nowhere(world: World, front: Frontend, entry: Entry, others: int) -> Route:
    service, node = front.service, entry.here.node
    if others:
        policy = "internalTrafficPolicy" if front.met == "ClusterIP" else "externalTrafficPolicy"
        said = (
            f"{title(service)} has {policy}: Local and no ready endpoint on {node}; "
            f"{others} on other nodes do not count"
        )
        silent = front.met != "ClusterIP"
        return Route((), said, "traffic-policy-local", entry=node, silent=silent)
    empty = why_empty(world, service, front.port)
    return Route((), empty.sentence, empty.cause, entry=node)


def _target(world: World, backend: Backend, question: Question, entry: Entry) -> Target:
    """An endpoint; what came from outside and goes on to another node's leaves with this node's address."""
    ip, port = backend
    pod, there = world.pod_at(ip), world.node_at(ip)
    name = title(pod or there or Address(ip))
    if not entry.outside:
        return Target(ip, port, name)
    home = pod.node if pod else there.name if there else ""
    node, own = world.snapshot.nodes.get(entry.here.node), node_of(question.source)
    if node is not None and node.name not in {home, own}:
        why = f"the endpoint is not on {node.name}, where it comes in"
        return Target(ip, port, name, _address(node, ip.version), why)
    sender = world.snapshot.nodes.get(own)
    tunnelled = entry.here.node in world.tunnels.get(own, ()) and not is_node(question.source)
    if sender is not None and tunnelled:
        why = f"no tunnel leads from {own} to the own address of {entry.here.node}"
        return Target(ip, port, name, _address(sender, ip.version), why)
    return Target(ip, port, name)


def _address(node: Node, version: int) -> IPAddress | None:
    return next((each for each in node.internal_ips if each.version == version), None)


def _spread(front: Frontend, targets: tuple[Target, ...], reach: Reach) -> str:
    names = ", ".join(f"{each.title} ({each.place})" for each in targets[:MOST_NAMED])
    more = f" and {len(targets) - MOST_NAMED} more" if len(targets) > MOST_NAMED else ""
    where = " of the same node" if reach == "local" else ""
    sticky = ", the same for the same client" if front.service.session_affinity == "ClientIP" else ""
    what = f"{title(front.service)}, {front.met} port {front.number},"
    return f"{what} goes to one of {len(targets)}{where}{sticky}: {names}{more}"
