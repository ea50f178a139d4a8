"""A real API server and etcd on the loopback of a network namespace, for the tests of what talks to them.

    test's main thread, and those it starts --setns--> podwall-api namespace: lo
                                                       etcd <-- API server a (the one that is watched)
                                                            <-- API server b (changes things while a is away)

The namespace has nothing but its loopback, so nothing gets out and no port is taken from anybody.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cluster.client import ApiClient
from agent.cluster.credentials import Credentials, CredentialSource
from lab import netns
from tests.agent.cluster.scripted import Scripted
from tests.linux import command, inside

NETNS = f"podwall-api{os.getpid()}"
LIMIT_S = 60.0
TOKEN = "podwall-test-token"


def binaries() -> Path | None:
    """A directory with etcd and kube-apiserver: PODWALL_KUBERNETES_BIN, or what `make cluster` has built."""
    given = os.environ.get("PODWALL_KUBERNETES_BIN")
    if given:
        return Path(given)
    base = os.environ.get("PODWALL_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(base) / "podwall" / "cluster"
    found = {name: _newest(root.glob(f"go-*/bin/{name}")) for name in ("etcd", "kube-apiserver")}
    if not all(found.values()):
        return None
    links = root / "tests-bin"
    links.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        link = links / name
        temporary = links / f".{name}.{os.getpid()}"
        temporary.symlink_to(str(path))
        temporary.replace(link)
    return links


def _newest(paths: Iterator[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def until(condition: Callable[[], object], limit_s: float = LIMIT_S, what: str = "") -> None:
    """Wait until something holds, for the fixtures."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


class Server:
    """One API server process; it can be killed, frozen and started again."""

    def __init__(self, binary: Path, directory: Path, port: int) -> None:
        self.binary, self.directory, self.port = binary, directory, port
        self.url = f"https://127.0.0.1:{port}"
        self.tokens = directory / "tokens.csv"
        self.log = directory / f"apiserver-{port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        pki = self.directory
        command = [
            str(self.binary / "kube-apiserver"),
            "--etcd-servers=http://127.0.0.1:2379",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--tls-cert-file={pki}/server.crt",
            f"--tls-private-key-file={pki}/server.key",
            f"--client-ca-file={pki}/ca.crt",
            f"--token-auth-file={self.tokens}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={pki}/server.key",
            f"--service-account-key-file={pki}/server.crt",
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
            "--endpoint-reconciler-type=none",
            "--anonymous-auth=false",
            *options,
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", NETNS, *command], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        until(self.ready, what=f"API server on {self.port}: {self.log}")

    def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return self.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            state = Path(f"/proc/{self.process.pid}/stat")
            until(lambda: state.read_text().rpartition(") ")[2].startswith("T"), what="stopped")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def call(self, method: str, path: str, body: Any = None, token: str = TOKEN) -> tuple[int, Any]:
        """One request, past everything that is tested."""
        context = ssl.create_default_context(cafile=str(self.directory / "ca.crt"))
        with inside(netns.path(NETNS)):
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=30)
            try:
                kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
                headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
                data = None if body is None else json.dumps(body)
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                text = response.read()
            except http.client.HTTPException as error:
                raise OSError(str(error)) from error
            finally:
                connection.close()
        with contextlib.suppress(ValueError):
            return response.status, json.loads(text)
        return response.status, text.decode()

    def create(self, path: str, body: Any) -> Any:
        status, answer = self.call("POST", path, body)
        assert status == 201, answer
        return answer


class Cluster:
    """etcd, and two API servers on it."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.binary, self.directory = binary, directory
        self.a, self.b = Server(binary, directory, 6443), Server(binary, directory, 6444)
        self.etcd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command("ip", "netns", "add", NETNS)
        command("ip", "-n", NETNS, "link", "set", "lo", "up")
        make_certificates(self.directory)
        self.write_tokens(TOKEN)
        with (self.directory / "etcd.log").open("wb") as log:
            etcd = [
                str(self.binary / "etcd"),
                "--unsafe-no-fsync",
                "--data-dir",
                str(self.directory / "etcd"),
            ]
            self.etcd = subprocess.Popen(
                ["ip", "netns", "exec", NETNS, *etcd], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.a.start()
        self.b.start()

    def stop(self) -> None:
        self.a.kill()
        self.b.kill()
        if self.etcd is not None:
            self.etcd.kill()
            self.etcd.wait()
        subprocess.run(["ip", "netns", "del", NETNS], check=False)

    def write_tokens(self, *tokens: str) -> None:
        lines = "".join(f'{token},admin,admin,"system:masters"\n' for token in tokens)
        (self.directory / "tokens.csv").write_text(lines)

    def compact(self) -> None:
        """Forget all history in etcd, so that an old resource version is gone."""
        key = base64.b64encode(b"\0").decode()
        revision = self._etcd("/v3/kv/range", {"key": key, "limit": 1})["header"]["revision"]
        self._etcd("/v3/kv/compaction", {"revision": revision, "physical": True})

    def _etcd(self, path: str, body: Any) -> Any:
        with inside(netns.path(NETNS)):
            connection = http.client.HTTPConnection("127.0.0.1", 2379, timeout=30)
            try:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
                assert response.status == 200, answer
                return answer
            finally:
                connection.close()

    def empty(self) -> None:
        """Remove what a test has made."""
        self.b.call("DELETE", "/api/v1/nodes")
        for path in (
            "/api/v1/namespaces/default/pods?gracePeriodSeconds=0",
            "/api/v1/namespaces/default/services",
        ):
            self.b.call("DELETE", path)

    def credentials(self, **changes: Any) -> Credentials:
        ca = (self.directory / "ca.crt").read_text()
        values = {"server": self.a.url, "ca": ca, "authorization": f"Bearer {TOKEN}", **changes}
        return Credentials(**values)

    def client(self, **changes: Any) -> ApiClient:
        given = self.credentials(**changes)
        return ApiClient(CredentialSource(lambda: given))


def make_certificates(directory: Path) -> None:
    """A CA, a server certificate for 127.0.0.1 and an administrator's client certificate."""
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    ca = [
        "-CA",
        f"{directory}/ca.crt",
        "-CAkey",
        f"{directory}/ca.key",
        "-addext",
        "basicConstraints=CA:FALSE",
    ]
    for name, subject, options in (
        ("ca", "/CN=podwall-test-ca", []),
        ("server", "/CN=kube-apiserver", [*ca, "-addext", "subjectAltName=IP:127.0.0.1,DNS:api.example"]),
        ("admin", "/O=system:masters/CN=admin", ca),
        ("other", "/CN=another-ca", []),
    ):
        files = ["-keyout", f"{directory}/{name}.key", "-out", f"{directory}/{name}.crt"]
        command(*openssl, "-days", "1", "-subj", subject, *files, *options)


@pytest.fixture
def server() -> Iterator[Scripted]:
    """A server that says what a test tells it to."""
    scripted = Scripted()
    yield scripted
    scripted.close()


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    binary = binaries()
    if binary is None:
        pytest.skip("no etcd and kube-apiserver: `make cluster` builds them, or set PODWALL_KUBERNETES_BIN")
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("openssl"):
        pytest.skip("a network namespace needs root, ip and openssl")
    cluster = Cluster(binary, tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, empty and with both servers ready; the test runs in its namespace."""
    with inside(netns.path(NETNS)):
        for server in (running_cluster.a, running_cluster.b):
            if server.process is None:
                server.start()
        yield running_cluster
        running_cluster.empty()
