"""Which flows the kernel knows, which of them must end, and ending exactly those.

A flow is an entry of connection tracking. It holds two tuples, and the real endpoints are one of each:

    original   10.244.1.7:41000 -> 10.96.0.10:80       (what the first packet said: a Service's address)
    reply      10.244.2.9:8080  -> 10.244.1.7:41000    (who answers)
    source = 10.244.1.7:41000, before masquerade       destination = 10.244.2.9:8080, after DNAT

Rules accept packets of established flows first, so a flow outlives the rule that let it in. Ending a flow
deletes its entry; what its next packet meets then:

    TCP     not a SYN and no entry: for an isolated Pod the rules drop it, from either side: cut
    others  judged by the rules like a first packet: dropped if they no longer allow it

A packet that the old rules let through may still be on its way into the table, so `end_denied` waits a moment
before it lists.

An entry is deleted by its reply tuple together with the kernel's id. The id is a hash of the original tuple
and of the entry's place in memory, so the three together mean this entry, or one in the same place with the
same addresses, ports and translation: the verdict on that one is the same. Any other successor stays.

Listed whole and picked in Python: the kernel's search by address (CTA_FILTER) finds the IPv6 entries that do
not match (seen on 6.18). Decoded here rather than by pyroute2's NFCTSocket: of 50,000 entries, CPU time

    the kernel's part             75 ms
    100 flows of some Pods       110 ms
    all as Flow                  500 ms      (NFCTSocket: 4,100 ms)
    ending all of them           120 ms

Layouts: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeVar, cast

from msgspec import Struct

from agent import nfnetlink
from agent.cluster.model import IPAddress
from agent.nft.model import CtStatus, Proto
from agent.pods.rtnetlink import attribute, attributes

T = TypeVar("T")

GRACE_S = 0.05
"""How long a packet may take from the rules to the table; it is microseconds where no CPU is overloaded."""


class Endpoint(NamedTuple):
    """One end of a flow; port 0 where the protocol has none."""

    address: IPAddress
    port: int


class Ends(NamedTuple):
    """One direction's tuple: from whom to whom."""

    source: Endpoint
    destination: Endpoint


class Icmp(NamedTuple):
    """What stands in place of ports for ICMP: of the packet that began the flow."""

    type: int
    code: int
    id: int


class Flow(Struct, frozen=True, kw_only=True, gc=False):
    """An entry of connection tracking; `protocol` is IP's number, `key` what the kernel finds it by."""

    protocol: int
    original: Ends
    reply: Ends
    status: CtStatus
    icmp: Icmp | None = None
    mark: int = 0
    zone: int = 0
    id: int = 0
    key: bytes = b""
    protocol_info: bytes = b""

    @property
    def closed(self) -> bool:
        """Whether it is a TCP connection that is over: both ends closed it, or one reset it."""
        if self.protocol != Proto.TCP:
            return False
        state = attributes(attributes(self.protocol_info).get(_INFO_TCP, b"")).get(_INFO_TCP_STATE, b"")
        return _number(state) in _CLOSED

    @property
    def source(self) -> Endpoint:
        """Who began it, before masquerade."""
        return self.original.source

    @property
    def destination(self) -> Endpoint:
        """Who it leads to, behind a Service's address."""
        return self.reply.source


class Ended(NamedTuple):
    """How many flows were ended, and how many had gone by themselves."""

    ended: int = 0
    gone: int = 0


class ConntrackError(Exception):
    """The kernel refused to list or to end flows."""


def to_end(flows: Iterable[Flow], allowed: Callable[[Flow], bool]) -> tuple[Flow, ...]:
    """The flows that may not go on."""
    return tuple(flow for flow in flows if not allowed(flow))


# For the event loop: each opens a socket in the caller's network namespace and works in a thread


async def list_flows(
    addresses: Set[IPAddress] | None = None, protocols: Set[int] | None = None, *, unanswered: bool = False
) -> tuple[Flow, ...]:
    """List the flows that begin at or lead to one of these addresses, of these protocols, or (None) all.

    `unanswered`: only those that nobody has answered yet; the kernel picks them. Raises ConntrackError.
    """
    return await _in_thread(lambda conntrack: conntrack.flows(addresses, protocols, unanswered=unanswered))


async def end_flows(flows: Sequence[Flow]) -> Ended:
    """End exactly these flows. Raises ConntrackError."""
    return await _in_thread(lambda conntrack: conntrack.end(flows))


async def end_denied(
    judge: Callable[[], Awaitable[Callable[[Flow], bool]]],
    addresses: Set[IPAddress] | None = None,
    grace_s: float = GRACE_S,
) -> Ended:
    """End the flows of these addresses (None: of all) that are not allowed, those just beginning included.

    To be called when the rules that deny them are in force. `judge` says what is allowed, as a function that
    is called in another thread; it is asked after the listing, so that a flow which newer rules let in is
    not judged by older ones. Raises ConntrackError.
    """
    await asyncio.sleep(grace_s)
    known = await list_flows(addresses)
    denied = await asyncio.to_thread(to_end, known, await judge())
    return await end_flows(denied) if denied else Ended()


async def _in_thread(work: Callable[[Conntrack], T]) -> T:
    conntrack = Conntrack()
    begun = threading.Lock()

    def close_after() -> T | None:
        if not begun.acquire(blocking=False):
            return None  # the caller is gone and has closed it
        with conntrack:  # closed by its own thread, which goes on when the caller is cancelled
            return work(conntrack)

    try:
        return cast("T", await asyncio.to_thread(close_after))
    except asyncio.CancelledError:
        if begun.acquire(blocking=False):
            conntrack.close()
        raise


# The socket

_GET, _DELETE = 1, 2
_RECEIVE = 1 << 16
_BATCH = 256  # requests in one send; each may be answered by an error of 36 bytes

_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _MARK, _ID, _ZONE = 1, 2, 3, 8, 12, 18
_STATUS_MASK = 26
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTOCOL_INFO, _INFO_TCP, _INFO_TCP_STATE = 4, 1, 1
_CLOSED = frozenset({6, 7, 8})  # LAST_ACK, TIME_WAIT, CLOSE: linux/netfilter/nf_conntrack_tcp.h
_UNANSWERED = attribute(_STATUS, struct.pack("!I", 0)) + attribute(
    _STATUS_MASK, struct.pack("!I", CtStatus.SEEN_REPLY)
)
_FAMILY: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_IP_SOURCE = {4: 1, 6: 3}
_IP_DESTINATION = {4: 2, 6: 4}


class Conntrack:
    """The flows of the network namespace it was made in; for one thread at a time."""

    def __init__(self) -> None:
        """Raises ConntrackError."""
        try:
            self._socket = nfnetlink.connect()
        except OSError as error:
            raise ConntrackError(f"cannot open a socket to the kernel's netfilter: {error}") from error
        self._sequence = 0

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def __enter__(self) -> Conntrack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flows(
        self,
        addresses: Set[IPAddress] | None = None,
        protocols: Set[int] | None = None,
        *,
        unanswered: bool = False,
    ) -> tuple[Flow, ...]:
        """List the flows that begin at or lead to one of these addresses, of these protocols, or (None) all.

        `unanswered`: only those that nobody has answered yet. Raises ConntrackError.
        """
        wanted = None if addresses is None else frozenset(address.packed for address in addresses)
        found: dict[tuple[int, bytes], Flow] = {}  # the kernel may list a flow twice while its table changes
        for entry in self._entries(_UNANSWERED if unanswered else b""):
            if flow := decode(entry, wanted, protocols):
                found[flow.id, flow.key] = flow
        return tuple(found.values())

    def end(self, flows: Sequence[Flow]) -> Ended:
        """End exactly these flows; one that has gone already is no error. Raises ConntrackError."""
        gone = sum(self._delete(flows[i : i + _BATCH]) for i in range(0, len(flows), _BATCH))
        return Ended(len(flows) - gone, gone)

    def _entries(self, chosen: bytes) -> Iterator[bytes]:
        self._sequence += 1
        try:
            self._socket.send(
                nfnetlink.message(
                    nfnetlink.CTNETLINK, _GET, chosen, sequence=self._sequence, flags=nfnetlink.DUMP
                )
            )
            while True:
                for received in nfnetlink.messages(self._socket.recv(_RECEIVE)):
                    if received.sequence != self._sequence:
                        continue
                    if received.kind == nfnetlink.DONE:
                        return
                    if received.kind == nfnetlink.ERROR:
                        raise nfnetlink.error_of(received) or OSError(errno.EIO, "no listing")
                    yield received.body
        except OSError as error:
            raise ConntrackError(f"cannot list the kernel's connection tracking: {error}") from error

    def _delete(self, flows: Sequence[Flow]) -> int:
        """Delete a batch and return how many had gone. Only errors and the last request are answered."""
        last = self._sequence + len(flows)
        requests = [
            _deletion(flow, self._sequence + i, nfnetlink.ACK if self._sequence + i == last else 0)
            for i, flow in enumerate(flows, 1)
        ]
        first, self._sequence = self._sequence + 1, last
        gone = 0
        refusal: OSError | None = None
        try:
            self._socket.send(b"".join(requests))
            answered = not flows
            while not answered:
                for received in nfnetlink.messages(self._socket.recv(_RECEIVE)):
                    if received.kind != nfnetlink.ERROR or not first <= received.sequence <= last:
                        continue
                    answered = received.sequence == last
                    error = nfnetlink.error_of(received)
                    if error and error.errno == errno.ENOENT:
                        gone += 1
                    else:
                        refusal = refusal or error
        except OSError as error:
            refusal = error
        if refusal:
            raise ConntrackError(
                f"cannot end flows in the kernel's connection tracking: {refusal}"
            ) from refusal
        return gone


def _deletion(flow: Flow, sequence: int, flags: int) -> bytes:
    if not flow.key:  # without a tuple the kernel would take it for a request to delete every flow
        raise ValueError(f"a flow that did not come from the kernel cannot be ended: {flow}")
    content = attribute(_TUPLE_REPLY | 0x8000, flow.key) + attribute(_ID, struct.pack("!I", flow.id))
    if flow.zone:
        content += attribute(_ZONE, struct.pack("!H", flow.zone))
    family = _FAMILY[flow.source.address.version]
    return nfnetlink.message(
        nfnetlink.CTNETLINK, _DELETE, content, sequence=sequence, flags=flags, family=family
    )


# Decoding: an entry begins with its two tuples. Nearly all are of addresses and ports and always look the
# same, so they are read at fixed places when all the attributes' headers are as expected.

_ATTRIBUTE = struct.Struct("=HH")
_NFGENMSG = 4


class _Tuple(NamedTuple):
    protocol: int
    source: bytes
    sport: int
    destination: bytes
    dport: int
    icmp: Icmp | None


class _Shape:
    """Where an entry with ports of one family holds what."""

    def __init__(self, version: int) -> None:
        size = {4: 4, 6: 16}[version]
        layout = f"{{}}s{size}s4s{size}s8sB3x4sH2x4sH2x"
        length = 36 + 2 * (size + 4)
        self.both = struct.Struct(">" + layout.format(12) + layout.format(12))
        self.end = _NFGENMSG + 2 * length
        self.key = slice(_NFGENMSG + length + 4, self.end)
        # the values at these places of the unpacked, in either tuple, are headers
        inside = (
            _ATTRIBUTE.pack(4 + size, _IP_DESTINATION[version]),
            _ATTRIBUTE.pack(28, _TUPLE_PROTO | 0x8000) + _ATTRIBUTE.pack(5, 1),
            _ATTRIBUTE.pack(6, 2),
            _ATTRIBUTE.pack(6, 3),
        )
        begins = tuple(
            _ATTRIBUTE.pack(length, direction | 0x8000)
            + _ATTRIBUTE.pack(4 + 2 * (4 + size), _TUPLE_IP | 0x8000)
            + _ATTRIBUTE.pack(4 + size, _IP_SOURCE[version])
            for direction in (_TUPLE_ORIG, _TUPLE_REPLY)
        )
        self.headers = (begins[0], *inside, begins[1], *inside)


_SHAPES = {_FAMILY[version]: _Shape(version) for version in (4, 6)}


def decode(entry: bytes, wanted: Set[bytes] | None = None, protocols: Set[int] | None = None) -> Flow | None:
    """Read an entry of a listing; None when it is not wanted or makes no sense.

    Wanted are those with one of these addresses at a real end, and of these protocols; None: all.
    """
    if not entry:
        return None
    shape = _SHAPES.get(entry[0])
    if shape and len(entry) >= shape.end:
        # headers h.., source, destination, protocol, ports of both tuples
        h0, s, h1, d, h2, protocol, h3, sp, h4, dp, h5, rs, h6, rd, h7, _, h8, rsp, h9, rdp = (
            shape.both.unpack_from(entry, _NFGENMSG)
        )
        if (h0, h1, h2, h3, h4, h5, h6, h7, h8, h9) == shape.headers:
            if wanted is not None and s not in wanted and rs not in wanted:
                return None
            if protocols is not None and protocol not in protocols:
                return None
            original = Ends(Endpoint(_address(s), sp), Endpoint(_address(d), dp))
            reply = Ends(Endpoint(_address(rs), rsp), Endpoint(_address(rd), rdp))
            return _flow(protocol, (original, reply), None, entry[shape.key], attributes(entry, shape.end))
    with suppress(KeyError, ValueError, struct.error, IndexError):
        return _decode_any(entry, wanted, protocols)
    return None


def _decode_any(entry: bytes, wanted: Set[bytes] | None, protocols: Set[int] | None) -> Flow | None:
    values = attributes(entry, _NFGENMSG)
    original, reply = _tuple(values[_TUPLE_ORIG]), _tuple(values[_TUPLE_REPLY])
    if wanted is not None and original.source not in wanted and reply.source not in wanted:
        return None
    if protocols is not None and original.protocol not in protocols:
        return None
    both = (_ends(original), _ends(reply))
    return _flow(original.protocol, both, original.icmp, values[_TUPLE_REPLY], values)


def _tuple(data: bytes) -> _Tuple:
    parts = attributes(data)
    ends, protocol = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTO])
    version = 4 if 1 in ends else 6
    number = protocol[1][0]
    first = {socket.IPPROTO_ICMP: 4, socket.IPPROTO_ICMPV6: 7}.get(number)
    icmp = None
    if first is not None:
        icmp = Icmp(protocol[first + 1][0], protocol[first + 2][0], _number(protocol[first]))
    return _Tuple(
        number,
        ends[_IP_SOURCE[version]],
        _number(protocol.get(2)),
        ends[_IP_DESTINATION[version]],
        _number(protocol.get(3)),
        icmp,
    )


def _ends(of: _Tuple) -> Ends:
    return Ends(
        Endpoint(_address(of.source), of.sport),
        Endpoint(_address(of.destination), of.dport),
    )


def _flow(
    protocol: int, both: tuple[Ends, Ends], icmp: Icmp | None, key: bytes, values: dict[int, bytes]
) -> Flow:
    return Flow(
        protocol=protocol,
        original=both[0],
        reply=both[1],
        status=_status(_number(values.get(_STATUS))),
        icmp=icmp,
        mark=_number(values.get(_MARK)),
        zone=_number(values.get(_ZONE)),
        id=_number(values.get(_ID)),
        key=key,
        protocol_info=values.get(_PROTOCOL_INFO, b""),
    )


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "big")


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> IPAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


_status = lru_cache(maxsize=1024)(CtStatus)
