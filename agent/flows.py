"""Whether a flow that conntrack knows would be let in by the rules in force: its first packet, judged again.

    Flow --real ends, before masquerade and behind DNAT--> first packet --> policy hooks --> allowed or not

The same rules judge it that judge packets, so policy and flows cannot disagree.

    client --datagram, just before the end--> server
    client <--answer, just after it---------- server     a new flow, the other way round, that rules may allow
    client --what is denied----------------->            would be part of it

A datagram cannot say whether it begins something. So for a while after a flow's end what looks like such an
answer is ended too, until nobody answers any more; TCP says it by SYN, and the rules look at that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set

from agent.cluster.model import IPAddress
from agent.compile import verdicts
from agent.conntrack import Endpoint, Flow
from agent.nft.evaluate import Evaluator, HookName
from agent.nft.model import FibType, Key, Proto, Ruleset, TcpFlag
from agent.nft.packet import Packet

ELSEWHERE = "elsewhere"  # the name of any link that is no Pod's
ANSWER_S = 0.8
"""How long a server may take to answer what came before the end of a flow."""

_Exchange = tuple[int, Endpoint, Endpoint]  # protocol, who began, to whom


def isolated(ruleset: Ruleset) -> frozenset[IPAddress]:
    """The addresses of Pods that some policy selects."""
    return frozenset(
        element.key  # type: ignore[misc]  # the key of these sets is one address
        for name in verdicts.ISOLATED.values()
        for element in ruleset.elements.get(name, {}).values()
    )


def to_one(_flags: tuple[str, ...], _result: str, _packet: Packet) -> Key:
    """What routing says of a known flow's destination: a Pod's packets to many never become one."""
    return FibType.UNICAST


class Judge:
    """Judges flows by a ruleset, whose evaluator has `to_one`.

    `links` are Pod addresses' links, `local` the node's own addresses.
    """

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


class Answers:
    """The flows that ended lately, and whether another is no more than a late answer to one of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended: dict[_Exchange, float] = {}

    def awaited(self) -> bool:
        """Whether there may still be some."""
        now = self._clock()
        self._ended = {exchange: until for exchange, until in self._ended.items() if now < until}
        return bool(self._ended)

    def judge(self, allowed: Callable[[Flow], bool]) -> Callable[[Flow], bool]:
        """The same judge, who also ends late answers; what it denies is remembered as ended."""

        def judged(flow: Flow) -> bool:
            if self._is_one(flow):
                return False
            if allowed(flow):
                return True
            if flow.protocol != Proto.TCP and flow.icmp is None:
                exchange = flow.protocol, flow.source, flow.destination
                self._ended[exchange] = self._clock() + ANSWER_S
            return False

        return judged

    def _is_one(self, flow: Flow) -> bool:
        until = self._ended.get((flow.protocol, flow.destination, flow.source))
        return until is not None and self._clock() < until
