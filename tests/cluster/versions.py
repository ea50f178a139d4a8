"""Which software the offline cluster is made of: change a line here and what depends on it is built again."""

from dataclasses import dataclass, field

KUBERNETES = "v1.34.4"
KIND = "v0.33.0"
ETCD = "v3.6.5"
COREDNS = "v1.12.4"
TRAEFIK = "v3.6.12"
GINKGO = "v2.21.0"  # the one in Kubernetes' go.mod: the processes speak with each other
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
class Substitute:
    """A file of a module that a program depends on, and what is compiled in its place."""

    module: str
    file: str
    text: str


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
    substitutes: tuple[Substitute, ...] = field(
        default=(), repr=False
    )  # not in the key of modules that have none


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
# Certificates by ACME's DNS challenge bring in the libraries of 170 clouds, two thirds of the time to build.
NO_DNS_CHALLENGE = Substitute(
    "github.com/go-acme/lego/v4",
    "providers/dns/zz_gen_dns_providers.go",
    """package dns

import (
	"errors"

	"github.com/go-acme/lego/v4/challenge"
)

func NewDNSChallengeProviderByName(name string) (challenge.Provider, error) {
	return nil, errors.New("built without DNS providers: " + name)
}
""",
)
TRAEFIK_PATH = "github.com/traefik/traefik/v3"
TRAEFIK_MODULE = GoModule(
    "traefik",
    TRAEFIK_PATH,
    TRAEFIK,
    packages=("cmd/traefik",),
    flags=(
        "-trimpath",
        "-ldflags",
        f"-s -w -X {TRAEFIK_PATH}/pkg/version.Version={TRAEFIK.removeprefix('v')}",
    ),
    go="1.25.0",
    substitutes=(NO_DNS_CHALLENGE,),
)
GINKGO_MODULE = GoModule(
    "ginkgo", "github.com/onsi/ginkgo/v2", GINKGO, packages=("ginkgo",), flags=("-trimpath",)
)
"""Runs upstream's tests in several processes at once."""

GATEWAY_API = GoModule("gateway-api", "sigs.k8s.io/gateway-api", "v1.4.0")
"""Holds the definitions of Gateway, HTTPRoute and their kin, in the version that Traefik asks for."""

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
