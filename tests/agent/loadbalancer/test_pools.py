"""Pools as the configuration writes them, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import re
from ipaddress import ip_address
from typing import Any

import pytest

from agent.config import ConfigError, load
from agent.loadbalancer.pools import parse_pools


def only_range(text: str) -> Any:
    return parse_pools([{"name": "p", "addresses": [text]}])[0].ranges[0]


@pytest.mark.parametrize(
    ("text", "size", "first", "inside", "outside"),
    [
        ("192.0.2.64/26", 64, "192.0.2.64", "192.0.2.127", "192.0.2.63 192.0.2.128"),
        ("192.0.2.192/26", 63, "192.0.2.192", "192.0.2.254", "192.0.2.255 192.0.2.191"),
        ("192.0.2.0/24", 254, "192.0.2.1", "192.0.2.254", "192.0.2.0 192.0.2.255"),
        ("10.8.0.0/16", 65536 - 512, "10.8.0.1", "10.8.255.254", "10.8.3.0 10.8.3.255"),
        ("192.0.2.0/31", 2, "192.0.2.0", "192.0.2.1", "192.0.2.2"),
        ("192.0.2.255/32", 1, "192.0.2.255", "192.0.2.255", "192.0.2.254"),
        ("192.0.2.250-192.0.3.5", 12, "192.0.2.250", "192.0.2.255 192.0.3.0", "192.0.3.6"),
        (" 192.0.2.7 - 192.0.2.7 ", 1, "192.0.2.7", "192.0.2.7", "192.0.2.8"),
        ("192.0.2.7", 1, "192.0.2.7", "192.0.2.7", "192.0.2.8"),
        ("2001:db8::/120", 255, "2001:db8::1", "2001:db8::ff", "2001:db8:: 2001:db8::100 192.0.2.1"),
        ("2001:db8::/64", 2**64 - 1, "2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", "2001:db8:0:1::"),
        ("2001:db8::-2001:db8::1", 2, "2001:db8::", "2001:db8::1", "2001:db8::2"),
    ],
)
def test_what_a_range_holds(text: str, size: int, first: str, inside: str, outside: str) -> None:
    found = only_range(text)
    assert (found.size, next(iter(found))) == (size, ip_address(first))
    assert all(ip_address(each) in found for each in [first, *inside.split()])
    assert not any(ip_address(each) in found for each in outside.split())


def test_size_counts_what_iterating_gives() -> None:
    for text in ("10.0.0.0/22", "10.0.0.128/25", "10.0.0.64/27", "2001:db8::/118", "10.0.0.250-10.0.2.3"):
        found = only_range(text)
        each = list(found)
        assert len(each) == len(set(each)) == found.size
        assert all(ip in found for ip in each)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{", "a list of pools as JSON"),
        ({"name": "p"}, "a list of pools, each with a name and addresses"),
        (["p"], "[0] has a name and addresses"),
        ([{"addresses": ["10.0.0.1"]}], "[0].name is a word"),
        ([{"name": "p"}], "[0].addresses names at least one address"),
        ([{"name": "p", "addresses": "10.0.0.1"}], "[0].addresses is a list of words"),
        ([{"name": "p", "addresses": [10]}], "[0].addresses is a list of words"),
        (
            [{"name": "p", "addresses": ["10.0.0.041"]}],
            "[0].addresses[0] is a CIDR, FIRST-LAST or an address",
        ),
        ([{"name": "p", "addresses": ["10.0.0.9-10.0.0.1"]}], "not '10.0.0.9-10.0.0.1'"),
        ([{"name": "p", "addresses": ["10.0.0.1-2001:db8::1"]}], "is a CIDR, FIRST-LAST"),
        ([{"name": "p", "addresses": ["10.0.0.1", "10.0.0.0/33"]}], "[0].addresses[1] is a CIDR"),
        ([{"name": "p", "addresses": ["127.0.0.0/30"]}], "no address of 127.0.0.0/8"),
        ([{"name": "p", "addresses": ["223.255.255.1-224.0.0.1"]}], "no address of 224.0.0.0/3"),
        ([{"name": "p", "addresses": ["fe80::1"]}], "no address of fe80::/10"),
        ([{"name": "p", "addresses": ["10.0.0.1"], "adresses": []}], "not 'adresses'"),
        ([{"name": "p", "addresses": ["10.0.0.1"], "auto_assign": "no"}], "auto_assign is true or false"),
        ([{"name": "p", "addresses": ["10.0.0.1"], "service_selector": ["a"]}], "service_selector is labels"),
        (
            [{"name": "p", "addresses": ["10.0.0.1"]}, {"name": "p", "addresses": ["10.0.0.2"]}],
            "only one is called 'p'",
        ),
        (
            [{"name": "p", "addresses": ["10.0.0.0/24"]}, {"name": "q", "addresses": ["10.0.0.9"]}],
            "10.0.0.0-10.0.0.255 of 'p' and 10.0.0.9 of 'q' do overlap",
        ),
    ],
)
def test_what_is_said_of_pools_that_cannot_be_used(value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_pools(value)


def test_the_networks_of_a_pool() -> None:
    pool = parse_pools([{"name": "p", "addresses": ["10.0.0.1-10.0.0.6", "10.1.0.0/16", "2001:db8::7"]}])[0]
    assert [str(each) for each in pool.networks()] == [
        "10.0.0.1/32",
        "10.0.0.2/31",
        "10.0.0.4/31",
        "10.0.0.6/32",
        "10.1.0.0/16",
        "2001:db8::7/128",
    ]


def test_whom_a_pool_serves() -> None:
    pool = parse_pools(
        [{"name": "p", "addresses": ["10.0.0.1"], "namespaces": ["a"], "service_selector": {"tier": "web"}}]
    )[0]
    assert pool.serves("a", {"tier": "web", "x": "y"})
    assert not pool.serves("b", {"tier": "web"})
    assert not pool.serves("a", {"tier": "db"})


def test_the_setting_is_yaml_in_a_file_and_json_elsewhere(tmp_path: Any) -> None:
    pools = [{"name": "lab", "addresses": ["172.30.0.200-172.30.0.209"], "auto_assign": False}]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"node_name": "a", "load_balancer_pools": pools}))
    by_file = load(["--config", str(file)], {})
    by_flag = load(["--node-name", "a", "--load-balancer-pools", json.dumps(pools)], {})
    assert by_file.load_balancer_pools == by_flag.load_balancer_pools == parse_pools(pools)
    assert load(["--node-name", "a"], {"PODWALL_LOAD_BALANCER_POOLS": ""}).load_balancer_pools == ()


def test_a_bad_pool_ends_the_start_by_name() -> None:
    with pytest.raises(ConfigError, match=r"PODWALL_LOAD_BALANCER_POOLS: load_balancer_pools .*FIRST-LAST"):
        load(["--node-name", "a"], {"PODWALL_LOAD_BALANCER_POOLS": '[{"name": "p", "addresses": ["x"]}]'})
