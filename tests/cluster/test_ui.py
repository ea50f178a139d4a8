"""`podwall ui` on the real cluster: its agents' flows and denials, and why, through the API server."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.cluster import cluster, pair, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.command import PODWALL
from tests.cluster.console import wait_for

NAMESPACE = "podwall-ui"
LIMIT_S = 30


@pytest.fixture(scope="module")
def address(real_cluster: Settings) -> Iterator[str]:
    with pair.running(NAMESPACE) as address:
        yield address


def test_connections_and_denials_are_shown_and_explained(address: str) -> None:
    assert places.pod(NAMESPACE, "client").one(Question(address, 80)).body == "server"
    assert places.pod(NAMESPACE, "stranger").one(Question(address, 80, limit=1.5)).error == "timeout"
    command = [PODWALL, "ui", "--kubeconfig", cluster.kubeconfig(), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)", process.stdout.readline())
            assert found

            def asked(path: str) -> Any:
                connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=LIMIT_S)
                connection.request("GET", path, headers={"Authorization": f"Bearer {found[2]}"})
                content = json.load(connection.getresponse())
                connection.close()
                return content

            def rows() -> dict[tuple[str, str], Any]:
                state = asked("/api/state")
                assert state["silent"] == {}
                return {(row["verdict"], row["source"]): row for row in state["rows"]}

            denied = "denied", f"pod/{NAMESPACE}/stranger"
            wait_for("the denial", lambda: denied in rows(), limit=10)
            assert rows()[denied]["policies"] == [f"{NAMESPACE}/client-only"]
            allowed = rows()["allowed", f"pod/{NAMESPACE}/client"]
            assert allowed["services"] == [f"{NAMESPACE}/server:80"]
            question = {
                "source": denied[1],
                "target": rows()[denied]["target"],
                "port": rows()[denied]["port"],
            }
            answer = asked(f"/api/why?{urlencode(question)}")
            assert answer["sentence"].startswith(f"denied: ingress policy {NAMESPACE}/client-only")
            assert all(node["agrees"] for node in answer["nodes"])
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
