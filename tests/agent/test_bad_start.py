"""What an agent says that cannot start or cannot take Pods, what it leaves alone, and how it goes on later.

In each case one Pod is on the network already, from an agent that was well. It stays reachable whatever
comes; nobody else gets its address.
"""

from __future__ import annotations

import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab import netns
from lab.processes import until
from lab.runtime import Sandbox
from tests.agent.node import CIDRS, NAME, Node, made


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with made() as whole:
        yield whole


@pytest.fixture(scope="module")
def old(node: Node) -> Sandbox:
    """A Pod of an agent that was well and has ended."""
    node.start()
    node.wait_until_ready()
    box = node.add()
    node.stop()
    return box


@pytest.fixture(autouse=True)
def end(node: Node) -> Iterator[None]:
    yield
    node.kill()
    node.write_node()


@dataclass
class Case:
    """Something that is wrong before the agent starts.

    `spoil` makes it so and yields while it is; `says` stands in the log, and where the agent runs in its
    readiness probe, in STATUS and in what ADD is refused with.
    """

    name: str
    says: str
    spoil: Callable[[Node], Iterator[None]] | None = None
    flags: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def spoilt(self, node: Node) -> Iterator[None]:
        if self.spoil is None:
            yield
        else:
            yield from self.spoil(node)


# Agents that end


def socket_is_a_directory(node: Node) -> Iterator[None]:
    node.agent.socket.mkdir()
    yield
    node.agent.socket.rmdir()


def socket_is_anybodys(node: Node) -> Iterator[None]:
    node.home.chmod(0o777)
    yield
    node.home.chmod(0o700)


def port_is_taken(node: Node) -> Iterator[None]:
    with netns.run(netns.path(node.netns), socket.create_server, ("127.0.0.1", 9619)):
        yield


def ledger_is_from_the_future(node: Node) -> Iterator[None]:
    path = node.agent.state_dir / "ledger.sqlite3"
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("PRAGMA user_version = 99")
        yield
        connection.execute(f"PRAGMA user_version = {version}")


def ledger_is_a_directory(node: Node) -> Iterator[None]:
    path = node.agent.state_dir / "ledger.sqlite3"
    path.rename(path.with_name("away"))
    path.mkdir()
    yield
    path.rmdir()
    path.with_name("away").rename(path)


def python_lacks_nftables(node: Node) -> Iterator[None]:
    """Another Python with podwall and its dependencies, but without the distribution's packages."""
    bare = node.home / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    node.agent.python = str(bare / "bin/python")
    node.agent.environment = {"PYTHONPATH": f"{Path.cwd()}:{sysconfig.get_path('purelib')}"}
    yield
    del node.agent.python, node.agent.environment
    shutil.rmtree(bare)


ENDS = [
    Case(
        "the socket is a directory",
        "agent.sock is there and is no socket; move it away",
        socket_is_a_directory,
    ),
    Case(
        "the socket's directory is anybody's",
        "must be root's and writable by nobody else",
        socket_is_anybodys,
    ),
    Case(
        "the http port is taken",
        "http_address 127.0.0.1:9619 cannot be served: Address already in use",
        port_is_taken,
    ),
    Case(
        "the http address is not the node's",
        "http_address 192.0.2.1:9619 cannot be served: Cannot assign requested address",
        flags={"http-address": "192.0.2.1:9619"},
    ),
    Case("a ledger of a later version", "has version 99, this agent reads 1", ledger_is_from_the_future),
    Case("the ledger is a directory", "ledger.sqlite3 cannot be used: Is a directory", ledger_is_a_directory),
    Case(
        "the state directory is below a file",
        "state_dir /etc/hostname/state cannot be used: Not a directory",
        flags={"state-dir": "/etc/hostname/state"},
    ),
    Case("no nftables for Python", "is python3-nftables installed for this Python?", python_lacks_nftables),
]


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_an_agent_that_cannot_start_says_why_and_changes_nothing(
    node: Node, old: Sandbox, case: Case
) -> None:
    links, tables = node.links(), node.ruleset()
    with case.spoilt(node):
        node.start(**case.flags)
        assert node.ended() == 1
        said = node.log().splitlines()
        assert case.says in said[-1]
        assert "event=failed" in said[-1]
        assert "traceback" not in node.log()
        assert (node.links(), node.ruleset()) == (links, tables)
        assert node.reaches(old)


def test_a_second_agent_leaves_the_first_alone(node: Node, old: Sandbox) -> None:
    node.start()
    node.wait_until_ready()
    second = subprocess.run(
        ["ip", "netns", "exec", node.netns, *node.agent._arguments(), "--http-address", ""],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 1
    assert f"another agent uses state_dir {node.agent.state_dir}: end it first" in second.stderr
    assert node.status() == ""
    new = node.add()
    assert node.reaches(new)
    node.delete(new)
    node.stop()


# Agents that wait


def node_without_cidrs(node: Node) -> Iterator[None]:
    node.write_node(cidrs=())
    yield


def overlapping_cidrs(node: Node) -> Iterator[None]:
    node.write_node(cidrs=("10.244.1.0/24", "10.244.1.0/25"))
    yield


def unusable_cidr(node: Node) -> Iterator[None]:
    node.write_node(cidrs=("10.244.1.0/33", CIDRS[1]))
    yield


def tiny_cidr(node: Node) -> Iterator[None]:
    node.write_node(cidrs=("10.244.1.0/32", CIDRS[1]))
    yield


def no_such_node(node: Node) -> Iterator[None]:
    (node.cluster / f"{NAME}.json").unlink()
    yield


def half_a_manifest(node: Node) -> Iterator[None]:
    node.write(f"{NAME}.json", '{"kind": "Node",')
    yield


def address_of_another_machine(node: Node) -> Iterator[None]:
    node.write_node(addresses=("172.31.0.99",))
    yield


def no_cluster_directory(node: Node) -> Iterator[None]:
    away = node.cluster.rename(node.home / "away")
    yield
    away.rename(node.cluster)


def api_server_is_down(node: Node) -> Iterator[None]:
    (node.home / "kubeconfig").write_text(
        """
        {apiVersion: v1, kind: Config, current-context: c,
         clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443"}}],
         contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {token: t}}]}"""
    )
    node.flags["kubeconfig"] = str(node.home / "kubeconfig")
    yield
    del node.flags["kubeconfig"]


WAITS = [
    Case(
        "a Node without podCIDRs",
        "Node node1 has no spec.podCIDRs: the controller manager",
        node_without_cidrs,
    ),
    Case(
        "podCIDRs that overlap",
        "Node node1, spec.podCIDRs: podCIDR 10.244.1.0/25 overlaps 10.244.1.0/24",
        overlapping_cidrs,
    ),
    Case(
        "a podCIDR that is none", "Node node1: spec.podCIDRs[0]: '10.244.1.0/33' is not a CIDR", unusable_cidr
    ),
    Case("a podCIDR without room", "podCIDR 10.244.1.0/32 is too small to hold an address", tiny_cidr),
    Case("no such Node", "there is no Node node1 in manifests:/", no_such_node),
    Case("the Node's manifest does not parse", "there is no Node node1 in manifests:/", half_a_manifest),
    Case("no directory of manifests", "cluster: there is no such directory", no_cluster_directory),
    Case(
        "the Node's address is another machine's",
        "no interface holds the Node's InternalIP (172.31.0.99); set kubelet's --node-ip",
        address_of_another_machine,
    ),
    Case(
        "the API server is down",
        "API server https://127.0.0.1:6443: [Errno 111] Connection refused",
        api_server_is_down,
        {"cluster": "api"},
    ),
    Case(
        "no kubeconfig",
        "/nonexistent/kubeconfig: there is no such file",
        flags={"cluster": "api", "kubeconfig": "/nonexistent/kubeconfig"},
    ),
    Case("an MTU that IPv6 cannot use", "mtu 1000 is less than IPv6 needs (1280)", flags={"mtu": "1000"}),
]


@pytest.mark.parametrize("case", WAITS, ids=str)
def test_an_agent_that_must_wait_says_why_and_goes_on_later(node: Node, old: Sandbox, case: Case) -> None:
    with case.spoilt(node):
        node.start(**case.flags)
        until(lambda: case.says in node.status(), 10, lambda: f"{node.status()!r}\n{node.log()}")
        assert node.status().endswith("(code 50)")
        code, said = node.readyz()
        assert (code, case.says in said) == (503, True)
        refusal = node.refused()
        assert case.says in refusal
        assert refusal.endswith("(code 11)")
        assert node.reaches(old)
        if case.flags:
            node.stop()
    node.write_node()
    if case.flags:
        node.start()
    node.wait_until_ready()
    new = node.add()
    assert not set(new.addresses) & set(old.addresses)
    assert node.reaches(new)
    assert node.reaches(old)
    node.delete(new)
    node.stop()
    assert "traceback" not in node.log()
