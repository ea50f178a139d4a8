"""Problems of objects are told once: in the log, by a metric, as Events that all nodes' agents share."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prometheus_client import REGISTRY

from agent.cluster.client import ApiClient
from agent.cluster.credentials import Credentials, CredentialSource
from agent.cluster.errors import Conflict, Refused
from agent.reports import MOST_TOLD, MOST_WAITING, Report, Reports
from agent.sources import ApiServer
from tests.agent.waiting import eventually

POLICY = ("NetworkPolicy", ("shop", "api"), "uid-1", "policy")


class Listener:
    """Takes Events; those whose name is in `refused` raise instead."""

    def __init__(self, **refused: Exception) -> None:
        self.heard: list[Report] = []
        self.refused = refused

    async def tell(self, report: Report) -> None:
        self.heard.append(report)
        if report.problem in self.refused:
            raise self.refused[report.problem]


def run(reports: Reports, until: Callable[[], object]) -> None:
    async def story() -> None:
        running = asyncio.create_task(reports.run())
        await eventually(until)
        assert not running.done()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(story())


def reports_to(listener: Listener) -> Reports:
    return Reports(listener.tell, pause_s=0.001, per_s=1000)


def number(kind: str) -> float | None:
    value: float | None = REGISTRY.get_sample_value("podwall_object_problems", {"kind": kind})
    return value


def test_only_what_is_new_is_told(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    reports = reports_to(listener)
    with caplog.at_level(logging.WARNING):
        reports.set(*POLICY, ("a",))
        reports.set(*POLICY, ("a",))
        reports.set(*POLICY, ("a", "b"))
        run(reports, lambda: len(listener.heard) == 2)
    assert [report.problem for report in listener.heard] == ["a", "b"]
    assert sum("event=object-problem" in record.message for record in caplog.records) == 2
    assert [report.problem for report in reports.current()] == ["a", "b"]


def test_what_is_mended_is_dropped_and_not_told() -> None:
    listener = Listener()
    reports = reports_to(listener)
    reports.set("Pod", ("shop", "api"), "u", "fields", ("a",))
    assert number("Pod") == 1
    reports.set("Pod", ("shop", "api"), "u", "fields", ())
    assert (reports.current(), number("Pod")) == ((), 0)
    reports.set("Pod", ("shop", "web"), "u", "fields", ("b",))
    run(reports, lambda: listener.heard)
    assert [report.problem for report in listener.heard] == ["b"]


def test_topics_of_one_object_do_not_touch_each_other() -> None:
    reports = reports_to(Listener())
    reports.set("Service", ("shop", "api"), "u", "fields", ("a",))
    reports.set("Service", ("shop", "api"), "u", "service", ("b",))
    reports.set("Service", ("shop", "api"), "u", "fields", ())
    assert [report.problem for report in reports.current()] == ["b"]


def test_an_object_made_anew_is_told_again() -> None:
    listener = Listener()
    reports = reports_to(listener)

    def both() -> bool:
        if len(listener.heard) == 1:
            reports.set("NetworkPolicy", ("shop", "api"), "uid-2", "policy", ("a",))
        return len(listener.heard) == 2

    reports.set("NetworkPolicy", ("shop", "api"), "uid-1", "policy", ("a",))
    run(reports, both)
    assert len({report.event_name for report in listener.heard}) == 2


def test_many_problems_of_one_object_are_a_few_and_a_number() -> None:
    reports = reports_to(Listener())
    reports.set(*POLICY, tuple(f"problem {index}" for index in range(10_000)))
    told = [report.problem for report in reports.current()]
    assert (len(told), told[-1]) == (MOST_TOLD, "and 9991 more problems")


@pytest.mark.parametrize("error", [Conflict("there already", 409), Refused("forbidden", 403)])
def test_an_event_that_cannot_be_made_stops_no_other(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener(a=error)
    reports = reports_to(listener)
    reports.set(*POLICY, ("a", "b"))
    run(reports, lambda: len(listener.heard) == 2)
    complaints = [record for record in caplog.records if "event=event-not-made" in record.message]
    assert len(complaints) == (not isinstance(error, Conflict))


def test_a_flood_is_bounded_and_goes_on() -> None:
    listener = Listener()
    reports = reports_to(listener)
    before = REGISTRY.get_sample_value("podwall_events_untold_total") or 0
    for index in range(MOST_WAITING + 5):
        reports.set("Pod", ("shop", f"pod-{index}"), "u", "fields", ("a",))
    assert REGISTRY.get_sample_value("podwall_events_untold_total") == before + 5
    assert len(reports.current()) == MOST_WAITING + 5


def test_events_are_limited_in_number_per_second() -> None:
    listener = Listener()
    reports = Reports(listener.tell, pause_s=0, per_s=50)
    times: list[float] = []

    async def story() -> None:
        reports.set(*POLICY, tuple("abcdef"))
        running = asyncio.create_task(reports.run())
        begun = asyncio.get_running_loop().time()
        await eventually(lambda: len(listener.heard) == 6)
        times.append(asyncio.get_running_loop().time() - begun)
        running.cancel()

    asyncio.run(story())
    assert times[0] >= 5 / 50


@contextmanager
def api_server() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """An API server that keeps each Event once, as the real one does by its name."""
    kept: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            names = [event["metadata"]["name"] for _, event in kept]
            there = body["metadata"]["name"] in names
            if not there:
                kept.append((self.path, body))
            self.send_response(409 if there else 201)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_all_nodes_agents_make_one_event() -> None:
    with api_server() as (url, kept):
        sources = [
            ApiServer(ApiClient(CredentialSource(lambda: Credentials(url))), ("NetworkPolicy",))
            for _ in range(3)
        ]
        told = 0

        async def story() -> None:
            nonlocal told
            report = Report("NetworkPolicy", ("shop", "api"), "uid-1", "policy", "bad\nCIDR")
            for source in sources:
                with suppress(Conflict):
                    await source.tell(report)
                    told += 1

        asyncio.run(story())
        for source in sources:
            source.close()
    (path, event), *others = kept
    assert (told, others) == (1, [])
    assert path == "/apis/events.k8s.io/v1/namespaces/shop/events"
    assert (event["reason"], event["type"], event["note"]) == ("UnusablePolicy", "Warning", "bad\\nCIDR")
    assert event["regarding"]["uid"] == "uid-1"


def test_what_is_no_object_of_the_api_has_no_event() -> None:
    with api_server() as (url, kept):
        source = ApiServer(ApiClient(CredentialSource(lambda: Credentials(url))), ("NetworkPolicy",))
        asyncio.run(source.tell(Report("Pool", "default", "", "pool", "is exhausted")))
        source.close()
    assert kept == []
