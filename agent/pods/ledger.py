"""The ledger: one sqlite3 file that says whose each address is, written before anybody is told.

    ADD begins      reserve   address and link name are this container's, whatever happens next
    ADD answers     attach    the Pod is on the network
    link is gone    release   its addresses rest; nobody gets them until `freed` is long enough ago

Killed between two of these, the agent finds at its next start what was half-made: a reserved row was
never answered. The schema itself refuses an address or a link name twice. WAL with synchronous=NORMAL: a
commit outlives the process at once, and the power only from the next checkpoint on, which is enough, for
no Pod's link outlives the power. So a commit costs 20 to 60 microseconds, and gathering several would
gain nothing. A damaged file is set aside, never repaired: the links that exist say more (see
`Attachments.recover`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agent.pods import host_ports
from agent.pods.model import Attachment, IPAddress
from cni.spec import AttachmentKey, Bandwidth

VERSION = 2
APPLICATION = 0x706F6477  # "podw": `file` and we know the file by it

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE attachments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    container_id TEXT NOT NULL,
    ifname TEXT NOT NULL,
    link TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'attached')),
    namespace TEXT NOT NULL,
    pod TEXT NOT NULL,
    pod_uid TEXT NOT NULL,
    mac TEXT NOT NULL,
    host_mac TEXT NOT NULL,
    mtu INTEGER NOT NULL,
    netns TEXT NOT NULL,
    network TEXT NOT NULL,
    bandwidth TEXT NOT NULL,
    port_mappings TEXT NOT NULL DEFAULT '',
    UNIQUE (container_id, ifname)
) STRICT;
CREATE TABLE addresses (
    address TEXT PRIMARY KEY,
    attachment INTEGER REFERENCES attachments (id),
    freed REAL,
    CHECK ((attachment IS NULL) <> (freed IS NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX addresses_of ON addresses (attachment);
CREATE INDEX addresses_freed ON addresses (freed) WHERE freed IS NOT NULL;
CREATE TABLE boot (id TEXT NOT NULL) STRICT;
"""
_COLUMNS = (
    "container_id, ifname, link, state, namespace, pod, pod_uid, "
    "mac, host_mac, mtu, netns, network, bandwidth, port_mappings"
)
_INSERT = f"INSERT INTO attachments ({_COLUMNS}) VALUES ({', '.join('?' * 14)})"  # noqa: S608 - constants
_UPGRADES = {
    1: "ALTER TABLE attachments ADD COLUMN port_mappings TEXT NOT NULL DEFAULT '';",
}
"""What brings a file of an older version to the next one."""

_TAKE = """
INSERT INTO addresses (address, attachment) VALUES (?, ?)
ON CONFLICT (address) DO UPDATE SET attachment = excluded.attachment, freed = NULL WHERE attachment IS NULL
"""

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class Cause(Enum):
    """Why the ledger could not be read or written."""

    FULL = "the disk is full"
    DAMAGED = "the file is damaged"
    TAKEN = "it holds that already"
    UNUSABLE = "it cannot be used"


class LedgerError(Exception):
    """The ledger was not changed; `cause` says of which kind it is, the message names file and remedy."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Row(NamedTuple):
    """An attachment as the ledger has it; `attached` is false where ADD never answered."""

    attachment: Attachment
    attached: bool


class Ledger:
    """The open file; for one thread at a time. Times are seconds since the boot that `boot_id` names."""

    def __init__(self, path: Path, boot_id: str) -> None:
        """Open or make the file. Raises LedgerError when neither can be done.

        `set_aside` then says where a damaged one was moved to, None when there was nothing wrong.
        """
        self.path = path
        self.set_aside: Path | None = None
        self._boot_id = boot_id
        try:
            self._connection = self._translated(self._open)
        except LedgerError as error:
            if error.cause is not Cause.DAMAGED:
                raise
            self._move_aside()
            log.error("event=ledger-damaged error=%r set_aside=%s", str(error), self.set_aside)
            self._connection = self._translated(self._open)

    def close(self) -> None:
        """Write the log back and close the file."""
        self._connection.close()

    def rows(self) -> list[Row]:
        """All attachments in the order they were made. Raises LedgerError."""
        return self._translated(self._rows)

    def resting(self) -> list[tuple[IPAddress, float]]:
        """Addresses that are nobody's, with when they were freed, oldest first. Raises LedgerError."""
        sql = "SELECT address, freed FROM addresses WHERE freed IS NOT NULL ORDER BY freed"
        found = self._translated(lambda: self._connection.execute(sql).fetchall())
        return [(ip_address(address), freed) for address, freed in found]

    def reserve(self, attachment: Attachment) -> None:
        """Write whose the link and the addresses are. Raises LedgerError, TAKEN if they are another's."""
        self._transaction(lambda: self._insert(attachment, "reserved"))

    def attach(self, key: AttachmentKey) -> None:
        """Write down that ADD is done. Raises LedgerError."""
        sql = "UPDATE attachments SET state = 'attached' WHERE container_id = ? AND ifname = ?"
        self._transaction(lambda: self._connection.execute(sql, (key.container_id, key.ifname)))

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """Write down Pods that are on the network already. Raises LedgerError."""
        whole = list(attachments)
        self._transaction(lambda: self._insert_all((each, "attached") for each in whole))

    def release(self, keys: Sequence[AttachmentKey], freed: float, rested: float) -> None:
        """Forget attachments; their addresses rest from `freed`; those freed before `rested` are forgotten.

        An attachment that is not there is no error. Raises LedgerError.
        """
        self._transaction(lambda: self._release(keys, freed, rested))

    def rebuild(self, rows: Sequence[Row]) -> None:
        """Set a damaged file aside and write everything down again. Raises LedgerError."""
        self._connection.close()
        self._move_aside()
        self._connection = self._translated(self._open)
        self._transaction(
            lambda: self._insert_all(
                (row.attachment, "attached" if row.attached else "reserved") for row in rows
            )
        )

    def _open(self) -> sqlite3.Connection:
        self._make_file()
        connection = sqlite3.connect(
            self.path, timeout=5, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            for pragma in (
                "journal_mode = WAL",
                "synchronous = NORMAL",
                "foreign_keys = ON",
                "cache_size = -512",
            ):
                connection.execute(f"PRAGMA {pragma}")
            self._check(connection)
            self._begin_boot(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_file(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # sqlite3 gives its log and index the mode of the file itself.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))

    def _check(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not tables:
            with closing(connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")):
                return
        if application != APPLICATION:
            raise LedgerError(Cause.UNUSABLE, f"{self.path} is a database of another program; move it away")
        if not 1 <= version <= VERSION:
            raise LedgerError(
                Cause.UNUSABLE,
                f"ledger {self.path} has version {version}, this agent reads 1 to {VERSION}: run a newer one",
            )
        found = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise LedgerError(Cause.DAMAGED, f"ledger {self.path} is damaged: {'; '.join(found)}")
        if connection.execute("PRAGMA foreign_key_check").fetchone():
            raise LedgerError(Cause.DAMAGED, f"ledger {self.path} is damaged: an address belongs to nobody")
        for older in range(version, VERSION):
            log.info("event=ledger-upgraded from=%d to=%d", older, older + 1)
            upgrade = f"BEGIN IMMEDIATE; {_UPGRADES[older]} PRAGMA user_version = {older + 1}; COMMIT;"
            connection.executescript(upgrade).close()

    def _begin_boot(self, connection: sqlite3.Connection) -> None:
        """After a boot no earlier flow is left, and the clock that `freed` was read from began anew."""
        if connection.execute("SELECT id FROM boot").fetchone() == (self._boot_id,):
            return
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM addresses WHERE freed IS NOT NULL")
        connection.execute("DELETE FROM boot")
        connection.execute("INSERT INTO boot VALUES (?)", (self._boot_id,))
        connection.execute("COMMIT")

    def _move_aside(self) -> None:
        self.set_aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        self._translated(lambda: self.path.rename(self.set_aside or self.path))
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _rows(self) -> list[Row]:
        addresses: dict[int, list[IPAddress]] = {}
        sql = "SELECT attachment, address FROM addresses WHERE attachment IS NOT NULL"
        for owner, address in self._connection.execute(sql):
            addresses.setdefault(owner, []).append(ip_address(address))
        columns = f"SELECT id, {_COLUMNS} FROM attachments ORDER BY id"  # noqa: S608 - constants
        return [_row(fields, addresses) for fields in self._connection.execute(columns)]

    def _insert_all(self, rows: Iterable[tuple[Attachment, str]]) -> None:
        for attachment, state in rows:
            self._insert(attachment, state)

    def _insert(self, attachment: Attachment, state: str) -> None:
        a = attachment
        limits = json.dumps(asdict(a.bandwidth)) if a.bandwidth else ""
        names = (a.container_id, a.ifname, a.link, state, a.namespace, a.pod, a.pod_uid)
        owner = self._connection.execute(
            _INSERT,
            (*names, a.mac, a.host_mac, a.mtu, a.netns, a.network, limits, host_ports.write(a.port_mappings)),
        ).lastrowid
        for address in a.addresses:
            if not self._connection.execute(_TAKE, (str(address), owner)).rowcount:
                raise LedgerError(Cause.TAKEN, f"ledger {self.path}: address {address} is another Pod's")

    def _release(self, keys: Sequence[AttachmentKey], freed: float, rested: float) -> None:
        execute = self._connection.execute
        for key in keys:
            names = (key.container_id, key.ifname)
            row = execute(
                "SELECT id FROM attachments WHERE container_id = ? AND ifname = ?", names
            ).fetchone()
            if row:
                execute(
                    "UPDATE addresses SET attachment = NULL, freed = ? WHERE attachment = ?", (freed, *row)
                )
                execute("DELETE FROM attachments WHERE id = ?", row)
        execute("DELETE FROM addresses WHERE freed < ?", (rested,))

    def _transaction(self, work: Callable[[], object]) -> None:
        def whole() -> None:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                work()
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

        self._translated(whole)

    def _translated(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except sqlite3.Error as error:
            raise _translation(self.path, error) from error
        except OSError as error:
            raise LedgerError(
                Cause.UNUSABLE, f"ledger {self.path} cannot be used: {error.strerror}"
            ) from error


def _translation(path: Path, error: sqlite3.Error) -> LedgerError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    no_room = code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and not _room(path)
    if code == sqlite3.SQLITE_FULL or no_room:  # what fails for its log's index is told as any error
        return LedgerError(
            Cause.FULL, f"ledger {path} cannot be written: the disk is full; free some space there"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return LedgerError(Cause.DAMAGED, f"ledger {path} is damaged: {error}")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return LedgerError(Cause.TAKEN, f"ledger {path} holds that already: {error}")
    return LedgerError(Cause.UNUSABLE, f"ledger {path} cannot be used: {error}")


def _room(path: Path) -> int:
    """The free bytes on a file's file system; of one that cannot be asked, some."""
    try:
        facts = os.statvfs(path.parent)
    except OSError:
        return 1
    return facts.f_bavail * facts.f_frsize


def _row(fields: Sequence[Any], addresses: dict[int, list[IPAddress]]) -> Row:
    own = dict(zip(("id", *_COLUMNS.split(", ")), fields, strict=True))
    id_, state, limits, mappings = map(own.pop, ("id", "state", "bandwidth", "port_mappings"))
    attachment = Attachment(
        **own,
        addresses=tuple(sorted(addresses.get(id_, ()), key=lambda address: address.version)),
        bandwidth=Bandwidth(**json.loads(limits)) if limits else None,
        port_mappings=host_ports.read(mappings),
    )
    return Row(attachment, state == "attached")


class LedgerThread:
    """Has a ledger's calls done one after another by a thread, so that a slow disk stops nobody else.

    `known` tells what must be in the ledger: a file that turns out damaged is written anew from it.
    """

    def __init__(self, ledger: Ledger, known: Callable[[], Sequence[Row]]) -> None:
        self._ledger = ledger
        self._known = known
        self._thread = ThreadPoolExecutor(1, "podwall-ledger")

    async def run(self, call: Callable[[Ledger], _Result]) -> _Result:
        """Have it called with the ledger. Raises LedgerError."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, call, self._ledger)
        except LedgerError as error:
            if error.cause is not Cause.DAMAGED:
                raise
            log.error("event=ledger-damaged error=%r: written anew from memory", str(error))
        await loop.run_in_executor(self._thread, self._ledger.rebuild, tuple(self._known()))
        return await loop.run_in_executor(self._thread, call, self._ledger)

    async def close(self) -> None:
        """Close the ledger when all calls are done."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._ledger.close)
        self._thread.shutdown()
