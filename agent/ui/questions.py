"""What the page asks, answered by the same code as the commands.

    /api/state    everything that is drawn           agent.ui.live
    /api/why      source, target, port, protocol     as `podwall why`
    /api/matrix   namespace (of the targets)         as `podwall matrix`
    /api/plan     manifest (by POST)                 as `podwall plan`
    /api/policy   namespace, name                    agent.ui.drawing

A question is an object of texts; its answer is plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from agent.cli.connection import PROTOCOL_NAMES, as_address
from agent.cli.why import answer_json
from agent.cluster.model import NetworkPolicy, Pod, Protocol, Service
from agent.explain.ends import Meant, ends_named, port_of, takes_part
from agent.explain.groups import grouped
from agent.explain.matrix import Column, columns_of, matrix
from agent.explain.pairs import Questions
from agent.explain.plan import live_flows
from agent.explain.policy import selected_by
from agent.explain.question import CannotAnswerError, Question
from agent.explain.remedy import Change
from agent.explain.world import End, UnknownNameError, World, title
from agent.ui.drawing import drawing
from agent.ui.entities import on_pod_network, pod_id
from agent.ui.live import Live
from agent.ui.manifest import policy_document, written
from agent.ui.rehearsal import UnreadableError, rehearsed

Given = Mapping[str, str]
Answer = Callable[[Live, Given], Mapping[str, Any]]

MOST_CELLS = 250_000


class CannotBeAnsweredError(Exception):
    """The question is wrong or has no answer; the message is for the person who asked."""


def state(live: Live, given: Given) -> Mapping[str, Any]:
    """Everything that is drawn; nothing but the version when that is what the page has."""
    found = live.state()
    return {"version": found["version"]} if given.get("known") == found["version"] else found


def why_answer(live: Live, given: Given) -> Mapping[str, Any]:
    """The answer of `podwall why`, and the policies asked, to be drawn. Raises CannotBeAnsweredError."""
    looked = live.looked()
    source, target = (_ends(live, looked.world, given, field) for field in ("source", "target"))
    first = Question(
        source=source.ends[0],
        target=target.ends[0],
        port=_port(given.get("port", "")),
        protocol=_protocol(given.get("protocol", "tcp")),
        address=as_address(given["target"].strip()),
    )
    try:
        pairs = looked.asked(Questions(source, target, first))
    except CannotAnswerError as error:
        raise CannotBeAnsweredError(str(error)) from error
    question, answer = pairs.told
    nodes = looked.compared(answer.legs)
    return {
        **answer_json(pairs, nodes, looked.lines),
        "source": title(question.source),
        "target": title(question.target),
        "patches": [_patch(looked.world, change) for change in answer.changes],
        "policies": [
            drawing(looked.world, policy)
            for policy in _policies(looked.world, question.source, question.target)
        ],
    }


def policy_drawing(live: Live, given: Given) -> Mapping[str, Any]:
    """One policy's drawing. Raises CannotBeAnsweredError."""
    world = live.looked().world
    key = given.get("namespace", ""), given.get("name", "")
    if key not in world.snapshot.policies:
        raise CannotBeAnsweredError(f"there is no NetworkPolicy {'/'.join(key)}")
    return drawing(world, world.snapshot.policies[key])


def matrix_table(live: Live, given: Given) -> Mapping[str, Any]:
    """Who reaches whom on which declared port; alike Pods of a workload are one row, and one column.

    Raises CannotBeAnsweredError for more than `MOST_CELLS`.
    """
    world = live.looked().world
    pods = [pod for pod in on_pod_network(world.snapshot) if takes_part(pod)]
    namespace = given.get("namespace", "")
    columns = columns_of(pod for pod in pods if not namespace or pod.namespace == namespace)
    if len(pods) * len(columns) > MOST_CELLS:
        raise CannotBeAnsweredError(f"{len(pods)} Pods to {len(columns)} ports: choose a namespace")
    shown = grouped(matrix(world, pods, columns))
    return {
        "rows": [
            {"label": row.label, "pods": [pod_id(pods[of]) for of in row.members]} for row in shown.rows
        ],
        "columns": [
            {
                "label": f"{group.label} {ports}",
                "pods": sorted({_target(columns[of]) for of in group.members}),
                "ports": sorted({(columns[of].protocol, columns[of].port) for of in group.members}),
            }
            for group, ports in zip(shown.columns, shown.ports, strict=True)
        ],
        "cells": [list(row) for row in shown.cells],
    }


def rehearsal(live: Live, given: Given) -> Mapping[str, Any]:
    """What a manifest would do. Raises CannotBeAnsweredError."""
    world = live.looked().world
    flows = live_flows((each.node, each.raw) for each in live.flows()) if live.cluster.live else ()
    try:
        return rehearsed(world, given.get("manifest", ""), live.cluster.namespace, flows)
    except UnreadableError as error:
        raise CannotBeAnsweredError(str(error)) from error


GET: Mapping[str, Answer] = {
    "/api/state": state,
    "/api/why": why_answer,
    "/api/policy": policy_drawing,
    "/api/matrix": matrix_table,
}
POST: Mapping[str, Answer] = {"/api/plan": rehearsal}


def _ends(live: Live, world: World, given: Given, field: str) -> Meant:
    name = given.get(field, "").strip()
    if not name:
        raise CannotBeAnsweredError(f"{field}: a Pod, workload, Service, node or address is missing")
    try:
        return ends_named(world, name, live.cluster.namespace)
    except UnknownNameError as error:
        raise CannotBeAnsweredError(str(error)) from error


def _protocol(text: str) -> Protocol:
    if text.lower() not in PROTOCOL_NAMES:
        raise CannotBeAnsweredError(f"policies and Services know TCP, UDP and SCTP, not {text}")
    return PROTOCOL_NAMES[text.lower()]


def _port(text: str) -> int | str | None:
    try:
        return port_of(text) if text else None
    except UnknownNameError as error:
        raise CannotBeAnsweredError(str(error)) from error


def _target(column: Column) -> str:
    assert isinstance(column.target, Pod)  # columns_of makes no others
    return pod_id(column.target)


def _patch(world: World, change: Change) -> dict[str, str]:
    """A change in words, and the whole policy with it; "" where not all of the policy could be read."""
    policy = world.snapshot.policies.get(change.policy)
    if policy is None or policy.problems:
        return {"text": change.text(), "manifest": ""}
    return {"text": change.text(), "manifest": written(change.applied(policy_document(policy)))}


def _policies(world: World, source: End, target: End) -> list[NetworkPolicy]:
    """The policies that select the source outwards or the target, or a Service's Pods, inwards."""
    found = list(selected_by(world, "Egress", source)) if isinstance(source, Pod) else []
    for pod in _receivers(world, target):
        found += [policy for policy in selected_by(world, "Ingress", pod) if policy not in found]
    return found


def _receivers(world: World, target: End) -> list[Pod]:
    if isinstance(target, Pod):
        return [target]
    if not isinstance(target, Service) or not target.selector:
        return []
    wanted = target.selector.items()
    return [pod for pod in world.snapshot.pods_in(target.namespace).values() if wanted <= pod.labels.items()]
