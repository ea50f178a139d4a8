"""Where cluster objects come from, and the agent reports to: the API server, or a directory of manifests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from agent.cluster.client import ApiClient
from agent.cluster.credentials import credential_source
from agent.cluster.manifests import ManifestSource
from agent.cluster.model import Event, Kind
from agent.cluster.watch import ApiSource
from agent.config import Config

log = logging.getLogger(__name__)


class Source(Protocol):
    """What the agent needs of a cluster."""

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Deliver what there is and what becomes of it, until cancelled."""

    async def network_available(self, node: str) -> None:
        """Tell the cluster that Pods can be put on the node. Raises ApiError."""

    def close(self) -> None:
        """Let go of what is held open."""


class ApiServer:
    """A real cluster, by its API server."""

    def __init__(self, client: ApiClient, kinds: Iterable[Kind]) -> None:
        self._client = client
        self._source = ApiSource(client, kinds)

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """List, watch and deliver until cancelled."""
        await self._source.run(deliver)

    async def network_available(self, node: str) -> None:
        """Set the Node's condition NetworkUnavailable to False. Raises ApiError."""
        await asyncio.to_thread(
            self._client.set_node_condition,
            node,
            "NetworkUnavailable",
            False,
            "PodwallReady",
            "podwall's links, routes and rules are in place",
        )
        log.info("event=node-condition node=%s condition=NetworkUnavailable status=False", node)

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()


class Manifests:
    """A directory of manifests; nobody there reads what the agent reports."""

    def __init__(self, directory: Path) -> None:
        self._source = ManifestSource(directory)

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Read, look again and deliver until cancelled."""
        await self._source.run(deliver)

    async def network_available(self, node: str) -> None:
        """There is no condition to set."""

    def close(self) -> None:
        """Nothing is held open."""


def source_of(config: Config, kinds: Iterable[Kind]) -> Source:
    """The source that the configuration names."""
    if config.cluster != "api":
        return Manifests(Path(config.cluster.removeprefix("manifests:")))
    credentials = credential_source(
        kubeconfig=config.kubeconfig,
        api_server=config.api_server,
        kubelet_kubeconfig=config.kubelet_kubeconfig,
    )
    return ApiServer(ApiClient(credentials), kinds)
