"""Who there is, as plain data for the page. Pure.

    Pod, node, address --> "pod/shop/web-1", "node/worker", "203.0.113.10"

An id is also a name that `podwall why` understands. Pods of one workload belong together: those of a
Deployment, though a ReplicaSet made them.
"""

from __future__ import annotations

from typing import Any

from agent.cluster.model import NetworkPolicy, Pod, Service
from agent.cluster.store import Snapshot
from agent.compile.selectors import Selector
from agent.explain.ends import workload_of
from agent.explain.policy import selected_by
from agent.explain.world import World


def pod_id(pod: Pod) -> str:
    """The id of a Pod."""
    return f"pod/{pod.namespace}/{pod.name}"


def on_pod_network(snapshot: Snapshot) -> list[Pod]:
    """The Pods with a network of their own that have not ended, by namespace and name."""
    pods = (pod for _, pod in sorted(snapshot.pods.items()))
    return [pod for pod in pods if not pod.host_network and not pod.finished]


def cluster_json(world: World) -> dict[str, Any]:
    """The cluster's objects that the page draws and offers."""
    snapshot = world.snapshot
    pods = on_pod_network(snapshot)
    return {
        "namespaces": sorted(snapshot.namespaces),
        "pods": [_pod_json(world, pod) for pod in pods],
        "nodes": [
            {"id": f"node/{name}", "name": name, "addresses": [*map(str, node.internal_ips)]}
            for name, node in sorted(snapshot.nodes.items())
        ],
        "services": [_service_json(service) for _, service in sorted(snapshot.services.items())],
        "policies": [_policy_json(snapshot, policy) for _, policy in sorted(snapshot.policies.items())],
    }


def _pod_json(world: World, pod: Pod) -> dict[str, Any]:
    workload = workload_of(pod)
    ports = sorted({(port.protocol, port.port, port.name) for port in pod.ports})
    return {
        "id": pod_id(pod),
        "namespace": pod.namespace,
        "name": pod.name,
        "workload": {"kind": workload.kind, "name": workload.name},
        "node": pod.node,
        "addresses": [*map(str, pod.ips)],
        "ready": pod.ready,
        "ports": [{"protocol": protocol, "port": port, "name": name} for protocol, port, name in ports],
        "labels": dict(sorted(pod.labels.items())),
        "isolated": {
            "ingress": ["/".join(policy.key) for policy in selected_by(world, "Ingress", pod)],
            "egress": ["/".join(policy.key) for policy in selected_by(world, "Egress", pod)],
        },
    }


def _service_json(service: Service) -> dict[str, Any]:
    return {
        "id": f"svc/{service.namespace}/{service.name}",
        "namespace": service.namespace,
        "name": service.name,
        "addresses": [*map(str, service.cluster_ips)],
        "ports": [
            {"protocol": port.protocol, "port": port.port, "name": port.name} for port in service.ports
        ],
    }


def _policy_json(snapshot: Snapshot, policy: NetworkPolicy) -> dict[str, Any]:
    selector = Selector(policy.pod_selector)
    pods = snapshot.pods_in(policy.namespace).values()
    return {
        "key": "/".join(policy.key),
        "namespace": policy.namespace,
        "name": policy.name,
        "types": sorted(policy.policy_types, reverse=True),
        "pods": sum(selector.matches(pod.labels) for pod in pods if not pod.host_network),
        "audit": policy.mode == "audit",
        "problems": [*map(str, policy.problems)],
    }
