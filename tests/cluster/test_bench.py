"""`podwall bench` on the real cluster: the agents make what it measures, and take it away."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.command import podwall
from tests.cluster.console import wait_for

pytestmark = pytest.mark.usefixtures("real_cluster")


def read(*words: str) -> Any:
    return json.loads(podwall(*words, "-o", "json", limit=90))


def used() -> list[tuple[str, int]]:
    """How many addresses of each range are in use."""
    return sorted((each["cidr"], each["used"]) for each in read("get", "addresses")["ranges"])


def test_every_way_is_measured_and_the_addresses_come_back() -> None:
    before = used()

    told = read("bench", "--duration", "3")

    assert told["from"] != told["to"]
    assert [(way["way"], way["error"]) for way in told["ways"]] == [("raw", ""), ("pod", ""), ("node", "")]
    for way in told["ways"]:
        assert 0 < way["connections"]["per_second"] < 1e6
        assert 0 < way["requests"]["p50_us"] <= way["requests"]["p99_us"]
        assert way["throughput"]["bits_per_second"] > 1e6
    wait_for("the addresses to be free again", lambda: used() == before or None, limit=20, every=0.5)
