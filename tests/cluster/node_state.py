"""What podwall has made on a node, for comparing before and after."""

import json
from typing import Any

from tests.cluster import cluster, kube

PROTOCOL = "112"
TABLES = ("inet podwall", "inet podwall_services", "arp podwall")
FILES = ("/etc/cni/net.d", "/opt/cni/bin", "/var/lib", "/run")
LEDGER = """
import glob, json, sqlite3
rows = {}
for path in glob.glob("/var/lib/podwall/*.sqlite3") + glob.glob("/var/lib/podwall/*.db"):
    base = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    rows["attachments"] = base.execute("SELECT container_id, link, state FROM attachments").fetchall()
    rows["addresses"] = base.execute("SELECT address FROM addresses WHERE attachment IS NOT NULL").fetchall()
print(json.dumps(rows, sort_keys=True))
"""


def links(node: str) -> set[str]:
    """Return podwall's devices."""
    listed = json.loads(cluster.on_node(node, "ip", "-json", "link"))
    return {each["ifname"] for each in listed if each["ifname"].startswith("podwall")}


def routes(node: str) -> set[str]:
    """Return podwall's routes of both families."""
    found = set()
    for family in ("-4", "-6"):
        words = ["ip", family, "-json", "route", "show", "table", "all", "protocol", PROTOCOL]
        listed: list[dict[str, Any]] = json.loads(cluster.on_node(node, *words) or "[]")
        found |= {f"{each['dst']} {each.get('dev', '')} {each.get('gateway', '')}" for each in listed}
    return found


def neighbours(node: str) -> set[str]:
    """Return the permanent neighbour entries on podwall's devices."""
    listed = json.loads(cluster.on_node(node, "ip", "-json", "neighbour", "show", "nud", "permanent") or "[]")
    return {f"{each['dst']} {each['dev']}" for each in listed if each["dev"].startswith("podwall")}


def rules(node: str) -> set[str]:
    """Return podwall's tables line by line, without counters."""
    found = set()
    for table in TABLES:
        if table in cluster.on_node(node, "nft", "list", "tables"):
            text = cluster.on_node(node, "nft", "--stateless", "--numeric", "list", "table", *table.split())
            found |= {f"{table}: {part.strip(' ,')}" for part in text.replace(",", "\n").splitlines()}
    return found


def ledger(node: str) -> str:
    """Return the ledger's rows, as the agent's Pod reads them."""
    agents = kube.get("pods", "--namespace=kube-system", "--selector=app.kubernetes.io/name=podwall")
    pod = next(each["metadata"]["name"] for each in agents if each["spec"]["nodeName"] == node)
    return kube.execute("kube-system", pod, "python3", "-c", LEDGER)


def files(node: str) -> set[str]:
    """Return the files and directories on a node that have podwall in their name."""
    words = ["find", *FILES, "-maxdepth", "1", "-name", "*podwall*"]
    return set(cluster.on_node(node, *words).split())


def everything(node: str) -> dict[str, object]:
    """Return all that podwall has made for Pods."""
    return {
        "links": links(node),
        "routes": routes(node),
        "neighbours": neighbours(node),
        "rules": rules(node),
        "ledger": ledger(node),
    }
