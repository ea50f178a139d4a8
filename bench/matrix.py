"""How long `podwall matrix` takes for a hundred Pods: the whole command, from its start to its last line.

    python bench/matrix.py [PODS] [POLICIES] [ROUNDS]

The Pods, a quarter as many workloads in five namespaces, have addresses of both families and two ports each:
a hundred of them are 20,000 pairs of a Pod and a port, decided twice. Each policy isolates a workload for one
direction or both and names peers by labels, namespaces or address blocks. It reads them from manifests, as
`kubectl get -o json` prints them: what it takes to read a cluster from its API server is not measured here.

Target: 100 Pods in under 2 s.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def timed(words: list[str], rounds: int) -> tuple[float, float, str]:
    """Median and longest seconds, and what the last one printed."""
    taken, printed = [], ""
    for _ in range(rounds):
        begun = time.perf_counter()
        printed = subprocess.run([*PODWALL, *words], check=True, capture_output=True, text=True).stdout
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken), max(taken), printed


def main() -> None:
    pods, policies, rounds = (int(each) for each in (*sys.argv[1:], *("100", "40", "7")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cluster.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": cluster(pods, policies)}))
        picture = str(Path(directory) / "matrix.svg")
        cases = {
            "table": [],
            "wide": ["-o", "wide"],
            "json": ["-o", "json"],
            "expect": ["-o", "expect"],
            "picture": ["--picture", picture],
        }
        print(f"pods={pods} policies={policies} rounds={rounds} processors={os.cpu_count()}")
        slowest = 0.0
        for name, words in cases.items():
            median, longest, printed = timed(["matrix", "-A", "-f", str(path), *words], rounds)
            slowest = max(slowest, median if pods <= 100 else 0.0)
            print(f"{name:8} median_s={median:.2f} longest_s={longest:.2f} lines={printed.count(chr(10))}")
        if pods <= 100:
            print(f"target: {pods} Pods in under {TARGET_S:g} s: {'met' if slowest < TARGET_S else 'missed'}")


if __name__ == "__main__":
    main()
