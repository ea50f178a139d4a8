"""The whole lab: agents, the CNI binary, Pods and packets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from lab import manifests, netns, state
from lab.limits import SLOWNESS
from lab.objects import ManifestError, Object, key_of
from lab.probe import CONNECTED, REFUSED, SILENT, UNREACHABLE
from lab.processes import until
from lab.world import Lab, LabError, PodsError

FAMILIES = [4, 6]


def pod(name: str, spec: str = "", metadata: str = "") -> Object:
    container = "containers: [{name: c, ports: [{containerPort: 8080}]}]"
    text = f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}{metadata}}}\nspec: {{{container}{spec}}}"
    return manifests.parse(text, "test")[0]


@contextmanager
def applied(lab: Lab, *objects: Object) -> Iterator[None]:
    """Objects that are there for a while."""
    try:
        lab.apply(objects)
        yield
    finally:
        lab.delete(key_of(item) for item in objects)


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("source", ["hello/client", "data/db-0", "data/db-1", "node1", "node2"])
def test_a_pod_answers_pods_and_nodes(lab: Lab, source: str, protocol: str, version: int) -> None:
    for target in ("data/db-0", "data/db-1", "hello/web"):
        found = lab.pod(target)
        if found.full_name != source:
            outcome = lab.probe(source, found.address(version), 9090, protocol)
            assert (outcome.verdict, outcome.answer) == (CONNECTED, found.full_name)


def test_a_port_nobody_listens_on_is_refused(lab: Lab) -> None:
    assert lab.connect("hello/client", lab.pod("data/db-0").address(4), 7) == REFUSED
    assert lab.connect("hello/client", lab.pod("data/db-0").address(6), 7, "UDP") == REFUSED


@pytest.mark.parametrize("version", FAMILIES)
def test_pods_keep_their_address_inside_and_get_their_nodes_outside(lab: Lab, version: int) -> None:
    client, server = lab.pod("hello/client"), lab.pod("data/db-0")
    outside = next(address for address in lab.outside.addresses if address.version == version)
    node = next(address for address in lab.node(client.node).addresses if address.version == version)

    inside = lab.probe("hello/client", server.address(version), 8080, ask="peer").answer.split()[0]
    beyond = lab.probe("hello/client", outside, 8080, ask="peer").answer.split()[0]

    assert ip_address(inside) == client.address(version)
    assert ip_address(beyond) == node


def test_scaling_touches_only_what_it_adds_and_removes(lab: Lab) -> None:
    web = next(
        item for item in manifests.read([manifests.Path("examples/hello")]) if item["kind"] == "Deployment"
    )
    before = {found.full_name: found for found in lab.pods()}
    five = {**web, "spec": {**web["spec"], "replicas": 5}}

    more = lab.apply([five])
    with_more = {found.full_name: found for found in lab.pods()}
    less = lab.apply([web])

    assert len(more.started) == 2
    assert not more.stopped
    assert {name: with_more[name] for name in before} == before
    assert set(less.stopped) == set(more.started)
    assert {found.full_name: found for found in lab.pods()} == before


def test_other_labels_change_in_place_and_another_spec_makes_it_anew(lab: Lab) -> None:
    with applied(lab, pod("one")):
        first = lab.pod("one")
        lab.apply([pod("one", metadata=", labels: {app: x}")])
        labelled = lab.pod("one")
        lab.apply([pod("one", ", priorityClassName: other", ", labels: {app: x}")])
        anew = lab.pod("one")

    assert (labelled.uid, labelled.addresses, dict(labelled.labels)) == (
        first.uid,
        first.addresses,
        {"app": "x"},
    )
    assert anew.uid != first.uid
    assert not set(anew.addresses) & set(first.addresses)


def conditions(lab: Lab) -> dict[str, tuple[bool, bool, bool]]:
    """Ready, serving, terminating of each endpoint of the Service `one`, by its Pod."""
    of = {"kubernetes.io/service-name": "one"}.items()
    slices = [item for key, item in lab.objects().items() if key.kind == "EndpointSlice"]
    return {
        endpoint["targetRef"]["name"]: tuple(endpoint["conditions"].values())
        for item in slices
        if of <= item["metadata"]["labels"].items()
        for endpoint in item["endpoints"]
    }


def test_slices_follow_readiness_and_the_end_of_pods(lab: Lab) -> None:
    label = ", labels: {app: one}"
    service = "{apiVersion: v1, kind: Service, metadata: {name: one}, spec: {selector: {app: one}}}"
    with applied(
        lab, pod("one", metadata=label), pod("two", metadata=label), *manifests.parse(service, "test")
    ):
        assert conditions(lab) == {"one": (True, True, False), "two": (True, True, False)}

        lab.set_ready("one", False)
        assert conditions(lab) == {"one": (False, False, False), "two": (True, True, False)}
        lab.set_ready("one", True)
        lab.begin_to_end("two")
        assert conditions(lab) == {"one": (True, True, False), "two": (False, True, True)}
        assert lab.connect("hello/client", lab.pod("two").address(4), 8080) == CONNECTED

        lab.apply([pod("two", metadata=label)])
        assert conditions(lab) == {"one": (True, True, False), "two": (True, True, False)}


def test_a_removed_pod_leaves_nothing(lab: Lab) -> None:
    with applied(lab, pod("one")):
        found = lab.pod("one")
        assert found.netns.exists()
        assert found.host_link in lab.run(found.node, ["ip", "-o", "link"]).stdout

    assert not found.netns.exists()
    links = ["ip", "-o", "link"]
    until(
        lambda: found.host_link not in lab.run(found.node, links).stdout,
        5,
        lambda: f"{found.host_link} stays",
    )
    assert not [box for box in lab.runtimes[found.node].sandboxes() if box.pod == "one"]
    assert lab.connect("hello/client", found.address(4), 8080) in {SILENT, UNREACHABLE}


def test_a_flow_lives_while_others_come_and_go(lab: Lab) -> None:
    with lab.socket("hello/client", socket.AF_INET6, socket.SOCK_STREAM) as flow:
        flow.settimeout(5 * SLOWNESS)
        flow.connect((str(lab.pod("data/db-0").address(6)), 8080))
        flow.sendall(b"stream 5\n")
        with flow.makefile("rb") as lines, applied(lab, pod("one"), pod("two")):
            seen = [int(lines.readline().split()[1]) for _ in range(50)]

    assert seen == list(range(50))


def test_a_host_network_pod_is_its_node(lab: Lab) -> None:
    with applied(lab, pod("host", ", hostNetwork: true, nodeName: node2")):
        found = lab.pod("host")
        outcome = lab.probe("hello/client", found.address(4), 8080)

    assert found.addresses == lab.node("node2").addresses
    assert outcome.answer == "default/host"


def test_a_pod_that_fails_is_named_and_the_others_start(lab: Lab) -> None:
    spec = ", hostNetwork: true, nodeName: node1"
    objects = [pod("first", spec), pod("second", spec), pod("third")]
    try:
        with pytest.raises(PodsError, match=r"Pod default/(first|second): .* cannot listen: .*8080"):
            lab.apply(objects)
        assert lab.connect("hello/client", lab.pod("third").address(4), 8080) == CONNECTED
        waiting = [found for found in lab.pods() if found.phase == "Pending"]
        assert len(waiting) == 1
        assert "cannot listen" in waiting[0].message
    finally:
        lab.delete(key_of(item) for item in objects)


def test_a_bad_manifest_changes_nothing(lab: Lab) -> None:
    before = lab.objects()

    with pytest.raises(ManifestError, match="nowhere"):
        lab.apply([pod("good"), pod("bad", metadata=", namespace: nowhere")])

    assert lab.objects() == before


def test_pods_outlive_their_agent_and_new_ones_need_it(lab: Lab) -> None:
    agent = lab.agents["node1"]
    target = next(found for found in lab.pods() if found.node == "node1" and found.ports)
    agent.stop(kill=True)
    try:
        assert not agent.alive
        assert agent.not_ready()
        assert lab.connect("data/db-1", target.address(6), 8080) == CONNECTED
    finally:
        agent.start()
        lab.wait_until_ready()

    with applied(lab, pod("one", ", nodeName: node1")):
        assert lab.connect("data/db-1", lab.pod("one").address(4), 8080) == CONNECTED


def test_a_capture_hears_what_a_pod_hears(lab: Lab) -> None:
    target = lab.pod("data/db-0")
    with lab.capture("data/db-0") as heard, lab.capture(target.node, target.host_link) as before:
        lab.connect("hello/client", target.address(4), 8080)
        lab.connect("hello/client", target.address(4), 9090, "UDP")

        for capture in (heard, before):
            assert capture.wait(lambda frame: Ether(frame).haslayer(TCP) and Ether(frame)[TCP].dport == 8080)
            frame = capture.wait(lambda frame: Ether(frame).haslayer(UDP) and Ether(frame)[UDP].dport == 9090)
            assert frame
            assert Ether(frame)[IP].dst == str(target.address(4))


@pytest.mark.parametrize("name", ["hello/nobody", "web", "node9", "../etc"])
def test_an_unknown_pod_is_told_with_those_that_there_are(lab: Lab, name: str) -> None:
    with pytest.raises(LabError, match=r"there are: .*data/db-0"):
        lab.pod(name)


def test_there_is_one_lab_at_a_time(lab: Lab) -> None:
    with pytest.raises(LabError, match="a lab is up"):
        Lab().up()

    assert state.read_settings() == lab.settings
    assert Lab.attach().pods() == lab.pods()
    assert netns.path("podwall-lab-node1").exists()
