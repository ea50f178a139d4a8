"""Random clusters and policies, one after the other in a running lab: real packets pass as documented.

Each state follows another without a rest: policies, labels, namespaces and Pods change together in one apply.
A state is drawn from a seed, which a failure names, so that it can be drawn again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lab import names
from lab.objects import Object
from lab.world import Lab
from tests.chance import PolicyChance
from tests.lab.policies import expected_matrix, namespace, pod, policy

NAMESPACES = ("red", "blue", "green")
PODS = 9
STATES = 7
PAIRS = 2_000

PORTS: tuple[dict[str, Any], ...] = (
    {"port": 80},
    {"port": 8080, "protocol": "TCP"},
    {"port": 53, "protocol": "UDP"},
    {"protocol": "UDP"},
    {"protocol": "SCTP"},
    {},
    {"port": 54, "endPort": 500},
    {"port": 443, "endPort": 9000, "protocol": "UDP"},
    {"port": "http"},
    {"port": "dns", "protocol": "UDP"},
    {"port": "nobodys"},
)
LISTENING = (
    (("http", 80, "TCP"), ("dns", 53, "UDP")),
    (("http", 8080, "TCP"), ("other", 443, "TCP")),
    (("http", 443, "TCP"), ("dns", 80, "UDP"), ("http-too", 53, "TCP")),
)


class Chance(PolicyChance):
    """Random states of the lab, each with much of the one before in it."""

    namespaces, ports = NAMESPACES, PORTS

    def pod(self, number: int) -> Object:
        made = pod(
            f"{NAMESPACES[number % 3]}/pod-{number}", node=f"node{1 + number % 2}", labels=self.labels()
        )
        made["spec"]["containers"][0]["ports"] = [
            {"name": name, "containerPort": port, "protocol": protocol}
            for name, port, protocol in self.choice(LISTENING)
        ]
        return made

    def policy(self) -> Object:
        return policy(f"{self.choice(NAMESPACES)}/policy-{self.randrange(4)}", **self.policy_spec())

    def policies(self) -> list[Object]:
        made = self.some(self.policy, 2, 4, 6)
        return list({str(each["metadata"]): each for each in made}.values())

    def next(self, before: Sequence[Object]) -> list[Object]:
        """Pods and namespaces somewhat later: other labels in place, other ports and so another Pod, none."""
        after: list[Object] = [namespace(name, **self.labels()) for name in NAMESPACES]
        known = {each["metadata"]["name"]: each for each in before if each["kind"] == "Pod"}
        for number in range(PODS):
            kept = known.get(f"pod-{number}")
            if kept is None or self.happens(1):
                after.append(self.pod(number))
            elif not self.happens(1):
                labels = self.labels() if self.happens(4) else kept["metadata"]["labels"]
                after.append({**kept, "metadata": {**kept["metadata"], "labels": labels}})
        return after

    def see(self, lab: Lab) -> None:
        """The blocks worth asking for in this lab: outside, nodes, ranges of Pods, single Pods."""
        pods = [str(address) for found in lab.pods() for address in found.addresses]
        one, other = self.sample(pods, 2)
        v4 = [address for address in pods if "." in address]
        self.blocks = [
            {"cidr": "0.0.0.0/0"},
            {"cidr": "::/0", "except": [f"{names.outside().addresses[1]}/128"]},
            {"cidr": "172.30.0.0/24", "except": ["172.30.0.11/32"]},
            {"cidr": "172.30.0.0/29"},
            {"cidr": "fd30::/64", "except": ["fd30::8/125"]},
            {"cidr": "10.244.0.0/16", "except": [f"{address}/32" for address in self.sample(v4, 2)]},
            {"cidr": "10.244.0.0/16", "except": [f"10.244.1.{n}/32" for n in range(1, 60, 2)]},
            {"cidr": "fd00:10:244:1::/64", "except": ["fd00:10:244:1::4/126"]},
            {"cidr": f"{one}/{32 if '.' in one else 128}"},
            {"cidr": f"{other}/{32 if '.' in other else 128}"},
            {"cidr": "10.244.2.0/24"},
        ]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2) as made:
        yield made


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_packets_pass_as_documented_whatever_was_before(lab: Lab, seed: int) -> None:
    chance, objects, policies = Chance(seed), [], []
    verdicts: Counter[bool] = Counter()
    for number in range(STATES):
        objects = chance.next(objects)
        if number in (0, 3):  # else Pods and policies change at once, and addresses are those of before
            lab.apply([*objects, *policies], prune=True)
        chance.see(lab)
        policies = chance.policies()
        lab.apply([*objects, *policies], prune=True)

        seen = expected_matrix(lab)

        wrong = [str(result) for result in seen.results if not result.good]
        assert not wrong, f"seed {seed}, state {number}: {wrong}\n" + "\n".join(map(json.dumps, policies))
        verdicts.update(result.connected for result in seen.results)
    assert sum(verdicts.values()) > PAIRS
    assert min(verdicts.values()) > PAIRS // 4
    print(f"seed {seed}: {verdicts[True]} pairs connected, {verdicts[False]} denied")
