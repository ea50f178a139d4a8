"""Whether all that an API server knows of a namespace has been delivered, asked when a Pod is added.

    ADD --> newest version of the namespace's policies, and of the Namespace --> has the watch got there?
              (asked now, past every cache that may lag)                          no: wait for it

A policy and a Pod may be created in the same instant, and each kind has a watch of its own: the Pod's may be
faster. What the server shows when it is asked after ADD began includes every policy that was there when the
Pod's sandbox was made; once the watches have delivered up to those versions, nothing of that is missing. What
was deleted meanwhile is not waited for: at worst the Pod is isolated a moment longer.

Those who ask for one namespace while it is being asked share the next question, so fifty Pods that start at
once cost two questions. No answer means no Pod: ADD fails, and kubelet tries again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TypeAlias

from .client import ApiClient
from .errors import NotFound
from .model import Kind
from .watch import ApiSource

Versions: TypeAlias = dict[Kind, int]


class Current:
    """Asks `client`, and waits for what `source` delivers."""

    def __init__(self, client: ApiClient, source: ApiSource) -> None:
        self._client = client
        self._source = source
        self._asking: dict[str, asyncio.Task[Versions]] = {}
        self._next: dict[str, asyncio.Task[Versions]] = {}

    async def reach(self, namespace: str) -> None:
        """Return when all that a namespace has by now has been delivered. Raises ApiError."""
        if namespace not in self._next:
            self._next[namespace] = task = asyncio.create_task(self._ask_next(namespace))
            task.add_done_callback(_noticed)
        for kind, version in (await asyncio.shield(self._next[namespace])).items():
            await self._source.reach(kind, version)

    async def _ask_next(self, namespace: str) -> Versions:
        """Wait for the question under way, which was too early, and ask for all who came since."""
        if before := self._asking.get(namespace):
            await asyncio.wait([before])
        self._asking[namespace] = own = self._next.pop(namespace)
        try:
            return await asyncio.to_thread(self._ask, namespace)
        finally:
            if self._asking[namespace] is own:
                del self._asking[namespace]

    def _ask(self, namespace: str) -> Versions:
        versions: Versions = {"NetworkPolicy": self._client.newest("NetworkPolicy", namespace)}
        with suppress(NotFound):
            versions["Namespace"] = self._client.version_of("Namespace", namespace)
        return versions


def _noticed(task: asyncio.Task[Versions]) -> None:
    """Whoever waited has been told; there may be nobody left who waits."""
    if not task.cancelled():
        task.exception()
