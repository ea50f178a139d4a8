"""A cluster as it would be: objects laid over those that there are, and others taken away. Pure.

    snapshot + objects as manifests write them + keys to delete --> snapshot, and what changed

What the API server and the controllers keep or fill in stays as it is: a Pod's addresses, node and readiness,
a Service's addresses. With a namespace goes all that is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

from msgspec.structs import replace

from agent.cluster.model import (
    KINDS,
    NAMESPACE_NAME_LABEL,
    Key,
    Kind,
    Namespace,
    NetworkPolicy,
    Object,
    Pod,
    Remove,
    Service,
    Upsert,
    kind_of,
)
from agent.cluster.store import Changed, Snapshot, Store
from agent.explain.ends import Workload, workload_of
from agent.explain.remedy import GENERATED_LABELS

Place = tuple[Kind, Key]


class Laid(NamedTuple):
    """The cluster after a change; `missing` was to go and is not there.

    unsaid: namespaces that objects are put into, and that nobody has made.
    """

    snapshot: Snapshot
    changed: tuple[Changed, ...]
    missing: tuple[Place, ...] = ()
    unsaid: tuple[str, ...] = ()


def laid_over(snapshot: Snapshot, objects: Iterable[Object], gone: Iterable[Place] = ()) -> Laid:
    """The snapshot with these objects, and without those that are to go."""
    store = _copied(snapshot)
    changed: dict[Place, Changed] = {}
    missing: list[Place] = []
    objects = list(objects)
    for item in objects:
        place = kind_of(item), item.key
        for change in store.apply(Upsert(place[0], _kept(snapshot, item))):
            changed[place] = change
    for place in gone:
        if _present(store.snapshot, place) is None:
            missing.append(place)
        for each in (place, *_inside(store.snapshot, place)):
            for change in store.apply(Remove(*each)):
                first = changed.get(each, change)
                changed[each] = Changed(change.kind, change.key, first.before, change.after)
    unsaid = tuple(_unsaid(store.snapshot, objects))
    for name in unsaid:
        store.apply(Upsert("Namespace", Namespace(name, labels={NAMESPACE_NAME_LABEL: name})))
    order = sorted(changed.items(), key=lambda of: (KINDS.index(of[0][0]), str(of[0][1])))
    real = tuple(change for _, change in order if change.before != change.after)
    return Laid(store.snapshot, real, tuple(missing), unsaid)


def rolled_out(snapshot: Snapshot, templates: Mapping[Workload, Pod]) -> tuple[Pod, ...]:
    """The Pods of these workloads as the templates describe them, where that changes what policies see.

    A rollout makes others in their place; for policies these are the same.
    """
    pods = sorted(snapshot.pods.items())
    now = ((pod, templates.get(workload_of(pod))) for _, pod in pods if not pod.finished)
    found = (_as_template(pod, template) for pod, template in now if template is not None)
    return tuple(pod for pod in found if pod != snapshot.pods[pod.key])


def _as_template(pod: Pod, template: Pod) -> Pod:
    kept = {name: value for name, value in pod.labels.items() if name in GENERATED_LABELS}
    return replace(pod, labels={**template.labels, **kept}, ports=template.ports)


def enforced(snapshot: Snapshot) -> tuple[NetworkPolicy, ...]:
    """The policies in audit mode, as they would be without it."""
    return tuple(
        replace(policy, annotations={})
        for _, policy in sorted(snapshot.policies.items())
        if policy.mode == "audit"
    )


def _copied(snapshot: Snapshot) -> Store:
    store = Store()
    for kind in KINDS:
        for item in _all(snapshot, kind).values():
            store.apply(Upsert(kind, item))
    return store


def _all(snapshot: Snapshot, kind: Kind) -> Mapping[Key, Object]:
    mappings = {
        "Node": snapshot.nodes,
        "Namespace": snapshot.namespaces,
        "Pod": snapshot.pods,
        "NetworkPolicy": snapshot.policies,
        "Service": snapshot.services,
        "EndpointSlice": snapshot.slices,
    }
    return cast("Mapping[Key, Object]", mappings[kind])


def _present(snapshot: Snapshot, place: Place) -> Object | None:
    kind, key = place
    return _all(snapshot, kind).get(key)


def _inside(snapshot: Snapshot, place: Place) -> Iterator[Place]:
    """What goes with a namespace."""
    kind, key = place
    if kind != "Namespace":
        return
    for of in KINDS[2:]:
        for each in list(_all(snapshot, of)):
            if not isinstance(each, str) and each[0] == key:
                yield of, each


def _kept(snapshot: Snapshot, item: Object) -> Object:
    """The object with what others fill in, as far as there is one of its name already."""
    before = _present(snapshot, (kind_of(item), item.key))
    if isinstance(item, Pod) and isinstance(before, Pod):
        return replace(before, labels=item.labels, ports=item.ports or before.ports)
    if isinstance(item, Service) and isinstance(before, Service):
        return replace(
            item,
            uid=before.uid,
            created=before.created,
            generation=before.generation,
            cluster_ips=item.cluster_ips or (() if item.headless else before.cluster_ips),
            load_balancer=before.load_balancer,
        )
    if isinstance(item, NetworkPolicy) and isinstance(before, NetworkPolicy):
        return replace(item, uid=before.uid, created=before.created, generation=before.generation)
    if isinstance(item, Namespace) and isinstance(before, Namespace):
        return replace(item, uid=before.uid)
    return item


def _unsaid(snapshot: Snapshot, objects: Iterable[Object]) -> Iterator[str]:
    names = {item.key[0] for item in objects if not isinstance(item.key, str)}
    yield from sorted(names - snapshot.namespaces.keys())
