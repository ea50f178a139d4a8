"""A change rehearsed for the page: the manifest that was pasted, laid over the cluster as it is. Pure.

    manifest --read--> objects --laid over--> the cluster after it --plan--> what opens, closes, ends

The same core as `podwall plan`; ids instead of names, so that the answer can be drawn into the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent.cluster.documents import parse
from agent.cluster.model import Endpoints, Object
from agent.explain.overlay import laid_over
from agent.explain.plan import Cut, LiveFlow, Row, plan
from agent.explain.reach import Group
from agent.explain.spans import in_words
from agent.explain.world import World

PASTED = Path("the manifest")
MOST_CUTS = 200


class UnreadableError(Exception):
    """The manifest cannot be read; the message says where and why."""


def rehearsed(world: World, text: str, flows: Iterable[LiveFlow]) -> dict[str, Any]:
    """What the manifest would do. Raises UnreadableError."""
    laid = laid_over(world.snapshot, _objects(text))
    found = plan(world, World(laid.snapshot, world.settings), laid.changed, flows)
    return {
        "changed": [f"{each.kind} {_key(each.key)}" for each in laid.changed],
        "sentences": [*found.sentences, *_unsaid(laid.unsaid)],
        "rows": [_row(row) for row in found.rows],
        "services": [
            {
                "service": "/".join(each.service),
                "port": each.port.port,
                "before": each.before,
                "after": each.after,
            }
            for each in found.services
        ],
        "cuts": [_cut(cut) for cut in found.cuts[:MOST_CUTS]],
        "cuts_total": len(found.cuts),
        "unusable": list(found.unusable),
        "closes": found.closes,
    }


def _objects(text: str) -> list[Object]:
    read = parse(PASTED, text.encode())
    if read.errors:
        raise UnreadableError("; ".join(map(str, read.errors)))
    objects = [item for _, item in read.found if not isinstance(item, Endpoints)]
    if not objects:
        raise UnreadableError("there is no NetworkPolicy, Pod, Service or Namespace in it")
    return objects


def _unsaid(namespaces: Iterable[str]) -> Iterator[str]:
    return (f"Namespace {name} does not exist: it would have to be made first" for name in namespaces)


def _key(key: str | tuple[str, str]) -> str:
    return key if isinstance(key, str) else "/".join(key)


def _row(row: Row) -> dict[str, Any]:
    return {
        "change": row.change,
        "sources": [_group(group) for group in row.sources],
        "targets": [_group(group) for group in row.targets],
        "ports": in_words(row.spans),
        "declared": [f"{protocol} {port}" for protocol, port in row.declared],
        "family": row.family,
    }


def _group(group: Group) -> dict[str, Any]:
    prefix = {"pods": "pod/", "nodes": "node/", "outside": ""}[group.kind]
    return {"kind": group.kind, "ids": [f"{prefix}{name}" for name in group.names]}


def _cut(cut: Cut) -> dict[str, Any]:
    flow = cut.flow
    return {
        "source": str(flow.source),
        "target": str(flow.destination),
        "protocol": flow.protocol.upper(),
        "port": flow.dport,
        "reason": cut.reason,
    }
