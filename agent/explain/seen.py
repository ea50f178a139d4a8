"""What really happened to a connection, beside what the policies say of it. Pure.

connected, refused     the packet arrived: allowed, whether or not somebody listens
unreachable, silent    it did not: denied; of a datagram silence says nothing
failed                 it was not tried: nothing is known
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from agent.cluster.model import IPAddress, Pod, Service
from agent.explain.matrix import Column, Way

_EITHER = frozenset({"policy-part", "target-port"})


class Seen(NamedTuple):
    """A connection that was tried: connected, refused, unreachable, silent or failed, and words for it."""

    verdict: str
    words: str = ""


Attempt: TypeAlias = tuple[tuple[str, str], IPAddress, str, int]
"""The source Pod's key, an address, a protocol and a port."""
Observed: TypeAlias = Mapping[Attempt, Seen]


def attempt(source: Pod, column: Column, way: Way) -> Attempt:
    """The connection that shows whether a way is as it was decided."""
    return source.key, way.destination, column.protocol, column.port


def arrived(column: Column, seen: Seen) -> bool | None:
    """Whether the packet came to the target; None when that cannot be known."""
    if seen.verdict == "connected":
        return True
    if seen.verdict == "refused":  # a Service refuses by itself: nobody can tell who did
        return None if isinstance(column.target, Service) else True
    if seen.verdict == "unreachable" or (seen.verdict == "silent" and column.protocol != "UDP"):
        return False
    return None


def differs(column: Column, way: Way, seen: Seen | None) -> bool:
    """Whether it was seen to be otherwise than decided.

    Where only some endpoints of a Service let the source in, or nobody says that anything listens at its
    targetPort, either is right.
    """
    if seen is None or way.cause in _EITHER:
        return False
    came = arrived(column, seen)
    return came is not None and came != way.allowed
