"""What tests of policies in the lab share: the example's files, Pods and policies, awaiting the matrix."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lab import manifests
from lab.expectation import Expected
from lab.limits import SLOWNESS
from lab.matrix import Matrix
from lab.objects import Object, check
from lab.world import Lab

EXAMPLES = Path(__file__).parents[2] / "examples" / "policies"
LIMIT = 3.0 * SLOWNESS
"""Seconds until what was applied must be in force; agents look at the lab's files every 50 ms."""


def example(*names: str) -> list[Object]:
    """The objects of files of the example."""
    return list(manifests.read([EXAMPLES / f"{name}.yaml" for name in names]))


def namespace(name: str, **labels: str) -> Object:
    return check(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}, "test"
    )


def pod(
    path: str, *ports: int | tuple[str, int], node: str = "", labels: Mapping[str, str] | None = None
) -> Object:
    """A Pod `namespace/name`; a port is a number, or a name and a number."""
    space, name = path.split("/")
    said: list[dict[str, Any]] = [
        {"containerPort": each} if isinstance(each, int) else {"name": each[0], "containerPort": each[1]}
        for each in ports
    ]
    spec: dict[str, Any] = {"containers": [{"name": "main", "ports": said}]}
    if node:
        spec["nodeName"] = node
    meta = {"namespace": space, "name": name, "labels": dict(labels or {})}
    return check({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}, "test")


def replica(path: str, *ports: int, node: str, labels: Mapping[str, str] | None = None) -> Object:
    """A Pod `namespace/DEPLOYMENT-HASH-ID`, as a Deployment's ReplicaSet makes it."""
    replica_set = path.partition("/")[2].rpartition("-")[0]
    said = {"pod-template-hash": replica_set.rpartition("-")[2], **(labels or {})}
    made = pod(path, *ports, node=node, labels=said)
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": replica_set, "controller": True}
    made["metadata"]["ownerReferences"] = [owner]
    return made


def policy(path: str, **spec: Any) -> Object:
    """A policy `namespace/name`; without a podSelector it selects all Pods."""
    space, name = path.split("/")
    spec.setdefault("podSelector", {})
    meta = {"namespace": space, "name": name}
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return check({**kind, "metadata": meta, "spec": spec}, "test")


def expected_matrix(lab: Lab, seconds: float = LIMIT) -> Matrix:
    """The matrix as soon as it is what the documentation says; the last one when it is not in time."""
    deadline = time.monotonic() + seconds
    while True:
        expected = Expected(lab.objects().values())
        seen = lab.matrix(expected)
        if seen.good or time.monotonic() > deadline:
            return seen


def applied(lab: Lab, objects: Iterable[Object]) -> Matrix:
    """Make these objects all that there is, and return the matrix."""
    lab.apply(objects, prune=True)
    return expected_matrix(lab)
