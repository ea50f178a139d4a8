"""Small calls to a real API server, and what its refusals become."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.cluster import connection as module
from agent.cluster.client import ApiClient
from agent.cluster.connection import tls_context
from agent.cluster.credentials import Credentials, CredentialSource
from agent.cluster.errors import Conflict, NotFound, Refused, Unauthorized, Unreachable
from agent.cluster.model import Lease, Pod


@pytest.fixture
def client(cluster: Any) -> Any:
    made = cluster.client()
    yield made
    made.close()


def test_get(cluster: Any, client: ApiClient) -> None:
    body = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    cluster.b.create("/api/v1/namespaces/default/pods", body)
    pod = client.get("Pod", ("default", "p"))
    assert isinstance(pod, Pod)
    assert pod.key == ("default", "p")
    with pytest.raises(NotFound, match='pods "other" not found'):
        client.get("Pod", ("default", "other"))
    assert client.version().startswith("v1.")


@pytest.mark.parametrize("name", ["..", "a/b", "", "a?b", "a%2fb", "A", "a\r\nb"])
def test_a_name_that_is_none_is_never_asked_for(client: ApiClient, name: str) -> None:
    with pytest.raises(Refused, match="is not the name of an object"):
        client.get("Pod", ("default", name))


def test_node_condition(cluster: Any, client: ApiClient) -> None:
    cluster.b.create("/api/v1/nodes", {"metadata": {"name": "a"}})
    ready = {"type": "Ready", "status": "True", "reason": "Test"}
    cluster.b.call("PATCH", "/api/v1/nodes/a/status", {"status": {"conditions": [ready]}})
    for _ in range(2):
        client.set_node_condition("a", "NetworkUnavailable", False, "PodwallReady", "Pods can be wired")
    _, answer = cluster.b.call("GET", "/api/v1/nodes/a")
    conditions = {c["type"]: c for c in answer["status"]["conditions"]}
    assert set(conditions) == {"Ready", "NetworkUnavailable"}
    assert conditions["NetworkUnavailable"]["status"] == "False"
    assert conditions["NetworkUnavailable"]["reason"] == "PodwallReady"
    node: Any = client.get("Node", "a")
    assert (node.ready, node.network_unavailable) == (True, False)


def test_events(cluster: Any, client: ApiClient) -> None:
    note = "ü" * 2000
    client.create_event(
        "NetworkPolicy", ("default", "api"), "some-uid", reason="NotUsable", note=note, action="Compile"
    )
    client.create_event("Node", "a", "", reason="Ready", note="well", action="Start", warning=False)
    _, answer = cluster.b.call("GET", "/apis/events.k8s.io/v1/namespaces/default/events")
    found = {item["reason"]: item for item in answer["items"]}
    policy = found["NotUsable"]
    assert policy["regarding"]["apiVersion"] == "networking.k8s.io/v1"
    assert (policy["regarding"]["name"], policy["type"]) == ("api", "Warning")
    assert 1000 < len(policy["note"].encode()) <= 1024
    assert (found["Ready"]["regarding"]["kind"], found["Ready"]["type"]) == ("Node", "Normal")


def test_an_event_with_a_name_is_made_once(cluster: Any, client: ApiClient) -> None:
    """All nodes' agents say the same of a policy."""

    def say(note: str) -> None:
        client.create_event(
            "NetworkPolicy",
            ("default", "api"),
            "uid",
            reason="UnusableFields",
            note=note,
            action="Compile",
            event="api.0123456789abcdef",
        )

    say("first")
    with pytest.raises(Conflict):
        say("second")
    _, answer = cluster.b.call("GET", "/apis/events.k8s.io/v1/namespaces/default/events/api.0123456789abcdef")
    assert answer["note"] == "first"


def test_versions_as_they_are_now(cluster: Any, client: ApiClient) -> None:
    """Of a namespace's policies the newest, and of one Namespace; what a watch has to reach."""
    policies = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
    assert client.newest("NetworkPolicy", "default") == 0
    made = [
        int(
            cluster.b.create(policies, {"metadata": {"name": name}, "spec": {}})["metadata"][
                "resourceVersion"
            ]
        )
        for name in ("a", "b")
    ]
    try:
        assert client.newest("NetworkPolicy", "default") == max(made)
        assert 0 < client.version_of("Namespace", "default") < min(made)
        with pytest.raises(NotFound):
            client.version_of("Namespace", "nowhere")
    finally:
        cluster.b.call("DELETE", policies)


def test_metadata_alone_page_by_page(
    cluster: Any, client: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.cluster.client.PAGE", 2)
    pods = "/api/v1/namespaces/named/pods"
    cluster.b.create("/api/v1/namespaces", {"metadata": {"name": "named"}})
    try:
        for name in ("a", "b", "c"):
            container = {"name": "c", "image": "i", "ports": [{"containerPort": 80}]}
            meta = {"name": name, "labels": {"app": name}}
            cluster.b.create(pods, {"metadata": meta, "spec": {"containers": [container]}})
        found = [each for each in client.metadata("Pod", "named") if isinstance(each, Pod)]
        assert [(pod.key, pod.labels, pod.ports) for pod in found] == [
            (("named", name), {"app": name}, ()) for name in ("a", "b", "c")
        ]
        assert ("named", "a") in {each.key for each in client.metadata("Pod")}
    finally:
        cluster.b.call("DELETE", f"{pods}?gracePeriodSeconds=0")
        cluster.b.call("DELETE", "/api/v1/namespaces/named")
    with pytest.raises(Refused, match="is not the name of an object"):
        next(client.metadata("Pod", "../a"))


def test_leases(cluster: Any, client: ApiClient) -> None:
    now = datetime.now(UTC)
    lease = Lease("default", "podwall", "node-a", 15, now, now, 1)
    with pytest.raises(NotFound):
        client.get_lease("default", "podwall")
    made = client.create_lease(lease)
    try:
        assert made.resource_version
        assert (made.holder, made.acquired, made.transitions) == ("node-a", now, 1)
        with pytest.raises(Conflict):
            client.create_lease(lease)
        renew = Lease("default", "podwall", "node-b", 15, now, now, 2, made.resource_version)
        assert client.update_lease(renew).holder == "node-b"
        with pytest.raises(Conflict):
            client.update_lease(renew)
        current = client.get_lease("default", "podwall")
        assert current.holder == "node-b"
        with pytest.raises(Conflict):
            client.delete_lease(made)
        client.delete_lease(current)
        with pytest.raises(NotFound):
            client.delete_lease(current)
    finally:
        cluster.b.call("DELETE", "/apis/coordination.k8s.io/v1/namespaces/default/leases/podwall")


def test_refusals(cluster: Any) -> None:
    with pytest.raises(Unauthorized) as refused:
        cluster.client(authorization="Bearer wrong").get("Node", "a")
    assert refused.value.status == 401
    with pytest.raises(Unreachable, match="certificate verify failed"):
        cluster.client(ca=(cluster.directory / "other.crt").read_text()).version()
    with pytest.raises(Unreachable, match="Connection refused"):
        cluster.client(server="https://127.0.0.1:1").version()
    with pytest.raises(Unauthorized, match="cannot be used"):
        cluster.client(ca="nonsense").version()
    with pytest.raises(Unreachable, match=r"Hostname mismatch|doesn't match"):
        cluster.client(server_name="other.example").version()


def test_a_name_that_the_certificate_has(cluster: Any) -> None:
    client = cluster.client(server_name="api.example")
    assert client.version()
    client.close()


def test_client_certificate_and_no_token(cluster: Any) -> None:
    files = {"certificate": "admin.crt", "key": "admin.key"}
    pem = {name: (cluster.directory / file).read_text() for name, file in files.items()}
    client = cluster.client(authorization="", **pem)
    with pytest.raises(NotFound):
        client.get("Node", "a")
    client.close()


def test_new_credentials_after_a_refusal(cluster: Any) -> None:
    wrong = cluster.credentials(authorization="Bearer wrong")
    answers = iter([wrong, cluster.credentials()])
    client = ApiClient(CredentialSource(lambda: next(answers)))
    assert client.version()
    client.close()


def test_connections_are_used_again_and_replaced_when_dead(cluster: Any, client: ApiClient) -> None:
    opened: list[object] = []
    make = client.connection

    def counted() -> Any:
        opened.append(None)
        return make()

    client.connection = counted  # type: ignore[method-assign]
    for _ in range(5):
        client.version()
    assert len(opened) == 1
    cluster.a.kill()
    cluster.a.start()
    client.version()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client.version(), range(64)))


def test_a_frozen_server(cluster: Any) -> None:
    given = cluster.credentials()
    hasty = ApiClient(CredentialSource(lambda: given), answer_s=0.3)
    cluster.a.send(signal.SIGSTOP)
    try:
        connection = hasty.connection()
        with pytest.raises(Unreachable, match="no answer in time"):
            connection.request("GET", "/version")
        assert not connection.open
    finally:
        cluster.a.send(signal.SIGCONT)


def test_abort_from_another_thread(cluster: Any, client: ApiClient) -> None:
    connection = client.connection()
    response = connection.request("GET", "/api/v1/nodes?watch=1&timeoutSeconds=60")
    threading.Timer(0.1, connection.abort).start()
    begun = time.monotonic()
    with pytest.raises(Unreachable):
        list(connection.lines(response, 60.0))
    assert time.monotonic() - begun < 5
    with pytest.raises(Unreachable, match="not wanted any more"):
        connection.request("GET", "/version")


def test_keys_never_touch_a_disk(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    certificate = (cluster.directory / "admin.crt").read_text()
    key = (cluster.directory / "admin.key").read_text()
    load = module.ssl.SSLContext.load_cert_chain

    def watched(self: Any, certfile: str, *rest: Any) -> None:
        opened.append(certfile)
        load(self, certfile, *rest)

    monkeypatch.setattr(module.ssl.SSLContext, "load_cert_chain", watched)
    given = Credentials("https://127.0.0.1:6443", certificate=certificate, key=key, verify=False)
    assert tls_context(given) is not None
    assert opened[0].startswith("/proc/self/fd/")
    assert tls_context(replace(given, server="http://127.0.0.1:80")) is None


def test_through_a_proxy(cluster: Any) -> None:
    with Proxy() as proxy:
        client = cluster.client(proxy=f"http://127.0.0.1:{proxy.port}")
        assert client.version()
        assert [line.split()[:2] for line in proxy.asked] == [[b"CONNECT", b"127.0.0.1:6443"]]
        client.close()


class Proxy:
    """Passes one connection on, as CONNECT asks."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer, peer.makefile("rb", buffering=0) as lines:
            self.asked.append(lines.readline().strip())
            while lines.readline().strip():
                pass
            with socket.create_connection(("127.0.0.1", 6443)) as server:
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=self._pass, args=(server, peer))
                back.start()
                self._pass(peer, server)
                back.join(10)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
