"""The ways of one packet through a node's rules, as they are."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from msgspec.structs import replace

from agent.nft.model import DROP, Chain, Match, Payload, Proto, Rule, Ruleset, TcpFlag
from agent.nft.packet import Packet
from agent.verify import Node
from tests.agent.compile.service_worlds import (
    ServiceWorld,
    endpoint,
    endpoint_slice,
    load_balancer,
    node,
    service,
)

LINKS = {ip_address("10.244.0.2"): "podwall00000002", ip_address("10.244.0.3"): "podwall00000003"}
LOCAL = {ip_address("192.168.10.1")}
WEB = (
    node("node-1", "192.168.10.1", cidrs=["10.244.0.0/24"]),
    service("shop/web", "10.96.0.1", type="LoadBalancer", status=load_balancer("198.51.100.1")),
    service("shop/empty", "10.96.0.2"),
    endpoint_slice("shop/web-1", "web", "10.244.0.3", endpoint("10.244.1.3", node="node-2")),
)


def sent(source: str, target: str, port: int = 80) -> Packet:
    addresses = ip_address(source), ip_address(target)
    return Packet(*addresses, l4proto=Proto.TCP, sport=49152, dport=port, tcp_flags=TcpFlag.SYN)


def told(ruleset: Ruleset, packet: Packet, *, local: bool = False) -> list[tuple[Any, ...]]:
    found = Node(ruleset, LINKS, LOCAL).ways(packet, local=local)
    assert found["whole"]
    return [(way["outcome"], way["address"], way["port"], way["source"]) for way in found["ways"]]


def test_every_endpoint_that_may_be_picked_is_a_way() -> None:
    ruleset = ServiceWorld(*WEB).ruleset
    cases = {
        "from a Pod": (
            told(ruleset, sent("10.244.0.2", "10.96.0.1")),
            [("accept", "10.244.0.3", 8080, None), ("accept", "10.244.1.3", 8080, None)],
        ),
        "from the node": (
            told(ruleset, sent("192.168.10.1", "10.96.0.1"), local=True),
            [("accept", "10.244.0.3", 8080, None), ("accept", "10.244.1.3", 8080, None)],
        ),
        "from outside: what goes on leaves as the node's": (
            told(ruleset, sent("203.0.113.10", "198.51.100.1")),
            [("accept", "10.244.0.3", 8080, None), ("accept", "10.244.1.3", 8080, "192.168.10.1")],
        ),
        "nobody there": (
            told(ruleset, sent("10.244.0.2", "10.96.0.2")),
            [("reject", "10.96.0.2", 80, None)],
        ),
        "no Service at all": (
            told(ruleset, sent("10.244.0.2", "10.244.0.3", 8080)),
            [("accept", "10.244.0.3", 8080, None)],
        ),
    }
    for name, (seen, wanted) in cases.items():
        assert seen == wanted, name


def test_the_rule_that_ends_it_is_named() -> None:
    ruleset = ServiceWorld(*WEB).ruleset.copy()
    name, chain = next(
        (name, each) for name, each in ruleset.chains.items() if name.name == "prerouting_ipv4"
    )
    shut = Rule((Match(Payload("ip", "daddr"), "==", ip_address("10.96.0.1")), DROP), "nobody's")
    changed: Chain = replace(chain, rules=(shut, *chain.rules))
    ruleset.chains[name] = changed

    (way,) = Node(ruleset, LINKS, LOCAL).ways(sent("10.244.0.2", "10.96.0.1"), local=False)["ways"]

    assert way["outcome"] == "drop"
    assert way["rule"] == "inet podwall_services prerouting_ipv4, rule 1 (nobody's)"
