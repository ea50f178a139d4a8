"""Debian packages: what the builder itself needs on this machine, and root file systems made of packages."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.cache import digest, entry, remove
from tests.cluster.console import ClusterError, run, say
from tests.cluster.versions import DEBIAN

# program that is looked for -> package that brings it
NEEDED = {
    "gcc": "gcc libc6-dev",
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")


def install_needed(needed: Mapping[str, str] = NEEDED) -> None:
    """Install what the builder runs, saying so; quick when it is there."""
    missing = sorted({package for program, package in needed.items() if not shutil.which(program)})
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ClusterError(f"missing programs: install the Debian packages {' '.join(missing)}")
    say(f"installing Debian packages: {' '.join(missing)}")
    run(["apt-get", "update", "-qq"], limit=300)
    words = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *" ".join(missing).split()]
    run(words, limit=600, env={"DEBIAN_FRONTEND": "noninteractive"})


def root_archive(name: str, packages: tuple[str, ...]) -> Path:
    """Return a tar file of a root file system that holds the packages, built where missing."""
    key = digest(DEBIAN, packages, LEFT_OUT)
    return entry(f"root-{name}-{DEBIAN}", key, lambda place: bootstrap(packages, place, "tar"))


def root_directory(name: str, packages: tuple[str, ...]) -> Path:
    """Return a directory with a root file system that holds the packages, built where missing."""
    key = digest(DEBIAN, packages, LEFT_OUT)
    return entry(f"tree-{name}-{DEBIAN}", key, lambda place: bootstrap(packages, place, "directory"))


def bootstrap(packages: tuple[str, ...], place: Path, form: str) -> None:
    """Make a root file system in namespaces of its own, so that no mount or process outlives a killed run."""
    words: list[str | Path] = ["unshare", "--mount", "--propagation", "private"]
    words += ["--pid", "--fork", "--kill-child", "--mount-proc"]
    words += ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--format={form}"]
    words += ["--aptopt=APT::Install-Recommends false", f"--include={','.join(packages)}"]
    words += [f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT]
    work = place.with_name(f"{place.name}-work")
    remove(work)
    work.mkdir()
    run([*words, DEBIAN, place], limit=900, env={"TMPDIR": str(work)})
    remove(work)
