"""Netfilter's netlink in bytes: messages to and from one of its subsystems, and the socket they go through.

    [header][family, version, resource][attributes]

Attributes are those of rtnetlink, numbers in them are in network order. Layouts: linux/netlink.h,
linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from agent.pods.rtnetlink import attribute

CTNETLINK, ULOG, NFTABLES = 1, 4, 10
"""Subsystems: connection tracking, packets logged to a group, rules."""

GET_TABLE, GET_CHAIN = 1, 4
TABLE_NAME, CHAIN_TABLE, CHAIN_NAME = 1, 1, 3
"""How nf_tables is asked for a table or chain, and the attributes that name it."""

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
ERROR, DONE = 2, 3

MESSAGE = struct.Struct("=IHHIIBBH")
"""Length, type, flags, sequence and port of netlink; family, version and resource of netfilter."""

_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_SO_RCVBUFFORCE = 33
_OBJECT = 1 << 14  # bytes that one table or chain takes at most, without its content
_NETLINK_NETFILTER = 12
_HEADER = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")


class Received(NamedTuple):
    """One message: `body` is what follows the netlink header."""

    kind: int
    flags: int
    sequence: int
    body: bytes


def connect(receive_bytes: int = 0) -> socket.socket:
    """Open a socket to netfilter in the calling thread's network namespace; the buffer's size if not 0.

    A buffer beyond net.core.rmem_max needs CAP_NET_ADMIN in the first user namespace; without it the
    largest allowed is taken. Raises OSError.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    for option in (_CAP_ACK, _EXT_ACK):
        sock.setsockopt(_SOL_NETLINK, option, 1)
    if receive_bytes:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.bind((0, 0))
    return sock


def message(
    subsystem: int,
    kind: int,
    content: bytes,
    *,
    sequence: int,
    flags: int = 0,
    family: int = 0,
    resource: int = 0,
) -> bytes:
    """Build one request with its attributes; `resource` is for instance the group of a log."""
    size = MESSAGE.size + len(content)
    resource = socket.htons(resource)
    kind |= subsystem << 8
    return MESSAGE.pack(size, kind, flags | REQUEST, sequence, 0, family, 0, resource) + content


def messages(data: bytes) -> Iterator[Received]:
    """Split what one receive returned; a message that claims more than there is ends it."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        size, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if size < _HEADER.size or offset + size > len(data):
            return
        yield Received(kind, flags, sequence, data[offset + _HEADER.size : offset + size])
        offset += (size + 3) & ~3


def error_of(received: Received) -> OSError | None:
    """What an error message says; None for an acknowledgement."""
    code = -int(_ERROR.unpack_from(received.body)[0]) if len(received.body) >= _ERROR.size else 0
    return OSError(code, os.strerror(code)) if code else None


def has(sock: socket.socket, kind: int, family: int, names: Mapping[int, bytes]) -> bool:
    """Whether nf_tables has the object of these names: GET_TABLE or GET_CHAIN. Raises OSError."""
    content = b"".join(attribute(number, name + b"\0") for number, name in names.items())
    sock.send(message(NFTABLES, kind, content, sequence=1, family=family))
    for received in messages(sock.recv(_OBJECT)):
        if received.kind != ERROR:
            return True
        error = error_of(received)
        if error and error.errno != errno.ENOENT:
            raise error
    return False
