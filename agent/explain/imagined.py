"""What manifests leave open, imagined: the Pods of workloads, and addresses of Pods that never ran. Pure.

    Deployment shop/web, replicas: 3     -->  Pods shop/web-1, shop/web-2       two of them tell about all
    Pod shop/web, no status              -->  Pod shop/web, 100.64.0.1          RFC 6598: nobody's address

Selectors and ports can be judged so. What a policy says by ipBlock cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Network
from typing import Any

import msgspec

from agent.cluster.decode import DecodeError, decode
from agent.cluster.model import NAMESPACE_NAME_LABEL, IPAddress, Namespace, Object, Pod
from agent.cluster.store import Snapshot, snapshot_of
from agent.explain.ends import Workload, workload_of

RANGE = IPv4Network("100.64.0.0/10")
MOST_REPLICAS = 2
TEMPLATES = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
"""Where each kind of workload has its Pods' template."""


def with_pods(snapshot: Snapshot, documents: Iterable[Mapping[str, Any]]) -> tuple[Snapshot, tuple[Pod, ...]]:
    """The same objects, and Pods of those workloads that have none among them yet; and these Pods."""
    known = {workload_of(pod) for pod in snapshot.pods.values()}
    made: dict[tuple[str, str], Pod] = {}
    for body in documents:
        with suppress(DecodeError):
            for pod in pods_of(body):
                if workload_of(pod) not in known:
                    made.setdefault(pod.key, pod)
    made = {key: pod for key, pod in made.items() if key not in snapshot.pods}
    return (_changed(snapshot, made) if made else snapshot), tuple(made.values())


def with_addresses(snapshot: Snapshot) -> tuple[Snapshot, tuple[Pod, ...]]:
    """The same objects, where each Pod that may get an address has one, and the Pods that were given it.

    A Pod on its node's network has the node's addresses, where the Node says them.
    """
    free = (address for address in RANGE.hosts() if address not in snapshot.pods_by_ip)
    given = {
        pod.key: msgspec.structs.replace(
            pod, ips=_node_ips(snapshot, pod) if pod.host_network else (next(free),)
        )
        for _, pod in sorted(snapshot.pods.items())
        if not pod.ips and not pod.finished
    }
    if not given:
        return snapshot, ()
    return _changed(snapshot, given), tuple(pod for pod in given.values() if not pod.host_network)


def _changed(snapshot: Snapshot, pods: Mapping[tuple[str, str], Pod]) -> Snapshot:
    objects: tuple[Object, ...] = (
        *snapshot.nodes.values(),
        *{**_namespaces(pods), **snapshot.namespaces}.values(),
        *{**snapshot.pods, **pods}.values(),
        *snapshot.policies.values(),
        *snapshot.services.values(),
        *snapshot.slices.values(),
    )
    return snapshot_of(objects)


def _namespaces(pods: Iterable[tuple[str, str]]) -> dict[str, Namespace]:
    """Each has the label that the API server gives it."""
    return {name: Namespace(name, labels={NAMESPACE_NAME_LABEL: name}) for name, _ in pods}


def _node_ips(snapshot: Snapshot, pod: Pod) -> tuple[IPAddress, ...]:
    node = snapshot.nodes.get(pod.node)
    return node.internal_ips if node else ()


def pods_of(body: Mapping[str, Any]) -> Iterator[Pod]:
    """The Pods that a workload's template describes. Raises DecodeError, naming the workload."""
    kind, metadata = str(body.get("kind")), _mapping(body, "metadata")
    name, namespace = metadata.get("name"), metadata.get("namespace", "default")
    if kind not in TEMPLATES or metadata.get("ownerReferences") or not isinstance(name, str):
        return
    replicas = _mapping(body, "spec").get("replicas", 1)
    template = _mapping(body, *TEMPLATES[kind])
    owner = Workload(kind, str(namespace), name)
    for number in range(1, 1 + min(replicas if isinstance(replicas, int) else 1, MOST_REPLICAS)):
        try:
            pod = decode("Pod", _manifest(owner, number, template))
        except DecodeError as error:
            field = ".".join((*TEMPLATES[kind], error.field))
            raise DecodeError(kind, name, field, error.message) from error
        if isinstance(pod, Pod):
            yield pod


def _manifest(owner: Workload, number: int, template: Mapping[str, Any]) -> dict[str, Any]:
    by = {"apiVersion": "", "kind": owner.kind, "name": owner.name, "uid": "", "controller": True}
    labels = _mapping(template, "metadata").get("labels")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": owner.namespace,
            "name": f"{owner.name}-{number}",
            "labels": labels,
            "ownerReferences": [by],
        },
        "spec": _mapping(template, "spec"),
    }


def _mapping(body: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    at: Any = body
    for part in path:
        at = at.get(part) if isinstance(at, Mapping) else None
    return at if isinstance(at, Mapping) else {}
