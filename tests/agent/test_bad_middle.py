"""What goes wrong while the agent runs: one Pod is refused, with a reason; the others go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, cast

import pytest

from agent.cli.ask import ask
from cni.spec import TRY_AGAIN_LATER
from lab import netns
from lab.processes import until
from lab.runtime import PluginError, Sandbox
from tests.agent.node import CIDRS, Node, made
from tests.linux import command


@pytest.fixture(scope="module")
def world() -> Iterator[Node]:
    with made() as whole:
        yield whole


@pytest.fixture
def node(world: Node) -> Iterator[Node]:
    """A node with an agent that is well; it ends with nothing left of any Pod."""
    world.start(**{"address-rest-s": "0.2"})
    world.wait_until_ready()
    yield world
    world.write_node()
    for box in list(world.boxes):
        world.delete(box)
    until(lambda: rows(world) == set(), 5, lambda: f"the ledger still has {rows(world)}")
    assert world.links() == set()
    world.kill()


def rows(node: Node) -> set[str]:
    """The links that the ledger has."""
    path = node.agent.state_dir / "ledger.sqlite3"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return {link for (link,) in connection.execute("SELECT link FROM attachments")}


def test_an_exhausted_range(node: Node) -> None:
    node.write_node(cidrs=("10.244.9.0/30", CIDRS[1]))
    node.wait_for_log("10.244.9.0/30")
    pods = [node.add(), node.add()]
    said = node.refused()
    assert "Node node1: no IPv4 address is free: podCIDR 10.244.9.0/30: 2 of 2 addresses in use" in said
    assert said.endswith("(code 11)")
    assert node.status() == ""  # the node itself is well
    assert rows(node) == {box.host_link for box in pods}
    node.delete(pods[0])
    until(lambda: added(node), 5, node.log)
    assert node.reaches(node.boxes[-1])
    assert node.reaches(pods[1])


def added(node: Node) -> bool:
    try:
        node.add()
    except PluginError:
        return False
    return True


@pytest.fixture
def small(world: Node) -> Iterator[Node]:
    """A node whose ledger lies on a file system of 256 KiB."""
    state = world.agent.state_dir
    state.mkdir(exist_ok=True)
    command("mount", "-t", "tmpfs", "-o", "size=256k", "podwall", str(state))
    world.start(**{"address-rest-s": "0"})
    world.wait_until_ready()
    yield world
    world.kill()
    command("umount", str(state))


def fill(node: Node) -> None:
    with (node.agent.state_dir / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_under_the_ledger(small: Node) -> None:
    node = small
    first, second = node.add(), node.add()
    fill(node)
    path = node.agent.state_dir / "ledger.sqlite3"
    said = [node.refused() for _ in range(20)]  # what is left of the last page may hold the first ones
    assert f"ledger {path} cannot be written: the disk is full; free some space there" in said[-1]
    assert said[-1].endswith("(code 5)")
    node.runtime.call_once("DEL", second)
    assert not node.reaches(second)
    assert node.reaches(first)
    (node.agent.state_dir / "filler").unlink()
    new = node.add()
    until(lambda: rows(node) == {first.host_link, new.host_link}, 10, lambda: f"{rows(node)}\n{node.log()}")
    assert node.links() == rows(node)
    assert node.reaches(new)
    for box in (first, new):
        node.delete(box)
    node.boxes.clear()


def test_a_full_disk_at_the_start(small: Node) -> None:
    node = small
    box = node.add()
    node.stop()
    fill(node)
    node.start()
    assert node.ended() == 1
    path = node.agent.state_dir / "ledger.sqlite3"
    assert f"ledger {path} cannot be written: the disk is full; free some space there" in node.log()
    assert node.reaches(box)
    (node.agent.state_dir / "filler").unlink()
    node.start()
    node.wait_until_ready()
    assert node.reaches(box)
    node.delete(box)


@pytest.mark.parametrize("damage", [b"no database", bytes(8192)], ids=["no database", "zeros"])
def test_a_damaged_ledger(node: Node, damage: bytes) -> None:
    old = [node.add(), node.add()]
    node.stop()
    path = node.agent.state_dir / "ledger.sqlite3"
    path.write_bytes(damage)
    node.start(**{"address-rest-s": "0.2"})
    node.wait_until_ready()
    assert f"ledger {path} is damaged" in node.log()
    assert len(list(node.agent.state_dir.glob("ledger.sqlite3.damaged-*"))) == 1
    new = node.add()
    addresses = [address for box in [*old, new] for address in box.addresses]
    assert len(set(addresses)) == 6
    assert all(node.reaches(box) for box in [*old, new])
    assert rows(node) == {box.host_link for box in [*old, new]}
    for aside in node.agent.state_dir.glob("ledger.sqlite3.damaged-*"):
        aside.unlink()


def test_two_nodes_with_one_range(node: Node) -> None:
    """Who had it keeps it; what else the other Node has is routed."""
    box = node.add()
    node.write_node("node2", ("10.244.1.128/25", "fd00:10:244:2::/64"), ("172.31.0.12", "fd31::12"))
    node.wait_for_log("10.244.1.128/25 overlaps 10.244.1.0/24 of Node node1, which keeps it")
    assert node.status() == ""
    assert node.reaches(box)
    assert node.reaches(node.add())
    routes = json.loads(command("ip", "-j", "-6", "-n", node.netns, "route", "show", "proto", "112"))
    assert "fd00:10:244:2::/64" in {route["dst"] for route in routes}
    (node.cluster / "node2.json").unlink()


def test_a_node_that_loses_its_range_and_its_object(node: Node) -> None:
    box = node.add()
    node.write_node(cidrs=())
    until(lambda: "Node node1 has no spec.podCIDRs" in node.status(), 5, node.log)
    assert "Node node1 has no spec.podCIDRs" in node.refused()
    (node.cluster / "node1.json").unlink()
    until(lambda: "there is no Node node1" in node.status(), 5, node.log)
    assert "there is no Node node1" in node.refused()
    assert node.reaches(box)
    node.write_node()
    node.wait_until_ready()
    assert node.reaches(node.add())


def test_a_manifest_that_does_not_parse(node: Node) -> None:
    box = node.add()
    node.write("broken.yaml", "kind: Pod\napiVersion: v1\nmetadata: {name: [\n")
    node.wait_for_log("broken.yaml, document 1 (line 1)' problem='is not YAML: line 4")
    node.write("odd.json", {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "Odd One"}, "spec": {}})
    node.wait_for_log("metadata.name")
    assert node.reaches(box)
    assert node.reaches(node.add())
    for name in ("broken.yaml", "odd.json"):
        (node.cluster / name).unlink()


def test_a_policy_that_cannot_be_used_isolates_and_is_told_once(node: Node) -> None:
    rule = {"from": [{"ipBlock": {"cidr": "10.0.0.041/8"}}]}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "odd", "namespace": "default"},
        "spec": {"podSelector": {}, "ingress": [rule]},
    }
    node.write("odd.json", policy)
    until(lambda: object_problems(node), 5, node.log)
    box = node.add()
    node.write("odd.json", policy)  # as it was
    (told,) = object_problems(node)
    assert (told["kind"], told["object"]) == ("NetworkPolicy", "default/odd")
    assert told["problem"].startswith("spec.ingress[0].from[0].ipBlock.cidr: '10.0.0.041/8' is not a CIDR")
    assert node.log().count("event=object-problem") == 1
    isolated = command(
        "ip", "netns", "exec", node.netns, "nft", "list", "set", "inet", "podwall", "isolated4"
    )
    assert str(box.addresses[0]) in isolated

    node.write("odd.json", {**policy, "spec": {"podSelector": {}}})
    until(lambda: not object_problems(node), 5, node.log)
    (node.cluster / "odd.json").unlink()


def object_problems(node: Node) -> list[dict[str, str]]:
    """What the agent says over its socket."""
    state = cast("dict[str, Any]", ask(node.agent.socket, "status", {}))
    return cast("list[dict[str, str]]", state["object_problems"])


def test_a_pod_that_the_cluster_does_not_know(node: Node) -> None:
    box = node.box()
    (node.cluster / f"{box.pod}.json").unlink()
    said = node.refused(box)
    assert f"no Pod default/{box.pod}" in said
    assert rows(node) == set()


def test_a_namespace_that_has_the_interface_already(node: Node) -> None:
    box = node.box()
    command("ip", "-n", box.netns, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    assert "the Pod's namespace has an interface eth0 already" in node.refused(box)
    until(lambda: rows(node) == set(), 5, lambda: f"{rows(node)}")
    assert node.reaches(node.add())


def test_a_namespace_that_is_none(node: Node) -> None:
    box = node.box()
    netns.remove(box.netns)
    box.path.write_text("")
    assert "is not a network namespace" in node.refused(box)
    box.path.unlink()
    assert "cannot be opened" in node.refused(box)
    assert rows(node) == set()


def test_a_directory_of_the_runtime_that_cannot_be_written(node: Node) -> None:
    node.kill()
    in_the_way = node.home / "file"
    in_the_way.write_text("")
    node.start(**{"address-rest-s": "0.2", "cni-conf-dir": str(in_the_way)})
    node.wait_for_log("cni_conf_dir")
    until(lambda: node.readyz()[0] == 503, 5, node.log)
    assert f"announcement: cni_conf_dir {in_the_way} cannot be written: Not a directory" in node.readyz()[1]
    assert "traceback" not in node.log()
    in_the_way.unlink()
    until(in_the_way.is_dir, 10, node.log)
    until(lambda: node.readyz()[0] == 200, 5, node.log)
    assert node.reaches(node.add())


def test_asked_to_end_while_pods_come(node: Node) -> None:
    """Who has been asked answers first, with rules in force; later requests are for the next agent."""
    boxes = [node.box() for _ in range(24)]
    refused: list[int] = []

    def add(box: Sandbox) -> Sandbox | None:
        try:
            return node.added(box)
        except PluginError as error:
            refused.append(error.code)
            return None

    with ThreadPoolExecutor(len(boxes)) as pool:
        answers = [pool.submit(add, box) for box in boxes]
        until(lambda: node.links() != set(), 5, node.log)
        begun = time.monotonic()
        node.stop()
        assert time.monotonic() - begun < 5
        there = [box for each in answers if (box := each.result())]
    assert there
    assert set(refused) <= {TRY_AGAIN_LATER}
    assert node.links() == rows(node) == {box.host_link for box in there}
    node.start(**{"address-rest-s": "0.2"})
    node.wait_until_ready()
    assert all(node.reaches(box) for box in there)


def test_asked_to_end_while_nftables_hangs(node: Node) -> None:
    """A Pod that is the first of its policies needs a chain, and so the worker."""
    node.write(
        "new.json",
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "new", "namespace": "default"},
            "spec": {"podSelector": {}},
        },
    )
    box = node.box()
    (worker,) = node.worker()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(node.runtime.call_once, "ADD", box)
        until(lambda: rows(node) != set(), 5, node.log)
        begun = time.monotonic()
        node.stop()
        print(f"it ended after {time.monotonic() - begun:.1f} s")
        assert time.monotonic() - begun < 20
        with pytest.raises(PluginError) as caught:
            answer.result()
        assert caught.value.code == TRY_AGAIN_LATER
    (node.cluster / "new.json").unlink()
    node.start(**{"address-rest-s": "0.2"})
    node.wait_until_ready()
    assert rows(node) == node.links() == set()


def test_a_pod_comes_while_nftables_hangs(node: Node) -> None:
    """What is elements alone goes to the kernel without the worker."""
    (worker,) = node.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        assert node.reaches(node.add())
    finally:
        os.kill(worker, signal.SIGCONT)
