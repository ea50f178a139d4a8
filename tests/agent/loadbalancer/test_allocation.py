"""Who gets which address: a table of Services, and laws that hold for any."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.cluster.decode import decode
from agent.cluster.model import LoadBalancerIngress, Service, ServicePort
from agent.loadbalancer.allocation import (
    ADDRESSES,
    CLASS,
    POOL,
    SHARING_KEY,
    Allocation,
    addresses_of,
    allocate,
    is_ours,
)
from agent.loadbalancer.pools import parse_pools

POOLS = parse_pools(
    [
        {"name": "web", "addresses": ["192.0.2.1-192.0.2.2"], "namespaces": ["web"]},
        {"name": "main", "addresses": ["10.9.0.1-10.9.0.3", "2001:db8::1-2001:db8::3"]},
        {"name": "reserve", "addresses": ["10.9.1.1-10.9.1.2"], "auto_assign": False},
        {"name": "labelled", "addresses": ["10.9.2.1"], "service_selector": {"tier": "gold"}},
    ]
)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def service(
    name: str,
    *,
    age: int = 0,
    has: str = "",
    asks: str = "",
    pool: str = "",
    shares: str = "",
    ports: str = "TCP/80",
    families: tuple[int, ...] = (4,),
    **more: Any,
) -> Service:
    """A Service of type LoadBalancer; age counts from the oldest."""
    annotations = {ADDRESSES: asks, POOL: pool, SHARING_KEY: shares}
    return Service(
        **{  # type: ignore[arg-type]  # any field may be given
            "namespace": "default",
            "name": name,
            "type": "LoadBalancer",
            "created": BEGIN + timedelta(seconds=age),
            "annotations": {key: value for key, value in annotations.items() if value},
            "load_balancer": tuple(LoadBalancerIngress(ip_address(ip)) for ip in has.split()),
            "ports": tuple(
                ServicePort(int(text.split("/")[1]), protocol=text.split("/")[0])  # type: ignore[arg-type]
                for text in ports.split()
            ),
            "ip_families": families,
            "selector": {"app": "a"},
            **more,
        }
    )


def given_to(allocation: Allocation) -> dict[str, str]:
    return {name: " ".join(map(str, ips)) for (_, name), ips in allocation.addresses.items()}


CASES = {
    "the lowest free ones, the oldest first": (
        [service("b", age=1), service("a", age=2), service("c")],
        {"c": "10.9.0.1", "b": "10.9.0.2", "a": "10.9.0.3"},
    ),
    "without a time the name decides": (
        [service("b", created=None), service("a", created=None)],
        {"a": "10.9.0.1", "b": "10.9.0.2"},
    ),
    "what one has it keeps": (
        [service("new"), service("old", age=9, has="10.9.0.1")],
        {"old": "10.9.0.1", "new": "10.9.0.2"},
    ),
    "of two with the same the older keeps it": (
        [service("young", age=1, has="10.9.0.2"), service("old", has="10.9.0.2")],
        {"old": "10.9.0.2", "young": "10.9.0.1"},
    ),
    "what is in no pool any more goes": ([service("a", has="10.8.0.1")], {"a": "10.9.0.1"}),
    "what is in a pool of others goes": ([service("a", has="192.0.2.1")], {"a": "10.9.0.1"}),
    "the first pool that is for it": ([service("a", namespace="web")], {"a": "192.0.2.1"}),
    "the next pool when that is full": (
        [service(name, namespace="web") for name in "abc"],
        {"a": "192.0.2.1", "b": "192.0.2.2", "c": "10.9.0.1"},
    ),
    "a pool for labels": (
        [service("a", has="10.9.2.1", labels={"tier": "gold"}), service("b", has="10.9.2.1")],
        {"a": "10.9.2.1", "b": "10.9.0.1"},
    ),
    "a reserve is given by name only": ([service("a", pool="reserve")], {"a": "10.9.1.1"}),
    "a named pool and the address of another": (
        [service("a", pool="reserve", has="10.9.0.1")],
        {"a": "10.9.1.1"},
    ),
    "an address asked for": ([service("a", asks="10.9.1.2")], {"a": "10.9.1.2"}),
    "one asked for instead of the one it has": (
        [service("a", asks="10.9.0.3", has="10.9.0.1")],
        {"a": "10.9.0.3"},
    ),
    "asking goes before taking any, however old": (
        [service("old"), service("young", age=5, asks="10.9.0.1")],
        {"young": "10.9.0.1", "old": "10.9.0.2"},
    ),
    "spec.loadBalancerIP asks, too": (
        [service("a", load_balancer_ip=ip_address("10.9.0.3"))],
        {"a": "10.9.0.3"},
    ),
    "the annotation overrides it": (
        [service("a", load_balancer_ip=ip_address("10.9.0.3"), asks="10.9.0.2")],
        {"a": "10.9.0.2"},
    ),
    "both families, in the Service's order": (
        [service("a", families=(6, 4), ip_family_policy="RequireDualStack")],
        {"a": "2001:db8::1 10.9.0.1"},
    ),
    "both families asked for": (
        [service("a", families=(4, 6), asks="2001:db8::3, 10.9.0.2")],
        {"a": "10.9.0.2 2001:db8::3"},
    ),
    "one asked for, the other any": (
        [service("a", families=(4, 6), asks="2001:db8::3")],
        {"a": "10.9.0.1 2001:db8::3"},
    ),
    "the pool of one family serves the other": (
        [service("a", namespace="web", families=(4, 6), has="10.9.0.2")],
        {"a": "10.9.0.2 2001:db8::1"},
    ),
    "a family that is not wanted any more goes": (
        [service("a", families=(6,), has="10.9.0.1 2001:db8::2")],
        {"a": "2001:db8::2"},
    ),
    "SingleStack has one, whatever it had": (
        [service("a", families=(4, 6), ip_family_policy="SingleStack", has="2001:db8::2 10.9.0.1")],
        {"a": "10.9.0.1"},
    ),
    "families of the cluster addresses": (
        [service("a", families=(), cluster_ips=(ip_address("fd00::1"),))],
        {"a": "2001:db8::1"},
    ),
    "a shared address": (
        [service("a", shares="k"), service("b", shares="k", ports="UDP/80"), service("c", shares="j")],
        {"a": "10.9.0.1", "b": "10.9.0.1", "c": "10.9.0.2"},
    ),
    "no sharing with the same port": (
        [service("a", shares="k"), service("b", shares="k", ports="TCP/81 TCP/80")],
        {"a": "10.9.0.1", "b": "10.9.0.2"},
    ),
    "no sharing between Cluster and Local": (
        [
            service("a", shares="k"),
            service("b", shares="k", ports="TCP/81", external_traffic_policy="Local"),
        ],
        {"a": "10.9.0.1", "b": "10.9.0.2"},
    ),
    "Local shares with the same Pods only": (
        [
            service("a", shares="k", ports="TCP/1", external_traffic_policy="Local"),
            service("b", shares="k", ports="TCP/2", external_traffic_policy="Local"),
            service("c", shares="k", ports="TCP/3", external_traffic_policy="Local", selector={"app": "c"}),
        ],
        {"a": "10.9.0.1", "b": "10.9.0.1", "c": "10.9.0.2"},
    ),
    "who shared and collides now moves, the younger": (
        [service("a", has="10.9.0.2", shares="k"), service("b", age=1, has="10.9.0.2", shares="k")],
        {"a": "10.9.0.2", "b": "10.9.0.1"},
    ),
    "another class is nobody's business": (
        [service("a", load_balancer_class="example.com/lb", has="10.9.0.1"), service("b")],
        {"b": "10.9.0.1"},
    ),
    "our class": ([service("a", load_balancer_class=CLASS)], {"a": "10.9.0.1"}),
    "another type loses what it had of a pool": (
        [service("a", type="NodePort", has="10.9.0.1"), service("b", type="ClusterIP", has="8.8.8.8")],
        {"a": ""},
    ),
    "one that is being deleted keeps, but gets nothing": (
        [service("a", deleting=True, has="10.9.0.2"), service("b", deleting=True)],
        {"a": "10.9.0.2", "b": ""},
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_who_gets_what(case: str) -> None:
    services, wanted = CASES[case]
    allocation = allocate(POOLS, services)
    assert (given_to(allocation), allocation.problems) == (wanted, {})
    assert given_to(allocate(POOLS, reversed(services))) == wanted


BAD = {
    "an address in no pool": (
        [service("a", asks="8.8.8.8")],
        "8.8.8.8 was asked for, but is in no pool that is for this Service",
    ),
    "an address in a pool of others": (
        [service("a", asks="192.0.2.1")],
        "192.0.2.1 was asked for, but is in no pool that is for this Service",
    ),
    "an address of another": (
        [service("b", age=1, asks="10.9.0.1"), service("c", has="10.9.0.1")],
        "10.9.0.1 was asked for, but Service default/c has it, and they have no common annotation "
        "podwall.dev/sharing-key",
    ),
    "a shared one with the same port": (
        [service("b", age=1, asks="10.9.0.1", shares="k"), service("c", has="10.9.0.1", shares="k")],
        "10.9.0.1 was asked for, but Service default/c has it, and both have port 80/TCP",
    ),
    "no address": (
        [service("a", asks="10.9.0.041", has="10.9.0.1")],
        "metadata.annotations[podwall.dev/load-balancer-ips]: '10.9.0.041' is not an IPv4 or IPv6 address "
        "(no leading zeros, no zone, no IPv4-mapped IPv6 address)",
    ),
    "an address of another family": (
        [service("a", asks="2001:db8::1")],
        "metadata.annotations[podwall.dev/load-balancer-ips]: 2001:db8::1 is of none of the Service's "
        "ipFamilies",
    ),
    "two of a family": (
        [service("a", asks="10.9.0.1,10.9.0.2")],
        "metadata.annotations[podwall.dev/load-balancer-ips]: 10.9.0.2 is a second address of its family, "
        "and a Service has one of each",
    ),
    "a pool that there is not": (
        [service("a", pool="gold")],
        "metadata.annotations[podwall.dev/load-balancer-pool]: no pool 'gold' has IPv4 addresses for this "
        "Service",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_what_is_said_of_a_bad_request(case: str) -> None:
    services, sentence = BAD[case]
    allocation = allocate(POOLS, services)
    assert allocation.problems == {services[0].key: (sentence,)}
    assert allocation.addresses[services[0].key] == ()


def test_exhaustion_is_told_and_hits_the_youngest() -> None:
    allocation = allocate(POOLS, [service(name, age=number) for number, name in enumerate("abcde")])
    assert given_to(allocation) == {"a": "10.9.0.1", "b": "10.9.0.2", "c": "10.9.0.3", "d": "", "e": ""}
    sentence = "no IPv4 address is free for it: add addresses to pool main"
    assert allocation.problems == {("default", name): (sentence,) for name in "de"}
    assert [allocation.used(pool, 4) for pool in POOLS] == [0, 3, 0, 0]


def test_the_address_of_a_node_is_given_to_nobody() -> None:
    """Whatever a pool says, and though a Service may have it already."""
    taken = {ip_address("10.9.0.1"), ip_address("10.9.0.2")}
    services = [service("a", has="10.9.0.1"), service("b", asks="10.9.0.2")]
    allocation = allocate(POOLS, services, taken)
    assert given_to(allocation) == {"a": "10.9.0.3", "b": ""}
    told = "10.9.0.2 was asked for, but it is the address of a Node"
    assert allocation.problems == {("default", "b"): (told,)}


def test_a_family_without_a_pool() -> None:
    pools = parse_pools([{"name": "four", "addresses": ["10.0.0.1-10.0.0.9"]}])
    both = {"families": (4, 6)}
    allocation = allocate(
        pools,
        [
            service("must", ip_family_policy="RequireDualStack", **both),
            service("may", ip_family_policy="PreferDualStack", **both),
            service("six", ip_family_policy="PreferDualStack", families=(6,)),
        ],
    )
    assert given_to(allocation) == {"may": "10.0.0.1", "must": "10.0.0.2", "six": ""}
    sentence = "no pool of load_balancer_pools gives IPv6 addresses to this Service"
    assert allocation.problems == {("default", "must"): (sentence,), ("default", "six"): (sentence,)}


def test_a_bad_load_balancer_ip_of_a_manifest() -> None:
    manifest = {
        "metadata": {"name": "a", "namespace": "default"},
        "spec": {"type": "LoadBalancer", "loadBalancerIP": "10.9.0", "ports": [{"port": 80}]},
    }
    decoded = decode("Service", manifest)
    assert isinstance(decoded, Service)
    allocation = allocate(POOLS, [decoded])
    assert allocation.addresses == {("default", "a"): ()}
    assert "spec.loadBalancerIP: '10.9.0' is not an IPv4" in allocation.problems["default", "a"][0]


def test_many_services_of_a_large_pool() -> None:
    pools = parse_pools([{"name": "p", "addresses": ["2001:db8::/64", "10.0.0.0/8"]}])
    services = [service(f"s{number:05}", age=number, families=(4, 6)) for number in range(5000)]
    allocation = allocate(pools, services)
    assert len(allocation.holders) == 10_000
    assert allocation.addresses[services[-1].key][1] == ip_address("2001:db8::1388")


# Laws


@st.composite
def any_service(draw: st.DrawFn, number: int) -> Service:
    some = [
        "10.9.0.1",
        "10.9.0.2",
        "10.9.1.1",
        "192.0.2.1",
        "2001:db8::1",
        "2001:db8::3",
        "10.9.2.1",
        "8.8.8.8",
    ]
    ports = draw(
        st.lists(st.sampled_from(["TCP/80", "UDP/80", "TCP/443", "SCTP/9"]), min_size=1, unique=True)
    )
    return service(
        f"s{number}",
        age=draw(st.integers(0, 5)),
        namespace=draw(st.sampled_from(["default", "web"])),
        has=" ".join(draw(st.lists(st.sampled_from(some), max_size=2, unique=True))),
        asks=",".join(draw(st.one_of(st.just([]), st.lists(st.sampled_from(some), max_size=2)))),
        pool=draw(st.sampled_from(["", "", "", "reserve", "none"])),
        shares=draw(st.sampled_from(["", "k", "j"])),
        ports=" ".join(ports),
        families=draw(st.sampled_from([(4,), (6,), (4, 6), (6, 4)])),
        ip_family_policy=draw(st.sampled_from(["", "SingleStack", "PreferDualStack", "RequireDualStack"])),
        external_traffic_policy=draw(st.sampled_from(["Cluster", "Local"])),
        selector=draw(st.sampled_from([None, {"app": "a"}, {"app": "b"}])),
        labels=draw(st.sampled_from([{}, {"tier": "gold"}])),
        deleting=draw(st.booleans()),
        load_balancer_class=draw(st.sampled_from([None, None, CLASS, "other"])),
        type=draw(st.sampled_from(["LoadBalancer"] * 4 + ["ClusterIP"])),
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[Service]:
    return [draw(any_service(number)) for number in range(draw(st.integers(1, 9)))]


def with_status(services: list[Service], allocation: Allocation) -> list[Service]:
    """The Services when their statuses have been written."""
    return [
        msgspec.structs.replace(
            each, load_balancer=tuple(map(LoadBalancerIngress, allocation.addresses[each.key]))
        )
        if each.key in allocation.addresses
        else each
        for each in services
    ]


@settings(max_examples=400, deadline=None)
@given(clusters(), st.randoms())
def test_laws(services: list[Service], random: Any) -> None:
    allocation = allocate(POOLS, services)
    by_key = {each.key: each for each in services}

    shuffled = random.sample(services, len(services))
    assert allocate(POOLS, shuffled) == allocation, "the order in which Services are read decides nothing"

    written = with_status(services, allocation)
    again = allocate(POOLS, written)
    assert again.addresses == {
        key: ips for key, ips in allocation.addresses.items() if ips or is_ours(by_key[key])
    }, "what was given is kept"

    for ip, holders in allocation.holders.items():
        together = [by_key[key] for key in holders]
        for at, one in enumerate(together):
            for other in together[at + 1 :]:
                assert one.annotations[SHARING_KEY] == other.annotations[SHARING_KEY], ip
                assert one.external_traffic_policy == other.external_traffic_policy
                assert not {(p.protocol, p.port) for p in one.ports} & {
                    (p.protocol, p.port) for p in other.ports
                }

    for key, ips in allocation.addresses.items():
        of = by_key[key]
        assert of.type != "LoadBalancer" or of.load_balancer_class in (None, CLASS)
        assert len({ip.version for ip in ips}) == len(ips)
        for ip in ips:
            assert ip.version in of.ip_families
            pool = next(pool for pool in POOLS if ip in pool)
            assert pool.serves(of.namespace, of.labels)
            assert (
                pool.auto_assign
                or of.annotations.get(POOL) == pool.name
                or ip in addresses_of(of)
                or str(ip) in of.annotations.get(ADDRESSES, "")
            )
        if not ips and of.type == "LoadBalancer" and not of.deleting:
            assert allocation.problems.get(key), "who has nothing is told why"


@settings(max_examples=200, deadline=None)
@given(clusters(), st.data())
def test_a_new_service_takes_nothing_from_those_that_have_something(
    services: list[Service], data: st.DataObject
) -> None:
    written = with_status(services, allocate(POOLS, services))
    before = allocate(POOLS, written)
    newcomer = msgspec.structs.replace(data.draw(any_service(99)), load_balancer=())
    after = allocate(POOLS, [*written, newcomer])
    for key, ips in before.addresses.items():
        assert set(ips) <= set(after.addresses[key])
