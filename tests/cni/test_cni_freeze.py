"""The executable: it needs nothing around it, builds alike every time, and says what it lacks to be built."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cni import freeze, wire

RESULT = {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0"}], "ips": [{"address": "fd00:10::5/128"}]}


def in_cell(plugin, cell, verb, config, **variables):
    """Run the executable in a root file system of its own, the agent's socket bound into it."""
    inside = type(plugin)(("chroot", str(cell), "/podwall"), "/agent.sock")
    return inside.run(verb, config, **variables)


@pytest.fixture
def cell_agent(stand_in, cell):
    """The stand-in's socket, moved into the cell: a Unix socket is found by its file wherever that is."""
    Path(stand_in.path).rename(cell / "agent.sock")
    return stand_in


def test_it_runs_where_there_is_nothing_else(frozen_plugin, cell, cell_agent):
    assert sorted(path.name for path in cell.iterdir()) == ["agent.sock", "netns", "podwall"]
    cell_agent.answer(
        wire.Answer(RESULT), wire.Answer(), wire.Answer(), wire.Answer(), wire.Failure(50, "no")
    )

    outcome = in_cell(frozen_plugin, cell, "VERSION", {})
    assert (outcome.status, outcome.json["cniVersion"]) == (0, "1.1.0")
    outcome = in_cell(frozen_plugin, cell, "ADD", {}, CNI_NETNS="/netns")
    assert (outcome.status, outcome.json) == (0, RESULT)
    outcome = in_cell(frozen_plugin, cell, "CHECK", {"prevResult": RESULT}, CNI_NETNS="/netns")
    assert (outcome.status, outcome.text) == (0, "")
    outcome = in_cell(frozen_plugin, cell, "DEL", {"prevResult": RESULT}, CNI_NETNS="/gone")
    assert (outcome.status, outcome.text) == (0, "")
    outcome = in_cell(frozen_plugin, cell, "GC", {"cni.dev/valid-attachments": []})
    assert (outcome.status, outcome.text) == (0, "")
    outcome = in_cell(frozen_plugin, cell, "STATUS", {})
    assert (outcome.status, outcome.json["code"]) == (1, 50)

    held = os.stat(cell / "netns")  # noqa: PTH116
    assert cell_agent.namespaces == [(held.st_dev, held.st_ino)] * 2
    assert [request.call for request in cell_agent.requests] == [
        "cni.ADD",
        "cni.CHECK",
        "cni.DEL",
        "cni.GC",
        "cni.STATUS",
    ]


def test_it_reports_errors_where_there_is_nothing_else(frozen_plugin, cell):
    outcome = in_cell(frozen_plugin, cell, "ADD", {}, CNI_NETNS="/netns")
    assert (outcome.status, outcome.json["code"]) == (1, 11)
    outcome = in_cell(frozen_plugin, cell, "ADD", {"name": "\ud83d"}, CNI_NETNS="/netns")
    assert (outcome.status, outcome.json["code"]) == (1, 7)


def test_it_is_static(frozen):
    listing = subprocess.run(
        ["readelf", "--program-headers", frozen], capture_output=True, text=True, check=True
    )
    assert "INTERP" not in listing.stdout
    assert "DYNAMIC" not in listing.stdout


def test_it_opens_only_what_it_was_told(frozen_plugin, stand_in, netns, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "calls"
    traced = type(frozen_plugin)(
        ("strace", "-o", str(log), "-e", "trace=%file", *frozen_plugin.command), frozen_plugin.socket
    )
    stand_in.answer(wire.Answer(RESULT))
    assert traced.run("ADD", CNI_NETNS=netns).status == 0
    lines = [line for line in log.read_text().splitlines() if '"/' in line]
    files = {line.partition('"')[2].partition('"')[0] for line in lines}
    # the C library asks for its own path
    assert files == {*frozen_plugin.command, netns, "/proc/self/ns/net", "/proc/self/exe"}


def test_the_same_sources_build_the_same_bytes(frozen, tmp_path):
    freeze.freeze(tmp_path / "again", tmp_path / "another-cache")
    assert (tmp_path / "again").read_bytes() == frozen.read_bytes()


def test_nothing_of_this_machine_is_inside(frozen):
    data = frozen.read_bytes()
    assert str(freeze.HERE).encode() not in data
    assert b"site-packages/cni" not in data


def test_a_running_executable_is_replaced_atomically(frozen, tmp_path):
    shutil.copy(frozen, tmp_path / "podwall")
    running = subprocess.Popen(
        [tmp_path / "podwall"], stdin=subprocess.PIPE, env={"CNI_COMMAND": "VERSION"}, stdout=-1
    )
    try:
        freeze.freeze(tmp_path / "podwall", frozen.parent / "cache")
        answer, _ = running.communicate(b"{}", timeout=10)
    finally:
        running.kill()
        running.wait()
    assert b"supportedVersions" in answer
    assert os.access(tmp_path / "podwall", os.X_OK)
    assert [path.name for path in tmp_path.iterdir()] == ["podwall"]


def test_a_build_is_kept(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(freeze, "_build", lambda *_: pytest.fail("built again"))
    freeze.freeze(tmp_path / "podwall", frozen.parent / "cache")
    assert (tmp_path / "podwall").read_bytes() == frozen.read_bytes()


def test_a_missing_library_is_named_by_its_package(tmp_path, monkeypatch):
    actual = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "LIBPL" else actual(name)
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(
        freeze.FreezeError, match=f"libpython{version}.a is missing: install .* libpython{version}-dev"
    ):
        freeze.freeze(tmp_path / "podwall", tmp_path)


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(freeze.FreezeError, match="gcc is missing: install the package gcc"):
        freeze.freeze(tmp_path / "podwall", tmp_path)


def test_a_missing_archive_is_named_by_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(freeze, "ARCHIVES", {"libpodwall-nothing.a": "libnothing-dev"})
    with pytest.raises(
        freeze.FreezeError, match=r"libpodwall-nothing.a is missing: install the package libnothing-dev"
    ):
        freeze.freeze(tmp_path / "podwall", tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(freeze, "LIBRARIES", ("-lpodwall-nothing",))
    with pytest.raises(freeze.FreezeError, match="cannot find -lpodwall-nothing"):
        freeze.freeze(tmp_path / "out" / "podwall", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(frozen, tmp_path):
    command = [sys.executable, "-m", "cni.freeze", tmp_path / "podwall", "--cache", frozen.parent / "cache"]
    subprocess.run(command, check=True, cwd=freeze.HERE.parent)
    assert (tmp_path / "podwall").read_bytes() == frozen.read_bytes()


def test_many_starts_at_once(frozen_plugin, stand_in, netns):
    """Every one of 50 parallel ADDs gets its own answer."""
    stand_in.behave = lambda connection, _: connection.sendall(wire.Answer(RESULT).encode())
    config = json.dumps(
        {"cniVersion": "1.1.0", "name": "podwall", "type": "podwall", "socket": frozen_plugin.socket}
    )
    processes = []
    for number in range(50):
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": f"c{number}",
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": netns,
        }
        process = subprocess.Popen(
            frozen_plugin.command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdin.write(config.encode())
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    outcomes = [process.communicate(timeout=30)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert all(b"fd00:10::5/128" in outcome for outcome in outcomes)
    assert {request.body["container_id"] for request in stand_in.requests} == {f"c{n}" for n in range(50)}


def test_the_stand_in_is_found_by_its_file(cell_agent, cell):
    """What the tests in the cell rely on."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(cell / "agent.sock"))
