"""One Service and its endpoints as elements of the shared maps (`agent.compile.service_chains`). Pure.

    Service, of one port                        list that is asked             elements
    ClusterIP                                   cluster, or local with         frontends
                                                internalTrafficPolicy Local
    load balancer and external addresses        cluster                        frontends
      with externalTrafficPolicy Local,         cluster                        restricted
      or loadBalancerSourceRanges
    NodePort                                    cluster                        node_ports
    with externalTrafficPolicy Local,           local                          outside, outside_node_ports
      from outside the cluster

A list is named by its Service, port and reach, and has one number for both families. It exists when something
leads to it; without endpoints it refuses. Where another node may have an endpoint though this one has none
(externalTrafficPolicy Local, from outside) packets are dropped instead: the client is about to be led there,
and a refusal would end its attempt.

Not served: headless Services, ExternalName, and those that somebody else serves (the labels
service.kubernetes.io/service-proxy-name and service.kubernetes.io/headless).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from agent.cluster.model import Family, IPAddress, IPNetwork, Protocol, Service, ServicePort
from agent.compile import service_chains as chains
from agent.compile.balancers import MOST_STICKY, Balancer
from agent.compile.endpoints import Backend, Reach, unusable
from agent.compile.links import outermost
from agent.compile.names import comment
from agent.compile.packets import FAMILIES
from agent.compile.peers import PROTO
from agent.compile.service_ids import Name
from agent.nft.model import Element, Key, Owner, Proto

SOMEBODY_ELSES = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What the configuration says: whether Services are served, and what of them is allowed.

    `external_ips`: the ranges that externalIPs may be in. `node_port_addresses`: the own addresses on which
    NodePorts are served, () for all. `pools`: the addresses that podwall gives to Services of type
    LoadBalancer, which refuse packets to ports that no Service has.
    """

    enabled: bool = True
    external_ips: tuple[IPNetwork, ...] = ()
    node_port_addresses: tuple[IPNetwork, ...] = ()
    pools: tuple[IPNetwork, ...] = ()


class Claim(NamedTuple):
    """What one Service alone can have: a port of an address, or with None a NodePort."""

    address: IPAddress | None
    protocol: Protocol
    port: int


class Frontend(NamedTuple):
    """A way to a Service: what it claims, for which of its ports, and the field that says so."""

    claim: Claim
    port: ServicePort
    kind: Literal["cluster", "external", "load balancer", "node"]
    field: str


class Backends(NamedTuple):
    """A list of endpoints of one port and family, and how one of them is picked."""

    port: ServicePort
    family: Family
    reach: Reach
    balancer: Balancer
    endpoints: tuple[Backend, ...]


ListOf: TypeAlias = tuple[ServicePort, Family, Reach]


def served(service: Service) -> bool:
    """Whether podwall serves it at all."""
    return (
        service.type != "ExternalName"
        and not service.headless
        and bool(service.cluster_ips)
        and not any(label in service.labels for label in SOMEBODY_ELSES)
    )


def age(service: Service) -> float:
    """When it was made, in seconds; one that does not say it is younger than all that do."""
    return service.created.timestamp() if service.created else inf


def service_owner(namespace: str, name: str) -> Owner:
    """Who owns the elements of a Service."""
    return ("service", namespace, name)


def families(service: Service) -> tuple[Family, ...]:
    """The families it has a ClusterIP of."""
    versions = {ip.version for ip in service.cluster_ips}
    return tuple(family for family in FAMILIES if family in versions)


def list_name(service: tuple[str, str], port: ServicePort, reach: Reach) -> Name:
    """What the number of a list stands for; `service` is its namespace and name."""
    return (*service, port.name, port.protocol, reach)


# Ways to a Service


def frontends(service: Service, settings: ServiceSettings) -> Iterator[Frontend]:
    """Every way to the Service that is allowed, each claim once."""
    seen: set[Claim] = set()
    for index, port in enumerate(service.ports):
        for frontend in _of_port(service, port, f"spec.ports[{index}]", settings):
            if frontend.claim not in seen:
                seen.add(frontend.claim)
                yield frontend


def _of_port(
    service: Service, port: ServicePort, field: str, settings: ServiceSettings
) -> Iterator[Frontend]:
    for kind, where, address in addresses(service):
        if refused(kind, address, settings):
            continue
        yield Frontend(Claim(address, port.protocol, port.port), port, kind, where)
    if port.node_port and service.type in {"NodePort", "LoadBalancer"}:
        yield Frontend(Claim(None, port.protocol, port.node_port), port, "node", f"{field}.nodePort")


AddressKind: TypeAlias = Literal["cluster", "external", "load balancer"]


def addresses(service: Service) -> Iterator[tuple[AddressKind, str, IPAddress]]:
    """Every address of the Service, and the field that has it."""
    for index, address in enumerate(service.cluster_ips):
        yield "cluster", f"spec.clusterIPs[{index}]", address
    for index, address in enumerate(service.external_ips):
        yield "external", f"spec.externalIPs[{index}]", address
    for index, ingress in enumerate(service.load_balancer if service.type == "LoadBalancer" else ()):
        if ingress.ip is not None and ingress.ip_mode == "VIP":
            yield "load balancer", f"status.loadBalancer.ingress[{index}]", ingress.ip


def repeated(service: Service) -> Iterator[tuple[str, ServicePort]]:
    """The ports that another one before them has already, and the fields that have them."""
    seen: set[tuple[Protocol, int]] = set()
    for index, port in enumerate(service.ports):
        if (port.protocol, port.port) in seen:
            yield f"spec.ports[{index}]", port
        seen.add((port.protocol, port.port))


def refused(kind: AddressKind, address: IPAddress, settings: ServiceSettings) -> str:
    """Why an address is not served, "" when it is.

    Whoever may write Services can name any externalIP, also one that Pods send to: only ranges that the
    configuration allows are taken (CVE-2020-8554).
    """
    if kind == "external" and not any(address in network for network in settings.external_ips):
        return "is in no range of the agent's setting external_ips"
    return unusable(address)


def lists(service: Service, ways: Iterable[Frontend]) -> tuple[ListOf, ...]:
    """The lists of endpoints that these ways lead to."""
    found: dict[ListOf, None] = {}
    for way in ways:
        for family in families(service) if way.claim.address is None else (way.claim.address.version,):
            for reach in reaches(service, way):
                found[way.port, 4 if family == 4 else 6, reach] = None
    return tuple(found)


def reaches(service: Service, way: Frontend) -> tuple[Reach, ...]:
    """The list that a way leads to; the last one for who comes from outside of the cluster."""
    if way.kind == "cluster":
        return ("local",) if service.internal_traffic_policy == "Local" else ("cluster",)
    return ("cluster", "local") if service.external_traffic_policy == "Local" else ("cluster",)


def balancer(service: Service, count: int) -> Balancer:
    """How one of `count` endpoints is picked; 0 endpoints refuse."""
    if not count or service.session_affinity == "None":
        return Balancer(count)
    return Balancer(min(count, MOST_STICKY), service.affinity_timeout)


# Elements


def backends(of: Backends, number: int, endpoint_number: Callable[[Backend], int]) -> Iterator[Element]:
    """What a list with this number becomes."""
    family = of.family
    yield Element(chains.BALANCE[family], number, of.balancer.mark)
    for place, backend in enumerate(of.endpoints[: of.balancer.count]):
        endpoint = endpoint_number(backend)
        yield Element(chains.LISTS[family], (number, place), endpoint)
        yield Element(chains.ENDPOINTS[family], endpoint, backend)
        if of.balancer.timeout:
            yield Element(chains.SERVING[family], (number, endpoint))


def entrances(
    service: Service, way: Frontend, numbers: Mapping[Name, int], filled: Container[ListOf]
) -> Iterator[Element]:
    """What leads to the lists; `filled` are those that have endpoints."""
    of = comment(service.namespace, f"{service.name}:{way.port.name or way.port.port}")
    at, port = way.claim.address, (PROTO[way.claim.protocol], way.claim.port)
    only_here = way.kind != "cluster" and service.external_traffic_policy == "Local"
    ranges = service.source_ranges if way.kind == "load balancer" else None
    by_address = chains.FRONTENDS if ranges is None and not only_here else chains.RESTRICTED
    for family in families(service) if at is None else (family_of(at),):
        into = chains.NODE_PORTS if at is None else by_address
        key: Key = port if at is None else (at, *port)
        reach = reaches(service, way)[0]
        yield Element(into[family], key, numbers[list_name(service.key, way.port, reach)], of)
        if only_here:
            into = chains.OUTSIDE_NODE_PORTS if at is None else chains.OUTSIDE
            yield Element(into[family], key, _from_outside(service, way, family, numbers, filled), of)
    if at is None and only_here:
        yield Element(chains.LOCAL_NODE_PORTS, port, comment=of)
    if at is not None and ranges is not None:
        yield from _admitted((at, *port), ranges, of)


def _from_outside(
    service: Service, way: Frontend, family: Family, numbers: Mapping[Name, int], filled: Container[ListOf]
) -> int:
    """The list of this node's endpoints; nowhere when only other nodes have some."""
    if (way.port, family, "local") not in filled and (way.port, family, "cluster") in filled:
        return chains.NOWHERE
    return numbers[list_name(service.key, way.port, "local")]


def _admitted(at: tuple[IPAddress, Proto, int], ranges: Iterable[IPNetwork], of: str) -> Iterator[Element]:
    """Who may come in by a load balancer's address, when not everybody."""
    yield Element(chains.RANGED[at[0].version], at, comment=of)
    for network in outermost(network for network in ranges if network.version == at[0].version):
        yield Element(chains.ADMITTED[network.version], (*at, network))


def cluster_addresses(service: Service) -> Iterator[Element]:
    """What has its unused ports refused."""
    for address in service.cluster_ips:
        if not unusable(address):
            yield Element(chains.CLUSTER_IPS[address.version], address)


def family_of(address: IPAddress) -> Family:
    """The family of an address."""
    return 4 if address.version == 4 else 6
