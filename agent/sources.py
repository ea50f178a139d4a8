"""Where cluster objects come from, and the agent reports to: the API server, or a directory of manifests."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from agent.cluster.client import ApiClient
from agent.cluster.credentials import credential_source
from agent.cluster.current import Current
from agent.cluster.errors import NotFound, Refused, Unreachable
from agent.cluster.manifests import ManifestSource
from agent.cluster.model import KINDS, Event, IPAddress, Kind, Pod, Service
from agent.cluster.values import object_name
from agent.cluster.watch import ApiSource
from agent.config import Config
from agent.files import replace
from agent.loadbalancer.leases import ApiLeases, FileLeases, Leases
from agent.log import printable
from agent.reports import Report

log = logging.getLogger(__name__)


class Source(Protocol):
    """What the agent needs of a cluster; `leases` are those that all its nodes share."""

    leases: Leases

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Deliver what there is and what becomes of it, until cancelled."""

    def problems(self) -> list[str]:
        """What is in the way of reading the cluster now."""

    def watches(self) -> list[dict[str, object]]:
        """How each kind's watch is doing, plain data; none where nothing is watched."""

    async def network_available(self, node: str) -> None:
        """Tell the cluster that Pods can be put on the node. Raises ApiError."""

    async def reach(self, namespace: str) -> None:
        """Return when every policy that a namespace has by now has been delivered. Raises ApiError."""

    async def find_pod(self, namespace: str, name: str) -> Pod | None:
        """Ask for a Pod; None when there is none. Raises ApiError."""

    async def tell(self, report: Report) -> None:
        """Make a Kubernetes Event of an object's problem. Raises ApiError, Conflict when there is one."""

    async def set_pod_addresses(self, pod: Pod, addresses: Iterable[IPAddress]) -> None:
        """Let the status of this very Pod say its addresses. Raises ApiError."""

    async def set_load_balancer(self, service: Service, addresses: Iterable[IPAddress]) -> None:
        """Let the Service's status say that it is reached at these addresses, none for nowhere.

        Raises ApiError, NotFound when the Service is gone.
        """

    def close(self) -> None:
        """Let go of what is held open."""


class ApiServer:
    """A real cluster, by its API server."""

    def __init__(self, client: ApiClient, kinds: Iterable[Kind]) -> None:
        self.leases: Leases = ApiLeases(client)
        self._client = client
        self._source = ApiSource(client, kinds)
        self._current = Current(client, self._source)

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """List, watch and deliver until cancelled."""
        await self._source.run(deliver)

    def problems(self) -> list[str]:
        """What the last attempt of each kind came to, those alike once."""
        return sorted({state.error for state in self._source.states.values() if state.error})

    def watches(self) -> list[dict[str, object]]:
        """Of each kind whether it was listed, seconds since the server's last word, and what is in the way.

        The server says something about once a minute also where nothing changes.
        """
        now = time.monotonic()
        return [
            {
                "kind": kind,
                "synced": state.synced,
                "heard_s": round(now - state.heard, 1) if state.heard else None,
                "version": state.version,
                "failures": state.failures,
                "refused": state.refused,
                "error": state.error,
            }
            for kind, state in self._source.states.items()
        ]

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

    async def reach(self, namespace: str) -> None:
        """Ask the API server what there is, and wait until the watches have brought it. Raises ApiError."""
        await self._current.reach(namespace)

    async def find_pod(self, namespace: str, name: str) -> Pod | None:
        """Ask the API server for a Pod; None when it has none. Raises ApiError."""
        try:
            pod = await asyncio.to_thread(self._client.get, "Pod", (namespace, name))
        except NotFound:
            return None
        return pod if isinstance(pod, Pod) else None

    async def tell(self, report: Report) -> None:
        """Make an Event; objects that are no kind of the API have none. Raises ApiError, Conflict."""
        if report.kind not in KINDS:
            return
        await asyncio.to_thread(
            self._client.create_event,
            report.kind,
            report.key,
            report.uid,
            reason=report.reason,
            note=printable(report.problem),
            action="Compile",
            event=report.event_name,
        )

    async def set_pod_addresses(self, pod: Pod, addresses: Iterable[IPAddress]) -> None:
        """Write the Pod's status. Raises ApiError, also when another Pod has its name by now."""
        ips = [{"ip": str(ip)} for ip in addresses]
        status = {"podIP": ips[0]["ip"], "podIPs": [{"$patch": "replace"}, *ips]}
        change = {"metadata": {"uid": pod.uid}, "status": status}
        await asyncio.to_thread(self._client.patch, "Pod", pod.key, change, "status")

    async def set_load_balancer(self, service: Service, addresses: Iterable[IPAddress]) -> None:
        """Write the Service's status. Raises ApiError, NotFound when the Service is gone."""
        change = {"status": {"loadBalancer": {"ingress": _ingress(addresses) or None}}}
        await asyncio.to_thread(self._client.patch, "Service", service.key, change, "status")

    def close(self) -> None:
        """Close idle connections."""
        self.leases.close()
        self._client.close()


class Manifests:
    """A directory of manifests, with Leases and statuses of Services in directories beside it."""

    def __init__(self, directory: Path) -> None:
        self.leases: Leases = FileLeases(directory.parent / "leases")
        self._statuses = directory.parent / "status"
        self._source = ManifestSource(directory, statuses=self._statuses)
        self._deliver: Callable[[Event], None] = lambda _: None

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Read, look again and deliver until cancelled."""
        self._deliver = deliver
        await self._source.run(deliver)

    def problems(self) -> list[str]:
        """Whether the directory is there; what cannot be read in it is logged, and the rest goes on."""
        directory = self._source.directory
        return [] if directory.is_dir() else [f"{directory}: there is no such directory"]

    def watches(self) -> list[dict[str, object]]:
        """There is none: the directory is looked at."""
        return []

    async def network_available(self, node: str) -> None:
        """There is no condition to set."""

    async def reach(self, namespace: str) -> None:
        """Look at the files now, so that what was written before the Pod is known."""
        await self._source.look(self._deliver)

    async def find_pod(self, namespace: str, name: str) -> Pod | None:
        """Look at the files now; None without it."""
        await self._source.look(self._deliver)
        pod = self._source.get("Pod", (namespace, name))
        return pod if isinstance(pod, Pod) else None

    async def tell(self, report: Report) -> None:
        """There is nothing that keeps Events; the log has it."""

    async def set_pod_addresses(self, pod: Pod, addresses: Iterable[IPAddress]) -> None:
        """Whoever writes the manifests writes the Pods' statuses."""

    async def set_load_balancer(self, service: Service, addresses: Iterable[IPAddress]) -> None:
        """Write the Service's status into a file. Raises Unreachable, Refused for an unusable name."""
        if not all(object_name(word) for word in service.key):
            raise Refused(f"Service {'/'.join(service.key)}: no file can have its name")
        namespace, name = service.key
        status = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": namespace, "name": name, "uid": service.uid},
            "status": {"loadBalancer": {"ingress": _ingress(addresses)}},
        }
        file = self._statuses / f"service_{namespace}_{name}.json"
        try:
            self._statuses.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(replace, file, json.dumps(status, indent=1).encode())
        except OSError as error:
            raise Unreachable(f"{file} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Nothing is held open."""


def _ingress(addresses: Iterable[IPAddress]) -> list[dict[str, str]]:
    return [{"ip": str(ip), "ipMode": "VIP"} for ip in addresses]


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
