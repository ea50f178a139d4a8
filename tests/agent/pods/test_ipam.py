"""Addresses: which is given, which never, and which not yet."""

from __future__ import annotations

import time
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.pods.ipam import Addresses, BadCidrsError, ExhaustedError


def addresses(*cidrs: str, rest_s: float = 10) -> Addresses:
    made = Addresses(rest_s)
    made.set_cidrs([ip_network(cidr) for cidr in cidrs])
    return made


def take(from_: Addresses, now: float = 0) -> list[str]:
    return [str(address) for address in from_.take(now)]


def test_one_of_each_family_and_never_the_network_or_broadcast_address() -> None:
    pool = addresses("10.1.0.0/30", "fd00::/126")
    assert take(pool) == ["10.1.0.1", "fd00::1"]
    assert take(pool) == ["10.1.0.2", "fd00::2"]
    with pytest.raises(
        ExhaustedError, match=r"no IPv4 address is free: podCIDR 10.1.0.0/30: 2 of 2 addresses in use"
    ):
        pool.take(0)
    assert [each[1:] for each in pool.use()] == [(2, 0, 2), (2, 0, 3)], "the failure took no IPv6 address"


def test_a_second_range_of_a_family_is_used_when_the_first_is_full() -> None:
    pool = addresses("10.1.0.0/30", "10.2.0.0/30")
    assert [take(pool) for _ in range(4)] == [["10.1.0.1"], ["10.1.0.2"], ["10.2.0.1"], ["10.2.0.2"]]
    with pytest.raises(ExhaustedError, match=r"10.1.0.0/30: 2 of 2.*; podCIDR 10.2.0.0/30: 2 of 2"):
        pool.take(0)


def test_a_freed_address_rests_and_the_longest_freed_comes_first() -> None:
    pool = addresses("10.1.0.0/29", rest_s=10)
    given = [pool.take(0) for _ in range(6)]
    pool.free(given[4], now=1)
    pool.free(given[2], now=2)
    with pytest.raises(ExhaustedError, match="4 of 6 addresses in use and 2 resting"):
        pool.take(10.9)
    assert pool.take(11) == given[4]
    with pytest.raises(ExhaustedError):
        pool.take(11.9)
    assert pool.take(12) == given[2]


def test_never_given_addresses_come_before_freed_ones() -> None:
    pool = addresses("10.1.0.0/29", rest_s=0)
    first = pool.take(0)
    pool.free(first, 0)
    assert take(pool, 100) == ["10.1.0.2"]


def test_what_was_held_before_the_start_is_passed_over() -> None:
    pool = addresses("10.1.0.0/29")
    pool.hold(ip_address("10.1.0.1"))
    pool.rest(ip_address("10.1.0.2"), since=0)
    pool.begin_behind([ip_address("10.1.0.5")])
    assert [take(pool) for _ in range(4)] == [["10.1.0.6"], ["10.1.0.3"], ["10.1.0.4"], ["10.1.0.5"]]
    with pytest.raises(ExhaustedError):
        pool.take(9)
    assert take(pool, 10) == ["10.1.0.2"]


def test_what_is_known_before_the_ranges_are() -> None:
    pool = Addresses(rest_s=10)
    pool.hold(ip_address("10.1.0.2"))
    pool.rest(ip_address("10.1.0.3"), since=0)
    pool.begin_behind([ip_address("10.1.0.1")])
    pool.set_cidrs([ip_network("10.1.0.0/29")])
    assert take(pool) == ["10.1.0.4"]


def test_changed_ranges_keep_what_is_in_use() -> None:
    pool = addresses("10.1.0.0/29", rest_s=10)
    kept = pool.take(0)
    pool.set_cidrs([ip_network("10.2.0.0/29")])
    assert take(pool) == ["10.2.0.1"]
    assert set(kept) <= pool.used
    pool.free(kept, 0)
    pool.set_cidrs([ip_network("10.1.0.0/29"), ip_network("10.2.0.0/29")])
    assert [take(pool)[0] for _ in range(6)] == [*(f"10.1.0.{i}" for i in range(2, 7)), "10.2.0.2"]
    assert take(pool, 10) == ["10.1.0.1"]


@pytest.mark.parametrize(
    ("cidrs", "message"),
    [
        (["10.1.0.0/24", "10.1.0.128/25"], "10.1.0.128/25 overlaps 10.1.0.0/24"),
        (["fd00::/64", "fd00::/64"], "fd00::/64 overlaps fd00::/64"),
        (["10.1.0.1/32"], "10.1.0.1/32 is too small"),
        (["10.1.0.0/31"], "10.1.0.0/31 is too small"),
        (["fd00::/128"], "fd00::/128 is too small"),
        (["127.0.0.0/16"], "127.0.0.0/16 is not a range of unicast"),
        (["224.0.0.0/24"], "is not a range of unicast"),
        (["169.254.1.0/24"], "is not a range of unicast"),
        (["fe80::/64"], "is not a range of unicast"),
        (["0.0.0.0/24"], "is not a range of unicast"),
    ],
)
def test_ranges_that_cannot_be_used(cidrs: list[str], message: str) -> None:
    pool = addresses("10.9.0.0/24")
    with pytest.raises(BadCidrsError, match=message):
        pool.set_cidrs([ip_network(cidr) for cidr in cidrs])
    assert take(pool) == ["10.9.0.1"], "the ranges before are still in use"


@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "fd00::/64"])
def test_the_size_of_a_range_costs_nothing(cidr: str) -> None:
    pool = addresses(cidr)
    begun = time.perf_counter()
    for _ in range(2000):
        pool.take(0)
    assert time.perf_counter() - begun < 1, "half a millisecond each would be a walk through the range"


def test_a_nearly_full_range_costs_nothing() -> None:
    pool = addresses("10.1.0.0/16", rest_s=0)
    given = [pool.take(0) for _ in range(65534)]
    begun = time.perf_counter()
    for i in range(2000):
        pool.free(given[i * 31], 0)
        assert pool.take(0) == given[i * 31]
    assert time.perf_counter() - begun < 1


STEPS = st.lists(
    st.one_of(
        st.just(("take", 0)),
        st.tuples(st.just("free"), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.integers(1, 6)),
        st.tuples(st.just("cidrs"), st.integers(0, 3)),
    ),
    max_size=120,
)
CHOICES = (["10.1.0.0/29", "fd00::/125"], ["10.1.0.0/28"], ["10.2.0.0/30", "10.1.0.0/29"], ["fd00::/126"])


@given(STEPS)
def test_no_address_is_anybodys_twice_and_every_one_rests(steps: list[tuple[str, int]]) -> None:
    rest_s = 5
    pool = addresses(*CHOICES[0], rest_s=rest_s)
    cidrs = [ip_network(cidr) for cidr in CHOICES[0]]
    now = 0
    held: list[tuple[object, ...]] = []
    freed: dict[object, int] = {}
    for step, number in steps:
        if step == "wait":
            now += number
        elif step == "cidrs":
            cidrs = [ip_network(cidr) for cidr in CHOICES[number]]
            pool.set_cidrs(cidrs)
        elif step == "free" and held:
            gone = held.pop(number % len(held))
            pool.free(gone, now)  # type: ignore[arg-type]
            freed.update(dict.fromkeys(gone, now))
        elif step == "take":
            taken = {address for each in held for address in each}
            try:
                given_now = pool.take(now)
            except ExhaustedError:
                for version in {cidr.version for cidr in cidrs}:
                    usable = [
                        ip
                        for c in cidrs
                        if c.version == version
                        for ip in (c.hosts() if version == 4 else list(c)[1:])
                    ]
                    free = [ip for ip in usable if ip not in taken and freed.get(ip, -rest_s) + rest_s <= now]
                    if not free:
                        break
                else:
                    raise AssertionError("refused, but every family had a free address") from None
                continue
            assert (
                len({address.version for address in given_now})
                == len(given_now)
                == len({c.version for c in cidrs})
            )
            for address in given_now:
                assert address not in taken, "given twice"
                assert freed.get(address, -rest_s) + rest_s <= now, "given too early"
                assert any(address in cidr and address != cidr.network_address for cidr in cidrs)
            held.append(given_now)
