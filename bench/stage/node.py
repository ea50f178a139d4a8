"""A node with the real agent behind a scripted API server, and Pods wired by the real CNI binary.

scripted API server --127.0.0.1:8001--> agent --> nf_tables, links, routes of the node's namespace
CNI binary --socket--> agent            each Pod a namespace
"""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stage import objects
from stage.api import URL, Object, ScriptedApi

from cni.freeze import kept
from lab import names, netns, processes, underlay
from lab.agents import Agent
from lab.names import NodePlace
from lab.runtime import Runtime, Sandbox

READY_S = 60.0
PARALLEL = 4


@dataclass(frozen=True, slots=True)
class Use:
    """What a process has used: CPU time in milliseconds, memory now and at most in MB (10^6 bytes)."""

    cpu_ms: float
    memory_mb: float
    most_mb: float


def places() -> Iterator[NodePlace]:
    """Nodes on one link, each made when it is asked for; the sandbox removes them."""
    underlay.build((), names.outside())
    for number in range(1, names.MAX_NODES + 1):
        place = names.node(number)
        underlay.add_node(place)
        yield place


class Node:
    """One node that is measured."""

    def __init__(
        self, place: NodePlace, cluster: Iterable[Object], flags: Mapping[str, str] | None = None
    ) -> None:
        """The cluster's objects include the Node itself; flags are further settings of the agent."""
        cache = os.environ.get("PODWALL_CACHE")
        binary = kept(Path(cache) if cache else Path.home() / ".cache" / "podwall")
        self.place = place
        self.path = netns.path(place.netns)
        self.api = ScriptedApi(self.path)
        self.api.load(cluster)
        self.runtime = Runtime(place, (str(binary),), lambda: False)
        settings = {"cluster": "api", "api-server": URL, "address-rest-s": "0", **(flags or {})}
        self.agent = Agent(place, self.runtime, settings)

    def start(self) -> float:
        """Start the agent and wait until nothing is in the way of Pods; return the seconds that took."""
        begun = time.perf_counter()
        self.agent.start()
        while not self.ready():
            if time.perf_counter() > begun + READY_S or not self.agent.alive:
                raise processes.LabError(f"the agent is not ready:\n{self.agent.last_lines()}")
            time.sleep(0.002)
        return time.perf_counter() - begun

    def stop(self, *, kill: bool = False) -> None:
        """End the agent; what it did stays."""
        self.agent.stop(kill=kill)

    def ready(self) -> bool:
        """Whether /readyz says so."""
        connection = http.client.HTTPConnection("127.0.0.1", 9619, timeout=5)
        try:
            return netns.run(self.path, _status, connection) == 200
        except OSError:
            return False
        finally:
            connection.close()

    def attach(self, pods: Sequence[Object]) -> list[Sandbox]:
        """Let the cluster have these Pods, call ADD for each and write their addresses into the cluster."""
        for each in pods:
            self.api.put(each)
        with ThreadPoolExecutor(PARALLEL) as pool:
            boxes = list(pool.map(self._add, pods))
        for each, box in zip(pods, boxes, strict=True):
            meta = each["metadata"]
            addresses = [str(address) for address in box.addresses]
            labels = meta.get("labels", {})
            self.api.put(objects.pod(meta["namespace"], meta["name"], self.place.name, labels, *addresses))
        return boxes

    def _add(self, pod: Object) -> Sandbox:
        meta = pod["metadata"]
        name = f"{self.place.name}-{meta['namespace']}-{meta['name']}"
        return self.runtime.run(name, pod)

    def processes(self) -> dict[str, int]:
        """The agent and its nftables worker."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if netns.identity(entry / "ns/net") == netns.identity(self.path):
                    words = (entry / "cmdline").read_bytes()
                    if b"agent.main" in words:
                        found["agent"] = int(entry.name)
                    elif b"worker.py" in words:
                        found["worker"] = int(entry.name)
        return found

    def use(self) -> dict[str, Use]:
        """What the agent and its worker have used so far."""
        return {name: use(process) for name, process in self.processes().items()}


def use(process: int) -> Use:
    """What a process has used so far, CPU time with that of the programs that it started and that ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    children = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime: proc(5)
    seconds = time.clock_gettime(_cpu_clock(process)) + children
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    now, most = (next(line for line in status if line.startswith(name)) for name in ("VmRSS:", "VmHWM:"))
    return Use(seconds * 1e3, int(now.split()[1]) * 1024 / 1e6, int(most.split()[1]) * 1024 / 1e6)


def _cpu_clock(process: int) -> int:
    """The id of a process' CPU clock, of nanoseconds where /proc has ticks: clock_getcpuclockid(3)."""
    return ~process << 3 | 2


def _status(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/readyz")
    return connection.getresponse().status
