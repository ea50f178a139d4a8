"""What each node's own rules should do with a connection's first packet, and whether they do it. Pure.

    client's node       10.244.1.2 -> 10.96.0.7:80     leads to one of 10.244.2.3:8080, and lets it out
    the Pod's own node  10.244.1.2 -> 10.244.2.3:8080  lets it in

A leg is what the objects say; `agent.verify` says what the rules in the kernel of that node do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from agent.cluster.model import IPAddress, Protocol
from agent.compile.endpoints import Backend
from agent.explain.world import with_port

MOST_TOLD = 3


@dataclass(frozen=True, slots=True)
class Leg:
    """A first packet as it comes to a node, and where it may end; `ends` says which of these let it pass.

    local: the node itself sends it. sticky: which end is chosen depends on who asked before. Without ends it
    is refused, or dropped when `silent`.
    """

    node: str
    source: IPAddress
    target: IPAddress
    port: int
    protocol: Protocol
    ends: Mapping[Backend, bool]
    local: bool = False
    sticky: bool = False
    silent: bool = False

    def body(self) -> dict[str, object]:
        """The question to the node's agent, call `packet`."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "port": self.port,
            "protocol": self.protocol,
            "local": self.local,
        }


def differences(leg: Leg, told: Mapping[str, Any]) -> Iterator[str]:
    """In what a node's rules do another thing than the objects say; nothing when they agree."""
    ways: Sequence[Mapping[str, Any]] = told["ways"]
    reached: set[Backend] = set()
    for way in ways:
        end = ip_address(way["address"]), int(way["port"])
        passes = way["outcome"] == "accept"
        reached.add(end)
        if not leg.ends:
            yield from _of_none(leg, way, passes)
        elif passes and end not in leg.ends:
            yield f"they lead it to {with_port(*end)}, which it must not reach"
        elif passes and not leg.ends[end]:
            yield f"they let it pass to {with_port(*end)}, though the policies deny it"
        elif not passes and leg.ends.get(end, any(leg.ends.values())):
            yield f"they {_does(way)}, though it may reach {with_port(*end)}"
    missing = {end for end in leg.ends if end not in reached}
    if missing and not leg.sticky and told["whole"] and all(way["outcome"] == "accept" for way in ways):
        yield f"they never lead it to {', '.join(sorted(with_port(*end) for end in missing)[:MOST_TOLD])}"


def _of_none(leg: Leg, way: Mapping[str, Any], passes: bool) -> Iterator[str]:
    if passes:
        end = with_port(ip_address(way["address"]), way["port"])
        yield f"they let it pass to {end}, where nobody is"
    elif leg.silent != (way["outcome"] == "drop"):
        yield f"they {_does(way)}, instead of {'dropping' if leg.silent else 'refusing'} it"


def _does(way: Mapping[str, Any]) -> str:
    does = "refuse it" if way["outcome"] == "reject" else "drop it"
    return f"{does} in {way['rule']}" if way["rule"] else does
