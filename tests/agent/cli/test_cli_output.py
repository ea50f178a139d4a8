"""What a command prints: tables as kubectl's, whole data for programs, nothing that steers a terminal."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import click
import pytest
import yaml
from click.testing import CliRunner

from agent.cli.output import Coloured, Column, age, output_option, show, table

HOSTILE = "web\x1b[2J\nall is well"


@dataclass(frozen=True)
class Pod:
    name: str
    addresses: tuple[str, ...] = ()
    mtu: int | None = None


COLUMNS = (
    Column("NAME", lambda pod: pod.name),
    Column("ADDRESSES", lambda pod: pod.addresses),
    Column("MTU", lambda pod: pod.mtu, wide=True),
)


@click.command()
@output_option
def said(output: str) -> None:
    show(output, {"name": HOSTILE, "count": 2}, lambda: [HOSTILE, Coloured(HOSTILE, "red")])


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [Pod("a", ("10.0.0.1", "fd00::1")), Pod("longer-name")]
    assert table(rows, COLUMNS) == [
        "NAME          ADDRESSES",
        "a             10.0.0.1,fd00::1",
        "longer-name   <none>",
    ]


def test_a_wide_table_has_all_columns() -> None:
    assert table([Pod("a", (), 1500)], COLUMNS, wide=True) == [
        "NAME   ADDRESSES   MTU",
        "a      <none>      1500",
    ]


def test_a_table_without_rows_is_its_titles() -> None:
    assert table([], COLUMNS) == ["NAME   ADDRESSES"]


def test_a_hostile_name_stays_in_its_cell() -> None:
    lines = table([Pod(HOSTILE, ("10.0.0.1",))], COLUMNS)
    assert len(lines) == 2
    assert "\x1b" not in lines[1]
    assert lines[0].index("ADDRESSES") == lines[1].index("10.0.0.1")


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_programs_get_the_data_itself(form: str, read: object) -> None:
    printed = CliRunner().invoke(said, ["-o", form]).output
    assert read(printed) == {"name": HOSTILE, "count": 2}  # type: ignore[operator]
    assert "\x1b" not in printed


def test_people_get_lines_that_steer_nothing() -> None:
    printed = CliRunner().invoke(said).output
    assert printed.splitlines() == ["web\\x1b[2J\\nall is well"] * 2


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = CliRunner().invoke(said, color=True).output
    assert "\x1b[31mweb\\x1b[2J\\nall is well\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in CliRunner().invoke(said, color=True).output


def test_an_unknown_form_is_wrong_usage() -> None:
    assert CliRunner().invoke(said, ["-o", "xml"]).exit_code == 2


AGES: list[tuple[float | None, str]] = [
    (None, "never"),
    (0, "0s"),
    (119, "119s"),
    (120, "2m"),
    (7199, "119m"),
    (7200, "2h"),
    (2 * 86400, "2d"),
    (-5, "0s"),
]


@pytest.mark.parametrize(("seconds", "text"), AGES, ids=[text for _, text in AGES])
def test_ages_are_kubectls(seconds: float | None, text: str) -> None:
    assert age(None if seconds is None else time.time() - seconds) == text
