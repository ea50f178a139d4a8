"""`podwall status` and `podwall get` on a lab: green only while it is true, and what is broken is named."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests, netns
from lab.processes import until
from lab.world import Lab
from tests.lab.following import every_node_follows

EXAMPLES = Path(__file__).parents[2] / "examples"
GIVEN = [EXAMPLES / name for name in ("hello", "policies", "services")]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=3, given=manifests.read(GIVEN)) as made:
        every_node_follows(made)
        yield made


def podwall(*words: str, expect: int = 0) -> str:
    done = CliRunner().invoke(main, [*words, "--lab"])
    assert done.exit_code == expect, done.output[:2000]
    return done.output


def read(*words: str, expect: int = 0) -> Any:
    return json.loads(podwall(*words, "-o", "json", expect=expect))


@contextmanager
def dropping(lab: Lab, node: str, rule: str) -> Iterator[None]:
    """Somebody's table beside podwall's, which drops this."""
    nft(lab, node, "add table inet theirs")
    nft(lab, node, "add chain inet theirs c { type filter hook prerouting priority -500; }")
    nft(lab, node, f"add rule inet theirs c {rule} drop")
    try:
        yield
    finally:
        nft(lab, node, "delete table inet theirs")


def nft(lab: Lab, node: str, change: str) -> None:
    """Somebody's change of podwall's rules."""
    netns.run(
        netns.path(lab.node(node).netns), lambda: subprocess.run(["nft", change], check=True, timeout=10)
    )


def not_well() -> str:
    """The first line, once it is not well."""
    found: list[str] = []

    def ill() -> bool:
        done = CliRunner().invoke(main, ["status", "--lab"])
        found[:] = [done.output.splitlines()[0]]
        return done.exit_code == 1

    until(ill, 20, lambda: f"it stays well: {found}")
    return found[0]


def wait_until_well() -> None:
    podwall("status", "--wait", "--timeout", "30s")


# Status


def test_all_is_well_and_proved(lab: Lab) -> None:
    wait_until_well()
    said = read("status")
    assert (said["well"], said["findings"]) == (True, [])
    for node in said["nodes"]:
        outcomes = {(path["node"], path["family"]): path["ok"] for path in node["paths"]["paths"]}
        others = {place.name for place in lab.nodes} - {node["node"]}
        assert outcomes == {(other, family): True for other in others for family in (4, 6)}
        assert node["rules"]["compared"]
        assert all(each["there"] for each in node["features"]["features"])
        assert node["lag"]["ms"] < 1000
    assert podwall("status").splitlines()[0].startswith("all 3 nodes are well")


def test_a_cable_that_is_pulled_is_named_and_waited_for(lab: Lab) -> None:
    wait_until_well()
    lab.unplug("node2")
    try:
        first = not_well()
        assert first.startswith(
            "node2: it is cut off: no packet passes between its Pods and those of node1, node3"
        )
        begun = time.monotonic()
        waited = podwall("status", "--wait", "--timeout", "2s", expect=1)
        assert 2 <= time.monotonic() - begun < 15
        assert waited.startswith("waiting: node2: it is cut off")
    finally:
        lab.plug("node2")
    wait_until_well()


def test_one_way_that_is_shut_is_named(lab: Lab) -> None:
    wait_until_well()
    with dropping(lab, "node3", "ip saddr 10.244.1.0/24"):
        found = {(of["node"], of["text"]) for of in read("status", expect=1)["findings"]}
        lost = (
            "its Pods do not reach those of node3 over IPv4: no answer from 10.244.3.0 within 1.2 s (direct)"
        )
        assert ("node1", lost) in found
        (rule,) = (text for node, text in found if node == "node3" and "theirs" in text)
        assert rule.startswith(
            "table inet theirs, chain c (prerouting, a rule) drops what Pods send and receive"
        )
    wait_until_well()


def test_a_firewall_that_forwards_nothing_is_named(lab: Lab) -> None:
    wait_until_well()
    nft(lab, "node1", "add table ip filter")
    nft(lab, "node1", "add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    try:
        (finding,) = read("status", expect=1)["findings"]
        assert (finding["node"], finding["about"]) == ("node1", "path")
        assert finding["text"].startswith(
            "table ip filter, chain FORWARD (forward, policy drop) drops what Pods send"
        )
    finally:
        nft(lab, "node1", "delete table ip filter")
    wait_until_well()


def test_packets_of_the_pods_size_that_are_lost_are_told_apart(lab: Lab) -> None:
    wait_until_well()
    with dropping(lab, "node2", "meta length > 1400"):
        assert "small packets pass, those of 1450 bytes, the Pods' MTU, do not" in not_well()
    wait_until_well()


def test_a_rule_that_somebody_alters_is_found(lab: Lab) -> None:
    """Either while it is altered, or as a repair: the agent hears of it and puts it right."""
    wait_until_well()
    before = repairs("node1")
    nft(lab, "node1", "flush chain inet podwall leave_cluster")
    until(lambda: repairs("node1") > before, 10, lambda: "nothing was put right")
    wait_until_well()
    (remark,) = (of for of in read("status")["remarks"] if "somebody changed podwall's rules" in of)
    assert remark.startswith("node1: ")
    assert "(inet podwall)" in remark
    chain = lab.run("node1", ["nft", "list", "chain", "inet", "podwall", "leave_cluster"]).stdout
    assert "from a Pod to outside the cluster" in chain


def repairs(node: str) -> int:
    said = json.loads(CliRunner().invoke(main, ["status", "--lab", "-o", "json"]).output)
    (found,) = (each for each in said["nodes"] if each["node"] == node)
    return int(found["status"]["repairs"]["total"])


def test_an_agent_that_is_stopped_is_named(lab: Lab) -> None:
    wait_until_well()
    lab.agents["node3"].stop()
    try:
        assert podwall("status", expect=1).startswith("node3: the agent does not answer on")
        said = read("get", "pods", "-A")
        assert said["silent"].keys() == {"node3"}
        assert {item["node"] for item in said["items"]} == {"node1", "node2"}
        assert "node3 is missing here" in podwall("get", "pods", "-A")
    finally:
        lab.agents["node3"].start()
        lab.wait_until_ready()
    wait_until_well()


def test_one_agent_alone_is_asked_by_its_socket(lab: Lab) -> None:
    said = CliRunner().invoke(main, ["status", "--socket", str(lab.agents["node1"].socket)]).output
    assert said.startswith("Node node1: ready")


# Get


def test_pods_are_those_of_the_lab_with_their_isolation(lab: Lab) -> None:
    items = {f"{of['namespace']}/{of['name']}": of for of in read("get", "pods", "-A")["items"]}
    expected = {
        pod.full_name: (pod.node, list(map(str, pod.addresses))) for pod in lab.pods() if pod.addresses
    }
    assert {name: (of["node"], of["addresses"]) for name, of in items.items()} == expected
    api = next(of for of in items.values() if of["namespace"] == "guarded" and of["name"].startswith("api-"))
    assert api["isolated"] == {"ingress": True, "egress": False}
    assert api["policies"] == {"ingress": ["guarded/api"], "egress": []}


def test_services_have_the_endpoints_that_answer(lab: Lab) -> None:
    (item,) = read("get", "services", "my-app")["items"]
    assert item["nodes"].keys() == {"node1", "node2", "node3"}
    pods = {pod.address(4) for pod in lab.pods() if pod.name.startswith("my-app-")}
    for of in item["nodes"].values():
        (list_,) = (each for each in of["endpoints"] if each["family"] == 4 and each["reach"] == "cluster")
        assert {each["address"] for each in list_["endpoints"]} == set(map(str, pods))
    assert "external name" in podwall("get", "services", "database")


def test_policies_are_in_force_where_their_pods_are(lab: Lab) -> None:
    (item,) = read("get", "policies", "api", "-n", "guarded")["items"]
    there = {pod.node for pod in lab.pods() if pod.full_name.startswith("guarded/api-")}
    assert (set(item["in_force_on"]), item["waiting_on"], item["pods"]) == (there, [], 2)
    assert item["since"] <= time.time()


def announced(said: Any) -> bool:
    return any(of["kind"] == "Service" and of["state"] == "announced" for of in said["items"])


def test_addresses_and_nodes(lab: Lab) -> None:
    until(lambda: announced(read("get", "addresses")), 20, lambda: "no load balancer's address is announced")
    said = read("get", "addresses")
    pod = lab.pod("default/client")
    (own,) = (of for of in said["items"] if of["owner"] == "default/client" and ":" not in of["address"])
    assert (own["address"], own["node"]) == (str(pod.address(4)), pod.node)
    assert {of["node"] for of in said["ranges"]} == {"node1", "node2", "node3"}
    assert announced(said)
    nodes = {of["name"]: of for of in read("get", "nodes")["items"]}
    assert nodes["node1"]["reached_by"]["node2"] == {
        "10.244.1.0/24": "direct",
        "fd00:10:244:1::/64": "direct",
    }


def test_a_name_that_nobody_holds_is_a_negative_answer(lab: Lab) -> None:
    assert "the agents hold nothing called nobody in namespace default" in podwall(
        "get", "pods", "nobody", expect=1
    )
