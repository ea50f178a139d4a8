"""Reads Services, EndpointSlices and Endpoints; what cannot be used is left out and named.

An endpoint on a loopback, link-local, multicast or unspecified address is refused: traffic to it would reach
the node itself or its neighbours instead of a Pod (CVE-2021-25737).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal, cast

from . import wire
from .model import (
    CLIENT_IP_TIMEOUT,
    SERVICE_NAME_LABEL,
    Endpoint,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    EndpointsSubset,
    Family,
    IPAddress,
    IPNetwork,
    LoadBalancerIngress,
    ObjectRef,
    Problem,
    Service,
    ServicePort,
    ServiceType,
    TrafficPolicy,
)
from .values import Found, address, network, port, port_or_name, protocol, shown

_SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_NO_SPEC = wire.ServiceSpec()
_NO_CONDITIONS = wire.EndpointConditions()
_NO_HINTS = wire.Hints()


def service_of(item: wire.Service, found: Found) -> Service:
    meta, spec = item.metadata, item.spec or _NO_SPEC
    kind = cast("ServiceType", _one_of(spec.type, _SERVICE_TYPES, "ClusterIP", "spec.type", found))
    cluster_ips, headless = _cluster_ips(spec, found)
    if kind == "ExternalName":
        cluster_ips, headless = (), False
    return Service(
        namespace=meta.namespace or "default",
        name=meta.name or "",
        uid=meta.uid or "",
        labels=meta.labels or {},
        annotations=meta.annotations or {},
        created=timestamp(meta.creation_timestamp, found),
        generation=meta.generation or 0,
        deleting=meta.deletion_timestamp is not None,
        type=kind,
        headless=headless,
        cluster_ips=cluster_ips,
        ip_families=_families(spec, cluster_ips, found),
        ip_family_policy=spec.ip_family_policy or "",
        ports=_service_ports(spec.ports or (), found),
        selector=spec.selector,
        external_ips=_addresses(spec.external_ips or (), "spec.externalIPs", found),
        external_name=spec.external_name or "",
        load_balancer=_ingress(item.status, found),
        load_balancer_ip=_optional_address(spec.load_balancer_ip, "spec.loadBalancerIP", found),
        load_balancer_class=spec.load_balancer_class,
        source_ranges=_source_ranges(spec.load_balancer_source_ranges, found),
        session_affinity=_affinity(spec, found),
        affinity_timeout=_affinity_timeout(spec, found),
        internal_traffic_policy=_traffic_policy(spec.internal_traffic_policy, "internal", found),
        external_traffic_policy=_traffic_policy(spec.external_traffic_policy, "external", found),
        health_check_node_port=_optional_port(spec.health_check_node_port, "spec.healthCheckNodePort", found),
        publish_not_ready_addresses=spec.publish_not_ready_addresses is True,
        problems=tuple(found),
    )


def slice_of(item: wire.EndpointSlice, found: Found) -> EndpointSlice:
    meta = item.metadata
    labels = meta.labels or {}
    kind = _one_of(item.address_type, ("IPv4", "IPv6", "FQDN"), "", "addressType", found)
    if not kind:
        kind = "FQDN"  # no address of it can be used
    return EndpointSlice(
        namespace=meta.namespace or "default",
        name=meta.name or "",
        uid=meta.uid or "",
        labels=labels,
        service=labels.get(SERVICE_NAME_LABEL, ""),
        address_type=cast("Literal['IPv4', 'IPv6', 'FQDN']", kind),
        endpoints=tuple(
            _endpoint(entry, kind, f"endpoints[{index}]", found)
            for index, entry in enumerate(item.endpoints or ())
        ),
        ports=_endpoint_ports(item.ports or (), "ports", found),
        annotations=meta.annotations or {},
        deleting=meta.deletion_timestamp is not None,
        problems=tuple(found),
    )


def endpoints_of(item: wire.Endpoints, found: Found) -> Endpoints:
    meta = item.metadata
    return Endpoints(
        namespace=meta.namespace or "default",
        name=meta.name or "",
        uid=meta.uid or "",
        labels=meta.labels or {},
        annotations=meta.annotations or {},
        subsets=tuple(
            _subset(entry, f"subsets[{index}]", found) for index, entry in enumerate(item.subsets or ())
        ),
        deleting=meta.deletion_timestamp is not None,
        problems=tuple(found),
    )


def timestamp(value: str | None, found: Found) -> datetime | None:
    """When the object was made; what is no time is as good as missing, and named."""
    if value is None:
        return None
    try:
        made = datetime.fromisoformat(value)
    except ValueError:
        made = None
    if made is None or made.tzinfo is None:
        found.append(Problem("metadata.creationTimestamp", f"{shown(value)} is not a time with a zone"))
        return None
    return made


def _one_of(value: str | None, allowed: Sequence[str], default: str, field: str, found: Found) -> str:
    if value is not None and value in allowed:
        return value
    if value or not default:
        found.append(Problem(field, f"{shown(value)} is not one of {', '.join(allowed)}"))
    return default


def _cluster_ips(spec: wire.ServiceSpec, found: Found) -> tuple[tuple[IPAddress, ...], bool]:
    if spec.cluster_ips:
        given, field = [ip for ip in spec.cluster_ips if ip], "spec.clusterIPs"
    else:
        given, field = [spec.cluster_ip] if spec.cluster_ip else [], "spec.clusterIP"
    if given == ["None"]:
        return (), True
    return _addresses(given, field, found), False


def _families(spec: wire.ServiceSpec, ips: Iterable[IPAddress], found: Found) -> tuple[Family, ...]:
    if not spec.ip_families:
        return tuple(dict.fromkeys(ip.version for ip in ips))
    names: dict[str, Family] = {"IPv4": 4, "IPv6": 6}
    for index, name in enumerate(spec.ip_families):
        _one_of(name, tuple(names), "", f"spec.ipFamilies[{index}]", found)
    return tuple(names[name] for name in spec.ip_families if name in names)


def _service_ports(items: Iterable[wire.ServicePort], found: Found) -> tuple[ServicePort, ...]:
    read = (_service_port(item, f"spec.ports[{index}]", found) for index, item in enumerate(items))
    return tuple(item for item in read if item is not None)


def _service_port(item: wire.ServicePort, field: str, found: Found) -> ServicePort | None:
    number = port(item.port, f"{field}.port", found)
    transport = protocol(item.protocol or "TCP", f"{field}.protocol", found)
    target: int | str | None = number
    if item.target_port not in (None, 0, ""):
        target = port_or_name(item.target_port, f"{field}.targetPort", found)
    if number is None or transport is None or target is None:
        return None
    return ServicePort(
        port=number,
        name=item.name or "",
        protocol=transport,
        target_port=target,
        node_port=_optional_port(item.node_port, f"{field}.nodePort", found),
    )


def _optional_port(value: int | None, field: str, found: Found) -> int:
    return (port(value, field, found) or 0) if value else 0


def _addresses(values: Iterable[str], field: str, found: Found) -> tuple[IPAddress, ...]:
    read = (address(value, f"{field}[{index}]", found) for index, value in enumerate(values))
    return tuple(ip for ip in read if ip is not None)


def _optional_address(value: str | None, field: str, found: Found) -> IPAddress | None:
    return address(value, field, found) if value else None


def _ingress(status: wire.ServiceStatus | None, found: Found) -> tuple[LoadBalancerIngress, ...]:
    items = status.load_balancer.ingress if status and status.load_balancer else None
    read = []
    for index, item in enumerate(items or ()):
        field = f"status.loadBalancer.ingress[{index}]"
        ip = _optional_address(item.ip, f"{field}.ip", found)
        mode = _one_of(item.ip_mode, ("VIP", "Proxy"), "VIP", f"{field}.ipMode", found)
        if ip is not None or item.hostname:
            read.append(LoadBalancerIngress(ip, item.hostname or "", cast("Literal['VIP', 'Proxy']", mode)))
    return tuple(read)


def _source_ranges(values: Sequence[str] | None, found: Found) -> tuple[IPNetwork, ...] | None:
    """None only when nobody gave any: a range that cannot be used must not admit everybody."""
    field = "spec.loadBalancerSourceRanges"
    given = bool(values) or any(problem.field.startswith(field) for problem in found)
    read = [network(value.strip(), f"{field}[{index}]", found) for index, value in enumerate(values or ())]
    return tuple(part for part in read if part is not None) if given else None


def _affinity(spec: wire.ServiceSpec, found: Found) -> Literal["None", "ClientIP"]:
    value = _one_of(spec.session_affinity, ("None", "ClientIP"), "None", "spec.sessionAffinity", found)
    return cast("Literal['None', 'ClientIP']", value)


def _affinity_timeout(spec: wire.ServiceSpec, found: Found) -> int:
    config = spec.session_affinity_config
    value = config.client_ip.timeout_seconds if config and config.client_ip else None
    if value is None or 1 <= value <= 86400:
        return value or CLIENT_IP_TIMEOUT
    field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
    found.append(Problem(field, f"{value} is not a number of seconds from 1 to 86400"))
    return CLIENT_IP_TIMEOUT


def _traffic_policy(value: str | None, side: str, found: Found) -> TrafficPolicy:
    field = f"spec.{side}TrafficPolicy"
    return cast("TrafficPolicy", _one_of(value, ("Cluster", "Local"), "Cluster", field, found))


def _endpoint(item: wire.Endpoint, kind: str, field: str, found: Found) -> Endpoint:
    conditions, hints = item.conditions or _NO_CONDITIONS, item.hints or _NO_HINTS
    ready = conditions.ready is not False
    return Endpoint(
        addresses=()
        if kind == "FQDN"
        else tuple(
            ip
            for index, text in enumerate(item.addresses or ())
            if (ip := _endpoint_address(text, kind, f"{field}.addresses[{index}]", found)) is not None
        ),
        ready=ready,
        serving=ready if conditions.serving is None else conditions.serving,
        terminating=conditions.terminating is True,
        hostname=item.hostname or "",
        node=item.node_name or "",
        zone=item.zone or "",
        target=_reference(item.target_ref),
        zone_hints=tuple(hint.name for hint in hints.for_zones or () if hint.name),
        node_hints=tuple(hint.name for hint in hints.for_nodes or () if hint.name),
    )


def _endpoint_address(text: str | None, kind: str, field: str, found: Found) -> IPAddress | None:
    ip = address(text, field, found)
    if ip is None:
        return None
    if kind and kind != f"IPv{ip.version}":
        found.append(Problem(field, f"{ip} is not of the slice's addressType {kind}"))
        return None
    if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        what = "a loopback, link-local, multicast or unspecified address"
        found.append(Problem(field, f"{ip} is {what}: no endpoint may be there"))
        return None
    return ip


def _reference(item: wire.Reference | None) -> ObjectRef | None:
    if item is None:
        return None
    return ObjectRef(item.kind or "", item.namespace or "", item.name or "", item.uid or "")


def _endpoint_ports(items: Iterable[wire.EndpointPort], field: str, found: Found) -> tuple[EndpointPort, ...]:
    read = (_endpoint_port(item, f"{field}[{index}]", found) for index, item in enumerate(items))
    return tuple(item for item in read if item is not None)


def _endpoint_port(item: wire.EndpointPort, field: str, found: Found) -> EndpointPort | None:
    number = None if item.port is None else port(item.port, f"{field}.port", found)
    transport = protocol(item.protocol or "TCP", f"{field}.protocol", found)
    if transport is None or (number is None and item.port is not None):
        return None
    return EndpointPort(item.name or "", number, transport)


def _subset(item: wire.EndpointSubset, field: str, found: Found) -> EndpointsSubset:
    ready = _subset_endpoints(item.addresses or (), True, f"{field}.addresses", found)
    not_ready = _subset_endpoints(item.not_ready_addresses or (), False, f"{field}.notReadyAddresses", found)
    return EndpointsSubset(ready + not_ready, _endpoint_ports(item.ports or (), f"{field}.ports", found))


def _subset_endpoints(
    items: Iterable[wire.EndpointAddress], ready: bool, field: str, found: Found
) -> tuple[Endpoint, ...]:
    read = []
    for index, item in enumerate(items):
        ip = _endpoint_address(item.ip, "", f"{field}[{index}].ip", found)
        if ip is not None:
            read.append(
                Endpoint(
                    (ip,),
                    ready=ready,
                    serving=ready,
                    hostname=item.hostname or "",
                    node=item.node_name or "",
                    target=_reference(item.target_ref),
                )
            )
    return tuple(read)
