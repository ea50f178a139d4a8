"""Which kernel features podwall uses, whether this kernel has each, and what it means where one is missing.

    nftables         a rule or set that uses it, judged by the kernel and not committed (Kernel.check)
    VXLAN            an incomplete device: refused for what it lacks, or for its kind that nobody knows
    conntrack, SCTP  the subsystem is asked, the setting is looked for

Asking loads a module that is there and not loaded yet, so the answer is what podwall would meet. A feature
that only something not configured here needs is told as missing, and is nothing to worry about.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent import nfnetlink
from agent.nft.kernel import Kernel, NftError
from agent.pods.rtnetlink import Rtnetlink, RtnetlinkError, new_device

_TABLE = "podwall_probe"
_CT_GET_STATS = 5
_SCTP = Path("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_established")
_IPV6 = Path("/proc/sys/net/ipv6")


@dataclass(frozen=True, slots=True)
class Feature:
    """Something of the kernel: its name, the module that has it, and what does not work without it.

    `rule` is nftables' statements that use it, in a chain of the type and hook given; `sets` come before.
    """

    name: str
    module: str
    without: str
    rule: str = ""
    hook: str = "type filter hook forward priority 0"
    sets: str = ""

    @property
    def text(self) -> str:
        """A transaction that the kernel takes if it has the feature."""
        table = f"inet {_TABLE}"
        lines = [f"add table {table}"]
        lines += [f"add {each.format(table=table)}" for each in self.sets.splitlines() if each]
        lines += [f"add chain {table} probe {{ {self.hook}; }}"]
        lines += [f"add rule {table} probe {self.rule}"] if self.rule else []
        return "".join(f"{line}\n" for line in lines)


NFTABLES = (
    Feature("nftables, family inet", "nf_tables", "nothing works: no Pod gets a network"),
    Feature(
        "nftables: connection state",
        "nft_ct",
        "nothing works: no Pod gets a network",
        rule="ct state established ct mark set 0x1 accept",
    ),
    Feature(
        "nftables: NAT in family inet",
        "nft_chain_nat",
        "no Service works, and Pods cannot leave the cluster",
        rule="ct status dnat masquerade fully-random",
        hook="type nat hook postrouting priority 100",
    ),
    Feature(
        "nftables: routing lookup (fib)",
        "nft_fib_inet",
        "no Pod gets a network: broadcasts of Pods could not be told apart",
        rule="fib daddr type broadcast drop",
        hook="type filter hook prerouting priority -150",
    ),
    Feature(
        "nftables: random choice (numgen)",
        "nft_numgen",
        "no Service works",
        rule="meta mark set numgen random mod 2",
    ),
    Feature(
        "nftables: sets filled by packets",
        "nf_tables",
        "no Service with sessionAffinity ClientIP works",
        sets="set {table} seen {{ type ipv4_addr; flags dynamic, timeout; timeout 10s; }}",
        rule="update @seen { ip saddr }",
    ),
    Feature(
        "nftables: ranges in concatenations",
        "nf_tables",
        "no Service works where one has loadBalancerSourceRanges",
        sets="set {table} ranged {{ type ipv4_addr . inet_service . ipv4_addr; flags interval; }}",
        rule="ip daddr . tcp dport . ip saddr @ranged accept",
    ),
    Feature(
        "nftables: reject",
        "nft_reject_inet",
        "Services without endpoints are silent instead of refusing",
        rule="reject with icmpx port-unreachable",
    ),
    Feature(
        "nftables: log to a group (NFLOG)",
        "nft_log",
        "no isolated Pod gets its rules: what is denied is logged",
        rule="limit rate 10/second log group 9619 drop",
    ),
    Feature(
        "nftables: SCTP",
        "nf_tables",
        "policies for SCTP cannot be enforced",
        rule="sctp vtag 0 accept",
    ),
)
"""In the order in which they matter."""


@dataclass(frozen=True, slots=True)
class Found:
    """Whether the kernel has a feature; `matters` where something that is configured needs it."""

    feature: Feature
    there: bool
    why_not: str = ""
    matters: bool = True

    def to_json(self) -> dict[str, object]:
        """For the socket."""
        return {
            "name": self.feature.name,
            "module": self.feature.module,
            "there": self.there,
            "matters": self.matters,
            "without": self.feature.without,
            "why_not": self.why_not,
        }


async def found(kernel: Kernel, *, tunnels: bool, families: Iterable[int]) -> list[Found]:
    """Ask the kernel for each feature; `tunnels` and `families` say what is needed here."""
    return [
        *[await asked(kernel, each) for each in NFTABLES],
        *await asyncio.to_thread(_others, tunnels, frozenset(families)),
    ]


async def asked(kernel: Kernel, feature: Feature) -> Found:
    """Whether the kernel takes a rule that uses a feature."""
    try:
        await kernel.check(feature.text)
    except NftError as error:
        return Found(feature, False, error.message.splitlines()[0] if error.message else error.reason)
    return Found(feature, True)


CONNTRACK = Feature(
    "connection tracking over netlink",
    "nf_conntrack_netlink",
    "flows that a policy no longer allows go on, and so do UDP flows to endpoints that are gone",
)
SCTP = Feature(
    "connection tracking of SCTP",
    "nf_conntrack (CONFIG_NF_CT_PROTO_SCTP)",
    "Services on SCTP do not work, nor do policies on it",
)
IPV6 = Feature("IPv6", "ipv6", "Pods get no IPv6 address")
VXLAN = Feature("VXLAN devices", "vxlan", "Pods of nodes that share no link cannot reach each other")


def _others(tunnels: bool, families: frozenset[int]) -> list[Found]:
    vxlan = _vxlan()
    return [
        _of(CONNTRACK, _conntrack()),
        _of(SCTP, "" if _SCTP.exists() else f"there is no {_SCTP}", matters=False),
        _of(IPV6, "" if _IPV6.is_dir() else f"there is no {_IPV6}", matters=6 in families),
        _of(VXLAN, vxlan, matters=tunnels),
    ]


def _of(feature: Feature, why_not: str, *, matters: bool = True) -> Found:
    return Found(feature, not why_not, why_not, matters)


def _conntrack() -> str:
    """Why connection tracking cannot be asked; "" when it can."""
    try:
        with nfnetlink.connect() as sock:
            sock.settimeout(1.0)
            sock.send(nfnetlink.message(nfnetlink.CTNETLINK, _CT_GET_STATS, b"", sequence=1))
            for received in nfnetlink.messages(sock.recv(1 << 14)):
                error = nfnetlink.error_of(received) if received.kind == nfnetlink.ERROR else None
                if error:
                    return str(error.strerror)
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _vxlan() -> str:
    """Why no VXLAN device can be made; the kernel is asked for one without number, which it refuses."""
    try:
        with Rtnetlink() as kernel:
            kernel.ask(new_device("podwall-probe", "vxlan", 1280))
    except RtnetlinkError as error:
        return "" if error.errno == errno.EINVAL else str(error.strerror)
    return ""
