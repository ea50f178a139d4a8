"""`podwall bench` measures in the lab and leaves nothing on the nodes, however it ends; not how fast."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click import ClickException
from click.testing import CliRunner

from agent.bench import LEASE_S
from agent.cli.ask import ask
from agent.cli.main import main
from lab.limits import SLOWNESS
from lab.world import Lab
from tests.lab.policies import namespace, pod
from tests.lab.services import port, service, until

PODWALL = Path(sys.executable).parent / "podwall"
NODES = ("node1", "node2")
LIMIT = 10.0 * SLOWNESS
LINK = re.compile(r"podwall[0-9a-f]{8}")
OBJECTS = (
    namespace("shop"),
    pod("shop/api", 8080, node="node2", labels={"app": "api"}),
    service("shop/api", {"app": "api"}, port(80)),
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, given=OBJECTS) as made:
        address = made.service("shop/api").address(4)
        until(lambda: made.connect("node1", address, 80) == "connected", LIMIT)
        yield made


@pytest.fixture(scope="module")
def before(lab: Lab) -> dict[str, Any]:
    """What is there when nothing is measured."""
    return there(lab)


@pytest.fixture(autouse=True)
def nothing_left(lab: Lab, before: dict[str, Any]) -> Iterator[None]:
    """Each test begins with what was there at first, and ends so."""
    yield
    until(lambda: there(lab) == before and not workers(), LIMIT + LEASE_S)


def there(lab: Lab) -> dict[str, Any]:
    """Each node's Pod links, addresses in use, elements of sets, and processes that measure."""
    found: dict[str, Any] = {}
    for name in NODES:
        links = LINK.findall(lab.run(name, ["ip", "-o", "link"]).stdout)
        status: Any = ask(lab.agents[name].socket, "status", {})
        rules = lab.run(name, ["nft", "list", "set", "inet", "podwall", "pod_links4"]).stdout
        used = [each["used"] for each in status["addresses"]]
        found[name] = sorted(set(links)), used, sorted(set(LINK.findall(rules)))
    return found


def workers() -> bool:
    return any(
        b"agent.bench_worker" in _command(each) for each in Path("/proc").iterdir() if each.name.isdecimal()
    )


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_it_measures_every_way(lab: Lab) -> None:
    done = CliRunner().invoke(
        main, ["bench", "--lab", "-n", "shop", "--service", "api:80", "--duration", "3", "-o", "json"]
    )

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["from"], told["to"]) == NODES
    assert [(way["way"], way["error"]) for way in told["ways"]] == [
        ("raw", ""),
        ("pod", ""),
        ("service", ""),
        ("node", ""),
    ]
    for way in told["ways"]:
        assert 0 < way["connections"]["p50_us"] <= way["connections"]["p99_us"]
        assert 0 < way["connections"]["per_second"] < 1e6
        if way["way"] != "service":
            assert 0 < way["requests"]["p50_us"] <= way["requests"]["p99_us"]
            assert 1e6 < way["throughput"]["bits_per_second"] < 1e12


def test_a_table_for_people(lab: Lab) -> None:
    done = CliRunner().invoke(main, ["bench", "--lab", "--from", "node2", "--duration", "1"])

    assert done.exit_code == 0, done.output
    assert [line.split("   ")[0] for line in done.output.splitlines()] == [
        "WAY",
        "a veth pair on node2, no rules",
        "Pod to Pod on node2",
        "Pod on node2 to Pod on node1",
    ]


ENDS = {
    "interrupted": (signal.SIGINT, "node2", LEASE_S / 2),
    "interrupted while the first agent makes what it needs": (signal.SIGINT, "node1", LEASE_S / 2),
    "killed": (signal.SIGKILL, "node2", LIMIT + LEASE_S),
}


@pytest.mark.parametrize("case", ENDS)
def test_nothing_is_left_when_it_is(lab: Lab, before: dict[str, Any], case: str) -> None:
    number, last, limit = ENDS[case]
    command = [PODWALL, "bench", "--lab", "--duration", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        until(lambda: there(lab)[last] != before[last], LIMIT, "nothing is measured")
        assert workers()
        running.send_signal(number)
        running.communicate(timeout=LIMIT)

    until(lambda: there(lab) == before and not workers(), limit)


def test_it_can_be_closed_before_it_is_made(lab: Lab, before: dict[str, Any]) -> None:
    socket, session = lab.agents["node1"].socket, {"id": "0123456789abcdef"}
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(ask, socket, "bench.open", session)
        until(workers, LIMIT, "nothing is made")
        assert not opening.done()
        ask(socket, "bench.close", session)
        opening.result()

    until(lambda: there(lab) == before and not workers(), LEASE_S / 2)


@pytest.mark.parametrize("name", ["", "../../etc", "0123456789ABCDEF", "0123456789abcdef\n"])
def test_a_name_that_is_none_is_not_taken(lab: Lab, name: str) -> None:
    with pytest.raises(ClickException, match="a session is named by 16 hexadecimal digits"):
        ask(lab.agents["node1"].socket, "bench.open", {"id": name})


def test_one_measures_at_a_time(lab: Lab) -> None:
    socket, session = lab.agents["node1"].socket, {"id": "0123456789abcdef"}
    ask(socket, "bench.open", session)
    try:
        done = CliRunner().invoke(main, ["bench", "--lab", "--duration", "1"])

        assert done.exit_code == 3
        assert "this node is being measured already" in done.output
    finally:
        ask(socket, "bench.close", session)
