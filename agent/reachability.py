"""Whether packets pass between this node's Pods and those of all other nodes, tried with real packets.

    this node's Pod range --echo of the Pods' MTU--> each other node's Pod range, each family
                          <--answer, by the link that the path has-----+
      without answer:     --the same again, and a small one--> tells a path that is too narrow from none

See `agent.echo` for what answers. No Pod takes part and no port is opened: requests leave by a raw socket, as
a Pod's packets do through this node's routes, tunnel, rules and uplink; answers are seen as they come in by a
packet socket that listens for a second. Each is sent up to three times, for the first one may be waiting for
the other node's hardware address. One packet is enough where all is well.

A node without tunnel answers by an error. The kernel makes some at once, and then one in two seconds
to an address (seen on 6.18; net.ipv4.icmp_ratelimit and the route's own limit count together). Who asks more
often gets silence, so whoever calls this must not.

Answers are seen before this node's own rules; what these would drop on its way in is found by the other node,
whose packets come in the same way and get no answer.

No packet of these is forwarded, so others' chains at that hook are looked at apart (`agent.proofs`, filters).

What it does not prove: that a firewall of somebody else treats ICMP as it treats TCP, and any single Pod's
link, which the rules of its own guard.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import secrets
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from agent import echo
from agent.cluster.model import Family, IPAddress, IPNetwork, Node
from agent.routes.plan import VXLAN_DEVICE, Plan, Way

SEND_AT_S = (0.0, 0.25, 0.6)
LIMIT_S = 1.2
MOST_PATHS = 500
"""Paths that are tried at a time; a larger cluster's first ones."""

_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PACKET_OUTGOING = 4
_IPV6_HDRINCL = 36
_SO_ATTACH_FILTER = 26
_READ = 1 << 16


@dataclass(frozen=True, slots=True)
class Trial:
    """One path to try: from an address of this node's Pod range to one of the other's, at most `mtu` bytes.

    `known` are the other node's own addresses, one of which may answer.
    """

    node: str
    cidr: IPNetwork
    way: Way
    source: IPAddress
    known: frozenset[IPAddress]
    mtu: int

    @property
    def destination(self) -> IPAddress:
        """The first address of the other node's range."""
        return self.cidr.network_address

    @property
    def family(self) -> Family:
        """Of both addresses."""
        return 4 if self.cidr.version == 4 else 6


@dataclass(slots=True)
class Seen:
    """What became of the packets of one trial: the milliseconds that each size took, by size in bytes."""

    took_ms: dict[int, float] = field(default_factory=dict)
    device: str = ""
    objection: str = ""
    fits: int = 0


def trials(own: str, nodes: Mapping[str, Node], plan: Plan, mtu: int) -> tuple[Trial, ...]:
    """Every path of a plan that this node has an own range of the same family for."""
    ranges = {cidr.version: cidr for cidr in reversed(nodes[own].pod_cidrs)} if own in nodes else {}
    return tuple(
        Trial(
            node=path.node,
            cidr=path.cidr,
            way=path.way,
            source=ranges[path.cidr.version].network_address,
            known=_known(nodes[path.node]),
            mtu=mtu,
        )
        for path in plan.paths
        if path.cidr.version in ranges and path.node in nodes
    )


def without_path(own: str, nodes: Mapping[str, Node], plan: Plan) -> tuple[str, ...]:
    """The other nodes to whose Pods there is no path at all."""
    return tuple(sorted(nodes.keys() - {path.node for path in plan.paths} - {own}))


def _known(node: Node) -> frozenset[IPAddress]:
    return frozenset(
        (*node.internal_ips, *node.external_ips, *(cidr.network_address for cidr in node.pod_cidrs))
    )


def told(trial: Trial, seen: Seen) -> dict[str, Any]:
    """The outcome of one trial, plain data; `reason` says why it is not ok."""
    reason = _reason(trial, seen)
    return {
        "node": trial.node,
        "family": trial.family,
        "cidr": str(trial.cidr),
        "way": trial.way,
        "ok": not reason,
        "reason": reason,
        "ms": round(min(seen.took_ms.values()), 3) if seen.took_ms else None,
        "bytes": max(seen.took_ms, default=None),
        "by": seen.device,
    }


def _reason(trial: Trial, seen: Seen) -> str:
    if seen.took_ms and (seen.device == VXLAN_DEVICE) is not (trial.way == "vxlan"):
        return f"the path is {trial.way}, but the answer came by {seen.device}"
    if max(sizes(trial)) in seen.took_ms:
        return ""
    if not seen.took_ms:
        return seen.objection or f"no answer from {trial.destination} within {LIMIT_S:g} s ({trial.way})"
    fits = f": {seen.fits} bytes do" if seen.fits else ""
    return (
        f"small packets pass, those of {trial.mtu} bytes, the Pods' MTU, do not{fits}; set mtu to what the "
        "network between the nodes carries"
    )


def sizes(trial: Trial) -> tuple[int, ...]:
    """The packets' sizes in bytes: as small as can be, and as large as Pods send them."""
    small = echo.HEADERS[trial.family] + echo.TOKEN
    return (small, trial.mtu) if trial.mtu > small else (small,)


# Sending and receiving


async def tried(asked: Sequence[Trial]) -> list[Seen]:
    """Send the packets of each trial and see what comes back, all at the same time. Raises OSError."""
    with ExitStack() as stack:
        exchange = _Exchange(asked, stack)
        for at in SEND_AT_S:
            await exchange.wait_until(at)
            if exchange.done:
                break
            exchange.send(large_ones_alone=not at)
        await exchange.wait_until(LIMIT_S)
    return exchange.seen


class _Exchange:
    """The packets under way; a packet's sequence number is its place in `_packets`."""

    def __init__(self, asked: Sequence[Trial], stack: ExitStack) -> None:
        self.seen = [Seen() for _ in asked]
        self._asked = asked
        self._packets = [(index, size) for index, trial in enumerate(asked) for size in sizes(trial)]
        self._identifier = secrets.randbelow(1 << 16)
        self._token = secrets.token_bytes(echo.TOKEN)
        self._sent: dict[int, float] = {}
        self._begun = time.monotonic()
        self._heard = asyncio.Event()
        families = sorted({trial.family for trial in asked})
        self._out = {family: stack.enter_context(_sender(family)) for family in families}
        loop = asyncio.get_running_loop()
        for family in families:
            listening = stack.enter_context(_listener(family))
            loop.add_reader(listening, self._readable, listening)
            stack.callback(loop.remove_reader, listening)

    @property
    def done(self) -> bool:
        """Whether the large packet of every trial has been answered."""
        return all(max(sizes(of)) in seen.took_ms for of, seen in zip(self._asked, self.seen, strict=True))

    async def wait_until(self, seconds: float) -> None:
        """Return so long after the begin, or as soon as all is answered."""
        while not self.done and (left := self._begun + seconds - time.monotonic()) > 0:
            self._heard.clear()
            try:
                await asyncio.wait_for(self._heard.wait(), left)
            except TimeoutError:
                return

    def send(self, *, large_ones_alone: bool) -> None:
        """Send what has not been answered, again if need be."""
        for sequence, (index, size) in enumerate(self._packets):
            trial, seen = self._asked[index], self.seen[index]
            largest = max(sizes(trial))
            if size in seen.took_ms or largest in seen.took_ms or (large_ones_alone and size != largest):
                continue
            packet = echo.request(
                trial.source,
                trial.destination,
                identifier=self._identifier,
                sequence=sequence,
                token=self._token,
                size=size,
            )
            self._sent[sequence] = time.monotonic()
            try:
                self._out[trial.family].sendto(packet, (str(trial.destination), 0))
            except OSError as error:
                self._refused(trial, seen, error)

    def _refused(self, trial: Trial, seen: Seen, error: OSError) -> None:
        if error.errno == errno.EMSGSIZE:
            return  # this node's own link is too small for it: told as a size that does not pass
        seen.objection = f"this node cannot send to {trial.destination}: {error.strerror}"

    def _readable(self, listening: socket.socket) -> None:
        """Read what is there, but not without end: others of the loop come between."""
        for _ in range(100):
            try:
                data, origin = listening.recvfrom(_READ)
            except BlockingIOError:
                return
            if origin[2] != _PACKET_OUTGOING:
                self._take(data, str(origin[0]))

    def _take(self, data: bytes, device: str) -> None:
        found = echo.answer(data, self._identifier, self._token)
        if found is None or found.sequence >= len(self._packets):
            return
        index, size = self._packets[found.sequence]
        trial, seen = self._asked[index], self.seen[index]
        if found.destination != trial.destination:
            return
        if found.word == "too big":
            seen.fits = found.mtu
        elif found.sender not in trial.known:
            seen.objection = f"{found.sender} says that {trial.destination} cannot be reached ({trial.way})"
        else:
            seen.device = device
            seen.took_ms[size] = (time.monotonic() - self._sent[found.sequence]) * 1e3
            self._heard.set()


def _sender(family: Family) -> socket.socket:
    """A raw socket whose packets bring their own IP header, and so any source address."""
    made = socket.socket(_FAMILIES[family], socket.SOCK_RAW, socket.IPPROTO_RAW)
    made.setblocking(False)
    if family == 6:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
    return made


def _listener(family: Family) -> socket.socket:
    """A packet socket that sees ICMP's answers and errors of this family come in, by any link."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETHERTYPES[family]))
    try:
        made.setblocking(False)
        _attach(made, _filter(family))
    except BaseException:
        made.close()
        raise
    return made


def _filter(family: Family) -> tuple[tuple[int, int, int, int], ...]:
    """Classic BPF (linux/filter.h): only ICMP, so that a busy link wakes nobody."""
    load_byte, equal, give = 0x30, 0x15, 0x06
    offset, protocol = (9, 1) if family == 4 else (6, 58)
    return ((load_byte, 0, 0, offset), (equal, 0, 1, protocol), (give, 0, 0, _READ), (give, 0, 0, 0))


def _attach(to: socket.socket, code: Iterable[tuple[int, int, int, int]]) -> None:
    instructions = [struct.pack("=HBBI", *each) for each in code]
    buffer = ctypes.create_string_buffer(b"".join(instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    to.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
