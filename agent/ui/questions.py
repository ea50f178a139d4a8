"""What the page asks, answered by the same code as the commands: `why`, a policy's drawing.

/api/state    everything that is drawn                      Live
/api/why      source, target, port, protocol, family        agent.explain.way, as `podwall why`
/api/policy   namespace, name                               agent.ui.drawing
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from agent.cli.why import answer_json, as_address
from agent.cluster.model import NetworkPolicy, Pod, Protocol
from agent.explain.policy import isolated_by
from agent.explain.question import CannotAnswerError, Question
from agent.explain.way import why
from agent.explain.world import End, UnknownNameError, World, title
from agent.ui.drawing import drawing
from agent.ui.live import Live

Given = Mapping[str, str]
Answer = Callable[[Live, Given], Mapping[str, Any]]

_PROTOCOLS: Mapping[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}


class CannotBeAnsweredError(Exception):
    """The question is wrong or has no answer; the message is for the person who asked."""


def state(live: Live, given: Given) -> Mapping[str, Any]:
    """Everything that is drawn; nothing but the version when that is what the page has."""
    found = live.state()
    return {"version": found["version"]} if given.get("known") == found["version"] else found


def why_answer(live: Live, given: Given) -> Mapping[str, Any]:
    """The answer of `podwall why`, and the policies asked, to be drawn. Raises CannotBeAnsweredError."""
    world = live.world()
    source, target = _end(live, world, given, "source"), _end(live, world, given, "target")
    protocol = _PROTOCOLS.get(given.get("protocol", "tcp").lower())
    if protocol is None:
        raise CannotBeAnsweredError("policies and Services know TCP, UDP and SCTP only")
    question = Question(
        source=source,
        target=target,
        port=_port(given.get("port", "")),
        protocol=protocol,
        address=as_address(given["target"]),
    )
    try:
        answer = why(world, question)
    except CannotAnswerError as error:
        raise CannotBeAnsweredError(str(error)) from error
    changes = [{"field": change.field, "text": change.text()} for change in answer.changes]
    return {
        **answer_json(answer),
        "source": title(source),
        "target": title(target),
        "patches": changes,
        "policies": [drawing(world, policy) for policy in _policies(world, source, target)],
    }


def policy_drawing(live: Live, given: Given) -> Mapping[str, Any]:
    """One policy's drawing. Raises CannotBeAnsweredError."""
    world = live.world()
    key = given.get("namespace", ""), given.get("name", "")
    if key not in world.snapshot.policies:
        raise CannotBeAnsweredError(f"there is no NetworkPolicy {'/'.join(key)}")
    return drawing(world, world.snapshot.policies[key])


GET: Mapping[str, Answer] = {"/api/state": state, "/api/why": why_answer, "/api/policy": policy_drawing}
POST: Mapping[str, Answer] = {}


def _end(live: Live, world: World, given: Given, field: str) -> End:
    name = given.get(field, "").strip()
    if not name:
        raise CannotBeAnsweredError(f"{field}: a Pod, Service, node or address is missing")
    try:
        return world.named(name, live.cluster.namespace)
    except UnknownNameError as error:
        raise CannotBeAnsweredError(str(error)) from error


def _port(text: str) -> int | str | None:
    if not text.isdecimal():
        return text or None
    if not 1 <= int(text) <= 65535:
        raise CannotBeAnsweredError(f"port {text} is not from 1 to 65535")
    return int(text)


def _policies(world: World, source: End, target: End) -> list[NetworkPolicy]:
    """The policies that isolate the source outwards or the target inwards, or a Service's Pods."""
    found = list(isolated_by(world, "Egress", source)) if isinstance(source, Pod) else []
    for pod in _receivers(world, target):
        found += [policy for policy in isolated_by(world, "Ingress", pod) if policy not in found]
    return found


def _receivers(world: World, target: End) -> list[Pod]:
    if isinstance(target, Pod):
        return [target]
    selector = getattr(target, "selector", None)
    if not selector:
        return []
    pods = world.snapshot.pods_in(target.namespace).values()  # type: ignore[union-attr]  # Services alone select
    return [pod for pod in pods if selector.items() <= pod.labels.items()]
