"""The local port: what each path answers."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from agent import http
from agent.http import Health, Server

PORT = 39619


@pytest.fixture
def reasons() -> list[str]:
    return ["Node a has no podCIDR", "no rules yet"]


@pytest.fixture
def health(reasons: list[str]) -> Iterator[Health]:
    health = Health(lambda: reasons)
    server = Server(f"127.0.0.1:{PORT}", health)
    yield health
    server.close()


def get(path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", PORT, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_not_ready_says_what_is_in_the_way(health: Health, reasons: list[str]) -> None:
    assert get("/readyz") == (503, "Node a has no podCIDR\nno rules yet\n")
    reasons.clear()
    assert get("/readyz") == (200, "ready\n")


def test_a_stuck_event_loop_is_not_healthy(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get("/healthz")[0] == 200
    monkeypatch.setattr(http, "ALIVE_S", 0.0)
    assert get("/healthz")[0] == 503


def test_metrics_are_in_the_prometheus_format(health: Health) -> None:
    status, text = get("/metrics")
    assert status == 200
    assert "# TYPE process_resident_memory_bytes gauge" in text
    assert get("/nothing")[0] == 404
