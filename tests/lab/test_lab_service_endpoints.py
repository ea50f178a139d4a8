"""Which Pods answer for a Service: readiness, traffic policies, hints, and how soon a change is followed.

node1 (zone a)   web-1, client-1
node2 (zone b)   web-2, client-2
node3 (zone a)          client-3
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from threading import Thread
from typing import Any

import pytest

from lab import netns
from lab.limits import SLOWNESS
from lab.names import Address
from lab.objects import Object, key_of
from lab.probe import CONNECTED, REFUSED, SILENT, TCP, UDP
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.load import Datagrams, Load
from tests.lab.policies import pod
from tests.lab.services import (
    FAMILIES,
    LIMIT,
    SOON,
    answers,
    eventually,
    of_version,
    pods_of,
    service,
    wait_for_frontends,
)

WEB = {"app": "web"}
WEB_1, WEB_2 = "default/web-1", "default/web-2"
BOTH = {WEB_1, WEB_2}
EXTERNAL = {4: ip_address("198.51.100.7"), 6: ip_address("2001:db8:51::7")}
NODES = ("node1", "node2", "node3")
CLIENTS = ("client-1", "client-2", "client-3")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    pods = [pod(f"default/web-{number}", 8080, node=f"node{number}", labels=WEB) for number in (1, 2)]
    clients = [pod(f"default/client-{number}", node=f"node{number}") for number in (1, 2, 3)]
    networks = ",".join(str(address) for address in EXTERNAL.values())
    with Lab(nodes=3, given=[*pods, *clients], flags={"external-ips": networks}) as made:
        yield made


@pytest.fixture(autouse=True)
def all_ready(lab: Lab) -> Iterator[None]:
    """A test that fails leaves the web Pods ready for the next one."""
    yield
    for name in ("web-1", "web-2"):
        lab.set_ready(name, True)


@contextmanager
def serving(lab: Lab, name: str, **spec: Any) -> Iterator[None]:
    """A Service of this name in front of both web Pods, in force everywhere."""
    made = service(f"default/{name}", WEB, **spec)
    lab.apply([made])
    wait_for_frontends(lab, name)
    every_node_follows(lab)
    try:
        yield
    finally:
        lab.delete([key_of(made)])


def seen_from(
    lab: Lab,
    source: str,
    address: Address,
    number: int = 80,
    *,
    wanted: set[str] | None = None,
    protocol: str = TCP,
) -> set[str]:
    """Who answers there; "" for nobody. Waits for those wanted."""
    return eventually(
        lambda: set(pods_of(answers(lab, source, address, number, protocol, times=24, quiet=SOON))),
        lambda seen: seen == (BOTH if wanted is None else wanted),
    )


# Readiness


@pytest.mark.parametrize("version", FAMILIES)
def test_traffic_follows_readiness(lab: Lab, version: int) -> None:
    with serving(lab, "ready"):
        address = lab.service("ready").address(version)
        assert seen_from(lab, "client-3", address) == BOTH
        lab.set_ready("web-1", False)
        assert seen_from(lab, "client-3", address, wanted={WEB_2}) == {WEB_2}
        lab.set_ready("web-2", False)
        assert eventually(lambda: lab.connect("client-3", address, 80), REFUSED.__eq__) == REFUSED
        lab.set_ready("web-1", True)
        assert seen_from(lab, "client-3", address, wanted={WEB_1}) == {WEB_1}
        lab.set_ready("web-2", True)
        assert seen_from(lab, "client-3", address) == BOTH


def test_not_ready_addresses_are_published_where_that_is_asked(lab: Lab) -> None:
    lab.set_ready("web-1", False)
    try:
        with serving(lab, "published", publishNotReadyAddresses=True):
            assert seen_from(lab, "client-3", lab.service("published").address(4)) == BOTH
    finally:
        lab.set_ready("web-1", True)


def test_terminating_pods_answer_when_nobody_else_does(lab: Lab) -> None:
    extra = [
        pod(f"default/extra-{number}", 8080, node=f"node{number}", labels={"app": "extra"})
        for number in (1, 2)
    ]
    made = service("default/extra", {"app": "extra"})
    lab.apply([*extra, made])
    try:
        address = lab.service("extra").address(6)
        everybody = {"default/extra-1", "default/extra-2"}
        assert seen_from(lab, "client-3", address, wanted=everybody) == everybody
        lab.begin_to_end("extra-1")
        assert seen_from(lab, "client-3", address, wanted={"default/extra-2"}) == {"default/extra-2"}
        lab.begin_to_end("extra-2")
        assert seen_from(lab, "client-3", address, wanted=everybody) == everybody
        lab.set_ready("extra-1", False)
        assert seen_from(lab, "client-3", address, wanted={"default/extra-2"}) == {"default/extra-2"}
    finally:
        lab.delete(key_of(item) for item in [*extra, made])


def test_a_change_is_followed_within_200_ms(lab: Lab) -> None:
    """From the slice in its file to the last connection to the Pod; the lab's agents look every 50 ms."""
    delays = []
    with serving(lab, "quick"):
        address = lab.service("quick").address(4)
        assert seen_from(lab, "client-3", address) == BOTH
        with Load(lab.netns("client-3"), address, 80, pause=0.002) as load:
            for _ in range(5):
                asked = len(load.tries)
                eventually(lambda: [each for each in load.tries[asked:] if each.pod == WEB_1], bool)  # noqa: B023
                lab.set_ready("web-1", False)
                written = time.monotonic()
                load.wait_for(100)
                late = [each.began - written for each in load.tries[asked:] if each.pod == WEB_1]
                delays.append(max(0.0, late[-1]))
                lab.set_ready("web-1", True)
            assert not load.failed
    assert statistics.median(delays) < 0.2 * SLOWNESS, delays
    assert max(delays) < LIMIT, delays


def test_a_pods_end_is_followed_by_all_who_ask(lab: Lab) -> None:
    """A Pod leaves the slices before it ends, as kubelet gives it time to: nobody is sent to it any more."""
    leaving = pod("default/leaving", 8080, node="node2", labels=WEB)
    lab.apply([leaving])
    try:
        with serving(lab, "steady", type="NodePort"):
            there = lab.service("steady")
            everybody = BOTH | {"default/leaving"}
            assert seen_from(lab, "client-1", there.address(6), wanted=everybody) == everybody
            outer = of_version(lab.node("node3").addresses, 4)
            assert seen_from(lab, "outside", outer, there.node_port, wanted=everybody) == everybody
            with (
                Load(lab.netns("client-1"), there.address(6), 80) as inside,
                Load(lab.netns("outside"), outer, there.node_port) as outside,
            ):
                inside.wait_for(50)
                lab.begin_to_end("leaving")
                assert seen_from(lab, "client-1", there.address(6)) == BOTH
                assert seen_from(lab, "outside", outer, there.node_port) == BOTH
                lab.delete([key_of(leaving)])
                inside.wait_for(50)
                outside.wait_for(50)
            assert inside.failed == outside.failed == []
    finally:
        lab.delete([key_of(leaving)])


# UDP flows


@pytest.mark.parametrize("version", FAMILIES)
def test_a_datagram_flow_leaves_a_removed_endpoint_at_once(lab: Lab, version: int) -> None:
    with serving(lab, "datagrams"):
        address = lab.service("datagrams").address(version)
        assert seen_from(lab, "client-1", address, protocol=UDP) == BOTH
        with Datagrams(lab.netns("client-1"), address, 80) as flow:
            first = flow.ask()
            assert first in BOTH
            assert {flow.ask() for _ in range(20)} == {first}
            [other] = BOTH - {first}
            name = first.removeprefix("default/")
            lab.set_ready(name, False)
            began = time.monotonic()
            assert eventually(lambda: flow.ask(SOON), other.__eq__) == other
            assert time.monotonic() - began < 1.0 * SLOWNESS
            lab.set_ready(name, True)
            assert {flow.ask() for _ in range(20)} == {other}  # a flow stays where it is good


@pytest.mark.parametrize("version", FAMILIES)
def test_a_datagram_flow_ends_with_the_last_endpoint_and_begins_with_the_first(
    lab: Lab, version: int
) -> None:
    with serving(lab, "last"):
        address = lab.service("last").address(version)
        assert seen_from(lab, "client-3", address, protocol=UDP) == BOTH
        with Datagrams(lab.netns("client-3"), address, 80) as flow:
            assert flow.ask() in BOTH
            for name in ("web-1", "web-2"):
                lab.set_ready(name, False)
            assert eventually(lambda: flow.ask(SOON), "refused".__eq__) == "refused"
            lab.set_ready("web-2", True)
            assert eventually(lambda: flow.ask(SOON), WEB_2.__eq__) == WEB_2
            lab.set_ready("web-1", True)


def test_a_datagram_flow_older_than_its_service_finds_it(lab: Lab) -> None:
    later = service("default/later", WEB, clusterIP="10.96.77.77", ipFamilyPolicy="SingleStack")
    with Datagrams(lab.netns("client-1"), ip_address("10.96.77.77"), 80) as flow:
        assert flow.ask() not in BOTH
        lab.apply([later])
        try:
            assert eventually(lambda: flow.ask(SOON), BOTH.__contains__) in BOTH
        finally:
            lab.delete([key_of(later)])


@pytest.mark.parametrize("version", FAMILIES)
def test_a_connection_older_than_its_service_finds_it(lab: Lab, version: int) -> None:
    """Its first SYN meets no Service and nobody; one that TCP sends again is translated."""
    address = ip_address({4: "10.96.77.78", 6: "fd00:10:96::7778"}[version])
    later = service(
        "default/early",
        WEB,
        clusterIP=str(address),
        ipFamilyPolicy="SingleStack",
        ipFamilies=[f"IPv{version}"],
    )
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    nobody = {4: "172.30.0.99", 6: "fd30::99"}[version]
    lab.run("node1", ["ip", "neigh", "replace", nobody, "lladdr", "02:00:00:00:00:99", "dev", "eth0"])
    lab.run("node1", ["ip", f"-{version}", "route", "replace", str(address), "via", nobody, "dev", "eth0"])
    with netns.run(lab.netns("client-1"), socket.socket, family, socket.SOCK_STREAM) as connection:
        connection.settimeout(LIMIT)
        connecting = Thread(target=connection.connect, args=((str(address), 80),))
        connecting.start()
        eventually(lambda: "SYN_SENT" in _flows(lab, "node1", address), bool)
        lab.apply([later])
        try:
            connecting.join(LIMIT)
            connection.sendall(b"name\n")
            assert connection.recv(4096).decode().strip() in BOTH
        finally:
            lab.delete([key_of(later)])
            lab.run("node1", ["ip", f"-{version}", "route", "del", str(address)])
            lab.run("node1", ["ip", "neigh", "del", nobody, "dev", "eth0"])


def _flows(lab: Lab, node: str, address: Address) -> str:
    """What connection tracking knows of an address, as the kernel lists it."""
    return "".join(
        line
        for line in lab.run(node, ["cat", "/proc/net/nf_conntrack"]).stdout.splitlines()
        if f"dst={address.exploded if address.version == 6 else address} " in line
    )


# Traffic policies and hints


@pytest.mark.parametrize("version", FAMILIES)
def test_internal_traffic_policy_local_stays_on_the_node(lab: Lab, version: int) -> None:
    with serving(lab, "inner", internalTrafficPolicy="Local"):
        address = lab.service("inner").address(version)
        for source in ("client-1", "node1"):
            assert seen_from(lab, source, address, wanted={WEB_1}) == {WEB_1}
        assert seen_from(lab, "client-2", address, wanted={WEB_2}) == {WEB_2}
        assert eventually(lambda: lab.connect("client-3", address, 80), REFUSED.__eq__) == REFUSED


@pytest.mark.parametrize("version", FAMILIES)
def test_external_traffic_policy_local_keeps_the_source(lab: Lab, version: int) -> None:
    outside = of_version(lab.outside.addresses, version)
    with serving(lab, "outer", type="NodePort", externalTrafficPolicy="Local"):
        there = lab.service("outer")
        for node, wanted in (("node1", WEB_1), ("node2", WEB_2)):
            address = of_version(lab.node(node).addresses, version)
            assert seen_from(lab, "outside", address, there.node_port, wanted={wanted}) == {wanted}
            [answer] = answers(lab, "outside", address, there.node_port)
            assert answer
            assert answer.client == outside
        without = of_version(lab.node("node3").addresses, version)
        assert eventually(lambda: lab.connect("outside", without, there.node_port), SILENT.__eq__) == SILENT
        # Who is inside is not meant by it.
        for source in ("client-3", "node3"):
            assert seen_from(lab, source, without, there.node_port) == BOTH
            assert seen_from(lab, source, there.address(version)) == BOTH


@pytest.mark.parametrize("version", FAMILIES)
def test_external_traffic_policy_cluster_answers_everywhere(lab: Lab, version: int) -> None:
    outside = of_version(lab.outside.addresses, version)
    with serving(lab, "outer", type="NodePort"):
        there = lab.service("outer")
        for node in NODES:
            address = of_version(lab.node(node).addresses, version)
            assert seen_from(lab, "outside", address, there.node_port) == BOTH
            for answer in answers(lab, "outside", address, there.node_port, times=10):
                assert answer
                here = lab.pod(answer.pod).node == node
                assert answer.client == (outside if here else address)


def test_terminating_local_pods_answer_from_outside_when_no_other_local_one_does(lab: Lab) -> None:
    """KEP-1669: a load balancer still sends to the node while its only Pod ends."""
    ending = pod("default/ending", 8080, node="node3", labels=WEB)
    lab.apply([ending])
    try:
        with serving(lab, "outer", type="NodePort", externalTrafficPolicy="Local"):
            there, address = lab.service("outer"), of_version(lab.node("node3").addresses, 4)
            mine = {"default/ending"}
            assert seen_from(lab, "outside", address, there.node_port, wanted=mine) == mine
            lab.begin_to_end("ending")
            inside = there.address(4)
            assert seen_from(lab, "client-3", inside) == BOTH
            assert seen_from(lab, "outside", address, there.node_port, wanted=mine) == mine
    finally:
        lab.delete([key_of(ending)])


@pytest.mark.parametrize(
    ("distribution", "wanted"),
    [
        ("PreferSameZone", {"client-1": {WEB_1}, "client-2": {WEB_2}, "client-3": {WEB_1}}),
        ("PreferSameNode", {"client-1": {WEB_1}, "client-2": {WEB_2}, "client-3": {WEB_1}}),
    ],
)
def test_traffic_stays_near_where_that_is_preferred(
    lab: Lab, distribution: str, wanted: dict[str, set[str]]
) -> None:
    with serving(lab, "near", trafficDistribution=distribution):
        address = lab.service("near").address(4)
        for source, pods in wanted.items():
            assert seen_from(lab, source, address, wanted=pods) == pods
        lab.set_ready("web-1", False)
        assert seen_from(lab, "client-1", address, wanted={WEB_2}) == {WEB_2}
        lab.set_ready("web-1", True)


# Ways in


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("version", FAMILIES)
def test_hairpin(lab: Lab, version: int, protocol: str) -> None:
    lab.apply([alone := service("default/alone", {"app": "alone"}, type="NodePort"), mine := _alone()])
    try:
        wait_for_frontends(lab, "alone")
        there, own = lab.service("alone"), lab.pod("alone").address(version)
        node = of_version(lab.node("node2").addresses, version)
        number = next(each.node_port for each in there.ports if each.protocol == protocol)
        for address, asked in ((there.address(version), 80), (node, number)):
            wanted = {"default/alone"}
            assert seen_from(lab, "alone", address, asked, wanted=wanted, protocol=protocol) == wanted
            [answer] = answers(lab, "alone", address, asked, protocol)
            assert answer
            assert answer.client != own  # else the answer would not come back through the node
    finally:
        lab.delete(key_of(item) for item in (alone, mine))


def _alone() -> Object:
    return pod("default/alone", 8080, node="node2", labels={"app": "alone"})


@pytest.mark.parametrize("version", FAMILIES)
def test_external_addresses(lab: Lab, version: int) -> None:
    address = EXTERNAL[version]
    via = of_version(lab.node("node3").addresses, version)
    with serving(lab, "external", externalIPs=[str(each) for each in EXTERNAL.values()]):
        lab.run("outside", ["ip", f"-{version}", "route", "replace", str(address), "via", str(via)])
        for source in ("client-1", "node2", "outside"):
            assert seen_from(lab, source, address) == BOTH, source
        client = lab.pod("client-1").address(version)
        assert {answer.client for answer in answers(lab, "client-1", address, 80, times=10) if answer} == {
            client
        }
        lab.run("outside", ["ip", f"-{version}", "route", "del", str(address)])


def test_an_external_address_that_is_not_allowed_is_not_served(lab: Lab) -> None:
    own = str(lab.outside.addresses[0])
    with serving(lab, "hostile", externalIPs=[own, "10.244.1.200"]):
        assert seen_from(lab, "client-1", lab.service("hostile").address(4)) == BOTH
        assert lab.probe("client-1", own, 8080).answer == "outside"
        assert lab.connect("client-1", own, 80) == CONNECTED
        assert lab.probe("client-1", own, 80).answer == "outside"


@pytest.mark.parametrize("version", FAMILIES)
def test_host_ports(lab: Lab, version: int) -> None:
    hosting = pod("default/hosting", 8080, node="node1")
    hosting["spec"]["containers"][0]["ports"] = [
        {"containerPort": 8080, "hostPort": 18080},
        {"containerPort": 8080, "hostPort": 18080, "protocol": "UDP"},
    ]
    lab.apply([hosting])
    try:
        address = of_version(lab.node("node1").addresses, version)
        outside = of_version(lab.outside.addresses, version)
        for protocol in (TCP, UDP):
            for source, client in (
                ("outside", outside),
                ("client-1", lab.pod("client-1").address(version)),
                ("client-2", lab.pod("client-2").address(version)),
                ("node2", of_version(lab.node("node2").addresses, version)),
                ("node1", address),
            ):
                [answer] = answers(lab, source, address, 18080, protocol)
                assert answer, (source, protocol)
                assert (answer.pod, answer.client, answer.reached_port) == ("default/hosting", client, 8080)
            [itself] = answers(lab, "hosting", address, 18080, protocol)
            assert itself
            assert itself.pod == "default/hosting"
            other = of_version(lab.node("node2").addresses, version)
            assert lab.connect("outside", other, 18080, protocol) == REFUSED
    finally:
        lab.delete([key_of(hosting)])
    assert eventually(lambda: lab.connect("outside", address, 18080), REFUSED.__eq__) == REFUSED
