"""The example's Services on three nodes: each file does what its first lines promise, over both families."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from lab import names
from lab.objects import key_of
from lab.probe import REFUSED, SILENT, UDP, UNREACHABLE
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.services import (
    FAMILIES,
    Asking,
    answers,
    eventually,
    example,
    named,
    of_version,
    pods_answering,
    pods_of,
    service,
    wait_for_frontends,
)

FILES = ("client", "cluster-ip", "ports", "node-port", "no-selector", "session-affinity", "policy")
NODES = ("node1", "node2", "node3")
INSIDE = ("client", *NODES)
LEGACY = ip_address("203.0.113.10")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=3, given=example(*FILES)) as made:
        every_node_follows(made)
        wait_for_frontends(made, "my-app", "spread", "sticky", "legacy", "guarded/api")
        open_to_nodes = [
            Asking(node, address, service.ports[0].port)
            for node in NODES
            for service in made.services()
            for address in service.cluster_addresses
            if service.namespace == "default"
        ]
        seen = eventually(lambda: pods_answering(made, open_to_nodes), lambda seen: {""} not in seen)
        assert {""} not in seen
        yield made


def own_address(lab: Lab, source: str, version: int) -> object:
    """The address by which a Pod or a node is known to others."""
    place = lab.pod(source) if source == "client" else lab.node(source)
    return of_version(place.addresses, version)


# cluster-ip.yaml


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("source", INSIDE)
def test_every_pod_answers_evenly_and_sees_who_asks(lab: Lab, source: str, version: int) -> None:
    found = answers(lab, source, lab.service("my-app").address(version), 80, times=90)
    counted = pods_of(found)

    assert set(counted) == named(lab, "default/my-app-")
    assert min(counted.values()) > 8, counted  # 30 expected; fewer than 9 once in a million
    assert {(answer.client, answer.reached_port) for answer in found if answer} == {
        (own_address(lab, source, version), 8080)
    }


# ports.yaml


@pytest.mark.parametrize("version", FAMILIES)
def test_each_port_reaches_its_own(lab: Lab, version: int) -> None:
    address = lab.service("two-ports").address(version)
    for number, target in ((80, 8080), (9090, 9090)):
        found = answers(lab, "client", address, number, times=30)
        assert set(pods_of(found)) == named(lab, "default/shop-1-")
        assert {answer.reached_port for answer in found if answer} == {target}


@pytest.mark.parametrize("version", FAMILIES)
def test_a_named_port_is_another_number_on_other_pods(lab: Lab, version: int) -> None:
    found = answers(lab, "client", lab.service("named-port").address(version), 80, times=90)

    seen = {(answer.pod, answer.reached_port) for answer in found if answer}
    assert seen == {(name, 8080) for name in named(lab, "default/shop-1-")} | {
        (name, 8081) for name in named(lab, "default/shop-2-")
    }


# node-port.yaml


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("node", NODES)
def test_every_nodes_address_answers_on_the_node_port(lab: Lab, node: str, version: int) -> None:
    [pod] = [found for found in lab.pods() if found.full_name.startswith("default/on-nodes-")]
    address = of_version(lab.node(node).addresses, version)
    outside = of_version(lab.outside.addresses, version)
    kept = {source: own_address(lab, source, version) for source in INSIDE}
    # From outside through a node without the Pod the answer has to come back the same way.
    kept["outside"] = outside if node == pod.node else address

    for number in (30080, lab.service("on-nodes-anywhere").node_port):
        for source, client in kept.items():
            [answer] = answers(lab, source, address, number)
            assert answer, (source, number)
            assert (answer.pod, answer.client, answer.reached_port) == (pod.full_name, client, 8080), source


def test_a_node_port_is_not_on_loopback(lab: Lab) -> None:
    for node in NODES:
        assert lab.connect(node, "127.0.0.1", 30080) == REFUSED
        assert lab.connect(node, "::1", 30080) == REFUSED


def test_a_node_port_that_is_left_out_is_chosen(lab: Lab) -> None:
    chosen = lab.service("on-nodes-anywhere").node_port
    assert 30000 <= chosen <= 32767
    assert chosen != 30080


# no-selector.yaml


@pytest.mark.parametrize("name", ["legacy", "older-legacy"])
@pytest.mark.parametrize("source", INSIDE)
def test_endpoints_outside_the_cluster(lab: Lab, source: str, name: str) -> None:
    node = lab.pod(source).node if source == "client" else source

    [answer] = answers(lab, source, lab.service(name).address(4), 80)

    assert answer
    assert (answer.pod, answer.reached, answer.reached_port) == ("outside", LEGACY, 80)
    assert answer.client == of_version(lab.node(node).addresses, 4)


# session-affinity.yaml


@pytest.mark.parametrize("version", FAMILIES)
def test_without_affinity_a_client_is_spread(lab: Lab, version: int) -> None:
    found = answers(lab, "client", lab.service("spread").address(version), 80, times=40)

    assert set(pods_of(found)) == named(lab, "default/sessions-")


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("source", INSIDE)
def test_with_affinity_a_client_stays_with_one_pod(lab: Lab, source: str, version: int) -> None:
    counted = pods_of(answers(lab, source, lab.service("sticky").address(version), 80, times=40))

    assert len(counted) == 1
    assert set(counted) < named(lab, "default/sessions-")


def first_answers(lab: Lab, name: str) -> dict[tuple[str, int], str]:
    """Which Pod answers each client inside the cluster, over each family."""
    service = lab.service(name)
    clients = [(source, version) for source in INSIDE for version in FAMILIES]
    seen = pods_answering(lab, [Asking(source, service.address(version), 80) for source, version in clients])
    return {client: pod for client, (pod,) in zip(clients, seen, strict=True)}


def every_node_leads_to(lab: Lab, pods: set[str]) -> None:
    """Wait until each node leads to all of these Pods and to no other: each of them follows by itself."""
    service = lab.service("spread")

    def seen() -> dict[tuple[str, int], set[str]]:
        return {
            (source, version): set(pods_of(answers(lab, source, service.address(version), 80, times=60)))
            for source in INSIDE
            for version in FAMILIES
        }

    found = eventually(seen, lambda found: all(each == pods for each in found.values()))
    assert all(each == pods for each in found.values())


def test_affinity_outlives_the_coming_and_going_of_others(lab: Lab) -> None:
    before = first_answers(lab, "sticky")
    [sessions] = [item for item in example("session-affinity") if item["kind"] == "Deployment"]
    others = sorted(named(lab, "default/sessions-") - {before["client", 4]})

    lab.apply([{**sessions, "spec": {**sessions["spec"], "replicas": 5}}])
    everybody = named(lab, "default/sessions-")
    every_node_leads_to(lab, everybody)
    assert first_answers(lab, "sticky") == before

    lab.set_ready(others[0], False)
    every_node_leads_to(lab, everybody - {others[0]})
    stays = {client: pod for client, pod in before.items() if pod != others[0]}
    after = first_answers(lab, "sticky")
    assert {client: after[client] for client in stays} == stays
    assert others[0] not in after.values()
    assert first_answers(lab, "sticky") == after

    lab.set_ready(others[0], True)
    every_node_leads_to(lab, everybody)
    assert first_answers(lab, "sticky") == after

    lab.apply([sessions])
    every_node_leads_to(lab, named(lab, "default/sessions-"))


def sticking(lab: Lab, seconds: int) -> int:
    """How many clients the nodes remember for so long."""
    listing = ["nft", "-j", "list", "table", "inet", "podwall_services"]
    return sum(_timed(json.loads(lab.run(node, listing).stdout), seconds) for node in NODES)


def _timed(value: Any, seconds: int) -> int:
    """How many elements with this timeout are running out."""
    if isinstance(value, dict):
        here = value.get("timeout") == seconds and "expires" in value
        return here + sum(_timed(each, seconds) for each in value.values())
    return sum(_timed(each, seconds) for each in value) if isinstance(value, list) else 0


def test_affinity_ends_when_its_time_is_over(lab: Lab) -> None:
    first = first_answers(lab, "briefly-sticky")
    asked = time.monotonic()
    assert first_answers(lab, "briefly-sticky") == first
    answered = time.monotonic()
    looked: list[float] = []  # when somebody was still remembered

    def remembered() -> int:
        began, count = time.monotonic(), sticking(lab, 2)
        looked.extend([began] if count else [])
        return count

    assert eventually(remembered, (0).__eq__) == 0
    assert time.monotonic() - asked > 1.9
    assert looked, "nobody is remembered"
    assert looked[-1] - answered < 2.5
    assert first_answers(lab, "briefly-sticky") != first  # the same by chance: once in 6,000 runs


# policy.yaml: what its first lines say; every other way in is tried in test_lab_service_denied.py


@pytest.mark.parametrize("version", FAMILIES)
def test_friend_is_admitted_and_stranger_is_not(lab: Lab, version: int) -> None:
    api = lab.service("guarded/api").address(version)
    everybody = named(lab, "guarded/api-")
    asked = {name: Asking(f"guarded/{name}", api, 80) for name in ("friend", "stranger", "prisoner")}
    asked["itself"] = Asking(min(everybody), api, 80)

    found = dict(zip(asked, pods_answering(lab, list(asked.values()), times=30), strict=True))

    assert found == {"friend": everybody, "itself": everybody, "stranger": {""}, "prisoner": {""}}


def test_an_outside_client_is_judged_by_its_own_address_where_that_is_kept(lab: Lab) -> None:
    serving = {pod.node: pod.full_name for pod in lab.pods() if pod.full_name.startswith("guarded/api-")}
    expected = {}
    for version in FAMILIES:
        near, far = (of_version(each, version) for each in (lab.outside.addresses, names.BEHIND_OUTSIDE))
        for node in NODES:
            here = serving.get(node, "")
            address = of_version(lab.node(node).addresses, version)
            expected[Asking("outside", address, 30017, far)] = {here}
            expected[Asking("outside", address, 30016, far)] = {here, ""}
            expected[Asking("outside", address, 30017, near)] = {""}

    assert dict(zip(expected, pods_answering(lab, list(expected), times=20), strict=True)) == expected


# Nobody there: refused at once, not a time-out


def refusals(source: str, protocol: str) -> set[str]:
    """How a refusal looks: a datagram of the node's own is not sent at all (EPERM)."""
    return {REFUSED, UNREACHABLE} if source in NODES and protocol == UDP else {REFUSED}


@pytest.mark.parametrize("protocol", ["TCP", UDP])
@pytest.mark.parametrize("version", FAMILIES)
def test_without_endpoints_a_connection_is_refused_at_once(lab: Lab, version: int, protocol: str) -> None:
    nobody = service("default/nobody", {"app": "matches-nothing"}, type="NodePort")
    lab.apply([nobody])
    try:
        there = lab.service("nobody")
        number = next(each.node_port for each in there.ports if each.protocol == protocol)
        node = of_version(lab.node("node2").addresses, version)
        for source, address, asked in (
            ("client", there.address(version), 80),
            ("node1", there.address(version), 80),
            ("client", node, number),
            ("node1", node, number),
            ("node2", node, number),
            ("outside", node, number),
        ):
            refused = refusals(source, protocol)
            seen = eventually(
                lambda: lab.connect(source, address, asked, protocol),  # noqa: B023 - called at once
                refused.__contains__,
            )
            assert seen in refused, source

            def seconds() -> float:
                began = time.monotonic()
                assert lab.connect(source, address, asked, protocol) in refused  # noqa: B023 - called at once
                return time.monotonic() - began

            assert eventually(seconds, lambda took: took < 0.5) < 0.5, source
    finally:
        lab.delete([key_of(nobody)])


@pytest.mark.parametrize("protocol", ["TCP", UDP])
@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("source", ["client", "node1"])
def test_a_port_that_no_service_has_is_refused(lab: Lab, source: str, version: int, protocol: str) -> None:
    seen = lab.connect(source, lab.service("my-app").address(version), 81, protocol)
    assert seen in refusals(source, protocol)


@pytest.mark.parametrize("version", FAMILIES)
def test_a_wrong_target_port_is_refused_by_the_pod(lab: Lab, version: int) -> None:
    wrong = service("default/wrong-target", {"app": "my-app"}, {"port": 80, "targetPort": 7})
    lab.apply([wrong])
    try:
        address = lab.service("wrong-target").address(version)
        seen = eventually(lambda: lab.connect("client", address, 80), REFUSED.__eq__)
        assert seen == REFUSED
    finally:
        lab.delete([key_of(wrong)])


def test_a_service_that_is_gone_is_nowhere(lab: Lab) -> None:
    short = service("default/short", {"app": "my-app"}, type="NodePort")
    lab.apply([short])
    there, node = lab.service("short"), of_version(lab.node("node1").addresses, 4)
    seen = eventually(lambda: lab.connect("outside", node, there.node_port), "connected".__eq__)
    assert seen == "connected"

    lab.delete([key_of(short)])

    assert eventually(lambda: lab.connect("outside", node, there.node_port), REFUSED.__eq__) == REFUSED
    nowhere = {REFUSED, SILENT, UNREACHABLE}
    for source in INSIDE:
        seen = eventually(lambda: lab.connect(source, there.address(4), 80), nowhere.__contains__)  # noqa: B023
        assert seen in nowhere, source
