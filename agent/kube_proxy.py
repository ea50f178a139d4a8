"""Whether kube-proxy's rules are in this network namespace, in whichever of its modes.

    nftables           table `kube-proxy` of family ip or ip6
    iptables, ipvs     chain KUBE-SERVICES in the table nat of iptables, kept by nf_tables or by ip_tables

Only these names are asked for: nothing else of others' tables is read. The kernel's older ip_tables tells no
single chain, so there the whole table is fetched and searched, but only where it is in use: asking for one
makes it. Layouts: linux/netfilter/nf_tables.h, linux/netfilter_ipv4/ip_tables.h.

kube-proxy leaves its rules behind when it ends. They count for as long as they are there: a rule does not
tell whether anybody still keeps it.

    first look            decides at once
    found   2 looks on    podwall steps aside        (kube-proxy makes its table before all of its rules)
    nothing 3 looks on    podwall serves             (somebody flushed it all, and kube-proxy writes it again)

So the state follows from what is there now, not from who was started first. Flows that are translated already
go on, whoever translated them.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from agent import nfnetlink

CHAIN = b"KUBE-SERVICES"
FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}

LOOK_EVERY_S = 10.0
STEADY = {True: 2, False: 3}
"""How many looks in a row must find something, or nothing, to change what is done."""


def seen() -> str:
    """Name what of kube-proxy is in the calling thread's network namespace; "" when nothing is.

    Raises OSError when the kernel cannot be asked.
    """
    return ", ".join((*_in_nf_tables(), *_in_ip_tables()))


class Choice:
    """Whether Services are podwall's, by what each look found. Pure."""

    def __init__(self) -> None:
        self.found = ""
        self.serve: bool | None = None
        self._against = 0

    def look(self, found: str) -> bool:
        """Take what a look found; return whether it changed the choice."""
        self.found = found
        if self.serve is None:
            self.serve = not found
            return True
        self._against = self._against + 1 if bool(found) is self.serve else 0
        if self._against < STEADY[bool(found)]:
            return False
        self.serve, self._against = not found, 0
        return True


def _in_nf_tables() -> Iterator[str]:
    with nfnetlink.connect() as sock:
        for name, family in FAMILIES.items():
            if nfnetlink.has(sock, nfnetlink.GET_TABLE, family, {nfnetlink.TABLE_NAME: b"kube-proxy"}):
                yield f"nftables table {'ip' if name == 'IPv4' else 'ip6'} kube-proxy"
        for name, family in FAMILIES.items():
            chain = {nfnetlink.CHAIN_TABLE: b"nat", nfnetlink.CHAIN_NAME: CHAIN}
            if nfnetlink.has(sock, nfnetlink.GET_CHAIN, family, chain):
                yield f"iptables chain {CHAIN.decode()} ({name})"


# ip_tables, as it was before nf_tables

_NAMES = {"IPv4": Path("/proc/net/ip_tables_names"), "IPv6": Path("/proc/net/ip6_tables_names")}
_LEVEL = {"IPv4": socket.IPPROTO_IP, "IPv6": socket.IPPROTO_IPV6}
_GET_INFO, _GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32sI5I5III")
_ENTRIES = struct.Struct("=32sI4x")
_libc = ctypes.CDLL(None, use_errno=True)


def _in_ip_tables() -> Iterator[str]:
    for name, family in FAMILIES.items():
        with suppress(FileNotFoundError):  # this kernel has no ip_tables
            if "nat" in _NAMES[name].read_text(encoding="ascii").split() and CHAIN in _table(name, family):
                yield f"iptables-legacy chain {CHAIN.decode()} ({name})"


def _table(name: str, family: int) -> bytes:
    """The table nat as the kernel keeps it. Raises OSError."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        *_, size = _INFO.unpack(_asked(sock, _LEVEL[name], _GET_INFO, b"nat".ljust(_INFO.size, b"\0")))
        request = _ENTRIES.pack(b"nat", size).ljust(_ENTRIES.size + size, b"\0")
        return _asked(sock, _LEVEL[name], _GET_ENTRIES, request)


def _asked(sock: socket.socket, level: int, option: int, request: bytes) -> bytes:
    """getsockopt with a request in the buffer, which Python's own cannot. Raises OSError."""
    buffer = ctypes.create_string_buffer(request, len(request))
    size = ctypes.c_uint32(len(request))
    if _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(size)):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot read iptables-legacy's table nat: {os.strerror(code)}")
    return buffer.raw[: size.value]
