"""`podwall matrix` on manifests: what it prints, in every form, and how it ends; how agents are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli.agents import Agents, SilentError
from agent.cli.main import main
from agent.cli.probes import PER_QUESTION, observe
from agent.cluster.model import Pod
from agent.explain.seen import Attempt
from tests.agent.compile.worlds import namespace, pod, policy

HOSTILE = "x\x1b[31m\u202e</svg>"

OBJECTS = [
    namespace("shop"),
    pod("shop/web", "10.244.0.2", ports=[("http", 80)], app="web"),
    pod("shop/api", "10.244.0.3", ports=[("http", 8080)], app="api"),
    pod("shop/tool", "10.244.0.4", app="tool"),
    pod("shop/waits", app="tool"),
    pod("shop/done", "10.244.0.5", app="tool", phase="Failed"),
    policy(
        "shop/api",
        podSelector={"matchLabels": {"app": "api"}},
        ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}],
    ),
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(OBJECTS))
    return path


def run(files: Path, *words: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, ["matrix", "-f", str(files), *words], env={"COLUMNS": "100"})
    assert done.exit_code == status, done.output
    return done


def lines(files: Path, *words: str) -> list[str]:
    return run(files, *words).output.splitlines()


def test_the_table(files: Path) -> None:
    assert lines(files, "-n", "shop") == [
        "FROM    api        web",
        "        TCP 8080   TCP 80",
        "api     .          yes",
        "tool    no         yes",
        "waits   no         yes",
        "web     yes        .",
        "",
        "addresses made up: 1, so that an ipBlock may be misjudged",
        "without such a port, so no column (--port PORT asks for one): shop/tool, shop/waits",
    ]


def test_columns_that_do_not_fit_have_numbers(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    names = ("first-of-long-names", "second-of-long-names", "third-of-long-names")
    pods = [pod(f"shop/{name}", f"10.244.0.{at}") for at, name in enumerate(names, 2)]
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": pods}))
    asked = ["matrix", "-f", str(path), "-A", "--port", "65535", "--protocol", "sctp"]
    assert CliRunner().invoke(main, asked, env={"COLUMNS": "60"}).output.splitlines() == [
        "FROM                   1      2      3",
        "first-of-long-names    .      yes    yes",
        "second-of-long-names   yes    .      yes",
        "third-of-long-names    yes    yes    .",
        "",
        "   1   first-of-long-names SCTP 65535",
        "   2   second-of-long-names SCTP 65535",
        "   3   third-of-long-names SCTP 65535",
    ]


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["-n", "shop", "--from", "web", "--to", "api"], "web    yes"),
        (["--from", "shop/tool", "--to", "shop/api"], "tool   no"),
        (["-n", "shop", "--from", "tool", "--to", "api:80"], "tool   no"),
        (["-n", "shop", "--from", "web", "--to", "api", "--port", "http"], "web    yes"),
        (["-n", "shop", "--from", "web", "--to", "203.0.113.10:443"], "web    yes"),
        (["-A", "-l", "app=tool", "--to", "shop/api"], "tool    no"),
        (["-A", "-l", "app in (api)", "--to", "shop/web"], "api    yes"),
    ],
)
def test_rows_and_columns_that_are_asked_for(files: Path, words: list[str], row: str) -> None:
    assert lines(files, *words)[2] == row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "gone"], "no such Pod has an address in namespace gone: -n NAMESPACE, or -A for all"),
        (["-A", "--from", "shop/gone"], "'shop/gone' is no Pod or workload with Pods in namespace shop"),
        (["-A", "--from", "shop/done"], "Pod shop/done has ended"),
        (["-A", "-l", "a b"], "'a b' is no label"),
        (["-A", "--port", "0"], "port 0 is not from 1 to 65535"),
        (["-A", "--port", "nobodys"], "none of these Pods has such a port"),
        (["-A", "--probe"], "--probe needs a cluster"),
        (["-A", "--expect", "nowhere.yaml"], "--expect goes with -n, --probe and -o table"),
        (["--expect", "nowhere.yaml"], "nowhere.yaml: [Errno 2] No such file or directory"),
        (
            ["-A", "--picture", "/nowhere/m.svg"],
            "/nowhere/m.svg cannot be written: No such file or directory",
        ),
    ],
)
def test_what_is_asked_wrongly(files: Path, words: list[str], said: str) -> None:
    assert said in run(files, *words, status=2).output


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_plain_data_is_whole(files: Path, output: str) -> None:
    said = yaml.safe_load(run(files, "-n", "shop", "--to", "api", "-o", output).output)
    assert said["differences"] == []
    assert said["connections"][0] == {
        "source": "shop/tool",
        "target": "Pod shop/api",
        "source_address": "10.244.0.4",
        "address": "10.244.0.3",
        "protocol": "TCP",
        "port": 8080,
        "allowed": False,
        "cause": "ingress-denied",
        "seen": None,
        "words": "",
        "differs": False,
    }


def test_what_it_writes_it_expects(files: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.yaml"
    expected.write_text(run(files, "-A", "-o", "expect").output)
    assert "- from: shop/web\n  to: shop/api:8080\n  allowed: true\n" in expected.read_text()
    made_up = "addresses made up: 1, so that an ipBlock may be misjudged"
    assert lines(files, "--expect", str(expected)) == [made_up, "6 of 6 expectations hold"]


def test_an_expectation_that_does_not_hold(files: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.yaml"
    expected.write_text(
        "- {from: web, to: 'api:8080', allowed: true}\n"
        "- {from: tool, to: 'api:8080', allowed: true}\n"
        "- {from: wbe, to: 'api:8080', allowed: false}\n"
    )
    asked = ["-n", "shop", "--expect", str(expected)]
    said = run(files, *asked, status=1).output.splitlines()
    assert said[0] == f"no  {expected}:2: tool to api:8080 shall be allowed"
    assert said[1].startswith(
        "      denied: ingress policy shop/api of Pod shop/api does not let Pod shop/tool in"
    )
    assert said[2:] == [
        f"no  {expected}:3: wbe to api:8080 shall be denied",
        "      'wbe' is no Pod or workload with Pods in namespace shop",
        "addresses made up: 1, so that an ipBlock may be misjudged",
        "1 of 3 expectations hold",
    ]
    assert run(files, *asked, "-o", "wide", status=1).output.startswith(f"ok  {expected}:1: web to api:8080")
    whole = json.loads(run(files, *asked, "-o", "json", status=1).output)
    assert [each["holds"] for each in whole["expectations"]] == [True, False, False]


def test_names_reach_neither_terminal_nor_picture(tmp_path: Path) -> None:
    path, picture = tmp_path / "objects.json", tmp_path / "m.svg"
    objects = [pod(f"shop/{HOSTILE.replace('/', '')}", "10.244.0.2", ports=[("http", 80)]), pod("shop/b")]
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    said = run(path, "-A", "--picture", str(picture)).output
    assert "\\x1b[31m\\u202e<svg>" in said
    for text in (said, picture.read_text(), run(path, "-A", "-o", "expect").output):
        assert not {"\x1b", "\u202e"} & set(text)


# Asking the agents


class FakeLine:
    """An agent that connects to even ports only; asked a third time it is silent."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.asked: list[int] = []

    def ask(self, call: str, body: Mapping[str, Any]) -> Any:
        assert call == "probe"
        pods = body["pods"]
        assert all(each["name"].startswith(self.node) for each in pods)
        self.asked.append(sum(len(each["targets"]) for each in pods))
        if len(self.asked) == 3:
            raise SilentError("it has ended")
        verdicts = ["connected", "silent"]
        return {"pods": [[[verdicts[port % 2], ""] for _, port, _ in of["targets"]] for of in pods]}

    def close(self) -> None:
        pass


def test_nodes_are_asked_in_questions_that_fit() -> None:
    lines = {node: FakeLine(node) for node in ("one", "two")}
    pods = [Pod("shop", f"{node}-{n}", node=node) for node in ("one", "two", "three") for n in range(2)]
    wanted: list[tuple[Pod, Attempt]] = [
        (of, (of.key, ip_address("10.0.0.1"), "TCP", port))
        for of in pods
        for port in range(1, 1 + (3 if of.node == "two" else 3 * PER_QUESTION // 2))
    ]
    with Agents({node: lambda line=line: line for node, line in lines.items()}) as agents:  # type: ignore[misc]
        seen = observe(agents, [*wanted, *wanted[:5]])

    assert lines["one"].asked == [PER_QUESTION] * 3
    assert lines["two"].asked == [6]
    assert len(seen) == len(wanted)
    verdicts = {
        node: {seen[each].verdict for of, each in wanted if of.node == node} for node in ("one", "two")
    }
    assert verdicts == {"one": {"connected", "silent", "failed"}, "two": {"connected", "silent"}}
    assert {seen[each].words for of, each in wanted if of.node == "three"} == {
        "node three has no podwall agent"
    }
    failed = {seen[each].words for of, each in wanted if of.node == "one"} - {""}
    assert failed == {"it has ended"}
