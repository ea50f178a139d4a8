"""Which type each expression has, and what nft calls the constants of each type.

`render` writes constants by these names so that `nft list table` and the golden files read like sentences,
and `parse` turns the names of a listing back into numbers. Only names that nft's own grammar knows are
written: others would be looked up in /etc/protocols or by DNS.
"""

from collections.abc import Mapping
from enum import IntEnum

from agent.nft.model import (
    ArpOperation,
    Bits,
    Concat,
    Ct,
    CtDirection,
    CtState,
    CtStatus,
    EtherType,
    Expression,
    Exthdr,
    Fib,
    FibType,
    Hash,
    Icmp6Type,
    IcmpType,
    Lookup,
    Meta,
    NfProto,
    Numgen,
    PacketType,
    Payload,
    TcpFlag,
)

INTEGER = "integer"
FLAG_TYPES = frozenset({"ct_state", "ct_status", "tcp_flag"})

_META = {
    "iifname": "ifname",
    "oifname": "ifname",
    "iifkind": "ifname",
    "oifkind": "ifname",
    "iif": "iface_index",
    "oif": "iface_index",
    "l4proto": "inet_proto",
    "nfproto": "nf_proto",
    "mark": "mark",
    "protocol": "ether_type",
    "pkttype": "pkt_type",
}
_CT = {
    "state": "ct_state",
    "status": "ct_status",
    "direction": "ct_dir",
    "mark": "mark",
    "protocol": "inet_proto",
    "l3proto": "nf_proto",
    "ip saddr": "ipv4_addr",
    "ip daddr": "ipv4_addr",
    "ip6 saddr": "ipv6_addr",
    "ip6 daddr": "ipv6_addr",
    "proto-src": "inet_service",
    "proto-dst": "inet_service",
}
_PAYLOAD = {
    ("ip", "saddr"): "ipv4_addr",
    ("ip", "daddr"): "ipv4_addr",
    ("ip", "protocol"): "inet_proto",
    ("ip6", "saddr"): "ipv6_addr",
    ("ip6", "daddr"): "ipv6_addr",
    ("ip6", "nexthdr"): "inet_proto",
    ("icmp", "type"): "icmp_type",
    ("icmp", "code"): "icmp_code",
    ("icmpv6", "type"): "icmpv6_type",
    ("icmpv6", "code"): "icmpv6_code",
    ("tcp", "flags"): "tcp_flag",
    ("ether", "type"): "ether_type",
    ("ether", "saddr"): "ether_addr",
    ("ether", "daddr"): "ether_addr",
    ("vlan", "type"): "ether_type",
    ("arp", "operation"): "arp_op",
    ("arp", "ptype"): "ether_type",
    ("arp", "saddr ip"): "ipv4_addr",
    ("arp", "daddr ip"): "ipv4_addr",
    ("arp", "saddr ether"): "ether_addr",
    ("arp", "daddr ether"): "ether_addr",
}
_TRANSPORT = frozenset({"th", "tcp", "udp", "udplite", "sctp", "dccp"})


def types(expression: Expression) -> tuple[str, ...]:  # noqa: PLR0911 - one for each kind of expression
    """The types of an expression's parts, one unless it is a concatenation."""
    match expression:
        case Concat(parts):
            return tuple(kind for part in parts for kind in types(part))
        case Bits(left, _, _):
            return types(left)
        case Meta(key):
            return (_META.get(key, INTEGER),)
        case Ct(key, _):
            return (_CT.get(key, INTEGER),)
        case Payload(protocol, "sport" | "dport") if protocol in _TRANSPORT:
            return ("inet_service",)
        case Payload(protocol, field):
            return (_PAYLOAD.get((protocol, field), INTEGER),)
        case Exthdr(_, ""):
            return ("boolean",)
        case Exthdr(_, "nexthdr"):
            return ("inet_proto",)
        case Fib(_, result):
            return ({"type": "fib_addrtype", "oifname": "ifname"}.get(result, "iface_index"),)
        case Exthdr() | Numgen() | Hash() | Lookup():
            return (INTEGER,)


def _named(constants: type[IntEnum], **other: str) -> dict[str, int]:
    return {
        other.get(constant.name, constant.name.lower().replace("_", "-")): constant.value
        for constant in constants
    }


NAMES: Mapping[str, Mapping[str, int]] = {
    "inet_proto": {"icmp": 1, "igmp": 2, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132},
    "nf_proto": _named(NfProto),
    "ether_type": _named(EtherType),
    "pkt_type": _named(PacketType),
    "fib_addrtype": _named(FibType),
    "ct_dir": _named(CtDirection),
    "arp_op": _named(ArpOperation),
    "ct_state": {flag.name.lower(): flag.value for flag in CtState if flag.name},
    "ct_status": {flag.name.lower().replace("_", "-"): flag.value for flag in CtStatus if flag.name},
    "tcp_flag": {flag.name.lower(): flag.value for flag in TcpFlag if flag.name},
    "icmp_type": _named(IcmpType),
    "icmpv6_type": _named(
        Icmp6Type,
        ROUTER_SOLICIT="nd-router-solicit",
        ROUTER_ADVERT="nd-router-advert",
        NEIGHBOR_SOLICIT="nd-neighbor-solicit",
        NEIGHBOR_ADVERT="nd-neighbor-advert",
        REDIRECT="nd-redirect",
    ),
    "icmp_code": {
        "net-unreachable": 0,
        "host-unreachable": 1,
        "prot-unreachable": 2,
        "port-unreachable": 3,
        "net-prohibited": 9,
        "host-prohibited": 10,
        "admin-prohibited": 13,
    },
    "icmpv6_code": {
        "no-route": 0,
        "admin-prohibited": 1,
        "addr-unreachable": 3,
        "port-unreachable": 4,
        "policy-fail": 5,
        "reject-route": 6,
    },
}

# Names that listings hold beside those that podwall writes: other versions' names, and /etc/protocols.
_ALSO: Mapping[str, Mapping[str, int]] = {
    "inet_proto": {"ipv6-icmp": 58, "ipv6-frag": 44, "hopopt": 0, "ipv6-route": 43, "ipv6-opts": 60},
    "ether_type": {"8021q": 0x8100, "vlan": 0x8100, "8021ad": 0x88A8},
    "pkt_type": {"unicast": 0},
    "icmpv6_type": {
        "mld-listener-reduction": 132,
        "ind-neighbor-solicit": 141,
        "ind-neighbor-advert": 142,
        "mld2-listener-report": 143,
    },
}
_NUMBERS = {kind: {**_ALSO.get(kind, {}), **names} for kind, names in NAMES.items()}
_WORDS = {kind: {number: name for name, number in names.items()} for kind, names in NAMES.items()}


def name_of(kind: str, number: int) -> str | None:
    """What nft calls this constant, or None if podwall writes it as a number."""
    return _WORDS.get(kind, {}).get(number)


def number_of(kind: str, name: str) -> int | None:
    """The constant that nft calls by this name, or None."""
    return _NUMBERS.get(kind, {}).get(name)


def flag_names(kind: str, number: int) -> list[str] | None:
    """The names of the bits of a flag type, or None if one of them has none."""
    names = [name for name, bit in NAMES[kind].items() if number & bit]
    return names if number and sum(NAMES[kind][name] for name in names) == number else None
