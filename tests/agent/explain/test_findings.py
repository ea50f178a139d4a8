"""What is judged wrong of a node and a cluster, case by case, from facts alone."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from agent.cluster.model import Node, Service
from agent.cluster.store import snapshot_of
from agent.explain.findings import NOTE, Cluster, Finding, findings, wrong

WELL: dict[str, Any] = {
    "node": "a",
    "version": "0.1.0",
    "kernel": "6.1.0",
    "libnftables": "1.0.6",
    "mode": "auto",
    "services": "auto",
    "mtu": {"configured": 0, "planned": 1450},
    "agent": {
        "not_ready": [],
        "problems": [],
        "services": "on",
        "addresses": [{"cidr": "10.244.1.0/24", "used": 10, "resting": 0, "size": 253}],
        "object_problems": 0,
        "first_object_problem": "",
    },
    "unread": {},
    "sysctls": [],
    "features": [],
    "cni": {"directory": "/etc/cni/net.d", "files": ["10-podwall.conflist"], "own": "10-podwall.conflist"},
    "links": {
        "uplink": {"name": "eth0", "mtu": 1500},
        "tunnel_mtu": 1450,
        "pods": 3,
        "largest_pod_mtu": 1450,
        "smallest_pod_mtu": 1450,
        "underlay": 4,
        "others": {},
    },
    "filters": {"drops": [], "plugins": {}},
    "kube_proxy": "",
    "conntrack": {"used": 100, "most": 262144},
    "neighbours": [{"family": 4, "used": 5, "most": 1024}],
    "api": {"seconds": 0.02, "skew": 0.3, "error": "", "forbidden": []},
    "paths": [],
    "time": 1000.0,
}


def path(takes: int, way: str = "direct", asked: int = 1450) -> dict[str, Any]:
    return {
        "node": "b",
        "address": "192.0.2.2",
        "way": way,
        "pod_mtu": 1450,
        "asked": asked,
        "takes": takes,
    }


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    facts = copy.deepcopy(WELL)
    change(facts)
    return facts


def feature(matters: bool) -> dict[str, Any]:
    return {
        "name": "VXLAN devices",
        "module": "vxlan",
        "matters": matters,
        "without": "no tunnel",
        "why_not": "x",
    }


Change = Callable[[dict[str, Any]], object]
CASES: list[tuple[str, Change, list[str]]] = [
    ("well", lambda f: None, []),
    (
        "uplink smaller",
        lambda f: f["links"].update(largest_pod_mtu=9000),
        ["error mtu MTU too large: Pods have 9000, but the node's eth0 takes 1500"],
    ),
    (
        "path smaller",
        lambda f: f.update(paths=[path(1400)]),
        ["error mtu MTU too large: Pods have 1450, but the way to node b (192.0.2.2) takes 1400"],
    ),
    (
        "path smaller, tunnelled",
        lambda f: f.update(paths=[path(1480, "vxlan", 1500)]),
        [
            "error mtu MTU too large: Pods have 1450, but the way to node b (192.0.2.2) takes 1430 "
            "in the tunnel"
        ],
    ),
    ("path is enough", lambda f: f.update(paths=[path(1500, "vxlan", 1500)]), []),
    (
        "no echo at all",
        lambda f: f.update(paths=[path(0)]),
        ["note mtu node b (192.0.2.2) answers no ICMP echo, so its way is not measured"],
    ),
    (
        "kube-proxy while podwall serves",
        lambda f: f.update(kube_proxy="iptables chain KUBE-SERVICES (IPv4)"),
        [
            "error kube-proxy kube-proxy beside podwall: its rules (iptables chain KUBE-SERVICES (IPv4)) "
            "are here while podwall serves Services too"
        ],
    ),
    (
        "kube-proxy while podwall stands aside",
        lambda f: (f.update(kube_proxy="x"), f["agent"].update(services="off")),
        [
            "warning kube-proxy kube-proxy beside podwall: its rules (x) are here, "
            "so podwall leaves Services to it"
        ],
    ),
    ("kube-proxy as it is meant", lambda f: f.update(kube_proxy="x", services="off"), []),
    (
        "sorts first",
        lambda f: f["cni"].update(files=["05-cilium.conf", "10-podwall.conflist"]),
        ["error cni another network's configuration sorts before podwall's: /etc/cni/net.d/05-cilium.conf"],
    ),
    (
        "sorts behind",
        lambda f: f["cni"].update(files=["10-podwall.conflist", "99-bridge.conf"]),
        ["note cni another network's configuration is left in /etc/cni/net.d: 99-bridge.conf"],
    ),
    (
        "none of podwall",
        lambda f: f["cni"].update(files=["99-bridge.conf"]),
        ["error cni the runtime has no configuration of podwall in /etc/cni/net.d, so no Pod gets a network"],
    ),
    (
        "leftovers",
        lambda f: (
            f["links"].update(others={"X": {"links": ["cni0"], "total": 1}}),
            f["filters"].update(plugins={"Y": ["ip nat"]}),
        ),
        [
            "warning cni links of X are on the node: cni0",
            "warning cni rules of Y are on the node, in table ip nat",
        ],
    ),
    (
        "an input that is closed",
        lambda f: f["filters"].update(
            drops=[{"family": "inet", "table": "fw", "chain": "in", "hook": "input", "how": "policy drop"}]
        ),
        [
            "warning filters nftables table inet fw, chain in (input, policy drop) drops what Pods send to "
            "their node, and other nodes' tunnels"
        ],
    ),
    (
        "older iptables",
        lambda f: f["filters"].update(legacy=["iptables-legacy"]),
        ["note filters iptables-legacy has rules of its own on the node, which are not looked at here"],
    ),
    (
        "a setting",
        lambda f: f.update(
            sysctls=[
                {
                    "path": "net/ipv4/ip_forward",
                    "found": None,
                    "value": "1",
                    "why": "w",
                    "command": "sysctl -w x",
                }
            ]
        ),
        ["error sysctls net.ipv4.ip_forward is not there and must be 1: w"],
    ),
    (
        "a feature that matters",
        lambda f: f.update(features=[feature(True)]),
        ["error features the kernel 6.1.0 lacks VXLAN devices (x): no tunnel"],
    ),
    (
        "a feature nobody needs",
        lambda f: f.update(features=[feature(False)]),
        ["note features the kernel 6.1.0 lacks VXLAN devices (x): no tunnel"],
    ),
    ("conntrack below", lambda f: f["conntrack"].update(used=200000), []),
    (
        "conntrack nearly full",
        lambda f: f["conntrack"].update(used=220000),
        [
            "warning conntrack connection tracking holds 220000 of 262144 flows; "
            "when it is full new connections are dropped"
        ],
    ),
    (
        "neighbours full",
        lambda f: f["neighbours"][0].update(used=1020),
        [
            "error neighbours the neighbour table of ipv4 holds 1020 of 1024; "
            "when it is full nothing new is reached"
        ],
    ),
    (
        "addresses nearly gone",
        lambda f: f["agent"]["addresses"][0].update(used=220, resting=20),
        ["warning addresses of 253 addresses for Pods in 10.244.1.0/24, 240 are in use or rest"],
    ),
    (
        "no API server",
        lambda f: f["api"].update(error="no answer in time", skew=None),
        ["error api the API server cannot be asked: no answer in time"],
    ),
    (
        "a slow API server",
        lambda f: f["api"].update(seconds=2.34),
        ["warning api the API server took 2.3 s to say its version"],
    ),
    (
        "the clock",
        lambda f: f["api"].update(skew=-61.2),
        ["warning clock the node's clock is 61 s behind the API server's"],
    ),
    (
        "a right",
        lambda f: f["api"].update(forbidden=["watch pods"]),
        ["error rights podwall's ServiceAccount may not watch pods"],
    ),
    (
        "not ready",
        lambda f: f["agent"].update(not_ready=["no routes"]),
        ["error agent no Pod can be put on this node: no routes"],
    ),
    (
        "objects",
        lambda f: f["agent"].update(object_problems=2, first_object_problem="Service a/b: c"),
        ["warning objects 2 objects cannot be used as they are, such as Service a/b: c"],
    ),
    (
        "unread",
        lambda f: f.update(conntrack=None, unread={"conntrack": "no such file"}),
        ["note conntrack conntrack could not be looked at: no such file"],
    ),
    ("no agent", lambda f: f.update(agent=None), []),
    (
        "nothing was read",
        lambda f: f.update(dict.fromkeys(["links", "cni", "filters", "api", "neighbours"])),
        [],
    ),
]


def said(found: tuple[Finding, ...]) -> list[str]:
    return [f"{each.severity} {each.topic} {each.cause}" for each in found]


@pytest.mark.parametrize(
    ("change", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_one_node(change: Change, expected: list[str]) -> None:
    found = findings({"a": changed(change)}, Cluster())
    assert said(found) == expected
    assert wrong(found) == any(not each.startswith(NOTE) for each in expected)
    assert all(each.mend or each.severity == NOTE for each in found)


def test_a_command_to_copy_holds_no_other() -> None:
    """Links, files and tables are named by whoever has the right to make one."""
    drop = {
        "family": "ip",
        "table": "t;reboot",
        "chain": "c $(reboot)",
        "hook": "forward",
        "how": "policy drop",
    }
    facts = changed(
        lambda f: (
            f["cni"].update(files=["05;reboot.conf", "10-podwall.conflist", "99 $(reboot).conf"]),
            f["links"].update(others={"X": {"links": ["cni;reboot", "cni1", "cni2"], "total": 5}}),
            f["filters"].update(drops=[drop], plugins={"Y": ["ip $(reboot)"]}),
        )
    )
    found = findings({"a": facts}, Cluster())
    assert len(found) == 5
    harmless = "ip() { :; }; mv() { :; }; nft() { :; }; rm() { :; }; reboot() { echo rebooted; }; "
    for each in found:
        script = harmless + each.mend.removeprefix("on the node: ")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == "", each.mend
    assert "cni;reboot, cni1, cni2 and 2 more" in " ".join(each.cause for each in found)


def test_kube_proxy_that_is_gone_leaves_services_to_nobody() -> None:
    facts = changed(lambda f: (f.update(kube_proxy="x"), f["agent"].update(services="off")))
    (found,) = findings({"a": facts}, Cluster(kube_proxy=False))
    assert found.severity == "error"
    assert found.cause.startswith("kube-proxy is gone, but its rules (x) are here")


def test_the_worst_comes_first_and_causes_before_what_they_cause() -> None:
    facts = changed(
        lambda f: (
            f["agent"].update(not_ready=["it"]),
            f.update(conntrack=None, unread={"conntrack": "it"}),
            f["api"].update(seconds=9.0),
            f["links"].update(largest_pod_mtu=9000),
        )
    )
    found = findings({"a": facts}, Cluster())
    assert [(each.severity, each.topic) for each in found] == [
        ("error", "mtu"),
        ("error", "agent"),
        ("warning", "api"),
        ("note", "conntrack"),
    ]


BETWEEN: list[tuple[str, Change, Mapping[str, tuple[float, float]], list[str]]] = [
    ("alike", lambda f: None, {}, []),
    (
        "versions",
        lambda f: f.update(version="0.2.0"),
        {},
        ["warning versions agents have different versions of podwall: a, b: 0.1.0; c: 0.2.0"],
    ),
    (
        "MTU",
        lambda f: f["mtu"].update(planned=1400),
        {},
        ["warning mtu new Pods get different MTUs: a, b: 1450; c: 1400"],
    ),
    (
        "a clock ahead",
        lambda f: f.update(time=1060.0),
        dict.fromkeys("abc", (999.0, 1001.0)),
        ["warning clock the node's clock is 59 s ahead of most other nodes'"],
    ),
    ("our own clock is off", lambda f: None, dict.fromkeys("abc", (99.0, 101.0)), []),
    ("a slow answer is no skew", lambda f: f.update(time=1008.0), {"a": (999, 1001), "c": (999, 1009)}, []),
]


@pytest.mark.parametrize(
    ("change", "asked", "expected"), [c[1:] for c in BETWEEN], ids=[c[0] for c in BETWEEN]
)
def test_nodes_beside_each_other(
    change: Change, asked: Mapping[str, tuple[float, float]], expected: list[str]
) -> None:
    nodes = {"a": WELL, "b": WELL, "c": changed(change)}
    assert said(findings(nodes, Cluster(asked_at=asked))) == expected


def node(name: str, *cidrs: str, ip: str = "192.0.2.1") -> Node:
    return Node(name, pod_cidrs=tuple(map(ip_network, cidrs)), internal_ips=(ip_address(ip),))


def service(ip: str) -> Service:
    return Service("default", "kubernetes", cluster_ips=(ip_address(ip),))


OBJECTS = [
    ("well", (node("a", "10.244.1.0/24"), node("b", "10.244.2.0/24"), service("10.96.0.1")), []),
    ("no range", (node("a"),), ["a: the Node has no spec.podCIDRs, so its Pods get no addresses"]),
    (
        "the same range",
        (node("a", "10.244.1.0/24"), node("b", "10.244.1.0/24")),
        ["b: podCIDR 10.244.1.0/24 of Node b overlaps 10.244.1.0/24 of Node a"],
    ),
    (
        "a range inside another",
        (node("a", "10.244.0.0/16", "fd00::/64"), node("b", "10.244.1.0/24")),
        ["b: podCIDR 10.244.1.0/24 of Node b overlaps 10.244.0.0/16 of Node a"],
    ),
    (
        "the nodes' network",
        (node("a", "192.0.2.0/25"),),
        ["a: podCIDR 192.0.2.0/25 holds address 192.0.2.1 of Node a"],
    ),
    (
        "the range of Services",
        (node("a", "10.96.0.0/24"), service("10.96.0.1")),
        ["a: podCIDR 10.96.0.0/24 holds ClusterIP 10.96.0.1 of Service default/kubernetes"],
    ),
]


@pytest.mark.parametrize(("objects", "expected"), [c[1:] for c in OBJECTS], ids=[c[0] for c in OBJECTS])
def test_objects(objects: tuple[Any, ...], expected: list[str]) -> None:
    found = findings({}, Cluster(snapshot_of(objects)))
    assert [f"{each.node}: {each.cause}" for each in found] == expected
    assert all(each.severity == "error" and each.mend for each in found)


def test_a_node_without_an_agent_is_named_and_a_silent_one_once() -> None:
    snapshot = snapshot_of(
        [node("a", "10.244.1.0/24"), node("b", "10.244.2.0/24"), node("c", "10.244.3.0/24")]
    )
    found = findings({"a": WELL}, Cluster(snapshot, silent={"b": "no answer in time"}))
    assert [(each.node, each.cause) for each in found] == [
        ("b", "the agent gives no answer: no answer in time"),
        ("c", "no agent of podwall runs on this node"),
    ]
