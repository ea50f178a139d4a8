"""How labs begin and end: by command, by signal, by accident."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lab import manifests, names, netns, processes, state
from lab.limits import SLOWNESS
from lab.world import Lab, LabError
from tests.lab.services import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
HELLO, SERVICES = EXAMPLES / "hello", EXAMPLES / "services"
ON_NODE3 = """
{apiVersion: v1, kind: Pod, metadata: {name: late},
 spec: {containers: [{name: c, ports: [{containerPort: 8080}]}]}}
"""
PODWALL = [sys.executable, "-m", "agent.cli.main", "lab"]


def podwall(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*PODWALL, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=processes.environment(os.environ),
        timeout=60 * SLOWNESS,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(autouse=True)
def no_lab() -> Iterator[None]:
    """Nothing is there before and after."""
    assert not state.remains(), "a lab is up on this machine: podwall lab down"
    yield
    left = state.remains()
    state.remove()
    assert not left


def begin_up(log: Path, stage: str) -> subprocess.Popen[bytes]:
    """Begin an up and return when it has told of a stage."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*PODWALL, "up", "-f", str(HELLO)], stderr=output, env=processes.environment(os.environ)
        )
    processes.until(lambda: stage in log.read_text(), 20, lambda: f"no {stage}: {log.read_text()}")
    return process


def nobody_left() -> bool:
    return not state.remains() and not list(netns.names(names.LAB + "-"))


@pytest.mark.parametrize(
    "shape",
    [["--nodes", "3"], ["--vxlan"], ["--routed"], ["--vxlan", "--routed"]],
    ids=" ".join,
)
def test_the_demo_ends_well_and_leaves_nothing(shape: Sequence[str]) -> None:
    done = podwall("demo", "-f", HELLO, *shape)

    assert "all as expected" in done.stdout
    assert "\033" not in done.stdout
    assert nobody_left()


def test_the_commands_one_after_the_other(tmp_path: Path) -> None:
    podwall("up", "-f", HELLO)
    assert "already" in podwall("up", "-f", HELLO).stderr
    podwall("up", "-f", HELLO, "--nodes", "3", expect=1)
    pods = json.loads(podwall("pods", "-o", "json").stdout)
    assert {pod["status"] for pod in pods} == {"Running"}
    seen = json.loads(podwall("matrix", "-o", "json").stdout)
    assert seen["ok"]
    assert all(entry["verdict"] == "connected" for entry in seen["connections"])
    assert "ready" in podwall("status").stdout

    assert podwall("exec", "hello/web", "--", "sh", "-c", "exit 7", expect=7).stdout == ""
    assert "eth0" in podwall("exec", "data/db-0", "ip", "-o", "addr").stdout
    assert "no such command" in podwall("exec", "data/db-0", "--", "nothing-of-this-name", expect=127).stderr

    (tmp_path / "policy.yaml").write_text(
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy,"
        " metadata: {name: p}, spec: {podSelector: {}}}"
    )
    podwall("apply", "-f", tmp_path)
    assert "all as expected" in podwall("matrix").stdout
    (tmp_path / "policy.yaml").unlink()
    podwall(
        "apply", "--prune", "-f", HELLO, "-f", SERVICES / "cluster-ip.yaml", "-f", SERVICES / "client.yaml"
    )
    [service] = json.loads(podwall("services", "-o", "json").stdout)
    assert [port["port"] for port in service["ports"]] == [80]
    processes.until(
        lambda: subprocess.run([*PODWALL, "connect", "client", "my-app:80"], check=False).returncode == 0,
        10,
        lambda: "my-app does not answer",
    )
    told = podwall("connect", "client", "my-app:80", "--times", "30").stdout
    assert service["cluster_addresses"][1] in told
    assert len({line.split()[1] for line in told.splitlines() if " on 10.244." in line}) == 3
    assert "asked by fd00:10:244:" in told
    assert "refused" in podwall("connect", "node1", "[::1]:80", expect=1).stdout

    assert "4 stopped" in podwall("delete", "-f", HELLO / "hello.yaml").stderr
    podwall("down")
    assert "no lab is up" in podwall("down").stderr
    assert "no lab is up" in podwall("status", expect=1).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["nodes", "agents"])
def test_an_interrupted_up_leaves_nothing(number: signal.Signals, stage: str, tmp_path: Path) -> None:
    process = begin_up(tmp_path / "log", stage)
    process.send_signal(number)

    assert process.wait(20 * SLOWNESS) in {130, 0}
    if process.returncode == 0:
        podwall("down")  # it was faster than the signal
    assert nobody_left()


@pytest.mark.parametrize("then", ["down", "up"])
def test_what_a_killed_up_left_is_removed(then: str, tmp_path: Path) -> None:
    process = begin_up(tmp_path / "log", "nodes")
    process.kill()
    process.wait(10 * SLOWNESS)
    assert state.remains()
    assert "no lab is up" in podwall("pods", expect=1).stderr

    if then == "up":
        assert "what a killed lab left is removed" in podwall("up", "-f", HELLO).stderr
    podwall("down")

    assert nobody_left()


def test_an_agent_that_cannot_start_shows_its_log_and_nothing_stays() -> None:
    with (
        pytest.raises(LabError, match=r"(?s)node1: the agent ended.*vxlan_port"),
        Lab(flags={"vxlan-port": "0"}),
    ):
        pytest.fail("it must not come up")

    assert nobody_left()


def test_a_bad_manifest_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: Pod\nmetadata: {name: a}\napiVersion: v1\nspec: {}\n")

    assert "Pod default/a: spec.containers" in podwall("up", "-f", tmp_path, expect=1).stderr
    assert nobody_left()


def test_nodes_in_subnets_of_their_own_share_none() -> None:
    with Lab(3, routed=True, given=manifests.read([HELLO])) as lab:
        networks = {interface.network for place in lab.nodes for interface in place.interfaces}
        assert len(networks) == 6
        assert lab.connect("node1", lab.node("node3").addresses[1], 9999) == "refused"
        assert lab.matrix().good


def all_reached(lab: Lab) -> bool:
    """Whether everybody reaches everybody, once each node knows the ways to all others."""
    return eventually(lambda: lab.matrix().good, bool)


def test_nodes_come_and_go() -> None:
    with Lab(2, given=manifests.read([HELLO])) as lab:
        lab.add_node()
        assert all_reached(lab)
        lab.apply(manifests.parse(ON_NODE3, "test"))
        there = lab.pod("late")
        assert there.node == "node3"
        assert all_reached(lab)

        lab.unplug("node3")
        assert lab.connect("node1", there.address(4), 8080) != "connected"
        lab.plug("node3")
        processes.until(
            lambda: lab.connect("node1", there.address(4), 8080) == "connected", 5, lambda: "node3 stays away"
        )

        lab.remove_node()
        assert lab.pod("late").node in {"node1", "node2"}
        assert Lab.attach().pods() == lab.pods()
        assert all_reached(lab)
