"""`podwall plan` and audit mode on the real cluster: what is said of a change is what packets then do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.command import podwall
from tests.cluster.console import wait_for

NAMESPACE = "guarded"
PORT = 8080
SILENCE_S = 1.0
STRANGERS = {"podSelector": {"matchLabels": {"app": "stranger"}}}
HELD = """
import socket, sys
live = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print(live.getsockname()[1], flush=True)
sys.stdin.read()
"""
"""Connects, says from which port, and stays."""


def policy(name: str, mode: str = "") -> dict[str, Any]:
    """The example's policy of Pods api, for strangers instead of friends."""
    meta: dict[str, Any] = {"namespace": NAMESPACE, "name": name}
    if mode:
        meta["annotations"] = {"podwall.dev/mode": mode}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta,
        "spec": {
            "podSelector": {"matchLabels": {"app": "api"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [STRANGERS], "ports": [{"protocol": "TCP", "port": PORT}]}],
        },
    }


@pytest.fixture(autouse=True)
def guarded(real_cluster: Settings) -> Iterator[None]:
    """Run the example's Pods, with its policy that admits friends alone."""
    with kube.running((NAMESPACE,), *kube.example("services/policy.yaml", NAMESPACE)):
        yield


@pytest.fixture
def held() -> Iterator[tuple[str, int]]:
    """A live connection of the friend to one of the Pods api: the Pod, and the port it comes from."""
    (api, *_) = kube.pods(NAMESPACE, app="api")
    words = [*places.pod(NAMESPACE, "friend").words(), sys.executable, "-c", HELD]
    command = [*words, str(api.addresses[0]), str(PORT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"{NAMESPACE}/{api.name}", int(process.stdout.readline())
        finally:
            process.kill()


def read(*words: str | Path, status: int = 0) -> Any:
    return json.loads(podwall(*words, "-o", "json", status=status))


def planned(tmp_path: Path, *change: dict[str, Any], status: int = 0) -> Any:
    path = tmp_path / "change.json"
    path.write_bytes(kube.listed(change))
    return read("plan", "-f", path, "--exit-code", status=status)


def reached(name: str) -> bool:
    """Whether a Pod reaches one of the Pods api."""
    (api, *_) = kube.pods(NAMESPACE, app="api")
    question = Question(str(api.addresses[0]), PORT, limit=SILENCE_S)
    return not places.pod(NAMESPACE, name).one(question).error


def told(said: Any, change: str, source: str) -> bool:
    """Whether a plan says this of a Pod's way to the Pods api at their port."""
    return any(
        way["change"] == change
        and any(f"{NAMESPACE}/{source}" in group["names"] for group in way["from"])
        and {"protocol": "TCP", "port": PORT} in way["declared"]
        for way in said["ways"]
    )


def test_what_is_said_of_a_change_comes_true(tmp_path: Path, held: tuple[str, int]) -> None:
    assert (reached("friend"), reached("stranger")) == (True, False)
    target, port = held

    said = planned(tmp_path, policy("api"), status=1)

    assert (told(said, "closes", "friend"), told(said, "opens", "stranger")) == (True, True)
    assert not told(said, "opens", "prisoner"), "its own policy lets nothing out"
    ends = [(of["source"]["port"], of["destination"]["pod"]) for of in said["connections"]]
    assert (port, target) in ends
    assert (reached("friend"), reached("stranger")) == (True, False), "a plan changes nothing"

    kube.apply(policy("api"))
    wait_for("the policy to be in force", lambda: reached("stranger"), limit=10)
    assert not reached("friend")


def test_a_policy_in_audit_mode_is_told_and_not_enforced(tmp_path: Path) -> None:
    kube.delete(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"namespace": NAMESPACE, "name": "api"},
        }
    )
    wait_for("everybody to reach it", lambda: reached("friend") and reached("stranger"), limit=10)
    assert planned(tmp_path, policy("trial", "audit"))["ways"] == []
    kube.apply(policy("trial", "audit"))

    def audited() -> bool:
        assert reached("friend")
        found = read("flows", "--denied", "--pod", f"{NAMESPACE}/friend")
        return any(of["event"] == "audit" for of in found["events"])

    wait_for("an event of the audit", audited, limit=20)
    answer = read("why", f"{NAMESPACE}/friend", f"{kube.pods(NAMESPACE, app='api')[0].addresses[0]}:{PORT}")
    assert answer["allowed"]
    assert "it would be denied if guarded/trial were enforced" in answer["sentence"]
    assert read("plan", "--enforce-audit", "--exit-code", status=1)["closes"]

    kube.apply(policy("trial"))
    wait_for("it to be enforced", lambda: not reached("friend"), limit=10)
    assert reached("stranger")
