"""What a change of the cluster's objects would do: which ways open and close, which flows end. Pure.

    before, after --> ways (agent.explain.reach) --> rows: sources and targets that share their ports
                  --> Services: endpoints that come and go
                  --> policies: a sentence each
    flows         --> those that the rules after the change do not allow

A flow is judged as the node that tells of it would: by the policies of that node's own Pods.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from agent.cluster.model import (
    Direction,
    IPAddress,
    Namespace,
    NetworkPolicy,
    Pod,
    Protocol,
    Service,
    ServicePort,
    titled,
)
from agent.cluster.store import Changed, Snapshot
from agent.compile.peers import named_ports
from agent.compile.policy import rules_of
from agent.compile.selectors import Selector
from agent.explain.policy import Packet, judge, selected_by
from agent.explain.reach import Group, Way, changes
from agent.explain.spans import Spans, contains
from agent.explain.words import rule_in_words
from agent.explain.world import World

Change: TypeAlias = Literal["opens", "closes"]
DIRECTIONS: tuple[Direction, Direction] = ("Ingress", "Egress")
MOST_RULES = 3  # of a policy that are told
EMPTY: Mapping[IPAddress, Pod] = MappingProxyType({})
LETS: dict[Direction, str] = {"Ingress": "in", "Egress": "out"}


class Row(NamedTuple):
    """From all of these to all of these (not to itself); `family` 0: in all that both have.

    declared: the ports among `spans` that the targets' containers declare.
    """

    change: Change
    sources: tuple[Group, ...]
    targets: tuple[Group, ...]
    spans: Spans
    family: int
    declared: tuple[tuple[Protocol, int], ...]


class Backing(NamedTuple):
    """A port of a Service whose endpoints change: Pods with the port, as namespace/name:port."""

    service: tuple[str, str]
    port: ServicePort
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def closes(self) -> bool:
        """Whether nobody answers any more."""
        return bool(self.before) and not self.after


class LiveFlow(NamedTuple):
    """A flow as a node's agent tells it, by its real ends; ports are 0 where there are none.

    from_node: the node itself began it, whom no policy stops.
    """

    node: str
    protocol: str
    source: IPAddress
    sport: int
    destination: IPAddress
    dport: int
    from_node: bool = False


def live_flows(told: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[LiveFlow]:
    """The flows that nodes' agents tell, but for connections that are over though their entries last."""
    for node, of in told:
        if not of.get("closed"):
            source, destination = of["source"], of["destination"]
            yield LiveFlow(
                node,
                of["protocol"],
                ip_address(source["address"]),
                source["port"],
                ip_address(destination["address"]),
                destination["port"],
                bool(of.get("from_node")),
            )


class Cut(NamedTuple):
    """A flow that would end, and what ends it."""

    flow: LiveFlow
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a change would do. sentences: of each changed object; unusable: what is wrong with them."""

    sentences: tuple[str, ...]
    rows: tuple[Row, ...]
    services: tuple[Backing, ...]
    cuts: tuple[Cut, ...]
    unusable: tuple[str, ...]

    @property
    def closes(self) -> bool:
        """Whether anything that works now would not."""
        ways = any(row.change == "closes" for row in self.rows)
        return ways or bool(self.cuts) or any(each.closes for each in self.services)


def plan(before: World, after: World, changed: Iterable[Changed], flows: Iterable[LiveFlow] = ()) -> Plan:
    """What becomes of the cluster by these changes."""
    changed = tuple(changed)
    return Plan(
        sentences=tuple(sentence for each in changed for sentence in _sentences(before, after, each)),
        rows=rows(changes(before, after)),
        services=tuple(_backings(before.snapshot, after.snapshot, changed)),
        cuts=tuple(cuts(after, flows, _removed_at(changed))),
        unusable=tuple(_unusable(changed)),
    )


# Ways, put together


def rows(ways: Iterable[Way]) -> tuple[Row, ...]:
    """The ways with as few rows as show them all: what closes first, the largest first."""
    sources: dict[tuple[Change, Spans, int, Group], list[Group]] = defaultdict(list)
    for way in ways:
        sources[way.change, way.spans, way.family, way.target].append(way.source)
    targets: dict[tuple[Change, Spans, int, frozenset[Group]], list[Group]] = defaultdict(list)
    order: dict[frozenset[Group], list[Group]] = {}
    for (change, spans, family, target), found in sources.items():
        itself = [target] if target.kind == "pods" and len(target.names) == 1 else []
        alike = frozenset((*found, *itself))  # there is no way from a Pod to itself that could differ
        order.setdefault(alike, []).extend(each for each in found if each not in order[alike])
        targets[change, spans, family, alike].append(target)
    made = [
        Row(change, _sources(order[alike], of), tuple(of), spans, family, _declared(of, spans))
        for (change, spans, family, alike), of in targets.items()
    ]
    return tuple(sorted(made, key=_importance))


def _sources(found: list[Group], targets: list[Group]) -> tuple[Group, ...]:
    alone = targets[0] if len(targets) == 1 and len(targets[0].names) == 1 else None
    return tuple(group for group in found if group is not alone)


def _declared(targets: Iterable[Group], spans: Spans) -> tuple[tuple[Protocol, int], ...]:
    ports = {(port.protocol, port.port) for group in targets for pod in group.members for port in pod.ports}
    return tuple(sorted(port for port in ports if contains(spans, *port)))


def _importance(row: Row) -> tuple[bool, bool, int]:
    size = sum(len(group.names) for group in row.sources) * sum(len(group.names) for group in row.targets)
    return row.change != "closes", not row.declared, -size


# Flows


def cuts(after: World, flows: Iterable[LiveFlow], removed: Mapping[IPAddress, Pod] = EMPTY) -> Iterator[Cut]:
    """The flows that end; one that two nodes tell of once. removed: the Pods that go, by their addresses."""
    seen: set[tuple[object, ...]] = set()
    for flow in flows:
        gone = removed.get(flow.source) or removed.get(flow.destination)
        reason = f"Pod {'/'.join(gone.key)} is removed" if gone else _ended_by(after, flow)
        if reason and flow[1:] not in seen:
            seen.add(flow[1:])
            yield Cut(flow, reason)


def _removed_at(changed: Iterable[Changed]) -> dict[IPAddress, Pod]:
    pods = (each.before for each in changed if each.after is None and isinstance(each.before, Pod))
    return {address: pod for pod in pods if not pod.host_network for address in pod.ips}


def _ended_by(after: World, flow: LiveFlow) -> str:
    if flow.from_node:
        return ""
    protocol = flow.protocol.upper()
    port = flow.dport if protocol in ("TCP", "UDP", "SCTP") else None
    packet = Packet(flow.source, flow.destination, protocol, port)
    for direction in ("Egress", "Ingress"):
        judgement = judge(after, "Egress" if direction == "Egress" else "Ingress", packet)
        if judgement.pod is not None and judgement.pod.node == flow.node and not judgement.allowed:
            names = ", ".join("/".join(policy.key) for policy in judgement.isolating)
            return f"{direction.lower()} of {'/'.join(judgement.pod.key)} by {names}"
    return ""


# Services


def _backings(before: Snapshot, after: Snapshot, changed: tuple[Changed, ...]) -> Iterator[Backing]:
    spaces = {each.key[0] for each in changed if each.kind == "Pod"}
    touched = {each.key for each in changed if each.kind == "Service"}
    for key in sorted(before.services.keys() | after.services.keys()):
        if key not in touched and key[0] not in spaces:
            continue
        was, now = _endpoints(before, key), _endpoints(after, key)
        for port in sorted(was.keys() | now.keys(), key=lambda of: (of.port, of.protocol)):
            backing = Backing(key, port, was.get(port, ()), now.get(port, ()))
            if backing.before != backing.after:
                yield backing


def _endpoints(snapshot: Snapshot, key: tuple[str, str]) -> dict[ServicePort, tuple[str, ...]]:
    """What the endpoints' controller makes of a Service with a selector, port by port."""
    service = snapshot.services.get(key)
    if service is None or not service.selector or service.type == "ExternalName":
        return {}
    pods = [pod for _, pod in sorted(snapshot.pods_in(service.namespace).items()) if _answers(service, pod)]
    return {port: tuple(_places(port, pods)) for port in service.ports}


def _answers(service: Service, pod: Pod) -> bool:
    selected = service.selector is not None and service.selector.items() <= pod.labels.items()
    ready = pod.ready or service.publish_not_ready_addresses
    return selected and ready and bool(pod.ips) and not pod.finished and not pod.deleting


def _places(port: ServicePort, pods: Iterable[Pod]) -> Iterator[str]:
    for pod in pods:
        target = port.target_port or port.port
        number = named_ports(pod.ports).get((port.protocol, target)) if isinstance(target, str) else target
        if number is not None:
            yield f"{'/'.join(pod.key)}:{number}"


# Words


def _unusable(changed: Iterable[Changed]) -> Iterator[str]:
    for each in changed:
        for problem in each.after.problems if each.after else ():
            yield f"{titled(each.kind, each.key)}: {problem}"


def _sentences(before: World, after: World, of: Changed) -> Iterator[str]:
    """What the change of one object means."""
    word = "new" if of.before is None else "removed" if of.after is None else "changed"
    title = f"{titled(of.kind, of.key)} ({word})"
    if isinstance(of.after, NetworkPolicy):
        yield f"{title} {_mode(of)}{_policy(after, of.after)}"
    elif isinstance(of.before, NetworkPolicy):
        yield f"{title} {_removed(before, after, of.before)}"
    elif isinstance(of.after, (Pod, Namespace)) and of.before is not None:
        yield f"{title}: {_labels(of)}{_selected(before, after, of)}"
    elif isinstance(of.after, Pod):
        yield f"{title} is selected by {_policies_of(after, of.after)}; its ways are not compared"
    else:
        yield title


def _policy(world: World, of: NetworkPolicy) -> str:
    pods = _count(world, of)
    if not pods:
        return f"selects no Pod of namespace {of.namespace}: it does nothing now"
    ways = [_rules(of, direction) for direction in DIRECTIONS if direction in of.policy_types]
    isolates = " and ".join(direction.lower() for direction in DIRECTIONS if direction in of.policy_types)
    if of.mode == "audit":
        return f"is in audit mode: it would isolate {pods} for {isolates}; {'; '.join(ways)}"
    return f"isolates {pods} for {isolates}; {'; '.join(ways)}"


def _mode(of: Changed) -> str:
    if not isinstance(of.before, NetworkPolicy) or not isinstance(of.after, NetworkPolicy):
        return ""
    if of.before.mode == of.after.mode:
        return ""
    return "is no longer enforced and " if of.after.mode == "audit" else "leaves audit mode and "


def _rules(of: NetworkPolicy, direction: Direction) -> str:
    rules = rules_of(of, direction)
    if not rules:
        return f"it lets nothing {LETS[direction]}"
    said = "; ".join(rule_in_words(rule, direction) for rule in rules[:MOST_RULES])
    more = f"; and {len(rules) - MOST_RULES} rules more" if len(rules) > MOST_RULES else ""
    return f"it lets {LETS[direction]} what {'comes' if direction == 'Ingress' else 'goes'} {said}{more}"


def _removed(before: World, after: World, of: NetworkPolicy) -> str:
    if of.mode == "audit":
        return "was in audit mode"
    pods = _count(before, of)
    if not pods:
        return "selected no Pod"
    free = [
        pod
        for pod in after.snapshot.pods_in(of.namespace).values()
        if Selector(of.pod_selector).matches(pod.labels)
        and not any(
            policy.mode == "enforce" for each in DIRECTIONS for policy in selected_by(after, each, pod)
        )
    ]
    return f"no longer isolates {pods}; nothing else isolates {len(free)} of them"


def _count(world: World, of: NetworkPolicy) -> str:
    """How many Pods it selects, in words; "" for none."""
    selector = Selector(of.pod_selector)
    pods = [
        pod
        for pod in world.snapshot.pods_in(of.namespace).values()
        if not pod.host_network and not pod.finished and selector.matches(pod.labels)
    ]
    return f"{len(pods)} {'Pod' if len(pods) == 1 else 'Pods'} of {of.namespace}" if pods else ""


def _labels(of: Changed) -> str:
    before, after = of.before, of.after
    assert isinstance(before, (Pod, Namespace))
    assert isinstance(after, (Pod, Namespace))
    names = sorted(before.labels.keys() | after.labels.keys())
    other = [name for name in names if before.labels.get(name) != after.labels.get(name)]
    said = [
        f"{name}={before.labels.get(name, '')} becomes {after.labels.get(name, 'none')}" for name in other
    ]
    return ", ".join(said) or "no other labels"


def _selected(before: World, after: World, of: Changed) -> str:
    """Other policies, where it is a Pod."""
    if not isinstance(of.before, Pod) or not isinstance(of.after, Pod):
        return ""
    was, now = _policies_of(before, of.before), _policies_of(after, of.after)
    return f"; selected by {now}" + (f", before by {was}" if was != now else "")


def _policies_of(world: World, pod: Pod) -> str:
    keys = {policy.key for direction in DIRECTIONS for policy in selected_by(world, direction, pod)}
    return ", ".join(sorted("/".join(key) for key in keys)) or "no policy"
