"""The socket: who is answered, what is refused, and that no descriptor stays."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.pods import server as server_module
from agent.pods.server import Server, ServerError
from cni import spec, wire
from cni.spec import CniError
from tests.agent.waiting import eventually


async def echo(body: Mapping[str, Any], fds: list[int]) -> object:
    return {"body": dict(body), "fds": len(fds), "inodes": [os.fstat(fd).st_ino for fd in fds]}


async def refuse(body: Mapping[str, Any], _: list[int]) -> object:
    raise CniError(11, "try again", str(body.get("why", "")))


async def crash(_: Mapping[str, Any], __: list[int]) -> object:
    raise ZeroDivisionError("an accident")


async def unwritable(_: Mapping[str, Any], __: list[int]) -> object:
    return {"a": object()}


async def forever(_: Mapping[str, Any], __: list[int]) -> object:
    await asyncio.Event().wait()
    return None


HANDLERS = {"echo": echo, "refuse": refuse, "crash": crash, "unwritable": unwritable, "forever": forever}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "agent.sock"


@contextlib.asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[Server]:
    server = Server(path, HANDLERS, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def ask(
    path: Path, *pieces: bytes, fds: tuple[int, ...] = (), end: bool = False
) -> wire.Answer | wire.Failure | None:
    """Send bytes as they are and read the answer, as a binary with a time limit does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if pieces:
            connection.sendmsg([pieces[0]], rights)
        for piece in pieces[1:]:
            connection.sendall(piece)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(65536):
            received += data
    return wire.decode_answer(received[wire.HEADER :]) if received else None


async def asked(path: Path, *pieces: bytes, **options: Any) -> wire.Answer | wire.Failure | None:
    return await asyncio.to_thread(ask, path, *pieces, **options)


def request(call: str, **body: Any) -> bytes:
    return wire.Request(call, body).encode()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def open_up(path: Path, mode: int) -> None:
    path.chmod(mode)
    path.parent.chmod(0o755)


def replace_by_file(path: Path) -> None:
    path.unlink()
    path.write_text("somebody else's")


def test_a_request_with_a_descriptor(path: Path) -> None:
    async def main() -> None:
        async with serving(path):
            before = descriptors()
            for _ in range(3):
                answer = await asked(path, request("echo", a=1), fds=(0, 1))
                inodes = [os.fstat(0).st_ino, os.fstat(1).st_ino]
                assert answer == wire.Answer({"body": {"a": 1}, "fds": 2, "inodes": inodes})
            await eventually(lambda: descriptors() == before)

    asyncio.run(main())


def test_a_request_in_pieces(path: Path) -> None:
    whole = request("echo", text="ä" * 300_000)

    async def main() -> None:
        async with serving(path):
            answer = await asked(path, whole[:2], whole[2:5], whole[5:70_000], whole[70_000:])
            assert isinstance(answer, wire.Answer)

    asyncio.run(main())


BAD: dict[str, tuple[tuple[bytes, ...], dict[str, Any], int, str]] = {
    "too long": (((1 << 21).to_bytes(4, "big"),), {}, spec.DECODING_FAILURE, "length 2097152 is not between"),
    "empty": ((bytes(4),), {}, spec.DECODING_FAILURE, "length 0 is not between"),
    "no JSON": ((b"\0\0\0\3abc",), {}, spec.DECODING_FAILURE, "not UTF-8 JSON"),
    "no object": ((b"\0\0\0\2[]",), {}, spec.DECODING_FAILURE, "not a JSON object"),
    "more behind it": ((request("echo") + b"x",), {}, spec.DECODING_FAILURE, "1 bytes follow the message"),
    "cut off": ((request("echo")[:9],), {"end": True}, spec.DECODING_FAILURE, "ended in the middle"),
    "too many descriptors": (
        (request("echo"),),
        {"fds": (0, 0, 0, 0, 0)},
        spec.DECODING_FAILURE,
        "more than 4 descriptors",
    ),
    "descriptors in two parts": ((request("x" * 100_000),), {"fds": (0,)}, spec.FAILED, "no such call 'xxx"),
    "unknown call": ((request("nothing"),), {}, spec.FAILED, "no such call 'nothing'"),
    "refused by the handler": ((request("refuse"),), {}, 11, "try again"),
    "an accident in the handler": (
        (request("crash"),),
        {},
        spec.FAILED,
        "crash failed in the agent: ZeroDivisionError",
    ),
    "an answer that is no JSON": (
        (request("unwritable"),),
        {},
        spec.FAILED,
        "unwritable failed in the agent",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_answered_with_an_error(path: Path, name: str) -> None:
    pieces, options, code, message = BAD[name]

    async def main() -> None:
        async with serving(path):
            before = descriptors()
            answer = await asked(path, *pieces, **options)
            assert isinstance(answer, wire.Failure)
            assert answer.code == code
            assert message in answer.msg
            assert isinstance(await asked(path, request("echo")), wire.Answer), "others go on"
            await eventually(lambda: descriptors() == before)

    asyncio.run(main())


def test_a_peer_that_says_nothing_and_one_that_leaves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "REQUEST_LIMIT_S", 0.1)
    monkeypatch.setattr(server_module, "CALL_LIMIT_S", 0.1)

    async def main() -> None:
        async with serving(path):
            before = descriptors()
            assert await asked(path, end=True) is None
            late = await asked(path, b"\0\0")
            assert isinstance(late, wire.Failure)
            assert late.msg == "the request was not whole after 0.1 s"
            stuck = await asked(path, request("forever"), fds=(0,))
            assert isinstance(stuck, wire.Failure)
            assert (stuck.code, stuck.msg) == (spec.TRY_AGAIN_LATER, "forever did not end within 0.1 s")
            await eventually(lambda: descriptors() == before)

    asyncio.run(main())


def test_many_at_once(path: Path) -> None:
    async def main() -> None:
        async with serving(path):
            answers = await asyncio.gather(*(asked(path, request("echo", i=i), fds=(0,)) for i in range(100)))
            assert all(isinstance(answer, wire.Answer) for answer in answers)

    asyncio.run(main())


def test_calls_are_observed(path: Path) -> None:
    seen: list[tuple[str, int]] = []

    async def main() -> None:
        async with serving(path, observe=lambda call, _, code: seen.append((call, code))):
            await asked(path, request("echo"))
            await asked(path, request("refuse"))

    asyncio.run(main())
    assert seen == [("echo", 0), ("refuse", 11)]


NOBODY = """
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(5)
sys.path.insert(0, {root!r})
from cni import wire
where = os.open({directory!r}, os.O_PATH)
os.fchdir(where)
os.setuid(65534)
try:
    s.connect("agent.sock")
except PermissionError:
    print("cannot connect")
    raise SystemExit
s.sendall(wire.Request("echo", {{}}).encode())
print(wire.decode_answer(s.recv(65536)[4:]).msg)
"""


@pytest.mark.parametrize(
    ("mode", "message"), [(0o600, "cannot connect"), (0o666, "only root may ask the agent, not uid 65534")]
)
def test_another_user(path: Path, mode: int, message: str) -> None:
    program = NOBODY.format(root=str(Path.cwd()), directory=str(path.parent))

    async def main() -> str:
        async with serving(path):
            open_up(path, mode)
            command = [sys.executable, "-c", program]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, check=True
            )
            return str(done.stdout).strip()

    assert asyncio.run(main()) == message


def test_the_place_of_the_socket(path: Path) -> None:
    async def main() -> None:
        async with serving(path):
            assert (mode_of(path), mode_of(path.parent)) == (0o600, 0o700)
            with pytest.raises(ServerError, match=f"another agent serves {path}: end it first"):
                await Server(path, HANDLERS).start()
            assert isinstance(await asked(path, request("echo")), wire.Answer)

    asyncio.run(main())
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    for name in (path.name, path.name + ".new"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(str(path.with_name(name)))

    async def main() -> None:
        async with serving(path):
            assert isinstance(await asked(path, request("echo")), wire.Answer)

    asyncio.run(main())


def test_a_server_takes_only_its_own_socket_away(path: Path) -> None:
    async def main() -> None:
        async with serving(path):
            replace_by_file(path)

    asyncio.run(main())
    assert path.exists()


def open_directory(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)


def file_in_the_way(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")


def nothing_to_write_to(path: Path) -> None:
    path.parent.symlink_to("/proc/nowhere")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (open_directory, "must be root's and writable by nobody else: chown, chmod 700"),
        (file_in_the_way, "is there and is no socket; move it away"),
        (nothing_to_write_to, "cannot be made"),
    ],
)
def test_a_place_that_cannot_be_used(path: Path, prepare: Any, message: str) -> None:
    prepare(path)
    with pytest.raises(ServerError, match=message):
        asyncio.run(Server(path, HANDLERS).start())


def test_stop_lets_a_running_request_end(path: Path) -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def slow(_: Mapping[str, Any], __: list[int]) -> object:
            await release.wait()
            return "done"

        server = Server(path, {"slow": slow})
        await server.start()
        asking = asyncio.create_task(asked(path, request("slow")))
        await eventually(lambda: bool(server._serving))
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        release.set()
        await stopping
        assert await asking == wire.Answer("done")

    asyncio.run(main())
