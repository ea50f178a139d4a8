"""Whether a flow that conntrack knows would be let in by the rules in force: its first packet, judged again.

    Flow --real ends, before masquerade and behind DNAT--> first packet --> policy hooks --> allowed or not

The same rules judge it that judge packets, so policy and flows cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from agent.cluster.model import IPAddress
from agent.compile import verdicts
from agent.conntrack import Flow
from agent.nft.evaluate import Evaluator, HookName
from agent.nft.model import Proto, Ruleset, TcpFlag
from agent.nft.packet import Packet

ELSEWHERE = "elsewhere"  # the name of any link that is no Pod's


def isolated(ruleset: Ruleset) -> frozenset[IPAddress]:
    """The addresses of Pods that some policy selects."""
    return frozenset(
        element.key  # type: ignore[misc]  # the key of these sets is one address
        for name in verdicts.ISOLATED.values()
        for element in ruleset.elements.get(name, {}).values()
    )


class Judge:
    """Judges flows by a ruleset; `links` are Pod addresses' links, `local` the node's own addresses."""

    def __init__(self, evaluator: Evaluator, links: Mapping[IPAddress, str], local: Set[IPAddress]) -> None:
        self._evaluator = evaluator
        self._links = links
        self._local = local

    def allowed(self, flow: Flow) -> bool:
        """Whether its first packet would be let through now; what the node itself begins always is."""
        if flow.source.address in self._local:
            return True
        hook: HookName = "input" if flow.destination.address in self._local else "forward"
        return self._evaluator.judge(self._first_packet(flow), (hook,)).accepted

    def _first_packet(self, flow: Flow) -> Packet:
        return Packet(
            source=flow.source.address,
            target=flow.destination.address,
            l4proto=flow.protocol,
            sport=flow.source.port,
            dport=flow.destination.port,
            tcp_flags=TcpFlag.SYN if flow.protocol == Proto.TCP else 0,
            icmp_type=flow.icmp.type if flow.icmp else 0,
            icmp_code=flow.icmp.code if flow.icmp else 0,
            iifname=self._links.get(flow.source.address, ELSEWHERE),
            oifname=self._links.get(flow.destination.address, ELSEWHERE),
        )
