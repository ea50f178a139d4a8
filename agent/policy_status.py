"""Which generation of each policy is in force on this node, and since when. Pure; the clock is passed in.

    store --changed--> saw --> waiting --begin--> under way --done: it succeeded--> in force, since now
                                  ^                   |
                                  +--- it failed: stays for the next one

A policy is in force when everything that follows from it on this node is in the kernel, so one that selects
none of the node's Pods is as soon as the commit after it is done. `since` is when the agent had done the
first commit with this generation and mode (an annotation, which no generation counts); after a start of the
agent that is its own first commit, although the rules may have been in the kernel before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from msgspec import Struct
from prometheus_client import REGISTRY, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from agent.cluster.model import NetworkPolicy, PolicyMode
from agent.cluster.store import Changed

PolicyKey = tuple[str, str]

MOST_SHOWN = 1000
"""Policies with metrics of their own, of those that select Pods of this node."""

ENFORCED_SECONDS = Histogram(
    "podwall_policy_enforcement_seconds",
    "Time from hearing of a policy's change to its rules in the kernel",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 20),
)


class PolicyState(Struct, frozen=True):
    """A policy on this node: its newest generation, the one in force (None: none yet), and since when.

    mode: "audit" is judged and told, not enforced; `mode_in_force` is the kernel's, None: none yet.
    Generations are 0 where the cluster does not count them (manifests). `since` is in seconds since the
    epoch; `pods` counts the node's Pods that it selects.
    """

    namespace: str
    name: str
    generation: int
    in_force: int | None
    since: float | None
    pods: int
    mode: PolicyMode = "enforce"
    mode_in_force: PolicyMode | None = None

    @property
    def waiting(self) -> bool:
        """Whether its newest version is not in force yet."""
        return (self.in_force, self.mode_in_force) != (self.generation, self.mode)

    def to_json(self) -> dict[str, object]:
        """For the socket."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class _Seen(Struct, frozen=True, gc=False):
    """What was heard of a policy, and when; `generation` None: it is gone."""

    uid: str
    generation: int | None
    mode: PolicyMode
    when: float


class _InForce(Struct, frozen=True, gc=False):
    uid: str
    generation: int
    mode: PolicyMode
    since: float


class PolicyStatus:
    """Follows policies from the store to the kernel; `clock` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[PolicyKey, _Seen] = {}
        self._under_way: dict[PolicyKey, _Seen] = {}
        self._in_force: dict[PolicyKey, _InForce] = {}

    def saw(self, changed: Iterable[Changed]) -> None:
        """These objects are not as they were; the next commit has them."""
        now = self._clock()
        for each in changed:
            if each.kind == "NetworkPolicy":
                after = cast("NetworkPolicy | None", each.after)
                seen = (
                    _Seen(after.uid, after.generation, after.mode, now)
                    if after
                    else _Seen("", None, "enforce", now)
                )
                self._waiting[cast("PolicyKey", each.key)] = seen

    def begin(self) -> None:
        """A commit begins with all that was seen before now."""
        self._under_way |= self._waiting
        self._waiting = {}

    def done(self) -> None:
        """That commit has succeeded."""
        now = self._clock()
        for key, seen in self._under_way.items():
            ENFORCED_SECONDS.observe(max(0.0, now - seen.when))
            before = self._in_force.get(key)
            if seen.generation is None:
                self._in_force.pop(key, None)
            elif not before or not seen.generation or _is_new(seen, before):
                self._in_force[key] = _InForce(seen.uid, seen.generation, seen.mode, now)
        self._under_way = {}

    def of(self, selected: Mapping[PolicyKey, int]) -> tuple[PolicyState, ...]:
        """The state of these policies, which select so many Pods, by namespace and name."""
        return tuple(self._states(selected))

    def _states(self, selected: Mapping[PolicyKey, int]) -> Iterator[PolicyState]:
        for key, pods in sorted(selected.items()):
            seen = self._waiting.get(key) or self._under_way.get(key)
            known = self._in_force.get(key)
            newest = seen or known
            if newest is not None and newest.generation is not None:
                in_force, since = (known.generation, known.since) if known else (None, None)
                yield PolicyState(
                    *key, newest.generation, in_force, since, pods, newest.mode, known.mode if known else None
                )


def _is_new(seen: _Seen, before: _InForce) -> bool:
    return (seen.uid, seen.generation, seen.mode) != (before.uid, before.generation, before.mode)


class PolicyMetrics:
    """A collector of Prometheus for the states that it was given last; scraped by any thread."""

    def __init__(self) -> None:
        self.states: tuple[PolicyState, ...] = ()

    def collect(self) -> Iterator[Metric]:
        """How many policies there are and wait; of the first ones each generation and since when."""
        states = self.states
        labels = ["namespace", "policy"]
        count = GaugeMetricFamily("podwall_policies", "Policies that select Pods of this node")
        count.add_metric([], len(states))
        late = GaugeMetricFamily(
            "podwall_policies_waiting", "Of these, whose newest generation is not in force yet"
        )
        late.add_metric([], sum(state.waiting for state in states))
        audited = GaugeMetricFamily(
            "podwall_policies_audited", "Of these, that are in audit mode: not enforced"
        )
        audited.add_metric([], sum(state.mode_in_force == "audit" for state in states))
        generation = GaugeMetricFamily(
            "podwall_policy_generation", "Generation of a policy in force on this node", labels=labels
        )
        since = GaugeMetricFamily(
            "podwall_policy_since_seconds",
            "Since when it is in force, in seconds of the epoch",
            labels=labels,
        )
        for state in states[:MOST_SHOWN]:
            if state.in_force is not None and state.since is not None:
                generation.add_metric([state.namespace, state.name], state.in_force)
                since.add_metric([state.namespace, state.name], state.since)
        yield from (count, late, audited, generation, since)


METRICS = PolicyMetrics()
REGISTRY.register(METRICS)
