"""What an agent proves when it is asked how it is: its rules, the ways to other nodes, its kernel.

    health      all of these and the agent's status, whatever becomes of single ones
    rules       the kernel's rules are read and compared with those that should be there, now
    paths       real packets to every other node's Pod range, see `agent.reachability`
    filters     others' chains that drop what Pods send and receive, which the packets above do not meet
    features    what the kernel has of what podwall uses, see `agent.features`
    lag         how long what the cluster has by now takes to be known here

Asking costs the agent something, so those who ask at the same time are answered one after another. What the
kernel has holds for a while, and so do paths without tunnels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent import features, reachability
from agent.calls import Answer, Body, listed
from agent.cluster.errors import ApiError
from agent.cluster.store import Snapshot
from agent.config import Config
from agent.explain.filters import dropping
from agent.nft import foreign
from agent.nft.diff import Change, Changes
from agent.nft.kernel import OWN_TABLES, Kernel, NftError
from agent.nft.model import Chain, ChainName, ItemId, SetName, TableName
from agent.routes.plan import Plan
from agent.rules import Rules
from cni import spec
from cni.spec import CniError

ERRORS_EVERY_S = 2.5
"""Nodes without tunnels answer by errors, no more often than this; see `agent.reachability`."""

FEATURES_HOLD_S = 30.0
"""How long an answer is given again; what changes from one moment to the next is always found anew."""


READS, PAUSE_S = 5, 0.2  # how often rules are read until nothing is committed meanwhile
LAG_LIMIT_S = 5.0
LAG_NAMESPACE = "kube-system"  # every cluster has it
MOST_COMPARED = 20_000
"""Elements that are read and compared when somebody asks: no commit gets its turn meanwhile.

What is larger the agent compares by itself every few minutes, and that time is told.
"""

FORWARDED = {"prerouting", "forward", "postrouting"}
"""The hooks that packets between a Pod and another node pass."""

MOST_NAMED = 20
"""Differences of rules that are named in one answer."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is proved: one agent's parts; `altered` is called when rules are not as they should be."""

    config: Config
    kernel: Kernel
    rules: Mapping[str, Rules]
    snapshot: Callable[[], Snapshot]
    plan: Callable[[], Plan]
    pod_mtu: Callable[[], int]
    altered: Callable[[], None]
    status: Callable[[], Mapping[str, object]]
    reach: Callable[[str], Awaitable[None]]


@dataclass(slots=True)
class OneByOne:
    """Works an answer out for one after another; it is given again for so many seconds, as they are then."""

    work: Callable[[], Awaitable[dict[str, Any]]]
    holds_s: Callable[[], float] = lambda: 0.0
    _last: dict[str, Any] | None = None
    _until: float = 0.0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self, _: Body) -> object:
        async with self._turn:
            if self._last is None or time.monotonic() >= self._until:
                self._last = await self.work()
                self._until = time.monotonic() + self.holds_s()
            return self._last


def answers(subject: Subject) -> Mapping[str, Answer]:
    """Each proof, by its name on the socket."""
    proofs: dict[str, Answer] = {
        "rules": OneByOne(lambda: rules(subject)),
        "paths": OneByOne(lambda: paths(subject), lambda: 0.0 if subject.plan().vxlan else ERRORS_EVERY_S),
        "filters": OneByOne(lambda: filters(subject)),
        "features": OneByOne(lambda: kernel_features(subject), lambda: FEATURES_HOLD_S),
        "lag": OneByOne(lambda: lag(subject)),
    }

    async def health(body: Body) -> object:
        others = [name for name in proofs if name != "paths"]
        tried = await _or_error(proofs["paths"](body))  # alone: how long packets take is not to be disturbed
        found = await asyncio.gather(*(_or_error(proofs[name](body)) for name in others))
        return {"status": subject.status(), "paths": tried, **dict(zip(others, found, strict=True))}

    return {**proofs, "health": health}


async def _or_error(proof: Awaitable[object]) -> object:
    try:
        return await proof
    except CniError as error:
        return {"error": error.msg}


# Rules


async def rules(subject: Subject) -> dict[str, Any]:
    """Whether the kernel's rules are those that should be there; not `compared`: they changed all the while.

    Raises CniError when they cannot be read.
    """
    begun = time.monotonic()
    compared, found = True, []
    for part, of in subject.rules.items():
        changes = {} if of.size > MOST_COMPARED and of.last_compared else await _altered(of)
        compared &= changes is not None
        found += [{"part": part, "difference": text} for text in differences(changes or {})]
    if found:
        subject.altered()
    return {
        "compared": compared,
        "at": min((of.last_compared or 0.0 for of in subject.rules.values()), default=0.0),
        "altered": len(found),
        "differences": found[:MOST_NAMED],
        "ms": round((time.monotonic() - begun) * 1e3, 1),
    }


async def _altered(of: Rules) -> Changes | None:
    if of.last_check is None:
        return None
    for _ in range(READS):
        try:
            changes = await of.altered()
        except NftError as error:
            raise CniError(spec.TRY_AGAIN_LATER, f"the rules cannot be read: {error.message}") from error
        if changes is not None:
            return changes
        await asyncio.sleep(PAUSE_S)
    return None


def differences(changes: Changes) -> list[str]:
    """Each difference as a sentence about the kernel, in order."""
    return sorted(f"{_title(name)} {_state(change)}" for name, change in changes.items())


def _title(name: ItemId) -> str:
    match name:
        case SetName():
            return f"set {name.name} of {_table(name.table)}"
        case ChainName():
            return f"chain {name.name} of {_table(name.table)}"
        case TableName():
            return f"table {_table(name)}"
    key = " . ".join(map(str, name[1])) if isinstance(name[1], tuple) else str(name[1])
    return f"element {key} of {name[0].name}, {_table(name[0].table)},"


def _table(name: TableName) -> str:
    return f"{name.family} {name.name}"


def _state(change: Change) -> str:
    """How the kernel's side, which stands before, differs from what should be."""
    if change.before is None:
        return "is missing"
    if change.after is None:
        return "is not podwall's"
    if isinstance(change.before, Chain) and isinstance(change.after, Chain):
        return f"has {len(change.before.rules)} rules where {len(change.after.rules)} should be, or others"
    return "was altered"


# Paths and features


async def paths(subject: Subject) -> dict[str, Any]:
    """Every path to other nodes' Pods, tried. Raises CniError when no socket can be had."""
    own, nodes, plan = subject.config.node_name, subject.snapshot().nodes, subject.plan()
    asked = reachability.trials(own, nodes, plan, subject.pod_mtu())
    tried = asked[: reachability.MOST_PATHS]
    try:
        seen = await reachability.tried(tried) if tried else []
    except OSError as error:
        raise CniError(
            spec.TRY_AGAIN_LATER, f"paths cannot be tried: {error.strerror}; the agent needs CAP_NET_RAW"
        ) from error
    outcomes = [reachability.told(trial, each) for trial, each in zip(tried, seen, strict=True)]
    nowhere = reachability.without_path(own, nodes, plan)
    return {
        **listed("paths", outcomes),
        "not_tried": len(asked) - len(tried),
        "without_path": list(nowhere),
    }


async def filters(subject: Subject) -> dict[str, Any]:
    """Somebody else's chains that drop Pods' packets. Raises CniError when they cannot be read."""
    ranges = [cidr for node in subject.snapshot().nodes.values() for cidr in node.pod_cidrs]
    tables = {(table.family, table.name) for table in OWN_TABLES}
    try:
        found = await asyncio.to_thread(foreign.read, tables, ranges)
    except OSError as error:
        text = f"others' chains cannot be read: {error.strerror}"
        raise CniError(spec.TRY_AGAIN_LATER, text) from error
    return {
        "drops": [
            {"table": f"{of.family} {of.table}", "chain": of.name, "hook": of.hook, "how": how}
            for of, how in dropping(found)
            if of.hook in FORWARDED
        ]
    }


async def kernel_features(subject: Subject) -> dict[str, Any]:
    """What this kernel has of what podwall uses."""
    own = subject.snapshot().nodes.get(subject.config.node_name)
    plan: Plan = subject.plan()
    tunnels = subject.config.mode == "vxlan" or any(path.way == "vxlan" for path in plan.paths)
    families: Sequence[int] = [cidr.version for cidr in own.pod_cidrs] if own else ()
    found = await features.found(subject.kernel, tunnels=tunnels, families=families)
    return {"features": [each.to_json() for each in found]}


# Lag


async def lag(subject: Subject) -> dict[str, Any]:
    """How many milliseconds it takes until all that the cluster has by now has been delivered here.

    Asked for the policies of one namespace, as when a Pod is added. Raises CniError.
    """
    begun = time.monotonic()
    try:
        async with asyncio.timeout(LAG_LIMIT_S):
            await subject.reach(LAG_NAMESPACE)
    except TimeoutError:
        text = f"the watch of policies does not get to what the API server has within {LAG_LIMIT_S:g} s"
        raise CniError(spec.TRY_AGAIN_LATER, text) from None
    except ApiError as error:
        raise CniError(spec.TRY_AGAIN_LATER, str(error)) from error
    return {"ms": round((time.monotonic() - begun) * 1e3, 1)}
