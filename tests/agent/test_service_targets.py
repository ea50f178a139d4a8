"""Where UDP flows to Services, NodePorts and Pods' ports of the node may lead, and what commits take away."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from msgspec.structs import replace as changed

from agent.cluster.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    Object,
    Service,
    ServicePort,
    kind_of,
)
from agent.cluster.store import Changed
from agent.compile import service_chains as chains
from agent.compile.service import ServiceSettings
from agent.compile.services import ServiceCompiler
from agent.conntrack import Endpoint as End
from agent.nft.diff import Change
from agent.nft.model import Element, Key, Proto, SetName
from agent.service_flows import (
    Destination,
    Places,
    Target,
    concerns_datagrams,
    removed_frontends,
    target_of,
)
from cni.spec import PortMapping
from tests.agent.pods.world import attachment

DNS = Service(
    namespace="kube-system",
    name="dns",
    type="NodePort",
    cluster_ips=(ip_address("10.96.0.10"),),
    ip_families=(4,),
    ports=(ServicePort(53, protocol="UDP", target_port=5353, node_port=30053),),
)
SLICE = EndpointSlice(
    namespace="kube-system",
    name="dns-1",
    service="dns",
    endpoints=(
        Endpoint(addresses=(ip_address("10.244.1.7"),), node="node1"),
        Endpoint(addresses=(ip_address("10.244.2.7"),), node="node2", ready=False, terminating=True),
        Endpoint(addresses=(ip_address("10.244.2.8"),), node="node2", ready=False, serving=False),
    ),
    ports=(EndpointPort(port=5353, protocol="UDP"),),
)
NODES = (
    Node("node1", internal_ips=(ip_address("172.18.0.2"),)),
    Node("node2", internal_ips=(ip_address("172.18.0.3"),)),
)
LOCAL = frozenset(map(ip_address, ("172.18.0.2", "172.18.0.77", "127.0.0.1", "fd00::2")))
PLACES = Places(LOCAL, frozenset(ip for node in NODES for ip in node.internal_ips))
POD = attachment(
    addresses=(ip_address("10.244.1.9"), ip_address("fd00:244::9")),
    port_mappings=(
        PortMapping(4000, 40, "udp", ""),
        PortMapping(4001, 41, "udp", "172.18.0.77"),
        PortMapping(4002, 42, "udp", "127.0.0.1"),
        PortMapping(4003, 43, "udp", "::"),
        PortMapping(4004, 44, "tcp", ""),
        PortMapping(30053, 45, "udp", ""),
    ),
)
SERVES = "10.244.1.7:5353", "10.244.2.7:5353"


def change(item: Object) -> Changed:
    return Changed(kind_of(item), item.key, None, item)


def compiler(*objects: Object) -> ServiceCompiler:
    made = ServiceCompiler("node1", ServiceSettings())
    made.apply(map(change, objects))
    return made


def ends(*texts: str) -> frozenset[End]:
    split = (text.rsplit(":", 1) for text in texts)
    return frozenset(End(ip_address(address), int(port)) for address, port in split)


CASES: dict[str, tuple[str, int, Target | None]] = {
    "its address": ("10.96.0.10", 53, Target(ends(*SERVES))),
    "another port of its address": ("10.96.0.10", 54, None),
    "its port on this node": ("172.18.0.2", 30053, Target(ends(*SERVES))),
    "its port on another address of this node": ("172.18.0.77", 30053, Target(ends(*SERVES))),
    "its port on another node": ("172.18.0.3", 30053, Target(ends(*SERVES), everyone=False)),
    "its port on the loopback": ("127.0.0.1", 30053, None),
    "its port on an address of nobody": ("192.0.2.1", 30053, None),
    "a Pod's port": ("172.18.0.2", 4000, Target(ends("10.244.1.9:40"))),
    "a Pod's port, IPv6": ("fd00::2", 4000, Target(ends("fd00:244::9:40"))),
    "a Pod's port on the loopback": ("127.0.0.1", 4000, None),
    "a Pod's port on another node": ("172.18.0.3", 4000, None),
    "a Pod's port of one address": ("172.18.0.77", 4001, Target(ends("10.244.1.9:41"))),
    "a Pod's port of one address, on another": ("172.18.0.2", 4001, None),
    "a Pod's port of the loopback": ("127.0.0.1", 4002, Target(ends("10.244.1.9:42"))),
    "a Pod's port of all IPv6": ("fd00::2", 4003, Target(ends("fd00:244::9:43"))),
    "a Pod's port of all IPv6, on IPv4": ("172.18.0.2", 4003, None),
    "a Pod's port of TCP": ("172.18.0.2", 4004, None),
    "somebody else": ("192.0.2.1", 53, None),
}


@pytest.mark.parametrize(("address", "port", "target"), CASES.values(), ids=CASES.keys())
def test_where_a_flow_may_lead(address: str, port: int, target: Target | None) -> None:
    serving_at = compiler(*NODES, DNS, SLICE).serving_at
    to = Destination(ip_address(address), Proto.UDP, port)
    assert target_of(to, serving_at, [POD], PLACES) == target


def test_node_ports_are_served_where_the_configuration_says() -> None:
    places = PLACES._replace(node_ports=(ip_network("172.18.0.76/31"),))
    serving_at = compiler(*NODES, DNS, SLICE).serving_at
    found = {
        address: target_of(Destination(ip_address(address), Proto.UDP, 30053), serving_at, [], places)
        for address in ("172.18.0.2", "172.18.0.3", "172.18.0.77")
    }
    assert found == {"172.18.0.2": None, "172.18.0.3": None, "172.18.0.77": Target(ends(*SERVES))}


def test_without_services_only_ports_of_pods_lead_somewhere() -> None:
    to = Destination(ip_address("172.18.0.2"), Proto.UDP, 30053)
    assert target_of(to, None, [POD], PLACES) == Target(ends("10.244.1.9:45"))
    assert target_of(to._replace(address=ip_address("10.96.0.10")), None, [POD], PLACES) is None
    assert target_of(to, None, [replace(POD, port_mappings=())], PLACES) is None


# What a commit takes away


def element(name: SetName, key: Key) -> Element:
    return Element(name, key, 7)


IP = ip_address("10.96.0.10")
REMOVED: dict[str, tuple[Element, Destination | None, bool]] = {
    "an address": (element(chains.FRONTENDS[4], (IP, 17, 53)), Destination(IP, 17, 53), False),
    "one with restrictions": (element(chains.RESTRICTED[4], (IP, 17, 53)), Destination(IP, 17, 53), False),
    "an address from outside": (element(chains.OUTSIDE[4], (IP, 132, 53)), Destination(IP, 132, 53), False),
    "a NodePort": (element(chains.NODE_PORTS[6], (17, 30053)), Destination(None, 17, 30053), False),
    "a Pod's port": (element(chains.HOST_PORTS[4], (17, 53)), Destination(None, 17, 53), True),
    "a Pod's port at": (element(chains.HOST_PORTS_AT[4], (IP, 17, 53)), Destination(IP, 17, 53), True),
    "of TCP": (element(chains.FRONTENDS[4], (IP, 6, 53)), None, False),
    "no frontend": (element(chains.BALANCE[4], 5), None, False),
}


@pytest.mark.parametrize(("item", "gone", "also_aside"), REMOVED.values(), ids=REMOVED.keys())
def test_frontends_that_a_commit_removes(item: Element, gone: Destination | None, also_aside: bool) -> None:
    none: frozenset[Destination] = frozenset()
    some = frozenset({gone}) if gone else none
    removed = {item.id: Change(item, None)}
    assert removed_frontends(removed, serving=True) == some
    assert removed_frontends(removed, serving=False) == (some if also_aside else none)
    assert removed_frontends({item.id: Change(None, item)}, serving=True) == none
    assert removed_frontends({item.id: Change(item, changed(item, data=8))}, serving=True) == none


TCP = changed(DNS, ports=(ServicePort(53),))
CONCERNS = {
    "a Service of UDP": (Changed("Service", DNS.key, None, DNS), True),
    "a Service of TCP": (Changed("Service", DNS.key, None, TCP), False),
    "a Service that was of UDP": (Changed("Service", DNS.key, DNS, TCP), True),
    "a Service that is gone": (Changed("Service", DNS.key, DNS, None), True),
    "a slice of UDP": (Changed("EndpointSlice", SLICE.key, SLICE, SLICE), True),
    "a slice of TCP": (
        Changed("EndpointSlice", SLICE.key, None, changed(SLICE, ports=(EndpointPort(port=1),))),
        False,
    ),
    "a Node": (change(NODES[0]), True),
}


@pytest.mark.parametrize(("of", "concerned"), CONCERNS.values(), ids=CONCERNS.keys())
def test_only_what_concerns_datagrams_has_flows_looked_at(of: Changed, concerned: bool) -> None:
    assert concerns_datagrams(of) is concerned
