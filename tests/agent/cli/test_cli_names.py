"""The names that Tab offers: which words of which cluster, and of whom they are asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from click.shell_completion import ShellComplete

from agent.cli.completion import VARIABLE
from agent.cli.connection import SOURCE, TARGET, WORDS
from agent.cli.main import main
from agent.cli.names import LIMIT_S, NAMESPACE, NODE, SHORT, Takes, kinds_of, meant, offers, ports_of, split
from agent.cli.plan import WORDS as DELETED
from agent.cluster.model import (
    ContainerPort,
    Namespace,
    NetworkPolicy,
    Node,
    Object,
    Owner,
    Pod,
    Service,
    ServicePort,
)
from agent.cluster.store import snapshot_of

HASH = "7d9c5b8f4"


def pod(name: str, *owners: Owner, namespace: str = "shop", **more: Any) -> Pod:
    labels = {"pod-template-hash": HASH} if any(each.kind == "ReplicaSet" for each in owners) else {}
    return Pod(namespace, name, labels=labels, owners=owners, **more)


def owner(kind: str, name: str) -> Owner:
    return Owner(kind, name, controller=True)


SHOP: list[Object] = [
    Namespace("shop"),
    Namespace("data"),
    Node("worker"),
    pod(f"web-{HASH}-x2xkq", owner("ReplicaSet", f"web-{HASH}"), ports=(ContainerPort("http", 8080),)),
    pod("db-0", owner("StatefulSet", "db"), namespace="data", ports=(ContainerPort("", 5432),)),
    pod("done", phase="Succeeded"),
    Service("shop", "web", ports=(ServicePort(80, "http"), ServicePort(53, protocol="UDP"))),
    Service("shop", "api"),
    NetworkPolicy("shop", "deny"),
]
POD = f"web-{HASH}-x2xkq"

OFFERED = [
    ("nothing yet", SOURCE, "", [POD, "svc/api", "svc/web", "deploy/web", "node/worker", "data/"]),
    ("a name begun", SOURCE, "we", [POD, "web"]),
    ("a name begun of a node", SOURCE, "wor", ["worker"]),
    ("a kind begun", SOURCE, "de", ["deploy/web"]),
    ("a kind", SOURCE, "svc/", ["svc/api", "svc/web", "svc/data/"]),
    ("a kind by another word", SOURCE, "Services/w", ["Services/web"]),
    ("a kind without namespaces", SOURCE, "node/", ["node/worker"]),
    ("a namespace", SOURCE, "data/", ["data/db-0", "data/db"]),
    ("a namespace and a name begun", SOURCE, "data/db-", ["data/db-0"]),
    ("a kind and a namespace", SOURCE, "sts/data/", ["sts/data/db"]),
    ("a namespace that is not there", SOURCE, "nowhere/", []),
    ("a kind that has none there", SOURCE, "job/", ["job/data/"]),
    ("Pods alone", Takes(("Pod",)), "", [POD, "data/"]),
    ("Services alone", Takes(("Service",)), "", ["api", "web", "data/"]),
    ("Services alone, of a namespace", Takes(("Service",)), "shop/", ["shop/api", "shop/web"]),
    ("nodes", NODE, "", ["worker"]),
    ("what is deleted", Takes(words=DELETED), "n", ["netpol/deny", "ns/data", "ns/shop"]),
    ("what is deleted, of a kind", Takes(words=DELETED), "netpol/", ["netpol/deny", "netpol/data/"]),
    ("words that are always there", Takes(("Node",), others=("outside",)), "o", ["outside"]),
]


@pytest.mark.parametrize(
    ("takes", "text", "words"), [case[1:] for case in OFFERED], ids=[c[0] for c in OFFERED]
)
def test_the_words_that_may_stand_there(takes: Takes, text: str, words: list[str]) -> None:
    assert [each.word for each in offers(snapshot_of(SHOP), takes, text, "shop")] == words


def test_a_word_says_what_it_is_and_whether_more_may_follow() -> None:
    found = {each.word: (each.help, each.open) for each in offers(snapshot_of(SHOP), SOURCE, "", "shop")}
    assert found[POD] == ("Pod", False)
    assert found["deploy/web"] == ("Deployment", False)
    assert found["data/"] == ("Namespace", True)
    targets = offers(snapshot_of(SHOP), TARGET, "svc/api", "shop")
    assert [tuple(each) for each in targets] == [("svc/api", "Service", True)]


def test_a_name_that_two_have_is_offered_with_the_kind_alone() -> None:
    both = snapshot_of([*SHOP, pod("api")])
    assert [each.word for each in offers(both, SOURCE, "", "shop")][:2] == ["pod/api", POD]
    assert [each.word for each in offers(both, SOURCE, "api", "shop")] == []
    assert [each.word for each in offers(both, SOURCE, "svc/a", "shop")] == ["svc/api"]


def test_a_name_that_two_workloads_have_is_offered_with_the_kind_alone() -> None:
    two = snapshot_of([pod("a-1", owner("DaemonSet", "a")), pod("a-2", owner("StatefulSet", "a"))])
    assert [each.word for each in offers(two, SOURCE, "a", "shop")] == ["a-1", "a-2"]
    assert [each.word for each in offers(two, SOURCE, "", "shop")] == ["a-1", "a-2", "ds/a", "sts/a"]


def test_a_namespace_may_be_called_as_two_workloads() -> None:
    two = [pod("a-1", owner("DaemonSet", "a")), pod("a-2", owner("StatefulSet", "a"))]
    found = offers(snapshot_of([*two, Namespace("a")]), NAMESPACE, "", "shop")
    assert [each.word for each in found] == ["a"]


def test_all_namespaces() -> None:
    everywhere = snapshot_of([*SHOP, pod("db-0")])
    found = offers(everywhere, Takes(("Pod",), spaces=False), "", "")
    assert [each.word for each in found] == ["db-0", POD]


HOSTILE = [
    "a b",
    "a;b",
    "$(id)",
    "`id`",
    "a\nplain,b",
    "a\x1b[2J",
    "*",
    "a,b",
    "A",
    "-x",
    "a'",
    "../a",
    "a:b",
]


@pytest.mark.parametrize("name", HOSTILE, ids=map(ascii, HOSTILE))
def test_what_is_no_name_of_kubernetes_is_not_offered(name: str) -> None:
    objects: list[Object] = [
        Namespace(name),
        Node(name),
        pod(name),
        pod("fine", namespace=name),
        pod("made", owner("Job", name)),
        Service("shop", name),
        NetworkPolicy("shop", name),
    ]
    snapshot = snapshot_of(objects)
    for takes in (SOURCE, TARGET, NODE, Takes(words=DELETED), Takes(("Pod", "Namespace"), spaces=False)):
        for namespace in ("shop", ""):
            words = {each.word for each in offers(snapshot, takes, "", namespace)}
            assert words <= {"made", "pod/made"}


def test_a_kind_of_somebody_elses_is_not_said() -> None:
    snapshot = snapshot_of([pod("x-1", owner("Roll\n\x1b[2J:0", "x"))])
    found = offers(snapshot, SOURCE, "", "shop")
    assert [tuple(each) for each in found] == [("x-1", "Pod", False), ("x", "Workload", False)]


def test_ports_by_number_and_name() -> None:
    snapshot = snapshot_of(SHOP)

    def ports(name: str, takes: Takes = TARGET) -> list[str]:
        item = meant(snapshot, takes, name, "shop")
        return [each.word for each in ports_of(item, takes, f"{name}:")] if item else []

    assert ports("svc/web") == ["svc/web:80", "svc/web:http", "svc/web:53"]
    assert ports("web") == ["web:80", "web:http", "web:53"]  # the Service comes before the workload's Pods
    assert ports("deploy/web") == ["deploy/web:8080", "deploy/web:http"]
    assert ports("data/db-0") == ["data/db-0:5432"]
    assert ports("web", Takes(("Service",), ports="numbers")) == ["web:80", "web:53"]
    assert ports("nobody") == ports("node/worker") == []


def test_a_port_of_two_protocols_is_offered_once() -> None:
    dns = Service("shop", "dns", ports=(ServicePort(53, "dns", "UDP"), ServicePort(53, "dns-tcp")))
    assert [each.word for each in ports_of(dns, TARGET, "dns:")] == ["dns:53", "dns:dns", "dns:dns-tcp"]
    assert [each.word for each in ports_of(dns, TARGET, "dns:5")] == ["dns:53"]


def test_a_port_that_has_no_ports_name_is_offered_by_its_number() -> None:
    service = Service("shop", "web", ports=(ServicePort(80, "a b;\n"),))
    assert [tuple(each) for each in ports_of(service, TARGET, "web:")] == [("web:80", "TCP", False)]


KINDS = [
    ("svc/", {"Service", "Namespace"}),
    ("svc/shop/", {"Service"}),
    ("deploy/shop/", {"Pod"}),
    ("shop/", {"Pod", "Service"}),
    ("", {"Pod", "Service", "Node", "Namespace"}),
]


@pytest.mark.parametrize(("text", "kinds"), KINDS)
def test_what_cannot_follow_is_not_asked_for(text: str, kinds: set[str]) -> None:
    assert kinds_of(split(text, SOURCE), SOURCE) == kinds


def test_the_words_that_are_offered_are_understood() -> None:
    known = {**WORDS, **DELETED}
    assert {word: known[word] for word in SHORT.values()} == {word: kind for kind, word in SHORT.items()}


# Of whom it is asked


def offered(*words: str) -> list[str]:
    """What click offers after these words, of which the last is unfinished."""
    *done, incomplete = words
    found = ShellComplete(main, {}, "podwall", VARIABLE).get_completions(done, incomplete)
    return [f"{each.type}:{each.value}" if each.type != "plain" else each.value for each in found]


MANIFESTS = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec:
  clusterIP: 10.96.0.7
  selector: {app: api}
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: shop, labels: {app: api}}
spec:
  nodeName: worker
  containers: [{name: a, image: a, ports: [{containerPort: 8080}]}]
status: {podIPs: [{ip: 10.244.1.7}], phase: Running}
---
apiVersion: v1
kind: Node
metadata: {name: worker}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}}
"""


@pytest.fixture
def manifests(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(MANIFESTS)
    return str(path)


def test_each_parameter_offers_what_it_takes(manifests: str) -> None:
    shop = ("-f", manifests, "-n", "shop")
    assert offered("why", *shop, "") == ["api-1", "svc/api", "node/worker"]
    assert offered("why", "-f", manifests, "") == ["node/worker", "shop/"]
    assert offered("why", *shop, "api-1", "svc/") == ["svc/api"]
    assert offered("why", *shop, "api-1", "svc/api:") == ["svc/api:80", "svc/api:http"]
    assert offered("why", *shop, "api-1", "svc/api:h") == ["svc/api:http"]
    assert offered("why", *shop, "api-1", "::1") == []
    assert offered("why", "api-1", "-f", manifests, "--namespace=shop", "svc/a") == ["svc/api"]
    assert offered("why", *shop, "--via", "") == ["worker"]
    assert offered("why", "-f", manifests, "-n", "") == ["shop"]
    assert offered("why", "-f", manifests, "--namespace=s") == ["shop"]
    assert offered("doctor", "-f", manifests, "--node", "") == ["worker"]
    assert offered("matrix", *shop, "--from", "") == ["api-1"]
    assert offered("matrix", *shop, "--to", "svc/api:") == ["svc/api:80", "svc/api:http"]
    plan = ("plan", "--from", manifests, "-n", "shop", "--delete")
    assert offered(*plan, "netpol/") == ["file:netpol/", "netpol/deny"]
    assert offered(*plan, "") == ["file:", "pod/api-1", "svc/api", "netpol/deny", "ns/shop"]


def test_files_that_are_not_there_offer_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert offered("why", "-f", str(tmp_path / "nothing"), "") == []
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [\n---\nkind: Pod\n")
    assert offered("why", "-f", str(broken), "") == []
    assert capfd.readouterr() == ("", "")


PODS = "/api/v1/namespaces/shop/pods"
SERVICES = "/api/v1/namespaces/shop/services"
LISTS: dict[str, list[dict[str, Any]]] = {
    PODS: [{"metadata": {"name": "api-1", "namespace": "shop"}}, {"metadata": {"name": "a;b"}}],
    SERVICES: [{"metadata": {"name": "api", "namespace": "shop"}}],
    "/api/v1/namespaces": [{"metadata": {"name": "shop"}}, {"metadata": {"name": "data"}}],
}
WHOLE = {
    f"{SERVICES}/api": {"metadata": {"name": "api", "namespace": "shop"}, "spec": {"ports": [{"port": 80}]}}
}


class Api:
    """An API server that knows LISTS, forbids all other lists, and notes what it is asked."""

    def __init__(self, tmp_path: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        self.silent = threading.Event()
        self.ended = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Nothing."""

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                api.asked.append((path, self.headers["Accept"].partition(";")[2]))
                if api.silent.is_set():
                    api.ended.wait(30)
                    self.close_connection = True
                    return
                body = {"items": LISTS[path], "metadata": {}} if path in LISTS else WHOLE.get(path)
                data = json.dumps(body or {"kind": "Status", "code": 403}).encode()
                self.send_response(200 if body else 403)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.kubeconfig = tmp_path / "kubeconfig"
        names = ["admin@kind", "arn:aws:eks:eu:1:cluster/x", "bad name", "$(id)"]
        content = {
            "current-context": "admin@kind",
            "contexts": [{"name": each, "context": {"cluster": "c", "user": "u"}} for each in names],
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(content))

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    made = Api(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
    try:
        yield made
    finally:
        made.close()


METADATA = "as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


def test_an_api_server_is_asked_for_the_names_of_what_may_follow(api: Api) -> None:
    assert offered("why", "-n", "shop", "api-1", "svc/") == ["svc/api", "svc/data/"]
    assert sorted(api.asked) == [("/api/v1/namespaces", METADATA), (SERVICES, METADATA)]


def test_what_may_not_be_listed_hides_nothing_else(api: Api) -> None:
    assert offered("why", "-n", "shop", "") == ["api-1", "svc/api", "data/"]
    assert ("/api/v1/nodes", METADATA) in api.asked


def test_the_kubeconfig_that_is_typed_is_asked(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")
    assert offered("flows", "--kubeconfig", str(api.kubeconfig), "-n", "") == ["data", "shop"]
    assert offered("flows", "-n", "shop", "--pod", "") == []


def test_a_services_ports_are_read_of_it_alone(api: Api) -> None:
    assert offered("why", "-n", "shop", "api-1", "svc/api:") == ["svc/api:80"]
    assert api.asked == [(SERVICES, METADATA), (f"{SERVICES}/api", "")]
    assert offered("why", "api-1", "svc/shop/api:") == ["svc/shop/api:80"]
    assert api.asked == [(SERVICES, METADATA), (f"{SERVICES}/api", "")] * 2


def test_a_namespace_that_is_none_is_not_asked_for(api: Api) -> None:
    assert offered("why", "-n", "../nodes", "pod/") == ["pod/data/", "pod/shop/"]
    assert api.asked == [("/api/v1/namespaces", METADATA)]


def test_a_server_that_does_not_answer_is_not_waited_for(api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    api.silent.set()
    begun = time.monotonic()
    assert offered("why", "") == []
    assert time.monotonic() - begun < LIMIT_S + 1
    assert capfd.readouterr() == ("", "")


def test_contexts_are_the_kubeconfigs(api: Api) -> None:
    assert offered("why", "--context", "") == ["admin@kind", "arn:aws:eks:eu:1:cluster/x"]
    assert offered("status", "--kubeconfig", str(api.kubeconfig), "--context", "adm") == ["admin@kind"]
    assert offered("install", "--kubeconfig", "/nonexistent", "--context", "") == []


def test_nobody_to_ask_offers_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")
    assert offered("get", "pods", "") == []
    assert offered("why", "") == []
    assert capfd.readouterr() == ("", "")
