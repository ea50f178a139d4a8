"""`podwall doctor` in a lab that is really broken: its first line names what was done to it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests, netns, processes
from lab.names import UNDERLAY
from lab.world import Lab

HELLO = Path(__file__).parents[2] / "examples" / "hello"
Breakage = Callable[[Lab], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def served() -> Iterator[Lab]:
    """Two nodes on one link; Services are podwall's whatever it sees."""
    with Lab(nodes=2, flags={"services": "on"}, given=manifests.read([HELLO])) as made:
        yield made


def doctor(*words: str, expect: int | None = None) -> str:
    done = CliRunner().invoke(main, ["doctor", "--lab", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    if expect is not None:
        assert done.exit_code == expect, done.output
    return done.output


def told() -> list[dict[str, str]]:
    findings: list[dict[str, str]] = json.loads(doctor("-o", "json"))["findings"]
    return findings


def on_node(lab: Lab, *words: str, data: str = "") -> str:
    done = netns.run(
        lab.netns("node1"), subprocess.run, words, input=data, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@contextlib.contextmanager
def table(lab: Lab, ruleset: str, name: str) -> Iterator[None]:
    on_node(lab, "nft", "-f", "-", data=ruleset)
    try:
        yield
    finally:
        on_node(lab, "nft", "delete", "table", *name.split())


def kube_proxy(lab: Lab) -> AbstractContextManager[None]:
    """Its table as its nftables mode makes it first of all."""
    rules = """table ip kube-proxy {
        chain services { }
        chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services
        }
    }
    """
    return table(lab, rules, "ip kube-proxy")


def closed(lab: Lab) -> AbstractContextManager[None]:
    rules = """table ip filter {
        chain FORWARD { type filter hook forward priority filter; policy drop; tcp dport 22 accept
        }
    }
    """
    return table(lab, rules, "ip filter")


@contextlib.contextmanager
def narrow(lab: Lab) -> Iterator[None]:
    """The underlay drops what is larger than 1400 bytes on its way to node 2, and says nothing."""
    port = lab.node("node2").port
    words = ["ip", "link", "set", port, "mtu"]
    netns.run(netns.path(UNDERLAY), subprocess.run, [*words, "1400"], check=True)
    try:
        yield
    finally:
        netns.run(netns.path(UNDERLAY), subprocess.run, [*words, "1500"], check=True)


@contextlib.contextmanager
def no_forwarding(lab: Lab) -> Iterator[None]:
    on_node(lab, "sysctl", "-qw", "net.ipv4.ip_forward=0")
    try:
        yield
    finally:
        on_node(lab, "sysctl", "-qw", "net.ipv4.ip_forward=1")


@contextlib.contextmanager
def other_network(lab: Lab) -> Iterator[None]:
    file = lab.runtimes["node1"].conf_dir / "05-other.conflist"
    file.write_text("{}")
    try:
        yield
    finally:
        file.unlink()


@contextlib.contextmanager
def others_link(lab: Lab) -> Iterator[None]:
    on_node(lab, "ip", "link", "add", "flannel.1", "type", "bridge")
    try:
        yield
    finally:
        on_node(lab, "ip", "link", "delete", "flannel.1")


CASES: dict[str, tuple[Breakage, str, str]] = {
    "kube-proxy": (
        kube_proxy,
        r"error: node1: kube-proxy beside podwall: its rules \(nftables table ip kube-proxy\) are here",
        "kube-proxy --cleanup",
    ),
    "MTU": (
        narrow,
        r"error: node1: MTU too large: Pods have 1450, but the way to node node2 \(\S+\) takes 1400$",
        "mtu: 1400",
    ),
    "foreign policy": (
        closed,
        r"error: node1: nftables table ip filter, chain FORWARD \(forward, policy drop\) drops",
        """nft insert rule ip filter FORWARD iifname '"podwall*"' accept""",
    ),
    "ip_forward": (
        no_forwarding,
        r"error: node1: net.ipv4.ip_forward is 0 and must be 1: Pods' packets are routed",
        "sysctl -w net.ipv4.ip_forward=1",
    ),
    "another configuration": (
        other_network,
        r"error: node1: another network's configuration sorts before podwall's: \S+/05-other.conflist",
        ".off",
    ),
    "another's link": (
        others_link,
        r"warning: node1: links of Flannel are on the node: flannel.1",
        "ip link delete flannel.1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_line_names_the_cause_and_the_second_mends_it(served: Lab, name: str) -> None:
    breakage, cause, mend = CASES[name]
    with breakage(served):
        first, second, *_ = doctor(expect=1).splitlines()
        assert re.match(cause, first), first
        assert mend in second
    assert told() == []


def test_nothing_is_wrong_and_it_says_what_was_looked_at(served: Lab) -> None:
    first, second = doctor(expect=0).splitlines()
    assert first == "nothing is wrong on 2 nodes (node1, node2)"
    assert second.startswith(
        "checked on 2 nodes (node1, node2): agents and what they report; kernel settings"
    )


def test_a_mended_lab_is_well(served: Lab) -> None:
    """The command that mends a foreign policy does so."""
    with closed(served):
        mend = next(each["mend"] for each in told() if each["topic"] == "filters")
        on_node(
            served, "sh", "-c", mend.removeprefix("on the node: ").replace('"podwall*"', "'\"podwall*\"'")
        )
        assert told() == []


def test_an_agent_that_is_gone_hides_no_other(served: Lab) -> None:
    served.agents["node2"].stop()
    try:
        with no_forwarding(served):
            causes = [(each["node"], each["cause"]) for each in told()]
            assert any(node == "node1" and "ip_forward" in cause for node, cause in causes)
            assert any(node == "node2" and "gives no answer" in cause for node, cause in causes)
    finally:
        served.agents["node2"].start()
        served.wait_until_ready()


def test_one_node_alone(served: Lab) -> None:
    with no_forwarding(served):
        assert json.loads(doctor("--node", "node2", "-o", "json", expect=0))["nodes"] == ["node2"]
        doctor("--node", "node1", expect=1)
    assert "these have: node1, node2" in doctor("--node", "node7", expect=2)


def test_here_on_a_node_whose_agent_is_dead(served: Lab, tmp_path: Path) -> None:
    place = served.node("node1")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"cluster: manifests:{tmp_path}\nsocket: {tmp_path}/none.sock\n"
        f"cni_conf_dir: {served.runtimes['node1'].conf_dir}\n"
    )

    def here() -> Any:
        environment = {"PODWALL_NODE_NAME": "node1", **processes.environment({})}
        words = ["doctor", "--here", "--config", str(config), "-o", "json"]
        done = netns.run(netns.path(place.netns), CliRunner(env=environment).invoke, main, words)
        assert done.exit_code == 1, done.output
        return json.loads(done.output)["findings"]

    (silent,) = here()
    assert silent["cause"].startswith("the agent gives no answer")
    with closed(served):
        assert {each["topic"] for each in here()} == {"agent", "filters"}
