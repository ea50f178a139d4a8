"""What `podwall get` makes of what the agents hold: one row an object, what differs between nodes said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.agents import Agents, SilentError
from agent.cli.get import CONTENTS, MOST_PAGES, Held, collected
from agent.cli.get_tables import TABLES
from agent.cli.main import main
from agent.cli.output import Coloured, Line


class Pages:
    """An agent that holds these items and tells two at a time; None: it does not answer."""

    def __init__(self, items: list[dict[str, Any]] | None) -> None:
        self.items = items

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        if self.items is None:
            raise SilentError("forbidden")
        assert (call, body["what"]) == ("held", "pods")
        after = body["after"]
        assert isinstance(after, list)
        begin = after[0] if after else 0
        end = begin + 2
        return {
            "items": self.items[begin:end],
            "total": len(self.items),
            "next": [end] if end < len(self.items) else None,
        }

    def close(self) -> None:
        """Nothing is held."""


def agents(**nodes: list[dict[str, Any]] | None) -> Agents:
    return Agents({node: lambda items=items: Pages(items) for node, items in nodes.items()})  # type: ignore[misc]


def lines(what: str, held: Held, statuses: Mapping[str, Any] | None = None, wide: bool = False) -> list[str]:
    content = CONTENTS[what](held, statuses or {}, "")
    return [_text(line) for line in TABLES[what](content, wide, True)]


def _text(line: Line) -> str:
    return (
        line
        if isinstance(line, str)
        else line.text
        if isinstance(line, Coloured)
        else "".join(map(_text, line))
    )


def held(**nodes: list[dict[str, Any]]) -> Held:
    return Held(items=nodes, silent={}, cut=[])


# Asking


def test_all_pages_of_all_nodes_are_asked_for() -> None:
    with agents(a=[{"n": n} for n in range(5)], b=[{"n": 9}], c=None) as asked:
        found = collected(asked, "pods", "", "")
    assert [item["n"] for item in found.all()] == [0, 1, 2, 3, 4, 9]
    assert (found.silent, found.cut) == ({"c": "forbidden"}, [])


def test_what_is_cut_and_who_is_silent_is_said() -> None:
    with agents(a=[{"n": n} for n in range(2 * MOST_PAGES + 1)], c=None) as asked:
        found = collected(asked, "pods", "", "")
    assert (len(found.all()), found.cut) == (2 * MOST_PAGES, ["a"])
    assert [gap.text for gap in found.gaps()] == [
        "c is missing here: forbidden",
        "a holds more than is listed here: give a namespace or a name",
    ]


def test_when_nobody_answers_the_reason_is_said_once() -> None:
    with agents(a=None, b=None) as asked:
        found = collected(asked, "pods", "", "")
    assert (found.items, found.nobody()) == ({}, "forbidden")


# Pods


def pod(name: str, node: str, ingress: tuple[str, ...] = (), audited: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "namespace": "shop",
        "name": name,
        "node": node,
        "state": "attached",
        "link": "podwall00000001",
        "addresses": ["10.244.1.7"],
        "mtu": 1450,
        "isolated": {"ingress": bool(ingress), "egress": False},
        "policies": {"ingress": [f"shop/{each}" for each in ingress], "egress": []},
        "audited": {"ingress": [f"shop/{each}" for each in (*ingress, *audited)], "egress": []},
        "host_ports": [{"protocol": "TCP", "host_port": 8443, "port": 443}],
    }


def test_pods_are_listed_with_their_isolation() -> None:
    said = lines("pods", held(n1=[pod("web", "n1", ("api",), ("try",))], n2=[pod("db", "n2")]), wide=True)
    rows = [line.split() for line in said[1:]]
    assert rows[0][:7] == ["shop", "db", "n2", "10.244.1.7", "open", "open", "<none>"]
    assert rows[1][:8] == ["shop", "web", "n1", "10.244.1.7", "isolated", "open", "api", "try"]
    assert rows[1][-1] == "8443->443/TCP"


# Services


def service(node: str, state: str = "served", endpoints: int = 2, *problems: str) -> dict[str, Any]:
    return {
        "namespace": "shop",
        "name": "web",
        "type": "ClusterIP",
        "node": node,
        "state": state,
        "cluster_ips": ["10.96.0.1"],
        "external_ips": [],
        "load_balancer": [],
        "external_name": "",
        "ports": [{"name": "", "protocol": "TCP", "port": 80, "target_port": 8080, "node_port": 30080}],
        "endpoints": [
            {
                "port": 80,
                "name": "",
                "protocol": "TCP",
                "family": 4,
                "reach": "cluster",
                "total": endpoints,
                "endpoints": [{"address": f"10.244.1.{n}", "port": 8080} for n in range(endpoints)],
            }
        ]
        if state == "served"
        else [],
        "problems": list(problems),
    }


SERVICES = {
    "the same everywhere": ([service("a"), service("b")], "2", "served"),
    "no endpoints": ([service("a", endpoints=0), service("b", endpoints=0)], "0", "no endpoints"),
    "other endpoints on other nodes": ([service("a"), service("b", endpoints=3)], "2-3", "served"),
    "off on one": ([service("a"), service("b", "off")], "2", "off on b, served on a"),
    "headless": ([service("a", "headless"), service("b", "headless")], "<none>", "headless"),
}


@pytest.mark.parametrize("case", SERVICES)
def test_services_are_one_row_and_differences_are_said(case: str) -> None:
    items, endpoints, state = SERVICES[case]
    said = lines("services", held(**{of["node"]: [of] for of in items}))
    assert said[1].split()[:5] == ["shop", "web", "ClusterIP", "10.96.0.1", "<none>"]
    assert said[1].endswith(f"80:30080/TCP{' ' * 3}{endpoints.ljust(9)}   {state}")


def test_problems_of_a_service_are_said_once() -> None:
    said = lines("services", held(a=[service("a", "served", 2, "bad")], b=[service("b", "served", 2, "bad")]))
    assert said[2:] == ["Service shop/web: bad"]


# Policies


def policy(node: str, generation: int, in_force: int | None, pods: int) -> dict[str, Any]:
    return {
        "namespace": "shop",
        "name": "api",
        "node": node,
        "types": ["Ingress"],
        "mode": "enforce",
        "generation": generation,
        "in_force": in_force,
        "mode_in_force": "enforce" if in_force is not None else None,
        "waiting": in_force != generation,
        "since": 100.0 if in_force is not None else None,
        "pods": pods,
        "problems": [],
    }


POLICIES = {
    "everywhere": ([policy("a", 2, 2, 1), policy("b", 2, 2, 3)], "2/2 nodes", []),
    "not yet on one": (
        [policy("a", 2, 2, 1), policy("b", 2, 1, 3)],
        "1/2 nodes",
        ["NetworkPolicy shop/api: b has generation 1, not 2"],
    ),
    "one has not even heard of it": (
        [policy("a", 3, 3, 1), policy("b", 2, 2, 3)],
        "1/2 nodes",
        ["NetworkPolicy shop/api: b has generation 2, not 3"],
    ),
    "never yet": (
        [policy("a", 1, None, 1)],
        "0/1 nodes",
        ["NetworkPolicy shop/api: a has none of it yet, not 1"],
    ),
    "no Pods on one": ([policy("a", 2, 2, 1), policy("b", 2, 2, 0)], "1/1 nodes", []),
    "no Pods at all": ([policy("a", 2, 2, 0)], "selects no Pod", []),
}


@pytest.mark.parametrize("case", POLICIES)
def test_policies_say_on_how_many_nodes_they_are_in_force(case: str) -> None:
    items, nodes, more = POLICIES[case]
    said = lines("policies", held(**{of["node"]: [of] for of in items}))
    assert nodes in said[1]
    assert said[2:] == more


# Addresses


def test_addresses_say_how_full_ranges_and_pools_are() -> None:
    items = [
        {"address": f"10.244.1.{n}", "node": "a", "kind": "Pod", "owner": f"shop/p{n}", "state": "in use"}
        for n in (10, 9)
    ]
    status = {
        "addresses": [
            {"cidr": "10.244.1.0/24", "used": 2, "resting": 1, "size": 254},
            {"cidr": "fd00:1::/64", "used": 0, "resting": 0, "size": 2**64 - 1},
        ],
        "load_balancer": {"pools": [{"name": "office", "family": 4, "used": 1, "size": 8}]},
    }
    said = [line.split() for line in lines("addresses", held(a=items), {"a": status})]
    assert ["a", "10.244.1.0/24", "2", "254", "1"] in said
    assert ["a", "fd00:1::/64", "0", "endless", "0"] in said
    assert ["office", "IPv4", "1", "8"] in said
    assert [row[0] for row in said[-2:]] == ["10.244.1.9", "10.244.1.10"]


@pytest.mark.parametrize("name", ["10.244.1.9", "shop/p9"])
def test_an_address_is_found_by_itself_and_by_its_owner(name: str) -> None:
    item = {"address": "10.244.1.9", "node": "a", "kind": "Pod", "owner": "shop/p9", "state": "in use"}
    found = CONTENTS["addresses"](
        held(a=[item, {**item, "address": "10.244.1.8", "owner": "shop/p8"}]), {}, name
    )
    assert found["items"] == [item]


# Nodes


def test_nodes_say_how_others_reach_them() -> None:
    def node(name: str, ways: dict[str, str]) -> list[dict[str, Any]]:
        return [
            {
                "name": other,
                "ready": True,
                "internal_ips": [],
                "pod_cidrs": [f"{other}-cidr"],
                "paths": [{"cidr": f"{other}-cidr", "way": way}],
                "problems": [],
            }
            for other, way in ways.items()
        ]

    content = CONTENTS["nodes"](held(a=node("a", {"b": "vxlan"}), c=node("c", {"b": "direct"})), {}, "b")
    (item,) = content["items"]
    assert item["reached_by"] == {"a": {"b-cidr": "vxlan"}, "c": {"b-cidr": "direct"}}
    assert item["agent"] is None
    assert "silent" in [_text(line) for line in TABLES["nodes"](content, False, False)][1]


# The command


@pytest.mark.parametrize("word", ["ingresses", "podz"])
def test_what_nobody_holds_is_wrong_usage(word: str) -> None:
    done = CliRunner().invoke(main, ["get", word])
    assert (done.exit_code, "is none of pods, services, policies, nodes, addresses" in done.output) == (
        2,
        True,
    )
