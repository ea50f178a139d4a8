"""Who the agent is to the API server, and where that server is.

    kubeconfig --a child process with the `kubernetes` package--> JSON --+
    service account's token and CA ----------------------------------------+--> Credentials, until they change

The child is there because the package costs 20 MB of memory for as long as a process lives, and is needed for
a moment only.  It follows contexts, runs exec plugins, and knows all forms of a kubeconfig.  Credentials are
read again when one of their files changes, when they expire, and after the server refused them.

Where the API server is: the configuration says so, or the kubeconfig, or the kubeconfig of the node's
kubelet, or the Pod's environment.  The last is a ClusterIP, which nobody serves at boot when podwall is what
serves them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from .errors import Unauthorized

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
KUBELET_KUBECONFIG = Path("/etc/kubernetes/kubelet.conf")
CHILD_LIMIT_S = 60.0
EARLY_S = 30.0
"""How long before their end credentials are read again."""
PAUSE_S = 5.0
"""How long credentials are used even if they end sooner."""

Environment: TypeAlias = Mapping[str, str]
FileState: TypeAlias = tuple[str, int, int, int]
"""Path, time of the last change, size and inode; zeros for a file that is not there."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to reach the API server and what to show it; certificates and keys are PEM, `expires` is Unix time.

    `files` are those that it was read from, as they were before.
    """

    server: str
    ca: str = ""
    certificate: str = ""
    key: str = field(default="", repr=False)
    authorization: str = field(default="", repr=False)
    verify: bool = True
    server_name: str = ""
    proxy: str = ""
    expires: float | None = None
    files: tuple[FileState, ...] = ()


class CredentialSource:
    """The present credentials; safe to use from several threads.

    `read` raises Unauthorized; `clock` gives Unix time.
    """

    def __init__(self, read: Callable[[], Credentials], clock: Callable[[], float] = time.time) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._current: Credentials | None = None
        self._read_at = 0.0

    def current(self) -> Credentials:
        """The credentials to use now, read anew if need be.  Raises Unauthorized."""
        with self._lock:
            if self._current is None or self._stale(self._current):
                self._current = self._read()
                self._read_at = self._clock()
            return self._current

    def refused(self, credentials: Credentials) -> None:
        """Say that the server did not accept these, so that the next ones are read anew."""
        with self._lock:
            if credentials is self._current:
                self._current = None

    def _stale(self, credentials: Credentials) -> bool:
        now, expires = self._clock(), credentials.expires
        if expires is not None and now > expires - EARLY_S and now - self._read_at > PAUSE_S:
            return True
        return states(file[0] for file in credentials.files) != credentials.files


def credential_source(
    *,
    kubeconfig: Path | None = None,
    context: str = "",
    api_server: str = "auto",
    kubelet_kubeconfig: Path = KUBELET_KUBECONFIG,
    service_account: Path = SERVICE_ACCOUNT,
    environment: Environment = os.environ,
) -> CredentialSource:
    """The credentials of a kubeconfig, or of the Pod's service account when none is given."""

    def read() -> Credentials:
        if kubeconfig is not None:
            return from_kubeconfig(kubeconfig, context, api_server)
        server = find_api_server(api_server, kubelet_kubeconfig, environment)
        return from_service_account(service_account, server)

    return CredentialSource(read)


def states(paths: Iterable[str]) -> tuple[FileState, ...]:
    """What tells a file's versions apart."""
    return tuple(_state(path) for path in paths)


def _state(path: str) -> FileState:
    try:
        status = os.stat(path)  # noqa: PTH116 - on every request
    except OSError:
        return path, 0, 0, 0
    return path, status.st_mtime_ns, status.st_size, status.st_ino


# In a Pod


def from_service_account(directory: Path, server: str) -> Credentials:
    """What the kubelet puts into every Pod.  Raises Unauthorized."""
    token, ca = directory / "token", directory / "ca.crt"
    files = states((str(token), str(ca)))
    try:
        return Credentials(
            server, ca=ca.read_text(), authorization=f"Bearer {token.read_text().strip()}", files=files
        )
    except (OSError, UnicodeDecodeError) as error:
        raise Unauthorized(
            f"no credentials for the API server: {error}; outside of a Pod, set kubeconfig to a file"
        ) from error


def find_api_server(configured: str, kubelet_kubeconfig: Path, environment: Environment) -> str:
    """The API server's URL for a Pod on its node's network.  Raises Unauthorized when nothing says it."""
    if configured != "auto":
        return configured
    server = _kubelet_server(kubelet_kubeconfig)
    if server:
        return server
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise Unauthorized(
            f"nothing says where the API server is: set api_server, or make {kubelet_kubeconfig} readable"
        )
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _kubelet_server(path: Path) -> str:
    """The server of the kubeconfig's current context; "" when there is no such file or it does not say."""
    import yaml  # noqa: PLC0415 - only nodes without another source of the address need it

    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):
        config = yaml.safe_load(path.read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        server = _named(config["clusters"], context["cluster"])["cluster"]["server"]
        return server.rstrip("/") if isinstance(server, str) else ""
    return ""


def _named(entries: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise LookupError(name)


# By kubeconfig, in a child process


def from_kubeconfig(path: Path, context: str = "", api_server: str = "auto") -> Credentials:
    """What a kubeconfig says; several files may be joined by ':'.  Raises Unauthorized."""
    command = [sys.executable, "-m", "agent.cluster.credentials", str(path), context]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHILD_LIMIT_S, check=False
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise Unauthorized(f"{path}: credentials were not ready in {CHILD_LIMIT_S:.0f} s") from error
    except (OSError, ValueError) as error:
        said = done.stderr.decode(errors="replace").strip()[-500:] if isinstance(error, ValueError) else error
        raise Unauthorized(f"{path}: credentials cannot be read: {said}") from error
    if "error" in answer:
        raise Unauthorized(f"{path}: {answer['error']}")
    answer["files"] = tuple(tuple(file) for file in answer["files"])
    if api_server != "auto":
        answer["server"] = api_server
    return Credentials(**answer)


def _load(path: str, context: str) -> Credentials:
    """Read a kubeconfig by the `kubernetes` package.  Raises what it raises."""
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger  # noqa: PLC0415

    files = states(_files(KubeConfigMerger(path)))  # before anything is read that counts
    merged = KubeConfigMerger(path).config
    if merged is None:
        raise ValueError("there is no such file, or nothing in it")
    loader = KubeConfigLoader(config_dict=merged, active_context=context or None, config_base_path=None)
    settings = _Settings()
    loader.load_and_set(settings)
    known = vars(loader)
    user = loader.current_context["context"].get("user", "")
    if not known.get("token") and not settings.cert_file and _needs_credentials(merged, user):
        raise ValueError(f"user {user!r} has no token and no certificate, or its exec plugin failed")
    expiry = known.get("expiry")
    return Credentials(
        server=settings.host,
        ca=_text(settings.ssl_ca_cert),
        certificate=_text(settings.cert_file),
        key=_text(settings.key_file),
        authorization=known.get("token") or "",
        verify=settings.verify_ssl,
        server_name=settings.tls_server_name or "",
        proxy=settings.proxy or "",
        expires=expiry.timestamp() if expiry else None,
        files=files,
    )


class _Settings:
    """What the loader sets, as on the package's own configuration."""

    def __init__(self) -> None:
        self.host = ""
        self.ssl_ca_cert: str | None = None
        self.cert_file: str | None = None
        self.key_file: str | None = None
        self.verify_ssl = True
        self.tls_server_name: str | None = None
        self.proxy: str | None = None
        self.api_key: dict[str, str] = {}


def _files(merger: Any) -> list[str]:
    """The kubeconfig's own files and all those it names."""
    names = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
    paths = [str(path) for path in merger.paths]
    for section, part in (("clusters", "cluster"), ("users", "user")):
        for entry in merger.config.value.get(section) or () if merger.config else ():
            named = entry.value.get(part) or {}
            base = Path(entry.path).absolute().parent
            paths += [str(base / named[name]) for name in names if named.get(name)]
    return paths


def _needs_credentials(merged: Any, user: str) -> bool:
    """Does the user's entry say anything that should have given credentials?"""
    return any(entry["user"] for entry in merged.value.get("users") or () if entry["name"] == user)


def _text(path: str | None) -> str:
    return Path(path).read_text() if path else ""


def main(arguments: list[str]) -> None:
    """Print the credentials of a kubeconfig as JSON, or why there are none."""
    try:
        answer = asdict(_load(*arguments))
    except Exception as error:  # whatever a plugin or the package raises is the answer
        answer = {"error": f"{error}" or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
