"""Which Lease an address belongs to, and which nodes may hold it in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from agent.cluster.model import Endpoint, EndpointSlice, LoadBalancerIngress, Node, Service
from agent.loadbalancer.pools import parse_pools
from agent.loadbalancer.shards import EXCLUDED, SHARDS, Shard, eligible, order, shards

POOLS = parse_pools([{"name": "p", "addresses": ["10.9.0.0/16", "2001:db8::/64"]}])
NODES = tuple(Node(name, ready=True) for name in ("a", "b", "c", "d"))
NAMES = {node.name for node in NODES}


def service(name: str, has: str, **more: object) -> Service:
    status = tuple(LoadBalancerIngress(ip_address(ip)) for ip in has.split())
    whole = {"type": "LoadBalancer", "load_balancer": status, "selector": {"app": name}, **more}
    return Service("default", name, **whole)  # type: ignore[arg-type]  # any field may be given


def endpoints(service: str, ready: str = "", ending: str = "", family: int = 4) -> EndpointSlice:
    """A slice with an endpoint on each of these nodes."""
    address = (ip_address("10.0.0.1" if family == 4 else "fd00::1"),)
    found = [Endpoint(address, node=node) for node in ready.split()]
    found += [Endpoint(address, ready=False, terminating=True, node=node) for node in ending.split()]
    return EndpointSlice(
        "default",
        f"{service}-{family}",
        service=service,
        address_type="IPv4" if family == 4 else "IPv6",
        endpoints=tuple(found),
    )


def planned(
    services: Iterable[Service], slices: Iterable[EndpointSlice] = (), nodes: Iterable[Node] = NODES
) -> list[Shard]:
    of = tuple(slices)
    found = shards(
        POOLS, services, nodes, lambda key: [each for each in of if (each.namespace, each.service) == key]
    )
    assert all(name == shard.lease for name, shard in found.items())
    return list(found.values())


def only(
    services: Iterable[Service], slices: Iterable[EndpointSlice] = (), nodes: Iterable[Node] = NODES
) -> Shard:
    (shard,) = planned(services, slices, nodes)
    return shard


LOCAL = {"external_traffic_policy": "Local"}


def test_addresses_of_the_cluster_fall_into_few_leases() -> None:
    found = planned([service(f"s{n}", f"10.9.{n // 250}.{n % 250 + 1}") for n in range(1000)])
    assert {shard.lease for shard in found} == {f"podwall-lb-{n:02}" for n in range(SHARDS)}
    sizes = [len(shard.addresses) for shard in found]
    assert sum(sizes) == 1000
    assert max(sizes) < 100
    first = Counter(shard.candidates[0] for shard in found)
    assert len(first) == 4, "the Leases' first choices are spread over the nodes"


def test_every_ready_node_is_a_candidate_in_the_order_of_the_lease() -> None:
    shard = only([service("s", "10.9.0.1")])
    assert set(shard.candidates) == NAMES
    assert [shard.rank(name) for name in shard.candidates] == [0, 1, 2, 3]
    assert shard.rank("z") is None
    assert shard.can_answer("z", ip_address("10.9.0.1"))


def test_a_nodes_coming_or_going_moves_nobody_else() -> None:
    for lease in ("x", "y", "z"):
        whole = order(lease, NAMES)
        assert order(lease, NAMES - {"b"}) == tuple(name for name in whole if name != "b")


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ((Node("a", ready=True), Node("b")), "a"),
        ((Node("a", ready=True), Node("b", ready=True, unschedulable=True)), "a"),
        ((Node("a", ready=True), Node("b", ready=True, deleting=True)), "a"),
        ((Node("a", ready=True, unschedulable=True), Node("b")), "a"),
        ((Node("a", ready=True, unschedulable=True), Node("b", ready=True, deleting=True)), "a b"),
        ((Node("a"), Node("b")), "a b"),
        ((Node("a", ready=True, labels={EXCLUDED: ""}), Node("b", ready=True)), "b"),
        ((Node("a", ready=True, labels={EXCLUDED: "true"}), Node("b")), "b"),
        ((Node("a", ready=True, labels={EXCLUDED: "false"}),), ""),
        ((), ""),
    ],
)
def test_who_may_answer(nodes: tuple[Node, ...], wanted: str) -> None:
    assert eligible(nodes) == set(wanted.split())


LOCAL_CASES = {
    "where a ready endpoint is": ([endpoints("s", ready="b")], "b"),
    "where several are": ([endpoints("s", ready="b d")], "b d"),
    "ready before ending": ([endpoints("s", ready="b", ending="c")], "b"),
    "ending when nothing else serves": ([endpoints("s", ending="c")], "c"),
    "nowhere": ([endpoints("s")], ""),
    "not by endpoints of the other family": ([endpoints("s", ready="b", family=6)], ""),
    "not by endpoints of another Service": ([endpoints("t", ready="b")], ""),
    "not on a node that does not exist": ([endpoints("s", ready="z")], ""),
}


@pytest.mark.parametrize("case", LOCAL_CASES, ids=list(LOCAL_CASES))
def test_a_local_address_is_answered(case: str) -> None:
    slices, wanted = LOCAL_CASES[case]
    shard = only([service("s", "10.9.0.1", **LOCAL)], slices)
    assert set(shard.candidates) == set(wanted.split())
    assert shard.lease.startswith("podwall-lb-local-")


def test_local_and_a_cordoned_node() -> None:
    nodes = (replace(NODES[0], unschedulable=True), *NODES[1:])
    local = service("s", "10.9.0.1", **LOCAL)
    assert only([local], [endpoints("s", ready="a b")], nodes).candidates == ("b",)
    assert only([local], [endpoints("s", ready="a")], nodes).candidates == ("a",)


def test_the_families_of_a_local_service_have_their_own_leases() -> None:
    both = planned(
        [service("s", "10.9.0.1 2001:db8::1", **LOCAL)],
        [endpoints("s", ready="a"), endpoints("s", ready="b", family=6)],
    )
    assert sorted(shard.candidates for shard in both) == [("a",), ("b",)]


def test_services_of_the_same_pods_share_a_lease() -> None:
    pods = {"selector": {"app": "x"}, **LOCAL}
    slices = [endpoints("s", ready="a b"), endpoints("t", ready="b")]
    shard = only([service("s", "10.9.0.1", **pods), service("t", "10.9.0.2", **pods)], slices)
    assert shard.candidates == ("b",), "which can answer for both"
    assert [shard.can_answer("a", ip_address(f"10.9.0.{n}")) for n in (1, 2)] == [True, False]


def test_services_that_share_an_address() -> None:
    pods = {"selector": {"app": "x"}, **LOCAL}
    together = [service("s", "10.9.0.1", **pods), service("t", "10.9.0.1", **pods)]
    slices = [endpoints("s", ready="a b"), endpoints("t", ready="b c")]
    assert only(together, slices).candidates == ("b",)
    assert set(only(together, [endpoints("s", ready="a"), endpoints("t", ready="c")]).candidates) == {
        "a",
        "c",
    }


def test_an_address_is_in_one_lease_whatever_services_claim() -> None:
    """The oldest decides, as it does where addresses are given."""
    old = service("b", "10.9.0.1")
    young = service("c", "10.9.0.1", **LOCAL)
    assert only([young, old]).lease == only([old]).lease


def test_only_addresses_of_the_pools_are_answered() -> None:
    """Whoever may write statuses must not make nodes answer for, say, the router."""
    assert planned([service("s", "192.0.2.1")]) == []
    node = Node("a", ready=True, internal_ips=(ip_address("10.9.0.1"),))
    assert planned([service("s", "10.9.0.1")], nodes=[node]) == []
    assert planned([service("s", "10.9.0.1", load_balancer_class="example.com/other")]) == []
    assert planned([service("s", "10.9.0.1", type="ClusterIP")]) == []
    proxied = (LoadBalancerIngress(ip_address("10.9.0.1"), ip_mode="Proxy"),)
    assert planned([service("s", "", load_balancer=proxied)]) == []
