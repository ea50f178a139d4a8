"""What the command asks about a node's policies, denied packets and flows, answered as plain data.

    policies    each policy that selects Pods of this node: generation in force, since when, how many Pods
    denials     the last denied packets, newest first, with the Pods' names and the reason
    flows       what connection tracking knows of the cluster's Pods: both ends, by name where they have one;
                `from_node`: the node itself began it, whom policies do not ask
    follow      denials and flows from now on: see `agent.following`

An answer says how many there are, also where not all of them fit into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from agent.calls import Answer, Body, listed
from agent.cluster.model import IPAddress
from agent.compile.names import TABLE
from agent.conntrack import ConntrackError, Endpoint, Flow, list_flows
from agent.datapath import Datapath
from agent.denials import Denied
from agent.following import Following, Unlogged
from agent.headers import PROTOCOL_NAMES
from agent.nft.handles import KernelRule, rules
from agent.routes.kernel import RouteError
from cni import spec
from cni.spec import CniError

MOST_FLOWS = 4000  # more hardly have room; naming and measuring them takes 45 ms of the event loop


def answers(datapath: Datapath) -> Mapping[str, Answer]:
    """Each question's answer, by its name on the socket."""

    async def policies(body: Body) -> object:
        return listed("policies", [state.to_json() for state in datapath.policy_states()])

    before: tuple[KernelRule, ...] = ()
    with suppress(OSError):
        before = rules(TABLE)  # what these counted is not this agent's to have logged
    unlogged = Unlogged(before, 0)

    async def denials(body: Body) -> object:
        found = datapath.denials
        not_logged = await unlogged.since(lambda: found.packets + found.lost)
        newest_first = [denied_json(each) for each in reversed(found.recent())]
        return {**listed("denials", newest_first), "lost": found.lost, "not_logged": not_logged}

    async def flows(body: Body) -> object:
        own = datapath.addresses()
        try:
            found = await list_flows(own.keys() | datapath.pod_addresses())
            local = await datapath.local_addresses()
        except (ConntrackError, RouteError) as error:
            raise CniError(spec.TRY_AGAIN_LATER, str(error)) from error
        some = [
            {
                **flow_json(flow, lambda of: own.get(of) or datapath.named(of)),
                "from_node": flow.source.address in local,
            }
            for flow in found[:MOST_FLOWS]
        ]
        return {**listed("flows", some), "total": len(found)}

    following = Following(datapath, flow_json, denied_json)
    return {
        "policies": policies,
        "denials": denials,
        "flows": flows,
        "follow": following.follow,
        "unfollow": following.unfollow,
    }


def denied_json(denied: Denied) -> dict[str, Any]:
    """One event; `time` is the first packet's in seconds since the epoch, "" what is not known.

    audit: the packet passed, and would be denied if policies in audit mode were in force.
    """
    first, reason = denied.first, denied.reason
    return {
        "time": first.time,
        "last_time": denied.last_time,
        "count": denied.count,
        "direction": reason.direction,
        "pod": reason.pod,
        "peer": reason.peer,
        "class": reason.pod_class,
        "protocol": PROTOCOL_NAMES.get(first.protocol, str(first.protocol)),
        "source": str(first.source),
        "sport": first.sport,
        "destination": str(first.destination),
        "dport": first.dport,
        "icmp_type": first.icmp_type,
        "fragment": first.fragment,
        "policies": list(reason.policies),
        "audit": reason.audit,
        "in": first.in_link,
        "out": first.out_link,
    }


def flow_json(flow: Flow, named: Callable[[IPAddress], str]) -> dict[str, Any]:
    """One flow by its real ends; `asked` is what the first packet was sent to, where that is another.

    seen_source: whom the destination sees, where the source was masqueraded. closed: a TCP connection that is
    over, though its entry is still there.
    """
    asked, seen = flow.original.destination, flow.reply.destination
    return {
        "protocol": PROTOCOL_NAMES.get(flow.protocol, str(flow.protocol)),
        "source": _end(flow.source, named),
        "destination": _end(flow.destination, named),
        "asked": _end(asked, named) if asked != flow.destination else None,
        "seen_source": _end(seen, named) if seen != flow.source else None,
        "icmp": list(flow.icmp) if flow.icmp else None,
        "status": int(flow.status),
        "closed": flow.closed,
    }


def _end(end: Endpoint, named: Callable[[IPAddress], str]) -> dict[str, Any]:
    return {"address": str(end.address), "port": end.port, "pod": named(end.address)}
