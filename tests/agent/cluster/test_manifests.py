"""Manifests: what is read, what is named when it cannot be, and what follows an edit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.cluster.manifests import ManifestError, Manifests, ManifestSource, load, parse
from agent.cluster.model import Event, NetworkPolicy, Pod, Service, Synced, Upsert
from agent.cluster.store import Store
from tests.agent.waiting import eventually

POD = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}}
spec: {{nodeName: a}}
status: {{phase: Running, podIPs: [{{ip: {ip}}}]}}
"""
DENY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}}
"""


def read(tmp_path: Path, text: str, name: str = "file.yaml") -> Manifests:
    (tmp_path / name).write_text(text)
    return load([tmp_path])


def keys(manifests: Manifests) -> list[object]:
    return [item.key for item in manifests.objects]


def test_several_documents_and_namespaces_nobody_wrote(tmp_path: Path) -> None:
    pods = (
        "---\n# a comment\n"
        + POD.format(name="a", ip="10.0.0.1")
        + "---\n\n---\n"
        + POD.format(name="b", ip="10.0.0.2")
    )
    result = read(tmp_path, pods)
    assert keys(result) == ["shop", ("shop", "a"), ("shop", "b")]
    assert result.objects[0].labels == {"kubernetes.io/metadata.name": "shop"}  # type: ignore[union-attr]
    assert not result.errors
    assert str(result.places["Pod", ("shop", "b")]) == f"{tmp_path}/file.yaml, document 2 (line 11)"


def test_lists_and_json(tmp_path: Path) -> None:
    nodes = (
        '{"kind": "NodeList", "apiVersion": "v1", "items": [{"metadata": {"name": "a"}}, {"metadata": {}}]}'
    )
    result = read(tmp_path, nodes, "nodes.json")
    assert keys(result) == ["a"]
    assert [str(error) for error in result.errors] == [
        f"{tmp_path}/nodes.json, document 1 (line 1), items[1]: "
        "Node (without a name): metadata.name: is missing"
    ]
    mixed = "kind: List\napiVersion: v1\nitems:\n" + "".join(
        "- " + POD.format(name=name, ip="10.0.0.1").replace("\n", "\n  ").strip() + "\n"
        for name in ("x", "y")
    )
    assert keys(load([read_file(tmp_path / "list.yaml", mixed)])) == ["shop", ("shop", "x"), ("shop", "y")]


def read_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("kind: Pod\nmetadata: {name: x", 1, "is not YAML: line 5"),
        ("kind: Pod\n\tmetadata: x", 1, "is not YAML: line 4"),
        ("just text", 1, "'just text' is not a Kubernetes object"),
        ("- a\n- b", 1, "is not a Kubernetes object"),
        ("apiVersion: v1", 1, "kind: is missing"),
        ("kind: Pod", 1, "apiVersion: is missing"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}", 1, "metadata.name: is missing"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: x, labels: {a: 1}}",
            1,
            "metadata.labels: Expected `str`",
        ),
        (
            "apiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy\nmetadata: {name: x}",
            1,
            "write networking.k8s.io/v1",
        ),
        ("{1: a, kind: Pod, apiVersion: v1}", 1, "the key 1 is not a string"),
        ("a: &a [1, *a]", 1, "nested too deeply"),
        ("a: !!python/object:os.system {}", 1, "is not YAML"),
        ("\n\n\napiVersion: v1\nkind: 7", 4, "kind: is missing"),
    ],
)
def test_a_document_that_cannot_be_read_leaves_the_others(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    good = POD.format(name="good", ip="10.0.0.1")
    result = read(tmp_path, f"# first\n---\n{text}\n---\n{good}")
    assert keys(result) == ["shop", ("shop", "good")]
    (error,) = result.errors
    assert f"file.yaml, document 1 (line {line + 2})" in str(error)
    assert message in error.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.json").write_text('{"kind":\n "Pod",}')
    (tmp_path / ".hidden.yaml").write_text("nonsense: [")
    (tmp_path / "notes.txt").write_text("nonsense: [")
    result = load([tmp_path, tmp_path / "missing.yaml"])
    assert [str(error).removeprefix(f"{tmp_path}/") for error in result.errors] == [
        "missing.yaml: cannot be read: No such file or directory",
        "binary.yaml: is not UTF-8 text (byte 0)",
        "broken.json, document 1 (line 1): is not JSON: line 2: "
        "Expecting property name enclosed in double quotes",
    ]


def test_a_bomb_of_aliases_is_no_document(tmp_path: Path) -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    begun = time.monotonic()
    result = read(tmp_path, "\n".join(layers))
    assert "too large" in result.errors[0].message
    assert time.monotonic() - begun < 10


def test_yaml_as_kubernetes_reads_it() -> None:
    text = "{a: 2025-01-01, b: 1:30, d: 010, e: 0x10, g: yes, h: '1', i: 1.5, j: null, k: 80, l: 1e3}"
    (document,) = parse(Path("x.yaml"), f"kind: X\napiVersion: v1\nvalues: {text}".encode()).documents
    values = document.body["values"]
    assert values["a"] == "2025-01-01"
    assert values["b"] == "1:30"
    assert (values["d"], values["e"], values["g"], values["h"]) == (8, 16, True, "1")
    assert (values["i"], values["j"], values["k"], values["l"]) == (1.5, None, 80, 1000.0)


def test_other_kinds_are_documents_only(tmp_path: Path) -> None:
    other = "---\nkind: Service\napiVersion: serving.knative.dev/v1\n"
    text = f"kind: Deployment\napiVersion: apps/v1\nmetadata: {{name: x}}\n{other}"
    result = read(tmp_path, text)
    assert [document.kind for document in result.documents] == ["Deployment", "Service"]
    assert not result.objects
    assert not result.errors


def test_what_is_wrong_inside_an_object_is_a_problem_of_it(tmp_path: Path) -> None:
    text = DENY.replace(
        "podSelector: {}", "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.041/8}}]}]"
    )
    result = read(tmp_path, text)
    assert not result.errors
    (problem,) = result.problems
    assert "NetworkPolicy shop/deny: spec.ingress[0].from[0].ipBlock.cidr: '10.0.0.041/8'" in str(problem)
    assert any(isinstance(item, NetworkPolicy) for item in result.objects)


def test_the_later_of_two_with_one_name_counts(tmp_path: Path) -> None:
    result = read(
        tmp_path, POD.format(name="a", ip="10.0.0.1") + "---\n" + POD.format(name="a", ip="10.0.0.2")
    )
    (pod,) = [item for item in result.objects if isinstance(item, Pod)]
    assert pod.ips == (ip_address("10.0.0.2"),)
    assert "document 1 (line 1) already: this one counts" in str(result.problems[0])


ENDPOINTS = """\
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {ports: [{port: 80}]%s}
---
apiVersion: v1
kind: Endpoints
metadata: {name: db, namespace: shop, labels: {a: b}}
subsets:
- addresses: [{ip: 203.0.113.10}, {ip: "2001:db8::1", nodeName: a}]
  notReadyAddresses: [{ip: 203.0.113.11}]
  ports: [{name: web, port: 80}]
"""


def test_endpoints_become_slices(tmp_path: Path) -> None:
    store = Store()
    for item in read(tmp_path, ENDPOINTS % "").objects:
        store.apply(Upsert(type(item).__name__, item))  # type: ignore[arg-type]
    four, six = store.snapshot.slices_of(("shop", "db")).values()
    assert (four.address_type, six.address_type) == ("IPv4", "IPv6")
    assert [(str(e.addresses[0]), e.ready) for e in four.endpoints] == [
        ("203.0.113.10", True),
        ("203.0.113.11", False),
    ]
    assert six.endpoints[0].node == "a"
    assert (four.ports[0].name, four.ports[0].port) == ("web", 80)
    assert four.labels["kubernetes.io/service-name"] == "db"
    assert four.labels["a"] == "b"


@pytest.mark.parametrize("text", [ENDPOINTS % ", selector: {app: db}", ENDPOINTS.partition("---")[2]])
def test_endpoints_of_no_such_service_do_not(tmp_path: Path, text: str) -> None:
    assert not [item for item in read(tmp_path, text).objects if not isinstance(item, Service)][1:]


# The source


class Following:
    def __init__(self, directory: Path) -> None:
        self.store = Store()
        self.events: list[Event] = []
        self.errors: list[str] = []
        self.source = ManifestSource(directory, report=self.report, poll_s=0.01)

    def report(self, error: ManifestError) -> None:
        self.errors.append(str(error))

    def take(self, event: Event) -> None:
        self.events.append(event)
        self.store.apply(event)

    @property
    def pods(self) -> dict[str, str]:
        return {key[1]: str(pod.ips[0]) for key, pod in self.store.snapshot.pods.items()}


@contextlib.asynccontextmanager
async def following(directory: Path) -> AsyncIterator[Following]:
    follower = Following(directory)
    task = asyncio.create_task(follower.source.run(follower.take))
    try:
        yield follower
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def write(path: Path, text: str) -> None:
    """As editors and `lab apply` do it: whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


def test_follows_edits(tmp_path: Path) -> None:
    async def story() -> None:
        write(tmp_path / "a.yaml", POD.format(name="a", ip="10.0.0.1"))
        write(tmp_path / "b.yaml", POD.format(name="b", ip="10.0.0.2"))
        async with following(tmp_path) as follower:
            await eventually(lambda: len(follower.store.synced) == 6)
            assert follower.pods == {"a": "10.0.0.1", "b": "10.0.0.2"}
            assert not any(isinstance(event, Synced) for event in follower.events[:3])
            before = len(follower.events)
            begun = time.monotonic()
            write(tmp_path / "a.yaml", POD.format(name="a", ip="10.0.0.3"))
            await eventually(lambda: follower.pods["a"] == "10.0.0.3")
            assert time.monotonic() - begun < 1
            assert len(follower.events) == before + 1
            (tmp_path / "b.yaml").unlink()
            await eventually(lambda: "b" not in follower.pods)
            write(tmp_path / "c.yml", POD.format(name="c", ip="10.0.0.4"))
            await eventually(lambda: "c" in follower.pods)

    asyncio.run(story())


def test_a_broken_edit_leaves_the_last_good_version(tmp_path: Path) -> None:
    async def story() -> None:
        both = POD.format(name="a", ip="10.0.0.1") + "---\n" + DENY
        write(tmp_path / "a.yaml", both)
        async with following(tmp_path) as follower:
            await eventually(lambda: follower.store.synced)
            write(tmp_path / "a.yaml", POD.format(name="a", ip="10.0.0.9") + "---\nspec: [")
            await eventually(lambda: follower.errors)
            write(tmp_path / "b.yaml", POD.format(name="b", ip="10.0.0.2"))
            await eventually(lambda: "b" in follower.pods)
            assert follower.pods["a"] == "10.0.0.1"
            assert follower.store.snapshot.policies
            assert len(follower.errors) == 1
            assert "a.yaml, document 2 (line 7): is not YAML" in follower.errors[0]
            write(tmp_path / "a.yaml", POD.format(name="a", ip="10.0.0.9"))
            await eventually(lambda: follower.pods["a"] == "10.0.0.9")
            assert not follower.store.snapshot.policies

    asyncio.run(story())


def test_a_file_that_was_never_good_gives_what_it_can(tmp_path: Path) -> None:
    async def story() -> None:
        write(tmp_path / "a.yaml", POD.format(name="a", ip="10.0.0.1") + "---\nspec: [")
        async with following(tmp_path) as follower:
            await eventually(lambda: follower.store.synced)
            assert follower.pods == {"a": "10.0.0.1"}
            assert len(follower.errors) == 1

    asyncio.run(story())


def test_an_edit_within_the_same_tick_is_seen(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "a.yaml"
        write(path, POD.format(name="a", ip="10.0.0.1"))
        async with following(tmp_path) as follower:
            await eventually(lambda: follower.pods)
            status = path.stat()
            with path.open("r+") as file:
                file.write(POD.format(name="a", ip="10.0.0.2"))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert path.stat().st_mtime_ns == status.st_mtime_ns
            await eventually(lambda: follower.pods == {"a": "10.0.0.2"})

    asyncio.run(story())


def test_a_directory_that_comes_later_and_goes(tmp_path: Path) -> None:
    async def story() -> None:
        directory = tmp_path / "later"
        async with following(directory) as follower:
            await eventually(lambda: follower.errors)
            assert not follower.events
            directory.mkdir()
            write(directory / "a.yaml", POD.format(name="a", ip="10.0.0.1"))
            await eventually(lambda: follower.pods)
            (tmp_path / "away").mkdir()
            directory.rename(tmp_path / "away" / "later")
            await asyncio.sleep(0.1)
            assert follower.pods == {"a": "10.0.0.1"}

    asyncio.run(story())
