"""One node with the whole agent and the real CNI binary, in namespaces of its own, for tests to spoil.

podwall-t.. node: eth0 172.31.0.11, fd31::11  -- veth --  eth0 172.31.0.1, fd31::1  podwall-t.. lan
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

from cni.freeze import freeze
from lab import netns, processes
from lab.agents import Agent
from lab.names import NodePlace
from lab.processes import until
from lab.runtime import PluginError, Runtime, Sandbox
from tests.linux import command

NAME = "node1"
CIDRS = ("10.244.1.0/24", "fd00:10:244:1::/64")
ADDRESSES = ("172.31.0.11", "fd31::11")
LINK = re.compile(r"podwall[0-9a-f]{8}|podwalli[0-9a-f]{7}")
LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Place(NodePlace):
    """The node, with its files where the test wants them."""

    home: Path

    @property
    def directory(self) -> Path:
        return self.home


class Program(Agent):
    """The agent, by another Python where a test asks for it."""

    python = sys.executable
    environment: Mapping[str, str] = {}

    def _arguments(self) -> list[str]:
        return [
            "env",
            *(f"{name}={value}" for name, value in self.environment.items()),
            self.python,
            *super()._arguments()[1:],
        ]


@dataclass
class Node:
    """The node; settings of the agent by their names may be changed before `start`."""

    home: Path
    flags: dict[str, str] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        prefix = f"podwall-t{os.getpid()}-{self.home.name[-4:]}"
        self.netns, self.lan = f"{prefix}-node", f"{prefix}-lan"
        self._prefix = prefix
        self.cluster = self.home / "cluster"
        self.flags["cluster"] = f"manifests:{self.cluster}"
        self.boxes: list[Sandbox] = []
        binary = self.home / "podwall"
        cache = os.environ.get("PODWALL_CACHE")
        freeze(binary, Path(cache) if cache else Path.home() / ".cache" / "podwall")
        interfaces = tuple(
            ip_interface(f"{address}/{length}") for address, length in zip(ADDRESSES, (24, 64), strict=True)
        )
        place = Place(NAME, self.netns, "", interfaces, (), 1, tuple(map(ip_network, CIDRS)), self.home)
        self.runtime = Runtime(place, (str(binary),), lambda: True)
        self.place = place
        self.agent = Program(place, self.runtime, self.flags)

    # The world around

    def build(self) -> None:
        self.cluster.mkdir()
        for name in (self.netns, self.lan):
            netns.create(name)
        command(
            "ip",
            "-batch",
            "-",
            data=f"""link add eth0 netns {self.netns} type veth peer name eth0 netns {self.lan}""",
        )
        for name, number in ((self.netns, 11), (self.lan, 1)):
            command(
                "ip",
                "-n",
                name,
                "-batch",
                "-",
                data=f"""addr add 172.31.0.{number}/24 dev eth0
                addr add fd31::{number}/64 dev eth0 nodad
                link set eth0 up""",
            )
        command("ip", "-n", self.netns, "route", "add", "default", "via", "172.31.0.1")
        self.write_node()

    def remove(self) -> None:
        processes.stop_in([netns.path(self.netns)], 0.0)
        for name in list(netns.names(self._prefix)):
            netns.remove(name)
        command("sh", "-c", f"while mountpoint -q {self.home}/state; do umount {self.home}/state; done")
        shutil.rmtree(self.home)

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Put a manifest into the cluster's directory, whole."""
        text = content if isinstance(content, str) else json.dumps(content)
        scratch = self.home / "scratch"
        scratch.write_text(text)
        with contextlib.suppress(FileNotFoundError):  # a test has taken the directory away
            scratch.replace(self.cluster / name)

    def write_node(self, name: str = NAME, cidrs: Any = CIDRS, addresses: Any = ADDRESSES) -> None:
        self.write(f"{name}.json", node_object(name, cidrs, addresses))

    # The agent

    def start(self, **flags: str) -> None:
        self.agent._flags = {**self.flags, **flags}
        self.agent.log.unlink(missing_ok=True)
        self.agent.start()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the agent; it must end well when it is asked."""
        assert self.agent._process
        os.kill(self.agent._process.pid, number)
        status = self.agent._process.wait()
        assert status == (0 if number == signal.SIGTERM else -number), self.agent.last_lines()

    def kill(self) -> None:
        """End whatever runs in the node."""
        processes.stop_in([netns.path(self.netns)], 0.0)

    def worker(self) -> list[int]:
        """The process that holds libnftables."""
        assert self.agent._process
        children = Path(f"/proc/{self.agent._process.pid}/task/{self.agent._process.pid}/children")
        return [int(word) for word in children.read_text().split()]

    def ended(self) -> int:
        """Wait until the agent ends by itself, and return its exit status."""
        assert self.agent._process
        return self.agent._process.wait(LIMIT_S)

    def wait_until_ready(self) -> None:
        until(lambda: not self.agent.not_ready(), LIMIT_S, lambda: f"{self.agent.not_ready()}\n{self.log()}")

    def log(self) -> str:
        return self.agent.log.read_text() if self.agent.log.exists() else ""

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log(), LIMIT_S, lambda: f"no {text!r} in\n{self.log()}")

    def readyz(self) -> tuple[int, str]:
        """The agent's readiness probe: status and text."""

        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", 9619, timeout=5)
            try:
                connection.request("GET", "/readyz")
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            finally:
                connection.close()

        return netns.run(netns.path(self.netns), ask)

    def status(self) -> str:
        """CNI STATUS: nothing, or the code and the sentence."""
        return self._refusal("STATUS", None)

    # Pods

    def box(self) -> Sandbox:
        """A namespace for a Pod that has not been added yet."""
        self.number += 1
        name = f"{self._prefix}-pod{self.number}"
        netns.create(name)
        pod, uid = f"pod{self.number}", f"uid{self.number}"
        self.write(f"{pod}.json", pod_object(pod, uid))
        return Sandbox(f"{self.number:064x}", name, "default", pod, uid)

    def add(self) -> Sandbox:
        """Attach a new Pod. Raises PluginError."""
        return self.added(self.box())

    def added(self, box: Sandbox) -> Sandbox:
        """Attach a Pod. Raises PluginError."""
        result = self.runtime.call_once("ADD", box)
        added = Sandbox(**{**{name: getattr(box, name) for name in box.__slots__}, "result": result})
        self.boxes.append(added)
        return added

    def refused(self, box: Sandbox | None = None) -> str:
        """ADD, which must fail and leave nothing; the code and the sentence."""
        before = self.links()
        said = self._refusal("ADD", box or self.box())
        assert said, "ADD went well"
        assert self.links() == before
        return said

    def delete(self, box: Sandbox) -> None:
        """Detach a Pod."""
        self.runtime.call_once("DEL", box)
        until(lambda: box.host_link not in self.links(), LIMIT_S, lambda: f"{box.host_link} stays")
        netns.remove(box.netns)
        self.boxes.remove(box)

    def _refusal(self, name: str, box: Sandbox | None) -> str:
        try:
            self.runtime.call_once(name, box)
        except PluginError as error:
            return str(error)
        return ""

    def reaches(self, box: Sandbox) -> bool:
        """Whether datagrams pass from the node to a Pod and back, in both families."""
        try:
            return all(self._echo(box, str(address)) for address in box.addresses)
        except OSError:  # no route
            return False

    def _echo(self, box: Sandbox, address: str) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(netns.run(box.path, socket.socket, family, socket.SOCK_DGRAM))
            outside = stack.enter_context(
                netns.run(netns.path(self.netns), socket.socket, family, socket.SOCK_DGRAM)
            )
            inside.bind((address, 7))
            outside.connect((address, 7))
            outside.send(b"there")
            if not select.select([inside], [], [], 1)[0]:
                return False
            data, peer = inside.recvfrom(100)
            inside.sendto(data, peer)
            return bool(select.select([outside], [], [], 1)[0]) and outside.recv(100) == b"there"

    def links(self) -> set[str]:
        """Devices of Pods."""
        found = json.loads(command("ip", "-j", "-n", self.netns, "link"))
        return {each["ifname"] for each in found if LINK.fullmatch(each["ifname"])}

    def ruleset(self) -> str:
        """nftables in the node, without counters."""
        return command("ip", "netns", "exec", self.netns, "nft", "-s", "list", "ruleset")


def node_object(name: str, cidrs: Any, addresses: Any) -> dict[str, Any]:
    spec = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "uid": f"uid-{name}"},
        "spec": spec,
        "status": {
            "addresses": [{"type": "InternalIP", "address": each} for each in addresses],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def pod_object(name: str, uid: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": uid},
        "spec": {"nodeName": NAME, "containers": [{"name": "c"}]},
        "status": {"phase": "Pending"},
    }


@contextlib.contextmanager
def made() -> Iterator[Node]:
    """A node whose agent has not been started."""
    node = Node(Path(tempfile.mkdtemp(prefix="podwall-t")))
    try:
        node.build()
        yield node
    finally:
        node.remove()
