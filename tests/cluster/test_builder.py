"""The builder's own promises, without a cluster: entries are whole or absent, images repeat, settings are
checked."""

import json
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.cluster import cache, cluster, e2e, gobuild, images
from tests.cluster.cluster import Settings
from tests.cluster.console import ClusterError, run, wait_for


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep these tests out of the real cache."""
    monkeypatch.setenv("PODWALL_CACHE", str(tmp_path))
    return cache.root()


def test_a_failed_build_leaves_no_entry_and_the_next_begins_anew() -> None:
    def broken(place: Path) -> None:
        place.mkdir()
        (place / "half").touch()
        raise ClusterError("killed")

    with pytest.raises(ClusterError):
        cache.entry("thing", "0123456789ab", broken)
    found = cache.entry("thing", "0123456789ab", lambda place: place.mkdir())
    assert list(found.iterdir()) == []


def test_an_entry_is_built_once_and_older_ones_go() -> None:
    built = []
    for key in ("a" * 12, "a" * 12, "b" * 12, "c" * 12):
        cache.entry("thing", key, lambda place: built.append(place.write_text("whole")))
    assert len(built) == 3
    assert len(list(cache.root().glob("thing-*"))) == cache.KEPT


def test_digest_follows_content(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    before = cache.digest("name", file)
    file.write_text("two")
    assert cache.digest("name", file) != before


def test_the_same_content_is_the_same_image(tmp_path: Path) -> None:
    files: dict[str, images.Content] = {
        "bin/it": b"program",
        "it": images.Link("bin/it"),
        "tmp": images.Folder(),
    }
    archives = []
    for turn in ("one", "two"):
        layer, archive = tmp_path / f"{turn}.layer", tmp_path / f"{turn}.tar"
        images.write_layer(layer, files)
        images.write_archive(archive, [images.Image(("name:1",), (layer,), ("/it",))])
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]


def test_a_layout_leaves_out_what_the_reader_has(tmp_path: Path) -> None:
    layers = (tmp_path / "base", tmp_path / "own")
    for layer in layers:
        images.write_layer(layer, {layer.name: b"content"})
    images.write_layout(tmp_path / "tar", images.Image(("name:1",), layers, ("/it",)), layers[:1])
    with tarfile.open(tmp_path / "tar") as tar:
        names = tar.getnames()
        index = json.loads(tar.extractfile("index.json").read())  # type: ignore[union-attr]
    assert f"blobs/sha256/{images.sha256(layers[0])}" not in names
    assert f"blobs/sha256/{images.sha256(layers[1])}" in names
    assert f"blobs/{index['manifests'][0]['digest'].replace(':', '/')}" in names


def test_what_holds_for_a_main_module_is_written_for_ours() -> None:
    text = """module example.org/whole
exclude example.org/other v1.0.0
replace (
	example.org/part => ./staging/part
	example.org/fork => example.org/forked v1.2.3
	example.org/local => ../local
)
"""
    assert gobuild.replacements(text, "v1.34.4") == [
        "replace example.org/part => example.org/part v0.34.4",
        "replace example.org/fork => example.org/forked v1.2.3",
        "exclude example.org/other v1.0.0",
    ]


def test_the_default_cluster_is_exactly_the_users() -> None:
    assert cluster.kind_config(Settings()) == yaml.safe_load((cluster.CONF / "kind.yaml").read_text())


def test_settings_change_only_what_they_name() -> None:
    config = cluster.kind_config(Settings(nodes=3, kube_proxy="nftables"))
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
    assert config["networking"]["kubeProxyMode"] == "nftables"
    assert config["networking"]["disableDefaultCNI"] is True


@pytest.mark.parametrize(
    ("name", "value"), [("NODES", "many"), ("NODES", "0"), ("CNI", "other"), ("KUBE_PROXY", "ipvs")]
)
def test_wrong_settings_name_themselves(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError, match=f"{name}={value}: allowed are"):
        Settings.from_environment()


@pytest.mark.parametrize(("status", "ran", "expected"), [(0, 4, 0), (1, 4, 1), (1, 0, 1)])
def test_upstream_tests_fail_as_they_say(status: int, ran: int, expected: int) -> None:
    assert e2e.judge(status, ran) == expected


def test_no_upstream_test_is_no_success() -> None:
    with pytest.raises(ClusterError, match="no test was run"):
        e2e.judge(0, 0)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sh", "-c", "echo why >&2; exit 3"], "exit 3\nwhy"),
        (["no-such-program-of-podwall"], "no such program"),
    ],
)
def test_a_failed_program_says_why(command: list[str], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        run(command)


def test_a_program_has_a_limit() -> None:
    with pytest.raises(ClusterError, match="not finished after 0 s"):
        run(["sleep", "60"], limit=0.2)


def test_a_wait_says_what_it_waited_for() -> None:
    with pytest.raises(ClusterError, match="in vain for the moon"):
        wait_for("the moon", lambda: False, limit=0.1, every=0.05)


def test_manifests_install_the_image_of_this_version() -> None:
    from tests.cluster import image

    for path in ("podwall.yaml", "uninstall.yaml"):
        for document in yaml.safe_load_all((cluster.CONF / path).read_text()):
            if document["kind"] == "DaemonSet":
                spec = document["spec"]["template"]["spec"]
                used = {each["image"] for each in spec["containers"] + spec["initContainers"]}
                assert used == {image.name()}, path


def test_the_wheel_holds_every_package() -> None:
    """A package that pyproject.toml does not name is missed on the nodes only."""
    from tests.cluster import image

    setup = tomllib.loads((image.PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        ".".join(path.parent.relative_to(image.PROJECT).parts)
        for each in image.PACKAGES
        for path in (image.PROJECT / each).rglob("__init__.py")
    }
    assert set(setup["packages"]) == there | set(setup["package-dir"])
