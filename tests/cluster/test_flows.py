"""`podwall flows` on the real cluster: what two nodes saw is one line, with its Service and policy."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import cluster, pair, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.command import PODWALL, podwall
from tests.cluster.console import wait_for

NAMESPACE = "podwall-flows"


@pytest.fixture(scope="module")
def address(real_cluster: Settings) -> Iterator[str]:
    with pair.running(NAMESPACE) as address:
        yield address


def told(event: dict[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    service = event["service"]["name"] if event["service"] else ""
    return event["event"], event["source"]["pod"], service, tuple(event["policies"])


def listed(*words: str) -> list[dict[str, Any]]:
    said = podwall("flows", "-n", NAMESPACE, "-o", "json", "--service", "server", *words)
    events: list[dict[str, Any]] = json.loads(said)["events"]
    return events


def test_an_allowed_and_a_denied_connection_are_told(address: str) -> None:
    assert places.pod(NAMESPACE, "client").one(Question(address, 80)).body == "server"
    assert places.pod(NAMESPACE, "stranger").one(Question(address, 80, limit=1.5)).error == "timeout"

    denied = ("denied", f"{NAMESPACE}/stranger", f"{NAMESPACE}/server", (f"{NAMESPACE}/client-only",))
    wait_for("the denial", lambda: denied in map(told, listed("--denied")), limit=10)
    assert {told(event) for event in listed("--denied")} == {denied}
    opened = [event for event in listed("--allowed") if event["source"]["pod"] == f"{NAMESPACE}/client"]
    assert opened
    ports = [event["source"]["port"] for event in opened]
    assert len(ports) == len(set(ports))  # both nodes know each of them
    assert {told(event)[2] for event in opened} == {f"{NAMESPACE}/server"}


def test_following_tells_each_once_and_ends_when_interrupted(address: str) -> None:
    words = ["--kubeconfig", cluster.kubeconfig(), "--follow", "-o", "json", "-n", NAMESPACE]
    command = [PODWALL, "flows", *words, "--service", "server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline().startswith("following ")
        assert places.pod(NAMESPACE, "client").one(Question(address, 80)).body == "server"
        assert places.pod(NAMESPACE, "stranger").one(Question(address, 80, limit=0.5)).error == "timeout"
        events = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert [told(event) for event in events] == [
        ("begun", f"{NAMESPACE}/client", f"{NAMESPACE}/server", ()),
        ("denied", f"{NAMESPACE}/stranger", f"{NAMESPACE}/server", (f"{NAMESPACE}/client-only",)),
    ]
