"""Services as elements: a cluster as a reviewer reads it, who has what, what is wrong, what changes cost."""

from __future__ import annotations

import os
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from agent.compile import service_chains as chains
from agent.compile.balancers import MOST_STICKY
from agent.compile.hostports import host_ports
from agent.compile.names import SERVICES_TABLE
from agent.compile.service import ServiceSettings
from agent.compile.services import ServiceName
from agent.nft import render
from agent.nft.model import ChainName, Ruleset, SetName
from cni.spec import PortMapping
from tests.agent.compile.service_worlds import (
    NODE,
    ServiceWorld,
    decoded,
    endpoint,
    endpoint_slice,
    in_zone,
    load_balancer,
    node,
    service,
)

GOLDEN = Path(__file__).parent / "golden" / "services.nft"

HTTP = {"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080}
NODES = (
    in_zone(node(NODE, "192.168.10.1", "fd00:10::1", cidrs=("10.244.0.0/24", "fd00:244::/64")), "east"),
    node("node-2", "192.168.10.2", "fd00:10::2", cidrs=("10.244.1.0/24", "fd00:244:1::/64")),
)
CLUSTER = (
    *NODES,
    service(
        "shop/web",
        "10.96.0.1",
        "fd00:96::1",
        ports=(HTTP,),
        type="LoadBalancer",
        status=load_balancer("203.0.113.1"),
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=["192.0.2.0/24"],
        healthCheckNodePort=31000,
    ),
    endpoint_slice(
        "shop/web-4",
        "web",
        "10.244.0.2",
        endpoint("10.244.1.2", node="node-2"),
        ports=({"name": "http", "port": 8080},),
    ),
    endpoint_slice(
        "shop/web-6", "web", endpoint("fd00:244:1::2", node="node-2"), ports=({"name": "http", "port": 8080},)
    ),
    service("data/db", "10.96.0.2", ports=(5432,), sessionAffinity="ClientIP"),
    endpoint_slice("data/db-1", "db", "10.244.0.3", endpoint("10.244.1.3", node="node-2"), ports=(5432,)),
    service("kube-system/dns", "10.96.0.10", ports=({"name": "dns", "port": 53, "protocol": "UDP"},)),
)


def test_a_small_cluster() -> None:
    """A load balancer for this node's Pods, a sticky database, a Service without endpoints, a hostPort."""
    world = ServiceWorld(*CLUSTER)
    mapping = PortMapping(8443, 443, "tcp", "")
    of_pod = host_ports((ip_address("10.244.0.2"),), (mapping,), "shop", "web-1")
    text = render.ruleset(Ruleset((*world.ruleset.items(), *of_pod)))

    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    assert not world.compiler.problems()


def _elements(world: ServiceWorld, of: SetName) -> dict[Any, Any]:
    return {key: each.data for key, each in world.ruleset.elements.get(of, {}).items()}


# Who is served

NOT_SERVED: dict[str, dict[str, Any]] = {
    "headless": {"clusterIP": "None", "clusterIPs": ["None"]},
    "without an address yet": {"clusterIP": "", "clusterIPs": []},
    "ExternalName": {"type": "ExternalName", "externalName": "db.example.com"},
    "somebody else's proxy": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}},
    "headless by its label": {"labels": {"service.kubernetes.io/headless": ""}},
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served(name: str) -> None:
    world = ServiceWorld(
        service("shop/web", "10.96.0.1", **NOT_SERVED[name]), endpoint_slice("shop/a", "web", "10.244.0.2")
    )
    assert world.ruleset == ServiceWorld().ruleset
    assert world.compiler.service_at(ip_address("10.96.0.1"), "TCP", 80) is None


def test_slices_for_another_proxy_do_not_count() -> None:
    labels = {"service.kubernetes.io/service-proxy-name": "other"}
    world = ServiceWorld(
        service("shop/web", "10.96.0.1"), endpoint_slice("shop/a", "web", "10.244.0.2", **labels)
    )
    assert world.compiler.endpoints_of(ip_address("10.96.0.1"), "TCP", 80) == frozenset()


def test_a_slice_for_no_service_waits_for_it() -> None:
    world = ServiceWorld(endpoint_slice("shop/a", "web", "10.244.0.2"))
    assert world.ruleset == ServiceWorld().ruleset
    world.put(service("shop/web", "10.96.0.1"))
    assert world.compiler.endpoints_of(ip_address("10.96.0.1"), "TCP", 80) == {
        (ip_address("10.244.0.2"), 8080)
    }


def test_off_leaves_ports_of_pods_alone() -> None:
    world = ServiceWorld(*CLUSTER, settings=ServiceSettings(enabled=False))
    assert world.compiler.owners == {chains.STATIC}
    assert chains.HOST_PORTS[4] in world.ruleset.sets
    assert chains.FRONTENDS[4] not in world.ruleset.sets


# Which addresses

ADDRESSES: dict[str, tuple[dict[str, Any], set[str], tuple[str, ...]]] = {
    "load balancer": (
        {"type": "LoadBalancer", "status": load_balancer("203.0.113.1")},
        {"203.0.113.1"},
        (),
    ),
    "load balancer that delivers to nodes itself": (
        {"type": "LoadBalancer", "status": load_balancer("203.0.113.1", mode="Proxy")},
        set(),
        (),
    ),
    "status of a Service that is no load balancer any more": (
        {"type": "NodePort", "status": load_balancer("203.0.113.1")},
        set(),
        (),
    ),
    "externalIP in an allowed range": ({"externalIPs": ["198.51.100.1"]}, {"198.51.100.1"}, ()),
    "externalIP anywhere else": (
        {"externalIPs": ["198.51.100.1", "8.8.8.8"]},
        {"198.51.100.1"},
        (
            "spec.externalIPs[1]: 8.8.8.8 is in no range of the agent's setting external_ips: "
            "it is not served",
        ),
    ),
    "load balancer on loopback": (
        {"type": "LoadBalancer", "status": load_balancer("127.0.0.1")},
        set(),
        (
            "status.loadBalancer.ingress[0]: 127.0.0.1 is a loopback, link-local or unspecified address: "
            "it is not served",
        ),
    ),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_addresses(name: str) -> None:
    spec, expected, problems = ADDRESSES[name]
    allowed = ServiceSettings(external_ips=(ip_network("198.51.100.0/24"),))
    world = ServiceWorld(service("shop/web", "10.96.0.1", **spec), settings=allowed)
    served = {str(key[0]) for key in _elements(world, chains.FRONTENDS[4])}
    assert served == {"10.96.0.1", *expected}
    assert world.compiler.problems().get(("shop", "web"), ()) == problems


def test_no_node_ports_where_they_are_not_allocated() -> None:
    spec = {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False}
    world = ServiceWorld(service("shop/web", "10.96.0.1", ports=({"port": 80},), **spec))
    assert not _elements(world, chains.NODE_PORTS[4])


def test_node_ports_of_the_families_of_the_service() -> None:
    world = ServiceWorld(service("shop/web", "fd00:96::1", ports=(HTTP,), type="NodePort"))
    assert not _elements(world, chains.NODE_PORTS[4])
    assert _elements(world, chains.NODE_PORTS[6])


# Conflicts

OLD, NEW = "2024-01-01T00:00:00Z", "2024-06-01T00:00:00Z"


def _two(**spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    young = service("a/young", "10.96.0.1", created=NEW, **spec)
    return young, service("b/old", "10.96.0.2", created=OLD, **spec)


CONFLICTS = {
    "one address": (
        {"type": "LoadBalancer", "status": load_balancer("203.0.113.1")},
        "status.loadBalancer.ingress[0]: Service b/old is older and has port 80/TCP of 203.0.113.1",
        ("203.0.113.1", 80, False),
    ),
    "one NodePort": (
        {"type": "NodePort", "ports": (HTTP,)},
        "spec.ports[0].nodePort: Service b/old is older and has NodePort 30080/TCP",
        ("192.168.10.1", 30080, True),
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
@pytest.mark.parametrize("order", [1, -1])
def test_the_oldest_has_it_until_it_goes(name: str, order: int) -> None:
    spec, problem, (address, port, is_node_port) = CONFLICTS[name]
    young, old = _two(**spec)
    world = ServiceWorld(*(young, old)[::order])
    at = ip_address(address), "TCP", port, is_node_port
    named = HTTP["name"] if "ports" in spec else ""
    assert world.compiler.problems() == {("a", "young"): (problem,)}
    assert world.compiler.service_at(*at) == ServiceName("b", "old", named)
    world.remove(old)
    assert world.compiler.problems() == {}
    assert world.compiler.service_at(*at) == ServiceName("a", "young", named)
    assert world.ruleset == ServiceWorld(young).ruleset


def test_a_port_that_is_there_twice_is_reported() -> None:
    """The API server refuses it; a manifest may say it."""
    ports = (
        {"name": "a", "port": 80},
        {"name": "b", "port": 80},
        {"name": "c", "port": 80, "protocol": "UDP"},
    )
    world = ServiceWorld(service("shop/web", "10.96.0.1", ports=ports))
    assert world.compiler.problems() == {
        ("shop", "web"): ("spec.ports[1]: 80/TCP is there already: the first of them counts",)
    }
    assert world.compiler.service_at(ip_address("10.96.0.1"), "TCP", 80) == ServiceName("shop", "web", "a")


def test_one_load_balancer_address_for_two_services_by_port() -> None:
    shared = {"type": "LoadBalancer", "status": load_balancer("203.0.113.1")}
    one, other = (
        service("a/one", "10.96.0.1", ports=(80,), **shared),
        service("b/other", "10.96.0.2", ports=(81,), **shared),
    )
    assert not ServiceWorld(one, other).compiler.problems()


# What is asked of it


def test_endpoints_of_a_frontend_are_all_that_a_flow_may_go_to() -> None:
    compiler = ServiceWorld(*CLUSTER).compiler
    here, there = (ip_address("10.244.0.2"), 8080), (ip_address("10.244.1.2"), 8080)
    assert compiler.endpoints_of(ip_address("203.0.113.1"), "TCP", 80) == {here, there}
    assert compiler.endpoints_of(ip_address("192.168.10.1"), "TCP", 30080, True) == {here, there}
    assert compiler.endpoints_of(ip_address("10.96.0.10"), "UDP", 53) == frozenset()
    assert compiler.endpoints_of(ip_address("10.96.0.10"), "TCP", 53) is None
    assert compiler.endpoints_of(ip_address("203.0.113.9"), "TCP", 80) is None


def test_health_checks_count_ready_endpoints_of_this_node() -> None:
    world = ServiceWorld(*CLUSTER)
    assert world.compiler.health_checks() == {("shop", "web"): (31000, 1)}
    world.remove(CLUSTER[3])
    assert world.compiler.health_checks() == {("shop", "web"): (31000, 0)}


def test_more_sticky_endpoints_than_can_be_counted_are_reported() -> None:
    many = [endpoint(str(ip_address(0x0A000001 + number))) for number in range(MOST_STICKY + 1)]
    world = ServiceWorld(
        service("shop/web", "10.96.0.1", sessionAffinity="ClientIP"),
        endpoint_slice("shop/web-1", "web", *many),
    )
    (problem,) = world.compiler.problems()["shop", "web"]
    assert problem == "spec.sessionAffinity: only the first 16383 of 16384 endpoints are used"


# What a change costs


def _many(count: int) -> list[dict[str, Any]]:
    services = [service(f"shop/s{n}", str(ip_address(0x0A600001 + n))) for n in range(count)]
    slices = [
        endpoint_slice(f"shop/s{n}-1", f"s{n}", f"10.244.{n // 100}.{n % 100 + 1}") for n in range(count)
    ]
    return [*NODES, *services, *slices]


CHANGES: dict[str, tuple[dict[str, Any], set[tuple[str, ...]]]] = {
    "an endpoint more": (
        endpoint_slice("shop/s7-1", "s7", "10.244.0.8", "10.244.9.9"),
        {("service", "shop", "s7"), ("balancer", "4", "2", "0")},
    ),
    "an endpoint that was not ready": (
        endpoint_slice("shop/s7-1", "s7", "10.244.0.8", endpoint("10.244.9.9", ready=False)),
        set(),
    ),
    "a new Service": (service("shop/new", "10.96.9.9"), {("service", "shop", "new")}),
    "a Node's heartbeat": ({**NODES[1], "status": {**NODES[1]["status"], "phase": "x"}}, set()),
    "a Node's zone": (
        in_zone(node("node-2", "192.168.10.2", "fd00:10::2", cidrs=NODES[1]["spec"]["podCIDRs"]), "west"),
        set(),
    ),
    "a new Node": (node("node-3", "192.168.10.3"), {("node-addresses",)}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_only_what_it_concerns(name: str) -> None:
    manifest, expected = CHANGES[name]
    world = ServiceWorld(*_many(200))
    assert world.put(manifest) == expected


def test_this_nodes_zone_reaches_only_services_with_hints() -> None:
    hinted = endpoint_slice("shop/s7-2", "s7", endpoint("10.244.9.9", zones=("east",)))
    world = ServiceWorld(*_many(50), hinted)
    moved = in_zone(node(NODE, "192.168.10.1", "fd00:10::1", cidrs=NODES[0]["spec"]["podCIDRs"]), "west")
    assert world.put(moved) <= {("service", "shop", "s7")}


def test_an_object_that_is_as_before_changes_nothing() -> None:
    world = ServiceWorld(*CLUSTER)
    world.desired.take()
    world.put(*CLUSTER)
    assert world.desired.take() == {}


# This node's address

OWN_ADDRESSES: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "of both families": (
        NODES,
        ["snat ip to 192.168.10.1 fully-random", "snat ip6 to fd00:10::1 fully-random"],
    ),
    "of one family": (
        (node(NODE, "192.168.10.1", "192.168.10.9"),),
        ["snat ip to 192.168.10.1 fully-random", "masquerade fully-random"],
    ),
    "unknown": ((NODES[1],), ["masquerade fully-random"]),
}


@pytest.mark.parametrize("name", OWN_ADDRESSES)
def test_what_goes_on_to_another_node_has_this_nodes_address(name: str) -> None:
    nodes, expected = OWN_ADDRESSES[name]
    chain = ServiceWorld(*nodes).ruleset.chains[ChainName(SERVICES_TABLE, "own_address")]
    assert [render.rule(rule) for rule in chain.rules] == expected


# Ports of the node

MAPPINGS: dict[str, tuple[PortMapping, tuple[str, ...], dict[SetName, set[Any]]]] = {
    "on every address": (
        PortMapping(8080, 80, "tcp", ""),
        ("10.244.0.2", "fd00:244::2"),
        {chains.HOST_PORTS[4]: {(6, 8080)}, chains.HOST_PORTS[6]: {(6, 8080)}},
    ),
    "on every IPv4 address": (
        PortMapping(53, 53, "udp", "0.0.0.0"),
        ("10.244.0.2", "fd00:244::2"),
        {chains.HOST_PORTS[4]: {(17, 53)}},
    ),
    "on one address": (
        PortMapping(53, 53, "sctp", "192.168.10.1"),
        ("10.244.0.2", "fd00:244::2"),
        {chains.HOST_PORTS_AT[4]: {(ip_address("192.168.10.1"), 132, 53)}},
    ),
    "on a link-local address: nowhere": (PortMapping(53, 53, "udp", "169.254.1.1"), ("10.244.0.2",), {}),
    "of a family that the Pod has not": (PortMapping(53, 53, "udp", "::"), ("10.244.0.2",), {}),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_host_ports(name: str) -> None:
    mapping, addresses, expected = MAPPINGS[name]
    made = tuple(host_ports(map(ip_address, addresses), (mapping,), "shop", "web"))
    assert {each.set: {each.key} for each in made} == expected
    for each in made:
        assert each.data == (
            next(ip for ip in map(ip_address, addresses) if str(each.set.name)[-1] == str(ip.version)),
            mapping.container_port,
        )


def test_manifests_of_these_tests_are_understood() -> None:
    """A test over a manifest that the decoder refuses would show nothing."""
    for manifest in CLUSTER:
        assert decoded(manifest).problems == ()
