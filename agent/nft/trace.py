"""The kernel's own account of a packet: which rules it met, one by one (nftables' nftrace).

    a table of its own, in front of everything     prerouting [-500], output [-500]:
        protocol, addresses and ports fit    quota until 20,000 bytes    meta nftrace set 1
    the kernel, for each rule that a marked packet meets --group 9--> a message

The table is there only while somebody looks, and cannot be left behind: it is owned by the netlink socket
that made it (NFT_TABLE_F_OWNER, Linux 5.12), so the kernel removes it with the socket, whatever ends the
process. Should the process live on and forget it, the quota ends the tracing by itself. It marks packets and
decides nothing; nobody else can change it; it is in no transaction of podwall's other tables.

Layouts: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agent import headers, nfnetlink
from agent.cluster.model import IPAddress
from agent.nft.handles import text
from agent.pods.rtnetlink import attribute, attributes, nest

PREFIX = "podwall_trace_"
QUOTA_BYTES = 20_000  # some hundred first packets
RECEIVE_BYTES = 1 << 20

_BATCH_BEGIN, _BATCH_END = 16, 17
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE, _TRACE = 0, 3, 6, 17
_CREATE, _APPEND = 0x400, 0x800
_INET = 1
_GROUP = 9
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_RECEIVE = 1 << 16

_TABLE_NAME, _TABLE_FLAGS, _OWNER = 1, 2, 2
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_PREROUTING, _OUTPUT = 0, 3
_PRIORITY = -500  # before all others: connection tracking is at -200, defragmentation at -400
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_ELEMENT, _NAME, _DATA = 1, 1, 2
_REGISTER = 1

_PAYLOAD_NETWORK, _PAYLOAD_TRANSPORT = 1, 2
_TCP_FLAGS, _SYN, _ACK = 13, 0x02, 0x10  # where they are in the header
_META_NFPROTO, _META_L4PROTO, _META_NFTRACE = 15, 16, 12
_FAMILIES = {4: 2, 6: 10}
_ADDRESSES = {4: (12, 16), 6: (8, 24)}  # where source and destination are in the header
_FAMILY_NAMES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_VERDICTS = {0: "drop", 1: "accept", 2: "stolen", 3: "queue", -1: "continue", -2: "break"}
_VERDICTS |= {-3: "jump", -4: "goto", -5: "return"}
_TYPES = {1: "policy", 2: "return", 3: "rule"}


class TraceError(Exception):
    """Packets cannot be traced here; the message says why."""


class Match(NamedTuple):
    """Which packets; None: any. The family is the addresses'; of TCP only what opens a connection."""

    protocol: int
    source: IPAddress | None = None
    sport: int | None = None
    destination: IPAddress | None = None
    dport: int | None = None


class Step(NamedTuple):
    """One message: at which rule (handle 0: none) of which chain, and what became of the packet there.

    kind: rule, policy or return (a chain's end). verdict: with the chain of a jump. packet: its headers, in
    the first message of each base chain. links are indexes, 0: none.
    """

    id: int
    family: str
    table: str
    chain: str
    handle: int
    kind: str
    verdict: str
    target: str
    in_link: int
    out_link: int
    packet: headers.Headers | None


class Trace:
    """Marks packets and hears of them until closed, in the network namespace it was made in."""

    def __init__(self, name: str, matches: Sequence[Match]) -> None:
        """Raises TraceError."""
        self.lost = False
        self.table = PREFIX + name
        opened: list[socket.socket] = []
        try:
            opened.extend(nfnetlink.connect(RECEIVE_BYTES) for _ in range(2))
            self._heard, self._owner = opened
            self._heard.setblocking(False)
            self._heard.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, struct.pack("=I", _GROUP))
            self._mark(matches)
        except OSError as error:
            for each in opened:
                each.close()
            raise TraceError(
                f"this kernel cannot trace packets: {error.strerror or error} "
                "(it takes nf_tables with nftrace and tables with an owner, Linux 5.12)"
            ) from error

    def close(self) -> None:
        """Mark no more: the table goes with its socket."""
        self._owner.close()
        self._heard.close()

    def read(self) -> list[Step]:
        """What was told since, in order; `lost` when the kernel had to drop some."""
        found: list[Step] = []
        while True:
            try:
                data = self._heard.recv(_RECEIVE)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost = True
                continue
            kind = nfnetlink.NFTABLES << 8 | _TRACE
            found += (step(each.body) for each in nfnetlink.messages(data) if each.kind == kind)

    def _mark(self, matches: Sequence[Match]) -> None:
        """Make the table, all of it or nothing. Raises OSError."""
        requests = list(_requests(self.table, matches))
        self._owner.send(b"".join((_edge(_BATCH_BEGIN), *requests, _edge(_BATCH_END))))
        self._owner.settimeout(5.0)
        acknowledged = 0
        while acknowledged < len(requests):
            for each in nfnetlink.messages(self._owner.recv(_RECEIVE)):
                if error := nfnetlink.error_of(each):
                    raise error
                acknowledged += 1


def _edge(kind: int) -> bytes:
    return nfnetlink.message(0, kind, b"", sequence=0, resource=nfnetlink.NFTABLES)


def _requests(table: str, matches: Sequence[Match]) -> Iterator[bytes]:
    def request(kind: int, *content: bytes, flags: int = 0) -> bytes:
        whole = b"".join(content)
        flags |= _CREATE | nfnetlink.ACK
        return nfnetlink.message(
            nfnetlink.NFTABLES, kind, whole, sequence=kind + 1, flags=flags, family=_INET
        )

    name = table.encode() + b"\0"
    yield request(_NEW_TABLE, attribute(_TABLE_NAME, name), attribute(_TABLE_FLAGS, _number(_OWNER)))
    for chain, hook in ((b"prerouting\0", _PREROUTING), (b"output\0", _OUTPUT)):
        where = nest(
            _CHAIN_HOOK,
            attribute(_HOOK_NUMBER, _number(hook)),
            attribute(_HOOK_PRIORITY, struct.pack(">i", _PRIORITY)),
        )
        base = (attribute(_CHAIN_TABLE, name), attribute(_CHAIN_NAME, chain), where)
        yield request(_NEW_CHAIN, *base, attribute(_CHAIN_TYPE, b"filter\0"))
        for match in matches:
            expressions = nest(_RULE_EXPRESSIONS, *_expressions(match))
            place = (attribute(_RULE_TABLE, name), attribute(_RULE_CHAIN, chain))
            yield request(_NEW_RULE, *place, expressions, flags=_APPEND)


def _expressions(match: Match) -> Iterator[bytes]:
    """nft: meta nfproto, meta l4proto, ip saddr, ip daddr, th sport, th dport, quota, meta nftrace set 1;
    of TCP also tcp flags & (syn | ack) == syn."""
    address = match.source or match.destination
    version = address.version if address is not None else 4
    yield from _meta_is(_META_NFPROTO, bytes((_FAMILIES[version],)))
    yield from _meta_is(_META_L4PROTO, bytes((match.protocol,)))
    for end, offset in zip((match.source, match.destination), _ADDRESSES[version], strict=True):
        if end is not None:
            yield from _payload_is(_PAYLOAD_NETWORK, offset, end.packed)
    for port, offset in ((match.sport, 0), (match.dport, 2)):
        if port is not None:
            yield from _payload_is(_PAYLOAD_TRANSPORT, offset, struct.pack(">H", port))
    if match.protocol == socket.IPPROTO_TCP:
        yield from _opens_a_connection()
    yield _expression("quota", attribute(1, struct.pack(">Q", QUOTA_BYTES)), attribute(2, _number(0)))
    one = nest(2, attribute(1, b"\1"))
    yield _expression("immediate", attribute(1, _number(_REGISTER)), one)
    yield _expression("meta", attribute(2, _number(_META_NFTRACE)), attribute(3, _number(_REGISTER)))


def _meta_is(key: int, value: bytes) -> Iterator[bytes]:
    yield _expression("meta", attribute(2, _number(key)), attribute(1, _number(_REGISTER)))
    yield _is(value)


def _payload_is(base: int, offset: int, value: bytes) -> Iterator[bytes]:
    parts = (_REGISTER, base, offset, len(value))
    yield _expression("payload", *(attribute(number, _number(of)) for number, of in enumerate(parts, 1)))
    yield _is(value)


def _opens_a_connection() -> Iterator[bytes]:
    parts = (_REGISTER, _PAYLOAD_TRANSPORT, _TCP_FLAGS, 1)
    yield _expression("payload", *(attribute(number, _number(of)) for number, of in enumerate(parts, 1)))
    mask, nothing = nest(4, attribute(1, bytes((_SYN | _ACK,)))), nest(5, attribute(1, b"\0"))
    registers = (attribute(1, _number(_REGISTER)), attribute(2, _number(_REGISTER)), attribute(3, _number(1)))
    yield _expression("bitwise", *registers, mask, nothing)
    yield _is(bytes((_SYN,)))


def _is(value: bytes) -> bytes:
    equal = attribute(2, _number(0))
    return _expression("cmp", attribute(1, _number(_REGISTER)), equal, nest(3, attribute(1, value)))


def _expression(name: str, *content: bytes) -> bytes:
    return nest(_ELEMENT, attribute(_NAME, name.encode() + b"\0"), nest(_DATA, *content))


def _number(value: int) -> bytes:
    return struct.pack(">I", value)


# Reading

_T_TABLE, _T_CHAIN, _T_HANDLE, _T_TYPE, _T_VERDICT, _T_ID = 1, 2, 3, 4, 5, 6
_T_NETWORK, _T_TRANSPORT, _T_IN, _T_OUT, _T_POLICY = 8, 9, 10, 12, 16


def step(body: bytes) -> Step:
    """What the kernel's message about a packet says."""
    values = attributes(body, 4)
    verdict = attributes(values.get(_T_VERDICT, b""))
    code = struct.unpack(">i", verdict[1])[0] if 1 in verdict else None
    policy = values.get(_T_POLICY)
    if policy is not None:
        code = int.from_bytes(policy, "big")
    network = values.get(_T_NETWORK, b"")
    return Step(
        id=int.from_bytes(values.get(_T_ID, b""), "big"),
        family=_FAMILY_NAMES.get(body[0], str(body[0])) if body else "",
        table=text(values.get(_T_TABLE, b"")),
        chain=text(values.get(_T_CHAIN, b"")),
        handle=int.from_bytes(values.get(_T_HANDLE, b""), "big"),
        kind=_TYPES.get(int.from_bytes(values.get(_T_TYPE, b""), "big"), ""),
        verdict="" if code is None else _VERDICTS.get(code, str(code)),
        target=text(verdict.get(2, b"")),
        in_link=int.from_bytes(values.get(_T_IN, b""), "big"),
        out_link=int.from_bytes(values.get(_T_OUT, b""), "big"),
        packet=headers.read(network + values.get(_T_TRANSPORT, b"")) if network else None,
    )
