"""The ledger: what it keeps, what it refuses, and what it does about a bad file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.pods.ledger import Cause, Ledger, LedgerError, LedgerThread, Row
from agent.pods.model import Attachment
from cni.spec import AttachmentKey, Bandwidth, PortMapping
from tests.agent.pods.world import attachment, fill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, "boot-1")) as made:
        yield made


def test_rows_outlive_the_process(ledger: Ledger, path: Path) -> None:
    ports = (PortMapping(53, 5353, "udp", "fd00::1"), PortMapping(8080, 80, "tcp", ""))
    limits = Bandwidth(1_000_000, 8000, 2_000_000, 9000)
    limited = attachment(2, bandwidth=limits, port_mappings=ports)
    ledger.reserve(attachment(1))
    ledger.reserve(limited)
    ledger.attach(limited.key)
    with closing(Ledger(path, "boot-1")) as again:
        assert again.rows() == [Row(attachment(1), False), Row(limited, True)]


def test_only_root_may_read_it(ledger: Ledger, path: Path) -> None:
    ledger.reserve(attachment(1))
    assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
        "ledger.sqlite3": 0o600,
        "ledger.sqlite3-wal": 0o600,
        "ledger.sqlite3-shm": 0o600,
    }
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_released_addresses_rest_and_are_given_again(ledger: Ledger) -> None:
    ledger.reserve(attachment(1))
    ledger.release([attachment(1).key, AttachmentKey("unknown", "eth0")], freed=100.5, rested=0)
    assert ledger.rows() == []
    assert ledger.resting() == [(address, 100.5) for address in attachment(1).addresses]
    ledger.reserve(attachment(2, addresses=attachment(1).addresses))
    assert ledger.resting() == []
    ledger.release([attachment(2).key], freed=200, rested=0)
    ledger.release([], freed=300, rested=250)
    assert ledger.resting() == [], "those that have rested are forgotten"


def test_after_a_boot_nothing_rests(ledger: Ledger, path: Path) -> None:
    ledger.reserve(attachment(1))
    ledger.reserve(attachment(2))
    ledger.release([attachment(1).key], freed=100, rested=0)
    with closing(Ledger(path, "boot-2")) as again:
        assert again.resting() == []
        assert again.rows() == [Row(attachment(2), False)]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(attachment(2, addresses=attachment(1).addresses), id="address"),
        pytest.param(
            attachment(2, addresses=(ip_address("10.1.0.9"), ip_address("fd00::1"))), id="one address"
        ),
        pytest.param(attachment(2, link=attachment(1).link), id="link"),
        pytest.param(attachment(1, link="podwall00000000", addresses=()), id="container and interface"),
    ],
)
def test_nothing_is_given_twice(ledger: Ledger, other: Attachment) -> None:
    ledger.reserve(attachment(1))
    with pytest.raises(LedgerError) as caught:
        ledger.reserve(other)
    assert caught.value.cause is Cause.TAKEN
    assert [row.attachment for row in ledger.rows()] == [attachment(1)], "nothing half-made"
    ledger.reserve(attachment(3))


def damage_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"not a database at all")


def damage_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def cut(path: Path) -> None:
    os.truncate(path, 5000)


@pytest.mark.parametrize("damage", [damage_head, damage_middle, cut])
def test_a_damaged_file_is_set_aside(path: Path, damage: object) -> None:
    with closing(Ledger(path, "boot-1")) as ledger:
        for number in range(1, 100):
            ledger.reserve(attachment(number))
    assert callable(damage)
    damage(path)
    with closing(Ledger(path, "boot-1")) as again:
        assert again.set_aside
        assert again.set_aside.exists()
        assert again.rows() == []
        again.reserve(attachment(1))


def test_a_file_damaged_while_it_is_open_is_written_anew_from_memory(path: Path) -> None:
    rows = [Row(attachment(number), number != 5) for number in range(1, 50)]

    async def main() -> list[Row]:
        ledger = Ledger(path, "boot-1")
        thread = LedgerThread(ledger, lambda: rows)
        ledger._connection.execute("PRAGMA journal_mode = DELETE")  # so that the file itself is read
        ledger._connection.execute("PRAGMA cache_size = 0")
        damage_middle(path)
        damage_head(path)
        await thread.run(lambda each: each.reserve(attachment(60)))
        found = await thread.run(Ledger.rows)
        await thread.close()
        return found

    assert asyncio.run(main()) == [*rows, Row(attachment(60), False)]


def test_a_full_disk_is_told_and_changes_nothing(tiny_disk: Path) -> None:
    with closing(Ledger(tiny_disk / "ledger.sqlite3", "boot-1")) as ledger:
        ledger.reserve(attachment(1))
        filler = fill(tiny_disk)

        def go_on() -> None:
            for number in range(2, 200):
                ledger.reserve(attachment(number))

        with pytest.raises(LedgerError, match=r"ledger .*/tiny/ledger.* disk is full; free some") as caught:
            go_on()
        assert caught.value.cause is Cause.FULL
        before = ledger.rows()
        filler.unlink()
        ledger.reserve(attachment(250))
        assert len(ledger.rows()) == len(before) + 1


def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(LedgerError, match="database of another program; move it away"):
        Ledger(path, "boot-1")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("theirs",)]


def test_a_newer_version_is_left_alone(ledger: Ledger, path: Path) -> None:
    ledger._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="has version 99, this agent reads 1 to 2: run a newer one"):
        Ledger(path, "boot-1")


def test_an_older_version_is_brought_up(ledger: Ledger, path: Path) -> None:
    ledger.reserve(attachment(1))
    ledger.attach(attachment(1).key)
    ledger._connection.executescript(
        "ALTER TABLE attachments DROP COLUMN port_mappings; PRAGMA user_version = 1;"
    )
    ledger.close()
    with_port = attachment(2, port_mappings=(PortMapping(8080, 80, "tcp", ""),))
    with closing(Ledger(path, "boot-1")) as newer:
        assert newer.rows() == [Row(attachment(1), True)]
        newer.reserve(with_port)
    with closing(Ledger(path, "boot-1")) as again:
        assert again.rows() == [Row(attachment(1), True), Row(with_port, False)]


@pytest.mark.parametrize("what", ["directory", "link"])
def test_a_place_that_cannot_be_used(path: Path, what: str) -> None:
    path.parent.mkdir()
    if what == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/hostname")
    with pytest.raises(LedgerError, match=f"ledger {path} cannot be used: "):
        Ledger(path, "boot-1")
