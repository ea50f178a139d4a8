"""`podwall doctor` on the real cluster: nothing is wrong, until something is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster import cluster, kube
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for

PODWALL = [sys.executable, "-m", "agent.cli.main"]
ROLE = "clusterrole/podwall"


def doctor(*words: str) -> tuple[int, str]:
    command = [*PODWALL, "doctor", "--kubeconfig", str(cluster.kubeconfig()), *words]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def findings() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(doctor("-o", "json")[1])["findings"]
    return [each for each in found if each["severity"] != "note"]


def test_nothing_is_wrong(real_cluster: Settings) -> None:
    status, said = doctor()
    assert status == 0, said
    assert f"nothing is wrong on {len(cluster.nodes())} nodes" in said


def test_a_foreign_table_that_drops(real_cluster: Settings) -> None:
    node = cluster.nodes()[-1]
    chain = "chain FORWARD { type filter hook forward priority 10; policy drop;\n}"
    rules = f"table ip others {{ {chain}\n}}"
    cluster.on_node(node, "nft", "-f", "-", stdin=f"{rules}\n".encode())
    try:
        (found,) = findings()
    finally:
        cluster.on_node(node, "nft", "delete", "table", "ip", "others")
    assert (found["severity"], found["node"]) == ("error", node)
    assert found["cause"].startswith("nftables table ip others, chain FORWARD (forward, policy drop) drops")


def test_another_network_that_is_left(real_cluster: Settings) -> None:
    node = cluster.nodes()[0]
    file = "/etc/cni/net.d/90-other.conflist"
    cluster.on_node(node, "sh", "-c", f"echo '{{}}' > {file}")
    try:
        listed = json.loads(doctor("-o", "json")[1])["findings"]
    finally:
        cluster.on_node(node, "rm", file)
    assert [each["cause"] for each in listed if each["topic"] == "cni"] == [
        "another network's configuration is left in /etc/cni/net.d: 90-other.conflist"
    ]


def test_a_right_that_was_taken_away(real_cluster: Settings) -> None:
    (role,) = kube.get(ROLE)
    less = [each for each in role["rules"] if "services/status" not in each["resources"]]
    patch = json.dumps([{"op": "replace", "path": "/rules", "value": less}])
    cluster.kubectl("patch", ROLE, "--type=json", f"--patch={patch}")
    try:
        (found,) = wait_for("the missing right", lambda: findings()[:1], limit=30)
    finally:
        back = json.dumps([{"op": "replace", "path": "/rules", "value": role["rules"]}])
        cluster.kubectl("patch", ROLE, "--type=json", f"--patch={back}")
    assert found["cause"] == "podwall's ServiceAccount may not patch services/status"
