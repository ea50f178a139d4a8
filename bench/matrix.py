"""How long `podwall matrix` takes for a hundred Pods: the whole command, from its start to its last line.

    python bench/matrix.py [PODS] [POLICIES] [ROUNDS]

The Pods, a quarter as many workloads in five namespaces, have addresses of both families and two ports each:
a hundred of them are 20,000 pairs of a Pod and a port, decided twice. Each policy isolates a workload for one
direction or both and names peers by labels, namespaces or address blocks. It reads them from manifests, as
`kubectl get -o json` prints them: what it takes to read a cluster from its API server is not measured here.

Target: the table of 100 Pods in under 2 s.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

TARGET_S = 2.0
NAMESPACES, REPLICAS = 5, 4
PODWALL = [sys.executable, "-m", "agent.cli.main"]


def pod(number: int) -> dict[str, Any]:
    workload, replica = divmod(number, REPLICAS)
    name, template = f"app-{workload}", f"{workload:x}f7c9"
    owner = {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "name": f"{name}-{template}",
        "uid": "u",
        "controller": True,
    }
    v4, v6 = f"10.244.{number // 250}.{number % 250 + 2}", f"fd00:10:244::{number + 2:x}"
    ports = [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": f"ns-{workload % NAMESPACES}",
            "name": f"{name}-{template}-{replica}",
            "labels": {"app": name, "tier": f"tier-{workload % 3}", "pod-template-hash": template},
            "ownerReferences": [owner],
        },
        "spec": {"nodeName": f"node-{number % 3}", "containers": [{"name": "main", "ports": ports}]},
        "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]},
    }


def policy(number: int, workloads: int) -> dict[str, Any]:
    other = (number * 7 + 1) % workloads
    peers = [
        {"podSelector": {"matchLabels": {"tier": f"tier-{number % 3}"}}},
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": f"ns-{other % NAMESPACES}"}},
            "podSelector": {"matchLabels": {"app": f"app-{other}"}},
        },
        {"ipBlock": {"cidr": "10.244.0.0/16", "except": [f"10.244.0.{16 * (number % 15)}/28"]}},
    ]
    ports = [{"port": "http"}] if number % 2 else [{"port": 9000, "endPort": 9100}]
    workload = number % workloads
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": f"ns-{workload % NAMESPACES}", "name": f"policy-{number}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{workload}"}},
            "policyTypes": [["Ingress"], ["Egress"], ["Ingress", "Egress"]][number % 3],
            "ingress": [{"from": [peers[number % 3]], "ports": ports}],
            "egress": [{"to": [peers[(number + 1) % 3]]}],
        },
    }


def cluster(pods: int, policies: int) -> list[dict[str, Any]]:
    spaces = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"ns-{number}"}}
        for number in range(NAMESPACES)
    ]
    workloads = max(1, pods // REPLICAS)
    return [*spaces, *map(pod, range(pods)), *(policy(number, workloads) for number in range(policies))]


class Taken(NamedTuple):
    """Seconds of one run: by the clock, and of the processor."""

    clock: float
    processor: float


def timed(words: list[str]) -> tuple[Taken, str]:
    """What one run took, and what it printed."""
    used, begun = children(), time.perf_counter()
    printed = subprocess.run([*PODWALL, *words], check=True, capture_output=True, text=True).stdout
    return Taken(time.perf_counter() - begun, children() - used), printed


def children() -> float:
    """The processor's seconds that programs started from here have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    pods, policies, rounds = (int(each) for each in (*sys.argv[1:], *("100", "40", "7")[len(sys.argv) - 1 :]))
    print(f"pods={pods} policies={policies} rounds={rounds} processors={os.cpu_count()}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cluster.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": cluster(pods, policies)}))
        cases = {
            "table": [],
            "wide": ["-o", "wide"],
            "json": ["-o", "json"],
            "expect": ["-o", "expect"],
            "picture": ["--picture", str(Path(directory) / "matrix.svg")],
        }
        medians = {}
        for name, words in cases.items():
            runs = [timed(["matrix", "-A", "-f", str(path), *words]) for _ in range(rounds)]
            clock, processor = (
                statistics.median(of) for of in zip(*(taken for taken, _ in runs), strict=True)
            )
            medians[name] = clock
            lines = runs[-1][1].count("\n")
            print(f"{name:8} median_s={clock:.2f} median_cpu_s={processor:.2f} lines={lines}")
    if pods == 100:
        met = "met" if medians["table"] < TARGET_S else "missed"
        print(f"target: the table of 100 Pods in under {TARGET_S:g} s: {met}")


if __name__ == "__main__":
    main()
