"""Rows of connections: what is together, what is counted, and how long it stays."""

from __future__ import annotations

from agent.explain.observed import End, Event, Met
from agent.ui.traffic import KEPT_S, Traffic

WEB = End("10.0.0.1", 40000, "shop/web", "")
DB = End("10.0.0.2", 5432, "data/db", "")


def flow(source: End = WEB, destination: End = DB, **other: object) -> Event:
    return Event("open", None, "node1", "tcp", source, destination, answered=True, **other)  # type: ignore[arg-type]


def denied(when: float, **other: object) -> Event:
    values: dict[str, object] = {
        "count": 2,
        "last_time": when,
        "direction": "ingress",
        "policies": ("data/db",),
    }
    return Event("denied", when, "node1", "tcp", WEB, DB, **{**values, **other})  # type: ignore[arg-type]


def test_connections_of_one_pair_and_port_are_one_row() -> None:
    traffic = Traffic()
    other = End("10.0.0.1", 40001, "shop/web", "")
    traffic.take(
        [flow(), flow(other, met=Met("data/db", 5432, "ClusterIP"), asked=End("10.96.0.1", 5432))], 100.0
    )
    (row,) = traffic.rows()
    assert (row["source"], row["target"], row["protocol"], row["port"]) == (
        "pod/shop/web",
        "pod/data/db",
        "TCP",
        5432,
    )
    assert (row["verdict"], row["count"], row["open"], row["unanswered"]) == ("allowed", 2, 2, 0)
    assert row["services"] == ["data/db:5432"]


def test_a_connection_that_ended_stays_for_a_while() -> None:
    traffic = Traffic()
    traffic.take([flow()], 100.0)
    traffic.take([], 100.0 + KEPT_S)
    (row,) = traffic.rows()
    assert (row["count"], row["open"], row["last"]) == (1, 0, 100.0)
    traffic.take([], 100.1 + KEPT_S)
    assert traffic.rows() == []


def test_denials_are_a_row_of_their_own_with_their_policies() -> None:
    traffic = Traffic()
    traffic.take([flow(), denied(90.0), denied(95.0, count=3), denied(95.0, policies=("data/all",))], 100.0)
    allowed, row = traffic.rows()
    assert allowed["verdict"] == "allowed"
    assert (row["verdict"], row["count"], row["first"], row["last"]) == ("denied", 7, 90.0, 95.0)
    assert row["policies"] == ["data/all", "data/db"]


def test_an_old_denial_is_not_shown() -> None:
    traffic = Traffic()
    traffic.take([denied(100.0)], 101.0 + KEPT_S)
    assert traffic.rows() == []


def test_what_audit_would_deny_is_told_apart() -> None:
    traffic = Traffic()
    traffic.take([Event("audit", 99.0, "node1", "tcp", WEB, DB, last_time=99.0)], 100.0)
    assert [row["verdict"] for row in traffic.rows()] == ["audit"]


def test_who_is_no_pod_is_a_node_or_an_address() -> None:
    traffic = Traffic()
    traffic.take([flow(End("192.0.2.1", 0, "", "node1")), flow(End("203.0.113.9", 9))], 1.0)
    assert {row["source"] for row in traffic.rows()} == {"node/node1", "203.0.113.9"}


def test_echoes_have_no_port() -> None:
    traffic = Traffic()
    traffic.take([Event("open", None, "node1", "icmp", WEB, DB)], 1.0)
    assert traffic.rows()[0]["port"] == 0
