"""Clusters of any size as API objects: Nodes, Namespaces, Pods, NetworkPolicies, Services, EndpointSlices.

One node is the one that is measured. Its Pods are of all Namespaces, so nearly every policy selects some of
them and nearly all peers are in use: the worst case. Half of the policies name Pods of their own Namespace,
half others.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, TypeAlias

from lab.names import NodePlace
from lab.nodes import node_object

Object: TypeAlias = dict[str, Any]

NAMESPACES = 50
PODS_A_NODE = 110
APPS, TIERS = 20, 3
NAME_LABEL = "kubernetes.io/metadata.name"
PROBED = "probed"
"""A Namespace of its own for what the benchmark changes."""


def nodes(own: NodePlace, others: int) -> Iterator[Object]:
    """The measured Node, whose network was announced before, and others on its link."""
    announced = {"type": "NetworkUnavailable", "status": "False"}
    node = node_object(own)
    yield {**node, "status": {**node["status"], "conditions": [*node["status"]["conditions"], announced]}}
    for number in range(others):
        name, cidrs = f"other{number}", [f"10.245.{number}.0/24", f"fd00:10:245:{number:x}::/64"]
        addresses = [f"172.30.0.{100 + number}", f"fd30::{0x100 + number:x}"]
        yield {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "uid": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
            "status": {"addresses": [{"type": "InternalIP", "address": each} for each in addresses]},
        }


def namespaces() -> Iterator[Object]:
    """The Namespaces of all else."""
    for name in (PROBED, *(f"ns-{number}" for number in range(NAMESPACES))):
        yield {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "uid": name, "labels": {NAME_LABEL: name}},
        }


def pod(namespace: str, name: str, node: str, labels: dict[str, str], *addresses: str) -> Object:
    """A Pod; Pending without addresses. It has the size that real ones have without their spec's details."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": f"{namespace}-{name}", "labels": labels},
        "spec": {
            "nodeName": node,
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
        "status": {
            "phase": "Running" if addresses else "Pending",
            "conditions": [{"type": "Ready", "status": "True" if addresses else "False"}],
            "podIPs": [{"ip": address} for address in addresses],
        },
    }


def labels(number: int) -> dict[str, str]:
    """What a Pod with this number is labelled with."""
    return {
        "app": f"app-{number // NAMESPACES % APPS}",
        "tier": f"tier-{number % TIERS}",
        "pod-template-hash": f"{number // 5:x}",
        "kubernetes.io/os": "linux",
    }


def other_address(number: int) -> str:
    """The IPv4 address of another node's Pod."""
    return str(ip_address(f"10.245.{number // PODS_A_NODE}.{2 + number % PODS_A_NODE}"))


def other_pods(count: int) -> Iterator[Object]:
    """Running Pods of other nodes."""
    for number in range(count):
        place = number // PODS_A_NODE
        address6 = f"fd00:10:245:{place:x}::{2 + number % PODS_A_NODE:x}"
        yield pod(
            f"ns-{number % NAMESPACES}",
            f"pod-{number}",
            f"other{place}",
            labels(number),
            other_address(number),
            address6,
        )


def policies(count: int) -> Iterator[Object]:
    """Policies of both directions with a peer each; every seventh selects a whole Namespace.

    Every tenth asks for a port by its name, too, which takes a set of its own for each peer.
    """
    for number in range(count):
        app = {"podSelector": {"matchLabels": {"app": f"app-{number // NAMESPACES % APPS}"}}}
        far = {"namespaceSelector": {"matchLabels": {NAME_LABEL: f"ns-{number % (NAMESPACES - 1)}"}}}
        peer = app if number % 2 else {**app, **far}
        ports = [{"protocol": "TCP", "port": port} for port in ((80, "http") if number % 10 == 0 else (80,))]
        selected = {"matchLabels": {"tier": f"tier-{number % TIERS}"}} if number % 7 else {}
        yield policy(
            f"ns-{number % NAMESPACES}",
            f"policy-{number}",
            selected,
            ingress=[{"from": [peer], "ports": ports}],
            egress=[{"to": [peer], "ports": ports}],
        )


def policy(namespace: str, name: str, selector: Object, **directions: list[Object]) -> Object:
    """A NetworkPolicy with the directions that are named."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "uid": f"{namespace}-{name}"},
        "spec": {
            "podSelector": selector,
            "policyTypes": [direction.capitalize() for direction in directions],
            **directions,
        },
    }


def service(number: int) -> Object:
    """A Service of one TCP port; its ClusterIP follows from its number."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": f"service-{number}",
            "namespace": f"ns-{number % NAMESPACES}",
            "uid": f"service-{number}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number)],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None",
            "internalTrafficPolicy": "Cluster",
            "selector": {"app": f"service-{number}"},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
        },
        "status": {"loadBalancer": {}},
    }


def cluster_ip(number: int) -> str:
    """The address of a Service."""
    return str(ip_address("10.96.0.0") + 10 + number)


def endpoint_slice(number: int, *addresses: str, node: str = "other0") -> Object:
    """The endpoints of a Service, all ready."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"service-{number}-abcde",
            "namespace": f"ns-{number % NAMESPACES}",
            "uid": f"slice-{number}",
            "labels": {
                "kubernetes.io/service-name": f"service-{number}",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": node,
                "targetRef": {"kind": "Pod", "namespace": "default", "name": f"pod-{address}"},
            }
            for address in addresses
        ],
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }


def services(count: int, endpoints: int = 2) -> Iterator[Object]:
    """Services with so many endpoints each, on other nodes, and their slices."""
    for number in range(count):
        yield service(number)
        yield endpoint_slice(
            number, *(endpoint_address(number * endpoints + index) for index in range(endpoints))
        )


def endpoint_address(number: int) -> str:
    """An endpoint's address: of another node's Pod, each its own."""
    return str(ip_address("10.200.0.0") + number)
