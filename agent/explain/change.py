"""A change as documents write it, and a cluster with it: for whoever rehearses before applying. Pure.

    documents --decoded, in their namespace--> Change --laid over a snapshot, with its rollouts--> Applied

What is left out, and what `kubectl apply` would say, becomes notes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from agent.cluster.decode import DecodeError, decode
from agent.cluster.documents import Document, ManifestError
from agent.cluster.model import KINDS, Object, Pod, titled
from agent.cluster.store import Snapshot
from agent.explain.ends import Workload, workload_of
from agent.explain.imagined import TEMPLATES, pods_of
from agent.explain.overlay import Laid, Place, enforced, laid_over, rolled_out

WORKLOAD_GROUPS = ("apps", "batch")


@dataclass(frozen=True, slots=True)
class Change:
    """What would be applied: objects, and a Pod as each workload's template describes it.

    errors: what cannot be used; notes: what is not looked at.
    """

    objects: tuple[Object, ...] = ()
    templates: Mapping[Workload, Pod] = field(default_factory=dict)
    errors: tuple[ManifestError, ...] = ()
    notes: tuple[str, ...] = ()


class Gone(NamedTuple):
    """What would be deleted: objects by their places, workloads with all their Pods; notes as a Change's."""

    places: tuple[Place, ...] = ()
    workloads: tuple[Workload, ...] = ()
    notes: tuple[str, ...] = ()


NOTHING = Gone()


class Applied(NamedTuple):
    """The cluster after a change, and what a person needs to know of it."""

    laid: Laid
    notes: tuple[str, ...]


def change_of(documents: Iterable[Document], namespace: str) -> Change:
    """What documents say; those without a namespace are of this one."""
    objects: list[Object] = []
    templates: dict[Workload, Pod] = {}
    errors: list[ManifestError] = []
    notes: list[str] = []
    for each in documents:
        body = _in_namespace(each.body, namespace)
        try:
            if each.is_read and each.kind in KINDS:
                objects.append(cast("Object", decode(each.kind, body)))
            elif _is_workload(each) and (pods := tuple(pods_of(body))):
                templates[workload_of(pods[0])] = pods[0]
            else:
                notes.append(f"{each.place}: {_named(each)} is not looked at")
        except DecodeError as error:
            errors.append(ManifestError(each.place, str(error)))
    return Change(tuple(objects), templates, tuple(errors), tuple(notes))


def applied(
    snapshot: Snapshot, change: Change, gone: Gone = NOTHING, *, enforce_audit: bool = False
) -> Applied:
    """The snapshot with the change, its rollouts done, and without what is to go."""
    of_pods = {key: workload_of(pod) for key, pod in snapshot.pods.items()}
    ended: list[Place] = [("Pod", key) for key, of in sorted(of_pods.items()) if of in gone.workloads]
    places = (*gone.places, *ended)
    rolled = rolled_out(snapshot, change.templates)
    objects = (*change.objects, *rolled)
    if enforce_audit:
        objects += enforced(laid_over(snapshot, objects, places).snapshot)
    laid = laid_over(snapshot, objects, places)
    without_pods = _without_pods(change, gone, set(of_pods.values()))
    left_out = (*change.notes, *gone.notes)
    return Applied(laid, (*left_out, *_rollouts(rolled), *without_pods, *_not_there(change, laid)))


def _rollouts(rolled: Iterable[Pod]) -> Iterator[str]:
    for of in sorted(set(map(workload_of, rolled))):
        yield f"{of} rolls out: its Pods are replaced, and their connections end"


def _without_pods(change: Change, gone: Gone, there: Container[Workload]) -> Iterator[str]:
    for of in sorted(change.templates):
        if of not in there:
            yield f"{of}: the Pods that it would make are new, their ways are not compared"
    yield from (f"{of} has no Pods that could go with it" for of in gone.workloads if of not in there)


def _not_there(change: Change, laid: Laid) -> Iterator[str]:
    yield from (f"{titled(*place)} is not there, so it cannot be deleted" for place in laid.missing)
    spaces = {of.namespace for of in change.templates} - laid.snapshot.namespaces.keys()
    yield from (
        f"namespace {name} is not there: apply would fail" for name in sorted({*laid.unsaid, *spaces})
    )


def _in_namespace(body: Mapping[str, Any], namespace: str) -> Mapping[str, Any]:
    meta = body.get("metadata")
    if not isinstance(meta, Mapping) or meta.get("namespace"):
        return body
    return {**body, "metadata": {**meta, "namespace": namespace}}


def _is_workload(document: Document) -> bool:
    return document.kind in TEMPLATES and document.group in WORKLOAD_GROUPS


def _named(document: Document) -> str:
    """The kind, with the API group that tells it from a namesake."""
    if _is_workload(document):
        return f"{document.kind} without Pods of its own"
    return f"{document.kind} of {document.group}" if document.group else document.kind
