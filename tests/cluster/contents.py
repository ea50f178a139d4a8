"""The images that a cluster needs beside podwall's own: Kubernetes' parts, what the upstream tests run, and
the controller of the ingress examples.

Names of Kubernetes' images are never written down here: kubeadm and e2e.test are asked for those they use.
"""

from pathlib import Path

from tests.cluster import image
from tests.cluster.cache import digest, entry
from tests.cluster.console import ClusterError, run
from tests.cluster.gobuild import module_directory, programs
from tests.cluster.images import Content, Folder, Image, Link, write_archive, write_layer
from tests.cluster.packages import root_archive
from tests.cluster.versions import (
    COREDNS_MODULE,
    ETCD_MODULE,
    GATEWAY_API,
    KUBERNETES,
    KUBERNETES_MODULE,
    TOOL_PACKAGES,
    TRAEFIK,
    TRAEFIK_MODULE,
)

HERE = Path(__file__).parent
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def archive() -> Path:
    """Return the archive of all these images, built where missing."""
    own = (Path(__file__), HERE / "images.py", HERE / "pause.c")
    key = digest(*own, *map(str, (tools(), *image.base_layers(), *sources())))
    return entry(f"images-{KUBERNETES}", key, build)


def tools() -> Path:
    """Return the layer with a shell and the network tools that tests call."""
    return root_archive("tools", TOOL_PACKAGES)


def sources() -> list[str]:
    """Name the directories that the programs come from; each name holds its content's key."""
    return [
        str(programs(module)) for module in (KUBERNETES_MODULE, ETCD_MODULE, COREDNS_MODULE, TRAEFIK_MODULE)
    ]


def system_names() -> list[str]:
    """List the images that kubeadm starts a cluster with."""
    kubeadm = programs(KUBERNETES_MODULE) / "kubeadm"
    return run([kubeadm, "config", "images", "list", f"--kubernetes-version={KUBERNETES}"]).split()


def test_names() -> list[str]:
    """List the images that upstream's tests may ask for."""
    return run([programs(KUBERNETES_MODULE) / "e2e.test", "--list-images"]).split()


def names(listed: list[str], *wanted: str) -> tuple[str, ...]:
    """Pick the listed image names whose last word is wanted; raise `ClusterError` when there is none."""
    found = tuple(name for name in listed if name.rsplit(":", 1)[0].rsplit("/", 1)[1] in wanted)
    if not found:
        raise ClusterError(f"no image is called {' or '.join(wanted)} in this version of Kubernetes")
    return found


def agnhost_name() -> str:
    """Return the name of upstream's test image in the version that its tests use."""
    return next(name for name in names(test_names(), "agnhost") if "e2e-test-images" in name)


def pause_name() -> str:
    """Return the name of the sandbox image."""
    return names(system_names(), "pause")[0]


def build(place: Path) -> None:
    """Write the archive."""
    work = place.with_name(f"{place.name}-layers")
    work.mkdir(exist_ok=True)
    try:
        base = Image(("docker.io/library/podwall-base:local",), image.base_layers(), ())
        write_archive(place, [base, *system_images(work), *test_images(work), controller_image(work)])
    finally:
        for layer in work.iterdir():
            layer.unlink()
        work.rmdir()


def layer(work: Path, name: str, files: dict[str, Content]) -> Path:
    """Write one layer into the working directory."""
    write_layer(work / f"{name}.tar", files)
    return work / f"{name}.tar"


def static(work: Path, name: str, program: Path, image_names: tuple[str, ...], path: str = "") -> Image:
    """Return an image that holds one program and the certificates."""
    path = path or f"usr/local/bin/{name}"
    files: dict[str, Content] = {
        path: program,
        "etc/ssl/certs/ca-certificates.crt": CERTIFICATES if CERTIFICATES.exists() else b"",
        "tmp": Folder(0o1777),
        "run": Folder(),
    }
    return Image(image_names, (layer(work, name, files),), (f"/{path}",))


def system_images(work: Path) -> list[Image]:
    """Return what kubeadm asks for."""
    listed = system_names()
    kubernetes = programs(KUBERNETES_MODULE)
    pause = work / "pause"
    run(["gcc", "-O2", "-static", "-o", pause, HERE / "pause.c"])
    found = [
        static(work, each, kubernetes / each, names(listed, each))
        for each in ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
    ]
    found.append(static(work, "etcd", programs(ETCD_MODULE) / "etcd", names(listed, "etcd")))
    found.append(
        static(work, "coredns", programs(COREDNS_MODULE) / "coredns", names(listed, "coredns"), "coredns")
    )
    found.append(static(work, "pause-image", pause, names(listed, "pause"), "pause"))
    proxy = layer(work, "kube-proxy", {"usr/local/bin/kube-proxy": kubernetes / "kube-proxy"})
    found.append(Image(names(listed, "kube-proxy"), (tools(), proxy), ("/usr/local/bin/kube-proxy",)))
    return found


def test_images(work: Path) -> list[Image]:
    """Return what upstream's network tests ask for: agnhost, which also stands in for its smaller
    relatives."""
    listed = test_names()
    kubernetes = programs(KUBERNETES_MODULE)
    porter = module_directory(KUBERNETES_MODULE) / "test/images/agnhost/porter"
    files: dict[str, Content] = {
        "agnhost": kubernetes / "agnhost",
        "agnhost-2": Link("agnhost"),
        "coredns": programs(COREDNS_MODULE) / "coredns",
        "localhost.crt": porter / "localhost.crt",
        "localhost.key": porter / "localhost.key",
        "uploads": Folder(0o777),
        "usr/local/bin/iperf": Link("/usr/bin/iperf"),
    }
    layers = (tools(), layer(work, "agnhost", files))
    regression = {"regression-issue-74839": kubernetes / "regression-issue-74839"}
    found = [
        Image((agnhost_name(), *names(listed, "jessie-dnsutils")), layers, ("/agnhost",), ("pause",)),
        Image(names(listed, "nginx", "httpd"), layers, ("/agnhost", "netexec", "--http-port=80"), ()),
        Image(names(listed, "busybox", "distroless-iptables"), layers[:1], (), ("/bin/sh",)),
    ]
    found.append(
        Image(
            names(listed, "regression-issue-74839"),
            (layer(work, "regression", dict(regression)),),
            ("/regression-issue-74839",),
        )
    )
    return found


def controller_image(work: Path) -> Image:
    """Return the ingress and gateway controller of the examples, under the name they use."""
    program = programs(TRAEFIK_MODULE) / "traefik"
    return static(work, "traefik", program, (f"docker.io/library/traefik:{TRAEFIK}",))


def gateway_definitions() -> Path:
    """Return the folder with the definitions of the Gateway API's objects."""
    return module_directory(GATEWAY_API) / "config/crd/standard"
