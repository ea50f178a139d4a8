"""A stand-in for the agent on a real socket, the plugin as containerd runs it, and namespaces to pass on."""

import array
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cni import freeze, wire

ROOT = Path(__file__).parents[2]
CONFIG = {
    "cniVersion": "1.1.0",
    "name": "podwall",
    "type": "podwall",
    "capabilities": {"bandwidth": True, "portMappings": True},
}


@dataclass
class StandIn:
    """Answers every connection by `behave`, and keeps what came and the descriptors that came with it."""

    path: str
    behave: Callable[[socket.socket, wire.Request | None], None]
    requests: list[wire.Request] = field(default_factory=list)
    namespaces: list[tuple[int, int]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def answer(self, *answers: wire.Answer | wire.Failure) -> None:
        """Give these answers, one a connection."""
        left = list(answers)
        self.behave = lambda connection, _: connection.sendall(left.pop(0).encode())

    def serve(self, listener: socket.socket) -> None:
        while not self.stopped.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.settimeout(10)
                    self._one(connection)

    def _one(self, connection: socket.socket) -> None:
        receiver, payload = wire.Receiver(), None
        while payload is None:
            data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(4 * wire.DESCRIPTORS))
            if not data:
                return
            for level, kind, content in ancillary:
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                self._keep(array.array("i", content))
            payload = receiver.receive(data)
        self.requests.append(wire.decode_request(payload))
        self.behave(connection, self.requests[-1])

    def _keep(self, descriptors: array.array) -> None:
        for descriptor in descriptors:
            status = os.fstat(descriptor)
            self.namespaces.append((status.st_dev, status.st_ino))
            os.close(descriptor)


@dataclass(frozen=True)
class Outcome:
    status: int
    text: str

    @property
    def json(self) -> dict:
        return json.loads(self.text)


@dataclass(frozen=True)
class Plugin:
    """The plugin as a container runtime runs it: variables in a small environment, configuration on stdin."""

    command: tuple[str, ...]
    socket: str

    def run(
        self, verb: str, config: object = None, *, stdin: bytes | None = None, **variables: str
    ) -> Outcome:
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": "3f6940ab5ab43bc522569d15b23f8c1b",
            "CNI_NETNS": "",
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;"
            "K8S_POD_INFRA_CONTAINER_ID=3f6940ab5ab43bc522569d15b23f8c1b;K8S_POD_UID=5b1c",
            "CNI_PATH": "/opt/cni/bin",
            "PATH": "/usr/sbin:/usr/bin",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        if config is None:
            config = {}
        if isinstance(config, dict):
            config = {**CONFIG, "socket": self.socket, **config}
        done = subprocess.run(
            self.command,
            input=json.dumps(config).encode() if stdin is None else stdin,
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.stderr == b""
        return Outcome(done.returncode, done.stdout.decode())


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    path = str(tmp_path / "agent.sock")
    server = StandIn(path, lambda connection, _: connection.sendall(wire.Answer().encode()))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(0.05)
        thread = threading.Thread(target=server.serve, args=(listener,))
        thread.start()
        yield server
        server.stopped.set()
        thread.join(timeout=15)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("frozen")
    freeze.freeze(directory / "podwall", directory / "cache")
    return directory / "podwall"


@pytest.fixture(params=["python", "frozen"])
def plugin(request: pytest.FixtureRequest, tmp_path: Path) -> Plugin:
    """The plugin run by the interpreter and as the executable: both must behave alike."""
    if request.param == "python":
        command: tuple[str, ...] = (sys.executable, "-m", "cni")
    else:
        command = (str(request.getfixturevalue("frozen")),)
    return Plugin(command, str(tmp_path / "agent.sock"))


@pytest.fixture
def frozen_plugin(frozen: Path, tmp_path: Path) -> Plugin:
    return Plugin((str(frozen),), str(tmp_path / "agent.sock"))


@pytest.fixture
def netns() -> Iterator[str]:
    """The path of a network namespace of its own, held by a sleeping process."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    path = f"/proc/{holder.pid}/ns/net"
    try:
        own = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
        limit = time.monotonic() + 10
        while os.stat(path).st_ino == own:  # noqa: PTH116
            assert time.monotonic() < limit
            time.sleep(0.005)
        yield path
    finally:
        holder.kill()
        holder.wait()


@pytest.fixture
def cell(frozen: Path, netns: str, tmp_path: Path) -> Iterator[Path]:
    """A directory to chroot into that holds the executable and a namespace, nothing else."""
    directory = tmp_path / "cell"
    directory.mkdir()
    shutil.copy(frozen, directory / "podwall")
    (directory / "netns").touch()
    subprocess.run(["mount", "--bind", netns, directory / "netns"], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory / "netns"], check=True)
