"""A bug report of a lab in which secrets lie in plausible places: none is in the archive, and the rest is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests, processes
from lab.world import Lab

HELLO = Path(__file__).parents[2] / "examples" / "hello"
SECRETS = [f"planted-{number}-6b1f" for number in range(12)]
JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJpc3MiOiJwbGFudGVkIn0.c2lnbmF0dXJl"
PARTS = (
    "rules",
    "foreign-chains",
    "links",
    "addresses",
    "routes",
    "sysctls",
    "counters",
    "configuration",
    "log",
)


def planted() -> list[dict[str, Any]]:
    """Objects as people write them who know no better."""
    s = SECRETS
    applied = json.dumps({"spec": {"env": [{"name": "X", "value": s[0]}]}})
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "careless",
                "namespace": "default",
                "labels": {"app": "careless"},
                "annotations": {
                    "kubectl.kubernetes.io/last-applied-configuration": applied,
                    "vault.example.com/token": s[1],
                    "example.com/harmless-looking": s[2],
                },
            },
            "spec": {
                "containers": [
                    {
                        "name": "c",
                        "env": [{"name": "DB_PASSWORD", "value": s[3]}, {"name": "PLAIN", "value": s[4]}],
                        "args": ["--api-token", s[5], s[6]],
                        "ports": [{"containerPort": 8080}],
                    }
                ]
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": "careless",
                "namespace": "default",
                "annotations": {"note": f"password={s[7]}"},
            },
            "spec": {"selector": {"app": "careless"}, "ports": [{"port": 80}]},
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {
                "name": "careless",
                "namespace": "default",
                "annotations": {"podwall.dev/comment": f"Bearer {s[8]}"},
            },
            "spec": {"podSelector": {"matchLabels": {"app": "careless"}}},
        },
    ]


LOG = [
    f"info GET https://admin:{SECRETS[9]}@192.0.2.1:6443/api",
    f"info token: {SECRETS[10]} and {JWT}",
    "info -----BEGIN RSA PRIVATE KEY-----",
    f"{SECRETS[11]}",
    "-----END RSA PRIVATE KEY-----",
    "info event=after-the-key",
]


@pytest.fixture(scope="module")
def careless() -> Iterator[Lab]:
    with Lab(nodes=2, given=[*manifests.read([HELLO]), *planted()]) as made:
        with made.agents["node1"].log.open("a") as log:
            log.writelines(f"{line}\n" for line in LOG)
        yield made


@pytest.fixture(scope="module")
def members(careless: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    target = tmp_path_factory.mktemp("report") / "r.tar.gz"
    done = CliRunner().invoke(main, ["bugreport", "--lab", "-O", str(target)])
    assert done.exit_code == 0, done.output
    assert [each.name for each in target.parent.iterdir()] == ["r.tar.gz"]
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as tar:
        return {
            each.name.removeprefix("podwall-bugreport/"): tar.extractfile(each).read().decode()  # type: ignore[union-attr]
            for each in tar
        }


def test_no_planted_secret_is_in_it(members: dict[str, str]) -> None:
    for name, text in members.items():
        for secret in [*SECRETS, JWT]:
            assert secret not in text, name


def test_the_rest_is_in_it(members: dict[str, str]) -> None:
    assert {f"nodes/node{n}/{part}.txt" for n in (1, 2) for part in PARTS} - {
        "nodes/node1/foreign-chains.txt",
        "nodes/node2/foreign-chains.txt",
    } <= set(members)
    assert "missing.txt" not in members
    assert json.loads(members["findings.json"]) == []
    assert "event=after-the-key" in members["nodes/node1/log.txt"]
    objects = [json.loads(line) for line in members["objects/all.jsonl"].splitlines()]
    pod = next(each for each in objects if each["metadata"]["name"] == "careless" and each["kind"] == "Pod")
    assert pod["spec"]["containers"] == [{"name": "c", "ports": [{"containerPort": 8080}]}]
    assert pod["status"]["podIPs"]
    assert "careless" in members["nodes/node1/policies.json"] + members["nodes/node2/policies.json"]
    rules = [json.loads(line) for line in members["nodes/node1/rules.txt"].splitlines()]
    tables = {(each["table"]["family"], each["table"]["name"]) for each in rules if "table" in each}
    assert tables == {("arp", "podwall"), ("inet", "podwall"), ("inet", "podwall_services")}
    for name, text in members.items():
        if name.endswith(".json"):
            json.loads(text)
    assert "missing.txt" in members["README.txt"]


def test_an_agent_that_is_gone_is_named_and_the_rest_is_there(careless: Lab, tmp_path: Path) -> None:
    target = tmp_path / "r.tar.gz"
    careless.agents["node2"].stop()
    try:
        done = CliRunner().invoke(main, ["bugreport", "--lab", "-O", str(target)])
    finally:
        careless.agents["node2"].start()
        careless.wait_until_ready()
    assert done.exit_code == 0, done.output
    with tarfile.open(target) as tar:
        names = {each.name.removeprefix("podwall-bugreport/") for each in tar}
        missing = tar.extractfile("podwall-bugreport/missing.txt").read().decode()  # type: ignore[union-attr]
    assert "nodes/node1/rules.txt" in names
    assert "nodes/node2/log.txt" in names
    assert "nodes/node2/rules.txt: the agent does not answer on " in missing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_leaves_nothing(careless: Lab, tmp_path: Path, number: signal.Signals) -> None:
    target, temporary = tmp_path / "target", tmp_path / "temporary"
    target.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "agent.cli.main", "bugreport", "--lab", "-O", str(target / "r.tar.gz")]
    environment = {**processes.environment(os.environ), "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    processes.until(lambda: any(target.iterdir()), 20, lambda: "it never began")
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (128 + number, "interrupted; nothing is left\n")
    assert list(target.iterdir()) == []
    assert list(temporary.iterdir()) == []
