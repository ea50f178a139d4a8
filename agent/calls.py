"""The calls that the agent's socket answers: the CNI commands, and what the command line asks.

cni.ADD   body + the namespace's descriptor --> Attachments.add    --> result, as the asked version writes it
cni.DEL, cni.CHECK, cni.GC, cni.STATUS                             --> nothing, or a CNI error
status                                                             --> what the agent says of itself
policies, denials, flows, follow                                   --> see `agent.asked`
trace.open, trace.send, trace.read, trace.close                    --> see `agent.trace`

An answer is plain data, and has no more than fits into a message on the socket, however long names are.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeAlias

from agent import metrics
from agent.pods.attachments import Attachments
from agent.pods.server import Handler
from cni import spec, wire
from cni.spec import AttachmentKey, CniError

Body: TypeAlias = Mapping[str, Any]
Answer: TypeAlias = Callable[[Body], Awaitable[object]]
"""Answers a call that comes without descriptors; raises CniError."""

ROOM = wire.LIMIT - 1024
"""Bytes for what is listed in one answer."""


class Room:
    """What is left of so many bytes for the items of an answer's list."""

    def __init__(self, size: int = ROOM) -> None:
        self._left = size

    def takes(self, item: Mapping[str, Any]) -> bool:
        """Whether the next item fits; after one that does not none does."""
        self._left -= len(json.dumps(item)) + 2
        return self._left >= 0


def listed(what: str, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of the items, as many as there is room for, and the number of all."""
    return {what: list(takewhile(Room().takes, items)), "total": len(items)}


def handlers(
    attachments: Attachments,
    status: Callable[[], Mapping[str, object]],
    questions: Mapping[str, Answer],
) -> Mapping[str, Handler]:
    """Each call's handler, by its name; `questions` are those that come without descriptors."""

    def handler(answer: Answer) -> Handler:
        async def answered(body: Body, fds: list[int]) -> object:
            return await answer(body)

        return answered

    async def add(body: Body, fds: list[int]) -> object:
        request = spec.from_body("cni.ADD", body)
        result = await attachments.add(request, _namespace(fds))
        return result.to_json(request.cni_version)

    async def delete(body: Body, fds: list[int]) -> object:
        request = spec.from_body("cni.DEL", body)
        await attachments.delete(AttachmentKey(request.container_id, request.ifname))
        return None

    async def check(body: Body, fds: list[int]) -> object:
        await attachments.check(spec.from_body("cni.CHECK", body), _namespace(fds))
        return None

    async def collect(body: Body, fds: list[int]) -> object:
        await attachments.collect(spec.from_body("cni.GC", body))
        return None

    async def ready(body: Body, fds: list[int]) -> object:
        spec.from_body("cni.STATUS", body)
        attachments.status()
        return None

    async def tell(body: Body, fds: list[int]) -> object:
        return status()

    return {
        "cni.ADD": add,
        "cni.DEL": delete,
        "cni.CHECK": check,
        "cni.GC": collect,
        "cni.STATUS": ready,
        "status": tell,
        **{name: handler(answer) for name, answer in questions.items()},
    }


def observe(call: str, seconds: float, code: int) -> None:
    """Count a call that was answered."""
    command = call.removeprefix("cni.")
    if command == call:
        return
    metrics.CNI_SECONDS.labels(command).observe(seconds)
    if code:
        metrics.CNI_ERRORS.labels(command, str(code)).inc()


def _namespace(fds: list[int]) -> int:
    if len(fds) != 1:
        raise CniError(
            spec.INVALID_ENVIRONMENT,
            f"one network namespace must come with the request, but {len(fds)} descriptors did",
        )
    return fds[0]
