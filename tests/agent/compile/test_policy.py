"""Each rule of the NetworkPolicy documentation as a case, judged on the compiled rules by the evaluator.

A case is a set of policies and what becomes of connections: those in `open` get through, all others that are
tried (every pair of the world's addresses on a few ports) do exactly what the oracle says.
"""

from __future__ import annotations

from ipaddress import ip_address
from itertools import product
from typing import Any

import pytest

from agent.cluster.store import Changed
from agent.compile.incremental import PolicyCompiler
from agent.nft.model import CtState, IcmpType, TcpFlag
from agent.nft.packet import Connection, Flow
from lab.expectation import FirstPacket, Oracle, pod_addresses
from tests.agent.compile.worlds import NODE_ADDRESSES, World, decoded, namespace, pod, policy

WEB, WEB6 = "10.244.0.2", "fd00:10:244::2"
API, API6 = "10.244.0.3", "fd00:10:244::3"
DB, DB6 = "10.244.1.4", "fd00:10:244:1::4"
PROMETHEUS, PROMETHEUS6 = "10.244.1.5", "fd00:10:244:1::5"
INGRESS, INGRESS6 = "10.244.1.6", "fd00:10:244:1::6"
HOST, HOST6 = "192.168.10.2", "fd00:10::2"
OUTSIDE, OUTSIDE6 = "203.0.113.10", "2001:db8::10"

CLUSTER = (
    namespace("shop", team="a"),
    namespace("monitoring", team="b"),
    namespace("ingress-nginx"),
    pod("shop/web", WEB, WEB6, app="web", tier="front", ports=[("http", 8080)]),
    pod("shop/api", API, API6, app="api", ports=[("http", 80), ("dns", 53, "UDP")]),
    pod("shop/db", DB, DB6, node="node-2", app="postgres", tier="back", ports=[("http", 5432)]),
    pod("monitoring/prometheus", PROMETHEUS, PROMETHEUS6, node="node-2", app="prometheus"),
    pod("ingress-nginx/controller", INGRESS, INGRESS6, node="node-2", app="nginx"),
    pod("shop/host", HOST, HOST6, node="node-2", host_network=True, app="web"),
)
ADDRESSES = (WEB, API, DB, PROMETHEUS, INGRESS, HOST, OUTSIDE, NODE_ADDRESSES[0])
ADDRESSES6 = (WEB6, API6, DB6, PROMETHEUS6, INGRESS6, HOST6, OUTSIDE6, NODE_ADDRESSES[1])
LOCAL = frozenset((WEB, WEB6, API, API6))
TRIED = (
    ("TCP", 80),
    ("TCP", 8080),
    ("TCP", 9090),
    ("TCP", 5432),
    ("UDP", 53),
    ("SCTP", 9090),
    ("ICMP", None),
)

api = {"matchLabels": {"app": "api"}}
web = {"matchLabels": {"app": "web"}}
in_monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}


def allowing(**rule: Any) -> dict[str, Any]:
    """A policy for `api` with one ingress rule."""
    return policy("shop/api", podSelector=api, ingress=[rule])


def letting_out(**rule: Any) -> dict[str, Any]:
    """A policy for `api` with one egress rule."""
    return policy("shop/api", podSelector=api, policyTypes=["Egress"], egress=[rule])


def block(cidr: str, *excepts: str) -> dict[str, Any]:
    return {"ipBlock": {"cidr": cidr, "except": list(excepts)} if excepts else {"cidr": cidr}}


Reach = tuple[str, str, str, int | None]
FROM_WEB: Reach = (WEB, API, "TCP", 80)
FROM_DB: Reach = (DB, API, "TCP", 80)
FROM_PROMETHEUS: Reach = (PROMETHEUS, API, "TCP", 80)
FROM_OUTSIDE: Reach = (OUTSIDE, API, "TCP", 80)
FROM_HOST: Reach = (HOST, API, "TCP", 80)
TO_WEB: Reach = (API, WEB, "TCP", 80)
TO_DB: Reach = (API, DB, "TCP", 80)
TO_OUTSIDE: Reach = (API, OUTSIDE, "TCP", 80)
TO_NODE: Reach = (API, NODE_ADDRESSES[0], "TCP", 80)

# name: policies, what gets through, what does not
CASES: dict[str, tuple[list[dict[str, Any]], list[Reach], list[Reach]]] = {
    "no policy": ([], [FROM_WEB, FROM_OUTSIDE, TO_WEB, TO_OUTSIDE, TO_NODE], []),
    # policy types
    "default deny ingress": (
        [policy("shop/deny", policyTypes=["Ingress"])],
        [TO_OUTSIDE, TO_DB, TO_NODE, (API, PROMETHEUS, "TCP", 80)],
        [FROM_WEB, FROM_OUTSIDE, FROM_HOST, TO_WEB],
    ),
    "default deny egress": (
        [policy("shop/deny", policyTypes=["Egress"])],
        [FROM_OUTSIDE, FROM_DB],
        [TO_WEB, TO_OUTSIDE, TO_NODE, FROM_WEB],
    ),
    "default deny both": (
        [policy("shop/deny", policyTypes=["Ingress", "Egress"])],
        [(API, API, "TCP", 80)],
        [FROM_WEB, TO_WEB, FROM_OUTSIDE, TO_OUTSIDE, (API, OUTSIDE, "ICMP", None)],
    ),
    "allow all ingress": (
        [policy("shop/deny", policyTypes=["Ingress"]), policy("shop/allow", ingress=[{}])],
        [FROM_WEB, FROM_OUTSIDE, (OUTSIDE, API, "ICMP", None), (OUTSIDE, API, "SCTP", 9090)],
        [],
    ),
    "allow all egress": (
        [policy("shop/allow", policyTypes=["Egress"], egress=[{}])],
        [TO_WEB, TO_OUTSIDE, TO_NODE],
        [],
    ),
    "types default to ingress": ([policy("shop/p")], [TO_OUTSIDE], [FROM_OUTSIDE]),
    "types default to both with egress rules": (
        [policy("shop/p", podSelector=api, egress=[{"to": [{"podSelector": web}]}])],
        [TO_WEB],
        [FROM_OUTSIDE, TO_OUTSIDE],
    ),
    "types given without the rules' direction": (
        [policy("shop/p", policyTypes=["Ingress"], egress=[])],
        [TO_OUTSIDE],
        [FROM_OUTSIDE],
    ),
    "rules of a direction that is not among the types": (
        [policy("shop/p", policyTypes=["Egress"], ingress=[{"from": [{"podSelector": web}]}])],
        [FROM_OUTSIDE],
        [TO_OUTSIDE],
    ),
    "only Pods of its own namespace are selected": (
        [policy("monitoring/deny", policyTypes=["Ingress", "Egress"])],
        [FROM_PROMETHEUS, FROM_WEB],
        [],
    ),
    "policies add up": (
        [
            policy("shop/a", podSelector=api, ingress=[{"from": [{"podSelector": web}]}]),
            policy("shop/b", podSelector=api, ingress=[{"from": [block("203.0.113.0/24")]}]),
            policy("shop/deny"),
        ],
        [FROM_WEB, FROM_OUTSIDE],
        [FROM_DB, FROM_PROMETHEUS],
    ),
    # peers
    "missing from": ([allowing()], [FROM_WEB, FROM_OUTSIDE], []),
    "empty from": ([allowing(**{"from": []})], [FROM_WEB, FROM_OUTSIDE], []),
    "podSelector": (
        [allowing(**{"from": [{"podSelector": web}]})],
        [FROM_WEB],
        [FROM_DB, FROM_PROMETHEUS, FROM_OUTSIDE, FROM_HOST],
    ),
    "empty podSelector is the namespace": (
        [allowing(**{"from": [{"podSelector": {}}]})],
        [FROM_WEB, FROM_DB],
        [FROM_PROMETHEUS, FROM_OUTSIDE, FROM_HOST],
    ),
    "empty namespaceSelector is all Pods": (
        [allowing(**{"from": [{"namespaceSelector": {}}]})],
        [FROM_WEB, FROM_DB, FROM_PROMETHEUS],
        [FROM_OUTSIDE, FROM_HOST],
    ),
    "namespaceSelector": (
        [allowing(**{"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]})],
        [FROM_PROMETHEUS],
        [FROM_WEB, FROM_DB],
    ),
    "namespaceSelector by its name": (
        [allowing(**{"from": [{"namespaceSelector": in_monitoring}]})],
        [FROM_PROMETHEUS],
        [FROM_WEB],
    ),
    "namespaceSelector and podSelector": (
        [
            allowing(
                **{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prometheus"}}}]}
            )
        ],
        [FROM_PROMETHEUS],
        [FROM_WEB, FROM_DB],
    ),
    "namespaceSelector or podSelector": (
        [allowing(**{"from": [{"namespaceSelector": in_monitoring}, {"podSelector": web}]})],
        [FROM_PROMETHEUS, FROM_WEB],
        [FROM_DB],
    ),
    "matchExpressions": (
        [
            allowing(
                **{
                    "from": [
                        {
                            "podSelector": {
                                "matchExpressions": [
                                    {"key": "app", "operator": "In", "values": ["web", "postgres"]},
                                    {"key": "tier", "operator": "NotIn", "values": ["back"]},
                                ]
                            }
                        }
                    ]
                }
            )
        ],
        [FROM_WEB],
        [FROM_DB],
    ),
    "ipBlock": ([allowing(**{"from": [block("203.0.113.0/24")]})], [FROM_OUTSIDE], [FROM_WEB]),
    "ipBlock of everything": (
        [allowing(**{"from": [block("0.0.0.0/0")]})],
        [FROM_OUTSIDE, FROM_WEB],
        [(OUTSIDE6, API6, "TCP", 80)],
    ),
    "ipBlock with except": (
        [allowing(**{"from": [block("203.0.113.0/24", "203.0.113.8/29", "203.0.113.200/32")]})],
        [("203.0.113.7", API, "TCP", 80), ("203.0.113.16", API, "TCP", 80)],
        [
            ("203.0.113.8", API, "TCP", 80),
            ("203.0.113.15", API, "TCP", 80),
            ("203.0.113.200", API, "TCP", 80),
        ],
    ),
    "what one block excepts another may allow": (
        [allowing(**{"from": [block("203.0.113.0/24", "203.0.113.8/29"), block("203.0.113.10/32")]})],
        [FROM_OUTSIDE],
        [("203.0.113.11", API, "TCP", 80)],
    ),
    "ipBlock of IPv6": (
        [allowing(**{"from": [block("2001:db8::/32", "2001:db8:1::/48")]})],
        [(OUTSIDE6, API6, "TCP", 80)],
        [("2001:db8:1::1", API6, "TCP", 80), FROM_OUTSIDE],
    ),
    "many excepts": (
        [allowing(**{"from": [block("203.0.113.0/24", *(f"203.0.113.{n}/32" for n in range(0, 100, 2)))]})],
        [("203.0.113.11", API, "TCP", 80), ("203.0.113.255", API, "TCP", 80)],
        [FROM_OUTSIDE, ("203.0.113.0", API, "TCP", 80), ("203.0.114.0", API, "TCP", 80)],
    ),
    "many blocks": (
        [allowing(**{"from": [block(f"203.0.113.{n}/32") for n in range(0, 100, 2)]})],
        [FROM_OUTSIDE],
        [("203.0.113.11", API, "TCP", 80)],
    ),
    # ports
    "missing ports": (
        [allowing(**{"from": [{"podSelector": web}]})],
        [FROM_WEB, (WEB, API, "ICMP", None), (WEB, API, "SCTP", 9090)],
        [],
    ),
    "empty ports": ([allowing(ports=[])], [FROM_WEB, (WEB, API, "ICMP", None)], []),
    "port": (
        [allowing(ports=[{"port": 80}])],
        [FROM_WEB],
        [(WEB, API, "UDP", 80), (WEB, API, "TCP", 8080), (WEB, API, "ICMP", None)],
    ),
    "protocol": (
        [allowing(ports=[{"protocol": "UDP", "port": 53}])],
        [(WEB, API, "UDP", 53)],
        [(WEB, API, "TCP", 53)],
    ),
    "SCTP": (
        [allowing(ports=[{"protocol": "SCTP", "port": 9090}])],
        [(WEB, API, "SCTP", 9090)],
        [(WEB, API, "TCP", 9090)],
    ),
    "protocol without a port": (
        [allowing(ports=[{"protocol": "UDP"}])],
        [(WEB, API, "UDP", 53), (WEB, API, "UDP", 9)],
        [FROM_WEB, (WEB, API, "ICMP", None)],
    ),
    "neither protocol nor port is all of TCP": (
        [allowing(ports=[{}])],
        [FROM_WEB, (WEB, API, "TCP", 9090)],
        [(WEB, API, "UDP", 53), (WEB, API, "ICMP", None)],
    ),
    "several ports": (
        [allowing(ports=[{"port": 80}, {"port": 9090}, {"port": 53, "protocol": "UDP"}])],
        [FROM_WEB, (WEB, API, "TCP", 9090), (WEB, API, "UDP", 53)],
        [(WEB, API, "TCP", 53), (WEB, API, "UDP", 80), (WEB, API, "TCP", 8080)],
    ),
    "endPort": (
        [allowing(ports=[{"port": 8000, "endPort": 9000}])],
        [(WEB, API, "TCP", 8000), (WEB, API, "TCP", 8080), (WEB, API, "TCP", 9000)],
        [(WEB, API, "TCP", 7999), (WEB, API, "TCP", 9001), (WEB, API, "UDP", 8080)],
    ),
    "overlapping ranges and a port inside": (
        [
            allowing(
                ports=[{"port": 80, "endPort": 90}, {"port": 85, "endPort": 99}, {"port": 88}, {"port": 443}]
            )
        ],
        [FROM_WEB, (WEB, API, "TCP", 99), (WEB, API, "TCP", 443)],
        [(WEB, API, "TCP", 100), (WEB, API, "TCP", 442)],
    ),
    "many ranges": (
        [allowing(ports=[{"port": n, "endPort": n + 1} for n in range(80, 200, 4)])],
        [FROM_WEB, (WEB, API, "TCP", 81)],
        [(WEB, API, "TCP", 82)],
    ),
    "named port of the Pod": (
        [policy("shop/p", ingress=[{"ports": [{"port": "http"}]}])],
        [FROM_WEB, (API, WEB, "TCP", 8080)],
        [(WEB, API, "TCP", 8080), TO_WEB],
    ),
    "named port with another protocol": (
        [allowing(ports=[{"port": "dns", "protocol": "UDP"}, {"port": "dns"}])],
        [(WEB, API, "UDP", 53)],
        [(WEB, API, "TCP", 53)],
    ),
    "named port that no container has": ([allowing(ports=[{"port": "nobodys"}])], [], [FROM_WEB]),
    # egress
    "egress to Pods": ([letting_out(to=[{"podSelector": web}])], [TO_WEB], [TO_DB, TO_OUTSIDE, TO_NODE]),
    "egress to a block": (
        [letting_out(to=[block("203.0.113.0/24")])],
        [TO_OUTSIDE],
        [TO_WEB, TO_DB],
    ),
    "egress to the own node": ([letting_out(to=[block("192.168.10.1/32")])], [TO_NODE], [TO_OUTSIDE]),
    "egress to a named port is the peer's": (
        [letting_out(to=[{"podSelector": {}}], ports=[{"port": "http"}])],
        [(API, WEB, "TCP", 8080), (API, DB, "TCP", 5432)],
        [TO_WEB, TO_DB, (API, DB, "TCP", 8080), (API, OUTSIDE, "TCP", 8080)],
    ),
    "egress to a named port of anybody": (
        [letting_out(ports=[{"port": "http"}])],
        [(API, WEB, "TCP", 8080), (API, DB, "TCP", 5432)],
        [TO_WEB, TO_DB, (API, OUTSIDE, "TCP", 8080)],
    ),
    "egress to a named port in a block": (
        [letting_out(to=[block("10.244.1.0/24")], ports=[{"port": "http"}])],
        [(API, DB, "TCP", 5432)],
        [(API, WEB, "TCP", 8080), (API, PROMETHEUS, "TCP", 5432)],
    ),
    "both ends must allow": (
        [
            letting_out(to=[{"podSelector": web}]),
            policy("shop/web", podSelector=web, ingress=[{"ports": [{"port": 9090}]}]),
        ],
        [(API, WEB, "TCP", 9090), (DB, WEB, "TCP", 9090)],
        [TO_WEB, (API, DB, "TCP", 9090)],
    ),
    "a Pod reaches itself": (
        [policy("shop/deny", policyTypes=["Ingress", "Egress"])],
        [(API, API, "TCP", 80), (WEB6, WEB6, "UDP", 53)],
        [TO_WEB],
    ),
    # the documentation's own examples
    "documentation: test-network-policy": (
        [
            policy(
                "shop/test-network-policy",
                podSelector=api,
                policyTypes=["Ingress", "Egress"],
                ingress=[
                    {
                        "from": [
                            block("172.17.0.0/16", "172.17.1.0/24"),
                            {"namespaceSelector": {"matchLabels": {"team": "b"}}},
                            {"podSelector": web},
                        ],
                        "ports": [{"protocol": "TCP", "port": 6379}],
                    }
                ],
                egress=[{"to": [block("10.0.0.0/24")], "ports": [{"protocol": "TCP", "port": 5978}]}],
            )
        ],
        [
            ("172.17.0.1", API, "TCP", 6379),
            ("172.17.255.1", API, "TCP", 6379),
            (PROMETHEUS, API, "TCP", 6379),
            (WEB, API, "TCP", 6379),
            (API, "10.0.0.200", "TCP", 5978),
        ],
        [
            ("172.17.1.1", API, "TCP", 6379),
            (DB, API, "TCP", 6379),
            (WEB, API, "TCP", 80),
            (API, "10.0.1.1", "TCP", 5978),
            (API, "10.0.0.200", "TCP", 80),
        ],
    ),
    "documentation: a range of ports": (
        [
            letting_out(
                to=[block("10.0.0.0/24")], ports=[{"protocol": "TCP", "port": 32000, "endPort": 32768}]
            )
        ],
        [(API, "10.0.0.1", "TCP", 32000), (API, "10.0.0.1", "TCP", 32768)],
        [(API, "10.0.0.1", "TCP", 31999), (API, "10.0.0.1", "TCP", 32769)],
    ),
    "documentation: several namespaces by a label": (
        [
            letting_out(
                to=[
                    {
                        "namespaceSelector": {
                            "matchExpressions": [{"key": "team", "operator": "In", "values": ["b", "c"]}]
                        }
                    }
                ]
            )
        ],
        [(API, PROMETHEUS, "TCP", 80)],
        [TO_WEB, (API, INGRESS, "TCP", 80)],
    ),
    "an API behind a controller, with metrics, a database and DNS": (
        [
            policy(
                "shop/api",
                podSelector=api,
                policyTypes=["Ingress", "Egress"],
                ingress=[
                    {
                        "from": [
                            {
                                "namespaceSelector": {
                                    "matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}
                                }
                            }
                        ],
                        "ports": [{"port": 8080}],
                    },
                    {
                        "from": [
                            {
                                "namespaceSelector": in_monitoring,
                                "podSelector": {"matchLabels": {"app": "prometheus"}},
                            }
                        ],
                        "ports": [{"port": 9090}],
                    },
                ],
                egress=[
                    {
                        "to": [{"podSelector": {"matchLabels": {"app": "postgres"}}}],
                        "ports": [{"port": 5432}],
                    },
                    {
                        "to": [{"namespaceSelector": {}}],
                        "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}],
                    },
                ],
            )
        ],
        [
            (INGRESS, API, "TCP", 8080),
            (PROMETHEUS, API, "TCP", 9090),
            (API, DB, "TCP", 5432),
            (API6, DB6, "TCP", 5432),
            (API, INGRESS, "UDP", 53),
            (API, WEB, "TCP", 53),
        ],
        [
            (INGRESS, API, "TCP", 9090),
            (PROMETHEUS, API, "TCP", 8080),
            (WEB, API, "TCP", 8080),
            (API, DB, "TCP", 53 + 1),
            (API, OUTSIDE, "UDP", 53),
            (OUTSIDE, API, "TCP", 8080),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_documentation_case_by_case(name: str) -> None:
    policies, opened, closed = CASES[name]
    world, oracle = World(*CLUSTER, *policies), Oracle((*CLUSTER, *policies))

    assert [reach for reach in opened if not world.judge(FirstPacket(*reach)).accepted] == []
    assert [reach for reach in closed if world.judge(FirstPacket(*reach)).accepted] == []
    assert [probe for probe in _grid() if world.judge(probe).accepted != _allowed(oracle, probe)] == []


def _grid() -> list[FirstPacket]:
    """All pairs that this node sees: from or to one of its Pods."""
    pairs = [pair for of in (ADDRESSES, ADDRESSES6) for pair in product(of, repeat=2)]
    seen = [
        (source, target)
        for source, target in pairs
        if source in LOCAL or (target in LOCAL and source not in NODE_ADDRESSES)
    ]
    return [FirstPacket(*pair, *what) for pair, what in product(seen, TRIED)]


def _allowed(oracle: Oracle, probe: FirstPacket) -> bool:
    out = probe.source not in LOCAL or oracle.allows_egress(probe)
    return out and (probe.target not in LOCAL or oracle.allows_ingress(probe))


# What cannot be understood

GOOD = {"podSelector": web}
NUMBERED = {"port": 80}
BAD: dict[str, dict[str, Any]] = {
    "CIDR": {"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]},
    "CIDR with leading zeros": {"from": [{"ipBlock": {"cidr": "203.0.113.010/32"}}]},
    "CIDR that is a name": {"from": [{"ipBlock": {"cidr": "example.com"}}]},
    "CIDR missing": {"from": [{"ipBlock": {}}]},
    "except outside": {"from": [{"ipBlock": {"cidr": "203.0.113.0/24", "except": ["10.0.0.0/8"]}}]},
    "except as large as its block": {
        "from": [{"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.0/24"]}}]
    },
    "except that is no CIDR": {"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["everything"]}}]},
    "block together with a selector": {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}, "podSelector": {}}]},
    "peer without anything": {"from": [{}]},
    "peer that is no object": {"from": ["everybody"]},
    "unknown field of a peer": {"from": [{"podSelector": {}, "serviceSelector": {}}]},
    "peers that are no list": {"from": {"podSelector": {}}},
    "unknown operator": {
        "from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "Is", "values": ["x"]}]}}]
    },
    "operator without values": {
        "from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": []}]}}]
    },
    "hostile label": {"from": [{"podSelector": {"matchLabels": {"app": 'web" ; flush ruleset'}}}]},
    "endPort below port": {"ports": [{"port": 80, "endPort": 79}]},
    "endPort without a number": {"ports": [{"endPort": 90}]},
    "endPort of a name": {"ports": [{"port": "http", "endPort": 90}]},
    "unknown protocol": {"ports": [{"port": 80, "protocol": "ICMP"}]},
    "port 0": {"ports": [{"port": 0}]},
    "port 65536": {"ports": [{"port": 65536}]},
    "port name that is a number": {"ports": [{"port": "80"}]},
    "hostile port name": {"ports": [{"port": "http }; accept"}]},
    "ports that are no list": {"ports": "all"},
    "unknown field of a port": {"ports": [{"port": 80, "hours": "9-17"}]},
    "rule that is no object": {"from": None, "unknown": 1},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_member_isolates_and_opens_nothing(name: str) -> None:
    world = World(*CLUSTER, policy("shop/bad", podSelector=api, ingress=[BAD[name]]))

    assert not any(world.judge(probe).accepted for probe in _to_api())
    assert world.accepts(OUTSIDE, WEB)


@pytest.mark.parametrize("name", BAD)
def test_the_good_members_beside_a_bad_one_still_allow(name: str) -> None:
    rule = BAD[name]
    if not all(isinstance(rule.get(of, []), list) for of in ("from", "ports")):
        rule = {}
    peers, ports = [GOOD, *rule.get("from", ())], [NUMBERED, *rule.get("ports", ())]
    good = policy("shop/good", podSelector=api, ingress=[{"from": [GOOD], "ports": [NUMBERED]}])
    both = policy("shop/both", podSelector=api, ingress=[{"from": peers, "ports": ports}, BAD[name]])
    world, oracle = World(*CLUSTER, both), Oracle((*CLUSTER, good))

    assert [probe for probe in _to_api() if world.judge(probe).accepted != oracle.allows(probe)] == []


def test_a_bad_podselector_isolates_more_and_allows_nothing() -> None:
    of = {"matchLabels": {"app": "api", "bad key!": "x"}}
    world = World(*CLUSTER, policy("shop/bad", podSelector=of, ingress=[{}]))

    assert not any(world.judge(probe).accepted for probe in _to_api())
    assert world.accepts(OUTSIDE, WEB)


def test_an_unknown_type_isolates_both_ways() -> None:
    world = World(*CLUSTER, policy("shop/bad", podSelector=api, policyTypes=["Ingres"], ingress=[]))

    assert not any(world.judge(probe).accepted for probe in _to_api())
    assert not world.accepts(API, OUTSIDE)


def _to_api() -> list[FirstPacket]:
    return [probe for probe in _grid() if probe.target in {API, API6} and probe.source != probe.target]


def test_ten_thousand_ports_are_one_rule() -> None:
    ports = [{"port": 2 * number + 1} for number in range(10_000)]
    world = World(*CLUSTER, allowing(ports=ports))

    assert world.accepts(OUTSIDE, API, 9999)
    assert not world.accepts(OUTSIDE, API, 10_000)
    (of,) = [each for each in world.compiler.classes("container-shop-api", "eth0") if each.family == 4]
    (allow, *_) = [
        chain for name, chain in world.ruleset.chains.items() if name.name == of.chain and chain.rules
    ]
    assert len(allow.rules) == 4  # the ports, to itself, the log, the drop


# Pods that come and go


def test_a_policy_of_a_namespace_that_is_not_declared_isolates() -> None:
    objects = [of for of in CLUSTER if of["metadata"]["name"] != "shop"]
    world = World(
        *objects, policy("shop/deny"), policy("shop/near", ingress=[{"from": [{"podSelector": web}]}])
    )

    assert not world.accepts(OUTSIDE, API)
    assert world.accepts(WEB, API)


def test_namespace_selectors_match_only_declared_namespaces() -> None:
    objects = [of for of in CLUSTER if of["metadata"]["name"] != "monitoring"]
    world = World(*objects, allowing(**{"from": [{"namespaceSelector": {}}]}))

    assert not world.accepts(PROMETHEUS, API)
    assert world.accepts(INGRESS, API)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_an_ended_pod_is_nobodys_peer(phase: str) -> None:
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": {}}]}))
    assert world.accepts(DB, API)

    world.put(pod("shop/db", DB, DB6, node="node-2", app="postgres", phase=phase))

    assert not world.accepts(DB, API)


def test_a_pod_that_is_being_deleted_is_a_peer_until_it_is_gone() -> None:
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": {}}]}))
    going = pod("shop/db", DB, DB6, node="node-2", app="postgres")
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    world.put(going)
    assert world.accepts(DB, API)
    world.remove(going)
    assert not world.accepts(DB, API)


def test_an_attached_pod_is_a_peer_before_its_status_says_so() -> None:
    early = pod("shop/early", app="web", phase="Pending")
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": web}]}), early)
    assert not world.accepts("10.244.0.9", API)

    world.attach(pod("shop/early", "10.244.0.9", app="web"))

    assert world.accepts("10.244.0.9", API)


def test_a_named_port_follows_its_pod() -> None:
    to_http = letting_out(to=[{"podSelector": {}}], ports=[{"port": "http"}])
    world = World(
        *CLUSTER, to_http, policy("shop/web", podSelector=web, ingress=[{"ports": [{"port": "http"}]}])
    )
    assert world.accepts(API, WEB, 8080)

    world.put(pod("shop/web", WEB, WEB6, app="web", tier="front", ports=[("http", 9090)]))

    assert world.accepts(API, WEB, 9090)
    assert not world.accepts(API, WEB, 8080)


def test_a_detached_address_is_in_no_set_whatever_the_status_says() -> None:
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": web}]}), policy("shop/deny"))

    world.detach(CLUSTER[3])

    left = [
        element for of in world.ruleset.elements.values() for element in of.values() if WEB in str(element)
    ]
    assert left == []


def test_an_attached_pod_is_isolated_before_the_cluster_says_what_it_is() -> None:
    world = World(*CLUSTER, policy("shop/some", podSelector={"matchLabels": {"app": "other"}}))

    world.attach(pod("shop/unknown", "10.244.0.9"))
    world.manifests["Pod", ("shop", "unknown")] = pod("shop/unknown", "10.244.0.9")

    assert not world.accepts(WEB, "10.244.0.9")
    assert world.accepts("10.244.0.9", OUTSIDE)


def test_without_policies_in_its_namespace_an_unknown_pod_is_not_isolated() -> None:
    world = World(*CLUSTER, policy("monitoring/deny"))

    world.attach(pod("shop/unknown", "10.244.0.9"))
    world.manifests["Pod", ("shop", "unknown")] = pod("shop/unknown", "10.244.0.9")

    assert world.accepts(WEB, "10.244.0.9")


def test_a_pod_of_the_same_name_with_another_uid_is_not_the_attached_one() -> None:
    """It was deleted by force and made again; the old one still runs here."""
    world = World(*CLUSTER, policy("shop/web", podSelector=web, ingress=[{}]))
    assert world.accepts(OUTSIDE, WEB)

    world.put(pod("shop/web", node="node-2", uid="another", app="web", phase="Pending"), attach=False)
    world.manifests["Pod", ("shop", "web")] = CLUSTER[3]

    assert not world.accepts(OUTSIDE, WEB)


def test_a_pod_of_a_file_has_another_uid_in_the_api() -> None:
    mirror = pod("shop/web", WEB, WEB6, uid="mirror", app="web")
    mirror["metadata"]["ownerReferences"] = [{"kind": "Node", "name": "node-1", "uid": "n"}]
    world = World(*CLUSTER, policy("shop/web", podSelector=web, ingress=[{}]))

    world.put(mirror, attach=False)

    assert world.accepts(OUTSIDE, WEB)


# Connections


DENY = policy("shop/deny", podSelector=api, policyTypes=["Egress"])
DENY_IN = policy("shop/deny", podSelector=api)


def test_packets_of_a_known_connection_pass() -> None:
    world = World(*CLUSTER, DENY)
    known = Connection(CtState.ESTABLISHED)

    assert world.judge(FirstPacket(API, OUTSIDE, "TCP", 80), known, tcp_flags=TcpFlag.ACK).accepted


MIDSTREAM = (TcpFlag.ACK, TcpFlag.SYN | TcpFlag.ACK, TcpFlag.RST, TcpFlag.FIN | TcpFlag.ACK, TcpFlag.PSH, 0)


@pytest.mark.parametrize("flags", MIDSTREAM)
@pytest.mark.parametrize("ends", [(API, OUTSIDE), (OUTSIDE, API), (API6, OUTSIDE6), (OUTSIDE6, API6)])
@pytest.mark.parametrize("state", [CtState.NEW, CtState.INVALID, CtState.UNTRACKED])
def test_an_isolated_pods_connections_begin_with_syn(
    flags: int, ends: tuple[str, str], state: CtState
) -> None:
    """Also in the direction that is not isolated: the other would be open again as its reply."""
    world = World(*CLUSTER, policy("shop/p", podSelector=api, policyTypes=["Egress"], egress=[{}]))

    assert world.accepts(*ends)
    assert not world.judge(FirstPacket(*ends, "TCP", 80), Connection(state), tcp_flags=flags).accepted


@pytest.mark.parametrize("ends", [(API, OUTSIDE), (OUTSIDE, API), (API6, OUTSIDE6), (OUTSIDE6, API6)])
@pytest.mark.parametrize("state", [CtState.NEW, CtState.INVALID, CtState.UNTRACKED])
def test_an_isolated_pods_associations_begin_with_init(ends: tuple[str, str], state: CtState) -> None:
    """A HEARTBEAT begins a flow for connection tracking, and its tag is not 0."""
    world = World(*CLUSTER, policy("shop/p", podSelector=api, policyTypes=["Egress"], egress=[{}]))
    first, known = FirstPacket(*ends, "SCTP", 80), Connection(state)

    assert world.judge(first, known).accepted
    assert not world.judge(first, known, sctp_tag=7).accepted
    assert world.judge(first, Connection(CtState.ESTABLISHED), sctp_tag=7).accepted


def test_other_pods_connections_may_be_taken_up_in_the_middle() -> None:
    world = World(*CLUSTER, DENY)

    assert world.judge(FirstPacket(WEB, OUTSIDE, "TCP", 80), tcp_flags=TcpFlag.ACK).accepted


def icmp_error(world: World, source: str, target: str, flow: Flow | None, state: CtState) -> bool:
    """An error from source to target about a flow, which connection tracking may know."""
    six = ":" in source
    about = Connection(state, original=flow, reply=None if flow is None else flow.back)
    probe = FirstPacket(source, target, "ICMP")
    kind = 1 if six else IcmpType.DESTINATION_UNREACHABLE
    return world.judge(probe, about, icmp_type=kind, icmp_code=3).accepted


def flow(source: str, target: str) -> Flow:
    return Flow(ip_address(source), ip_address(target), 40000, 80)


ERRORS = {
    "the receiver answers": (WEB, API, flow(API, WEB), CtState.RELATED, True),
    "the receiver answers, IPv6": (WEB6, API6, flow(API6, WEB6), CtState.RELATED, True),
    "the sender answers": (WEB, API, flow(WEB, API), CtState.RELATED, True),
    "a router answers": ("198.51.100.1", API, flow(API, OUTSIDE), CtState.RELATED, True),
    "another Pod quotes the flow": (WEB, API, flow(API, OUTSIDE), CtState.RELATED, False),
    "another Pod quotes the flow, IPv6": (WEB6, API6, flow(API6, OUTSIDE6), CtState.RELATED, False),
    "a Pod quotes a flow that nobody knows": (WEB, API, None, CtState.INVALID, False),
    "a Pod quotes its own flow that nobody knows": (WEB, OUTSIDE, None, CtState.INVALID, False),
    "outside quotes a flow that nobody knows": (OUTSIDE, API, None, CtState.INVALID, False),
}


@pytest.mark.parametrize("name", ERRORS)
def test_icmp_errors_come_from_an_end_of_their_flow(name: str) -> None:
    source, target, about, state, expected = ERRORS[name]
    world = World(*CLUSTER, DENY_IN)

    assert icmp_error(world, source, target, about, state) is expected


def test_an_error_about_a_translated_flow_comes_from_its_real_end() -> None:
    """API asked a Service, which is WEB: WEB's error is about what it was really asked."""
    world = World(*CLUSTER, DENY_IN)
    original, real = flow(API, "10.96.0.10"), flow(API, WEB)
    about = Connection(CtState.RELATED, original=original, reply=real.back)

    def judged(source: str) -> bool:
        probe = FirstPacket(source, API, "ICMP")
        return world.judge(probe, about, icmp_type=IcmpType.DESTINATION_UNREACHABLE).accepted

    assert judged(WEB)
    world.put(pod("shop/evil", "10.244.0.66", app="evil"))
    assert not judged("10.244.0.66")


def test_what_is_related_but_no_icmp_is_judged_by_the_policies() -> None:
    world = World(*CLUSTER, DENY_IN)

    assert not world.judge(FirstPacket(WEB, API, "TCP", 80), Connection(CtState.RELATED)).accepted


def test_echo_requests_are_new() -> None:
    world = World(*CLUSTER, DENY_IN)

    assert not world.accepts(WEB, API, None, "ICMP")
    assert world.accepts(API, WEB, None, "ICMP")


# What a reader sees


def test_the_trace_names_the_policy_and_its_rule() -> None:
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": web}]}))

    result = world.judge(FirstPacket(WEB, API, "TCP", 80))

    assert [step.rule.comment for step in result.trace if step.rule.comment] == ["shop/api/ingress[0]"]


def test_a_denied_packet_is_logged_under_its_class() -> None:
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": web}]}))

    result = world.judge(FirstPacket(DB, API, "TCP", 80))

    (of,) = [each for each in world.compiler.classes("container-shop-api", "eth0") if each.family == 4]
    assert result.outcome == "drop"
    assert any(f'"podwall ingress {of.id}"' in repr(step).replace("'", '"') for step in result.trace)
    assert [each.name for each in world.compiler.members(of.id)] == ["api"]
    assert of.policies == (("shop", "api"),)


def test_pods_with_the_same_policies_share_their_chains() -> None:
    world = World(*CLUSTER, policy("shop/deny"))

    classes = [world.compiler.classes(f"container-shop-{name}", "eth0") for name in ("web", "api")]

    assert classes[0] == classes[1]
    assert [of.family for of in classes[0]] == [4, 6]


def test_policies_with_the_same_peer_share_its_set() -> None:
    of = {"from": [{"podSelector": web}]}
    same = {
        "from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}}]
    }
    world = World(
        *CLUSTER,
        policy("shop/a", podSelector=api, ingress=[of]),
        policy("shop/b", podSelector=web, ingress=[same | {"ports": [{"port": 80}]}]),
    )

    assert len({name.name for name in world.ruleset.sets if name.name.startswith("peer4_")}) == 1


def test_a_policy_that_selects_no_pod_of_this_node_costs_nothing_here() -> None:
    world, plain = (
        World(*CLUSTER, policy("monitoring/p", ingress=[{"from": [{"podSelector": {}}]}])),
        World(*CLUSTER),
    )

    assert world.ruleset == plain.ruleset


def test_a_change_is_felt_only_where_it_matters() -> None:
    world = World(*CLUSTER, allowing(**{"from": [{"podSelector": web}]}))

    def touched(before: dict[str, Any], after: dict[str, Any]) -> set[tuple[str, ...]]:
        return set(
            world.compiler.apply([Changed("Pod", decoded(after).key, decoded(before), decoded(after))])
        )  # type: ignore[arg-type]

    db = CLUSTER[5]
    assert touched(db, pod("shop/db", DB, DB6, node="node-2", app="postgres", tier="other")) == set()
    assert touched(db, pod("shop/db", DB, DB6, node="node-2", app="web")) == {("member", "shop", "db")}


def test_nothing_is_known_at_the_start() -> None:
    assert PolicyCompiler("node-1").owners == {("policy",)}
    assert PolicyCompiler("node-1").items(("class", "ingress4_gone")) == ()
    assert pod_addresses(CLUSTER[3]) == [WEB, WEB6]
