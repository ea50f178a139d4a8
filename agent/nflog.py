"""Packets that the rules log to a netlink group (NFLOG), read without waiting.

    rule: log group 9619 prefix "..."  -->  kernel: collects up to 32 packets or 100 ms  -->  one datagram

Each packet has a number, so a gap says exactly how many the kernel had to drop because nobody read in time.
Layouts: linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from agent import nfnetlink
from agent.pods.rtnetlink import attribute, attributes

COPIED_BYTES = 128
"""So much of a packet is asked for: IPv6, some extension headers and TCP's or UDP's own."""

RECEIVE_BYTES = 1 << 18
"""Of the socket's buffer: some 2,000 packets, a second's work; more would only make what is read older."""

_PACKET, _CONFIG = 0, 1
_CFG_COMMAND, _CFG_MODE, _CFG_TIMEOUT, _CFG_THRESHOLD, _CFG_FLAGS = 1, 2, 4, 5, 6
_BIND = b"\x01"
_COPY_PACKET = 2
_NUMBERED = 1
_TIMEOUT, _THRESHOLD = 10, 32  # hundredths of a second; packets
_TIMESTAMP, _IN, _OUT, _PAYLOAD, _PREFIX, _SEQUENCE = 3, 4, 5, 9, 10, 12
_MOST = 1 << 17  # bytes of one datagram
_NFGENMSG = 4


class NflogError(Exception):
    """The group cannot be read."""


class Logged(NamedTuple):
    """One packet: indexes of its links (0: none), seconds since the epoch (0: not noted), first bytes."""

    prefix: str
    in_link: int
    out_link: int
    time: float
    data: bytes


class Nflog:
    """One group of the network namespace it was made in; `lost` counts packets that could not be kept."""

    def __init__(self, group: int, receive_bytes: int = RECEIVE_BYTES) -> None:
        """Raises NflogError."""
        self.group = group
        self.lost = 0
        self.overruns = 0
        self._next: int | None = None
        try:
            self._socket = nfnetlink.connect(receive_bytes)
        except OSError as error:
            raise NflogError(f"cannot open a socket to the kernel's netfilter: {error}") from error
        try:
            self._bind()
        except OSError as error:
            self._socket.close()
            taken = error.errno in (errno.EBUSY, errno.EPERM)
            hint = "; another program reads it" if taken else ""
            raise NflogError(f"cannot read NFLOG group {group}: {error}{hint}") from error
        self._socket.setblocking(False)

    def close(self) -> None:
        """Give the group back."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor, to wait for packets."""
        return self._socket.fileno()

    def read(self) -> list[Logged] | None:
        """The packets of one datagram (none of them if the kernel had to drop some); None: no more now."""
        try:
            data = self._socket.recv(_MOST)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise NflogError(f"cannot read NFLOG group {self.group}: {error}") from error
            self.overruns += 1
            return []
        kind = nfnetlink.ULOG << 8 | _PACKET
        bodies = (received.body for received in nfnetlink.messages(data) if received.kind == kind)
        return [self._packet(body) for body in bodies]

    def _packet(self, body: bytes) -> Logged:
        values = attributes(body, _NFGENMSG)
        self._count(values.get(_SEQUENCE, b""))
        return packet(values)

    def _count(self, sequence: bytes) -> None:
        if len(sequence) != 4:
            return
        number = int.from_bytes(sequence, "big")
        if self._next is not None:
            self.lost += (number - self._next) & 0xFFFFFFFF
        self._next = (number + 1) & 0xFFFFFFFF

    def _bind(self) -> None:
        self._configure(attribute(_CFG_COMMAND, _BIND))
        self._configure(
            attribute(_CFG_MODE, struct.pack("!IBx", COPIED_BYTES, _COPY_PACKET))
            + attribute(_CFG_TIMEOUT, struct.pack("!I", _TIMEOUT))
            + attribute(_CFG_THRESHOLD, struct.pack("!I", _THRESHOLD))
            + attribute(_CFG_FLAGS, struct.pack("!H", _NUMBERED))
        )

    def _configure(self, settings: bytes) -> None:
        """Set what the kernel does with the group; packets may come before its answer and are dropped."""
        request = nfnetlink.message(
            nfnetlink.ULOG,
            _CONFIG,
            settings,
            sequence=1,
            flags=nfnetlink.ACK,
            family=socket.AF_UNSPEC,
            resource=self.group,
        )
        self._socket.send(request)
        while True:
            for received in nfnetlink.messages(self._socket.recv(_MOST)):
                if received.kind != nfnetlink.ERROR:
                    continue
                if error := nfnetlink.error_of(received):
                    raise error
                return


def packet(values: dict[int, bytes]) -> Logged:
    """What the attributes of a logged packet say; whatever is missing or too short counts as not there."""
    stamp = values.get(_TIMESTAMP, b"")
    seconds, microseconds = struct.unpack("!QQ", stamp) if len(stamp) == 16 else (0, 0)
    return Logged(
        prefix=values.get(_PREFIX, b"").partition(b"\0")[0].decode(errors="replace"),
        in_link=int.from_bytes(values.get(_IN, b"")[:4], "big"),
        out_link=int.from_bytes(values.get(_OUT, b"")[:4], "big"),
        time=seconds + microseconds / 1e6,
        data=values.get(_PAYLOAD, b""),
    )
