"""Credentials: from where, and when they are read again."""

from __future__ import annotations

import base64
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.cluster.credentials import (
    Credentials,
    CredentialSource,
    credential_source,
    find_api_server,
    from_kubeconfig,
    from_service_account,
    states,
)
from agent.cluster.errors import Unauthorized


def kubeconfig(path: Path, user: dict[str, Any], cluster: dict[str, Any] | None = None, **more: Any) -> Path:
    other = {"server": "https://other.example:6443"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "main",
        "contexts": [
            {"name": "main", "context": {"cluster": "main", "user": "main"}},
            {"name": "other", "context": {"cluster": "other", "user": "nobody"}},
        ],
        "clusters": [
            {"name": "main", "cluster": {"server": "https://192.0.2.1:6443", **(cluster or {})}},
            {"name": "other", "cluster": other},
        ],
        "users": [{"name": "main", "user": user}, {"name": "nobody", "user": {}}],
        **more,
    }
    path.write_text(json.dumps(config))
    return path


def test_token_and_authority(tmp_path: Path) -> None:
    ca = base64.b64encode(b"-----CA-----").decode()
    path = kubeconfig(
        tmp_path / "config",
        {"token": "secret"},
        {"certificate-authority-data": ca, "tls-server-name": "api", "proxy-url": "http://192.0.2.9:3128"},
    )
    found = from_kubeconfig(path)
    assert (found.server, found.authorization, found.ca) == (
        "https://192.0.2.1:6443",
        "Bearer secret",
        "-----CA-----",
    )
    assert (found.server_name, found.proxy, found.verify) == ("api", "http://192.0.2.9:3128", True)
    assert "secret" not in repr(found)
    assert [file[0] for file in found.files] == [str(path)]


def test_files_beside_the_kubeconfig(tmp_path: Path) -> None:
    for name in ("ca", "cert", "key", "token"):
        (tmp_path / name).write_text(f"the {name}\n")
    user = {"client-certificate": "cert", "client-key": "key", "tokenFile": "token"}
    path = kubeconfig(tmp_path / "config", user, {"certificate-authority": "ca"})
    found = from_kubeconfig(path)
    assert (found.ca, found.certificate, found.key) == ("the ca\n", "the cert\n", "the key\n")
    assert found.authorization.strip() == "Bearer the token"
    assert {Path(file[0]).name for file in found.files} == {"config", "ca", "cert", "key", "token"}


def test_context_and_server_by_configuration(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "config", {"token": "secret"})
    assert from_kubeconfig(path, "other").server == "https://other.example:6443"
    assert from_kubeconfig(path, "other").authorization == ""
    assert from_kubeconfig(path, api_server="https://192.0.2.7:443").server == "https://192.0.2.7:443"


def plugin(tmp_path: Path, body: str) -> dict[str, Any]:
    script = tmp_path / "plugin.py"
    script.write_text(body)
    version = "client.authentication.k8s.io/v1"
    return {
        "exec": {
            "apiVersion": version,
            "command": sys.executable,
            "args": [str(script)],
            "interactiveMode": "Never",
        }
    }


def test_exec_plugin(tmp_path: Path) -> None:
    ends = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    status = {"token": "from-plugin", "expirationTimestamp": ends.isoformat().replace("+00:00", "Z")}
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    found = from_kubeconfig(
        kubeconfig(tmp_path / "config", plugin(tmp_path, f"print({json.dumps(json.dumps(answer))})"))
    )
    assert found.authorization == "Bearer from-plugin"
    assert found.expires == ends.timestamp()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("", "file is empty"),
        ("{", "while parsing"),
        ("{}", "Invalid kube-config"),
        ("current-context: x\ncontexts: []", "x"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Unauthorized, match=f"(?s){path}: .*{message}"):
        from_kubeconfig(path)


def test_a_plugin_that_fails(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "config", plugin(tmp_path, "raise SystemExit(3)"))
    with pytest.raises(Unauthorized, match="exec plugin failed"):
        from_kubeconfig(path)


def test_service_account(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t\n")
    (tmp_path / "ca.crt").write_text("ca")
    found = from_service_account(tmp_path, "https://192.0.2.1:6443")
    assert (found.authorization, found.ca) == ("Bearer t", "ca")
    (tmp_path / "token").unlink()
    with pytest.raises(Unauthorized, match="set kubeconfig to a file"):
        from_service_account(tmp_path, "https://192.0.2.1:6443")


@pytest.mark.parametrize(
    ("configured", "kubelet", "environment", "expected"),
    [
        ("https://192.0.2.9:1", True, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://192.0.2.9:1"),
        ("auto", True, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://192.0.2.1:6443"),
        ("auto", False, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://10.96.0.1:443"),
        (
            "auto",
            False,
            {"KUBERNETES_SERVICE_HOST": "fd00:96::1", "KUBERNETES_SERVICE_PORT": "6443"},
            "https://[fd00:96::1]:6443",
        ),
    ],
)
def test_where_the_api_server_is(
    tmp_path: Path, configured: str, kubelet: bool, environment: dict[str, str], expected: str
) -> None:
    path = tmp_path / "kubelet.conf"
    if kubelet:
        kubeconfig(path, {"client-certificate": "/var/lib/kubelet/pki/kubelet-client-current.pem"})
    assert find_api_server(configured, path, environment) == expected


@pytest.mark.parametrize(
    "content", ["{", "[]", "clusters: 7", "{current-context: x, contexts: [], clusters: []}"]
)
def test_a_kubelet_kubeconfig_that_says_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kubelet.conf"
    path.write_text(content)
    with pytest.raises(Unauthorized, match="set api_server"):
        find_api_server("auto", path, {})


class Reader:
    """Counts how often credentials are read."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.times = 0

    def __call__(self) -> Credentials:
        self.times += 1
        files = states(self.values.get("paths", ()))
        return Credentials(f"https://{self.times}", expires=self.values.get("expires"), files=files)


def test_read_again_when_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("1")
    reader = Reader(paths=[str(path)])
    source = CredentialSource(reader)
    assert source.current() is source.current()
    new = tmp_path / "new"
    new.write_text("2")
    new.replace(path)
    assert source.current().server == "https://2"
    path.unlink()
    assert source.current().server == "https://3"
    assert (source.current().server, reader.times) == ("https://3", 3)


def test_read_again_before_the_end() -> None:
    now = 1000.0
    reader = Reader(expires=2000.0)
    source = CredentialSource(reader, clock=lambda: now)
    source.current()
    now = 1960.0
    source.current()
    assert reader.times == 1
    now = 1975.0
    source.current()
    source.current()
    assert reader.times == 2, "not at every request while the new ones end as soon"
    now = 1985.0
    source.current()
    assert reader.times == 3


def test_read_again_after_a_refusal() -> None:
    reader = Reader()
    source = CredentialSource(reader)
    first = source.current()
    source.refused(first)
    second = source.current()
    source.refused(first)
    assert (source.current(), reader.times) == (second, 2)


def test_the_package_is_in_the_child_only(tmp_path: Path) -> None:
    """The agent's memory is the reason for the child."""
    path = kubeconfig(tmp_path / "config", {"token": "secret"})
    source = credential_source(kubeconfig=path)
    begun = time.monotonic()
    assert source.current().authorization == "Bearer secret"
    assert time.monotonic() - begun < 20
    assert "kubernetes" not in sys.modules
