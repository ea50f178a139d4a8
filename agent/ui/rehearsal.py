"""A change rehearsed for the page: the manifest that was pasted, laid over the cluster as it is. Pure.

    manifest --read--> change --applied--> the cluster after it --plan--> what opens, closes, ends

The same core as `podwall plan`; ids instead of names, so that the answer can be drawn into the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent.cluster.documents import parse
from agent.cluster.model import titled
from agent.explain.change import Change, applied, change_of
from agent.explain.plan import Cut, LiveFlow, Row, plan
from agent.explain.reach import Group
from agent.explain.spans import in_words
from agent.explain.world import World

PASTED = Path("the manifest")
MOST_CUTS = 200


class UnreadableError(Exception):
    """The manifest cannot be read; the message says where and why."""


def rehearsed(world: World, text: str, namespace: str, flows: Iterable[LiveFlow]) -> dict[str, Any]:
    """What the manifest would do; what says no namespace is of this one. Raises UnreadableError."""
    laid, notes = applied(world.snapshot, _change(text, namespace))
    found = plan(world, World(laid.snapshot, world.settings), laid.changed, flows)
    return {
        "changed": [titled(each.kind, each.key) for each in laid.changed],
        "sentences": list(found.sentences),
        "notes": list(notes),
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


def _change(text: str, namespace: str) -> Change:
    read = parse(PASTED, text.encode())
    change = change_of(read.documents, namespace)
    if errors := read.errors or change.errors:
        raise UnreadableError("; ".join(map(str, errors)))
    if not change.objects and not change.templates:
        raise UnreadableError(
            "there is no NetworkPolicy, Pod, Service or Namespace in it, and no workload with Pods"
        )
    return change


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
