"""The API's JSON as it comes: only the fields that `decode` reads; msgspec skips all others.

A missing field and null are alike to the API, so every field may be either.  A NetworkPolicy's spec stays
untyped: there a field of a wrong type must close what it is part of, and only that part's reader can do so.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


class Wire(msgspec.Struct, rename="camel", gc=False):
    """One JSON object."""


class Meta(Wire):
    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    labels: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class OwnerReference(Wire):
    kind: str | None = None
    name: str | None = None
    uid: str | None = None
    controller: bool | None = None


class PodMeta(Meta):
    owner_references: list[OwnerReference] | None = None


class AnnotatedMeta(Meta):
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    generation: int | None = None


class Condition(Wire):
    type: str | None = None
    status: str | None = None


class NodeSpec(Wire):
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    unschedulable: bool | None = None


class NodeAddress(Wire):
    type: str | None = None
    address: str | None = None


class NodeStatus(Wire):
    addresses: list[NodeAddress] | None = None
    conditions: list[Condition] | None = None


class Node(Wire):
    metadata: AnnotatedMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class Namespace(Wire):
    metadata: Meta


class ContainerPort(Wire):
    name: str | None = None
    container_port: int | None = None
    protocol: str | None = None
    host_port: int | None = None
    host_ip: str | None = msgspec.field(default=None, name="hostIP")


class Container(Wire):
    name: str | None = None
    ports: list[ContainerPort] | None = None
    restart_policy: str | None = None


class PodSpec(Wire):
    node_name: str | None = None
    host_network: bool | None = None
    hostname: str | None = None
    subdomain: str | None = None
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None


class PodIP(Wire):
    ip: str | None = None


class PodStatus(Wire):
    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    pod_ips: list[PodIP] | None = msgspec.field(default=None, name="podIPs")
    conditions: list[Condition] | None = None


class Pod(Wire):
    metadata: PodMeta
    spec: PodSpec | None = None
    status: PodStatus | None = None


class NetworkPolicy(Wire):
    metadata: AnnotatedMeta
    spec: Any = None


class ServicePort(Wire):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    target_port: int | str | None = None
    node_port: int | None = None


class ClientIPConfig(Wire):
    timeout_seconds: int | None = None


class SessionAffinityConfig(Wire):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(Wire):
    type: str | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    ip_family_policy: str | None = None
    ports: list[ServicePort] | None = None
    selector: dict[str, str] | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    external_name: str | None = None
    load_balancer_ip: str | None = msgspec.field(default=None, name="loadBalancerIP")
    load_balancer_class: str | None = None
    load_balancer_source_ranges: list[str] | None = None
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    health_check_node_port: int | None = None
    publish_not_ready_addresses: bool | None = None


class LoadBalancerIngress(Wire):
    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(Wire):
    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(Wire):
    load_balancer: LoadBalancerStatus | None = None


class Service(Wire):
    metadata: AnnotatedMeta
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class Reference(Wire):
    kind: str | None = None
    namespace: str | None = None
    name: str | None = None
    uid: str | None = None


class EndpointConditions(Wire):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(Wire):
    name: str | None = None


class Hints(Wire):
    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class Endpoint(Wire):
    addresses: list[str] | None = None
    conditions: EndpointConditions | None = None
    hostname: str | None = None
    node_name: str | None = None
    zone: str | None = None
    target_ref: Reference | None = None
    hints: Hints | None = None


class EndpointPort(Wire):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class EndpointSlice(Wire):
    metadata: AnnotatedMeta
    address_type: str | None = None
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None


class EndpointAddress(Wire):
    ip: str | None = None
    hostname: str | None = None
    node_name: str | None = None
    target_ref: Reference | None = None


class EndpointSubset(Wire):
    addresses: list[EndpointAddress] | None = None
    not_ready_addresses: list[EndpointAddress] | None = None
    ports: list[EndpointPort] | None = None


class Endpoints(Wire):
    metadata: AnnotatedMeta
    subsets: list[EndpointSubset] | None = None


class ListMeta(Wire):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class Page(Wire, Generic[T]):
    """One page of a list."""

    metadata: ListMeta
    items: list[T] | None = None


class WatchEvent(Wire):
    """One line of a watch."""

    type: str
    object: msgspec.Raw


class Identity(Wire):
    """What every object has."""

    metadata: Meta


class Version(Wire):
    resource_version: str | None = None


class Versioned(Wire):
    """Which version of something it is, and nothing else of it."""

    metadata: Version


class Status(Wire):
    """What the API server answers when it refuses."""

    code: int = 0
    reason: str = ""
    message: str = ""
