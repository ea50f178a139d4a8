"""What the elected agent writes, when, and what it tells."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any, cast

import msgspec
import pytest

from agent.cluster.errors import NotFound, Unreachable
from agent.cluster.model import IPAddress, LoadBalancerIngress, Service
from agent.loadbalancer.allocation import ADDRESSES
from agent.loadbalancer.allocator import Allocator
from agent.loadbalancer.pools import parse_pools
from agent.reports import Report, Reports
from agent.sources import Source

POOLS = parse_pools([{"name": "p", "addresses": ["10.9.0.1-10.9.0.2"]}])


def service(name: str, has: str = "", asks: str = "", **more: Any) -> Service:
    status = tuple(LoadBalancerIngress(ip_address(ip)) for ip in has.split())
    annotations = {ADDRESSES: asks} if asks else {}
    whole = {"type": "LoadBalancer", "load_balancer": status, "annotations": annotations, "uid": name, **more}
    return Service("default", name, ip_families=(4,), **whole)


class Cluster:
    """Services, and what was written into their statuses; the watch tells it only when asked to."""

    def __init__(self, *services: Service) -> None:
        self.services = {each.name: each for each in services}
        self.written: list[tuple[str, str]] = []
        self.failing: dict[str, Exception] = {}
        self.held = True
        self.told: list[Report] = []
        self.reports = Reports(self._tell)
        self.allocator = Allocator(POOLS, cast("Source", self), self.reports, lambda: self.held)

    async def _tell(self, report: Report) -> None:
        self.told.append(report)

    async def set_load_balancer(self, service: Service, addresses: Iterable[IPAddress]) -> None:
        if service.name in self.failing:
            raise self.failing[service.name]
        self.written.append((service.name, " ".join(map(str, addresses))))

    def sync(self) -> list[tuple[str, str]]:
        """Run once; what was written in this run."""
        before = len(self.written)
        asyncio.run(self.allocator.sync(self.services.values()))
        return self.written[before:]

    def watch(self) -> None:
        """The watch brings what was written."""
        for name, text in self.written:
            status = tuple(LoadBalancerIngress(ip_address(ip)) for ip in text.split())
            self.services[name] = msgspec.structs.replace(self.services[name], load_balancer=status)

    def problems(self) -> list[tuple[str, str]]:
        return [(report.key[1], report.problem) for report in self.reports.current()]


def test_only_what_differs_is_written() -> None:
    cluster = Cluster(service("a", has="10.9.0.2"), service("b"))
    assert cluster.sync() == [("b", "10.9.0.1")]
    cluster.watch()
    assert cluster.sync() == []


def test_what_was_written_stands_until_the_watch_tells() -> None:
    """A Service that comes in between gets nothing that has been given, however old it is."""
    cluster = Cluster(service("b"))
    assert cluster.sync() == [("b", "10.9.0.1")]
    cluster.services = {"a": service("a"), **cluster.services}
    assert cluster.sync() == [("a", "10.9.0.2")]
    assert cluster.sync() == []
    cluster.watch()
    assert cluster.sync() == []


def test_who_loses_an_address_is_written_before_who_gets_it() -> None:
    cluster = Cluster(service("a", asks="10.9.0.2"), service("b", has="10.9.0.2", type="NodePort"))
    assert cluster.sync() == [("b", ""), ("a", "10.9.0.2")]


def test_what_cannot_be_written_is_raised_after_the_others() -> None:
    cluster = Cluster(service("a"), service("b"))
    cluster.failing = {"a": Unreachable("away")}
    with pytest.raises(Unreachable, match="away"):
        cluster.sync()
    assert cluster.written == [("b", "10.9.0.2")]
    cluster.failing = {}
    assert cluster.sync() == [("a", "10.9.0.1")]


def test_a_service_that_has_gone_meanwhile_is_no_error() -> None:
    cluster = Cluster(service("a"), service("b"))
    cluster.failing = {"a": NotFound("gone")}
    assert cluster.sync() == [("b", "10.9.0.2")]


def test_who_is_not_elected_writes_and_tells_nothing() -> None:
    cluster = Cluster(service("a"), service("b"), service("c"))
    cluster.held = False
    assert cluster.sync() == []
    assert cluster.problems() == []


def test_problems_are_those_of_the_elected_one() -> None:
    cluster = Cluster(service("a"), service("b"), service("c"))
    cluster.sync()
    problem = ("c", "no IPv4 address is free for it: add addresses to pool p")
    assert cluster.problems() == [problem]
    cluster.held = False
    cluster.sync()
    assert cluster.problems() == []
    cluster.held = True
    cluster.sync()
    assert cluster.problems() == [problem]
    del cluster.services["a"]
    assert cluster.sync() == [("c", "10.9.0.1")]
    assert cluster.problems() == []


def test_who_ceases_to_be_elected_stops_in_the_middle() -> None:
    cluster = Cluster(service("a"), service("b"))
    left = iter([True, True, False])
    cluster.allocator = Allocator(POOLS, cast("Source", cluster), cluster.reports, lambda: next(left))
    assert cluster.sync() == [("a", "10.9.0.1")]
