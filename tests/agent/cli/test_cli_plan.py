"""`podwall plan` on manifests: what it says to a person and to a program, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli.main import main
from tests.agent.compile.worlds import namespace, pod, policy

OF_API = {"podSelector": {"matchLabels": {"app": "api"}}}
FROM_WEB = [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}]
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node-1"},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.168.10.1"}]},
}
CLUSTER = [
    NODE,
    namespace("shop"),
    pod("shop/api", "10.244.0.2", ports=[("http", 8080)], app="api"),
    pod("shop/web", "10.244.0.3", app="web"),
    pod("other/job", "10.244.0.4", app="job"),
]
DENY = policy("shop/api", **OF_API, ingress=FROM_WEB)


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """Writes objects into a file; its path."""

    def write(name: str, *objects: dict[str, Any]) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(objects))
        return str(path)

    return write


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_a_person_reads_what_it_means_and_what_follows(files: Any) -> None:
    done = run("-f", files("deny", DENY), "--from", files("cluster", *CLUSTER))
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "It closes ways of 3 pairs.",
        "",
        "NetworkPolicy shop/api (new) isolates 1 Pod of shop for ingress; it lets in what comes from Pods "
        "app=web of its own namespace on TCP http",
        "",
        "CHANGE   FROM                             TO         PORTS                     DECLARED",
        "closes   other/job, outside the cluster   shop/api   every port                TCP 8080",
        "closes   shop/web                         shop/api   every port but TCP 8080   <none>",
    ]


def test_a_program_reads_all_of_it(files: Any) -> None:
    done = run("-f", files("deny", DENY), "--from", files("cluster", *CLUSTER), "-o", "json")
    content = json.loads(done.stdout)
    assert content["closes"] is True
    assert content["connections_asked"] is None
    assert content["ways"][1] == {
        "change": "closes",
        "from": [{"kind": "pods", "names": ["shop/web"]}],
        "to": [{"kind": "pods", "names": ["shop/api"]}],
        "ports": [
            {"protocol": "TCP", "first": 0, "last": 8079},
            {"protocol": "TCP", "first": 8081, "last": 65535},
            {"protocol": "UDP", "first": 0, "last": 65535},
            {"protocol": "SCTP", "first": 0, "last": 65535},
            {"protocol": "other", "first": 0, "last": 0},
        ],
        "declared": [],
        "family": None,
    }
    as_yaml = run("-f", files("deny", DENY), "--from", files("cluster", *CLUSTER), "-o", "yaml")
    assert yaml.safe_load(as_yaml.stdout) == content


AUDITED = {**DENY, "metadata": {**DENY["metadata"], "annotations": {"podwall.dev/mode": "audit"}}}
ENDINGS: dict[str, tuple[list[dict[str, Any]], list[str], int, str]] = {
    "something closes": ([], ["-f", "deny"], 1, "It closes ways of 3 pairs."),
    "something opens": ([DENY], ["--delete", "netpol/shop/api"], 0, "It opens ways of 3 pairs."),
    "by its file": ([DENY], ["--delete", "deny"], 0, "It opens ways of 3 pairs."),
    "of the namespace that is asked": (
        [DENY],
        ["--delete", "netpol/api", "-n", "shop"],
        0,
        "It opens ways of 3",
    ),
    "nothing changes": ([DENY], ["-f", "deny"], 0, "It opens and closes no way."),
    "an audit closes nothing": ([], ["-f", "audit"], 0, "It opens and closes no way."),
    "until it is enforced": ([AUDITED], ["--enforce-audit"], 1, "It closes ways of 3 pairs."),
    "nothing to delete": ([], ["--delete", "netpol/shop/gone"], 0, "It opens and closes no way."),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_how_it_ends(files: Any, name: str) -> None:
    present, arguments, code, first = ENDINGS[name]
    written = {"deny": files("deny", DENY), "audit": files("audit", AUDITED)}
    arguments = [written.get(each, each) for each in arguments]
    done = run(*arguments, "--from", files("cluster", *CLUSTER, *present), "--exit-code")
    assert (done.exit_code, done.stdout.splitlines()[0][: len(first)]) == (code, first), done.output


BY = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "", "controller": True}
OWNED = pod("shop/db-0", "10.244.0.5", app="db")
OWNED["metadata"]["ownerReferences"] = [BY]
STATEFUL_SET = {
    "apiVersion": "apps/v1",
    "kind": "StatefulSet",
    "metadata": {"namespace": "shop", "name": "db"},
    "spec": {"template": {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [{"name": "main"}]}}},
}


def test_a_file_is_deleted_by_its_name_alone(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files("deny", DENY)
    monkeypatch.chdir(tmp_path)
    done = run("--delete", "deny.yaml", "--from", files("cluster", *CLUSTER, DENY), "-o", "json")
    assert json.loads(done.stdout)["changes"] == [
        "NetworkPolicy shop/api (removed) no longer isolates 1 Pod of shop; nothing else isolates 1 of them"
    ], done.output


@pytest.mark.parametrize("named", ["sts/shop/db", "a file"])
def test_a_workload_is_deleted_with_its_pods(files: Any, named: str) -> None:
    gone = files("workload", STATEFUL_SET) if named == "a file" else named
    done = run("--delete", gone, "--from", files("cluster", *CLUSTER, OWNED), "-o", "json")
    assert json.loads(done.stdout)["changes"] == ["Pod shop/db-0 (removed)"], done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what would change"),
        (["--delete", "ingress/web"], "no KIND/NAME with netpol, pod, deploy, sts, ds, job, svc or ns"),
        (["--delete", "netpol/"], "no KIND/NAME"),
        (["--delete", "deny"], "deny: no such file, and no KIND/NAME"),
        (["-f", "/nowhere.yaml"], "does not exist"),
    ],
)
def test_wrong_usage_says_what_to_do(files: Any, arguments: list[str], said: str) -> None:
    done = run(*arguments, "--from", files("cluster", *CLUSTER))
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_file_that_cannot_be_read_changes_nothing(files: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("kind: [")
    done = run("-f", str(tmp_path / "broken.yaml"), "--from", files("cluster", *CLUSTER))
    assert done.exit_code == 2
    assert "broken.yaml" in done.stderr


def test_what_it_does_not_look_at_and_cannot_use_is_said(files: Any) -> None:
    unknown = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web"}}
    bad = policy("gone/api", ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}])
    path = files("change", unknown, bad)
    lines = run("-f", path, "--from", files("cluster", *CLUSTER)).stdout.splitlines()
    assert any(line.startswith("not usable: NetworkPolicy gone/api: spec.ingress[0]") for line in lines)
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {path}, document 1 (line 1): ConfigMap is not looked at",
        "note: namespace gone is not there: apply would fail",
    ]


def test_names_cannot_write_to_the_terminal(files: Any) -> None:
    hostile = pod("shop/api", "10.244.0.2", app="api")
    hostile["metadata"]["labels"] = {"app": "\x1b[31mapi"}
    done = run("-f", files("change", hostile), "--from", files("cluster", *CLUSTER))
    assert "\x1b" not in done.stdout


def test_a_workload_with_other_labels(files: Any) -> None:
    def deployment(app: str) -> dict[str, Any]:
        template = {"metadata": {"labels": {"app": app}}, "spec": {"containers": [{"name": "main"}]}}
        meta = {"namespace": "shop", "name": "web"}
        spec = {"replicas": 2, "selector": {"matchLabels": {"app": app}}, "template": template}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec}

    others = [NODE, namespace("shop"), pod("shop/api", "10.244.0.2", ports=[("http", 8080)], app="api"), DENY]
    lines = run(
        "-f", files("other", deployment("front")), "--from", files("cluster", *others, deployment("web"))
    ).stdout.splitlines()
    assert lines[0] == "It closes ways of 2 pairs."
    assert "closes   every Pod   shop/api   TCP 8080   TCP 8080" in lines, "every other one"
    assert "note: Deployment shop/web rolls out: its Pods are replaced, and their connections end" in lines


def test_a_namesake_of_another_api_group_is_no_policy(files: Any) -> None:
    of_another = {**DENY, "apiVersion": "projectcalico.org/v3"}
    path = files("other", of_another)
    done = run("-f", path, "--from", files("cluster", *CLUSTER), "-o", "json")
    content = json.loads(done.stdout)
    assert (content["changes"], content["ways"]) == ([], [])
    assert content["notes"] == [
        f"{path}, document 1 (line 1): NetworkPolicy of projectcalico.org is not looked at"
    ]


def test_that_nothing_changes_is_not_said_of_what_is_not_looked_at(files: Any) -> None:
    unknown = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web"}}
    done = run("-f", files("other", unknown), "--from", files("cluster", *CLUSTER))
    assert done.stdout.splitlines()[2] == "Nothing that is looked at changes."
    done = run("-f", files("same", namespace("shop")), "--from", files("cluster", *CLUSTER))
    assert done.stdout.splitlines()[2] == "Nothing changes: everything is there already."
