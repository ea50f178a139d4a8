"""Installing and uninstalling against an API server that keeps what it is given, over HTTP."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli.main import main
from agent.cli.manifest import INSTALL, SettingError, changed, objects, packaged, with_image, with_settings

CONF = Path(__file__).parents[3] / "conf"
DAEMON_SETS = "/apis/apps/v1/namespaces/kube-system/daemonsets"
PODS = "/api/v1/namespaces/kube-system/pods"
CLEARED = """\
removed link podwall1234abcd
removed link podwall-vxlan
removed table inet podwall
nothing of podwall is left
"""


class Cluster:
    """What the API server has, by path; DaemonSets are rolled out as soon as they are made."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.nodes = ["node1", "node2"]
        self.stuck = ""
        self.others: list[dict[str, Any]] = []
        self.log = CLEARED
        self.asked: list[str] = []
        self._version = 0

    def apply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        before = self.objects.get(path)
        content = json.loads(json.dumps(body))
        if before and {**before, "metadata": None, "status": None} == {
            **content,
            "metadata": None,
            "status": None,
        }:
            return before
        self._version += 1
        content["metadata"] |= {"resourceVersion": str(self._version)}
        if body["kind"] == "DaemonSet":
            generation = before["metadata"]["generation"] + 1 if before else 1
            content["metadata"]["generation"] = generation
            content["status"] = {
                "observedGeneration": generation,
                "desiredNumberScheduled": len(self.nodes),
                "updatedNumberScheduled": len(self.nodes),
            }
        self.objects[path] = content
        return content

    def read(self, path: str, query: dict[str, list[str]]) -> Any:
        if path == "/api/v1/nodes":
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            return {"items": [{"metadata": {"name": name}, "status": ready} for name in self.nodes]}
        if path == "/apis/apps/v1/daemonsets":
            return {"items": self.others}
        if path == PODS:
            return {"items": self.pods(query["labelSelector"][0].split("=")[1])}
        found = self.objects.get(path)
        if found and "status" in found:
            found["status"]["numberReady"] = len(self.nodes) - bool(self.stuck)
        return found

    def pods(self, name: str) -> list[dict[str, Any]]:
        if f"{DAEMON_SETS}/{name}" not in self.objects:
            return []
        waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
        return [
            {
                "metadata": {"name": f"{name}-{node}"},
                "spec": {"nodeName": node},
                "status": {
                    "conditions": [{"type": "Ready", "status": str(node != self.stuck)}],
                    "containerStatuses": [waiting] if node == self.stuck else [],
                },
            }
            for node in self.nodes
        ]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    made = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            where = urlsplit(self.path)
            if where.path.endswith("/log"):
                self.answer(200, made.log)
                return
            found = made.read(where.path, parse_qs(where.query))
            self.answer(200 if found else 404, json.dumps(found or {"kind": "Status", "code": 404}))

        def do_PATCH(self) -> None:
            assert self.headers["Content-Type"] == "application/apply-patch+yaml"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = urlsplit(self.path).path
            made.asked.append(f"apply {path}")
            self.answer(200, json.dumps(made.apply(path, body)))

        def do_DELETE(self) -> None:
            path = urlsplit(self.path).path
            made.asked.append(f"delete {path}")
            gone = made.objects.pop(path, None)
            self.answer(200 if gone or path.endswith("/leases") else 404, "{}")

        def answer(self, status: int, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def podwall(*words: str, expect: int = 0) -> Result:
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == expect, done.output
    return done


def test_installed_it_says_what_it_made_and_waits(cluster: Cluster) -> None:
    told = podwall("install").output.splitlines()
    assert told[0] == "serviceaccount/podwall created"
    assert told[-3:] == ["daemonset.apps/podwall created", "2 of 2 agents ready", "2 of 2 nodes Ready"]
    kinds = [each["kind"] for each in objects(packaged(INSTALL))]
    assert len(cluster.objects) == len(kinds)


def test_installed_again_nothing_changes(cluster: Cluster) -> None:
    podwall("install")
    told = podwall("install", "--no-wait").output.splitlines()
    assert {line.split()[1] for line in told} == {"unchanged"}


def test_settings_stay_and_agents_start_again_only_when_they_change(cluster: Cluster) -> None:
    podwall("install", "--set", "mtu=1400")
    assert "daemonset.apps/podwall unchanged" in podwall("install").output
    told = podwall("install", "--set", "mode=vxlan").output
    assert "configmap/podwall configured" in told
    assert "daemonset.apps/podwall configured" in told
    path = "/api/v1/namespaces/kube-system/configmaps/podwall"
    text = cluster.objects[path]["data"]["config.yaml"]
    assert {"mtu": 1400, "mode": "vxlan"}.items() <= yaml.safe_load(text).items()
    assert "# 0: from the node's uplink" in text


IMAGES = [
    ("", "podwall:0.1.0"),
    ("registry.example:5000/net/podwall:0.0.9", "registry.example:5000/net/podwall:0.1.0"),
    ("registry.example/podwall@sha256:abc", "registry.example/podwall@sha256:abc"),
]


@pytest.mark.parametrize(("before", "after"), IMAGES)
def test_the_image_comes_from_where_it_came(cluster: Cluster, before: str, after: str) -> None:
    podwall("install", *(["--image", before] if before else []))
    podwall("install")
    spec = cluster.objects[f"{DAEMON_SETS}/podwall"]["spec"]["template"]["spec"]
    assert {each["image"] for each in (*spec["initContainers"], *spec["containers"])} == {after}


def test_another_network_is_named_and_nothing_is_done(cluster: Cluster) -> None:
    cluster.others = [
        {
            "metadata": {"name": "calico-node", "namespace": "calico-system"},
            "status": {"desiredNumberScheduled": 2},
        }
    ]
    said = podwall("install", expect=1).output
    assert "Calico is this cluster's network (DaemonSet calico-system/calico-node on 2 nodes)" in said
    assert cluster.objects == {}
    podwall("install", "--force")
    assert cluster.objects


def test_a_node_that_does_not_come_is_named(cluster: Cluster) -> None:
    cluster.stuck = "node2"
    said = podwall("install", "--timeout", "1", expect=1).output
    assert "1 of 2 agents ready" in said
    assert "not ready everywhere: ImagePullBackOff: no such image on node2" in said


def test_printed_it_is_the_manifest_and_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    assert podwall("install", "--print").output == (CONF / "podwall.yaml").read_text()


def test_uninstalled_it_says_of_each_node_that_nothing_is_left(cluster: Cluster) -> None:
    podwall("install", "--image", "registry.example/podwall:0.1.0")
    seen: list[str] = []
    cluster.apply = noting(cluster.apply, seen)  # type: ignore[method-assign]
    told = podwall("uninstall", "--yes").output.splitlines()
    assert told[0] == "daemonset.apps/podwall deleted"
    for node in cluster.nodes:
        assert f"{node}: removed 2 links, 1 table; nothing of podwall is left" in told
    assert told[-2:] == ["daemonset.apps/podwall-uninstall deleted", "leases of podwall deleted"]
    assert cluster.objects == {}
    assert seen == ["registry.example/podwall:0.1.0"]


def noting(apply: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    """What was applied, by its image."""

    def noted(path: str, body: dict[str, Any]) -> Any:
        seen.append(body["spec"]["template"]["spec"]["containers"][0]["image"])
        return apply(path, body)

    return noted


def test_uninstalling_asks_first(cluster: Cluster) -> None:
    podwall("install")
    before = dict(cluster.objects)
    done = CliRunner().invoke(main, ["uninstall"], input="n\n")
    assert done.exit_code == 1
    assert "Remove podwall from 2 nodes? Their Pods lose the network" in done.output
    assert cluster.objects == before


def test_what_is_left_on_a_node_is_said(cluster: Cluster) -> None:
    cluster.log = "removed table inet podwall\ncannot remove every part: still there: podwall-vxlan\n"
    said = podwall("uninstall", "--yes", expect=1).output
    assert "node1: removed 1 table; cannot remove every part: still there: podwall-vxlan" in said


def test_an_uninstall_that_stops_half_way_goes_on(cluster: Cluster) -> None:
    podwall("install")
    cluster.stuck = "node2"
    said = podwall("uninstall", "--yes", "--timeout", "1", expect=1).output
    assert "not every node is cleared" in said
    assert "on node2" in said
    cluster.stuck = ""
    assert "serviceaccount/podwall was gone" in podwall("uninstall", "--yes").output
    assert cluster.objects == {}


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_nobody_there(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there is no kubeconfig" in podwall(command, expect=3).output


# The manifest's text

SETTINGS = (
    "# how\nmode: auto\nload_balancer_pools:\n  - name: a\n    addresses: [192.0.2.0/28]\n\n# last\nmtu: 0\n"
)
CHANGES = [
    ({}, SETTINGS),
    ({"mtu": "1400"}, SETTINGS.replace("mtu: 0", "mtu: 1400")),
    ({"services": "off"}, SETTINGS + "services: off\n"),
    ({"load_balancer_pools": "[]"}, "# how\nmode: auto\nload_balancer_pools: []\n\n# last\nmtu: 0\n"),
]


@pytest.mark.parametrize(("changes", "expected"), CHANGES, ids=str)
def test_a_setting_takes_the_place_of_its_older_value(changes: dict[str, str], expected: str) -> None:
    assert changed(SETTINGS, changes) == expected


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mtu", "big", "mtu is 'big', but must be a whole number"),
        ("nothing", "1", "unknown setting 'nothing'; known are: add_timeout_s"),
        ("node_name", "a", "unknown setting 'node_name'"),
        ("mode", "[", "mode is '['"),
    ],
)
def test_a_setting_that_cannot_be(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)):
        with_settings(packaged(INSTALL), {name: value})


def test_another_image_is_everybodys() -> None:
    text = with_image(packaged(INSTALL), "registry.example/podwall:2")
    assert len(re.findall(r"image: registry\.example/podwall:2\n", text)) == 2
    assert "image: podwall:" not in text
