"""Which Pods of the cluster are in which sets: the selectors in use, the Pods that they match, and back.

    a Pod changes            its labels are shown to the selectors filed under them
    a namespace changes      its labels are shown to the namespace selectors; if others match, so are its Pods
    a selector is new        the Pods filed under one of its labels are shown to it
    a selector is unused     it is forgotten, and its members have an element less

The addresses of this node's own Pods are those of their attachments, from before CNI ADD answers until the
address is free again; what their status says comes late and stays too long.  Other Pods' are those of their
status.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.cluster.model import IPAddress, Labels, Namespace, Pod
from agent.compile.peers import Peer
from agent.compile.selectors import Anchor, Selector, SelectorIndex, anchors_of
from agent.nft.model import Item, Owner

PodKey = tuple[str, str]

_ALL = None  # the scope of namespace selectors in their index


@dataclass(frozen=True, slots=True)
class LocalPod:
    """A Pod's attachment to this node; `uid` is empty where the runtime did not say it."""

    container_id: str
    ifname: str
    namespace: str
    name: str
    addresses: tuple[IPAddress, ...]
    uid: str = ""

    @property
    def key(self) -> PodKey:
        return self.namespace, self.name

    @property
    def owner(self) -> Owner:
        """Who owns what leads its addresses to its classes."""
        return ("isolated", self.container_id, self.ifname)


@dataclass(slots=True)
class _Population:
    """The Pods of a namespace, by name and by label."""

    pods: dict[str, Pod] = field(default_factory=dict)
    filed: dict[Anchor, set[str]] = field(default_factory=dict)

    def put(self, pod: Pod) -> None:
        before = self.pods.get(pod.name)
        self.pods[pod.name] = pod
        if before is None or before.labels != pod.labels:
            self._unfile(before)
            for anchor in anchors_of(pod.labels):
                self.filed.setdefault(anchor, set()).add(pod.name)

    def drop(self, name: str) -> None:
        self._unfile(self.pods.pop(name, None))

    def matching(self, peer: Peer) -> Iterator[Pod]:
        names = {name for anchor in peer.pods.anchors for name in self.filed.get(anchor, ())}
        return (pod for pod in map(self.pods.__getitem__, names) if peer.matches(pod))

    def _unfile(self, pod: Pod | None) -> None:
        for anchor in anchors_of(pod.labels) if pod else ():
            self.filed[anchor].discard(pod.name if pod else "")
            if not self.filed[anchor]:
                del self.filed[anchor]


def is_of(attached: LocalPod, pod: Pod) -> bool:
    """Whether the cluster's Pod is the one that is attached, not one before or after it of the same name.

    A Pod that the kubelet has from a file is known to the runtime by another uid than its mirror in the API.
    """
    mirror = any(owner.kind == "Node" for owner in pod.owners)
    return mirror or not attached.uid or not pod.uid or attached.uid == pod.uid


class Members:
    """The selectors that classes look up, and the Pods that they match.

    `begin`, then what changed, then `settle`: the owners to compile again.
    """

    def __init__(self, node_name: str) -> None:
        self._node = node_name
        self._population: dict[str, _Population] = {}
        self._attached: dict[PodKey, list[LocalPod]] = {}
        self._namespaces: dict[str, Labels] = {}
        self._scopes: dict[str, set[Selector]] = {}  # the namespace selectors in use that match a namespace
        self._scope_index = SelectorIndex[Selector]()
        self._scope_users: dict[Selector, set[str]] = {}
        self._index = SelectorIndex[str]()
        self._used: dict[str, Peer] = {}
        self._users: dict[str, set[str]] = {}
        self._uses: dict[str, frozenset[str]] = {}
        self._members: dict[str, set[PodKey]] = {}
        self._member_of: dict[PodKey, set[str]] = {}
        self._dirty: set[Owner] = set()
        self._touched: set[PodKey] = set()
        self._new: dict[str, Peer] = {}

    @property
    def owners(self) -> Iterator[Owner]:
        yield from (peer.owner for peer in self._used.values())
        yield from (_member(key) for key in self._member_of)

    def pod(self, key: PodKey) -> Pod | None:
        population = self._population.get(key[0])
        return population.pods.get(key[1]) if population else None

    def items(self, owner: Owner) -> tuple[Item, ...]:
        if owner[0] == "peer":
            peer = self._used.get(owner[1])
            return peer.sets() if peer else ()
        key = owner[1], owner[2]
        pod = self.pod(key)
        if pod is None:
            return ()
        addresses = self._addresses(key, pod)
        of = (self._used[name] for name in self._member_of.get(key, ()))
        return tuple(element for peer in of for element in peer.elements(pod, addresses))

    def begin(self) -> None:
        self._dirty, self._touched, self._new = set(), set(), {}

    def take_pod(self, key: PodKey, pod: Pod | None) -> None:
        population = self._population.setdefault(key[0], _Population())
        if pod is None:
            population.drop(key[1])
            if not population.pods:
                del self._population[key[0]]
        else:
            population.put(pod)

    def touch(self, key: PodKey) -> None:
        """Look again at what matches this Pod."""
        self._touched.add(key)

    def take_attached(self, key: PodKey, attached: list[LocalPod]) -> None:
        self._attached[key] = attached
        if not attached:
            del self._attached[key]
        self._touched.add(key)

    def take_namespace(self, key: Any, namespace: Namespace | None) -> None:
        if namespace is None:
            self._namespaces.pop(key, None)
        else:
            self._namespaces[key] = namespace.labels
        self._rescope(key)

    def use(self, chain_name: str, looked_up: Mapping[str, Peer]) -> None:
        """A chain looks up exactly these peers now."""
        before = self._uses.get(chain_name, frozenset())
        self._uses[chain_name] = frozenset(looked_up)
        for name in looked_up.keys() - before:
            if name not in self._users:
                self._add(looked_up[name])
            self._users.setdefault(name, set()).add(chain_name)
        for name in before - looked_up.keys():
            if remove(self._users, name, chain_name):
                self._discard(name)
        if not looked_up:
            del self._uses[chain_name]

    def settle(self) -> set[Owner]:
        """Find the members of new peers and the peers of changed Pods."""
        if len(self._touched) < sum(len(of.pods) for of in self._population.values()):
            for peer in self._new.values():
                if peer.id in self._used:
                    self._find_members(peer)
        for key in self._touched:
            self._find_peers(key)
        return self._dirty

    def _addresses(self, key: PodKey, pod: Pod) -> tuple[IPAddress, ...]:
        attached = [of for of in self._attached.get(key, ()) if is_of(of, pod)]
        if attached:
            return tuple({address: None for of in attached for address in of.addresses})
        return () if pod.node == self._node else pod.ips

    def _add(self, peer: Peer) -> None:
        self._used[peer.id] = self._new[peer.id] = peer
        self._index.add(peer.id, peer.scope, peer.pods)
        self._dirty.add(peer.owner)
        if isinstance(peer.scope, Selector):
            if peer.scope not in self._scope_users:
                self._scope_index.add(peer.scope, _ALL, peer.scope)
                for name, labels in self._namespaces.items():
                    if peer.scope.matches(labels):
                        self._scopes.setdefault(name, set()).add(peer.scope)
            self._scope_users.setdefault(peer.scope, set()).add(peer.id)

    def _discard(self, name: str) -> None:
        peer = self._used.pop(name)
        self._index.discard(name)
        self._dirty.add(peer.owner)
        for key in self._members.pop(name, set()):
            remove(self._member_of, key, name)
            self._dirty.add(_member(key))
        if isinstance(peer.scope, Selector) and remove(self._scope_users, peer.scope, name):
            self._scope_index.discard(peer.scope)
            for namespace in self._namespaces:
                remove(self._scopes, namespace, peer.scope)

    def _rescope(self, namespace: str) -> None:
        """A namespace's labels are others: other namespace selectors may match it."""
        labels = self._namespaces.get(namespace)
        before = self._scopes.pop(namespace, set())
        after = set() if labels is None else self._scope_index.matching((_ALL,), labels)
        if after:
            self._scopes[namespace] = after
        if after != before and namespace in self._population:
            self._touched.update((namespace, name) for name in self._population[namespace].pods)

    def _find_members(self, peer: Peer) -> None:
        """The Pods that a new peer matches; those that changed too are looked at anyway."""
        for namespace in self._namespaces_of(peer):
            for pod in self._population[namespace].matching(peer):
                if pod.key not in self._touched:
                    self._members.setdefault(peer.id, set()).add(pod.key)
                    self._member_of.setdefault(pod.key, set()).add(peer.id)
                    self._dirty.add(_member(pod.key))

    def _namespaces_of(self, peer: Peer) -> list[str]:
        if isinstance(peer.scope, str):
            return [peer.scope] if peer.scope in self._population else []
        if peer.scope is None:
            return list(self._population)
        return [
            name for name, scopes in self._scopes.items() if peer.scope in scopes and name in self._population
        ]

    def _find_peers(self, key: PodKey) -> None:
        """The peers that match a changed Pod."""
        pod = self.pod(key)
        before = self._member_of.pop(key, set())
        after: set[str] = set()
        if pod is not None:
            scopes = (key[0], None, *self._scopes.get(key[0], ()))
            found = self._index.matching(scopes, pod.labels)
            after = {name for name in found if self._used[name].matches(pod)}
        if after:
            self._member_of[key] = after
        for name in after - before:
            self._members.setdefault(name, set()).add(key)
        for name in before - after:
            remove(self._members, name, key)
        if before or after:
            self._dirty.add(_member(key))


def _member(key: PodKey) -> Owner:
    return ("member", *key)


def remove(index: dict[Any, set[Any]], key: Any, member: Any) -> bool:
    """Take a member out; whether it was the last one (then its key is gone too)."""
    members = index.get(key)
    if members is None or member not in members:
        return False
    members.discard(member)
    if members:
        return False
    del index[key]
    return True
