"""`why` leads a packet to the endpoints that the documentation names, over random clusters of Services.

Those clusters have what real packets in the lab have not: endpoints that end, hints for zones and nodes,
addresses and ports that several Services want, Services of other proxies.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import given

from agent.cluster.store import snapshot_of
from agent.compile.service import ServiceSettings
from agent.explain.answer import Answer
from agent.explain.question import Question
from agent.explain.way import why
from agent.explain.world import Address, End, World
from tests.agent.compile.service_oracle import Fate, Probe, ServiceOracle
from tests.agent.compile.service_worlds import NODE
from tests.agent.compile.test_service_property import (
    ALLOWED,
    LIMITED,
    LINKS,
    OWN,
    PROBES,
    SEEDS,
    SETTINGS,
    Chance,
)
from tests.agent.compile.worlds import decoded, pod

PODS = (
    pod("shop/one", "10.244.0.2", "fd00:244::2", node=NODE),
    pod("shop/two", "10.244.0.3", "fd00:244::3", node=NODE),
    pod("shop/three", "10.244.1.2", "fd00:244:1::2", node="node-2"),
    pod("shop/four", "10.244.1.3", node="node-2"),
)
ONLY_THE_KERNEL_KNOWS = "10.8.0.1"
"""An address of the node that its Node does not say."""


OTHER_NODE = {"192.168.10.2", "fd00:10::2"}


def asked(world: World, probe: Probe) -> Answer:
    source = ip_address(probe.source)
    sends: End = world.at(source) if probe.origin in {"pod", "node"} else Address(source)
    target = ip_address(probe.target)
    return why(
        world,
        Question(
            source=sends,
            target=world.at(target),
            port=probe.port,
            protocol=probe.protocol,  # type: ignore[arg-type]  # one of the three
            family=4 if source.version == 4 else 6,
            address=target,
            via="" if probe.origin in {"pod", "node"} else NODE,
        ),
    )


def fate(answer: Answer, probe: Probe) -> tuple[Fate, dict[tuple[str, int], str]]:
    """The answer in the oracle's words: where it may go, and from whom it goes on."""
    ends = {(str(each.address), each.port): each.seen_source for each, _ in answer.targets}
    if answer.cause == "no-such-port" and answer.sentence.endswith("refuses others"):
        return Fate("refused"), {}
    if answer.cause in {"not-served", "no-such-port"} or set(ends) == {(probe.target, probe.port)}:
        return Fate("untouched"), {}
    if not ends:
        silent = answer.cause == "source-ranges" or any(leg.silent for leg in answer.legs)
        return Fate("dropped" if silent else "refused"), {}
    sources = {
        end: "itself" if end[0] == probe.source and probe.origin == "pod" else "node" if seen else "kept"
        for end, seen in ends.items()
    }
    return Fate("endpoint", frozenset(ends)), sources


def comparable(chance: Chance) -> Iterator[Probe]:
    """Packets that this node alone decides about: others' Pods and nodes ask their own first."""
    for probe in chance.sample(PROBES, 300):
        from_elsewhere = probe.origin == "other pod" or probe.source in OTHER_NODE
        to_elsewhere = probe.origin == "outside" and probe.target in OTHER_NODE
        if (
            not from_elsewhere
            and not to_elsewhere
            and probe.target not in {ONLY_THE_KERNEL_KNOWS, probe.source}
        ):
            yield probe


def cluster(chance: Chance) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    return [*chance.cluster(), *PODS], chance.choice(LIMITED)


@SETTINGS
@given(SEEDS)
def test_it_names_the_endpoints_that_the_documentation_does(seed: int) -> None:
    chance = Chance(seed)
    manifests, limited = cluster(chance)
    oracle = ServiceOracle(manifests, NODE, OWN, ALLOWED, limited)
    settings = ServiceSettings(True, tuple(map(ip_network, ALLOWED)), tuple(map(ip_network, limited)))
    world = World(snapshot_of(map(decoded, manifests)), usual=settings)

    wrong: list[tuple[Any, ...]] = []
    for probe in comparable(chance):
        expected = oracle.fate(probe)
        if expected.outcome == "untouched" and probe.target in OTHER_NODE:
            continue  # that node decides, and `why` asks it
        answer = asked(world, probe)
        said = fate(answer, probe)
        sources = {each: oracle.source(probe, each, LINKS) for each in expected.endpoints}
        if said != (expected, sources):
            wrong.append((probe, answer.sentence, said, (expected, sources)))

    assert wrong == []
