"""Which ways open and which close between two states of a cluster, on every port that there is. Pure.

    before, after --> groups: ends that no policy of either can tell apart
                      pair of groups --> ports allowed before, ports allowed after --> opened, closed

Ends are Pods, nodes, and what is outside, divided by the blocks that policies name. Replicas mostly are one
group, so the work follows the number of workloads. Whether a rule's peers fit is decided by
`agent.explain.policy`, as for one connection alone; its ports are taken as spans instead of one by one.

A Pod that is there only before, or only after, has no ways that could change. A node always reaches its own
Pods, so "nodes" as a source are those that a Pod is not on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Literal, NamedTuple, TypeAlias

from agent.cluster.model import (
    Direction,
    Family,
    IPAddress,
    IPBlock,
    IPNetwork,
    NetworkPolicy,
    Pod,
    PolicyRule,
)
from agent.compile.peers import named_ports
from agent.compile.policy import rules_of
from agent.explain.policy import any_peer_fits, isolated_by
from agent.explain.spans import EVERYTHING, NOTHING, Spans, common, joined, spans_of, without
from agent.explain.world import World

FAMILIES: tuple[Family, ...] = (4, 6)
EVERYWHERE: dict[Family, IPNetwork] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}

Kind: TypeAlias = Literal["pods", "nodes", "outside"]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Ends that all policies treat alike: `names` of Pods as namespace/name, of nodes, or one block.

    pods: the first one's Pod before and after; None for what is no Pod. addresses: the first one's.
    """

    kind: Kind
    names: tuple[str, ...]
    addresses: tuple[IPAddress, ...]
    pods: tuple[Pod, Pod] | None = None
    members: tuple[Pod, ...] = ()

    def address(self, family: Family) -> IPAddress | None:
        """Where one of them is met."""
        return next((each for each in self.addresses if each.version == family), None)

    @property
    def families(self) -> frozenset[int]:
        """The families in which they are met."""
        return frozenset(each.version for each in self.addresses)


class Way(NamedTuple):
    """Ports that open or close from one group to another; `family` 0: in all that both have."""

    change: Literal["opens", "closes"]
    source: Group
    target: Group
    spans: Spans
    family: int


def changes(before: World, after: World) -> tuple[Way, ...]:
    """Everything that opens or closes."""
    ends = groups(before, after)
    found: dict[tuple[str, Group, Group], dict[int, Spans]] = defaultdict(dict)
    for family in FAMILIES:
        there = [group for group in ends if group.address(family) is not None]
        compared = _Compared(before, after, family)
        for source in there:
            for target in there:
                if _may_change(source, target):
                    for change, spans in compared.pair(source, target):
                        found[change, source, target][family] = spans
    return tuple(way for key, of in found.items() for way in _ways(*key, of))


def _may_change(source: Group, target: Group) -> bool:
    if source.pods is None and target.pods is None:
        return False
    if source is target and len(source.members) == 1:
        return False
    own_node_alone = source.kind == "nodes" and all(source.names == (pod.node,) for pod in target.members)
    return not own_node_alone


def _ways(change: str, source: Group, target: Group, of: dict[int, Spans]) -> Iterator[Way]:
    kind: Literal["opens", "closes"] = "opens" if change == "opens" else "closes"
    if of.keys() == source.families & target.families and len(set(of.values())) == 1:
        yield Way(kind, source, target, next(iter(of.values())), 0)
        return
    for family, spans in of.items():
        yield Way(kind, source, target, spans, family)


# What is alike


def groups(before: World, after: World) -> tuple[Group, ...]:
    """The ends that are there before and after, alike ones together."""
    blocks = tuple(sorted(set(_blocks(before)) | set(_blocks(after)), key=str))
    return (*_pods(before, after, blocks), *_nodes(after, blocks), *_outside(after, blocks))


def _blocks(world: World) -> Iterator[IPNetwork]:
    for policy in world.snapshot.policies.values():
        for rule in (*policy.ingress, *policy.egress):
            for of in rule.peers or ():
                if isinstance(of, IPBlock):
                    yield from (of.cidr, *of.excepts)


def _pods(before: World, after: World, blocks: tuple[IPNetwork, ...]) -> Iterator[Group]:
    alike: dict[Hashable, list[Pod]] = defaultdict(list)
    for key, pod in sorted(after.snapshot.pods.items()):
        earlier = before.snapshot.pods.get(key)
        if earlier is not None and takes_part(before, earlier) and takes_part(after, pod):
            places = tuple((each.version, _inside(each, blocks)) for each in pod.ips)
            alike[_seen(earlier), _seen(pod), places].append(pod)
    for members in alike.values():
        first = members[0]
        names = tuple("/".join(pod.key) for pod in members)
        pods = before.snapshot.pods[first.key], first
        yield Group("pods", names, first.ips, pods, tuple(members))


def takes_part(world: World, pod: Pod) -> bool:
    """Whether it sends and receives at an address of its own."""
    return any(of is not None and of.key == pod.key for of in map(world.pod_at, pod.ips))


def _seen(pod: Pod) -> Hashable:
    """What policies see of a Pod, but for its addresses."""
    return pod.namespace, tuple(sorted(pod.labels.items())), pod.ports


def _inside(address: IPAddress, blocks: Iterable[IPNetwork]) -> int:
    within = (each.version == address.version and address in each for each in blocks)
    return sum(1 << number for number, inside in enumerate(within) if inside)


def _nodes(world: World, blocks: tuple[IPNetwork, ...]) -> Iterator[Group]:
    alike: dict[Hashable, list[str]] = defaultdict(list)
    nodes = world.snapshot.nodes
    for name, node in sorted(nodes.items()):
        alike[tuple((each.version, _inside(each, blocks)) for each in node.internal_ips)].append(name)
    for names in alike.values():
        yield Group("nodes", tuple(names), nodes[names[0]].internal_ips)


def _outside(world: World, blocks: tuple[IPNetwork, ...]) -> Iterator[Group]:
    """What is left of each block without the smaller ones in it, and without the cluster."""
    cluster = {each for node in world.snapshot.nodes.values() for each in node.pod_cidrs}
    cluster |= {ip_network(each) for each in _own(world)}
    for family in FAMILIES:
        named = {EVERYWHERE[family], *(each for each in blocks if each.version == family)}
        parts = named | {each for each in cluster if each.version == family}
        for block in sorted(named - cluster, key=lambda of: (of.prefixlen, of)):
            address = _some_address(block, parts)
            if address is not None and not any(address in each for each in cluster if each.version == family):
                yield Group("outside", (str(block),), (address,))


def _own(world: World) -> Iterator[IPAddress]:
    for pod in world.snapshot.pods.values():
        yield from pod.ips if takes_part(world, pod) else ()
    for node in world.snapshot.nodes.values():
        yield from (*node.internal_ips, *node.external_ips)


def _some_address(block: IPNetwork, parts: Iterable[IPNetwork]) -> IPAddress | None:
    """An address of a block that is in none of the smaller ones."""
    smaller = sorted(
        (int(each.network_address), int(each.broadcast_address))
        for each in parts
        if each.prefixlen > block.prefixlen and each.network_address in block
    )
    free = int(block.network_address)
    for low, high in smaller:
        if free < low:
            break
        free = max(free, high + 1)
    return type(block.network_address)(free) if free <= int(block.broadcast_address) else None


# What is allowed


class _Compared:
    """Pairs of groups over one family, before and after."""

    def __init__(self, before: World, after: World, family: Family) -> None:
        self._before = _Allowed(before, family, 0)
        self._after = _Allowed(after, family, 1)

    def pair(self, source: Group, target: Group) -> Iterator[tuple[str, Spans]]:
        """What opens and what closes."""
        was, now = self._before.ports(source, target), self._after.ports(source, target)
        if was == now:
            return
        if opened := without(now, was):
            yield "opens", opened
        if closed := without(was, now):
            yield "closes", closed


class _Allowed:
    """What the policies of one state allow over one family; `which` of a group's Pods is of this state."""

    def __init__(self, world: World, family: Family, which: int) -> None:
        self._world, self._family, self._which = world, family, which
        self._rules: dict[tuple[Direction, Group], tuple[tuple[str, PolicyRule], ...] | None] = {}
        self._fits: dict[tuple[str, int, Group], bool] = {}
        self._spans: dict[tuple[object, ...], Spans] = {}

    def ports(self, source: Group, target: Group) -> Spans:
        """The ports of the target that the source may reach."""
        out = self._side("Egress", source, target)
        return common(out, self._side("Ingress", target, source)) if out else NOTHING

    def _side(self, direction: Direction, mine: Group, theirs: Group) -> Spans:
        rules = self._rules_of(direction, mine)
        if rules is None:
            return EVERYTHING
        receiver = mine if direction == "Ingress" else theirs
        fitting = [rule for space, rule in rules if self._fit(space, rule, theirs)]
        named = any(_has_names(rule.ports) for rule in fitting)
        asked = (receiver if named else None, *map(id, fitting))  # the rules live as long as their world
        if asked not in self._spans:
            pod = self._pod(receiver)
            numbers = named_ports(pod.ports) if pod else {}
            self._spans[asked] = joined(spans_of(rule.ports, numbers) for rule in fitting)
        return self._spans[asked]

    def _rules_of(self, direction: Direction, group: Group) -> tuple[tuple[str, PolicyRule], ...] | None:
        """All rules of the policies that isolate it; None when none does."""
        asked = direction, group
        if asked not in self._rules:
            pod = self._pod(group)
            isolating = isolated_by(self._world, direction, pod) if pod is not None else ()
            self._rules[asked] = tuple(_rules(isolating, direction)) if isolating else None
        return self._rules[asked]

    def _fit(self, namespace: str, rule: PolicyRule, theirs: Group) -> bool:
        asked = namespace, id(rule), theirs
        if asked not in self._fits:
            address = theirs.address(self._family)
            assert address is not None
            pod = self._pod(theirs)
            self._fits[asked] = any_peer_fits(self._world, namespace, rule, address, pod)
        return self._fits[asked]

    def _pod(self, group: Group) -> Pod | None:
        return group.pods[self._which] if group.pods else None


def _rules(policies: Iterable[NetworkPolicy], direction: Direction) -> Iterator[tuple[str, PolicyRule]]:
    for policy in policies:
        for rule in rules_of(policy, direction):
            yield policy.namespace, rule


def _has_names(ports: Iterable[object] | None) -> bool:
    return any(isinstance(getattr(of, "port", None), str) for of in ports or ())
