"""How an archive is made: pages put together, what is missing named, and nothing left of a stopped one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from agent import bugreport as node_side
from agent.cli.agents import Agents, SilentError
from agent.cli.bugreport import PARTS, Archive, last_lines, pages
from agent.config import Config
from cni import wire
from cni.spec import CniError

CONFIG = Config(node_name="node1")


class Line:
    """The way to an agent that is this process."""

    def __init__(self, calls: Mapping[str, Any]) -> None:
        self._calls = calls
        self.asked = 0

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        self.asked += 1
        try:
            answer = asyncio.run(self._calls[call](body))
        except CniError as error:
            raise SilentError(str(error)) from error
        assert len(json.dumps(answer)) < wire.LIMIT
        return answer

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Line:
    """An agent whose rules are 2 MB when they are compressed."""
    texts = [os.urandom(1000).hex() for _ in range(2000)]

    async def rules(config: Config) -> list[str]:
        return texts

    monkeypatch.setattr(node_side, "PARTS", {**node_side.PARTS, "rules": rules})
    line = Line(node_side.answers(CONFIG))
    line.texts = texts  # type: ignore[attr-defined]
    return line


def test_the_command_and_the_node_know_the_same_parts() -> None:
    assert tuple(node_side.PARTS) == PARTS


def test_a_part_larger_than_a_message_comes_in_pages(node: Line) -> None:
    agents = Agents({"node1": lambda: node})
    assert list(pages(agents, "node1", "rules")) == node.texts  # type: ignore[attr-defined]
    assert node.asked == 5


def test_several_may_ask_at_once_and_what_is_forgotten_is_said(node: Line) -> None:
    def page(**body: object) -> Any:
        return node.ask("bugreport", {"part": "rules", **body})

    first, *others = [page(at=0) for _ in range(5)]
    assert page(at=others[0]["next"], of=others[0]["of"])["data"] != others[0]["data"]
    with pytest.raises(SilentError, match="begin again"):
        page(at=first["next"], of=first["of"])
    with pytest.raises(SilentError, match="is none of rules"):
        node.ask("bugreport", {"part": "secrets"})


def test_a_listing_is_taken_apart_without_parsing_it() -> None:
    inner = [{"map": {"key": 1}}, {"set": {"op": "add"}}, {"dnat": {"family": "ip"}}]
    rule = {"rule": {"family": "inet", "comment": 'a", {"rule": {"family": "b', "expr": inner}}
    table, elements = {"table": {"family": "inet"}}, {"map": {"family": "ip", "elem": [1, 2]}}
    listed = [{"metainfo": {"version": "1"}}, table, rule, elements]
    listing = json.dumps({"nftables": listed}).encode() + b"\n"
    assert [json.loads(each) for each in node_side.objects(listing)] == listed
    assert list(node_side.objects(b"")) == []


def test_an_endless_part_is_cut_off() -> None:
    import zlib

    packed = node_side.compress(("x" * 99 for _ in range(1000)), largest=5000)
    assert zlib.decompress(packed).decode().splitlines()[-2:] == ["x" * 99, "(the rest is cut off)"]


def test_what_is_missing_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    def broken() -> object:
        raise SilentError("no answer; token=s3cr3t")

    with (tmp_path / "a.tar.gz").open("wb") as file:
        archive = Archive(file)
        archive.add("fine.txt", ["password=s3cr3t", "line"])
        archive.add_json("nodes/a/status.json", broken)
        assert archive.missing() == ["nodes/a/status.json: no answer; token=(removed)"]
        archive.close()
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        found = {each.name: tar.extractfile(each).read().decode() for each in tar}  # type: ignore[union-attr]
    assert found == {
        "podwall-bugreport/fine.txt": "password=(removed)\nline\n",
        "podwall-bugreport/missing.txt": "nodes/a/status.json: no answer; token=(removed)\n",
    }


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"{number}\n" for number in range(100_000)))
    assert list(last_lines(file, 3)) == ["99997", "99998", "99999"]


STOPPED = """
import sys, time
from pathlib import Path
from agent.cli.bugreport import _archive
with _archive(Path(sys.argv[1])) as archive:
    archive.add("a", ["x"] * 100000)
    print("begun", flush=True)
    {then}
"""


def begun(target: Path, then: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(then=then), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = begun(tmp_path / "r.tar.gz", "time.sleep(60)")
    assert [each.name.startswith(".r.tar.gz.") for each in tmp_path.iterdir()] == [True]
    sent = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert said == "interrupted; nothing is left\n"
    assert time.monotonic() - sent < 10
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing_and_an_older_archive_stays(tmp_path: Path) -> None:
    target = tmp_path / "r.tar.gz"
    target.write_text("older")
    process = begun(target, "raise RuntimeError")
    process.communicate(timeout=20)
    assert process.returncode == 1
    assert [each.name for each in tmp_path.iterdir()] == ["r.tar.gz"]
    assert target.read_text() == "older"


def test_a_place_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    from agent.cli.bugreport import _archive

    with (
        pytest.raises(click.UsageError, match="No such file or directory; -O FILE"),
        _archive(tmp_path / "no/r"),
    ):
        pass
