"""The policies of this node's Pods, compiled again only where a change can be felt.

    changed objects, attached Pods --apply, attach, detach--> owners whose items may have changed
    owner --items--> its items, from what is known now

    owner                             owns
    ("policy",)                       the hooks, maps and sets that are always there
    ("audit",)                        those that are there while some policy of these Pods is in audit mode
    ("class", chain)                  the chain of a class of this node's Pods
    ("isolated", container, ifname)   what leads an attached Pod's addresses to its classes
    ("peer", id)                      the sets of a selector that some class looks up
    ("member", namespace, pod)        a Pod's elements in those sets

What is in the kernel follows from what is on this node: a policy that selects none of its Pods costs
nothing here, and a selector that no class looks up has no set.  The indexes between them are kept in both
directions:

    attached Pod --its labels--> policies --> class --its rules--> peers --selectors--> Pods
                                                      (counted by users)

so that nothing is tried against everything (the half from peers on is `agent.compile.members`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias, cast

from agent.cluster.model import Direction, Namespace, NetworkPolicy, Pod
from agent.cluster.store import Changed
from agent.compile import audit, verdicts
from agent.compile.members import LocalPod, Members, PodKey, is_of, remove
from agent.compile.peers import PortName, named_ports
from agent.compile.policy import PolicyClass, PolicyKey, chain, named_ports_of, peers
from agent.compile.selectors import Selector, SelectorIndex
from agent.nft.model import Item, Owner

_Selecting: TypeAlias = dict[
    tuple[Direction, bool], tuple[tuple[PolicyKey, ...], tuple[tuple[PortName, int], ...]]
]
"""Per direction in which a Pod is isolated: the policies, and the numbers of the named ports they use.

Under (direction, True) what would be if its policies in audit mode were in force too, where there are some.
"""


class PolicyCompiler:
    """Compiles the policies for one node; pure: it is fed, and asked what its owners own."""

    def __init__(self, node_name: str) -> None:
        self._node = node_name
        self._policies = _Policies()
        self._peers = Members(node_name)
        self._local: dict[Owner, LocalPod] = {}
        self._attached: dict[PodKey, set[Owner]] = {}
        self._attached_in: dict[str, set[Owner]] = {}
        self._classes_of: dict[Owner, tuple[PolicyClass, ...]] = {}
        self._classes: dict[str, PolicyClass] = {}
        self._audits: set[str] = set()  # the chains of audit classes
        self._users: dict[str, set[Owner]] = {}
        self._classes_with: dict[PolicyKey, set[str]] = {}

    @property
    def owners(self) -> frozenset[Owner]:
        """Every owner that owns something; a full compile is `items` of each of them."""
        classes = (each.owner for each in self._classes.values())
        isolated = (owner for owner, classes in self._classes_of.items() if classes)
        hooks = (audit.AUDIT,) if self._audits else ()
        return frozenset((verdicts.STATIC, *hooks, *classes, *isolated, *self._peers.owners))

    def apply(self, changes: Iterable[Changed]) -> frozenset[Owner]:
        """Take changed objects; return the owners that have to be compiled again."""
        judged: set[Owner] = set()  # attached Pods that may have other policies now
        edited: set[str] = set()  # chains of changed policies
        self._peers.begin()
        for change in changes:
            if change.kind == "Pod":
                judged |= self._take_pod(change)
            elif change.kind == "Namespace":
                self._peers.take_namespace(change.key, cast("Namespace | None", change.after))
            elif change.kind == "NetworkPolicy":
                key = cast("PolicyKey", change.key)
                self._policies.take(key, cast("NetworkPolicy | None", change.after))
                judged |= self._attached_in.get(key[0], set())
                edited |= self._classes_with.get(key, set())
        return self._settle(judged, edited)

    def attach(self, pod: LocalPod) -> frozenset[Owner]:
        """A Pod has these addresses on this node, before anything can be sent from or to them."""
        self._peers.begin()
        self._forget(pod.owner)
        self._local[pod.owner] = pod
        self._attached.setdefault(pod.key, set()).add(pod.owner)
        self._attached_in.setdefault(pod.namespace, set()).add(pod.owner)
        self._readdress(pod.key)
        return self._settle({pod.owner}, set()) | {pod.owner}

    def detach(self, container_id: str, ifname: str) -> frozenset[Owner]:
        """A Pod's addresses are no longer its own."""
        self._peers.begin()
        owner: Owner = ("isolated", container_id, ifname)
        gone = self._forget(owner)
        if gone is not None:
            self._readdress(gone.key)
        return self._settle({owner}, set()) | {owner}

    def items(self, owner: Owner) -> tuple[Item, ...]:
        """What an owner owns now, nothing if it is gone; () for the owners of others."""
        match owner:
            case verdicts.STATIC:
                return verdicts.static()
            case audit.AUDIT if self._audits:
                return audit.hooks()
            case ("class", name) if name in self._classes:
                return (chain(self._classes[name], self._policies.objects),)
            case ("isolated", _, _) if owner in self._local:
                return tuple(self._isolated(self._local[owner], self._classes_of.get(owner, ())))
            case ("peer" | "member", *_):
                return self._peers.items(owner)
        return ()

    def classes(self, container_id: str, ifname: str) -> tuple[PolicyClass, ...]:
        """The classes of an attached Pod; of a direction in which it is not isolated there are none."""
        return self._classes_of.get(("isolated", container_id, ifname), ())

    def members(self, class_id: str) -> tuple[LocalPod, ...]:
        """The attached Pods of the class that a log's prefix names."""
        return tuple(
            self._local[owner]
            for owner, classes in self._classes_of.items()
            if any(each.id == class_id for each in classes)
        )

    def policies_of(self, class_id: str) -> tuple[PolicyKey, ...]:
        """The policies of the class that a log's prefix names."""
        return next((each.policies for each in self._classes.values() if each.id == class_id), ())

    def selected(self) -> dict[PolicyKey, int]:
        """How many of the attached Pods each policy selects; those that select none are left out."""
        pods: dict[PolicyKey, set[PodKey]] = {}
        for owner, classes in self._classes_of.items():
            for key in {key for of in classes for key in of.policies}:
                pods.setdefault(key, set()).add(self._local[owner].key)
        return {key: len(keys) for key, keys in pods.items()}

    # Attached Pods

    def _take_pod(self, change: Changed) -> set[Owner]:
        key = cast("PodKey", change.key)
        before, after = self._peers.pod(key), cast("Pod | None", change.after)
        self._peers.take_pod(key, after)
        if before is not None and after is not None and _decides(before) == _decides(after):
            return set()
        self._peers.touch(key)
        return self._attached.get(key, set())

    def _forget(self, owner: Owner) -> LocalPod | None:
        pod = self._local.pop(owner, None)
        if pod is not None:
            remove(self._attached, pod.key, owner)
            remove(self._attached_in, pod.namespace, owner)
        return pod

    def _readdress(self, key: PodKey) -> None:
        owners = sorted(self._attached.get(key, ()))
        self._peers.take_attached(key, [self._local[owner] for owner in owners])

    def _isolated(self, pod: LocalPod, classes: tuple[PolicyClass, ...]) -> Iterator[Item]:
        for address in pod.addresses:
            own = [of for of in classes if of.family == address.version]
            chains = {of.direction: of.chain for of in own if not of.audit}
            yield from verdicts.isolated(address, chains, pod.namespace, pod.name)
            chains = {of.direction: of.chain for of in own if of.audit}
            yield from audit.audited(address, chains, pod.namespace, pod.name)

    def _classes_for(self, pod: LocalPod) -> tuple[PolicyClass, ...]:
        """One class a family and direction in which policies select it, and one where some are audited."""
        known = self._peers.pod(pod.key)
        if known is None or not is_of(pod, known):
            directions = self._policies.directions_in(pod.namespace)
            per_direction: _Selecting = {(direction, False): ((), ()) for direction in directions}
        else:
            per_direction = self._policies.selecting(known)
        families = sorted({address.version for address in pod.addresses})
        return tuple(
            PolicyClass(direction, family, keys, ports, audited)
            for (direction, audited), (keys, ports) in sorted(per_direction.items())
            for family in families
        )

    # What follows from what

    def _settle(self, judged: Iterable[Owner], edited: set[str]) -> frozenset[Owner]:
        dirty: set[Owner] = set()
        touched = set(edited)
        audited = bool(self._audits)
        for owner in judged:
            pod = self._local.get(owner)
            after = self._classes_for(pod) if pod else ()
            before = self._classes_of.get(owner, ())
            if after != before:
                touched |= self._reclass(owner, before, after)
                dirty.add(owner)
        if bool(self._audits) != audited:
            dirty.add(audit.AUDIT)
        for name in touched:
            dirty.add(("class", name))
            used = self._classes.get(name)
            self._peers.use(name, peers(used, self._policies.objects) if used else {})
        return frozenset(dirty | self._peers.settle())

    def _reclass(
        self, owner: Owner, before: tuple[PolicyClass, ...], after: tuple[PolicyClass, ...]
    ) -> set[str]:
        """Move an attached Pod to other classes; the chains that came or went."""
        touched: set[str] = set()
        for of in after:
            if of.chain not in self._users:
                self._classes[of.chain] = of
                if of.audit:
                    self._audits.add(of.chain)
                touched.add(of.chain)
                for key in of.policies:
                    self._classes_with.setdefault(key, set()).add(of.chain)
            self._users.setdefault(of.chain, set()).add(owner)
        for of in before:
            if of not in after and remove(self._users, of.chain, owner):
                del self._classes[of.chain]
                self._audits.discard(of.chain)
                touched.add(of.chain)
                for key in of.policies:
                    remove(self._classes_with, key, of.chain)
        self._classes_of[owner] = after
        if not after:
            del self._classes_of[owner]
        return touched


def _decides(pod: Pod) -> tuple[object, ...]:
    """What of a Pod policies can tell apart; its status changes more often."""
    of = pod.labels, pod.ips, pod.ports, pod.finished, pod.host_network, pod.node, pod.uid
    return (*of, any(owner.kind == "Node" for owner in pod.owners))


class _Policies:
    """All policies, by the Pods that they select."""

    def __init__(self) -> None:
        self.objects: dict[PolicyKey, NetworkPolicy] = {}
        self._index = SelectorIndex[PolicyKey]()
        self._in: dict[str, set[PolicyKey]] = {}
        self._names: dict[PolicyKey, frozenset[PortName]] = {}

    def take(self, key: PolicyKey, policy: NetworkPolicy | None) -> None:
        if policy is None:
            if self.objects.pop(key, None) is not None:
                self._index.discard(key)
                del self._names[key]
                remove(self._in, key[0], key)
            return
        self.objects[key] = policy
        self._names[key] = named_ports_of(policy)
        self._index.add(key, key[0], Selector(policy.pod_selector))
        self._in.setdefault(key[0], set()).add(key)

    def directions_in(self, namespace: str) -> frozenset[Direction]:
        """The directions in which some policy of a namespace isolates."""
        policies = map(self.objects.__getitem__, self._in.get(namespace, ()))
        return frozenset(
            direction for of in policies if of.mode == "enforce" for direction in of.policy_types
        )

    def selecting(self, pod: Pod) -> _Selecting:
        """What a Pod's labels make of it."""
        keys = sorted(self._index.matching((pod.namespace,), pod.labels))
        found: _Selecting = {}
        for direction in ("Egress", "Ingress"):
            of = tuple(key for key in keys if direction in self.objects[key].policy_types)
            in_force = tuple(key for key in of if self.objects[key].mode == "enforce")
            if in_force:
                found[direction, False] = in_force, self._numbers_for(direction, pod, in_force)
            if in_force != of:
                found[direction, True] = of, self._numbers_for(direction, pod, of)
        return found

    def _numbers_for(
        self, direction: Direction, pod: Pod, keys: tuple[PolicyKey, ...]
    ) -> tuple[tuple[PortName, int], ...]:
        """What the named ports of ingress rules are on the Pod; on egress they are the peers'."""
        if direction == "Egress":
            return ()
        names = frozenset[PortName]().union(*(self._names[key] for key in keys))
        if not names:
            return ()
        numbers = named_ports(pod.ports)
        return tuple((name, numbers[name]) for name in sorted(names & numbers.keys()))
