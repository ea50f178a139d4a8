"""`podwall why` on manifests: what it prints, in every form, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli.lines import Lines
from agent.cli.main import main
from agent.cli.why import Compared, in_the_kernel, lines
from agent.cluster.manifests import load
from agent.cluster.store import snapshot_of
from agent.explain.answer import Answer
from agent.explain.ends import Meant, ends_named
from agent.explain.pairs import Questions, each_asked
from agent.explain.question import Question
from agent.explain.world import World

MANIFESTS = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: client, labels: {app: client}}
spec: {nodeName: node-1, containers: [{name: main}]}
status: {phase: Running, podIPs: [{ip: 10.244.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web, labels: {app: web}}
spec: {nodeName: node-1, containers: [{name: main, ports: [{name: http, containerPort: 8080}]}]}
status: {phase: Running, podIPs: [{ip: 10.244.0.3}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  namespace: shop
  name: web
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - ports:
        - port: 9090
    - from:
        - podSelector: {matchLabels: {app: friend}}
      ports:
        - port: 8080
"""
REPLICA = """\
---
apiVersion: v1
kind: Pod
metadata:
  namespace: shop
  name: job-{number}
  labels: {{app: {app}}}
  ownerReferences: [{{apiVersion: batch/v1, kind: Job, name: job, uid: u, controller: true}}]
spec: {{nodeName: node-1, containers: [{{name: main}}]}}
status: {{phase: Running, podIPs: [{{ip: 10.244.0.1{number}}}]}}
"""
APPS = ("friend", "friend", "old")
JOB = "".join(REPLICA.format(number=number, app=app) for number, app in enumerate(APPS))
LINE = MANIFESTS.splitlines().index
PORTS, FROM = LINE("    - ports:") + 1, LINE("    - from:") + 1
SENTENCE = (
    "denied: ingress policy shop/web of Pod shop/web does not let Pod shop/client in on TCP 8080: "
    "its podSelector asks for app=friend, but Pod shop/client has app=client"
)


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(MANIFESTS + JOB)
    return path


def run(manifests: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["why", "-f", str(manifests), "-n", "shop", *words])


def test_the_sentence_comes_first_and_what_decides_with_its_line(manifests: Path) -> None:
    done = run(manifests, "client", "pod/web")

    assert done.exit_code == 0
    first, *others = done.output.splitlines()
    assert first == SENTENCE
    assert f"{'':17}{manifests}:{FROM}: NetworkPolicy shop/web spec.ingress[1]" in others
    assert f"{'':17}{manifests}:{PORTS}: NetworkPolicy shop/web spec.ingress[0]" in others
    assert "  # NetworkPolicy shop/web: add to spec.ingress[1].from" in others


def test_programs_get_the_same(manifests: Path) -> None:
    read: dict[str, Any] = {
        "json": json.loads(run(manifests, "client", "pod/web", "-o", "json").output),
        "yaml": yaml.safe_load(run(manifests, "client", "pod/web", "-o", "yaml").output),
    }
    assert read["json"] == read["yaml"]
    answer = read["json"]
    assert (answer["allowed"], answer["cause"], answer["sentence"]) == (False, "ingress-denied", SENTENCE)
    assert answer["nodes"] == []
    assert answer["pairs"] == {
        "total": 1,
        "asked": 1,
        "allowed": 0,
        "alike": True,
        "text": "",
        "each": [
            {
                "source": "Pod shop/client",
                "target": "Pod shop/web",
                "allowed": False,
                "cause": "ingress-denied",
            }
        ],
    }
    ingress = next(step for step in answer["steps"] if step["stage"] == "ingress")
    assert ingress["fields"][0] == {
        "kind": "NetworkPolicy",
        "object": "shop/web",
        "field": "spec.ingress[1]",
        "file": str(manifests),
        "line": FROM,
    }


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["client", "pod/web:8080"], 0, "denied"),
        (["client", "pod/web:8080", "--exit-code"], 1, "denied"),
        (["client", "pod/web:9090", "--exit-code"], 0, "allowed"),
        (["client", "nobody:80"], 2, "is no Pod, Service or node"),
        (["client", "pod/web:99999"], 2, "is not from 1 to 65535"),
        (["deploy/web", "pod/web"], 2, "'deploy/web' is no Deployment with Pods in namespace shop"),
        (["client", "node-1"], 2, "is no Pod, Service or node"),
        (["203.0.113.10", "pod/web:9090", "--protocol", "TCP"], 0, "allowed"),
    ],
)  # fmt: skip
def test_how_it_ends(manifests: Path, words: list[str], status: int, said: str) -> None:
    done = run(manifests, *words)
    assert (done.exit_code, said in done.output) == (status, True), done.output


def test_the_pods_of_a_workload_that_differ(manifests: Path) -> None:
    """The answer is that of one that is denied; beside the sentence it is said how the others are."""
    done = run(manifests, "job", "pod/web:8080", "--exit-code")

    assert done.exit_code == 1
    first, second, *_ = done.output.splitlines()
    assert first.startswith("denied: ingress policy shop/web of Pod shop/web does not let Pod shop/job-2 in")
    assert second == "allowed for 2 of the 3 Pods of Job shop/job: job-0, job-1"


def test_programs_get_every_pair(manifests: Path) -> None:
    answer = json.loads(run(manifests, "job/job", "pod/web:8080", "-o", "json").output)

    assert (answer["allowed"], answer["cause"]) == (False, "ingress-denied")
    counts = {key: answer["pairs"][key] for key in ("total", "asked", "allowed", "alike")}
    assert counts == {"total": 3, "asked": 3, "allowed": 2, "alike": False}
    assert [(each["source"], each["target"], each["allowed"]) for each in answer["pairs"]["each"]] == [
        ("Pod shop/job-0", "Pod shop/web", True),
        ("Pod shop/job-1", "Pod shop/web", True),
        ("Pod shop/job-2", "Pod shop/web", False),
    ]


def test_the_pods_of_a_workload_that_are_alike(manifests: Path) -> None:
    done = run(manifests, "web", "job/shop/job:80", "--exit-code")
    first, second, *_ = done.output.splitlines()
    assert first.startswith("allowed: Pod shop/web may connect to Pod shop/job-0 on TCP 80")
    assert second == "the same for each of the 3 Pods of Job shop/job"


def test_a_hostile_name_reaches_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(MANIFESTS.replace("name: web\n", 'name: "web\\u001b[2J"\n'))
    done = run(path, "client", "pod/web")
    assert "\x1b" not in done.output
    assert "web\\x1b[2J" in done.output


def test_files_that_nobody_has_applied_are_taken_as_if_they_were() -> None:
    """Workloads become Pods with addresses, Services get theirs, and lines are those of the files."""
    directory = Path(__file__).parents[3] / "examples" / "troubleshooting"
    done = CliRunner().invoke(
        main, ["why", "-f", str(directory), "-n", "broken", "client", "svc/guarded:80", "-o", "json"]
    )

    assert "taken as if they were applied" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["cause"] == "ingress-denied"
    (ingress,) = (step["fields"] for step in answer["steps"] if step["stage"] == "ingress")
    text = (directory / "broken.yaml").read_text().splitlines()
    assert text[ingress[0]["line"] - 1].strip().startswith("- from:")


def test_what_a_node_does_otherwise_comes_before_all_else() -> None:
    answer = Answer(True, "allowed", "allowed: by nobody")
    drops = Compared("node2", ("they drop it",), passes=False)
    passes = Compared("node2", ("they lead it elsewhere",), passes=True)
    silent = Compared("node1", silent="the agent does not answer")

    assert in_the_kernel(answer, [silent]) == answer
    told = in_the_kernel(answer, [silent, drops])
    assert (told.allowed, told.cause) == (False, "rules-differ")
    assert told.sentence == (
        "denied: the rules on node2 differ from what the policies and Services say: they drop it "
        "(by the objects: allowed: by nobody)"
    )
    assert in_the_kernel(answer, [passes]).sentence.startswith("allowed: the rules on node2 differ")


def test_of_the_others_nobody_says_what_the_nodes_do(manifests: Path) -> None:
    """The rules are compared for the pair that is told alone."""
    world = World(snapshot_of(load((manifests,)).objects))
    pod = world.snapshot.pods["shop", "web"]
    job = ends_named(world, "job", "shop")
    pairs = each_asked(
        world, Questions(Meant((pod,)), job, Question(source=pod, target=job.ends[0], port=80))
    )

    drops = Compared("node-1", ("they drop it",), passes=False)
    said = list(lines(pairs, [drops], Lines({})))
    assert said[1] == "by the objects the same for each of the 3 Pods of Job shop/job"
