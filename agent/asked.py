"""What the command asks about a node's policies, denied packets and flows, answered as plain data.

policies    each policy that selects Pods of this node: generation in force, since when, how many Pods
denials     the last denied packets, oldest first, with the Pods' names and the reason
flows       what connection tracking knows of this node's Pods: both ends, by name where they have one
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.cluster.model import IPAddress
from agent.conntrack import ConntrackError, Endpoint, Flow, list_flows
from agent.datapath import Datapath
from agent.denials import Denied
from agent.headers import PROTOCOL_NAMES
from cni import spec
from cni.spec import CniError

MOST_FLOWS = 2000
"""In one answer, which must stay below the socket's limit of 1 MiB."""

Answer = Callable[[], Awaitable[object]]


def answers(datapath: Datapath) -> Mapping[str, Answer]:
    """Each question's answer, by its name on the socket."""

    async def policies() -> object:
        return {"policies": [state.to_json() for state in datapath.policy_states()]}

    async def denials() -> object:
        found = datapath.denials
        return {"denials": [denied_json(each) for each in found.recent()], "lost": found.lost}

    async def flows() -> object:
        own = datapath.addresses()
        try:
            found = await list_flows(own.keys())
        except ConntrackError as error:
            raise CniError(spec.TRY_AGAIN_LATER, str(error)) from error
        shown = [flow_json(flow, lambda of: own.get(of) or datapath.named(of)) for flow in found[:MOST_FLOWS]]
        return {"flows": shown, "total": len(found)}

    return {"policies": policies, "denials": denials, "flows": flows}


def denied_json(denied: Denied) -> dict[str, Any]:
    """One event; `time` is the first packet's in seconds since the epoch, "" what is not known."""
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
        "in": first.in_link,
        "out": first.out_link,
    }


def flow_json(flow: Flow, named: Callable[[IPAddress], str]) -> dict[str, Any]:
    """One flow by its real ends; `asked` is what the first packet was sent to, where that is another."""
    asked = flow.original.destination
    return {
        "protocol": PROTOCOL_NAMES.get(flow.protocol, str(flow.protocol)),
        "source": _end(flow.source, named),
        "destination": _end(flow.destination, named),
        "asked": _end(asked, named) if asked != flow.destination else None,
        "status": int(flow.status),
    }


def _end(end: Endpoint, named: Callable[[IPAddress], str]) -> dict[str, Any]:
    return {"address": str(end.address), "port": end.port, "pod": named(end.address)}
