"""Policies in audit mode: what they would deny is counted and logged, and passes.

    forward, input [0]: what is in force (agent.compile.verdicts)
      |
      v  what it let pass only
    forward, input [1]
      |
      v  part of a connection, or an error about one: nothing to say
    TCP or SCTP that begins in the middle, from or to a Pod that would be isolated: would be denied
      |
      v  source address in audit_egress4/6: its audit class's chain
    no egress rule would allow it: would be denied
      |
      v  destination address in audit_ingress4/6: its audit class's chain
    no ingress rule would allow it: would be denied

These chains come after those in force, so what they report is exactly what enforcing would change: a packet
that is denied already never gets here. Nothing in them drops, and each packet is reported once. An audit
class has all policies of its Pods, those in force too, because policies add up: what one of them would deny
another may allow.

All of it is there only while some Pod of this node has a policy in audit mode: who audits nothing pays
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from agent.cluster.model import Direction
from agent.compile.names import TABLE, comment
from agent.compile.packets import ADDRESS_TYPES, FAMILIES, IP, on_pod_link
from agent.compile.verdicts import (
    DENIALS,
    ESTABLISHED,
    FILTER,
    ICMP,
    LOG_GROUP,
    LOG_PREFIX,
    LOGGED_BYTES,
    NOT_FIRST,
    RELATED,
)
from agent.nft.model import (
    ACCEPT,
    Address,
    Chain,
    Counter,
    Element,
    Hook,
    Item,
    Log,
    Match,
    Named,
    Owner,
    Payload,
    Rule,
    Set,
    SetName,
    Verdict,
    VerdictMap,
)

AUDIT: Owner = ("audit",)
WORD = "audit"
"""The word after the prefix in the log."""

MAPS: dict[tuple[Direction, int], SetName] = {
    (direction, family): SetName(TABLE, f"audit_{direction.lower()}{family}")
    for direction in ("Egress", "Ingress")
    for family in (4, 6)
}
AUDITED: dict[int, SetName] = {4: SetName(TABLE, "audited4"), 6: SetName(TABLE, "audited6")}


def hooks() -> tuple[Item, ...]:
    """The chains, maps and sets that a node has while some of its Pods have a policy in audit mode."""
    return (*_sets(), *_chains())


def audited(address: Address, chains: dict[Direction, str], namespace: str, pod: str) -> Iterator[Element]:
    """The elements that lead an address of this node's Pod to the chains of its audit classes."""
    of = comment(namespace, pod)
    if chains:
        yield Element(AUDITED[address.version], address, comment=of)
    for direction, chain in chains.items():
        yield Element(MAPS[direction, address.version], address, Verdict("jump", chain), of)


def would_deny(*reason: str) -> tuple[Rule, Rule]:
    """The end of an audit chain: what no rule allows is reported, and passes."""
    log = Log(" ".join((LOG_PREFIX, WORD, *reason)), LOG_GROUP, LOGGED_BYTES)
    return Rule((Counter(), DENIALS, log), "would be denied"), Rule((ACCEPT,))


def _sets() -> Iterator[Set]:
    for family, kind in ADDRESS_TYPES.items():
        yield Set(TABLE, AUDITED[family].name, (kind,))
    for (_, family), name in MAPS.items():
        yield Set(TABLE, name.name, (ADDRESS_TYPES[family],), ("verdict",))


def _chains() -> Iterator[Chain]:
    both = (*_judge("Egress"), *_judge("Ingress"))
    yield Chain(TABLE, "audit_forward", (*_before(), *both), _hook("forward"))
    to_node = Rule((*on_pod_link("iifname"), Verdict("jump", "audit_pod_to_node")))
    yield Chain(TABLE, "audit_input", (to_node,), _hook("input"))
    yield Chain(TABLE, "audit_pod_to_node", (*_before(), *_judge("Egress")))
    yield Chain(TABLE, "audit_midstream", tuple(_midstream()))
    yield Chain(TABLE, "audit_not_first", would_deny("midstream"))


def _hook(hook: Literal["forward", "input"]) -> Hook:
    return Hook("filter", hook, FILTER + 1)


def _before() -> Iterator[Rule]:
    """What policy would never be asked about; an error about somebody else's connection does not get here."""
    yield Rule((ESTABLISHED, ACCEPT))
    yield Rule((ICMP, RELATED, ACCEPT))
    for not_first in NOT_FIRST:
        yield Rule((not_first, Verdict("jump", "audit_midstream")))


def _judge(direction: Direction) -> Iterator[Rule]:
    field = "saddr" if direction == "Egress" else "daddr"
    for family in FAMILIES:
        yield Rule((VerdictMap(Payload(IP[family], field), Named(MAPS[direction, family].name)),))


def _midstream() -> Iterator[Rule]:
    for family in FAMILIES:
        for field in ("saddr", "daddr"):
            known = Match(Payload(IP[family], field), "==", Named(AUDITED[family].name))
            yield Rule((known, Verdict("goto", "audit_not_first")))
