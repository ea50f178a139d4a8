"""`podwall matrix --probe` on the real cluster: the agents connect from inside of the Pods, asked by exec."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import contents, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.command import podwall
from tests.cluster.console import wait_for

NAMESPACE = "matrix"


def web(replicas: int) -> dict[str, Any]:
    container = {
        "name": "web",
        "image": contents.agnhost_name(),
        "args": ["netexec", "--http-port=8080", "--udp-port=8081"],
        "ports": [
            {"name": "http", "containerPort": 8080},
            {"name": "echo", "containerPort": 8081, "protocol": "UDP"},
        ],
    }
    template = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}}
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template}
    meta = {"namespace": NAMESPACE, "name": "web"}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec}


def pod(name: str, *, host_network: bool = False) -> dict[str, Any]:
    container = {"name": "main", "image": contents.agnhost_name(), "args": ["pause"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": NAMESPACE, "name": name, "labels": {"app": name}},
        "spec": {"containers": [container], "hostNetwork": host_network},
    }


POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"namespace": NAMESPACE, "name": "friends"},
    "spec": {
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}], "ports": [{"port": "http"}]}
        ],
    },
}


@pytest.fixture(scope="module")
def pods(real_cluster: Settings) -> Iterator[None]:
    objects = [web(3), pod("friend"), pod("stranger"), pod("on-node", host_network=True), POLICY]
    with kube.running([NAMESPACE], *objects):
        friend = places.pod(NAMESPACE, "friend")
        servers = [str(each) for web in kube.pods(NAMESPACE, app="web") for each in web.addresses]
        questions = [Question(each, 8080, limit=1.0) for each in servers]

        def admitted() -> bool:
            return all(each.body for each in friend.ask(questions))

        wait_for("every node to know the friend", admitted, limit=20)
        yield


def matrix(*words: str | Path, status: int = 0) -> str:
    return podwall("matrix", "-n", NAMESPACE, *words, status=status)


def test_what_is_computed_is_seen(pods: None) -> None:
    found = json.loads(matrix("--probe", "-o", "json"))

    assert found["differences"] == []
    tcp = {
        (each["source"], each["allowed"], each["seen"])
        for each in found["connections"]
        if each["protocol"] == "TCP" and each["source"] in (f"{NAMESPACE}/friend", f"{NAMESPACE}/stranger")
    }
    assert tcp == {(f"{NAMESPACE}/friend", True, "connected"), (f"{NAMESPACE}/stranger", False, "silent")}
    assert {each["seen"] for each in found["connections"]} == {"connected", "silent"}


def test_replicas_share_a_row(pods: None) -> None:
    lines = matrix("--from", "friend", "--from", "web", "--to", "web:8080").splitlines()
    assert [line.split() for line in lines] == [
        ["FROM", "web", "(3)"],
        ["TCP", "8080"],
        ["friend", "yes"],
        ["web", "(3)", "no"],
    ]


def test_expectations(pods: None, tmp_path: Path) -> None:
    path = tmp_path / "expected.yaml"
    path.write_text(
        "- {from: friend, to: 'web:http', allowed: true}\n"
        "- {from: stranger, to: web, allowed: false}\n"
        "- {from: stranger, to: 'friend:8080', allowed: true}\n"
    )
    assert matrix("--expect", path, "--probe") == "3 of 3 expectations hold\n"

    path.write_text("- {from: stranger, to: 'web:8080', allowed: true}\n")
    said = matrix("--expect", path, "--probe", status=1)
    assert "policy matrix/friends" in said
    assert said.endswith("0 of 1 expectations hold\n")
