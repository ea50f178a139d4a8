"""One result, written as each version of the specification has it."""

from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cni.result import Dns, Interface, Ip, Result, Route, parse_result

RESULT = Result(
    interfaces=(
        Interface("podwall1a2b3c4d", mac="0e:00:00:00:00:01", mtu=1450),
        Interface("eth0", mac="0e:00:00:00:00:02", mtu=1450, sandbox="/run/netns/blue"),
    ),
    ips=(
        Ip(ip_interface("10.244.0.5/32"), 1, ip_address("169.254.1.1")),
        Ip(ip_interface("fd00:10:244::5/128"), 1, ip_address("fe80::1")),
    ),
    routes=(
        Route(ip_network("0.0.0.0/0"), ip_address("169.254.1.1")),
        Route(ip_network("169.254.1.1/32"), scope=253, mtu=1450),
    ),
)
LINKS = [
    {"name": "podwall1a2b3c4d", "mac": "0e:00:00:00:00:01"},
    {"name": "eth0", "mac": "0e:00:00:00:00:02", "sandbox": "/run/netns/blue"},
]
IPS = [
    {"interface": 1, "address": "10.244.0.5/32", "gateway": "169.254.1.1"},
    {"interface": 1, "address": "fd00:10:244::5/128", "gateway": "fe80::1"},
]
ROUTES = [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "169.254.1.1/32"}]

WRITTEN = {
    "0.4.0": {
        "cniVersion": "0.4.0",
        "interfaces": LINKS,
        "ips": [{"version": "4", **IPS[0]}, {"version": "6", **IPS[1]}],
        "routes": ROUTES,
    },
    "1.0.0": {"cniVersion": "1.0.0", "interfaces": LINKS, "ips": IPS, "routes": ROUTES},
    "1.1.0": {
        "cniVersion": "1.1.0",
        "interfaces": [link | {"mtu": 1450} for link in LINKS],
        "ips": IPS,
        "routes": [ROUTES[0], ROUTES[1] | {"mtu": 1450, "scope": 253}],
    },
}


@pytest.mark.parametrize("version", WRITTEN)
def test_each_version(version):
    assert RESULT.to_json(version) == WRITTEN[version]


@pytest.mark.parametrize("version", WRITTEN)
def test_a_previous_result_reads_as_it_was_written(version):
    assert parse_result(WRITTEN[version]).to_json(version) == WRITTEN[version]


def test_the_latest_version_keeps_everything():
    assert parse_result(RESULT.to_json("1.1.0")) == RESULT


def test_dns_is_left_out_when_it_is_empty():
    dns = Dns(("10.96.0.10",), "cluster.local", ("svc.cluster.local",))
    assert Result(dns=dns).to_json("1.0.0")["dns"] == {
        "nameservers": ["10.96.0.10"],
        "domain": "cluster.local",
        "search": ["svc.cluster.local"],
    }
    assert "dns" not in Result().to_json("1.0.0")
    assert parse_result(Result(dns=dns).to_json("1.0.0")).dns == dns


@pytest.mark.parametrize(
    "given",
    [
        {"interfaces": [{}]},
        {"interfaces": 7},
        {"ips": [{}]},
        {"ips": [{"address": "10.0.0.300/32"}]},
        {"ips": ["10.0.0.3"]},
        {"routes": [{"dst": "nowhere"}]},
        {"routes": [{}]},
        {"dns": "10.0.0.1"},
    ],
)
def test_a_damaged_previous_result(given):
    with pytest.raises(ValueError, match=r"prevResult|address|does not appear"):
        parse_result(given)
