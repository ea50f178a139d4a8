"""`podwall why` asks the real API server: it names what is wrong with each connection of the example."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import cluster, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings

PODWALL = Path(sys.executable).parent / "podwall"
NAMESPACE = "broken"

CASES = [
    ("empty", "refused", "no-endpoints"),
    ("misspelt", "refused", "selector-mismatch"),
    ("wrong-name", "refused", "target-port"),
    ("wrong-number", "refused", "target-port"),
    ("guarded", "timeout", "ingress-denied"),
]


@pytest.fixture(scope="module")
def broken(real_cluster: Settings) -> Iterator[places.Asker]:
    with kube.running([NAMESPACE], *kube.example("troubleshooting/broken.yaml", NAMESPACE)):
        yield places.pod(NAMESPACE, "client")


def why(*words: str) -> Any:
    command = [PODWALL, "why", "--kubeconfig", cluster.kubeconfig(), "-n", NAMESPACE, "-o", "json", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)


@pytest.mark.parametrize(("service", "seen", "cause"), CASES, ids=[case[0] for case in CASES])
def test_the_cause_is_named(broken: places.Asker, service: str, seen: str, cause: str) -> None:
    address = kube.get("service", "-n", NAMESPACE, service)[0]["spec"]["clusterIP"]

    assert broken.one(Question(address, 80, limit=2.0)).error == seen
    answer = why("client", f"svc/{service}:80")
    assert (answer["allowed"], answer["cause"]) == (False, cause)
