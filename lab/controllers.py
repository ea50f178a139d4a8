"""A small, honest stand-in for Kubernetes' controllers: which Pods there shall be, and on which node. Pure.

    Deployment -> ReplicaSet --+
    StatefulSet, DaemonSet ----+--> Pods --scheduler--> Pods with spec.nodeName
    Job, Pod ------------------+

What it makes of the same objects is the same each time: names come from digests, not from chance. A Pod that
is there keeps its node. Pods run no images and are always ready; what the lab does not do, it says in a note.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.objects import Key, Object, check_strings, digest, fail, key_of, labels
from lab.services import allocate

API_VERSIONS = {
    "Namespace": "v1",
    "Pod": "v1",
    "Service": "v1",
    "Endpoints": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Deployment": "apps/v1",
    "ReplicaSet": "apps/v1",
    "StatefulSet": "apps/v1",
    "DaemonSet": "apps/v1",
    "Job": "batch/v1",
}
"""What the lab understands."""

STORED = ("Endpoints", "EndpointSlice", "NetworkPolicy")
ALWAYS = ("default", "kube-system")
"""Namespaces that are there in every cluster."""

REVISION = "controller-revision-hash"
HOSTNAME = "kubernetes.io/hostname"

_IGNORED_POD_FIELDS = ("affinity", "topologySpreadConstraints", "schedulerName")
_PROTOCOLS = ("TCP", "UDP", "SCTP")


@dataclass(frozen=True, slots=True)
class LabNode:
    """A node as the scheduler sees it."""

    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Expansion:
    """What the cluster shall hold, without status and derived EndpointSlices, and what is to be said."""

    objects: Mapping[Key, Object]
    notes: tuple[str, ...]

    def of(self, kind: str) -> dict[Key, Object]:
        """Return the objects of one kind."""
        return {key: item for key, item in self.objects.items() if key.kind == kind}


def expand(given: Iterable[Object], nodes: Sequence[LabNode], before: Mapping[Key, Object]) -> Expansion:
    """Return what shall be there for what a user gave.

    before is what the cluster holds now: nodes, cluster addresses and node ports are kept from it.
    Raises ManifestError for the first object that cannot be used.
    """
    notes: list[str] = []
    known = list(_known(given, notes))
    namespaces = _namespaces(known)
    for item in known:
        _require_namespace(item, namespaces)
    pods = _schedule([pod for item in known for pod in _pods_of(item, nodes, notes)], nodes, before, notes)
    services = allocate([item for item in known if item["kind"] == "Service"], before)
    stored = [item for item in known if item["kind"] in STORED]
    objects = [*namespaces.values(), *pods, *services, *stored]
    return Expansion({key_of(item): item for item in objects}, tuple(dict.fromkeys(notes)))


def container_ports(pod: Object) -> tuple[int, ...]:
    """Return the port numbers of a Pod's containers, each once, in order."""
    containers = pod["spec"].get("containers") or ()
    ports = [port["containerPort"] for container in containers for port in container.get("ports") or ()]
    return tuple(dict.fromkeys(ports))


def sctp_ports(pod: Object) -> tuple[int, ...]:
    """Return the port numbers of a Pod's containers that say protocol SCTP."""
    containers = pod["spec"].get("containers") or ()
    said = [port for container in containers for port in container.get("ports") or ()]
    return tuple(dict.fromkeys(port["containerPort"] for port in said if port.get("protocol") == "SCTP"))


def must_restart(before: Object, after: Object) -> bool:
    """Whether a Pod has to be made anew to become another; labels alone change in place."""
    return bool(
        before["spec"] != after["spec"]
        or labels(before).get(REVISION) != labels(after).get(REVISION)
        or before["metadata"].get("ownerReferences") != after["metadata"].get("ownerReferences")
        or _cni_annotations(before) != _cni_annotations(after)
    )


def _cni_annotations(pod: Object) -> dict[str, str]:
    annotations = pod["metadata"].get("annotations") or {}
    return {name: value for name, value in annotations.items() if name.startswith("kubernetes.io/")}


def _known(given: Iterable[Object], notes: list[str]) -> Iterator[Object]:
    for item in given:
        kind = item["kind"]
        if kind == "Node":
            notes.append(f"{key_of(item)} is left out: the lab's nodes are its own (--nodes)")
        elif kind not in API_VERSIONS:
            notes.append(f"{key_of(item)} is left out: the lab has no controller for {kind}")
        elif item.get("apiVersion") != API_VERSIONS[kind]:
            raise fail(item, "apiVersion", f"is {item.get('apiVersion')!r}, but must be {API_VERSIONS[kind]}")
        else:
            yield item


def _namespaces(known: Iterable[Object]) -> dict[str, Object]:
    given = {item["metadata"]["name"]: item for item in known if item["kind"] == "Namespace"}
    for name in ALWAYS:
        given.setdefault(name, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return {name: _labelled(item, {"kubernetes.io/metadata.name": name}) for name, item in given.items()}


def _require_namespace(item: Object, namespaces: Mapping[str, Object]) -> None:
    namespace = key_of(item).namespace
    if namespace and namespace not in namespaces:
        raise fail(item, "metadata.namespace", f"there is no Namespace {namespace}; add a manifest for it")


# Workloads


def _pods_of(item: Object, nodes: Sequence[LabNode], notes: list[str]) -> Iterable[Object]:
    expander = _EXPANDERS.get(item["kind"])
    if expander is None:
        return []
    pods = list(expander(item, nodes))
    for pod in pods:
        _check_pod(pod)
    spec = pods[0]["spec"] if pods else {}
    ignored = [field for field in _IGNORED_POD_FIELDS if spec.get(field)]
    notes += [f"{key_of(item)}: {field} is not followed: the lab spreads Pods evenly" for field in ignored]
    if item["kind"] == "Job":
        notes.append(f"{key_of(item)}: its Pods run until they are deleted: nothing finishes in the lab")
    return pods


def _pod(item: Object, _: Sequence[LabNode]) -> Iterator[Object]:
    yield copy.deepcopy({key: value for key, value in item.items() if key != "status"})


def _deployment(item: Object, _: Sequence[LabNode]) -> Iterator[Object]:
    template, spec = _template(item), item["spec"]
    revision = digest(template, 5)
    owner = {
        "kind": "ReplicaSet",
        "metadata": {**item["metadata"], "name": f"{item['metadata']['name']}-{revision}"},
    }
    yield from _replicas(owner, template, _count(item, spec, "replicas"), {"pod-template-hash": revision})


def _replica_set(item: Object, _: Sequence[LabNode]) -> Iterator[Object]:
    yield from _replicas(item, _template(item), _count(item, item["spec"], "replicas"), {})


def _job(item: Object, _: Sequence[LabNode]) -> Iterator[Object]:
    spec = item.get("spec") or {}
    count = min(_count(item, spec, "parallelism"), _count(item, spec, "completions"))
    extra = {"batch.kubernetes.io/job-name": item["metadata"]["name"]}
    yield from _replicas(item, _template(item, selector=False), count, extra)


def _stateful_set(item: Object, _: Sequence[LabNode]) -> Iterator[Object]:
    template, spec, name = _template(item), item["spec"], item["metadata"]["name"]
    start = (spec.get("ordinals") or {}).get("start", 0)
    for ordinal in range(start, start + _count(item, spec, "replicas")):
        pod = f"{name}-{ordinal}"
        extra = {
            REVISION: f"{name}-{digest(template, 5)}",
            "statefulset.kubernetes.io/pod-name": pod,
            "apps.kubernetes.io/pod-index": str(ordinal),
        }
        made = _from_template(item, template, pod, extra)
        made["spec"] |= {"hostname": pod, "subdomain": spec.get("serviceName", "")}
        yield made


def _daemon_set(item: Object, nodes: Sequence[LabNode]) -> Iterator[Object]:
    template, name = _template(item), item["metadata"]["name"]
    extra = {REVISION: digest(template, 5)}
    for node in nodes:
        if _fits(template["spec"], node):
            made = _from_template(item, template, f"{name}-{digest([name, node.name], 5)}", extra)
            made["spec"]["nodeName"] = node.name
            yield made


_EXPANDERS: Mapping[str, Callable[[Object, Sequence[LabNode]], Iterator[Object]]] = {
    "Pod": _pod,
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "StatefulSet": _stateful_set,
    "DaemonSet": _daemon_set,
    "Job": _job,
}


def _replicas(owner: Object, template: Object, count: int, extra: Mapping[str, str]) -> Iterator[Object]:
    name = owner["metadata"]["name"]
    for index in range(count):
        yield _from_template(owner, template, f"{name}-{digest([name, index], 5)}", extra)


def _from_template(owner: Object, template: Object, name: str, extra: Mapping[str, str]) -> Object:
    metadata = template.get("metadata") or {}
    reference = {"kind": owner["kind"], "name": owner["metadata"]["name"], "controller": True}
    made: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": owner["metadata"].get("namespace", "default"),
            "labels": {**(metadata.get("labels") or {}), **extra},
            "annotations": dict(metadata.get("annotations") or {}),
            "ownerReferences": [reference],
        },
        "spec": copy.deepcopy(template["spec"]),
    }
    return made


def _template(item: Object, *, selector: bool = True) -> Object:
    """Return a workload's Pod template. Raises ManifestError where the API server would refuse it."""
    spec = item.get("spec")
    template = spec.get("template") if isinstance(spec, dict) else None
    if not isinstance(template, dict) or not isinstance(template.get("spec"), dict):
        raise fail(item, "spec.template.spec", "is missing")
    found = (template.get("metadata") or {}).get("labels") or {}
    check_strings(found, f"{key_of(item)}: spec.template.metadata.labels")
    wanted = (item["spec"].get("selector") or {}).get("matchLabels")
    if selector and not isinstance(item["spec"].get("selector"), dict):
        raise fail(item, "spec.selector", "is missing")
    for name, value in (wanted or {}).items():
        if found.get(name) != value:
            raise fail(item, "spec.selector", f"{name}={value} is not among spec.template.metadata.labels")
    return template


def _count(item: Object, spec: Object, field: str) -> int:
    count = spec.get(field, 1)
    if count is None:
        return 1
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 1000:
        raise fail(item, f"spec.{field}", f"is {count!r}, but must be a whole number from 0 to 1000")
    return count


def _check_pod(pod: Object) -> None:
    spec = pod.get("spec")
    containers = spec.get("containers") if isinstance(spec, dict) else None
    if not isinstance(containers, list) or not containers:
        raise fail(pod, "spec.containers", "must hold at least one container")
    for number, container in enumerate(containers):
        for index, port in enumerate(container.get("ports") or ()):
            _check_port(pod, f"spec.containers[{number}].ports[{index}]", port)


def _check_port(pod: Object, field: str, port: Any) -> None:
    number = port.get("containerPort") if isinstance(port, dict) else None
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 65535:
        raise fail(pod, f"{field}.containerPort", f"is {number!r}, but must be 1 to 65535")
    if port.get("protocol", "TCP") not in _PROTOCOLS:
        raise fail(pod, f"{field}.protocol", f"is {port['protocol']!r}, but must be one of {_PROTOCOLS}")


# The scheduler


def _schedule(
    pods: Sequence[Object], nodes: Sequence[LabNode], before: Mapping[Key, Object], notes: list[str]
) -> list[Object]:
    """Give each Pod a node: the one it has, or that with the fewest Pods of its owner, then of all."""
    names = {node.name for node in nodes}
    load: Counter[tuple[str, str]] = Counter()
    bound: dict[Key, str] = {}
    for pod in pods:
        node = pod["spec"].get("nodeName") or _bound_before(pod, nodes, before)
        if node in names:
            bound[key_of(pod)] = node
            load.update(((node, ""), (node, _owner(pod))))
    for pod in pods:
        key = key_of(pod)
        if key not in bound:
            node = _choose(pod, nodes, load)
            if node is None:
                notes.append(f"{key} stays Pending: no node of the lab fits its nodeName or nodeSelector")
                continue
            bound[key] = node
            load.update(((node, ""), (node, _owner(pod))))
    return [_bind(pod, bound.get(key_of(pod), "")) for pod in pods]


def _bound_before(pod: Object, nodes: Sequence[LabNode], before: Mapping[Key, Object]) -> str:
    known = before.get(key_of(pod), {}).get("spec", {}).get("nodeName", "")
    fits = any(node.name == known and _fits(pod["spec"], node) for node in nodes)
    return known if fits else ""


def _choose(pod: Object, nodes: Sequence[LabNode], load: Counter[tuple[str, str]]) -> str | None:
    if pod["spec"].get("nodeName"):
        return None
    fitting = [node for node in nodes if _fits(pod["spec"], node)]
    owner = _owner(pod)
    best = min(fitting, key=lambda node: (load[node.name, owner], load[node.name, ""]), default=None)
    return best.name if best else None


def _fits(spec: Object, node: LabNode) -> bool:
    return (spec.get("nodeSelector") or {}).items() <= node.labels.items()


def _owner(pod: Object) -> str:
    references = pod["metadata"].get("ownerReferences") or [{"kind": "", "name": ""}]
    return f"{references[0]['kind']}/{pod['metadata'].get('namespace')}/{references[0]['name']}"


def _bind(pod: Object, node: str) -> Object:
    return {**pod, "spec": {**pod["spec"], "nodeName": node}} if node else pod


def _labelled(item: Object, extra: Mapping[str, str]) -> Object:
    metadata = {**item["metadata"], "labels": {**labels(item), **extra}}
    return {**item, "metadata": metadata}
