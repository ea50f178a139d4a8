"""How long one changed endpoint takes from the API server to the kernel, by the number of Services.

    EndpointSlice event sent --> compiled --> commit heard that holds the new endpoint's address

podwall's agent beside kube-proxy in its nftables and iptables modes, all started before, each on a node of
its own behind a scripted API server. In every round each peer has one change; who takes more than a second
for one has five in all. kube-proxy's own limits on how often it writes are off. CPU is of all processes of a
peer, with the programs that it starts for the change.

    .venv/bin/python bench/service_change.py [--services 1000 10000 45000] [--rounds 60]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

from stage import objects, sandbox
from stage.commits import Commits
from stage.figures import Target, machine, percentile, report, say, table
from stage.node import Use, places
from stage.serving import MOST, PEERS, PODWALL, Peer, packed, peer

from lab import netns
from lab.names import NodePlace

START_LIMIT_S, CHANGE_LIMIT_S = 120.0, 30.0
QUIET_S = 2.0
SETTLED_S = 0.05  # what a peer still does after the commit
TARGETED = 10_000
SLOW_MS, FEW = 1000.0, 5
"""A peer that takes so long for a change has a few only."""


@dataclass
class Taken:
    """One peer with so many Services, and what its changes took."""

    name: str
    services: int
    server: Peer
    commits: Commits
    ms: list[float] = field(default_factory=list)
    cpu_ms: float = 0.0

    @classmethod
    def begin(cls, name: str, place: NodePlace, services: int) -> Taken:
        """Start a peer and wait for all its rules."""
        commits = Commits(netns.path(place.netns))
        taken = cls(name, services, peer(name, place, services), commits)
        taken.server.start()
        taken.await_commit(START_LIMIT_S, objects.endpoint_address(2 * services - 1))
        commits.quiet(QUIET_S, START_LIMIT_S)
        return taken

    def change(self, number: int) -> None:
        """One of the endpoints of a Service in the middle becomes another."""
        service = self.services // 2
        new = str(ip_address("10.199.0.0") + number)
        slice_ = objects.endpoint_slice(service, objects.endpoint_address(2 * service), new)
        self.commits.drain(0.001)
        before = self.server.use().cpu_ms
        begun = self.server.api.put(slice_)
        self.ms.append((self.await_commit(CHANGE_LIMIT_S, new) - begun) * 1e3)
        time.sleep(SETTLED_S)
        self.commits.quiet(SETTLED_S, CHANGE_LIMIT_S)
        self.cpu_ms += self.server.use().cpu_ms - before

    def await_commit(self, limit_s: float, address: str) -> float:
        """Return when the commit was heard that holds an address; ends the benchmark without it."""
        try:
            return self.commits.heard(limit_s, packed(address))
        except TimeoutError as error:
            log = self.server.log.read_text()[-2000:]
            sys.exit(f"{self.name}, {self.services} Services: {error}; its log ends:\n{log}")


def show(all_taken: Iterable[Taken]) -> Iterator[str]:
    rows: list[list[object]] = []
    for taken in all_taken:
        used: Use = taken.server.use()
        rows.append(
            [
                f"{taken.services} Services, {taken.name}",
                len(taken.ms),
                percentile(taken.ms, 50),
                percentile(taken.ms, 99),
                taken.cpu_ms / len(taken.ms),
                used.memory_mb,
            ]
        )
    yield from table(["", "changes", "p50, ms", "p99, ms", "CPU of each, ms", "memory, MB"], rows)


def targets(all_taken: Iterable[Taken]) -> Iterator[Target]:
    for taken in all_taken:
        if (taken.name, taken.services) == (PODWALL, TARGETED):
            what = f"podwall, {TARGETED} Services"
            yield Target(f"{what}, change, p50", percentile(taken.ms, 50), 10, "ms")
            yield Target(f"{what}, change, p99", percentile(taken.ms, 99), 50, "ms")
            yield Target(f"{what}, memory", taken.server.use().memory_mb, 200, "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, nargs="+", default=[1000, TARGETED, 45_000])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    arguments = parser.parse_args()
    sandbox.enter()
    print(*machine(), "", sep="\n", flush=True)
    nodes = places()
    all_taken = []
    for services in arguments.services:
        for name in arguments.peers:
            if services > MOST.get(name, services):
                continue
            say(f"starting with {services} Services: {name}")
            all_taken.append(Taken.begin(name, next(nodes), services))
    for number in range(arguments.rounds):
        say(f"round {number + 1} of {arguments.rounds}")
        for taken in all_taken:
            if number < FEW or percentile(taken.ms, 50) < SLOW_MS:
                taken.change(number)
    say("")
    print(*show(all_taken), "", sep="\n")
    report(targets(all_taken))


if __name__ == "__main__":
    main()
