"""Who serves Services in a benchmark: podwall or kube-proxy in one of its modes, each on its own node."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from stage import objects
from stage.api import Object, ScriptedApi
from stage.kube_proxy import KubeProxy, Mode
from stage.node import Node, Use, use

from lab.names import NodePlace
from lab.netns import path

PODWALL = "podwall"
MODES: dict[str, Mode] = {"kube-proxy nftables": "nftables", "kube-proxy iptables": "iptables"}
PEERS = (PODWALL, *MODES)
MOST = {"kube-proxy nftables": 10_000, "kube-proxy iptables": 1000}
"""With how many Services a peer is measured at most: more take it minutes (nft 1.0.6, iptables 1.8.9)."""


class Peer(Protocol):
    """What serves the Services of one node."""

    api: ScriptedApi

    @property
    def log(self) -> Path:
        """What it says."""

    def start(self) -> None:
        """Start it; does not wait for its rules."""

    def stop(self) -> None:
        """End it; its rules stay."""

    def use(self) -> Use:
        """What it has used so far, all its processes together."""


class Podwall:
    """podwall's agent and its worker."""

    def __init__(self, place: NodePlace, cluster: Iterable[Object]) -> None:
        self.node = Node(place, cluster, {"services": "on"})
        self.api = self.node.api
        self.log = self.node.agent.log

    def start(self) -> None:
        """Start the agent; does not wait for its rules."""
        self.node.agent.start()

    def stop(self) -> None:
        """End it; its rules stay."""
        self.node.stop()

    def use(self) -> Use:
        """What both processes have used so far."""
        uses = self.node.use().values()
        return Use(
            sum(each.cpu_ms for each in uses),
            sum(each.memory_mb for each in uses),
            sum(each.most_mb for each in uses),
        )


class Proxy:
    """kube-proxy; what the programs use that it starts for each change is not counted as its memory."""

    def __init__(self, place: NodePlace, mode: Mode, cluster: Iterable[Object]) -> None:
        self.api = ScriptedApi(path(place.netns))
        self.api.load(cluster)
        self._proxy = KubeProxy(place, mode)
        self.log = self._proxy.log

    def start(self) -> None:
        """Start it; does not wait for its rules."""
        self._proxy.start()

    def stop(self) -> None:
        """End it; its rules stay."""
        self._proxy.stop()

    def use(self) -> Use:
        """What it has used so far."""
        return use(self._proxy.pid)


def peer(name: str, place: NodePlace, services: int) -> Peer:
    """A peer on this node, in a cluster of so many Services."""
    cluster = (*objects.nodes(place, 1), *objects.namespaces(), *objects.services(services))
    return Podwall(place, cluster) if name == PODWALL else Proxy(place, MODES[name], cluster)


def packed(address: str) -> bytes:
    """An address as netlink messages hold it."""
    return ip_address(address).packed
