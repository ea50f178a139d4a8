"""How long a Pod waits for its network: ADD and DEL of podwall beside Debian's reference plugins.

    one by one     round: podwall ADD, DEL;  ptp ADD, DEL;  bridge ADD, DEL;  ...    p50 and p99 of each
    50 at once     round: podwall 50 ADD at once, 50 DEL at once;  ptp ...           the whole, a Pod

Each call is a process of its own, as a container runtime starts it, from its start to its end. podwall is the
frozen binary and the real agent in a lab of one node; each peer has a network namespace of its own as its
node. Peers take turns in every round, so that what else the machine does falls on all alike. The namespaces
of the Pods are made beforehand and are no part of the time.

ptp waits for the kernel's duplicate address detection where it gives an IPv6 address, so it is shown for IPv4
alone too. podwall's DEL answers when the Pod is cut off and removes the link afterwards, which is shown on a
line of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import netns, processes
from lab.manifests import ObjectDirectory
from lab.names import RUN
from lab.objects import Object
from lab.world import Lab

REFERENCE = Path("/usr/lib/cni")
PACKAGE = "containernetworking-plugins"
PREFIX = "podwall-bench-"
CALL_LIMIT_S = 30.0

RANGES = {4: "10.245.0.0/16", 6: "fd00:10:245::/64"}
DEFAULTS = {4: "0.0.0.0/0", 6: "::/0"}


@dataclass
class Peer:
    """A plugin with its configuration, and the namespace that is its node."""

    name: str
    binary: Path
    config: Mapping[str, Any]
    node: Path
    slow: bool = False
    add_ms: list[float] = field(default_factory=list)
    del_ms: list[float] = field(default_factory=list)
    add_each_ms: list[float] = field(default_factory=list)
    del_each_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """One plugin process under way."""

    process: int
    pidfd: int
    begun: float
    answer: Path


class Bench:
    """Calls plugins for a number of Pod namespaces, one by one or all at once."""

    def __init__(self, pods: Sequence[str], scratch: Path) -> None:
        self.pods = pods
        self._scratch = scratch
        self._calls = 0

    def one(self, peer: Peer, command: str, container: str, pod: str) -> float:
        """Return the milliseconds of one call. Ends the benchmark when it fails."""
        return _in(peer.node, lambda: self._wait({self._start(peer, command, container, pod)})[0])

    def all(self, peer: Peer, command: str, containers: Sequence[str]) -> float:
        """Start a call for every Pod at once; return the milliseconds until the last has ended."""

        def calls() -> float:
            begun = time.perf_counter()
            self._wait(
                {
                    self._start(peer, command, *each)
                    for each in zip(containers, self.pods[: len(containers)], strict=True)
                }
            )
            return (time.perf_counter() - begun) * 1e3

        return _in(peer.node, calls)

    def _start(self, peer: Peer, command: str, container: str, pod: str) -> Call:
        self._calls += 1
        answer = self._scratch / f"answer-{self._calls}"
        config = self._scratch / f"{peer.name.replace(' ', '-')}.json"
        if not config.exists():
            config.write_text(json.dumps(peer.config))
        begun = time.perf_counter()
        process = os.posix_spawn(
            str(peer.binary),
            [str(peer.binary)],
            _environment(command, container, pod),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, str(config), os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(answer), os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        return Call(process, os.pidfd_open(process), begun, answer)

    def _wait(self, calls: set[Call]) -> list[float]:
        """Return each call's milliseconds, in the order in which they ended."""
        left = {call.pidfd: call for call in calls}
        poll = select.poll()
        for pidfd in left:
            poll.register(pidfd, select.POLLIN)
        taken = []
        while left:
            for pidfd, _ in poll.poll(CALL_LIMIT_S * 1e3) or _give_up(len(left)):
                call = left.pop(pidfd)
                taken.append((time.perf_counter() - call.begun) * 1e3)
                poll.unregister(pidfd)
                os.close(pidfd)
                _, status = os.waitpid(call.process, 0)
                if status:
                    sys.exit(f"a plugin failed: {call.answer.read_text()}")
                call.answer.unlink()
        return taken


def _give_up(count: int) -> Sequence[tuple[int, int]]:
    sys.exit(f"{count} plugin calls were not over after {CALL_LIMIT_S:.0f} s")


def _in(node: Path, work: Callable[[], float]) -> float:
    """Work in a thread of the node's namespace."""
    return netns.run(node, work)


def _environment(command: str, container: str, pod: str) -> dict[str, str]:
    names = f"K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID={pod}"
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": str(netns.path(pod)),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(REFERENCE),
        "CNI_ARGS": f"IgnoreUnknown=1;{names}",
        "PATH": os.environ.get("PATH", os.defpath),
    }


# The peers


def pod_object(name: str) -> Object:
    """A Pod as the cluster has it before its runtime calls ADD."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": name},
        "spec": {"nodeName": "node1", "containers": [{"name": "bench"}]},
        "status": {"phase": "Pending"},
    }


def podwall(lab: Lab) -> Peer:
    """podwall as its own agent configured it."""
    (binary,) = lab.settings.plugin  # the frozen one; without it the command has more words
    runtime = lab.runtimes["node1"]
    configuration = runtime.configuration()
    assert configuration
    config = {"cniVersion": "1.0.0", "name": configuration["name"], **configuration["plugins"][0]}
    return Peer("podwall, dual stack", Path(binary), config, netns.path(runtime.node.netns))


def reference(plugin: str, families: Sequence[int], node: Path, scratch: Path) -> Peer:
    """A reference plugin with host-local."""
    stack = "dual stack" if len(families) > 1 else f"IPv{families[0]} only"
    config: dict[str, Any] = {
        "cniVersion": "1.0.0",
        "name": f"podwall-bench-{plugin}-{len(families)}",
        "type": plugin,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": RANGES[family]}] for family in families],
            "routes": [{"dst": DEFAULTS[family]} for family in families],
            "dataDir": str(scratch / f"{plugin}-{len(families)}"),
        },
    }
    if plugin == "bridge":
        config |= {"bridge": "podwall-bench", "isGateway": True}
    slow = len(families) > 1 and plugin == "ptp"
    return Peer(f"{plugin} + host-local, {stack}", REFERENCE / plugin, config, node, slow)


# The rounds


def one_by_one(bench: Bench, peers: Sequence[Peer], rounds: int, slow_rounds: int) -> None:
    for number in range(rounds):
        for place, peer in enumerate(peers):
            if peer.slow and number >= slow_rounds:
                continue
            # another Pod each time: podwall's last one may still be losing its link
            container, pod = f"bench{number:06}", bench.pods[(number * len(peers) + place) % len(bench.pods)]
            peer.add_ms.append(bench.one(peer, "ADD", container, pod))
            peer.del_ms.append(bench.one(peer, "DEL", container, pod))
        _progress("one by one", number + 1, rounds)


def at_once(
    bench: Bench, peers: Sequence[Peer], rounds: int, parallel: int, after: Callable[[], None]
) -> None:
    for number in range(rounds):
        for peer in peers:
            containers = [f"bench{number:03}{pod:03}" for pod in range(parallel)]
            peer.add_each_ms.append(bench.all(peer, "ADD", containers) / parallel)
            peer.del_each_ms.append(bench.all(peer, "DEL", containers) / parallel)
            if peer is peers[0]:
                after()
        _progress(f"{parallel} at once", number + 1, rounds)


def links_gone(node: Path) -> float:
    """Wait until a node has no Pod link and return how many milliseconds that took."""
    begun = time.perf_counter()

    def links() -> list[str]:
        devices = netns.run(node, Path("/proc/thread-self/net/dev").read_text)
        return [word for word in devices.split() if word.startswith("podwall") and "-" not in word]

    processes.until(lambda: not links(), 10, lambda: f"still there: {links()}")
    return (time.perf_counter() - begun) * 1e3


def _progress(what: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {of} ", end="" if done < of else "\n", file=sys.stderr, flush=True)


# What is printed


def facts() -> Iterator[str]:
    """The machine and the programs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    version = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", PACKAGE], capture_output=True, text=True, check=True
    ).stdout
    yield f"machine: {os.cpu_count()} cores, {model or platform.machine()}, Linux {platform.release()}"
    yield f"load average before the run: {os.getloadavg()[0]:.2f}"
    yield f"programs: Python {platform.python_version()}, {PACKAGE} {version}"


def table(peers: Sequence[Peer], parallel: int) -> Iterator[str]:
    yield f"| milliseconds | ADD p50 | ADD p99 | DEL p50 | DEL p99 | ADD a Pod, {parallel} at once | DEL |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for peer in peers:
        figures = [
            *(_percentile(taken, of) for taken in (peer.add_ms, peer.del_ms) for of in (50, 99)),
            *(statistics.median(taken) for taken in (peer.add_each_ms, peer.del_each_ms)),
        ]
        yield f"| {peer.name} | " + " | ".join(f"{each:.1f}" for each in figures) + " |"


def _percentile(taken: Sequence[float], of: int) -> float:
    return sorted(taken)[min(len(taken) - 1, len(taken) * of // 100)]


def resident(process: int) -> tuple[float, float]:
    """A process' resident memory now and at its most, in MB (10^6 bytes)."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024 / 1e6
    return found["VmRSS"], found["VmHWM"]


def agent_processes(node: Path) -> dict[str, int]:
    """The agent and its nftables worker."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if netns.identity(entry / "ns/net") == netns.identity(node):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found["worker" if b"worker.py" in b" ".join(words) else "agent"] = int(entry.name)
        except OSError:
            continue  # it has ended
    return found


# The whole


@contextmanager
def namespaces(count: int) -> Iterator[tuple[Callable[[str], Path], list[str]]]:
    """Namespaces of Pods, and a function that makes a peer's node; all go at the end."""
    made: list[str] = []

    def make(name: str) -> Path:
        made.append(PREFIX + name)
        return netns.create(PREFIX + name)

    try:
        for number in range(count):
            make(f"pod{number}")
        yield make, list(made)
    finally:
        for name in made:
            netns.remove(name)


def install() -> None:
    """Install the reference plugins when they are missing."""
    if not (REFERENCE / "ptp").exists():
        print(f"installing the Debian package {PACKAGE}", file=sys.stderr)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", PACKAGE],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="ADD and DEL one by one")
    parser.add_argument("--slow-rounds", type=int, default=5, help="of these with ptp, dual stack")
    parser.add_argument("--batches", type=int, default=7, help="rounds of many at once")
    parser.add_argument("--parallel", type=int, default=50, help="how many at once")
    arguments = parser.parse_args()
    install()
    before = list(facts())
    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="podwall-bench-"))
        stack.callback(shutil.rmtree, scratch)
        make, pods = stack.enter_context(namespaces(max(arguments.parallel, 1)))
        # A /24 has no room for so many Pods a minute, each of whose addresses rests half of one.
        lab = stack.enter_context(Lab(nodes=1, flags={"address-rest-s": "1"}))
        cluster = ObjectDirectory(RUN / "cluster", RUN / "scratch")
        for pod in pods:
            cluster.write(pod_object(pod))
        node = netns.path(lab.node("node1").netns)
        peers = [
            podwall(lab),
            *(
                reference(plugin, families, make(f"{plugin}{len(families)}"), scratch)
                for plugin in ("ptp", "bridge")
                for families in ((4,), (4, 6))
            ),
        ]
        bench = Bench(pods, scratch)
        started = {name: resident(process) for name, process in agent_processes(node).items()}
        one_by_one(bench, peers, arguments.rounds, arguments.slow_rounds)
        gone: list[float] = []
        at_once(bench, peers, arguments.batches, arguments.parallel, lambda: gone.append(links_gone(node)))
        memory = {name: resident(process) for name, process in agent_processes(node).items()}
    print("$ .venv/bin/python", *sys.argv)
    print(*before, sep="\n")
    print()
    print(*table(peers, arguments.parallel), sep="\n")
    print()
    print(
        f"{arguments.rounds} rounds one by one ({arguments.slow_rounds} with ptp, dual stack), "
        f"{arguments.batches} of {arguments.parallel} at once (median)."
    )
    print(f"podwall's links were gone {statistics.median(gone):.0f} ms after the last DEL of these.")
    for name, (now, most) in memory.items():
        first, _ = started[name]
        print(f"podwall's {name}: {now:.1f} MB resident, {most:.1f} MB at most, {first:.1f} MB at start")


if __name__ == "__main__":
    main()
