"""The dashboard and the alerts ask for metrics and labels that a running agent has, and say what to do.

An expression is read for the metrics and labels that it names, not evaluated: promtool is not needed.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from agent.cli.ask import ask
from lab import manifests, netns
from lab.processes import until
from lab.world import Lab

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "conf/grafana/podwall.json").read_text())
RULES = yaml.safe_load((ROOT / "conf/prometheus/podwall.rules.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = {
    f"{panel['title']}: {target['expr']}": (panel, target["expr"])
    for panel in PANELS
    for target in panel["targets"]
}

ADDED = {"instance", "job"}
"""Labels that Prometheus adds to all that it scrapes."""

API_ONLY = {"podwall_watch_silence_seconds": {"kind"}, "podwall_watch_failures_total": {"kind"}}
"""What only an agent that watches an API server has; test_metrics.py holds these names."""

RARE = {"podwall_audit_denials_total": {"direction", "namespace", "pod"}}
"""What needs a policy in audit mode; its labels are those of podwall_denials_total."""

WORDS = {
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
}
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
MATCHERS = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
NAME = re.compile(r"(?<![\w.$])[a-zA-Z_:][a-zA-Z0-9_:]*\b(?!\s*\()")


UNUSABLE = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "unusable", "namespace": "default"},
    "spec": {"podSelector": {"matchLabels": {"app": "nobody"}}, "ingress": [{"ports": [{"port": 99999}]}]},
}


class Asked(NamedTuple):
    """What an expression names: metrics, labels by the metric they select, and labels it groups by."""

    metrics: set[str]
    selected: dict[str, set[str]]
    grouped: set[str]


def read(expression: str) -> Asked:
    plain = re.sub(r'"[^"]*"', '""', expression)
    grouped = {
        label.strip() for found in GROUPING.findall(plain) for label in found.split(",") if label.strip()
    }
    plain = GROUPING.sub(" ", plain)
    selected: dict[str, set[str]] = {}
    for name, inside in MATCHERS.findall(plain):
        selected.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b\d+[smhd]\b", " ", plain)
    return Asked(set(NAME.findall(plain)) - WORDS, selected, grouped)


READ = {
    'sum by (le, a) (rate(x_bucket{b="c{d", e=~"f"}[$__rate_interval]))': Asked(
        {"x_bucket"}, {"x_bucket": {"b", "e"}}, {"le", "a"}
    ),
    "x offset 15m unless on (instance, job) y": Asked({"x", "y"}, {}, {"instance", "job"}),
    "histogram_quantile(0.99, rate(x_bucket[5m])) > 1.5 and z == 0": Asked({"x_bucket", "z"}, {}, set()),
    "count(x) or vector(0)": Asked({"x"}, {}, set()),
}


@pytest.mark.parametrize("expression", READ)
def test_expressions_are_read_right(expression: str) -> None:
    assert read(expression) == READ[expression]


# A running agent


@pytest.fixture(scope="module")
def samples() -> Iterator[dict[str, set[str]]]:
    """Every metric of two agents on which a little of everything has happened, with its labels."""
    given = manifests.read([ROOT / "examples" / name for name in ("hello", "policies", "services")])
    with Lab(nodes=2, given=[*given, UNUSABLE]) as lab:
        api = lab.pod("guarded/api").address(4)
        assert lab.connect("guarded/stranger", api, 8080) == "silent"
        node = lab.pod("guarded/api").node
        with suppress(click.ClickException):
            ask(lab.agents[node].socket, "cni.ADD", {})
        found: dict[str, set[str]] = {}

        def scrape() -> bool:
            for place in lab.nodes:
                text = netns.run(netns.path(place.netns), metrics_of)
                for family in text_string_to_metric_families(text):
                    for sample in family.samples:
                        found.setdefault(sample.name, set()).update(sample.labels)
            late = {
                "podwall_denials_total",
                "podwall_load_balancer_pool_addresses",
                "podwall_object_problems",
            }
            return late <= found.keys()

        until(scrape, 20, lambda: f"only {sorted(found)}")
        yield {**API_ONLY, **RARE, **found}


def metrics_of() -> str:
    connection = http.client.HTTPConnection("127.0.0.1", 9619, timeout=5)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def check(expression: str, samples: dict[str, set[str]]) -> None:
    asked = read(expression)
    assert asked.metrics, "it names no metric"
    assert asked.metrics <= samples.keys(), f"no agent has {asked.metrics - samples.keys()}"
    for metric, labels in asked.selected.items():
        assert labels <= samples[metric] | ADDED, f"{metric} has no label {labels - samples[metric]}"
    known = set().union(*(samples[metric] for metric in asked.metrics))
    assert asked.grouped <= known | ADDED, f"nothing there has the label {asked.grouped - known}"


@pytest.mark.parametrize("target", TARGETS)
def test_a_panel_asks_for_what_there_is(target: str, samples: dict[str, set[str]]) -> None:
    panel, expression = TARGETS[target]
    check(expression, samples)
    labels = set().union(*(samples[metric] for metric in read(expression).metrics)) | ADDED
    for each in panel["targets"]:
        if each["expr"] == expression:
            assert set(re.findall(r"{{(\w+)}}", each["legendFormat"])) <= labels


@pytest.mark.parametrize("alert", ALERTS, ids=lambda of: str(of["alert"]))
def test_an_alert_asks_for_what_there_is(alert: dict[str, Any], samples: dict[str, set[str]]) -> None:
    check(alert["expr"], samples)


def test_kube_proxys_metrics_are_all_there(samples: dict[str, set[str]]) -> None:
    names = {name for name in samples if name.startswith("kubeproxy_")}
    base = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in names}
    assert {re.sub(r"_total$", "", name) for name in base} == {
        "kubeproxy_network_programming_duration_seconds",
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_sync_proxy_rules_endpoint_changes",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures",
        "kubeproxy_sync_proxy_rules_service_changes",
        "kubeproxy_sync_proxy_rules_service_changes_pending",
    }


# The files themselves


def test_the_rules_are_written_as_prometheus_reads_them() -> None:
    assert RULES.keys() == {"groups"}
    for group in RULES["groups"]:
        assert group.keys() == {"name", "rules"}
    for rule in ALERTS:
        assert (
            {"alert", "expr", "labels", "annotations"}
            <= rule.keys()
            <= {
                "alert",
                "expr",
                "for",
                "labels",
                "annotations",
            }
        )
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        assert rule["expr"].count("(") == rule["expr"].count(")")
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda of: str(of["alert"]))
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"].keys() == {"summary", "description", "action"}
    assert all(len(text) > 20 for text in alert["annotations"].values())
    assert re.search(r"`[^`]+`|event=", alert["annotations"]["action"]), "it names nothing to type or read"
    shown = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
    aggregated = re.search(r"\bby\s*\(([^)]*)\)", alert["expr"])
    if aggregated and not alert["expr"].startswith("("):
        assert shown <= {label.strip() for label in aggregated[1].split(",")}


def test_commands_in_alerts_are_podwalls() -> None:
    from agent.cli.main import COMMANDS

    said = {
        word for alert in ALERTS for word in re.findall(r"`podwall (\w+)", alert["annotations"]["action"])
    }
    assert said <= COMMANDS.keys()


def test_the_dashboard_is_whole() -> None:
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == [
        "Health",
        "Policies and denials",
        "Services",
        "Pods and addresses",
        "What the agents cost",
    ]
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(identities) == len(set(identities))
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
