"""What the machine boots: a disk of Debian packages with the tests' Python environment, and the sources.

    Debian packages --> root tree --+
    .venv ---------------------------+--mke2fs--> disk.img, vmlinuz, initrd.img   kept until one changes
    init.sh -------------------------+
    the sources as they are now, what to run --> sources.tar, the second disk   made for every run

Everything lies at the path that it has on this machine, so that the environment's own paths hold.
"""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cni.freeze import freeze
from tests.cluster import cache, packages
from tests.cluster.console import ClusterError, run

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = PROJECT / ".venv"
LOCK = PROJECT / "requirements-dev.lock"
INIT = Path(__file__).with_name("init.sh")
PACKAGES = (
    "conntrack",
    "iproute2",
    "iputils-ping",
    "kmod",
    "linux-image-cloud-amd64",
    "nftables",
    "openssl",
    "procps",
    "python3",
    "python3-nftables",
)
NEEDED = {
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
FREE = 512
"""MiB that the disk has left for what the tests write."""

NOT_RUN = (
    "uv*",
    "ruff*",
    "mypy*",
    "*__mypyc*",
    "pip*",
    "grimp*",
    "importlinter*",
    "setuptools*",
)
"""What of the environment only works on sources."""

NOT_SOURCES = (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")
PLUGIN = "podwall-cni"
SCRIPT = "podwall-tests.sh"


def machine() -> Path:
    """Return the directory with disk.img, vmlinuz and initrd.img, built where missing."""
    if sys.version_info[:2] != (3, 11) or not ENVIRONMENT.is_dir():
        raise ClusterError(f"{ENVIRONMENT} of Debian 12's Python 3.11 is needed, as `make setup` makes it")
    packages.install_needed(NEEDED)
    tree = packages.root_directory("vm", PACKAGES)
    key = cache.digest(tree.name, str(PROJECT), LOCK, INIT, NOT_RUN, FREE, Path(__file__))
    return cache.entry("vm", key, lambda place: _build(tree, place))


def _build(tree: Path, place: Path) -> None:
    whole = place / "root"
    place.mkdir()
    run(["cp", "--archive", tree, whole])
    ignored = shutil.ignore_patterns(*NOT_RUN)
    shutil.copytree(ENVIRONMENT, whole / ENVIRONMENT.relative_to("/"), symlinks=True, ignore=ignored)
    (whole / "sbin" / "podwall-init").write_text(INIT.read_text())
    (whole / "sbin" / "podwall-init").chmod(0o755)
    for name, pattern in (("vmlinuz", "boot/vmlinuz-*"), ("initrd.img", "boot/initrd.img-*")):
        newest = max(whole.glob(pattern), key=lambda path: path.stat().st_mtime)
        shutil.copy(newest, place / name)
    size = int(run(["du", "--summarize", "--block-size=1M", whole]).split()[0])
    # no journal: a disk that is thrown away after its run
    words = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", whole]
    run([*words, place / "disk.img", f"{size * 5 // 4 + FREE}M"], limit=600)
    cache.remove(whole)


def sources(place: Path, words: Sequence[str], environment: Mapping[str, str]) -> Path:
    """Write the second disk: an archive of the sources, the CNI plugin's binary, and the command to run."""
    given = place / "given"
    given.mkdir()
    freeze(given / PLUGIN, Path.home() / ".cache" / "podwall")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    command = shlex.join([str(ENVIRONMENT / "bin" / "python"), "-m", "pytest", *words])
    (given / SCRIPT).write_text("\n".join([f"cd {PROJECT} || exit 1", *exports, f"exec {command}", ""]))
    archive = place / "sources.tar"
    left_out = [f"--exclude={PROJECT.relative_to('/')}/{name}" for name in NOT_SOURCES]
    archived = ["tar", "--create", "--file", archive, *left_out]
    run([*archived, "-C", "/", PROJECT.relative_to("/"), "-C", given, PLUGIN, SCRIPT])
    return archive
