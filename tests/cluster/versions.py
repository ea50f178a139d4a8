"""Which software the offline cluster is made of: change a line here and what depends on it is built again."""

from dataclasses import dataclass

KUBERNETES = "v1.34.4"
KIND = "v0.33.0"
ETCD = "v3.6.5"
COREDNS = "v1.12.4"
DEBIAN = "bookworm"  # systemd 252 still runs on cgroup v1, which the nodes use on hosts with both kinds
GO_MINIMUM = (1, 25)

VERSION_PACKAGE = "k8s.io/component-base/version"
KUBERNETES_LINK_FLAGS = " ".join(
    [
        "-s -w",
        f"-X {VERSION_PACKAGE}.gitVersion={KUBERNETES}",
        f"-X {VERSION_PACKAGE}.gitMajor=1",
        f"-X {VERSION_PACKAGE}.gitMinor={KUBERNETES.split('.')[1]}",
        f"-X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES}",
    ]
)


@dataclass(frozen=True, slots=True)
class GoModule:
    """Programs that one Go module holds.

    `packages` are built and named by their last word, the module's own package ("") by `name`;
    `test_packages` are compiled as NAME.test. `go` is the language version of the module that requires it.
    """

    name: str
    path: str
    version: str
    packages: tuple[str, ...] = ()
    test_packages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    go: str = "1.24.0"


KUBERNETES_MODULE = GoModule(
    "kubernetes",
    "k8s.io/kubernetes",
    KUBERNETES,
    packages=(
        "cmd/kube-apiserver",
        "cmd/kube-controller-manager",
        "cmd/kube-scheduler",
        "cmd/kubelet",
        "cmd/kube-proxy",
        "cmd/kubeadm",
        "cmd/kubectl",
        "test/images/agnhost",
        "test/images/regression-issue-74839",
    ),
    test_packages=("test/e2e",),
    flags=("-trimpath", "-ldflags", KUBERNETES_LINK_FLAGS),
)
KIND_MODULE = GoModule(
    "kind", "sigs.k8s.io/kind", KIND, packages=("",), flags=("-trimpath", "-ldflags", "-s -w"), go="1.25.0"
)
ETCD_MODULE = GoModule("etcd", "go.etcd.io/etcd/server/v3", ETCD, packages=("",))
COREDNS_MODULE = GoModule("coredns", "github.com/coredns/coredns", COREDNS, packages=("",))

ENGINE_PACKAGES = (
    "ca-certificates",
    "containerd",
    "docker.io",
    "iproute2",
    "iptables",
    "jq",
    "kmod",
    "mount",
    "pigz",
    "procps",
    "runc",
)
NODE_PACKAGES = (
    "ca-certificates",
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "curl",
    "dbus",
    "ebtables",
    "ethtool",
    "iproute2",
    "iptables",
    "iputils-ping",
    "jq",
    "kmod",
    "mount",
    "nftables",
    "pigz",
    "procps",
    "runc",
    "socat",
    "systemd",
    "systemd-sysv",
    "tcpdump",
)
# What the upstream tests call inside agnhost and its relatives, and what kube-proxy calls.
TOOL_PACKAGES = (
    "bash",
    "bind9-dnsutils",
    "ca-certificates",
    "conntrack",
    "curl",
    "iperf",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "netcat-openbsd",
    "nftables",
    "procps",
    "wget",
)
# What the agent's image holds beside the wheel and what it depends on.
AGENT_PACKAGES = ("ca-certificates", "python3-minimal", "python3", "python3-nftables")
