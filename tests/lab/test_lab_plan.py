"""`podwall plan` in the lab: what it says of a change is what the kernel does once it is applied.

matrix before --plan says: opens, closes--> apply --> matrix after:      the difference, pair by pair
live flows    --plan says: would end------> apply --> those that ended:  these and no others
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.ask import ask
from agent.cli.main import main
from lab.matrix import Matrix, Trial
from lab.objects import Object
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import LIMIT, expected_matrix, namespace, pod, policy
from tests.lab.services import until
from tests.lab.test_lab_policy_random import Chance

CHANGES = 4
SILENCE_S = 0.5
PORT = 8080


def planned(tmp_path: Path, change: Sequence[Object], gone: Sequence[Object], *flags: str) -> dict[str, Any]:
    """What the command says of it, as data."""
    arguments = ["plan", "--lab", "-o", "json", *flags]
    for option, objects in (("-f", change), ("--delete", gone)):
        if objects:
            path = tmp_path / f"{option.strip('-')}.json"
            path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
            arguments += [option, str(path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    content: dict[str, Any] = json.loads(done.stdout)
    return content


# Ways


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2) as made:
        yield made


@pytest.mark.parametrize("seed", [11, 12])
def test_what_opens_and_closes(lab: Lab, tmp_path: Path, seed: int) -> None:
    chance = Chance(seed)
    objects = chance.next([])
    lab.apply(objects, prune=True)
    chance.see(lab)
    policies: list[Object] = []
    seen = expected_matrix(lab)
    differences = 0
    for number in range(CHANGES):
        later = list({_key(of): of for of in chance.policies()}.values())
        relabelled = [_relabelled(chance, of) for of in objects]
        kept = {_key(of) for of in later}
        gone = [of for of in policies if _key(of) not in kept]
        said = planned(tmp_path, [*relabelled, *later], gone, "--no-flows")

        lab.apply([*relabelled, *later], prune=True)
        now = expected_matrix(lab)

        told = _Told(lab, said["ways"], [*policies, *later])
        wrong = [each for each in _compared(seen, now) if told.of(each[0]) != each[1]]
        assert wrong == [], f"seed {seed}, change {number}"
        differences += sum(bool(right) for _, right in _compared(seen, now))
        objects, policies, seen = relabelled, later, now
    assert differences > 100


def _key(of: Object) -> tuple[str, str, str]:
    return of["kind"], of["metadata"].get("namespace", ""), of["metadata"]["name"]


def _relabelled(chance: Chance, of: Object) -> Object:
    labels = chance.labels() if chance.happens(2) else of["metadata"].get("labels", {})
    return {**of, "metadata": {**of["metadata"], "labels": labels}}


def _compared(before: Matrix, after: Matrix) -> Iterator[tuple[Trial, list[str]]]:
    """Every connection that was tried twice, and what became of it."""
    was = {_place(result.trial): result.connected for result in before.results}
    for result in after.results:
        earlier = was[_place(result.trial)]
        change = "opens" if result.connected else "closes"
        yield result.trial, [] if earlier == result.connected else [change]


def _place(of: Trial) -> tuple[object, ...]:
    return of.source, of.target, of.address, of.port, of.protocol


class _Told:
    """Which of the ways that were told a connection takes."""

    def __init__(self, lab: Lab, ways: list[dict[str, Any]], policies: Iterable[Object]) -> None:
        self._ways = ways
        self._node_of = {pod.full_name: pod.node for pod in lab.pods()}
        blocks = {"0.0.0.0/0", "::/0", *_cidrs(policies)}
        self._blocks = [ip_network(each) for each in blocks]

    def of(self, trial: Trial) -> list[str]:
        if self._node_of.get(trial.target) == trial.source:  # a node always reaches its own Pods
            return []
        return [
            way["change"]
            for way in self._ways
            if way["family"] in (None, trial.address.version)
            and self._is_in(way["from"], trial.source, trial)
            and self._is_in(way["to"], trial.target, trial)
            and any(_has(ports, trial) for ports in way["ports"])
        ]

    def _is_in(self, groups: list[dict[str, Any]], name: str, trial: Trial) -> bool:
        if name == "outside":
            inside = [each for each in self._blocks if trial.address in each]
            name = str(max(inside, key=lambda of: of.prefixlen))
        return any(name in group["names"] for group in groups)


def _has(ports: dict[str, Any], trial: Trial) -> bool:
    return bool(ports["protocol"] == trial.protocol.upper() and ports["first"] <= trial.port <= ports["last"])


def _cidrs(policies: Iterable[Object]) -> Iterator[str]:
    for of in policies:
        for rule in (*(of["spec"].get("ingress") or ()), *(of["spec"].get("egress") or ())):
            for peer in (*(rule.get("from") or ()), *(rule.get("to") or ())):
                if block := peer.get("ipBlock"):
                    yield from (block["cidr"], *block.get("except", ()))


# Flows


SERVERS = ("shop/server-1", "shop/server-2")
CLIENTS = ("shop/friend", "shop/stranger", "away/stranger")
OF_SERVER = {"matchLabels": {"app": "server"}}
BASE = (
    namespace("shop"),
    namespace("away"),
    pod("shop/server-1", PORT, node="node1", labels={"app": "server"}),
    pod("shop/server-2", PORT, node="node2", labels={"app": "server"}),
    pod("shop/friend", node="node1", labels={"role": "friend"}),
    pod("shop/stranger", node="node2", labels={"role": "stranger"}),
    pod("away/stranger", node="node1", labels={"role": "stranger"}),
)
FRIENDS = [{"podSelector": {"matchLabels": {"role": "friend"}}}]
NARROW = {
    "ingress": policy("shop/server", podSelector=OF_SERVER, ingress=[{"from": FRIENDS}]),
    "egress": policy("away/shut", policyTypes=["Egress"], egress=[{"ports": [{"protocol": "UDP"}]}]),
    "another port": policy(
        "shop/server", podSelector=OF_SERVER, ingress=[{"ports": [{"port": PORT + 1}, {"protocol": "UDP"}]}]
    ),
}


@pytest.mark.parametrize("name", NARROW)
def test_the_live_flows_that_end(lab: Lab, tmp_path: Path, name: str) -> None:
    lab.apply(BASE, prune=True)
    over = dict(_connected(lab, [socket.SOCK_STREAM]))
    for each in over.values():
        each.close()
    live = dict(_connected(lab, [socket.SOCK_STREAM, socket.SOCK_DGRAM]))
    until(lambda: live.keys() <= _known(lab).keys(), LIMIT, "the agents do not know all flows")
    until(lambda: not over.keys() & _known(lab).keys(), LIMIT, "a connection that is closed is told as live")
    every_node_follows(lab)
    objects, commits = lab.objects(), _commits(lab)
    audited = {**NARROW[name], "metadata": {**NARROW[name]["metadata"], "annotations": AUDIT}}

    said = planned(tmp_path, [NARROW[name]], [])
    told = {_source(each): each["node"] for each in said["connections"] if _source(each) in live}
    assert told.keys() < live.keys(), "some end, not all"
    assert not over.keys() & {_source(each) for each in said["connections"]}
    assert planned(tmp_path, [audited], [])["connections"] == []
    assert (lab.objects(), _commits(lab)) == (objects, commits), "a rehearsal touches nothing"

    lab.apply([NARROW[name]])
    until(lambda: not any(node in _known(lab)[key] for key, node in told.items()), LIMIT, "a flow lives on")
    silent = {key for key in told if not _answers(live[key], SILENCE_S)}
    assert silent == told.keys()
    assert {key for key, each in live.items() if key not in told and _answers(each)} == live.keys() - silent
    for each in live.values():
        each.close()


AUDIT = {"podwall.dev/mode": "audit"}


def _connected(lab: Lab, kinds: Iterable[int]) -> Iterator[tuple[tuple[str, int], socket.socket]]:
    """A flow of each kind of every client to every server in each family, by their own ends."""
    for client in CLIENTS:
        for server in SERVERS:
            for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                for kind in kinds:
                    opened = lab.socket(client, family, kind)
                    opened.settimeout(LIMIT)
                    opened.connect((str(lab.pod(server).address(version)), PORT))
                    if kind == socket.SOCK_STREAM:
                        opened.sendall(b"echo\n")
                    assert _answers(opened)
                    address, port = opened.getsockname()[:2]
                    yield (str(ip_address(address)), port), opened


def _answers(live: socket.socket, seconds: float = LIMIT) -> bool:
    try:
        live.sendall(b"still there\n")
        live.settimeout(seconds)
        return bool(live.recv(64))
    except TimeoutError:
        return False


def _asked(lab: Lab, node: str, what: str) -> Any:
    return ask(lab.node(node).directory / "agent.sock", what, {})


def _known(lab: Lab) -> Mapping[tuple[str, int], set[str]]:
    """The nodes that know a live flow, by its source."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for node in ("node1", "node2"):
        for each in _asked(lab, node, "flows")["flows"]:
            if not each["closed"]:
                found[_source(each)].add(node)
    return found


def _source(of: dict[str, Any]) -> tuple[str, int]:
    return of["source"]["address"], of["source"]["port"]


def _commits(lab: Lab) -> list[int]:
    return [_asked(lab, node, "status")["commits"] for node in ("node1", "node2")]
