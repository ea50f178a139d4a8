"""`podwall doctor` as a program and a person read it; what is found is tried in tests/lab and tests/agent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.cli.doctor import lines
from agent.cli.main import main
from agent.cli.output import Coloured
from agent.explain.findings import CHECKED, Finding

NODES = """
{apiVersion: v1, kind: Node, metadata: {name: a}, spec: {podCIDRs: [10.244.1.0/24]},
 status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: b}, spec: {podCIDRs: [10.244.1.0/25]},
 status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}}
"""


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    (tmp_path / "nodes.yaml").write_text(NODES)
    return tmp_path


def doctor(*words: str | Path, expect: int) -> Result:
    done = CliRunner().invoke(main, ["doctor", *map(str, words)])
    assert done.exit_code == expect, done.output
    return done


def test_what_manifests_alone_tell(manifests: Path) -> None:
    first, second, *_ = doctor("-f", manifests, expect=1).output.splitlines()
    assert first == "error: b: podCIDR 10.244.1.0/25 of Node b overlaps 10.244.1.0/24 of Node a"
    assert second == "    kubectl delete node b   # and let it join again"


def test_as_data_it_has_stable_keys(manifests: Path) -> None:
    content = json.loads(doctor("-f", manifests, "-o", "json", expect=1).output)
    assert content.keys() == {"ok", "nodes", "findings", "checked"}
    assert not content["ok"]
    assert [each.keys() for each in content["findings"]] == [{"severity", "topic", "node", "cause", "mend"}]
    assert "severity: error" in doctor("-f", manifests, "-o", "yaml", expect=1).output


def test_well_is_the_exit_status_0(manifests: Path) -> None:
    (manifests / "nodes.yaml").write_text(NODES.replace("10.244.1.0/25", "10.244.2.0/25"))
    assert doctor("-f", manifests, expect=0).output.splitlines() == [
        "nothing is wrong",
        "checked: the Nodes' podCIDRs, beside each other, the Nodes' addresses and the Services'",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--node", "a"], "node a has no podwall agent; these have: none"),
        (["--config", "nodes.yaml"], "--config goes with --here"),
        (["-o", "text"], "is not one of"),
    ],
    ids=lambda each: str(each)[:20],
)
def test_wrong_usage(manifests: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(manifests)
    assert said in doctor("-f", manifests, *words, expect=2).output


def test_nobody_to_ask_is_another_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    doctor(expect=3)


def plain(found: list[Finding], names: list[str]) -> list[str]:
    return [each.text if isinstance(each, Coloured) else each for each in lines(found, names)]


def test_what_many_nodes_have_is_said_once() -> None:
    names = [f"n{number}" for number in range(5)]
    found = [Finding("warning", "t", name, "a cause", f"mend {name}") for name in names]
    assert plain(found, names) == [
        "warning: n0, n1, n2 and 2 more: a cause",
        "    mend n0",
        "",
        "5 warnings",
        f"checked on 5 nodes (n0, n1, n2 and 2 more): {'; '.join(CHECKED)}",
    ]


def test_a_note_is_nothing_wrong() -> None:
    note = Finding("note", "t", "a", "worth knowing")
    assert plain([note], ["a"])[:3] == ["note: a: worth knowing", "", "nothing is wrong on 1 node (a)"]


def test_a_hostile_name_steers_no_terminal(tmp_path: Path) -> None:
    hostile = NODES.replace("name: b", 'name: "b\\e[2J"')
    (tmp_path / "nodes.yaml").write_text(hostile)
    assert "\x1b" not in CliRunner().invoke(main, ["doctor", "-f", str(tmp_path)], color=True).output.replace(
        "\x1b[31m", ""
    ).replace("\x1b[33m", "").replace("\x1b[34m", "").replace("\x1b[0m", "")
