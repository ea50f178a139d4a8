"""What an apply does about Pods and files, and how the matrix tells what it saw."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from lab import matrix
from lab.apply import Job, jobs
from lab.controllers import LabNode, expand
from lab.manifests import ObjectDirectory, read
from lab.objects import Key, ManifestError, Object, key_of
from lab.probe import CONNECTED, SILENT, Outcome

KEY = Key("Pod", "default", "a")
HELLO = Path(__file__).parents[2] / "examples" / "hello"


def pod(phase: str = "Running", uid: str = "1", node: str = "node1", **metadata: object) -> Object:
    return {
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "default", "uid": uid, **metadata},
        "spec": {"nodeName": node},
        "status": {"phase": phase},
    }


def wanted(**metadata: object) -> Object:
    return {
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "default", **metadata},
        "spec": {"nodeName": "node1"},
    }


@pytest.mark.parametrize(
    ("name", "before", "after", "verbs"),
    [
        ("new", None, wanted(), {"start"}),
        ("gone", pod(), None, {"stop"}),
        ("the same", pod(), wanted(), set()),
        ("other labels", pod(), wanted(labels={"a": "b"}), {"write"}),
        ("other node", pod(node="node2"), wanted(), {"stop", "start"}),
        ("failed before", pod("Pending"), wanted(), {"stop", "start"}),
        ("was being stopped", pod(deletionTimestamp="2026-01-01T00:00:00Z"), wanted(), {"stop", "start"}),
    ],
)
def test_what_is_done_about_a_pod(
    name: str, before: Object | None, after: Object | None, verbs: set[str]
) -> None:
    found = jobs({KEY: before} if before else {}, {KEY: after} if after else {}).get(KEY, Job())

    assert {verb for verb in ("start", "stop", "write") if getattr(found, verb)} == verbs, name
    if found.start:
        assert found.start["metadata"]["uid"] != "1"


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "scratch").mkdir()
    directory = ObjectDirectory(tmp_path / "objects", tmp_path / "scratch")
    one, two = pod(), {**pod(), "kind": "Service"}

    assert directory.converge({key_of(one): one, key_of(two): two}, lambda _kind: True) == 2
    assert directory.converge({key_of(one): one}, "Pod".__eq__) == 0
    assert directory.read() == {key_of(one): one, key_of(two): two}
    assert directory.converge({}, "Service".__eq__) == 1
    assert directory.read() == {key_of(one): one}
    assert not list((tmp_path / "scratch").iterdir())


def test_the_example_says_what_it_comes_to() -> None:
    found = expand(read([HELLO]), [LabNode("node1", {}), LabNode("node2", {})], {})

    names = sorted(f"{key.namespace}/{key.name.partition('-')[0]}" for key in found.of("Pod"))
    assert names == ["data/db", "data/db", "hello/client", "hello/web", "hello/web", "hello/web"]
    assert {pod["spec"]["nodeName"] for pod in found.of("Pod").values()} == {"node1", "node2"}
    assert not found.notes


def test_a_directory_without_manifests_and_a_broken_file_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=str(tmp_path)):
        read([tmp_path])
    (tmp_path / "bad.yaml").write_text("kind: [")
    with pytest.raises(ManifestError, match=r"bad\.yaml: this is not YAML"):
        read([tmp_path])


def host(name: str, number: int, *ports: int) -> matrix.Host:
    addresses = (ip_address(f"10.244.1.{number}"), ip_address(f"fd00::{number}"))
    return matrix.Host(name, Path("/none"), addresses, ports, "node1")


def test_the_matrix_tries_everybody_else_in_both_families() -> None:
    hosts = [host("ns/a", 1, 80, 81), host("ns/b", 2, 80)]

    found = list(matrix.trials([*hosts, host("node1", 9)], hosts, matrix.everything))

    assert len(found) == (4 + 8 + 12)
    assert not [trial for trial in found if trial.source == trial.target]


def test_the_table_marks_what_was_seen() -> None:
    hosts = [host("ns/a", 1, 80), host("ns/b", 2, 80), host("ns/c", 3, 80)]
    outcomes = {
        ("ns/a", "ns/b"): Outcome(SILENT),
        ("ns/b", "ns/a"): Outcome(CONNECTED, "ns/c"),
    }
    results = [
        matrix.Result(trial, outcomes.get((trial.source, trial.target), Outcome(CONNECTED, trial.target)))
        for trial in matrix.trials(hosts, hosts, matrix.everything)
    ]

    table = matrix.Table(hosts, hosts, results, colour=False).render(0.5)

    rows = {line.split()[1]: line.split()[3:] for line in table.splitlines()[1:4]}
    assert rows == {"ns/a": ["··", "!!", "46"], "ns/b": ["!!", "··", "46"], "ns/c": ["46", "46", "··"]}
    assert "ns/a -> ns/b 10.244.1.2 TCP 80: silent, expected connected" in table
    assert "ns/b -> ns/a fd00::1 UDP 80: connected, answered by 'ns/c', expected connected" in table
    assert "\033" not in table


def test_denied_as_expected_is_good_and_unknown_is_not_judged() -> None:
    hosts = [host("ns/a", 1, 80), host("ns/b", 2, 80)]
    for expected in (lambda _trial: False, matrix.unknown):
        results = [matrix.Result(trial, Outcome(SILENT)) for trial in matrix.trials(hosts, hosts, expected)]
        assert all(result.good for result in results)
        assert " --" in matrix.Table(hosts, hosts, results, colour=False).render(0.1)
