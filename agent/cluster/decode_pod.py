"""Reads Nodes, Namespaces and Pods; what cannot be used is left out and named."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from sys import intern
from typing import Any, TypeVar, cast

from . import wire
from .model import (
    NAMESPACE_NAME_LABEL,
    ContainerPort,
    IPAddress,
    IPNetwork,
    Namespace,
    Node,
    Owner,
    Phase,
    Pod,
    Problem,
)
from .values import Found, address, network, port, protocol, shown

_PHASES = frozenset(("Pending", "Running", "Succeeded", "Failed", "Unknown"))
_T = TypeVar("_T", bound=Hashable)

_NO_POD_SPEC = wire.PodSpec()
_NO_POD_STATUS = wire.PodStatus()


def node_of(item: wire.Node, found: Found) -> Node:
    meta, spec, status = item.metadata, item.spec or wire.NodeSpec(), item.status or wire.NodeStatus()
    conditions = {c.type: c.status for c in status.conditions or ()}
    return Node(
        name=meta.name or "",
        uid=meta.uid or "",
        labels=meta.labels or {},
        pod_cidrs=_pod_cidrs(spec, found),
        internal_ips=_node_ips(status, "InternalIP", found),
        external_ips=_node_ips(status, "ExternalIP", found),
        ready=conditions.get("Ready") == "True",
        deleting=meta.deletion_timestamp is not None,
        annotations=meta.annotations or {},
        network_unavailable=_condition(conditions.get("NetworkUnavailable")),
        unschedulable=spec.unschedulable is True,
        problems=tuple(found),
    )


def _condition(status: str | None) -> bool | None:
    return None if status is None else status == "True"


def _pod_cidrs(spec: wire.NodeSpec, found: Found) -> tuple[IPNetwork, ...]:
    given = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    read = (network(cidr, f"spec.podCIDRs[{index}]", found) for index, cidr in enumerate(given))
    return tuple(cidr for cidr in read if cidr is not None)


def _node_ips(status: wire.NodeStatus, kind: str, found: Found) -> tuple[IPAddress, ...]:
    read = (
        address(entry.address, f"status.addresses[{index}].address", found)
        for index, entry in enumerate(status.addresses or ())
        if entry.type == kind
    )
    return tuple(ip for ip in read if ip is not None)


def namespace_of(item: wire.Namespace, found: Found) -> Namespace:
    meta = item.metadata
    name = meta.name or ""
    return Namespace(
        name=name,
        uid=meta.uid or "",
        # The API server sets this label; a manifest may leave it out but cannot say another name.
        labels={**(meta.labels or {}), NAMESPACE_NAME_LABEL: name},
        deleting=meta.deletion_timestamp is not None,
        problems=tuple(found),
    )


@lru_cache(maxsize=1024)
def _first(value: Hashable) -> Any:
    return value


def _shared(value: _T) -> _T:
    """The same value once: Pods of one template have equal ports and owners, and there are many."""
    return cast("_T", _first(value))


def pod_of(item: wire.Pod, found: Found) -> Pod:
    meta, spec, status = item.metadata, item.spec or _NO_POD_SPEC, item.status or _NO_POD_STATUS
    phase = status.phase or "Pending"
    if phase not in _PHASES:
        found.append(Problem("status.phase", f"{shown(phase)} is not a phase: treated as Unknown"))
        phase = "Unknown"
    ips, ports, ready = _pod_ips(status, found), _pod_ports(spec, found), _ready(status)
    return Pod(
        intern(meta.namespace or "default"),
        meta.name or "",
        meta.uid or "",
        {key: intern(value) for key, value in meta.labels.items()} if meta.labels else {},
        intern(spec.node_name or ""),
        cast("Phase", phase),
        spec.host_network is True,
        ips,
        ports,
        ready,
        meta.deletion_timestamp is not None,
        _shared(tuple([_owner(owner) for owner in meta.owner_references])) if meta.owner_references else (),
        spec.hostname or "",
        spec.subdomain or "",
        tuple(found),
    )


def _owner(item: wire.OwnerReference) -> Owner:
    return Owner(item.kind or "", item.name or "", item.uid or "", item.controller is True)


def _ready(status: wire.PodStatus) -> bool:
    if status.conditions:
        for condition in status.conditions:
            if condition.type == "Ready":
                return condition.status == "True"
    return False


def _pod_ips(status: wire.PodStatus, found: Found) -> tuple[IPAddress, ...]:
    given = [entry.ip for entry in status.pod_ips] if status.pod_ips else [status.pod_ip]
    ips = []
    for index, text in enumerate(given):
        if text:
            ip = address(text, f"status.podIPs[{index}].ip", found)
            if ip is not None:
                ips.append(ip)
    return tuple(ips)


def _pod_ports(spec: wire.PodSpec, found: Found) -> tuple[ContainerPort, ...]:
    """Containers, then sidecars, then other init containers: a name is looked up in this order."""
    ports: list[ContainerPort] = []
    for index, container in enumerate(spec.containers or ()):
        if container.ports:
            _add_ports(ports, container, "container", f"spec.containers[{index}]", found)
    if spec.init_containers:
        for role in ("sidecar", "init"):
            for index, container in enumerate(spec.init_containers):
                is_role = (container.restart_policy == "Always") == (role == "sidecar")
                if container.ports and is_role:
                    _add_ports(ports, container, role, f"spec.initContainers[{index}]", found)
    return _shared(tuple(ports)) if ports else ()


def _add_ports(
    ports: list[ContainerPort], container: wire.Container, role: str, field: str, found: Found
) -> None:
    for index, item in enumerate(container.ports or ()):
        read = _container_port(item, role, f"{field}.ports[{index}]", found)
        if read is not None:
            ports.append(read)


def _container_port(item: wire.ContainerPort, role: str, field: str, found: Found) -> ContainerPort | None:
    number = port(item.container_port, f"{field}.containerPort", found)
    transport = protocol(item.protocol or "TCP", f"{field}.protocol", found)
    if number is None or transport is None:
        return None
    host_port, host_ip = 0, None
    if item.host_port:
        host_port = port(item.host_port, f"{field}.hostPort", found) or 0
        if item.host_ip:
            host_ip = address(item.host_ip, f"{field}.hostIP", found)
            host_port = host_port if host_ip is not None else 0  # never wider than it was asked for
    return ContainerPort(item.name or "", number, transport, host_port, host_ip, cast("Any", role))
