"""Build Kubernetes, etcd, CoreDNS, kind and Traefik from their Go modules.

Each module is required by a small module made here, so that `go` checks it against the public checksum
database and takes every dependency in the version the module itself asks for.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.cache import digest, entry, remove
from tests.cluster.console import ENDS_WITH_US, ClusterError, run, say
from tests.cluster.versions import GO_MINIMUM, GoModule, Substitute

ENVIRONMENT = {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false", "GOWORK": "off"}
BUILD_LIMIT = 45 * 60
SAY_EVERY = 15


def programs(module: GoModule) -> Path:
    """Return the directory that holds the module's programs, built where missing."""
    key = digest(module, ENVIRONMENT, go_version(), *module.substitutes)
    return entry(f"go-{module.name}-{module.version}", key, lambda place: build(module, place)) / "bin"


def go_version() -> str:
    """Return the toolchain's version; raise `ClusterError` when there is none or it is too old."""
    try:
        found = run(["go", "env", "GOVERSION"]).strip()
    except ClusterError as error:
        raise ClusterError("no Go toolchain: install Go 1.25 or newer and put `go` on the PATH") from error
    number = re.match(r"go(\d+)\.(\d+)", found)
    if not number or (int(number[1]), int(number[2])) < GO_MINIMUM:
        raise ClusterError(f"Go {found} is too old: install Go {GO_MINIMUM[0]}.{GO_MINIMUM[1]} or newer")
    return found


def module_directory(module: GoModule) -> Path:
    """Download the module's source and return where it lies."""
    return Path(download(module, Path.cwd())["Dir"])


def download(module: GoModule, cwd: Path) -> dict[str, str]:
    """Download a module and return what `go` tells of it."""
    return download_version(module.path, module.version, cwd)


def download_version(path: str, version: str, cwd: Path) -> dict[str, str]:
    """Download a module by its path and return what `go` tells of it."""
    words = ["go", "mod", "download", "-json", f"{path}@{version}"]
    found: dict[str, str] = json.loads(run(words, limit=600, cwd=cwd, env={"GOWORK": "off"}))
    return found


def build(module: GoModule, place: Path) -> None:
    """Build the module's programs into `place`/bin."""
    programs = place / "bin"
    programs.mkdir(parents=True)
    write_module(module, place)
    copies = [put_in_place(substitute, place) for substitute in module.substitutes]
    own = [package for package in module.packages if package]
    if own:
        words = [f"{module.path}/{package}" for package in own]
        compile_packages(["build", *module.flags, "-o", f"{programs}/", *words], place, module.name)
    if "" in module.packages:
        compile_packages(
            ["build", *module.flags, "-o", programs / module.name, module.path], place, module.name
        )
    for package in module.test_packages:
        output = programs / f"{Path(package).name}.test"
        compile_packages(
            ["test", "-c", *module.flags, "-o", output, f"{module.path}/{package}"], place, output.name
        )
    for copy in copies:
        remove(copy)


def write_module(module: GoModule, place: Path) -> None:
    """Write the go.mod that requires the module."""
    head = f"module podwall/cluster\n\ngo {module.go}\n"
    (place / "go.mod").write_text(head)
    requirements = Path(download(module, place)["GoMod"]).read_text()
    lines = "".join(f"{line}\n" for line in replacements(requirements, module.version))
    (place / "go.mod").write_text(f"{head}\nrequire {module.path} {module.version}\n\n{lines}")


def replacements(requirements: str, version: str) -> list[str]:
    """Return the directives of a module's go.mod that hold only where it is the main module, for ours.

    A module that replaces parts of itself by folders of its own repository (Kubernetes' staging) publishes
    these parts under the same minor and patch number, as v0.
    """
    found = re.findall(r"^(?:replace )?\s*(\S+) => (\S+)(?: (v\S+))?$", requirements, re.MULTILINE)
    part = f"v0.{version.split('.', 1)[1]}"
    lines = [
        f"replace {old} => {old} {part}"
        if new.startswith("./staging/")
        else f"replace {old} => {new} {given}"
        for old, new, given in found
        if given or new.startswith("./staging/")
    ]
    return lines + re.findall(r"^exclude \S+ v\S+$", requirements, re.MULTILINE)


def put_in_place(substitute: Substitute, place: Path) -> Path:
    """Copy a module that is depended on, in the version that is wanted, change one file, return the copy.

    `go build -overlay` would do, but refuses files of the module cache.
    """
    listed = run(["go", "list", "-m", "-json", substitute.module], cwd=place, limit=600, env=ENVIRONMENT)
    version = json.loads(listed)["Version"]
    source = download_version(substitute.module, version, place)["Dir"]
    copy = substitute.module.replace("/", "-")
    run(["cp", "--recursive", "--no-preserve=mode", source, place / copy])
    (place / copy / substitute.file).write_text(substitute.text)
    with (place / "go.mod").open("a") as file:
        file.write(f"replace {substitute.module} => ./{copy}\n")
    return place / copy


def compile_packages(words: Sequence[str | Path], cwd: Path, what: str) -> None:
    """Run `go` and say from time to time how many packages it has compiled."""
    argv = ["go", str(words[0]), "-v", *map(str, words[1:])]
    begun = said = time.monotonic()
    process = subprocess.Popen(
        [*ENDS_WITH_US, *argv],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    lines: list[str] = []
    try:
        assert process.stderr
        for line in process.stderr:
            lines.append(line)
            if time.monotonic() > said + SAY_EVERY:
                said = time.monotonic()
                say(f"{what}: {len(lines)} packages fetched or compiled, at {line.strip()}")
            if time.monotonic() > begun + BUILD_LIMIT:
                raise ClusterError(f"{what}: not built after {BUILD_LIMIT // 60} minutes")
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    if status:
        raise ClusterError(f"{' '.join(argv)}: exit {status}\n{''.join(lines[-30:])}")
