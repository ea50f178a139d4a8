"""What the rules that are in this node's kernel do with one first packet, for `podwall why`.

    settings    what the agent is configured to as far as it decides about Services, and what it answers for
    packet      {"source": "10.244.1.2", "target": "10.96.0.7", "port": 80, "protocol": "TCP", "local": false}
                  --> each way that the packet may take through the rules as they are now: accepted, dropped
                      or refused, by which rule, where to and under whose address

The tables are read back from the kernel for each question: it is about what is there, not about what the
agent believes to be there. Where a rule picks an endpoint by chance, each pick is tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

from agent.calls import Answer, Body
from agent.cluster.model import IPAddress
from agent.compile.names import SERVICES_TABLE, TABLE
from agent.config import Config
from agent.flows import ELSEWHERE
from agent.nft.evaluate import Evaluator, HookName, Result
from agent.nft.kernel import Kernel, NftError
from agent.nft.model import FibType, Key, Numgen, Proto, Ruleset, TcpFlag
from agent.nft.packet import Packet, UndecidedError
from agent.routes.kernel import RouteError
from cni import spec
from cni.spec import CniError

MOST_PICKS = 64
SOURCE_PORT = 49152  # any that is given to clients: no rule asks for it
LOOPBACK = "lo"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked: one agent's parts. `links` are its Pods' addresses and links, `local` the node's own.

    announced: the addresses that it answers for on the nodes' link. tunnels: the nodes it reaches by tunnel.
    """

    config: Config
    kernel: Kernel
    links: Callable[[], Mapping[IPAddress, str]]
    local: Callable[[], Awaitable[Set[IPAddress]]]
    serving: Callable[[], tuple[bool, str]]
    announced: Callable[[], list[str]]
    tunnels: Callable[[], list[str]]


def answers(subject: Subject) -> Mapping[str, Answer]:
    """Each question's answer, by its name on the socket."""

    async def settings(body: Body) -> object:
        config, (serving, why) = subject.config, subject.serving()
        pools = [network for pool in config.load_balancer_pools for network in pool.networks()]
        return {
            "services": serving,
            "services_why": why,
            "external_ips": list(map(str, config.external_ips)),
            "node_port_addresses": list(map(str, config.node_port_addresses)),
            "pools": list(map(str, pools)),
            "announced": subject.announced(),
            "tunnels": subject.tunnels(),
        }

    async def packet(body: Body) -> object:
        sent = _sent(body)
        try:
            ruleset = await subject.kernel.read((TABLE, SERVICES_TABLE))
            node = Node(ruleset, subject.links(), await subject.local())
        except (NftError, RouteError) as error:
            raise CniError(spec.TRY_AGAIN_LATER, f"the rules cannot be read: {error}") from error
        try:
            return await asyncio.to_thread(node.ways, sent, local=bool(body.get("local")))
        except UndecidedError as error:
            return {"ways": [], "whole": False, "undecided": str(error)}

    return {"settings": settings, "packet": packet}


def _sent(body: Body) -> Packet:
    """The packet that a question describes. Raises CniError."""
    try:
        protocol = Proto[str(body["protocol"])]
        return Packet(
            source=ip_address(body["source"]),
            target=ip_address(body["target"]),
            l4proto=protocol,
            sport=SOURCE_PORT,
            dport=int(body["port"]),
            tcp_flags=TcpFlag.SYN if protocol == Proto.TCP else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CniError(spec.INVALID_CONFIG, f"packet: this is none: {error!r}") from error


@dataclass(slots=True)
class Node:
    """A ruleset on a node: whose addresses are on which of its links, and which are its own."""

    ruleset: Ruleset
    links: Mapping[IPAddress, str]
    local: Set[IPAddress]
    _pick: int = 0
    _picks: int = field(default=1, init=False)

    def ways(self, sent: Packet, *, local: bool) -> dict[str, Any]:
        """Each way through the rules; `whole` when all of them were tried. Raises UndecidedError."""
        evaluator = Evaluator(self.ruleset, self._fib, self._numgen)
        found: list[dict[str, Any]] = []
        self._pick, self._picks = 0, 1
        while self._pick < min(self._picks, MOST_PICKS):
            way = _told(self._follow(evaluator, sent, local))
            if way not in found:
                found.append(way)
            self._pick += 1
        return {"ways": found, "whole": self._picks <= MOST_PICKS, "undecided": ""}

    def _follow(self, evaluator: Evaluator, sent: Packet, local: bool) -> Result:
        """One way: translated first, then forwarded, received, or sent."""
        link = "" if local else self.links.get(sent.source, ELSEWHERE)
        first = evaluator.judge(replace(sent, iifname=link), ("output" if local else "prerouting",))
        if not first.accepted:
            return first
        packet = first.packet
        to_itself = packet.target in self.local
        if to_itself:
            hooks: tuple[HookName, ...] = ("postrouting", "input") if local else ("input",)
            packet = replace(packet, iifname=LOOPBACK if local else link, oifname=LOOPBACK if local else "")
        else:
            hooks = ("postrouting",) if local else ("forward", "postrouting")
            packet = replace(packet, oifname=self.links.get(packet.target, ELSEWHERE))
        then = evaluator.judge(packet, hooks, first.connection)
        return replace(then, translations=(*first.translations, *then.translations))

    def _fib(self, flags: tuple[str, ...], result: str, packet: Packet) -> Key:
        if result != "type" or flags not in {("daddr",), ("saddr",)}:
            raise UndecidedError(f"fib {' . '.join(flags)} {result}")
        address = packet.target if flags == ("daddr",) else packet.source
        return FibType.LOCAL if address in self.local else FibType.UNICAST

    def _numgen(self, of: Numgen) -> int:
        self._picks = max(self._picks, of.mod)
        return of.offset + self._pick % of.mod


def _told(result: Result) -> dict[str, Any]:
    """A way as plain data; `source` is null where it keeps its own, "" where the kernel chooses one."""
    source: str | None = None
    for each in result.translations:
        if each.kind in {"snat", "masquerade"}:
            source = str(each.address) if each.address is not None else ""
    return {
        "outcome": result.outcome,
        "address": str(result.packet.target),
        "port": result.packet.dport,
        "source": source,
        "rule": _rule(result),
    }


def _rule(result: Result) -> str:
    """The rule that ended it, such as "inet podwall to_web, rule 3 (denied)"; "" when none did."""
    if result.accepted or result.chain is None:
        return ""
    chain = f"{result.chain.table.family} {result.chain.table.name} {result.chain.name}"
    if result.step is None:
        return f"{chain}, by its policy"
    comment = f" ({result.step.rule.comment})" if result.step.rule.comment else ""
    return f"{chain}, rule {result.step.index + 1}{comment}"
