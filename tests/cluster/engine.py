"""A container engine of our own, in namespaces of its own, on machines that have none or reach no image
registry.

Debian's Docker runs from a cached directory tree, uninstalled, in a network, mount and process namespace. The
network namespace is named, and the name is the only record needed: whatever runs in it is ours, and its first
process takes everything with it when it ends. The host's own network, nftables and processes are never
touched.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.cluster.cache import mounts_below, remove, root
from tests.cluster.console import ClusterError, leave_running, run, say, step, succeeds, wait_for
from tests.cluster.packages import root_directory
from tests.cluster.versions import ENGINE_PACKAGES

NAME = "podwall-engine"
HERE = Path(__file__).parent
STATE = Path("/run") / NAME
SOCKET = STATE / "docker.sock"
NAMESPACE = Path("/run/netns") / NAME
CGROUPS = Path("/sys/fs/cgroup")
SYS_RESOURCE = 1 << 24
STARTING = 2  # seconds after which the engine's processes must be in their namespace


def environment() -> dict[str, str]:
    """Return what makes `docker` and `kind` use this engine."""
    return {"DOCKER_HOST": f"unix://{SOCKET}", "PATH": f"{STATE / 'bin'}:{os.environ['PATH']}"}


def inside() -> list[str]:
    """Return the words before a command that is to run in the engine's network."""
    return ["nsenter", f"--net={NAMESPACE}"]


def running() -> bool:
    """Say whether the engine answers."""
    return SOCKET.exists() and succeeds([STATE / "bin/docker", "version"], env=environment())


def start() -> None:
    """Start the engine; one that runs already is kept, what a killed run left is removed first."""
    if running():
        return
    remove_leftovers()
    data = root() / "engine"
    with step("starting the container engine"):
        try:
            launch(data)
        except ClusterError as error:
            say(f"the engine did not start, once more with empty storage: {error}")
            remove_leftovers()
            remove(data)
            launch(data)


def launch(data: Path) -> None:
    """Start the engine's processes and wait until it answers."""
    tree = root_directory("engine", ENGINE_PACKAGES)
    data.mkdir(parents=True, exist_ok=True)
    (STATE / "bin").mkdir(parents=True, exist_ok=True)
    (STATE / "bin/docker").symlink_to(tree / "usr/bin/docker")
    shutil.copy(HERE / "runtime.sh" if lacks_capability() else tree / "usr/sbin/runc", STATE / "runtime")
    (STATE / "runtime").chmod(0o755)
    run(["ip", "netns", "add", NAME])
    words = [*inside(), "unshare", "--mount", "--propagation", "private"]
    words += ["--pid", "--fork", "--kill-child", "--mount-proc"]
    log = STATE / "engine.log"
    leave_running([*words, "sh", HERE / "engine.sh", tree, STATE, data], log)
    begun = time.monotonic()

    def answers() -> bool:
        if time.monotonic() > begun + STARTING and not members():
            last = log.read_text(errors="replace").splitlines()[-15:]
            raise ClusterError("the container engine ended:\n" + "\n".join(last))
        return running()

    wait_for("the container engine's answer", answers, limit=60)


def lacks_capability() -> bool:
    """Say whether this machine's processes may not have CAP_SYS_RESOURCE."""
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    return not int(status["CapBnd"], 16) & SYS_RESOURCE


def stop() -> None:
    """Stop the engine in order, then remove every trace of it but its image storage."""
    try:
        for pid in first_processes():
            os.kill(pid, signal.SIGTERM)
        wait_for("the container engine's end", lambda: not first_processes(), limit=30)
    except ProcessLookupError:
        pass
    except ClusterError:
        say("the container engine does not end by itself: it is killed")
    remove_leftovers()


def remove_leftovers() -> None:
    """Remove processes, namespaces, mounts, control groups and files of an engine, however it ended."""
    for pid in members():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_for("the end of the engine's processes", lambda: not members(), limit=20)
    if NAMESPACE.exists():
        if mounts_below(NAMESPACE):
            run(["umount", "--lazy", NAMESPACE])
        NAMESPACE.unlink()
    if STATE.exists():
        remove(STATE)
    wait_for("the removal of the engine's control groups", remove_cgroups, limit=20)


def members() -> list[int]:
    """List the processes in the engine's network namespace, the caller excepted."""
    if not NAMESPACE.exists():
        return []
    wanted = NAMESPACE.stat().st_ino
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if (entry / "ns/net").stat().st_ino == wanted and not is_zombie(entry):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def is_zombie(process: Path) -> bool:
    """Say whether a process has ended and only waits to be collected."""
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def first_processes() -> list[int]:
    """List the members that are the first process of a process namespace: there is one while the engine
    runs."""
    found = []
    for pid in members():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
        if len(numbers) == 2 and numbers[1] == "1":
            found.append(pid)
    return found


def remove_cgroups() -> bool:
    """Remove the engine's control groups in every hierarchy; say whether none is left."""
    tops = [top for top in (*CGROUPS.glob("*/podwall"), CGROUPS / "podwall") if top.is_dir()]
    for top in tops:
        for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            remove_cgroup(folder)
        remove_cgroup(top)
    return not any(top.is_dir() for top in tops)


def remove_cgroup(folder: Path) -> None:
    """Remove one control group; one whose last process is just ending is tried again by the caller."""
    try:
        folder.rmdir()
    except OSError:
        time.sleep(0.01)


def docker(*words: str | Path, limit: float = 120, stdin: bytes | Path | None = None) -> str:
    """Run `docker` with this engine."""
    return run(["docker", *words], env=environment(), limit=limit, stdin=stdin)


def has_image(name: str) -> bool:
    """Say whether the engine holds an image."""
    return bool(docker("images", "--quiet", name).strip())


def remove_images(pattern: str, keep: set[str]) -> None:
    """Remove the images whose repository fits the pattern but that are not kept, and nameless layers."""
    listed = docker("images", "--format", "{{.Repository}}:{{.Tag}}", pattern).split()
    for name in set(listed) - keep:
        docker("rmi", "--force", name)
    docker("image", "prune", "--force")


def import_tree(tree: Path, name: str, entrypoint: list[str]) -> None:
    """Make an image of a directory, streaming it into the engine."""
    tar = [
        "tar",
        "--create",
        "--numeric-owner",
        "--exclude=./proc/*",
        "--exclude=./sys/*",
        "--exclude=./dev/*",
        ".",
    ]
    change = f"ENTRYPOINT {json.dumps(entrypoint)}"
    words = ["docker", "import", "--change", change, "--change", "ENV container=docker", "-", name]
    pack = subprocess.Popen(tar, cwd=tree, stdout=subprocess.PIPE)
    try:
        subprocess.run(
            words,
            stdin=pack.stdout,
            env={**os.environ, **environment()},
            check=True,
            timeout=300,
            stdout=subprocess.DEVNULL,
        )
        if pack.wait():
            raise ClusterError(f"{tree}: cannot be packed")
    finally:
        pack.kill()
        pack.wait()
        if pack.stdout:
            pack.stdout.close()
