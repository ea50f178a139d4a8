"""How long Services take from a start to the last rule, and what they hold in memory.

    process started --lists--> compiled --> committed; the last commit heard from the kernel

podwall's agent, all of it, beside kube-proxy in its nftables and iptables modes, each on a node of its own
without rules, behind a scripted API server over plain HTTP and JSON. Every Service has one TCP port and two
endpoints. Peers take turns. Memory is resident, of podwall's two processes together, of kube-proxy without
the programs that it starts for each change.

    .venv/bin/python bench/service_start.py [--services 1000 10000 45000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from stage import objects, sandbox
from stage.commits import listening
from stage.figures import Target, machine, report, say, table
from stage.node import Use, places
from stage.serving import MOST, PEERS, PODWALL, packed, peer

from lab import netns
from lab.names import NodePlace

START_LIMIT_S = 120.0
QUIET_S = 2.0
TARGETED = 10_000
SLOW_S = 8.0
"""What takes so long is done once only."""

Taken = Mapping[tuple[str, int], Sequence[tuple[float, Use]]]


def start(name: str, place: NodePlace, services: int) -> tuple[float, Use]:
    """Seconds from the start of a peer to its last commit, and what it used for that."""
    server = peer(name, place, services)
    last = packed(objects.endpoint_address(2 * services - 1))
    with listening(netns.path(place.netns)) as commits:
        begun = time.perf_counter()
        server.start()
        try:
            ended = max(commits.heard(START_LIMIT_S, last), commits.quiet(QUIET_S, START_LIMIT_S))
        except TimeoutError as error:
            sys.exit(f"{name}, {services} Services: {error}; its log ends:\n{server.log.read_text()[-2000:]}")
        used = server.use()
    server.stop()
    server.api.close()
    return ended - begun, used


def show(taken: Taken) -> Iterator[str]:
    rows = []
    for (name, services), runs in sorted(
        taken.items(), key=lambda item: (item[0][1], PEERS.index(item[0][0]))
    ):
        used = [use for _, use in runs]
        rows.append(
            [
                f"{services} Services, {name}",
                statistics.median(seconds for seconds, _ in runs),
                statistics.median(use.cpu_ms for use in used) / 1e3,
                statistics.median(use.memory_mb for use in used),
                statistics.median(use.most_mb for use in used),
            ]
        )
    yield from table(["", "start, s", "CPU, s", "memory, MB", "at most, MB"], rows)


def targets(taken: Taken) -> Iterator[Target]:
    if runs := taken.get((PODWALL, TARGETED)):
        what = f"podwall, {TARGETED} Services"
        yield Target(f"{what}, start", statistics.median(seconds for seconds, _ in runs), 3, "s")
        yield Target(f"{what}, memory", max(use.memory_mb for _, use in runs), 200, "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, nargs="+", default=[1000, TARGETED, 45_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    arguments = parser.parse_args()
    sandbox.enter()
    print(*machine(), "", sep="\n", flush=True)
    nodes = places()
    taken: defaultdict[tuple[str, int], list[tuple[float, Use]]] = defaultdict(list)
    for services in arguments.services:
        for number in range(arguments.rounds):
            for name in arguments.peers:
                slow = any(seconds > SLOW_S for seconds, _ in taken.get((name, services), ()))
                if slow or services > MOST.get(name, services):
                    continue
                say(f"{services} Services, round {number + 1}: {name}")
                taken[name, services].append(start(name, next(nodes), services))
    say("")
    print(*show(taken), "", sep="\n")
    report(targets(taken))


if __name__ == "__main__":
    main()
