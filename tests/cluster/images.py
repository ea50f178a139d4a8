"""Container images as files, made without an engine: layers are tar files, an archive is what `docker load`
and containerd read. Nothing in them depends on the clock, so that the same content is the same image."""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SEARCH_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link in a layer."""

    target: str


@dataclass(frozen=True, slots=True)
class Folder:
    """An empty directory in a layer."""

    mode: int = 0o755


Content = Path | bytes | Link | Folder


@dataclass(frozen=True, slots=True)
class Image:
    """One image: all names it answers to, its layers (tar files, lowest first) and what it starts."""

    names: tuple[str, ...]
    layers: tuple[Path, ...]
    entrypoint: tuple[str, ...]
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = (SEARCH_PATH,)


def write_layer(place: Path, files: Mapping[str, Content]) -> None:
    """Write a layer that holds the files; a path on this machine is copied with its execute bit."""
    with tarfile.open(place, "w") as tar:
        for folder in sorted({str(parent) for name in files for parent in Path(name).parents} - {"."}):
            if folder not in files:
                add(tar, folder, Folder())
        for name, content in sorted(files.items()):
            add(tar, name, content)


def add(tar: tarfile.TarFile, name: str, content: Content) -> None:
    """Add one member, owned by root and without a date."""
    member = tarfile.TarInfo(name)
    match content:
        case Folder(mode):
            member.type, member.mode = tarfile.DIRTYPE, mode
            tar.addfile(member)
        case Link(target):
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        case bytes():
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
        case Path():
            member.size = content.stat().st_size
            member.mode = 0o755 if content.stat().st_mode & 0o100 else 0o644
            with content.open("rb") as file:
                tar.addfile(member, file)


def write_archive(place: Path, images: Iterable[Image]) -> None:
    """Write images into one archive; a layer that several share is in it once."""
    known: dict[Path, str] = {}
    manifest = []
    with tarfile.open(place, "w") as tar:
        for image in images:
            for layer in image.layers:
                if layer not in known:
                    known[layer] = sha256(layer)
                    add(tar, f"{known[layer]}.tar", layer)
            layers = [known[layer] for layer in image.layers]
            config = json.dumps(configuration(image, layers)).encode()
            name = f"{hashlib.sha256(config).hexdigest()}.json"
            add(tar, name, config)
            manifest.append(
                {"Config": name, "RepoTags": list(image.names), "Layers": [f"{each}.tar" for each in layers]}
            )
        add(tar, "manifest.json", json.dumps(manifest).encode())


def write_layout(place: Path, image: Image, left_out: Collection[Path]) -> None:
    """Write one image as an OCI layout without the layers that the reader is known to hold already."""
    sums = {layer: sha256(layer) for layer in image.layers}
    with tarfile.open(place, "w") as tar:

        def blob(content: bytes | Path, kind: str, digest: str) -> dict[str, object]:
            if content not in left_out:
                add(tar, f"blobs/sha256/{digest}", content)
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            return {
                "mediaType": f"application/vnd.oci.image.{kind}",
                "digest": f"sha256:{digest}",
                "size": size,
            }

        def document(content: object, kind: str) -> dict[str, object]:
            text = json.dumps(content).encode()
            return blob(text, kind, hashlib.sha256(text).hexdigest())

        layers = [blob(layer, "layer.v1.tar", digest) for layer, digest in sums.items()]
        config = document(configuration(image, list(sums.values())), "config.v1+json")
        manifest = document({"schemaVersion": 2, "config": config, "layers": layers}, "manifest.v1+json")
        named = [{**manifest, "annotations": {"io.containerd.image.name": name}} for name in image.names]
        add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": named}).encode())
        add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())


def configuration(image: Image, layers: list[str]) -> dict[str, object]:
    """Return the image's configuration document."""
    return {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": image.environment, "Entrypoint": image.entrypoint, "Cmd": image.command or None},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}" for layer in layers]},
        "history": [{"created_by": "podwall"} for _ in layers],
    }


def architecture() -> str:
    """Return this machine's architecture as images name it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def sha256(path: Path) -> str:
    """Return a file's digest in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
