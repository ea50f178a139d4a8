"""A kind node as a directory: Debian, containerd and kubelet, set up by kind's own files, with the cluster's
images.

kind's files are taken from its module in the Go module cache. What differs from kind's own build is what this
kind of machine asks for: no distribution sysctls (in a node /proc/sys is the host's), no negative OOM scores
(they need a capability that sandboxes lack), and cgroup v1 inside the nodes where the host has both kinds.
"""

import json
import re
import shutil
from pathlib import Path

from tests.cluster.cache import digest, entry
from tests.cluster.console import ClusterError, run
from tests.cluster.contents import archive, pause_name
from tests.cluster.gobuild import module_directory, programs
from tests.cluster.packages import root_directory
from tests.cluster.versions import KIND_MODULE, KUBERNETES, KUBERNETES_MODULE, NODE_PACKAGES

PROGRAMS = ("kubeadm", "kubectl", "kubelet")
PLUGINS = ("bridge", "host-local", "loopback", "portmap", "ptp")
CONTAINERD = ("containerd", "containerd-shim-runc-v2", "ctr")
SERVICES = ("containerd.service", "kubelet.service", "undo-mount-hacks.service")
UNWANTED = (
    "etc/sysctl.d/99-sysctl.conf",
    "etc/systemd/system/*.wants/*",
    "lib/systemd/system/basic.target.wants/*",
    "lib/systemd/system/local-fs.target.wants/*",
    "lib/systemd/system/multi-user.target.wants/*",
    "lib/systemd/system/sockets.target.wants/*initctl*",
    "lib/systemd/system/sockets.target.wants/*udev*",
    "lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service",
    "usr/lib/sysctl.d/*",
    "var/cache/apt/*",
    "var/lib/apt/lists/*",
)
STORAGE_CLASS = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": "standard"},
    "provisioner": "kubernetes.io/no-provisioner",
    "volumeBindingMode": "WaitForFirstConsumer",
}
IMPORT_SCRIPT = """
mount -t proc proc /proc
containerd >/tmp/containerd.log 2>&1 &
for try in $(seq 100); do ctr version >/dev/null 2>&1 && break; sleep 0.2; done
ctr -n k8s.io images import --all-platforms --no-unpack --digests /tmp/images ||
  { cat /tmp/containerd.log; exit 1; }
for name in $(ctr -n k8s.io images list -q | grep -v @sha256); do
  ctr -n k8s.io images label "$name" io.cri-containerd.pinned=pinned
done
kill %1; wait %1 || true
rm -rf /tmp/containerd.log /run/containerd
"""


def tree() -> Path:
    """Return the node's directory, built where missing."""
    sources = (root_directory("node", NODE_PACKAGES), archive(), programs(KUBERNETES_MODULE))
    key = digest(Path(__file__), *map(str, sources), KIND_MODULE)
    return entry(f"node-{KUBERNETES}", key, build)


def entrypoint() -> list[str]:
    """Return what a node starts: kind's entrypoint, then systemd.

    On a host with both cgroup hierarchies systemd must keep to v1: the v2 hierarchy would be shared by all
    nodes.
    """
    words = ["/usr/local/bin/entrypoint", "/sbin/init"]
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        words += ["systemd.unified_cgroup_hierarchy=0", "systemd.legacy_systemd_cgroup_controller=1"]
    return words


def build(place: Path) -> None:
    """Make the node's directory."""
    run(["cp", "--archive", "--reflink=auto", root_directory("node", NODE_PACKAGES), place], limit=300)
    for pattern in UNWANTED:
        for path in place.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    copy_kind_files(place)
    copy_programs(place)
    configure_systemd(place)
    configure_containerd(place)
    import_images(place)


def copy_kind_files(place: Path) -> None:
    """Copy kind's own files: entrypoint, units, containerd's configuration."""
    files = module_directory(KIND_MODULE) / "images/base/files"
    for source in files.rglob("*"):
        target = place / source.relative_to(files)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if source.parent.name == "bin" else 0o644)
    (place / "kind/version").write_text(KUBERNETES)
    (place / "kind/manifests").mkdir(exist_ok=True)
    (place / "kind/manifests/default-storage.yaml").write_text(json.dumps(STORAGE_CLASS))


def copy_programs(place: Path) -> None:
    """Copy Kubernetes' programs and the reference plugins to where kind and kubelet look for them."""
    for each in PROGRAMS:
        shutil.copy(programs(KUBERNETES_MODULE) / each, place / "usr/bin" / each)
    for each in CONTAINERD:
        (place / "usr/local/bin" / each).symlink_to(f"/usr/bin/{each}")
    for folder in ("opt/cni/bin", "etc/cni/net.d", "etc/kubernetes/manifests"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    for each in PLUGINS:
        shutil.copy(place / "usr/lib/cni" / each, place / "opt/cni/bin" / each)


def configure_systemd(place: Path) -> None:
    """Enable the node's services and nothing else."""
    units = place / "etc/systemd/system"
    wants = units / "multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for each in SERVICES:
        (wants / each).symlink_to(f"/etc/systemd/system/{each}")
    (units / "systemd-binfmt.service").symlink_to("/dev/null")
    with (place / "etc/systemd/journald.conf").open("a") as file:
        file.write("ReadKMsg=no\n")
    init = place / "sbin/init"
    init.unlink(missing_ok=True)
    init.symlink_to("/lib/systemd/systemd")
    edit(units / "containerd.service", r"^OOMScoreAdjust=.*\n", "")


def configure_containerd(place: Path) -> None:
    """Point containerd at the sandbox image that there is, and write the base of its containers."""
    config = place / "etc/containerd/config.toml"
    edit(config, r'sandbox_image = ".*"', f'sandbox_image = "{pause_name()}"')
    edit(config, r"restrict_oom_score_adj = false", "restrict_oom_score_adj = true")
    base = json.loads(run(["chroot", place, "ctr", "oci", "spec"]))
    del base["process"]["rlimits"]
    hooks = base.setdefault("hooks", {}).setdefault("createContainer", [])
    hooks.append({"path": "/kind/bin/mount-product-files.sh"})
    (place / "etc/containerd/cri-base.json").write_text(json.dumps(base))


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace exactly one place in a file; raise `ClusterError` when kind's file has changed."""
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    if count != 1:
        raise ClusterError(
            f"{path.name}: {pattern} is there {count} times, expected once: kind's files have changed"
        )
    path.write_text(text)


def import_images(place: Path) -> None:
    """Let the node's own containerd take in the images, in namespaces that end with it."""
    shutil.copyfile(archive(), place / "tmp/images")
    words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    run([*words, "chroot", place, "bash", "-c", IMPORT_SCRIPT], limit=300)
    (place / "tmp/images").unlink()
