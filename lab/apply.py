"""Brings the cluster's objects and the Pods to what the manifests say, touching only what differs.

1  Namespaces, policies, Services written       before the Pods that they decide about
2  Pods that shall go are terminating           their EndpointSlices say so
3  Pods stopped, started, changed in place      several at a time
4  EndpointSlices derived from the Pods
5  Namespaces removed
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

from lab.controllers import Expansion, LabNode, expand, must_restart
from lab.kubelet import Failure, Kubelet
from lab.manifests import ObjectDirectory
from lab.objects import Key, Object, timestamp
from lab.processes import LabError
from lab.services import ZONE, slices

_PARALLEL = 8


class PodsError(LabError):
    """Some Pods could not be started or stopped; everything else is as it should be."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an apply did: Pods by full name, other objects by number; notes are for the user."""

    started: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    changed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done about one Pod: stop one, start one, write one, in this order."""

    stop: Object | None = None
    start: Object | None = None
    write: Object | None = None


def jobs(before: Mapping[Key, Object], wanted: Mapping[Key, Object]) -> dict[Key, Job]:
    """Return what turns the Pods that are there into those wanted. Pure but for new uids."""
    found = {key: _job(before.get(key), wanted.get(key)) for key in sorted({*before, *wanted})}
    return {key: job for key, job in found.items() if job != Job()}


def _job(before: Object | None, wanted: Object | None) -> Job:
    if before is None:
        return Job(start=with_uid(wanted, None)) if wanted else Job()
    if wanted is None:
        return Job(stop=before)
    ending = "deletionTimestamp" in before["metadata"]
    waiting = before.get("status", {}).get("phase") != "Running" and wanted["spec"].get("nodeName")
    if ending or waiting or must_restart(before, wanted):
        return Job(stop=before, start=with_uid(wanted, None))
    changed = {**with_uid(wanted, before), "status": before.get("status", {})}
    return Job(write=changed) if changed != before else Job()


def with_uid(item: Object, before: Object | None) -> Object:
    """Return an object with the uid and the age that it has, or new ones."""
    if before is None:
        known = {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
    else:
        kept = ("uid", "creationTimestamp")
        known = {name: before["metadata"][name] for name in kept if name in before["metadata"]}
    return {**item, "metadata": {**item["metadata"], **known}}


class Applier:
    """Applies sets of manifests to one lab."""

    def __init__(self, nodes: Sequence[LabNode], cluster: ObjectDirectory, given: ObjectDirectory) -> None:
        """Keep what users gave in one directory, and what the agents see in another."""
        self._nodes = nodes
        self._cluster = cluster
        self._given = given

    def check(self, given: Mapping[Key, Object]) -> Expansion:
        """Return what these objects come to. Raises ManifestError."""
        return expand(given.values(), self._nodes, self._cluster.read())

    def apply(self, given: Mapping[Key, Object], kubelet: Kubelet, cancel: Callable[[], None]) -> Changes:
        """Make the cluster what these objects say; cancel is called when that is interrupted.

        Raises ManifestError before anything is changed, PodsError when everything but some Pods is done.
        """
        wanted, before = self.check(given), self._cluster.read()
        self._given.converge(given, lambda _kind: True)
        changed = self._write_before_pods(wanted, before)
        pods = {key: item for key, item in before.items() if key.kind == "Pod"}
        todo = jobs(pods, wanted.of("Pod"))
        if ending := [job.stop for job in todo.values() if job.stop]:
            for pod in ending:
                kubelet.begin_to_end(pod)
            self._write_slices(given, wanted)
        failed = _do(todo, kubelet, cancel) if todo else []
        changed += self._write_slices(given, wanted) + self._remove_namespaces(wanted)
        if failed:
            raise PodsError("\n".join(failed))
        return Changes(
            started=tuple(f"{key.namespace}/{key.name}" for key, job in todo.items() if job.start),
            stopped=tuple(f"{key.namespace}/{key.name}" for key, job in todo.items() if job.stop),
            changed=changed + sum(job.write is not None for job in todo.values()),
            notes=wanted.notes,
        )

    def _write_before_pods(self, wanted: Expansion, before: Mapping[Key, Object]) -> int:
        changed = 0
        for kind in ("Namespace", "NetworkPolicy", "Service"):
            objects = {key: with_uid(item, before.get(key)) for key, item in wanted.of(kind).items()}
            changed += self._cluster.converge(objects, kind.__eq__, remove=kind != "Namespace")
        return changed

    def write_slices(self, given: Mapping[Key, Object]) -> int:
        """Derive the EndpointSlices anew from the Pods as they are; return how many changed."""
        return self._write_slices(given, self.check(given))

    def _write_slices(self, given: Mapping[Key, Object], wanted: Expansion) -> int:
        before = self._cluster.read()
        pods = [item for key, item in before.items() if key.kind == "Pod"]
        endpoints = [item for key, item in given.items() if key.kind == "Endpoints"]
        zones = {node.name: node.labels[ZONE] for node in self._nodes if ZONE in node.labels}
        made = slices(wanted.of("Service").values(), pods, endpoints, zones) | wanted.of("EndpointSlice")
        objects = {key: with_uid(item, before.get(key)) for key, item in made.items()}
        return self._cluster.converge(objects, "EndpointSlice".__eq__)

    def _remove_namespaces(self, wanted: Expansion) -> int:
        before = self._cluster.read()
        left = {key: before[key] for key in wanted.of("Namespace") if key in before}
        return self._cluster.converge(left, "Namespace".__eq__)


def _do(todo: Mapping[Key, Job], kubelet: Kubelet, cancel: Callable[[], None]) -> list[str]:
    """Do all jobs, several at a time, and return what failed."""
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="podwall-lab") as pool:
        try:
            return [text for text in pool.map(_do_one, todo.keys(), todo.values(), repeat(kubelet)) if text]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            cancel()
            raise


def _do_one(key: Key, job: Job, kubelet: Kubelet) -> str:
    try:
        if job.stop:
            kubelet.stop(job.stop)
        if job.start:
            kubelet.start(job.start)
        if job.write:
            kubelet.update(job.write)
    except Failure as error:
        return f"{key}: {error}"
    return ""
