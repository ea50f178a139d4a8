"""A program of its own that holds libnftables: transactions by standard input, answers by standard output.

    agent --[length, kind, text]--> worker --netlink--> nf_tables
          <--[length, kind, text]--

Why a program and not a call: libnftables ends its process on some errors (where it cannot allocate it calls
exit), it has crashed on rulesets made by newer tools, it is not thread-safe, and one context kept warm makes
a small commit take a fraction of a millisecond. And libnftables and its Python binding are licensed GPL-2.0
only: this file is all that uses them. It is started as a separate program, shares no data structure with the
agent and talks text through pipes; nothing in podwall imports this file, and it imports nothing of podwall.

A frame is a 4-byte big-endian length, one byte kind and a payload of that length.
    in    c commit, d dry run, l list as JSON; the payload is nft's command text
    out   o done, e refused; the payload is the listing, or nft's message
At the start, and before the answer to a commit, comes p: the port ids of the netlink sockets. The kernel
stamps the port on the notifications that a commit causes, by which the agent tells its own from others'.

The worker ends with its parent: at the end of standard input, and by PR_SET_PDEATHSIG when stuck in a call.
"""

import ctypes
import os
import signal
import socket
import struct
import sys
from typing import BinaryIO

import nftables

PR_SET_PDEATHSIG = 1
LARGE = 1 << 18  # bytes of a request and its answer
HEADER = struct.Struct("!Ic")
libc = ctypes.CDLL(None, use_errno=True)


def main(parent: int) -> None:
    """Serve until standard input ends; `parent` is the process to die with."""
    _die_with(parent)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C is for the agent, which ends this orderly
    context = _context()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _send(answers, b"p", _port())
    while header := requests.read(HEADER.size):
        length, kind = HEADER.unpack(header)
        text = requests.read(length).decode()
        answer, payload = _serve(context, kind, text)
        if kind == b"c":
            _send(answers, b"p", _port())
        _send(answers, answer, payload)
        if len(text) + len(payload) > LARGE:
            del text, payload
            context = _context()  # the old one keeps what it listed, and lists it all again each time
            libc.malloc_trim(0)


def _die_with(parent: int) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        sys.exit()


def _context() -> nftables.Nftables:
    context = nftables.Nftables()
    context.set_numeric_proto_output(True)  # names would be those of this machine's /etc/protocols
    context.set_handle_output(False)
    return context


def _serve(context: nftables.Nftables, kind: bytes, text: str) -> tuple[bytes, bytes]:
    context.set_json_output(kind == b"l")
    context.set_dry_run(kind == b"d")
    code, output, error = context.cmd(text)
    return (b"e", error.encode()) if code else (b"o", output.encode())


def _port() -> bytes:
    """The port ids of this process's netfilter sockets, as text."""
    ports = (_netfilter_port(int(name)) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    return b" ".join(b"%d" % port for port in ports if port)


def _netfilter_port(fd: int) -> int:
    try:
        of = socket.socket(fileno=fd)
    except OSError:  # not a socket, or the directory listing's own descriptor
        return 0
    port = int(of.getsockname()[0]) if of.family == socket.AF_NETLINK else 0
    of.detach()
    return port


def _send(answers: BinaryIO, kind: bytes, payload: bytes) -> None:
    answers.write(HEADER.pack(len(payload), kind) + payload)
    answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
