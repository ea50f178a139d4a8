"""Which endpoints answer: each rule of the documentation by its name."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, cast

import pytest

from agent.cluster.model import Endpoint, EndpointPort, EndpointSlice, Family, ServicePort
from agent.compile.endpoints import Here, Reach, candidates, choose, ready_here, unusable
from tests.agent.compile.service_worlds import NODE, decoded, endpoint, endpoint_slice

HTTP = ServicePort(80, "http")
NAMED = ({"name": "http", "port": 8080},)
OTHER = "node-2"


def _slice(*endpoints: Any, name: str = "web-1", ports: Any = NAMED, **labels: str) -> EndpointSlice:
    made = decoded(endpoint_slice(f"shop/{name}", "web", *endpoints, ports=ports, **labels))
    return cast("EndpointSlice", made)


def _hinted(ip: str, *zones: str, nodes: tuple[str, ...] = (), **state: Any) -> Any:
    return endpoint(ip, zones=zones, nodes=nodes, **state)


ENDING = {"ready": False, "serving": True, "terminating": True}
NOT_SERVING = {"ready": False, "serving": False, "terminating": True}

# slices, reach --> the last bytes of the addresses that get traffic, on node-1 in zone "east"
CHOICES: dict[str, tuple[tuple[EndpointSlice, ...], Reach, set[str]]] = {
    "ready endpoints of every slice": (
        (_slice("10.0.0.1"), _slice("10.0.0.2", name="web-2")),
        "cluster",
        {"10.0.0.1:8080", "10.0.0.2:8080"},
    ),
    "not those that are not ready": (
        (_slice("10.0.0.1", endpoint("10.0.0.2", ready=False)),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "a missing condition ready is ready": (
        (_slice(endpoint("10.0.0.1", ready=None)),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "publishNotReadyAddresses: ready though it ends": (
        (_slice(endpoint("10.0.0.1", ready=True, serving=False, terminating=True)),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "not terminating ones beside a ready one": (
        (_slice("10.0.0.1", endpoint("10.0.0.2", **ENDING)),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "serving terminating ones where none is ready": (
        (_slice(endpoint("10.0.0.1", **NOT_SERVING), endpoint("10.0.0.2", **ENDING)),),
        "cluster",
        {"10.0.0.2:8080"},
    ),
    "not a Pod that serves and is not ready, unless it terminates": (
        (_slice(endpoint("10.0.0.1", ready=False, serving=True)),),
        "cluster",
        set(),
    ),
    "none": ((), "cluster", set()),
    "Local: this node's": (
        (_slice("10.0.0.1", endpoint("10.0.1.1", node=OTHER)),),
        "local",
        {"10.0.0.1:8080"},
    ),
    "Local: not those without a node": ((_slice(endpoint("10.0.0.1", node="")),), "local", set()),
    "Local: this node's terminating ones, though others are ready elsewhere": (
        (_slice(endpoint("10.0.0.1", **ENDING), endpoint("10.0.1.1", node=OTHER)),),
        "local",
        {"10.0.0.1:8080"},
    ),
    "Local: hints do not narrow it": ((_slice(_hinted("10.0.0.1", "west")),), "local", {"10.0.0.1:8080"}),
    "an address in two slices counts once": (
        (_slice("10.0.0.1"), _slice("10.0.0.1", name="web-2")),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "an address in two slices: the better state counts": (
        (_slice(endpoint("10.0.0.1", ready=False)), _slice("10.0.0.1", name="web-2")),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "a named targetPort is another number on other Pods": (
        (_slice("10.0.0.1"), _slice("10.0.0.2", name="web-2", ports=({"name": "http", "port": 9090},))),
        "cluster",
        {"10.0.0.1:8080", "10.0.0.2:9090"},
    ),
    "not the ports of other names": (
        (_slice("10.0.0.1", ports=({"name": "x", "port": 1},)),),
        "cluster",
        set(),
    ),
    "not a port of another protocol": (
        (_slice("10.0.0.1", ports=({"name": "http", "port": 8080, "protocol": "UDP"},)),),
        "cluster",
        set(),
    ),
    "a slice that does not say which port has none": (
        (_slice("10.0.0.1", ports=({"name": "http"},)),),
        "cluster",
        set(),
    ),
    "not the other family": ((_slice("fd00::1"),), "cluster", set()),
    "zone hints: those for this zone": (
        (
            _slice(
                _hinted("10.0.0.1", "east"), _hinted("10.0.0.2", "west"), _hinted("10.0.0.3", "east", "west")
            ),
        ),
        "cluster",
        {"10.0.0.1:8080", "10.0.0.3:8080"},
    ),
    "zone hints: ignored where one has none": (
        (_slice(_hinted("10.0.0.1", "east"), _hinted("10.0.0.2")),),
        "cluster",
        {"10.0.0.1:8080", "10.0.0.2:8080"},
    ),
    "zone hints: ignored where none is for this zone": (
        (_slice(_hinted("10.0.0.1", "west"), _hinted("10.0.0.2", "west")),),
        "cluster",
        {"10.0.0.1:8080", "10.0.0.2:8080"},
    ),
    "zone hints: only ready endpoints are asked": (
        (_slice(_hinted("10.0.0.1", "east"), _hinted("10.0.0.2", "west"), _hinted("10.0.0.3", ready=False)),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "zone hints: the fall back to terminating ones goes past them": (
        (_slice(_hinted("10.0.0.1", "west", **ENDING)),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "node hints: before zone hints": (
        (_slice(_hinted("10.0.0.1", "east", nodes=(NODE,)), _hinted("10.0.0.2", "east", nodes=(OTHER,))),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
    "node hints: none for this node, then the zone": (
        (_slice(_hinted("10.0.0.1", "east", nodes=(OTHER,)), _hinted("10.0.0.2", "west", nodes=(OTHER,))),),
        "cluster",
        {"10.0.0.1:8080"},
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice(name: str) -> None:
    slices, reach, expected = CHOICES[name]
    chosen = choose(candidates(slices, HTTP, 4), reach, Here(NODE, "east"))
    assert {f"{ip}:{port}" for ip, port in chosen} == expected
    assert len(chosen) == len(expected)


def test_a_node_without_a_zone_takes_all() -> None:
    slices = (_slice(_hinted("10.0.0.1", "east"), _hinted("10.0.0.2", "west")),)
    assert len(choose(candidates(slices, HTTP, 4), "cluster", Here(NODE))) == 2


def test_the_order_does_not_depend_on_the_order_of_slices() -> None:
    slices = [_slice(f"10.0.0.{n}", name=f"web-{n}") for n in (20, 3, 100)]
    one, other = (
        choose(candidates(order, HTTP, 4), "cluster", Here(NODE)) for order in (slices, slices[::-1])
    )
    assert one == other
    assert [str(ip) for ip, _ in one] == ["10.0.0.3", "10.0.0.20", "10.0.0.100"]


@pytest.mark.parametrize(
    ("ips", "expected"),
    [
        (("10.0.0.1", "10.0.0.2"), 2),
        (("10.0.0.1", "fd00::1"), 1),
        ((), 0),
    ],
)
def test_a_pod_of_two_families_is_one_endpoint_to_a_health_check(ips: tuple[str, ...], expected: int) -> None:
    slices = [_slice(ip, name=f"web-{index}") for index, ip in enumerate(ips)]
    slices.append(_slice(endpoint("10.0.0.9", **ENDING), endpoint("10.0.1.1", node=OTHER), name="others"))
    assert ready_here(slices, Here(NODE)) == expected


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "::1",
        "fe80::1",
        "ff02::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
    ],
)
def test_no_endpoint_is_on_the_node_itself_or_on_its_link(address: str) -> None:
    ip = ip_address(address)
    family = cast("Family", ip.version)
    of = EndpointSlice("shop", "x", endpoints=(Endpoint((ip,)),), ports=(EndpointPort("http", 8080),))
    assert unusable(ip)
    assert candidates((of,), HTTP, family) == {}
