"""Flows of Services that must end because nothing translates them as their Service says now.

    client --> 10.96.0.10:53 --> 10.244.1.7:5353     its endpoint is gone         end
    client --> 10.96.0.10:53 --> 10.244.1.8:5353     its endpoint serves          goes on
    client --> 10.96.0.10:53     (no translation)    began before the Service     end, if that has endpoints now
    client --> 192.0.2.9:53  --> 10.244.1.7:5353     podwall's Service is gone    end
    client --> 192.0.2.9:53  --> 198.51.100.1:53     never was podwall's          goes on

Only the first packet of a flow meets the rules; connection tracking translates all others alike, as long as
one comes every now and then. For TCP that is right: the endpoint itself ends its connections. A UDP or SCTP
client may go on for ever to nobody, so these flows end, and their next packet is a first one again.

What podwall translated before is known from the rules themselves: a frontend that a commit removes was in the
kernel until then, also when another agent's commit had put it there. So nothing need be remembered over a
restart, and no translation of somebody else is touched.

A packet that the old rules let through may enter the table just after it was listed: it is listed once more
after a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Set
from typing import NamedTuple, TypeAlias

from agent.cluster.model import IPAddress
from agent.conntrack import GRACE_S, Ended, Endpoint, Flow, end_flows, list_flows
from agent.nft.model import Proto

PROTOCOLS = frozenset({Proto.UDP, Proto.SCTP})


class Destination(NamedTuple):
    """What the first packet of a flow was sent to; `address` None: any of the nodes' own."""

    address: IPAddress | None
    protocol: int
    port: int


class Target(NamedTuple):
    """Where flows to a destination may lead; `everyone`: it is translated for whoever sends there."""

    endpoints: frozenset[Endpoint]
    everyone: bool = True


Where: TypeAlias = Callable[[Destination], Target | None]
"""Where flows to this destination may lead now; None when it is no frontend."""


def destination_of(flow: Flow) -> Destination:
    """What the flow's first packet was sent to."""
    to = flow.original.destination
    return Destination(to.address, flow.protocol, to.port)


def must_end(flow: Flow, target: Target | None, was_frontend: bool) -> bool:
    """Whether a flow may not go on: by where its destination leads now, and whether it was a frontend."""
    translated = flow.destination != flow.original.destination
    if target is None:
        return translated and was_frontend
    if translated:
        return flow.destination not in target.endpoints
    return target.everyone and bool(target.endpoints)


async def end_stale(
    where: Where, gone: Set[Destination], local: Set[IPAddress], grace_s: float = GRACE_S
) -> Ended:
    """End exactly the UDP and SCTP flows that may not go on.

    `gone` are frontends that were just removed, `local` the nodes' own addresses. `where` is called by the
    event loop, after each listing, once for each destination. Raises ConntrackError.
    """
    total = Ended()
    for pause_s in (0.0, grace_s):
        await asyncio.sleep(pause_s)
        flows = await list_flows(protocols=PROTOCOLS)
        destinations = await asyncio.to_thread(_destinations, flows)
        targets = {each: where(each) for each in destinations}
        before = {each for each in destinations if _was(each, gone, local)}
        stale = await asyncio.to_thread(_stale, flows, targets, before)
        if stale:
            more = await end_flows(stale)
            total = Ended(total.ended + more.ended, total.gone + more.gone)
    return total


def _destinations(flows: Iterable[Flow]) -> set[Destination]:
    return {destination_of(flow) for flow in flows}


def _was(destination: Destination, gone: Set[Destination], local: Set[IPAddress]) -> bool:
    if destination in gone:
        return True
    return destination.address in local and destination._replace(address=None) in gone


def _stale(
    flows: Iterable[Flow], targets: Mapping[Destination, Target | None], before: Set[Destination]
) -> tuple[Flow, ...]:
    return tuple(
        flow
        for flow in flows
        if must_end(flow, targets[destination := destination_of(flow)], destination in before)
    )
