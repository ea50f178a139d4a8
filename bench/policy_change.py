"""How long a change of policy takes from the API server to the kernel, and what it costs the agent.

    API event sent --> agent --> commit heard from the kernel --> a datagram is let through, or not any more

    policy created    a Pod that was open is isolated            (probed by a datagram that must not arrive)
    policy deleted    it is open again                           (probed by one that must)
    remote Pod's label changed    it leaves the sets of some peers and enters those of others

The real agent behind a scripted API server, 1,000 policies of both directions, 100 Pods of its own wired by
the real CNI binary. Two nodes take turns, one in a cluster of 500 Pods and one of 5,000, so that what grows
with the cluster is seen. The clock runs from just before the event is written to when the kernel's
notification of the commit is read; memory is resident, after all the changes.

A start is measured from the process to /readyz: once with the tables in the kernel already, and once
without, as after a boot with these Pods.

    .venv/bin/python bench/policy_change.py [--rounds 100] [--policies 1000] [--pods 5000]
"""

from __future__ import annotations

import argparse
import itertools
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from stage import objects, sandbox
from stage.commits import Commits
from stage.figures import Target, machine, percentile, report, say, table
from stage.node import Node, Use, places
from stage.objects import PROBED

from lab import netns
from lab.names import NodePlace
from lab.runtime import Sandbox

FEWER = 500
LOCAL = 100
CHANGE_LIMIT_S = 10.0
SETTLED_S = 0.3  # flows that are denied now have ended by then
BATCH = 10
ARRIVES_S, ABSENT_S = 2.0, 0.02
PORT = 9000

DENY = objects.policy(PROBED, "deny", {"matchLabels": {"app": "server"}}, ingress=[])
CREATED, DELETED, RELABELLED = "policy created", "policy deleted", "remote Pod relabelled"
POLICY = "policy created or deleted"
TABLES = ("inet podwall", "arp podwall")


class Cluster:
    """A cluster of so many Pods, seen from one of its nodes."""

    def __init__(self, place: NodePlace, pods: int, policies: int) -> None:
        self.pods = pods
        others = list(objects.other_pods(pods - LOCAL))
        nodes = objects.nodes(place, (pods - LOCAL) // objects.PODS_A_NODE + 1)
        self.relabelled = others[-1]
        everything = [*nodes, *objects.namespaces(), *others, *objects.policies(policies)]
        self.node = Node(place, everything)
        self.ms: dict[str, list[float]] = {name: [] for name in (CREATED, DELETED, RELABELLED)}
        self.cpu_ms: defaultdict[tuple[str, str], float] = defaultdict(float)

    def start(self) -> None:
        """Start the agent and its Pods."""
        self.node.start()
        name = self.node.place.name
        pods = [
            objects.pod(f"ns-{number % objects.NAMESPACES}", f"local-{number}", name, objects.labels(number))
            for number in range(LOCAL - 2)
        ]
        ends = [objects.pod(PROBED, app, name, {"app": app}) for app in ("client", "server")]
        boxes = self.node.attach([*pods, *ends])
        self.client, self.server = boxes[-2:]
        self.commits = Commits(self.node.path)
        self.probe = Probe(self.client, self.server)
        self.commits.quiet(0.5, CHANGE_LIMIT_S)

    def change(self, name: str, event: Callable[[], float]) -> None:
        """Let an event happen and wait for its commit."""
        self.commits.drain(0.005)
        begun = event()
        self.ms[name].append((self.commits.heard(CHANGE_LIMIT_S) - begun) * 1e3)

    def isolate_and_open(self, _: int) -> None:
        """A policy comes and goes."""
        self.change(CREATED, lambda: self.node.api.put(DENY))
        self.probe.expect(False)
        self.change(DELETED, lambda: self.node.api.remove(DENY))
        self.probe.expect(True)

    def relabel(self, number: int) -> None:
        """A Pod of another node leaves the sets of one peer and enters another's."""
        meta = self.relabelled["metadata"]
        labels = {**meta["labels"], "app": ("app-3", "app-6")[number % 2]}
        changed = {**self.relabelled, "metadata": {**meta, "labels": labels}}
        self.change(RELABELLED, lambda: self.node.api.put(changed))

    def charged(self, what: str, rounds: int, one: Callable[[int], None]) -> None:
        """Do some rounds and book what the agent and its worker used for them."""
        before = self.node.use()
        for number in range(rounds):
            one(number)
        time.sleep(SETTLED_S)
        for name, now in self.node.use().items():
            self.cpu_ms[what, name] += now.cpu_ms - before[name].cpu_ms


class Probe:
    """Datagrams from one Pod to another, each a flow of its own."""

    def __init__(self, client: Sandbox, server: Sandbox) -> None:
        self._client = client
        self._address = str(server.addresses[0])
        self._receiver = netns.run(server.path, _bound, self._address)
        self._sent = 0

    def expect(self, allowed: bool) -> None:
        """Send one; ends the benchmark when the kernel does not do what was committed."""
        self._sent += 1
        word = b"%d" % self._sent
        with netns.run(self._client.path, socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(word, (self._address, PORT))
        self._receiver.settimeout(ARRIVES_S if allowed else ABSENT_S)
        try:
            arrived = self._receiver.recv(64) == word
        except TimeoutError:
            arrived = False
        if arrived != allowed:
            raise SystemExit(f"a datagram was {'let through' if arrived else 'dropped'} after the commit")


def _bound(address: str) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, PORT))
    return made


def starts(node: Node) -> tuple[float, float]:
    """Seconds of a start with the tables there, and without."""
    node.stop()
    warm = node.start()
    node.stop()
    for name in TABLES:
        netns.run(node.path, subprocess.run, ["nft", f"delete table {name}"], check=True)
    return warm, node.start()


# What is printed


def show(
    clusters: Sequence[Cluster], uses: Sequence[dict[str, Use]], started: Sequence[tuple[float, float]]
) -> Iterator[str]:
    """Figures by row, clusters by column."""
    rows: list[list[object]] = []
    for name, of in itertools.product((CREATED, DELETED, RELABELLED), (50, 99)):
        rows.append([f"{name}, p{of}, ms", *(percentile(each.ms[name], of) for each in clusters)])
    for (what, changes), name in itertools.product(((POLICY, 2), (RELABELLED, 1)), ("agent", "worker")):
        costs = [each.cpu_ms[what, name] / (changes * len(each.ms[RELABELLED])) for each in clusters]
        rows.append([f"{what}, CPU of the {name}, ms", *costs])
    for name in ("agent", "worker"):
        rows += [[f"memory of the {name}, MB", *(each[name].memory_mb for each in uses)]]
    rows.append(["start with the tables there, s", *(warm for warm, _ in started)])
    rows.append(["start without, s", *(cold for _, cold in started)])
    yield from table(["", *(f"{each.pods} Pods" for each in clusters)], rows)


def targets(large: Cluster, use: dict[str, Use], started: tuple[float, float]) -> Iterator[Target]:
    """What the larger cluster is held to."""
    for name in (CREATED, DELETED):
        yield Target(f"{name}, p50", percentile(large.ms[name], 50), 20, "ms")
        yield Target(f"{name}, p99", percentile(large.ms[name], 99), 100, "ms")
    yield Target(f"{RELABELLED}, p99", percentile(large.ms[RELABELLED], 99), 50, "ms")
    yield Target("memory, agent and worker", sum(each.memory_mb for each in use.values()), 150, "MB")
    yield Target("start without tables", started[1], 3, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="changes of each kind on each node")
    parser.add_argument("--policies", type=int, default=1000)
    parser.add_argument("--pods", type=int, default=5000)
    arguments = parser.parse_args()
    sandbox.enter()
    print(*machine(), "", sep="\n", flush=True)
    sizes = (min(FEWER, arguments.pods), arguments.pods)
    clusters = [
        Cluster(place, pods, arguments.policies) for place, pods in zip(places(), sizes, strict=False)
    ]
    for cluster in clusters:
        say(f"starting an agent and {LOCAL} Pods in a cluster of {cluster.pods}")
        cluster.start()
    for done in range(0, arguments.rounds, BATCH):
        say(f"changes: {done} of {arguments.rounds} rounds")
        for cluster in clusters:
            cluster.charged(POLICY, BATCH, cluster.isolate_and_open)
            cluster.charged(RELABELLED, BATCH, cluster.relabel)
    uses = [cluster.node.use() for cluster in clusters]
    say("starting the agents again")
    started = [starts(cluster.node) for cluster in clusters]
    say("")
    print(*show(clusters, uses, started), "", sep="\n")
    report(targets(clusters[-1], uses[-1], started[-1]))


if __name__ == "__main__":
    main()
