"""What a killed agent costs those who connect through its Services, and what it commits when it is back.

    client Pod --connect, again and again--> ClusterIP --> one of two Pods          kill -9, away, start

In every second round a few endpoints of other Services change while the agent is away. Its commits are
counted in its log, items are rules and elements; the sticky Service's client is read before and after.

    .venv/bin/python bench/service_restart.py [--services 10000] [--rounds 6]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread
from typing import Self

from stage import connections, objects, sandbox
from stage.commits import listening
from stage.figures import Target, machine, report, say, table
from stage.node import Node, places
from stage.objects import PROBED

from lab import netns
from lab.names import NodePlace

PORT, TARGET_PORT = 80, 8080
CHANGED = 5  # endpoints that change while the agent is away
PIECE_S = 0.1  # of connections that are counted together
LOADED_S = 0.5  # of load before the agent is killed, while it is away, and when it is back
LIMIT_S = 120.0
QUIET_S = 1.0
SERVERS = ("server-0", "server-1")
COMMITTED = re.compile(r"event=committed items=(\d+)")
STICKY = re.compile(r"elements = \{(.*?)\}", re.DOTALL)
PASSING = re.compile(r"expires \S+ ")


class Load:
    """Opens connections as long as it lasts; `count` is how many there were, `failed` why one was not."""

    def __init__(self, client: Path, address: str) -> None:
        self.count, self.failed = 0, ""
        self._client, self._address = client, address
        self._ending = Event()
        self._thread = Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set() and not self.failed:
            try:
                rate = connections.opened(self._client, self._address, PORT, PIECE_S)
                self.count += round(rate.by_clock * PIECE_S)
            except SystemExit as error:
                self.failed = str(error)


@dataclass(frozen=True, slots=True)
class Round:
    """One time that the agent was killed: the connections meanwhile, its commits when it was back."""

    changed: int
    connections: int
    failed: str
    back_s: float
    commits: int
    items: int
    kept: bool


class Scene:
    """A node with Services, of which the one in the middle and its sticky neighbour lead to two Pods here."""

    def __init__(self, place: NodePlace, services: int) -> None:
        self._services, self._changes = services, 0
        cluster = [*objects.nodes(place, 1), *objects.namespaces(), *objects.services(services)]
        self.node = Node(place, cluster, {"services": "on"})
        connections.prepare_node(self.node.path)
        self.node.start()
        pods = [objects.pod(PROBED, app, place.name, {"app": app}) for app in ("client", *SERVERS)]
        self._client, *servers = self.node.attach(pods)
        connections.prepare_client(self._client.path)
        addresses = [str(box.addresses[0]) for box in servers]
        for box, address in zip(servers, addresses, strict=True):
            connections.Server(box.path, address, TARGET_PORT)
        self._plain, self._sticky = services // 2, services // 2 + 1
        sticky = objects.service(self._sticky)
        sticky["spec"]["sessionAffinity"] = "ClientIP"
        with listening(self.node.path) as commits:
            self.node.api.put(sticky)
            for number in (self._plain, self._sticky):
                self.node.api.put(objects.endpoint_slice(number, *addresses, node=place.name))
            commits.quiet(QUIET_S, LIMIT_S)
        connections.opened(self._client.path, objects.cluster_ip(self._sticky), PORT, PIECE_S)

    def kill_and_start(self, changed: int) -> Round:
        """Kill the agent under load, change so many endpoints, start it again."""
        before, log = self._remembered(), self.node.agent.log.stat().st_size
        with Load(self._client.path, objects.cluster_ip(self._plain)) as load:
            time.sleep(LOADED_S)
            self.node.stop(kill=True)
            self._change(changed)
            time.sleep(LOADED_S)
            back_s = self.node.start()
            with listening(self.node.path) as commits:
                commits.quiet(LOADED_S, LIMIT_S)
        with self.node.agent.log.open() as file:
            file.seek(log)
            content = file.read()
            items = [int(number) for number in COMMITTED.findall(content)]
        kept = before == self._remembered() != ""
        return Round(changed, load.count, load.failed, back_s, len(items), sum(items), kept)

    def _change(self, count: int) -> None:
        for number in range(count):
            self._changes += 1
            other = str(ip_address("10.199.0.0") + self._changes)
            self.node.api.put(objects.endpoint_slice(number, objects.endpoint_address(2 * number), other))

    def _remembered(self) -> str:
        """The sticky clients in the kernel, without the time that is left to them."""
        words = ["nft", "list", "map", "inet", "podwall_services", "sticky4"]
        listed = netns.run(self.node.path, subprocess.run, words, check=True, capture_output=True, text=True)
        found = STICKY.search(listed.stdout)
        return PASSING.sub("", found[1]) if found else ""


def show(rounds: list[Round]) -> Iterator[str]:
    rows = [
        [
            f"{each.changed} endpoints changed meanwhile",
            each.connections,
            each.failed or "none",
            each.back_s,
            each.commits,
            each.items,
            "yes" if each.kept else "NO",
        ]
        for each in rounds
    ]
    head = ["", "connections", "failed", "ready again, s", "commits", "items", "sticky client kept"]
    yield from table(head, rows)


def targets(rounds: list[Round]) -> Iterator[Target]:
    yield Target("failed connections", sum(bool(each.failed) for each in rounds), 0, "")
    yield Target("sticky clients lost", sum(not each.kept for each in rounds), 0, "")
    unchanged = [each.items for each in rounds if not each.changed]
    yield Target("items committed when nothing had changed", max(unchanged), 0, "")
    # An endpoint that becomes another is an element less and one more in each of two maps, of one list.
    changed = [each.items for each in rounds if each.changed]
    yield Target(f"items committed for {CHANGED} changed endpoints", max(changed, default=0), 4 * CHANGED, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    sandbox.enter()
    connections.build()
    print(*machine(), "", sep="\n", flush=True)
    say(f"starting with {arguments.services} Services")
    scene = Scene(next(places()), arguments.services)
    rounds = []
    for number in range(arguments.rounds):
        say(f"round {number + 1} of {arguments.rounds}")
        rounds.append(scene.kill_and_start(CHANGED * (number % 2)))
    say("")
    print(*show(rounds), "", sep="\n")
    report(targets(rounds))


if __name__ == "__main__":
    main()
