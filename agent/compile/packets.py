"""How rules ask a packet for what all of them ask: its family, its addresses, and the Pod's link it is on."""

from __future__ import annotations

from typing import Literal

from agent.cluster.model import Family
from agent.compile.names import DEVICE_PREFIX, LINK_PREFIX
from agent.nft.model import Concat, Match, Meta, Payload, Wildcard

FAMILIES: tuple[Family, ...] = (4, 6)
IP: dict[int, Literal["ip", "ip6"]] = {4: "ip", 6: "ip6"}
"""The header of each family's packets."""
ADDRESS_TYPES: dict[int, str] = {4: "ipv4_addr", 6: "ipv6_addr"}
"""The type of each family's addresses in sets."""

Interface = Literal["iifname", "oifname"]
INTERFACES: tuple[Interface, ...] = ("iifname", "oifname")


def on_pod_link(interface: Interface) -> tuple[Match, Match]:
    """What a packet is that comes by (`iifname`) or goes to (`oifname`) a Pod's link."""
    key = Meta(interface)
    return Match(key, "==", Wildcard(LINK_PREFIX)), Match(key, "!=", Wildcard(DEVICE_PREFIX))


def link_and(interface: Interface, family: int, field: Literal["saddr", "daddr"]) -> Concat:
    """A packet's link and one of its addresses, as the sets of Pods' links hold them."""
    return Concat((Meta(interface), Payload(IP[family], field)))
