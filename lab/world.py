"""The lab: nodes, agents and Pods on one machine, made from manifests, and found again by name.

    manifests --controllers--> /run/podwall-lab/cluster  <--watched-- agents, one per node
                     |
                     +--> container runtime --CNI binary--> agent: link, address, rules
                     +--> server: listens inside each Pod

    with Lab(nodes=2) as lab:
        lab.apply(manifests.read([Path("examples/hello")]))
        lab.connect("hello/web", lab.pod("data/db-0").address(6), 8080)     # "connected"

A lab outlives the process that made it: `Lab.attach()` finds it again. What a killed process left behind is
removed by the next `up`, or by `down`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from cni.freeze import FreezeError, kept
from lab import agents, matrix, names, netns, probe, processes, serving, state, underlay
from lab.agents import Agent
from lab.apply import Applier, Changes, PodsError
from lab.capture import Capture
from lab.controllers import LabNode
from lab.exposed import LabService, read_service
from lab.kubelet import Kubelet
from lab.manifests import ObjectDirectory
from lab.matrix import Expectation, Host, Matrix
from lab.names import LAB, RUN, Address, NodePlace, Place
from lab.nodes import node_labels, node_object
from lab.objects import Key, Object, key_of
from lab.pods import LabPod, read_pod
from lab.processes import LabError
from lab.runtime import Runtime
from lab.state import Settings

__all__ = ["Changes", "Lab", "LabError", "LabPod", "PodsError"]

OUTSIDE_PORTS = (8080, 9090)
OUTSIDE_WEB = 80
"""What the outside host listens on, TCP and UDP, under the name "outside"; the matrix tries the first two."""

POOLS = json.dumps([{"name": "lab", "addresses": names.BALANCED}])
"""What the agents give to Services of type LoadBalancer, unless flags say something else."""

Progress = Callable[[str, float | None], None]
"""Told what begins (no seconds yet), and the same text again with the seconds it took."""

T = TypeVar("T")


class Lab:
    """One lab. Entering it starts it when it is not up; leaving it removes it."""

    def __init__(
        self,
        nodes: int = 2,
        *,
        mode: str = "auto",
        routed: bool = False,
        flags: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        given: Iterable[Object] = (),
    ) -> None:
        """Describe a lab; routed: each node in a subnet of its own. flags are further settings of the agents.

        given are the objects with which it starts when it is entered.
        Raises LabError for a number of nodes or a mode that cannot be.
        """
        self._start_with = tuple(given)
        self._progress = progress or (lambda _text, _seconds: None)
        self._giving_up = False
        self._given = ObjectDirectory(RUN / "given", RUN / "scratch")
        self._cluster = ObjectDirectory(RUN / "cluster", RUN / "scratch")
        self._statuses = ObjectDirectory(RUN / "status", RUN / "scratch")
        self._compose(Settings(nodes, mode, routed, dict(flags or {})))

    @classmethod
    def attach(cls, progress: Progress | None = None) -> Self:
        """Return the lab that is up. Raises LabError when none is, or only a part of one."""
        settings = state.read_settings()
        if settings is None or not settings.complete:
            rest = ", only what is left of one (`podwall lab down` removes it)" if state.remains() else ""
            raise LabError(f"no lab is up{rest}; start one with `podwall lab up -f DIR`")
        lab = cls(settings.nodes, mode=settings.mode, routed=settings.routed, progress=progress)
        lab._compose(settings)
        return lab

    def __enter__(self) -> Self:
        if not self.settings.complete:
            try:
                self.up(self._start_with)
            except PodsError:
                self.down()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # Life

    def up(self, given: Iterable[Object] = ()) -> Changes:
        """Start the lab with these objects. Removes what a killed one left; removes everything when it fails.

        Raises LabError, ManifestError; PodsError when only Pods failed: the lab is up then.
        """
        objects = {key_of(item): item for item in given}
        self._applier.check(objects)
        with state.lock():
            before = state.read_settings()
            if before and before.complete:
                raise LabError(
                    "a lab is up already; `podwall lab apply` changes it, `podwall lab down` removes it"
                )
            if state.remains():
                self._step("what a killed lab left is removed", state.remove)
            try:
                self._start()
                return self._apply(objects)
            except PodsError:
                raise
            except BaseException:
                self._remove()
                raise

    def apply(self, given: Iterable[Object], *, prune: bool = False) -> Changes:
        """Add or change objects; prune: and remove all that are not among these.

        Raises ManifestError before anything is changed; PodsError when only Pods failed.
        """
        objects = {key_of(item): item for item in given}
        with state.lock():
            return self._apply(objects if prune else {**self._given.read(), **objects})

    def delete(self, keys: Iterable[Key]) -> Changes:
        """Remove objects that were given; one that was not is ignored. Raises as apply does."""
        gone = set(keys)
        with state.lock():
            return self._apply({key: item for key, item in self._given.read().items() if key not in gone})

    def down(self) -> None:
        """Remove the lab, whatever state it is in."""
        with state.lock():
            self._step("the lab is removed", self._remove)

    def add_node(self) -> NodePlace:
        """Add a node, with the next number, and wait until it takes Pods. Raises LabError."""
        with state.lock():
            settings = dataclasses.replace(self.settings, nodes=self.settings.nodes + 1)
            place = names.node(settings.nodes, routed=settings.routed)
            underlay.add_node(place)
            self._cluster.write(node_object(place))
            state.write_settings(settings)
            self._compose(settings)
            self.agents[place.name].start()
        self.wait_until_ready()
        return place

    def remove_node(self) -> Changes:
        """Remove the last node as if it had died; its Pods are made anew elsewhere. Raises as apply does."""
        with state.lock():
            place = self.nodes[-1]
            lost = [key for key, item in self._cluster.read().items() if _is_on(item, place.name)]
            boxes = [box.netns for box in self.runtimes[place.name].sandboxes()]
            state.remove_namespaces([place.netns, *boxes])
            for key in [*lost, Key("Node", "", place.name)]:
                self._cluster.remove(key)
            shutil.rmtree(place.directory)
            settings = dataclasses.replace(self.settings, nodes=self.settings.nodes - 1)
            state.write_settings(settings)
            self._compose(settings)
            return self._apply(self._given.read())

    def unplug(self, node: str) -> None:
        """Pull a node's cable out of the underlay; its agent and its Pods go on. Raises LabError."""
        underlay.set_uplink(self.node(node), "down")

    def plug(self, node: str) -> None:
        """Put a node's cable back. Raises LabError."""
        underlay.set_uplink(self.node(node), "up")

    def set_ready(self, name: str, ready: bool) -> None:
        """Let a Pod's readiness fail or succeed; EndpointSlices follow. Raises LabError."""
        self._change_pod(name, lambda item: self._kubelet.set_ready(item, ready))

    def begin_to_end(self, name: str) -> None:
        """Let a Pod be terminating, and go on meanwhile; the next apply ends it. Raises LabError."""
        self._change_pod(name, self._kubelet.begin_to_end)

    def wait_until_ready(self, seconds: float = agents.READY_LIMIT) -> None:
        """Wait until every agent takes Pods. Raises LabError with the end of an agent's log."""
        agents.wait_until_ready(self.agents.values(), seconds)

    # What is there

    def pods(self) -> tuple[LabPod, ...]:
        """Return all Pods, by namespace and name."""
        found = [item for key, item in sorted(self._cluster.read().items()) if key.kind == "Pod"]
        boxes = {(box.namespace, box.pod): box for node in self.runtimes.values() for box in node.sandboxes()}
        return tuple(read_pod(item, boxes, self.runtimes) for item in found)

    def pod(self, name: str) -> LabPod:
        """Return a Pod by "namespace/name" or "name" (namespace default).

        The name of a Deployment or another owner stands for its first Pod. Raises LabError.
        """
        namespace, _, pod = name.rpartition("/")
        namespace = namespace or "default"
        inside = [found for found in self.pods() if found.namespace == namespace]
        chosen = [found for found in inside if found.name == pod]
        chosen = chosen or [found for found in inside if found.name.startswith(f"{pod}-")]
        if not chosen:
            known = ", ".join(found.full_name for found in self.pods()) or "none"
            raise LabError(f"there is no Pod {namespace}/{pod}; there are: {known}")
        return chosen[0]

    def services(self) -> tuple[LabService, ...]:
        """Return all Services, by namespace and name."""
        statuses = self._statuses.read()
        found = sorted((key, item) for key, item in self.objects().items() if key.kind == "Service")
        return tuple(read_service(item, statuses.get(key)) for key, item in found)

    def service(self, name: str) -> LabService:
        """Return a Service by "namespace/name" or "name" (namespace default). Raises LabError."""
        full_name = name if "/" in name else f"default/{name}"
        services = self.services()
        for found in services:
            if found.full_name == full_name:
                return found
        known = ", ".join(found.full_name for found in services) or "none"
        raise LabError(f"there is no Service {full_name}; there are: {known}")

    def node(self, name: str) -> NodePlace:
        """Return a node by its name. Raises LabError."""
        for place in self.nodes:
            if place.name == name:
                return place
        raise LabError(f"there is no node {name}; there are: {', '.join(place.name for place in self.nodes)}")

    @property
    def outside(self) -> Place:
        """The host outside the cluster."""
        return names.outside()

    def objects(self) -> dict[Key, Object]:
        """Return the cluster's objects, as the agents see them."""
        return self._cluster.read()

    def netns(self, name: str) -> Path:
        """Return the network namespace of "node1", "outside", "underlay" or a Pod. Raises LabError."""
        if name in {"outside", "underlay", *self.runtimes}:
            return netns.path(f"{LAB}-{name}")
        pod = self.pod(name)
        if not pod.addresses:
            raise LabError(f"Pod {pod.full_name} is {pod.phase}: {pod.message or 'it has no network yet'}")
        return pod.netns

    # What can be done in it

    def connect(self, source: str, address: Address | str, port: int, protocol: str = probe.TCP) -> str:
        """Try one connection from a Pod, a node or "outside".

        Returns "connected", "refused", "unreachable" or "silent" (after a second).
        """
        return self.probe(source, address, port, protocol).verdict

    def ask(
        self,
        source: str,
        address: Address | str,
        port: int,
        protocol: str = probe.TCP,
        *,
        times: int = 1,
        own: Address | str | None = None,
        quiet: float = probe.QUIET,
    ) -> list[probe.Outcome]:
        """Connect so many times at once, from an own address if given; read them with probe.read_answer."""
        target, bound = ip_address(str(address)), ip_address(str(own)) if own else None
        asked = probe.Probe(self.netns(source), target, port, protocol, bound, b"all")
        return probe.run([asked] * times, quiet)

    def probe(
        self, source: str, address: Address | str, port: int, protocol: str = probe.TCP, ask: str = "name"
    ) -> probe.Outcome:
        """Like connect, with the answer: who answered, or with ask="peer" who asked, as seen there."""
        target = ip_address(str(address))
        return probe.run([probe.Probe(self.netns(source), target, port, protocol, ask=ask.encode())])[0]

    def matrix(self, expected: Expectation = matrix.everything) -> Matrix:
        """Connect every running Pod and every node to every running Pod and the outside, on all ports."""
        running = [pod for pod in self.pods() if pod.addresses and pod.phase == "Running"]
        pods = [_host(pod) for pod in running]
        asked = [pod for pod in pods if pod.ports]
        only_asking = [pod for pod in pods if not pod.ports]
        nodes = [Host(place.name, netns.path(place.netns), place.addresses) for place in self.nodes]
        beyond = Host("outside", netns.path(names.OUTSIDE), self.outside.addresses, OUTSIDE_PORTS)
        sources, targets = (*asked, *only_asking, *nodes), (*asked, beyond)
        trials = tuple(matrix.trials(sources, targets, expected))
        began = time.monotonic()
        outcomes = probe.run([trial.probe for trial in trials])
        seconds = time.monotonic() - began
        results = tuple(
            matrix.Result(trial, outcome) for trial, outcome in zip(trials, outcomes, strict=True)
        )
        return Matrix(sources, targets, results, seconds)

    def run(
        self, source: str, arguments: Sequence[str], *, seconds: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the network of a Pod, a node or "outside" and return what it said."""
        return netns.run(
            self.netns(source),
            subprocess.run,
            arguments,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def socket(self, source: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Open a socket in the network of a Pod, a node or "outside"."""
        return netns.run(self.netns(source), socket.socket, family, kind, protocol)

    def capture(self, source: str, link: str = underlay.UPLINK, *, incoming_only: bool = False) -> Capture:
        """Listen to all frames of a link, which is also a way to send any frame there."""
        return Capture(self.netns(source), link, incoming_only=incoming_only)

    # How it is made

    def _compose(self, settings: Settings) -> None:
        self.settings = settings
        numbers = range(1, settings.nodes + 1)
        self.nodes = tuple(names.node(number, routed=settings.routed) for number in numbers)
        self.runtimes = {
            place.name: Runtime(place, settings.plugin, lambda: self._giving_up) for place in self.nodes
        }
        flags = {"mode": settings.mode, "load-balancer-pools": POOLS, **settings.flags}
        self.agents = {place.name: Agent(place, self.runtimes[place.name], flags) for place in self.nodes}
        self._kubelet = Kubelet(self.runtimes, self._cluster)
        lab_nodes = [LabNode(place.name, node_labels(place)) for place in self.nodes]
        self._applier = Applier(lab_nodes, self._cluster, self._given)

    def _start(self) -> None:
        self._giving_up = False
        RUN.mkdir(mode=0o700)
        for directory in ("given", "cluster", "scratch"):
            (RUN / directory).mkdir()
        state.write_settings(self.settings)
        shape = "each in a subnet of its own" if self.settings.routed else "on one link"
        self._step(f"{len(self.nodes)} nodes, {shape}", underlay.build, self.nodes, names.outside())
        for place in self.nodes:
            self._cluster.write(node_object(place))
        with ThreadPoolExecutor(1, thread_name_prefix="podwall-lab-plugin") as pool:
            plugin = pool.submit(_find_plugin, self._progress)
            for agent in self.agents.values():
                agent.start()
            self._start_server()
            command = self._step("the CNI binary", plugin.result)
            self._compose(dataclasses.replace(self.settings, plugin=command))
        self._step("agents", agents.wait_until_ready, self.agents.values())
        self._compose(dataclasses.replace(self.settings, complete=True))
        state.write_settings(self.settings)

    def _start_server(self) -> None:
        serving.start(netns.path(names.OUTSIDE))
        serving.serve("outside", netns.path(names.OUTSIDE), (*OUTSIDE_PORTS, OUTSIDE_WEB))

    def _apply(self, objects: Mapping[Key, Object]) -> Changes:
        return self._step("objects and Pods", self._applier.apply, objects, self._kubelet, self._cancel)

    def _change_pod(self, name: str, change: Callable[[Object], None]) -> None:
        found = self.pod(name)
        with state.lock():
            change(self._cluster.read()[Key("Pod", found.namespace, found.name)])
            self._applier.write_slices(self._given.read())

    def _cancel(self) -> None:
        """Make what other threads wait for fail at once: without agents nothing is answered."""
        self._giving_up = True
        processes.stop_in(state.namespaces(), 0.0)

    def _remove(self) -> None:
        self._giving_up = True
        try:
            self._remove_all()
        except KeyboardInterrupt:
            self._remove_all()
            raise
        self.settings = dataclasses.replace(self.settings, complete=False)

    def _remove_all(self) -> None:
        """Remove the lab, and what an interrupted thread was just making of it."""
        processes.stop_in(state.namespaces())
        netns.wait_for_threads()
        state.remove()

    def _step(self, text: str, function: Callable[..., T], *arguments: object) -> T:
        began = time.monotonic()
        self._progress(text, None)
        result = function(*arguments)
        self._progress(text, time.monotonic() - began)
        return result


def _find_plugin(progress: Progress) -> tuple[str, ...]:
    """Return the command of the CNI plugin: the frozen binary, built when this is the first time.

    It runs from where it is kept: Debian mounts /run without permission to execute what lies there.
    """
    if given := os.environ.get("PODWALL_CNI"):
        return (given,)
    cache = os.environ.get("PODWALL_CACHE")
    try:
        binary = kept(Path(cache) if cache else Path.home() / ".cache" / "podwall")
    except FreezeError as error:
        progress(f"the CNI plugin runs as python -m cni, since its binary cannot be built: {error}", 0.0)
        return (sys.executable, "-m", "cni")
    return (str(binary),)


def _host(pod: LabPod) -> Host:
    sctp = pod.sctp_ports if pod.sctp_ports and probe.has_sctp() else ()
    return Host(pod.full_name, pod.netns, pod.addresses, pod.ports, pod.node, sctp)


def _is_on(item: Object, node: str) -> bool:
    return bool(item["kind"] == "Pod" and item["spec"].get("nodeName") == node)
