"""Where policy is asked for: what happens to a packet from or to a Pod before any policy is known.

    forward (Pods, other nodes, outside)               input (from a Pod to its own node)
      |                                                  |
      v  to a Pod's link that does not have              v  from a Pod's link: the same, but for the first
    the destination address: drop                        and the last step (whoever receives is no Pod)
      |
      v  part of a connection: accept
    from a Pod to many: drop
      |
      v  ICMP: an error about somebody else's connection?
      |   from a Pod: drop; about a known one: accept
      v
    TCP or SCTP that begins in the middle, from or to an isolated Pod: drop
      |
      v  source address in egress4/6: its class's chain
    no egress rule allows it: drop, counted and logged
      |
      v  destination address in ingress4/6: its class's chain
    no ingress rule allows it: drop, counted and logged

This is after DNAT and before masquerade, so addresses are those of the Pods.  Pods without policies are in
none of the maps, and what the node itself sends (probes) passes no hook here.

The way is short for the usual packet: part of a connection and to a Pod's link or elsewhere, it meets two or
five rules; the first packet to a Pod of this node goes through `to_pod`, one to elsewhere meets no ingress
rules, as only this node's Pods have any here.

TCP.  A flow that a policy no longer allows is ended by deleting its entry from connection tracking.  Its
next packet, from either side, would make a new entry, and even a denied direction would be open again as
the "reply" of a flow begun by the other side: so a new flow of an isolated Pod must begin with a SYN,
whichever direction is isolated.  Of others' flows a packet that connection tracking finds invalid is dropped:
its addresses would not be translated back.

SCTP.  The same, and it needs no data to be sent: connection tracking takes a HEARTBEAT for the begin of a
flow, and both ends send one every half minute.  A new flow must begin with an INIT, which alone has the
verification tag 0 (RFC 9260, 8.5.1).  Second paths of an association are not opened by their heartbeats
either; an isolated Pod has the one that its policies were asked about.

ICMP.  Connection tracking calls an error "related" when the packet quoted in it belongs to a known flow,
whoever sent the error.  A Pod could quote another's flow, so what comes by a Pod's link must be about a
flow of an address of this very link.  `ct original saddr` is the real address of the end that began the
flow, `ct reply saddr` that of the other (after DNAT).  This is checked where the sender is: another node's
Pod has passed the same rule there, and routers have no link.  Errors about unknown flows from a Pod are
dropped; others are judged by the policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from agent.cluster.model import Direction, Family
from agent.compile.links import NOT_TO_ONE, POD_LINKS, TO_LINK, to_its_link
from agent.compile.names import TABLE, comment
from agent.compile.packets import ADDRESS_TYPES, FAMILIES, INTERFACES, IP, link_and, on_pod_link
from agent.nft.model import (
    ACCEPT,
    DROP,
    Address,
    Bits,
    Chain,
    Concat,
    Counter,
    Ct,
    CtState,
    Element,
    Expression,
    Hook,
    IcmpType,
    Item,
    Limit,
    Log,
    Match,
    Meta,
    Named,
    Owner,
    Payload,
    Proto,
    Range,
    Rule,
    Set,
    SetName,
    TcpFlag,
    Verdict,
    VerdictMap,
)

STATIC: Owner = ("policy",)
FILTER = 0
LOG_GROUP = 9619
LOG_PREFIX = "podwall"
LOGGED_BYTES = 128
DENIALS = Limit(10, "second", 20)  # logged, per class; all are counted

MAPS: dict[tuple[Direction, int], SetName] = {
    (direction, family): SetName(TABLE, f"{direction.lower()}{family}")
    for direction in ("Egress", "Ingress")
    for family in (4, 6)
}
ISOLATED: dict[int, SetName] = {4: SetName(TABLE, "isolated4"), 6: SetName(TABLE, "isolated6")}

_FIRST = TcpFlag.FIN | TcpFlag.SYN | TcpFlag.RST | TcpFlag.ACK
_INIT_TAG = 0
_ICMP_ERRORS = frozenset(
    {
        IcmpType.DESTINATION_UNREACHABLE,
        IcmpType.SOURCE_QUENCH,
        IcmpType.REDIRECT,
        IcmpType.TIME_EXCEEDED,
        IcmpType.PARAMETER_PROBLEM,
    }
)
_ICMP6_ERRORS = Range(1, 127)  # RFC 4443: the high bit tells information from errors
ESTABLISHED = Match(Ct("state"), "in", CtState.ESTABLISHED)
RELATED = Match(Ct("state"), "in", CtState.RELATED)
INVALID = Match(Ct("state"), "in", CtState.INVALID)
ICMP = Match(Meta("l4proto"), "==", frozenset({Proto.ICMP, Proto.ICMPV6}))
NOT_FIRST = (
    Match(Bits(Payload("tcp", "flags"), "&", _FIRST), "!=", TcpFlag.SYN),
    Match(Payload("sctp", "vtag"), "!=", _INIT_TAG),
)
"""What a TCP or SCTP packet is that begins in the middle."""


def static() -> tuple[Item, ...]:
    """The chains, maps and sets that every node has, whatever is in the cluster."""
    return (*_sets(), *_chains())


def isolated(address: Address, chains: dict[Direction, str], namespace: str, pod: str) -> Iterator[Element]:
    """The elements that lead an address of this node's Pod to the chains of its classes."""
    of = comment(namespace, pod)
    if chains:
        yield Element(ISOLATED[address.version], address, comment=of)
    for direction, chain in chains.items():
        yield Element(MAPS[direction, address.version], address, Verdict("jump", chain), of)


def to_itself(family: Family) -> Rule:
    """A Pod cannot block access to itself: the packet goes back to the link it came from."""
    back = link_and("iifname", family, "daddr")
    return Rule((Match(back, "==", Named(POD_LINKS[family].name)), Counter(), ACCEPT), "to itself")


def deny(*reason: str) -> tuple[Rule, Rule]:
    """The end of a chain that allows nothing more; `reason` is what the log says."""
    log = Log(" ".join((LOG_PREFIX, *reason)), LOG_GROUP, LOGGED_BYTES)
    return Rule((Counter(), DENIALS, log), "denied"), Rule((DROP,))


def _sets() -> Iterator[Set]:
    for family, kind in ADDRESS_TYPES.items():
        yield Set(TABLE, ISOLATED[family].name, (kind,))
    for (_, family), name in MAPS.items():
        yield Set(TABLE, name.name, (ADDRESS_TYPES[family],), ("verdict",))


def _chains() -> Iterator[Chain]:
    yield Chain(TABLE, "policy_forward", tuple(_forward()), _hook("forward"))
    yield Chain(TABLE, "known_flow", tuple(_known_flow()))
    yield Chain(TABLE, "to_pod", (*_before(), *_policy("Egress"), *_policy("Ingress")))
    from_pod = Rule((*on_pod_link("iifname"), Verdict("jump", "pod_to_node")))
    yield Chain(TABLE, "policy_input", (from_pod,), _hook("input"))
    to_one = Rule((Verdict("jump", NOT_TO_ONE),))
    yield Chain(TABLE, "pod_to_node", (Rule((ESTABLISHED, ACCEPT)), to_one, *_before(), *_policy("Egress")))
    yield Chain(
        TABLE,
        "icmp_errors",
        (Rule((*on_pod_link("iifname"), Verdict("goto", "icmp_from_pod"))), Rule((RELATED, ACCEPT))),
    )
    yield Chain(TABLE, "icmp_from_pod", tuple(_icmp_from_pod()))
    yield Chain(TABLE, "midstream", tuple(_midstream()))
    yield Chain(TABLE, "not_first", deny("midstream"))


def _hook(hook: Literal["forward", "input"]) -> Hook:
    return Hook("filter", hook, FILTER)


def _forward() -> Iterator[Rule]:
    yield Rule((ESTABLISHED, Verdict("goto", "known_flow")))
    for family in FAMILIES:
        yield Rule((to_its_link(family), Verdict("goto", "to_pod")))
    yield _to_another_link()
    yield Rule((*on_pod_link("iifname"), Verdict("jump", NOT_TO_ONE)))
    yield from _before()
    yield from _policy("Egress")


def _known_flow() -> Iterator[Rule]:
    for family in FAMILIES:
        yield Rule((to_its_link(family), ACCEPT))
    yield _to_another_link()
    yield Rule((ACCEPT,))


def _to_another_link() -> Rule:
    return Rule((*on_pod_link("oifname"), Verdict("goto", TO_LINK)))


def _before() -> Iterator[Rule]:
    """What is decided before policies are asked."""
    yield Rule((ICMP, Verdict("jump", "icmp_errors")))
    for not_first in NOT_FIRST:
        yield Rule((not_first, Verdict("jump", "midstream")))


def _policy(direction: Direction) -> Iterator[Rule]:
    field = "saddr" if direction == "Egress" else "daddr"
    for family in FAMILIES:
        yield Rule((VerdictMap(Payload(IP[family], field), Named(MAPS[direction, family].name)),))


def _icmp_from_pod() -> Iterator[Rule]:
    for family in FAMILIES:
        header = Payload("icmp" if family == 4 else "icmpv6", "type")
        is_error = Match(header, "==", _ICMP_ERRORS if family == 4 else _ICMP6_ERRORS)
        for end in ("original", "reply"):
            address: Expression = Ct(f"{IP[family]} saddr", end)
            own = Match(Concat((Meta("iifname"), address)), "==", Named(POD_LINKS[family].name))
            yield Rule((is_error, RELATED, own, ACCEPT))
        yield Rule((is_error, Counter(), DROP), "error about a connection that is not its own")


def _midstream() -> Iterator[Rule]:
    for family in FAMILIES:
        for field in ("saddr", "daddr"):
            known = Match(Payload(IP[family], field), "==", Named(ISOLATED[family].name))
            yield Rule((known, Verdict("goto", "not_first")))
    for interface in INTERFACES:
        invalid = (INVALID, Match(Meta("l4proto"), "==", Proto.TCP), *on_pod_link(interface))
        yield Rule((*invalid, Counter(), DROP), "part of no connection")
