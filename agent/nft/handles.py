"""The kernel's rules by their handles: whose they are by their comments, and how often each was met.

    (table, chain, handle) --> "shop/api/ingress[0]", 12 packets

libnftables lists rules with all that is in the sets; a rule's place, comment and counter alone come from the
kernel in a dump of some hundred bytes each. Layouts: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from agent import nfnetlink
from agent.nft.model import TableName
from agent.pods.rtnetlink import attribute, attributes

_GET_RULE = 7
_TABLE, _CHAIN, _HANDLE, _EXPRESSIONS, _USERDATA = 1, 2, 3, 4, 7
_NAME, _DATA = 1, 2
_COUNTED_PACKETS = 2
_COMMENT = 0
_FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
_NFGENMSG = 4
_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR: rules came or went meanwhile
_ATTEMPTS = 10
_RECEIVE = 1 << 16
_ATTRIBUTE = struct.Struct("=HH")


class KernelRule(NamedTuple):
    """One rule as the kernel has it; packets: what its counter says, None without one."""

    table: str
    chain: str
    handle: int
    comment: str
    packets: int | None


def rules(table: TableName) -> tuple[KernelRule, ...]:
    """The rules of a table of the caller's network namespace, none when there is no such table.

    Raises OSError.
    """
    with nfnetlink.connect() as sock:
        for _ in range(_ATTEMPTS):
            found = _listed(sock, table)
            if found is not None:
                return found
    raise OSError(errno.EBUSY, "the rules change too fast to be listed")


def _listed(sock: socket.socket, table: TableName) -> tuple[KernelRule, ...] | None:
    """All rules; None when others changed them meanwhile."""
    content = attribute(_TABLE, table.name.encode() + b"\0")
    family = _FAMILIES[table.family]
    sock.send(
        nfnetlink.message(
            nfnetlink.NFTABLES, _GET_RULE, content, sequence=1, flags=nfnetlink.DUMP, family=family
        )
    )
    found: list[KernelRule] = []
    torn = False
    while True:
        for received in nfnetlink.messages(sock.recv(_RECEIVE)):
            torn = torn or bool(received.flags & _INTERRUPTED)
            if received.kind == nfnetlink.DONE:
                return None if torn else tuple(found)
            if received.kind == nfnetlink.ERROR:
                error = nfnetlink.error_of(received)
                if error is None or error.errno == errno.ENOENT:
                    return ()
                raise error
            found.append(rule(received.body))


def rule(body: bytes) -> KernelRule:
    """What the kernel's message about a rule says."""
    values = attributes(body, _NFGENMSG)
    return KernelRule(
        text(values.get(_TABLE, b"")),
        text(values.get(_CHAIN, b"")),
        int.from_bytes(values.get(_HANDLE, b""), "big"),
        _comment(values.get(_USERDATA, b"")),
        _counted(values.get(_EXPRESSIONS, b"")),
    )


def text(value: bytes) -> str:
    """An attribute that is a name."""
    return value.rstrip(b"\0").decode(errors="replace")


def _comment(userdata: bytes) -> str:
    """nft's own notes to a rule: [kind, length, value], of which one kind is the comment."""
    while len(userdata) >= 2:
        kind, size = userdata[0], userdata[1]
        if kind == _COMMENT:
            return text(userdata[2 : 2 + size])
        userdata = userdata[2 + size :]
    return ""


def _counted(expressions: bytes) -> int | None:
    for each in _elements(expressions):
        parts = attributes(each)
        if text(parts.get(_NAME, b"")) == "counter":
            return int.from_bytes(attributes(parts.get(_DATA, b"")).get(_COUNTED_PACKETS, b""), "big")
    return None


def _elements(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        size, _ = _ATTRIBUTE.unpack_from(data, offset)
        if size < _ATTRIBUTE.size:
            return
        yield data[offset + _ATTRIBUTE.size : offset + size]
        offset += (size + 3) & ~3
