"""Manifests that nobody has applied yet, as if they were: Pods, ready, with addresses, on two nodes. Pure.

    Deployments, Pods, Services --the lab's controllers--> Pods with nodes and statuses, ClusterIPs, slices

So a command can be asked about files that are still to be applied, as about a cluster. Of manifests that hold
addresses, as `kubectl get -o yaml` prints them, only what they leave open is made up: agent.explain.imagined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from agent.cluster.decode import DecodeError, decode
from agent.cluster.documents import Document
from agent.cluster.model import Endpoints, Object
from lab.controllers import LabNode, expand
from lab.names import NodePlace, node
from lab.nodes import node_labels, node_object
from lab.objects import ManifestError, check, key_of
from lab.services import slices

WORKLOADS = frozenset({"Pod", "Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job"})
NODES = (1, 2)
NOTE = (
    "no Pod of these files has an address: taken as if they were applied, with all Pods ready on two nodes, "
    "each with an address of its own"
)


def is_unapplied(documents: Iterable[Document]) -> bool:
    """Whether there are Pods to be, and none that has an address."""
    of = [each for each in documents if each.kind in WORKLOADS]
    return bool(of) and not any((each.body.get("status") or {}).get("podIPs") for each in of)


def applied(documents: Iterable[Document]) -> list[Object]:
    """The objects of a cluster to which these documents were applied. Raises ManifestError."""
    given = [check(dict(each.body), str(each.place)) for each in documents]
    there = {each["metadata"]["name"] for each in given if each["kind"] == "Namespace"}
    used = {key_of(each).namespace for each in given} - there - {""}
    missing = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in sorted(used)]
    places = [node(number) for number in NODES]
    made = expand([*missing, *given], [LabNode(each.name, node_labels(each)) for each in places], {})
    pods = list(_running(made.of("Pod").values(), places))
    services = list(made.of("Service").values())
    written = [each for each in made.objects.values() if each["kind"] not in {"Pod", "Service"}]
    endpoints = [each for each in written if each["kind"] == "Endpoints"]
    whole = [
        *map(node_object, places),
        *written,
        *services,
        *pods,
        *slices(services, pods, endpoints).values(),
    ]
    return list(_decoded(whole))


def _running(pods: Iterable[dict[str, Any]], places: Sequence[NodePlace]) -> Iterator[dict[str, Any]]:
    """Pods with the status that their nodes would give them."""
    numbers = {place.name: count(2) for place in places}
    cidrs = {place.name: place.pod_cidrs for place in places}
    for pod in pods:
        name = pod["spec"].get("nodeName", "")
        if name not in numbers:
            yield {**pod, "status": {"phase": "Pending"}}
            continue
        number = next(numbers[name])
        ips = [{"ip": str(cidr[number])} for cidr in cidrs[name]]
        ready = [{"type": "Ready", "status": "True"}]
        yield {**pod, "status": {"phase": "Running", "conditions": ready, "podIPs": ips}}


def _decoded(objects: Iterable[dict[str, Any]]) -> Iterator[Object]:
    for each in objects:
        try:
            found = decode(each["kind"], each)
        except DecodeError as error:
            raise ManifestError(f"{key_of(each)}: {error}") from error
        if not isinstance(found, Endpoints):  # slices have been made of them
            yield found
