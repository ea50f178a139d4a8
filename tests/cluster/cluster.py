"""A Kubernetes cluster made by kind, with or without podwall: up, down, and what is needed to talk to it.

Where Docker and an image registry can be reached, kind is used as users use it. Elsewhere the same kind runs
on an engine and a node image of our own. Both start from conf/kind.yaml and conf/podwall.yaml.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import contents, engine, image, nodeimage
from tests.cluster.cache import digest, locked, root
from tests.cluster.console import ClusterError, leave_running, run, say, step, succeeds, wait_for
from tests.cluster.gobuild import programs
from tests.cluster.images import write_layout
from tests.cluster.packages import install_needed, root_archive, root_directory
from tests.cluster.versions import (
    AGENT_PACKAGES,
    COREDNS_MODULE,
    ENGINE_PACKAGES,
    ETCD_MODULE,
    GINKGO_MODULE,
    KIND_MODULE,
    KUBERNETES_MODULE,
    NODE_PACKAGES,
    TOOL_PACKAGES,
    TRAEFIK_MODULE,
)

NAME = "podwall"
CONF = image.PROJECT / "conf"
MANIFEST = CONF / "podwall.yaml"
OUTSIDE = "podwall-outside"
"""The container that stands for a machine outside the cluster."""
PROBE_IMAGE = "debian:bookworm-slim"
"""What conf/Dockerfile starts from: where this can be pulled, everything else can."""
TESTED_NODES = 3
"""What the tests need at least: a control plane and two workers, one of which may die."""
PROXY_MODES = ("none", "iptables", "nftables")
PLUGINS = ("podwall", "none")


@dataclass(frozen=True, slots=True)
class Settings:
    """What kind of cluster is wanted: number of nodes, network plugin, kube-proxy's mode."""

    nodes: int = 2
    cni: str = "podwall"
    kube_proxy: str = "none"

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read NODES, CNI and KUBE_PROXY; raise `ClusterError` naming what is allowed."""
        nodes = os.environ.get("NODES") or "2"
        found = cls(
            int(nodes) if nodes.isdigit() else 0,
            os.environ.get("CNI") or "podwall",
            os.environ.get("KUBE_PROXY") or "none",
        )
        for name, value, allowed in (
            ("NODES", found.nodes, range(1, 10)),
            ("CNI", found.cni, PLUGINS),
            ("KUBE_PROXY", found.kube_proxy, PROXY_MODES),
        ):
            if value not in allowed:
                raise ClusterError(
                    f"{name}={os.environ.get(name)}: allowed are {', '.join(map(str, allowed))}"
                )
        return found


@cache
def offline() -> bool:
    """Say whether engine and images must be our own; PODWALL_KIND=plain or offline decides it."""
    chosen = os.environ.get("PODWALL_KIND", "")
    if chosen in ("plain", "offline"):
        return chosen == "offline"
    if chosen:
        raise ClusterError(f"PODWALL_KIND={chosen}: allowed are plain, offline")
    has_docker = shutil.which("docker") and succeeds(["docker", "info"])
    return not (has_docker and succeeds(["docker", "pull", "--quiet", PROBE_IMAGE], limit=120))


def environment() -> dict[str, str]:
    """Return the environment for kind, docker and kubectl."""
    return {"KUBECONFIG": str(kubeconfig()), **(engine.environment() if offline() else {})}


def state() -> Path:
    """Return the directory of the running cluster's files."""
    return engine.STATE if offline() else root() / "plain"


def kubeconfig() -> Path:
    """Return the path of the running cluster's kubeconfig."""
    return state() / "kubeconfig"


def kind(*words: str | Path, limit: float = 300) -> str:
    """Run kind."""
    return run([programs(KIND_MODULE) / "kind", *words], env=environment(), limit=limit)


def kubectl(*words: str | Path, limit: float = 60, stdin: bytes | None = None) -> str:
    """Run kubectl against the cluster."""
    return run([programs(KUBERNETES_MODULE) / "kubectl", *words], env=environment(), limit=limit, stdin=stdin)


def docker(*words: str | Path, limit: float = 120, stdin: bytes | Path | None = None) -> str:
    """Run docker with the engine that the cluster's nodes run on."""
    return run(["docker", *words], env=environment(), limit=limit, stdin=stdin)


def on_node(node: str, *words: str, limit: float = 60, stdin: bytes | Path | None = None) -> str:
    """Run a command on a node."""
    return docker(
        "exec", *(["--interactive"] if stdin is not None else []), node, *words, limit=limit, stdin=stdin
    )


def outside(*words: str, limit: float = 60) -> str:
    """Run a command on a machine outside the cluster that shares the nodes' link."""
    return docker("exec", OUTSIDE, *words, limit=limit)


def outside_address(version: int) -> IPv4Address | IPv6Address:
    """Return the outside machine's address of one family."""
    field = "IPAddress" if version == 4 else "GlobalIPv6Address"
    return ip_address(
        docker("inspect", "-f", f"{{{{.NetworkSettings.Networks.kind.{field}}}}}", OUTSIDE).strip()
    )


def nodes() -> list[str]:
    """List the nodes, control plane first."""
    return sorted(kind("get", "nodes", "--name", NAME).split())


def exists() -> bool:
    """Say whether the cluster is there and answers; the door to it is opened again should it be shut."""
    if not (state() / "cluster.json").exists() or (offline() and not engine.running()):
        return False
    look: list[str | Path] = [programs(KUBERNETES_MODULE) / "kubectl", "get", "--raw=/readyz"]
    if succeeds(look, env=environment()):
        return True
    if not offline() or not succeeds([*engine.inside(), *look], env=environment()):
        return False
    open_door()
    return True


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the lock of what changes the cluster."""
    root().mkdir(parents=True, exist_ok=True)
    with locked(root() / ".lock-cluster"):
        yield


def build() -> None:
    """Build everything that can be built beforehand: Go programs on one hand, Debian trees on the other."""
    install_needed()
    if not offline():
        programs(KIND_MODULE)
        programs(KUBERNETES_MODULE)
        return
    with ThreadPoolExecutor(2) as hands:
        for future in [hands.submit(build_programs), hands.submit(build_trees)]:
            future.result()
    nodeimage.tree()


def build_programs() -> None:
    """Build all Go programs; `go` itself uses every core."""
    for module in (
        KIND_MODULE,
        ETCD_MODULE,
        COREDNS_MODULE,
        KUBERNETES_MODULE,
        TRAEFIK_MODULE,
        GINKGO_MODULE,
    ):
        programs(module)


def build_trees() -> None:
    """Build all root file systems."""
    root_directory("engine", ENGINE_PACKAGES)
    root_directory("node", NODE_PACKAGES)
    root_archive("tools", TOOL_PACKAGES)
    root_archive("agent", AGENT_PACKAGES)


def up(settings: Settings) -> Path:
    """Make the cluster, or bring the running one up to date; return its kubeconfig."""
    build()
    with alone():
        if exists() and recorded() != settings:
            say(f"the running cluster is another one ({recorded()}): it is replaced")
            remove()
        if not exists():
            create(settings)
        if settings.cni == "podwall":
            deploy()
            await_ready()
    return kubeconfig()


def create(settings: Settings) -> None:
    """Create the cluster, with a second try.

    An engine that runs without a cluster is a killed run's, whose last orders it may still be carrying out.
    """
    if offline():
        engine.stop()
        engine.start()
        load_node_image()
    state().mkdir(parents=True, exist_ok=True)
    try:
        create_once(settings)
    except ClusterError as error:
        say(f"kind failed, once more: {error}")
        create_once(settings)
    if offline():
        open_door()
        (state() / "images").write_text(str(contents.archive()))
        unpack_agnhost()
    start_outside()
    (state() / "cluster.json").write_text(json.dumps(dataclasses.asdict(settings)))


def create_once(settings: Settings) -> None:
    """Remove what an earlier try left and create the cluster."""
    kind("delete", "cluster", "--name", NAME)
    with step(f"creating a cluster of {settings.nodes} nodes"):
        config = state() / "kind.json"
        config.write_text(json.dumps(kind_config(settings)))
        words: list[str | Path] = ["create", "cluster", "--name", NAME, "--config", config, "--retain"]
        if offline():
            words += ["--image", node_image()]
        kind(*words, limit=240)


def kind_config(settings: Settings) -> dict[str, Any]:
    """Return conf/kind.yaml, changed only where the settings differ from it."""
    config: dict[str, Any] = yaml.safe_load((CONF / "kind.yaml").read_text())
    config["networking"]["kubeProxyMode"] = settings.kube_proxy
    config["nodes"] = [{"role": "control-plane"}, *[{"role": "worker"}] * (settings.nodes - 1)]
    return config


def node_image() -> str:
    """Return the node image's name, which holds its content's key."""
    return f"podwall-node:{nodeimage.tree().name.rsplit('-', 1)[1]}"


def load_node_image() -> None:
    """Bring the images of nodes and of the outside machine into the engine; remove older ones."""
    if not engine.has_image(node_image()):
        with step("loading the node image into the engine"):
            engine.import_tree(nodeimage.tree(), node_image(), nodeimage.entrypoint())
    if not engine.has_image(outside_image()):
        with step("loading agnhost into the engine"):
            engine.docker("load", "--input", contents.archive(), limit=300)
            engine.docker("tag", contents.agnhost_name(), outside_image())
    engine.remove_images("podwall-*", {node_image(), outside_image()})


def outside_image() -> str:
    """Return the image of the outside machine, agnhost's."""
    if not offline():
        return contents.agnhost_name()
    return f"podwall-outside:{contents.archive().name.rsplit('-', 1)[1]}"


def open_door() -> None:
    """Make the API server's port answer in the host's own network too."""
    config = yaml.safe_load(kubeconfig().read_text())
    port = config["clusters"][0]["cluster"]["server"].rsplit(":", 1)[1]
    log = state() / "forward.log"
    leave_running([sys.executable, "-m", "tests.cluster.forward", port], log, cwd=image.PROJECT)

    def ready() -> bool:
        said = log.read_text()
        if "Error" in said:
            raise ClusterError(f"the API server's port {port} cannot be offered on the host:\n{said}")
        return said == "ready\n"

    wait_for("the forwarder of the API server's port", ready, limit=20, every=0.05)


def unpack_agnhost() -> None:
    """Let the nodes unpack agnhost in the background, once, before many Pods ask for it at the same time."""
    name = contents.agnhost_name()
    digest_of = f"ctr -n k8s.io images list name=={name} | awk 'NR == 2 {{ print $3 }}'"
    script = f"ctr -n k8s.io snapshots unpack $({digest_of})"
    for node in nodes():
        docker("exec", "--detach", node, "sh", "-c", script)


def start_outside() -> None:
    """Start the machine outside the cluster: a container beside the nodes that serves like agnhost's Pods."""
    docker("rm", "--force", OUTSIDE)
    words = ["run", "--detach", "--name", OUTSIDE, "--network", "kind", outside_image(), "netexec"]
    docker(*words, limit=300)


def recorded() -> Settings | None:
    """Return the running cluster's settings."""
    path = state() / "cluster.json"
    return Settings(**json.loads(path.read_text())) if path.exists() else None


def deploy() -> None:
    """Bring podwall's image into the nodes and apply its manifest, as its users do, with this link's own
    addresses."""
    changed = load_podwall()
    objects = manifest()
    record = state() / "manifest.json"
    changed |= record.exists() and record.read_text() != json.dumps(objects)
    with step("applying conf/podwall.yaml"):
        kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects).encode())
        if changed:
            kubectl("-n", "kube-system", "rollout", "restart", "daemonset/podwall")
    record.write_text(json.dumps(objects))


def manifest() -> list[dict[str, Any]]:
    """Return conf/podwall.yaml's objects; its settings are extended by what every site has to say itself."""
    objects = [each for each in yaml.safe_load_all(MANIFEST.read_text()) if each]
    for each in objects:
        if each["kind"] == "ConfigMap":
            settings = yaml.safe_load(each["data"]["config.yaml"])
            each["data"]["config.yaml"] = yaml.safe_dump({**settings, **site_settings()})
    return objects


def site_settings() -> dict[str, Any]:
    """Return the settings for this link: addresses of it that LoadBalancer Services may have, and which
    externalIPs Services may name."""
    listed = json.loads(docker("network", "inspect", "kind", "--format", "{{json .IPAM.Config}}"))
    ranges = []
    for each in listed:
        # far from the lower end, where the engine gives addresses to containers
        last = ip_network(each["Subnet"]).broadcast_address
        ranges.append(f"{last - 0x5F}-{last - 0x10}")
    return {
        "load_balancer_pools": [{"name": "link", "addresses": ranges}],
        "external_ips": ["203.0.113.0/24", "2001:db8:203::/64"],
    }


def load_podwall() -> bool:
    """Load podwall's image where its content is new; say whether an older one was there."""
    record = state() / "loaded"
    content = digest(*map(str, image.image().layers)) if offline() else build_with_docker()
    older = record.read_text() if record.exists() else ""
    if older == content:
        return False
    with step("loading podwall's image into the nodes"):
        if offline():
            import_podwall()
        else:
            kind("load", "docker-image", image.name(), "--name", NAME)
    record.write_text(content)
    return bool(older)


def build_with_docker() -> str:
    """Build the image as users do and return its digest."""
    docker("build", "--tag", image.name(), "--file", CONF / "Dockerfile", image.PROJECT, limit=1200)
    return docker("image", "inspect", "--format", "{{.Id}}", image.name()).strip()


def import_podwall() -> None:
    """Import the image into every node, without the layers that the nodes were made with."""
    same = (state() / "images").read_text() == str(contents.archive())
    layout = state() / "podwall.tar"
    write_layout(layout, image.image(), image.base_layers() if same else ())
    words = ["ctr", "--namespace=k8s.io", "images", "import", "--all-platforms", "--digests", "-"]
    with ThreadPoolExecutor() as hands:
        list(hands.map(lambda node: on_node(node, *words, stdin=layout), nodes()))
    layout.unlink()


def await_ready() -> None:
    """Wait until podwall serves on every node, the nodes are Ready and CoreDNS answers."""
    with step("waiting for podwall, the nodes and CoreDNS"):
        kubectl("-n", "kube-system", "rollout", "status", "daemonset/podwall", "--timeout=120s", limit=130)
        kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s", limit=70)
        kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s", limit=130)


def down() -> None:
    """Remove the cluster and everything that was made for it but the cache."""
    with alone():
        remove()


def remove() -> None:
    """Remove the cluster."""
    with step("removing the cluster"):
        if not offline():
            docker("rm", "--force", OUTSIDE)
            kind("delete", "cluster", "--name", NAME)
            shutil.rmtree(state(), ignore_errors=True)
            return
        if engine.running():
            try:
                docker("rm", "--force", OUTSIDE)
                kind("delete", "cluster", "--name", NAME)
                docker("volume", "prune", "--force")
            except ClusterError as error:
                say(f"kind cannot delete it: {error}")
            engine.stop()
        else:
            engine.remove_leftovers()
