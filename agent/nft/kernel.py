"""The kernel's nf_tables as the agent meets it: commit a text, read rulesets back, hear of others' changes.

    commit(text) --> worker process (libnftables) --> nf_tables --notifications--> changes()
        elements alone: a netlink batch --------------^
    read(tables) <-- JSON listing   <--------------'                (those of others, own tables only)

The worker is started when it is needed and again after it has died. A commit is whole or not at all; when the
worker dies during one, or does not answer in time, it is not known which: the caller reads and compares.

Notifications are netlink messages that the kernel sends after every commit: what was changed, then the new
generation, all stamped with the netlink port of who did it. Own commits are recognised by that port and are
thrown away unread, so loading ten thousand elements costs no parsing; others' are searched for own tables.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Literal, NamedTuple, Self

from agent import nfnetlink
from agent.nft import elements, parse, render
from agent.nft.model import Ruleset, TableName

log = logging.getLogger(__name__)

HEADER = struct.Struct("!Ic")
OWN_TABLES = frozenset(
    {TableName("inet", "podwall"), TableName("inet", "podwall_services"), TableName("arp", "podwall")}
)
START_TIMEOUT_S = 10.0
COMMIT_TIMEOUT_S = 60.0
BYTES_PER_S = 50_000  # of a transaction, where it is slowest: more time for a larger one
STOP_TIMEOUT_S = 2.0
TORN_PAUSES_S = (0.005, 0.02, 0.1, 0.5, 1.0)
"""For a rehash to end, which takes milliseconds unless all is busy."""

Reason = Literal["refused", "lost", "timeout", "stopped"]


class NftError(Exception):
    """A transaction or listing failed.

    reason: "refused" (nft or the kernel said no, nothing was changed); "lost" (the worker died) or "timeout"
    (it gave no answer): it is not known whether the transaction was committed; "stopped": the agent ends.
    message: what nft said. transaction: its text, in full.
    """

    def __init__(self, reason: Reason, message: str, transaction: str) -> None:
        self.reason, self.message, self.transaction = reason, message, transaction
        super().__init__(f"nftables {reason}: {message}\nthe transaction was:\n{transaction}")


class Foreign(NamedTuple):
    """Somebody else changed these own tables; `lost`: notifications were dropped, it may be any."""

    tables: frozenset[TableName]
    lost: bool = False


class Kernel:
    """nf_tables of the network namespace that `start` is called in; `async with` starts and stops it.

    `tables` are the own ones, whose foreign changes are reported; timeouts in seconds.
    """

    def __init__(
        self,
        tables: frozenset[TableName] = OWN_TABLES,
        commit_timeout_s: float = COMMIT_TIMEOUT_S,
    ) -> None:
        self._tables = tables
        self._commit_timeout_s = commit_timeout_s
        self._worker: _Worker | None = None
        self._turn = asyncio.Lock()
        self._stopped = False
        self._batches: socket.socket | None = None  # for transactions of elements alone
        self._notifications = Notifications(tables)

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id while there is one."""
        return self._worker.pid if self._worker and not self._worker.ended else None

    async def start(self) -> None:
        """Start the worker and listen; NftError when libnftables cannot be used here."""
        self._stopped = False
        self._notifications.open()
        try:
            self._batches = nfnetlink.connect()
            async with self._turn:
                await self._ready("")
        except BaseException:
            self._close()
            raise

    async def stop(self) -> None:
        """End the worker and stop listening; the rules stay."""
        self._stopped = True
        self._notifications.close()
        async with self._turn:
            self._close()
            await self._end()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def commit(self, text: str, batch: bytes | None = None) -> None:
        """Commit a transaction, all of it or nothing; `batch` is the same in `agent.nft.elements`' words.

        What the kernel refuses of a batch is tried again as text, for libnftables says what is wrong.
        """
        if text and not (batch and await self._committed(batch, text)):
            await self._ask(b"c", text)

    async def check(self, text: str) -> None:
        """Let nft and the kernel's parser judge a transaction without committing it."""
        if text:
            await self._ask(b"d", text)

    async def read(self, tables: Iterable[TableName] = OWN_TABLES) -> Ruleset:
        """What the kernel holds of these tables; a table that is not there is left out. Raises NftError."""
        for pause_s in TORN_PAUSES_S:
            try:
                return await self._read_once(tables)
            except parse.TornError as torn:
                log.info("event=nft-listing-torn what=%r", str(torn))
                await asyncio.sleep(pause_s)
        raise NftError("refused", "the kernel gave no whole listing", "list table")

    async def _read_once(self, tables: Iterable[TableName]) -> Ruleset:
        listings = [await self.listing(name) for name in sorted(tables)]
        return await asyncio.to_thread(parse.ruleset, *filter(None, listings))

    async def listing(self, table: TableName) -> bytes:
        """A table as libnftables lists it in JSON; nothing when it is not there. Raises NftError."""
        return await self._ask(b"l", f"list table {render.table_name(table)}") if _exists(table) else b""

    def changes(self) -> AsyncIterator[Foreign]:
        """Foreign changes to own tables as they come, several quick ones as one; ends with `stop`."""
        return self._notifications.foreign()

    async def _committed(self, batch: bytes, text: str) -> bool:
        """Whether the kernel took a batch. It waits there while another's transaction is under way."""
        async with self._turn:
            await self._ready(text)  # a worker that ended is replaced now, not when it is needed most
            if self._batches is None:
                return False
            sending = asyncio.create_task(asyncio.to_thread(_send, self._batches, batch))
            try:
                return await asyncio.shield(sending)
            except asyncio.CancelledError:  # the socket must not be used by two at a time
                await asyncio.wait([sending])
                raise

    def _close(self) -> None:
        self._notifications.close()
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _own_ports(self, worker: "_Worker") -> set[int]:
        batches = {self._batches.getsockname()[0]} if self._batches is not None else set()
        return worker.ports | batches

    async def _ask(self, kind: bytes, text: str) -> bytes:
        async with self._turn:
            worker = await self._ready(text)
            self._notifications.wait()
            limit_s = self._commit_timeout_s + len(text) // BYTES_PER_S
            try:
                async with asyncio.timeout(limit_s):
                    answer, payload = await worker.ask(kind, text.encode())
            except TimeoutError:
                await self._end(kill=True)
                raise NftError("timeout", f"no answer within {limit_s:g} s", text) from None
            except (EOFError, ConnectionError) as problem:
                status = await self._end()
                raise NftError("lost", f"the worker ended ({_ended(status)})", text) from problem
            except BaseException:  # cancelled: what is still to come would be taken for the next one's answer
                await self._end(kill=True)
                raise
            finally:
                self._notifications.judge(self._own_ports(worker))
        if answer == b"e":
            raise NftError("refused", payload.decode().strip(), text)
        return payload

    async def _ready(self, text: str) -> "_Worker":
        if self._stopped:
            raise NftError("stopped", "the agent is ending", text)
        if self._worker is not None and self._worker.ended:  # while nothing was asked: nothing is lost
            log.warning("event=nft-worker-ended %s", _ended(await self._end()))
        if self._worker is None:
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    self._worker = await _Worker.start()
            except (TimeoutError, EOFError, OSError) as problem:
                raise NftError(
                    "lost", "the worker does not start: is python3-nftables installed for this Python?", text
                ) from problem
            self._notifications.judge(self._own_ports(self._worker))
            log.info("event=nft-worker-started pid=%d", self._worker.pid)
        return self._worker

    async def _end(self, kill: bool = False) -> int | None:
        worker, self._worker = self._worker, None
        return await worker.end(kill) if worker else None


def _ended(status: int | None) -> str:
    if status is None:
        return "status=unknown"
    return f"signal={-status}" if status < 0 else f"status={status}"


def _send(sock: socket.socket, batch: bytes) -> bool:
    """Send a batch; whether it was committed. The answers are there when the kernel has taken it."""
    answers = []
    try:
        sock.send(batch)
        while True:
            answers.append(sock.recv(READ_BYTES, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return elements.committed(answers)
    except OSError as error:
        log.warning("event=nft-batch-failed error=%r", str(error))
        return False


def _exists(table: TableName) -> bool:
    """Whether the kernel has a table; asked past libnftables, whose `list tables` lists all of every table.

    Raises NftError.
    """
    family = next(number for number, name in FAMILIES.items() if name == table.family)
    try:
        with nfnetlink.connect() as sock:
            names = {nfnetlink.TABLE_NAME: table.name.encode()}
            return nfnetlink.has(sock, nfnetlink.GET_TABLE, family, names)
    except OSError as error:
        raise NftError("refused", f"cannot ask for a table: {error}", render.table_name(table)) from error


class _Worker:
    """The worker process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("the worker was started without pipes")
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self._sayings = asyncio.create_task(_log_lines(process.stderr, process.pid))
        self.pid = process.pid
        self.ports: set[int] = set()

    @classmethod
    async def start(cls) -> "_Worker":
        spec = find_spec("agent.nft.worker")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("agent/nft/worker.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            spec.origin,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        worker = cls(process)
        try:
            await worker._port()
        except BaseException:
            await worker.end()
            raise
        return worker

    async def ask(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        self._requests.write(HEADER.pack(len(payload), kind) + payload)
        await self._requests.drain()
        if kind == b"c":
            await self._port()
        return await self._receive()

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def end(self, kill: bool = False) -> int | None:
        """Close its input and wait; kill it when that does not help, or at once."""
        self._requests.close()
        if kill and not self.ended:
            self._process.kill()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
        await self._sayings
        return await self._process.wait()

    async def _port(self) -> None:
        _, ports = await self._receive()
        self.ports |= {int(port) for port in ports.split()}

    async def _receive(self) -> tuple[bytes, bytes]:
        length, kind = HEADER.unpack(await self._answers.readexactly(HEADER.size))
        return kind, await self._answers.readexactly(length)


async def _log_lines(stream: asyncio.StreamReader, pid: int) -> None:
    """libnftables warns on standard error, and a dying interpreter says there why."""
    while line := await stream.readline():
        log.debug("event=nft-worker-says pid=%d text=%r", pid, line.decode(errors="replace").rstrip())


# Notifications

NETLINK_NETFILTER = getattr(socket, "NETLINK_NETFILTER", 12)
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
NFNLGRP_NFTABLES = 7
SO_RCVBUFFORCE = 33
RECEIVE_BYTES = 32 << 20  # notifications of the largest own load wait here until they are thrown away
READ_BYTES = 1 << 18
MOST_KEPT = 4096  # datagrams of one transaction; a foreign one with more may have changed any own table

NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_NEWGEN = 15
NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port
NFGEN_BYTES = 4
NLA = struct.Struct("=HH")
NFTA_TABLE_NAME = 1  # the first attribute of all messages about tables and what is in them

FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
DEBOUNCE_S = 0.05


class Notifications:
    """The netlink socket that hears of every commit in this network namespace.

    While an own commit is under way its port may not be known yet: `wait` puts judgement off until `judge`.
    """

    def __init__(self, tables: frozenset[TableName]) -> None:
        self._tables = tables
        self._needles = tuple(
            struct.pack("=H", NFTA_TABLE_NAME) + name.name.encode() + b"\0" for name in tables
        )
        self._own_ports: frozenset[int] = frozenset()
        self._waiting = False
        self._undecided: list[tuple[int, list[bytes]]] = []
        self._socket: socket.socket | None = None
        self._kept: list[bytes] = []
        self._touched: set[TableName] = set()
        self._lost = False
        self._wake = asyncio.Event()

    def open(self) -> None:
        """Begin to listen, in the network namespace of the calling thread."""
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        made.setblocking(False)
        try:
            made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BYTES)
        except PermissionError:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        made.bind((0, 0))
        made.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        self._socket = made
        asyncio.get_running_loop().add_reader(made.fileno(), self._readable)

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._wake.set()

    async def foreign(self) -> AsyncIterator[Foreign]:
        """What others changed: the first at once, what follows it gathered over 50 ms."""
        while self._socket is not None:
            await self._wake.wait()
            self._wake.clear()
            found, self._touched = Foreign(frozenset(self._touched), self._lost), set()
            self._lost = False
            if found.tables or found.lost:
                yield found
                await asyncio.sleep(DEBOUNCE_S)

    def wait(self) -> None:
        """An own commit begins."""
        self._waiting = True

    def judge(self, own_ports: Iterable[int]) -> None:
        """No own commit is under way; these are the ports of own commits so far."""
        self._own_ports = frozenset(own_ports)
        self._readable()
        self._waiting = False
        undecided, self._undecided = self._undecided, []
        for port, kept in undecided:
            self._decide(port, kept)

    def _readable(self) -> None:
        while self._socket is not None:
            try:
                datagram = self._socket.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as problem:  # ENOBUFS: the kernel dropped notifications
                log.warning("event=nft-notifications-lost error=%r", problem)
                self._lose()
                return
            self._take(datagram)

    def _take(self, datagram: bytes) -> None:
        """Keep what a commit changed until its generation tells whose commit it was."""
        if len(datagram) < NLMSG.size:
            return
        _, kind, _, _, port = NLMSG.unpack_from(datagram)
        if kind != (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN):
            if len(self._kept) <= MOST_KEPT and any(needle in datagram for needle in self._needles):
                self._kept.append(datagram)
            return
        kept, self._kept = self._kept, []
        if not kept or port in self._own_ports:
            return
        if self._waiting:
            self._undecided.append((port, kept))
        else:
            self._decide(port, kept)

    def _decide(self, port: int, kept: list[bytes]) -> None:
        if port in self._own_ports:
            return
        if len(kept) > MOST_KEPT:
            self._lose()
            return
        touched = {name for each in kept for name in _named_tables(each)} & self._tables
        if touched:
            self._touched |= touched
            self._wake.set()

    def _lose(self) -> None:
        self._lost = True
        self._kept = []
        self._wake.set()


def _named_tables(datagram: bytes) -> Iterator[TableName]:
    """The tables that a datagram's messages are about."""
    offset = 0
    while offset + NLMSG.size + NFGEN_BYTES <= len(datagram):
        length, _, _, _, _ = NLMSG.unpack_from(datagram, offset)
        if length < NLMSG.size:
            return
        family = FAMILIES.get(datagram[offset + NLMSG.size])
        with contextlib.suppress(struct.error, UnicodeDecodeError):
            name = _first_attribute(datagram, offset + NLMSG.size + NFGEN_BYTES)
            if family is not None and name:
                yield TableName(family, name)  # type: ignore[arg-type]  # the values of FAMILIES
        offset += (length + 3) & ~3


def _first_attribute(datagram: bytes, offset: int) -> str:
    length, kind = NLA.unpack_from(datagram, offset)
    if kind != NFTA_TABLE_NAME:
        return ""
    return datagram[offset + NLA.size : offset + length].rstrip(b"\0").decode()
