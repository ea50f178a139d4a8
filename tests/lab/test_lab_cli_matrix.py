"""`podwall matrix --probe` in the lab: what is computed is what is seen, and what is altered is found."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests
from lab.world import Lab
from tests.lab.following import every_node_follows

EXAMPLES = Path(__file__).parents[2] / "examples"
POLICIES = [EXAMPLES / "policies" / name for name in ("shop.yaml", "api.yaml", "around.yaml")]


@pytest.fixture(scope="module")
def shop() -> Iterator[Lab]:
    with Lab(nodes=2, given=manifests.read(POLICIES)) as made:
        every_node_follows(made)
        yield made


def matrix(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(main, ["matrix", "--lab", *words], env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    return done.output


def connections(*words: str, status: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(matrix("-o", "json", *words, status=status))["connections"]
    return found


@contextmanager
def dropped(made: Lab, port: int, protocol: str = "tcp") -> Iterator[None]:
    """Somebody else's rules drop what goes to a port, on every node."""
    rules = "add table inet foreign; add chain inet foreign f { type filter hook forward priority 10; }; "
    rules += f"add rule inet foreign f {protocol} dport {port} drop"
    try:
        for node in made.nodes:
            subprocess.run(["ip", "netns", "exec", node.netns, "nft", rules], check=True, timeout=10)
        yield
    finally:
        for node in made.nodes:
            remove = ["ip", "netns", "exec", node.netns, "nft", "delete", "table", "inet", "foreign"]
            subprocess.run(remove, check=False, timeout=10)


def test_what_is_computed_is_seen(shop: Lab) -> None:
    found = connections("-A", "--probe")

    assert {each["differs"] for each in found} == {False}
    tcp = [each for each in found if each["protocol"] == "TCP"]
    assert {(each["allowed"], each["seen"]) for each in tcp} == {(True, "connected"), (False, "silent")}
    assert {each["seen"] for each in found if each["protocol"] == "UDP" and each["allowed"]} == {"connected"}
    assert {":" in each["address"] for each in found} == {True, False}
    assert matrix("-A", "--probe").endswith(f"{len(found)} connections tried, all as computed\n")


def test_the_example_of_the_policies(shop: Lab) -> None:
    assert matrix("-A", "--from", "ingress-nginx/controller", "--from", "shop/web", "--to", "shop/api") == (
        "FROM                       shop/api (2)   shop/api (2)\n"
        "                           TCP 8080       TCP 9090\n"
        "ingress-nginx/controller   yes            no\n"
        "shop/web                   no             no\n"
    )


def test_a_port_where_nobody_listens_is_reached_all_the_same(shop: Lab) -> None:
    (one, other) = connections("-n", "shop", "--from", "web", "--to", "postgres:7", "--probe")
    assert {(each["allowed"], each["seen"], each["differs"]) for each in (one, other)} == {
        (True, "refused", False)
    }


def test_what_cannot_be_known_is_told(shop: Lab) -> None:
    """The lab's Pods answer datagrams; drop them, and nobody can say whether they would have arrived."""
    with dropped(shop, 53, "udp"):
        said = matrix(
            "-A", "--from", "shop/web", "--to", "kube-system/dns:53", "--protocol", "udp", "--probe"
        )
    assert said.splitlines()[-2:] == [
        "2 connections tried, all as computed",
        "of 2 it cannot be known (UDP without an answer, or refused by a Service)",
    ]


def test_what_no_agent_knows_of_is_found(shop: Lab) -> None:
    with dropped(shop, 5432):
        said = matrix("-n", "shop", "--from", "web", "--to", "postgres:5432", "--probe", status=1)
    assert "web    yes!" in said
    assert "2 of 2 connections are not as computed:" in said
    assert (
        "seen silent, but computed allowed: Pod shop/web may connect to Pod shop/postgres-0 on TCP 5432"
        in said
    )
    matrix("-n", "shop", "--from", "web", "--to", "postgres:5432", "--probe")


SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"namespace": "shop", "name": "postgres"},
    "spec": {"selector": {"app": "postgres"}, "ports": [{"port": 5432}]},
}


def test_services_are_tried_as_well(shop: Lab) -> None:
    shop.apply([SERVICE])
    every_node_follows(shop)
    found = connections("-n", "shop", "--from", "web", "--to", "svc/postgres", "--probe")
    assert {(each["target"], each["seen"]) for each in found} == {("Service shop/postgres", "connected")}


def test_expectations_are_tried_as_well(shop: Lab, tmp_path: Path) -> None:
    written = tmp_path / "expected.yaml"
    written.write_text(matrix("-A", "-o", "expect"))
    count = written.read_text().count("\n- ")
    assert matrix("--expect", str(written), "--probe") == f"{count} of {count} expectations hold\n"

    with dropped(shop, 5432):
        said = matrix("--expect", str(written), "--probe", status=1)
    assert "shop/web to shop/postgres:5432 shall be allowed" in said
    assert "was seen silent, but computed allowed" in said
    matrix("--expect", str(written), status=0)


def test_an_agent_that_is_away_is_told(shop: Lab) -> None:
    """Other nodes' Pods are tried all the same, and the exit status says that some were not."""
    agent = shop.agents["node1"]
    agent.stop()
    try:
        found = connections("-A", "--probe", status=3)
        assert {each["seen"] for each in found} >= {"connected", "failed"}
        said = matrix("-A", "--probe", status=3)
        assert "not tried: the agent does not answer on" in said
    finally:
        agent.start()
        shop.wait_until_ready()


def test_the_picture(shop: Lab, tmp_path: Path) -> None:
    matrix("-A", "--picture", str(tmp_path / "matrix.svg"))
    assert "shop/web reaches" in (tmp_path / "matrix.svg").read_text()
