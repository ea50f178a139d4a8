"""What nodes saw becomes what happened: one line for a connection, whoever saw it, and a denial's Service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from agent.explain.observed import ANSWERED, Names, Seen, denial, flow, join
from tests.agent.explain.test_why import service, world

NOW = 1000.0
CLIENT, WEB, CLUSTER, NODE1 = "10.244.0.2", "10.244.1.3", "10.96.0.7", "192.168.10.1"
OUTSIDE = "203.0.113.10"


def end(address: str, port: int, pod: str = "") -> dict[str, Any]:
    return {"address": address, "port": port, "pod": pod}


def seen(
    node: str,
    source: tuple[str, int],
    destination: tuple[str, int],
    *,
    asked: tuple[str, int] | None = None,
    hidden: tuple[str, int] | None = None,
    answered: bool = True,
    event: str = "open",
    time: float | None = None,
) -> Seen:
    raw: dict[str, Any] = {
        "protocol": "tcp",
        "source": end(*source),
        "destination": end(*destination),
        "asked": end(*asked) if asked else None,
        "seen_source": end(*hidden) if hidden else None,
        "icmp": None,
        "status": ANSWERED * answered,
    }
    return flow(node, raw if event == "open" else {**raw, "event": event, "time": time})


def denied(node: str, sport: int, *, time: float, last: float | None = None, audit: bool = False) -> Seen:
    return denial(
        node,
        {
            "time": time,
            "last_time": last or time,
            "count": 1,
            "direction": "ingress",
            "pod": "shop/web",
            "peer": "shop/client",
            "class": "c0ffee",
            "policies": ["shop/default-deny"],
            "protocol": "tcp",
            "source": CLIENT,
            "sport": sport,
            "destination": WEB,
            "dport": 8080,
            "audit": audit,
        },
    )


AT_CLIENT = seen("node-1", (CLIENT, 4000), (WEB, 8080), asked=(CLUSTER, 80))
AT_SERVER = seen("node-2", (CLIENT, 4000), (WEB, 8080))
IN = seen("node-1", (OUTSIDE, 5000), (WEB, 8080), asked=(NODE1, 30080), hidden=(NODE1, 6000))
ON = seen("node-2", (NODE1, 6000), (WEB, 8080))
OTHER_PORT = seen("node-2", (NODE1, 6001), (WEB, 8080))
UNANSWERED = seen("node-1", (CLIENT, 4000), (WEB, 8080), asked=(CLUSTER, 80), answered=False)
BEGUN = seen(
    "node-1", (CLIENT, 4000), (WEB, 8080), asked=(CLUSTER, 80), answered=False, event="begun", time=NOW
)
LATE = seen("node-1", (CLIENT, 4000), (WEB, 8080), answered=False, event="begun", time=NOW + 9)

CASES: dict[str, tuple[Sequence[Seen], list[tuple[str, str, str | None]]]] = {
    "nothing": ((), []),
    "one node": ((AT_SERVER,), [("open", "node-2", None)]),
    "client's and server's node": ((AT_SERVER, AT_CLIENT), [("open", "node-1", CLUSTER)]),
    "in by one node, on to another under its address": ((ON, IN), [("open", "node-1", NODE1)]),
    "another connection between the same": (
        (IN, OTHER_PORT, ON),
        [("open", "node-1", NODE1), ("open", "node-2", None)],
    ),
    "a denial that ended it": (
        (UNANSWERED, denied("node-2", 4000, time=NOW)),
        [("denied", "node-2", CLUSTER)],
    ),
    "a denial of before, and one that is answered now": (
        (AT_CLIENT, denied("node-2", 4000, time=NOW)),
        [("denied", "node-2", None), ("open", "node-1", CLUSTER)],
    ),
    "a denial of long before": (
        (UNANSWERED, denied("node-2", 4000, time=NOW - 500)),
        [("denied", "node-2", None), ("open", "node-1", CLUSTER)],
    ),
    "a packet that is tried again": (
        (UNANSWERED, denied("node-2", 4000, time=NOW - 2), denied("node-2", 4000, time=NOW)),
        [("denied", "node-2", CLUSTER), ("denied", "node-2", CLUSTER)],
    ),
    "another source port, counted with it": (
        (UNANSWERED, denied("node-2", 4444, time=NOW)),
        [("denied", "node-2", CLUSTER)],
    ),
    "what would be denied, and was not": (
        (AT_CLIENT, denied("node-2", 4000, time=NOW, audit=True)),
        [("audit", "node-2", None), ("open", "node-1", CLUSTER)],
    ),
    "begun and denied": ((BEGUN, denied("node-2", 4000, time=NOW)), [("denied", "node-2", CLUSTER)]),
    "begun when nothing was denied any more": (
        (LATE, denied("node-2", 4000, time=NOW)),
        [("begun", "node-1", None), ("denied", "node-2", None)],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turn", [1, -1], ids=["", "turned"])
def test_what_happened(case: str, turn: int) -> None:
    given, expected = CASES[case]
    names = Names(world([]))
    events = [names.event(each) for each in join(given[::turn], NOW + 1)]
    told = [(each.event, each.node, each.asked.address if each.asked else None) for each in events]
    assert sorted(told, key=str) == sorted(expected, key=str)


def test_a_later_try_knows_what_the_first_one_asked() -> None:
    (again,) = join([denied("node-2", 4000, time=NOW)], NOW, {UNANSWERED.leaving: UNANSWERED})
    assert Names(world([])).event(again).asked == Names(world([])).event(join([UNANSWERED], NOW)[0]).asked


WAYS = {
    "ClusterIP": ("10.96.0.1", 80, ("shop/web", 80, "ClusterIP")),
    "another port of it": ("10.96.0.1", 81, None),
    "external address": ("198.51.100.7", 80, ("shop/web", 80, "externalIP")),
    "NodePort": (NODE1, 30080, ("shop/web", 30080, "NodePort")),
    "a port of the node": (NODE1, 9, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_service_that_was_asked_is_named(way: str) -> None:
    address, port, met = WAYS[way]
    made = service("shop/web", type="NodePort", clusterIPs=["10.96.0.1"], externalIPs=["198.51.100.7"])
    made["spec"]["ports"][0]["nodePort"] = 30080
    made["spec"]["clusterIP"] = "10.96.0.1"
    assert Names(world([made])).met("tcp", address, port) == met


def test_plain_data_has_times_as_rfc_3339() -> None:
    (found,) = join([denied("node-2", 4000, time=NOW)], NOW)
    data = Names(world([])).event(found).to_json()
    assert (data["time"], data["event"]) == ("1970-01-01T00:16:40.000000Z", "denied")
    assert "isolated by shop/default-deny" in data["reason"]
