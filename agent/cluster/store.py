"""The current objects of the cluster, and the indexes by which they are looked up.

    Upsert, Remove --apply--> mappings and indexes --> what changed, before and after
    Synced         --apply--> synced kinds

An event costs the size of its object, whatever the cluster's: nothing is copied, `snapshot` is a read-only
view of what is there now.  Who reads it in another thread, or compares with later, takes a `Snapshot.copy()`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from msgspec import Struct

from .model import (
    EndpointSlice,
    Event,
    IPAddress,
    Key,
    Kind,
    Namespace,
    NetworkPolicy,
    Node,
    Object,
    Pod,
    Remove,
    Service,
    Synced,
    Upsert,
    kind_of,
)

K = TypeVar("K")
V = TypeVar("V")
Name: TypeAlias = tuple[str, str]
"""Namespace and name."""

_Index: TypeAlias = dict[Hashable, dict[Name, Any]]
_NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Changed(Struct, frozen=True, gc=False):
    """One object that is not as it was; `before` is None for a new one and `after` for a removed one."""

    kind: Kind
    key: Key
    before: Object | None
    after: Object | None


class Snapshot(Struct, frozen=True):
    """Every object by its key; namespaced ones by (namespace, name).

    The indexes hold no empty entries.  A Pod is in `pods_by_ip` under each of its addresses, finished and
    host-network Pods too, so one address may belong to several.
    """

    nodes: Mapping[str, Node]
    namespaces: Mapping[str, Namespace]
    pods: Mapping[Name, Pod]
    policies: Mapping[Name, NetworkPolicy]
    services: Mapping[Name, Service]
    slices: Mapping[Name, EndpointSlice]
    pods_by_namespace: Mapping[str, Mapping[Name, Pod]]
    pods_by_node: Mapping[str, Mapping[Name, Pod]]
    pods_by_ip: Mapping[IPAddress, Mapping[Name, Pod]]
    policies_by_namespace: Mapping[str, Mapping[Name, NetworkPolicy]]
    slices_by_service: Mapping[Name, Mapping[Name, EndpointSlice]]

    def pods_in(self, namespace: str) -> Mapping[Name, Pod]:
        """The Pods of a namespace; empty when there is none."""
        return self.pods_by_namespace.get(namespace, _NOTHING)

    def pods_on(self, node: str) -> Mapping[Name, Pod]:
        """The Pods bound to a node."""
        return self.pods_by_node.get(node, _NOTHING)

    def pods_at(self, ip: IPAddress) -> Mapping[Name, Pod]:
        """The Pods whose status has this address."""
        return self.pods_by_ip.get(ip, _NOTHING)

    def policies_in(self, namespace: str) -> Mapping[Name, NetworkPolicy]:
        """The policies of a namespace."""
        return self.policies_by_namespace.get(namespace, _NOTHING)

    def slices_of(self, service: Name) -> Mapping[Name, EndpointSlice]:
        """The EndpointSlices of a Service."""
        return self.slices_by_service.get(service, _NOTHING)

    def copy(self) -> Snapshot:
        """What is there now, unchanged by later events; costs the size of the cluster."""
        return Snapshot(
            dict(self.nodes),
            dict(self.namespaces),
            dict(self.pods),
            dict(self.policies),
            dict(self.services),
            dict(self.slices),
            _copied(self.pods_by_namespace),
            _copied(self.pods_by_node),
            _copied(self.pods_by_ip),
            _copied(self.policies_by_namespace),
            _copied(self.slices_by_service),
        )


class Store:
    """Takes events; holds what they say."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[Any, Any]] = {
            "Node": {},
            "Namespace": {},
            "Pod": {},
            "NetworkPolicy": {},
            "Service": {},
            "EndpointSlice": {},
        }
        self._pods_by_namespace: _Index = {}
        self._pods_by_node: _Index = {}
        self._pods_by_ip: _Index = {}
        self._policies_by_namespace: _Index = {}
        self._slices_by_service: _Index = {}
        self._synced: set[Kind] = set()
        self.snapshot = self._view()

    @property
    def synced(self) -> frozenset[Kind]:
        """The kinds whose first list is complete."""
        return frozenset(self._synced)

    def apply(self, event: Event) -> tuple[Changed, ...]:
        """Take one event; return what is now another than before, nothing when all is equal."""
        if isinstance(event, Synced):
            self._synced.add(event.kind)
            return ()
        objects = self._objects[event.kind]
        if isinstance(event, Remove):
            key, after = event.key, None
            before = objects.pop(key, None)
        else:
            key, after = event.object.key, event.object
            before = objects.get(key)
            objects[key] = after
        if before == after:
            return ()
        self._index(key, before, after)
        return (Changed(event.kind, key, before, after),)

    def _index(self, key: Key, before: Object | None, after: Object | None) -> None:
        some = before if after is None else after
        if isinstance(some, Pod):
            self._move(self._pods_by_namespace, key, before, after, _namespace)
            self._move(self._pods_by_node, key, before, after, _node)
            self._move(self._pods_by_ip, key, before, after, _ips)
        elif isinstance(some, NetworkPolicy):
            self._move(self._policies_by_namespace, key, before, after, _namespace)
        elif isinstance(some, EndpointSlice):
            self._move(self._slices_by_service, key, before, after, _service)

    @staticmethod
    def _move(index: _Index, key: Any, before: Any, after: Any, places: Any) -> None:
        new = () if after is None else places(after)
        old = () if before is None else places(before)
        for place in set(old).difference(new):
            entries = index[place]
            del entries[key]
            if not entries:
                del index[place]
        for place in new:
            index.setdefault(place, {})[key] = after

    def _view(self) -> Snapshot:
        by_kind = self._objects
        return Snapshot(
            MappingProxyType(by_kind["Node"]),
            MappingProxyType(by_kind["Namespace"]),
            MappingProxyType(by_kind["Pod"]),
            MappingProxyType(by_kind["NetworkPolicy"]),
            MappingProxyType(by_kind["Service"]),
            MappingProxyType(by_kind["EndpointSlice"]),
            MappingProxyType(self._pods_by_namespace),  # type: ignore[arg-type]  # one index type for all
            MappingProxyType(self._pods_by_node),  # type: ignore[arg-type]
            MappingProxyType(self._pods_by_ip),  # type: ignore[arg-type]
            MappingProxyType(self._policies_by_namespace),  # type: ignore[arg-type]
            MappingProxyType(self._slices_by_service),  # type: ignore[arg-type]
        )


def snapshot_of(objects: Iterable[Object]) -> Snapshot:
    """A snapshot of these objects alone, for manifests and tests."""
    store = Store()
    for item in objects:
        store.apply(Upsert(kind_of(item), item))
    return store.snapshot


def _copied(index: Mapping[K, Mapping[Name, V]]) -> dict[K, Mapping[Name, V]]:
    return {place: dict(entries) for place, entries in index.items()}


def _namespace(item: Pod | NetworkPolicy) -> tuple[str, ...]:
    return (item.namespace,)


def _node(pod: Pod) -> tuple[str, ...]:
    return (pod.node,) if pod.node else ()


def _ips(pod: Pod) -> tuple[IPAddress, ...]:
    return pod.ips


def _service(item: EndpointSlice) -> tuple[Name, ...]:
    return ((item.namespace, item.service),) if item.service else ()
