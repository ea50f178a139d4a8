"""What a node is like, asked of its kernel, its files and its API server, and judged elsewhere.

    agent ("doctor" on the socket) --+
                                     +--> facts of this node, plain data --> agent.explain.findings
    podwall doctor --here -----------+

Nothing is changed. Whatever cannot be read is named under `unread`, and the rest is told. The packets that
are sent are ICMP echoes to other nodes' own addresses.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agent import features, kube_proxy, node
from agent.calls import Answer, Body
from agent.cluster.client import ApiClient
from agent.cluster.credentials import (
    SERVICE_ACCOUNT,
    Credentials,
    CredentialSource,
    credential_source,
    find_api_server,
)
from agent.cluster.errors import ApiError
from agent.cluster.model import IPAddress, IPNetwork, Node
from agent.config import Config
from agent.explain.filters import dropping, left_behind
from agent.nft import foreign
from agent.nft.kernel import OWN_TABLES, Kernel, NftError
from agent.path_mtu import measure
from agent.pods.rtnetlink import (
    NEIGHBOUR,
    NUD_PERMANENT,
    RTM_GETNEIGH,
    Link,
    Rtnetlink,
)
from agent.routes.kernel import RouteError, RouteKernel
from agent.routes.plan import VXLAN_DEVICE, VXLAN_OVERHEAD
from agent.routes.plan import Path as Way

LEGACY = {
    "iptables-legacy": Path("/proc/thread-self/net/ip_tables_names"),
    "ip6tables-legacy": Path("/proc/thread-self/net/ip6_tables_names"),
}
"""The older programs, and where the kernel names the tables that they made."""

MOST_LINKS, MOST_CHAINS = 10, 100
"""So many of others' links of a kind, and of their chains that drop, are named."""

MOST_PEERS = 16
"""So many other nodes are sent packets; of more, some by chance."""

API_LIMIT_S = 5.0
_Answer = TypeVar("_Answer")
_CONFIGURATIONS = (".conf", ".conflist", ".json")
_LIBNFTABLES = re.compile(r"^Package: libnftables1\n(?:.+\n)*?Version: (\S+)", re.MULTILINE)

OTHERS_LINKS = {
    "cali": "Calico",
    "vxlan.calico": "Calico",
    "cilium_": "Cilium",
    "lxc_health": "Cilium",
    "flannel.": "Flannel",
    "weave": "Weave Net",
    "vethwe-": "Weave Net",
    "kube-bridge": "kube-router",
    "antrea-gw": "Antrea",
    "ovn-k8s-": "OVN-Kubernetes",
    "cni0": "the bridge plugin",
    "kube-ipvs0": "kube-proxy",
}
"""How links of other network plugins begin."""


class Need(NamedTuple):
    """What the agent must be allowed at the API server."""

    group: str
    resource: str
    verbs: tuple[str, ...]


READ = ("get", "list", "watch")
NEEDS = (
    *(Need("", resource, READ) for resource in ("namespaces", "nodes", "pods", "services")),
    Need("networking.k8s.io", "networkpolicies", READ),
    Need("discovery.k8s.io", "endpointslices", READ),
    Need("", "nodes/status", ("patch",)),
    Need("", "pods/status", ("patch",)),
    Need("", "services/status", ("patch",)),
    Need("events.k8s.io", "events", ("create", "patch")),
    Need("coordination.k8s.io", "leases", (*READ, "create", "update", "patch", "delete")),
)
"""Leases in kube-system, which is the namespace that is asked about."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the node beside its kernel; an agent knows more than --here."""

    config: Config
    own: Node | None = None
    peers: Sequence[Node] = ()
    ways: Sequence[Way] = ()
    pod_mtu: int = 0
    underlay: int = 4
    agent: Mapping[str, object] | None = None
    pod_cidrs: Sequence[IPNetwork] = ()


def answers(known: Callable[[], Known]) -> Mapping[str, Answer]:
    """The call `doctor`."""

    async def doctor(body: Body) -> object:
        return await asyncio.to_thread(facts, known())

    return {"doctor": doctor}


def facts(known: Known) -> dict[str, Any]:
    """Everything about this node, as plain data; blocks for some seconds at most."""
    parts: dict[str, Callable[[], object]] = {
        "sysctls": lambda: _sysctls(known),
        "features": lambda: asyncio.run(_features(known)),
        "cni": lambda: _configurations(known.config.cni_conf_dir),
        "links": lambda: _links(known),
        "filters": lambda: _filters(known),
        "kube_proxy": kube_proxy.seen,
        "conntrack": lambda: _conntrack(known.config.sysctl_dir),
        "neighbours": lambda: _neighbours(known.config.sysctl_dir),
        "api": lambda: _api_server(known.config),
        "paths": lambda: _paths(known),
        "libnftables": _libnftables,
    }
    config = known.config
    found: dict[str, Any] = {
        "node": config.node_name,
        "version": version("podwall"),
        "kernel": os.uname().release,
        "mode": config.mode,
        "services": config.services,
        "mtu": {"configured": config.mtu, "planned": known.pod_mtu},
        "agent": known.agent,
        "unread": {},
    }
    with ThreadPoolExecutor(len(parts)) as threads:
        for name, part in {name: threads.submit(part) for name, part in parts.items()}.items():
            try:
                found[name] = part.result()
            except (OSError, ApiError, NftError, struct.error) as error:
                found[name] = None
                found["unread"][name] = str(error)
    return {**found, "time": time.time()}


# Kernel settings and features


def _sysctls(known: Known) -> list[dict[str, str | None]]:
    """The settings that are not as podwall needs them."""
    config, link = known.config, _uplink(known)
    families = {cidr.version for cidr in known.pod_cidrs} or {4}
    current = node.current_settings(link.name, config.sysctl_dir)
    wrong = node.missing(link.name, config.mode, families, current)
    return [{**asdict(each), "command": each.command, "found": current.get(each.path)} for each in wrong]


async def _features(known: Known) -> list[dict[str, object]]:
    """What this kernel lacks; asked by a libnftables of its own, so that no commit waits."""
    families = {cidr.version for cidr in known.pod_cidrs}
    async with Kernel() as kernel:
        found = await features.found(kernel, tunnels=known.config.mode != "direct", families=families)
    return [each.to_json() for each in found if not each.there]


def _libnftables() -> str:
    """The version of the library that rules are written through; "" when nothing tells it."""
    status = Path("/var/lib/dpkg/status")
    if status.exists() and (found := _LIBNFTABLES.search(status.read_text(errors="replace"))):
        return found[1]
    try:
        said = subprocess.run(["nft", "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.split(" ", 1)[-1].strip()


def _conntrack(sysctl: Path) -> dict[str, int]:
    return _numbers(sysctl / "net/netfilter", used="nf_conntrack_count", most="nf_conntrack_max")


def _neighbours(sysctl: Path) -> list[dict[str, int]]:
    """Neighbours that the kernel keeps by itself, and how many it may; permanent ones do not count."""
    found = []
    with Rtnetlink() as kernel:
        for family, name in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
            most = node.read(sysctl / f"net/{name}/neigh/default/gc_thresh3")
            if most is None:  # only the first network namespace has it
                continue
            listed = kernel.listing(RTM_GETNEIGH, NEIGHBOUR.pack(family, 0, 0, 0, 0))
            states = (NEIGHBOUR.unpack_from(body)[2] for body in listed)
            used = sum(not state & NUD_PERMANENT for state in states)
            found.append({"family": 4 if name == "ipv4" else 6, "used": used, "most": int(most)})
    return found


def _numbers(directory: Path, **names: str) -> dict[str, int]:
    return {key: int((directory / name).read_text()) for key, name in names.items()}


# Other networks on the node


def _configurations(directory: Path) -> dict[str, Any]:
    """The runtime's network configurations in its order: it takes the first."""
    names = sorted(
        path.name for path in directory.iterdir() if path.suffix in _CONFIGURATIONS and path.is_file()
    )
    return {"directory": str(directory), "files": names, "own": node.CONFLIST}


def _links(known: Known) -> dict[str, Any]:
    links = _listed()
    pods = [link for link in links if link.name.startswith("podwall") and link.kind == "veth"]
    tunnel = next((link.mtu for link in links if link.name == VXLAN_DEVICE), None)
    uplink = _uplink(known)
    others: dict[str, list[str]] = {}
    for link in links:
        plugin = next((of for start, of in OTHERS_LINKS.items() if link.name.startswith(start)), "")
        if plugin:
            others.setdefault(plugin, []).append(link.name)
    return {
        "uplink": {"name": uplink.name, "mtu": uplink.mtu},
        "tunnel_mtu": tunnel,
        "pods": len(pods),
        "largest_pod_mtu": max((link.mtu for link in pods), default=0),
        "smallest_pod_mtu": min((link.mtu for link in pods), default=0),
        "underlay": known.underlay,
        "others": {plugin: {"links": of[:MOST_LINKS], "total": len(of)} for plugin, of in others.items()},
    }


def _filters(known: Known) -> dict[str, Any]:
    """Others' chains that drop Pods' packets, and plugins whose chains are here."""
    own = {(table.family, table.name) for table in OWN_TABLES}
    rules = foreign.read(own, known.pod_cidrs)
    drops = [
        {"family": c.family, "table": c.table, "chain": c.name, "hook": c.hook, "how": how}
        for c, how in islice(dropping(rules), MOST_CHAINS)
    ]
    legacy = [name for name, place in LEGACY.items() if "filter" in (node.read(place) or "").split()]
    return {"drops": drops, "plugins": left_behind(rules), "legacy": legacy}


# Links and the way to other nodes


def _listed() -> list[Link]:
    with Rtnetlink() as kernel:
        return kernel.links()


def _uplink(known: Known) -> Link:
    """The link that leads to other nodes: the one with the Node's address, else the default route's."""
    addresses = known.own.internal_ips if known.own else tuple(own_addresses())
    uplink = _asked(RouteKernel(known.config.sysctl_dir), lambda kernel: kernel.uplink(addresses))
    return next(link for link in _listed() if link.name == uplink.name)


def routed() -> tuple[IPNetwork, ...]:
    """The ranges of Pods that podwall's routes on this machine lead to. Raises OSError."""
    present = _asked(RouteKernel(), lambda kernel: kernel.read())
    return tuple(route.destination for route in present.routes)


def _asked(routes: RouteKernel, question: Callable[[RouteKernel], Awaitable[_Answer]]) -> _Answer:
    """The answer to one question about routes. Raises OSError."""

    async def ask() -> _Answer:
        try:
            return await question(routes)
        finally:
            await routes.close()

    try:
        return asyncio.run(ask())
    except RouteError as error:
        raise OSError(str(error)) from error


def own_addresses() -> Iterable[IPAddress]:
    """This machine's address on the default route of each family that has one."""
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((far, 9))
            except OSError:
                continue
            yield ip_address(sock.getsockname()[0])


def _paths(known: Known) -> list[dict[str, Any]]:
    """How large a packet reaches other nodes, as large as a Pod's is on its way there."""
    links = [link.mtu for link in _listed() if link.name.startswith("podwall") and link.kind == "veth"]
    pod_mtu = max([*links, known.pod_mtu])
    ways = {way.node: way.way for way in known.ways}
    peers = [peer for peer in known.peers if peer.internal_ips and peer.name in ways]
    asked: dict[IPAddress, int] = {}
    names: dict[IPAddress, Node] = {}
    for peer in random.sample(peers, min(len(peers), MOST_PEERS)):
        target = _on_underlay(peer, known.underlay)
        more = VXLAN_OVERHEAD[target.version] if ways[peer.name] == "vxlan" else 0
        asked[target], names[target] = pod_mtu + more, peer
    if not pod_mtu or not asked:
        return []
    return [
        {
            "node": names[target].name,
            "address": str(target),
            "way": ways[names[target].name],
            "pod_mtu": pod_mtu,
            "asked": path.asked,
            "takes": path.takes,
        }
        for target, path in sorted(measure(asked).items(), key=lambda item: names[item[0]].name)
    ]


def _on_underlay(peer: Node, version_: int) -> IPAddress:
    return next((ip for ip in peer.internal_ips if ip.version == version_), peer.internal_ips[0])


# The API server


def _api_server(config: Config) -> dict[str, Any] | None:
    """How fast it answers, its clock, and what podwall may not do there; None for a cluster of manifests."""
    if config.cluster != "api":
        return None
    known = config.kubeconfig is not None or SERVICE_ACCOUNT.exists()
    client = ApiClient(_source(config, known), connect_s=API_LIMIT_S, answer_s=API_LIMIT_S)
    began = time.monotonic()
    try:
        with closing(client.connection()) as connection:
            response = connection.request("GET", "/version")
            connection.read(response)
        took = time.monotonic() - began
        date = response.getheader("Date")
        server = parsedate_to_datetime(date).timestamp() + 0.5 if date else None  # whole seconds, cut off
        skew = time.time() - took / 2 - server if server else None
        forbidden = _forbidden(client) if known else []
        return {"seconds": took, "skew": skew, "error": "", "forbidden": forbidden}
    except ApiError as error:
        answered = bool(error.status) and not known  # it need not tell strangers anything
        said = "" if answered else str(error)
        return {"seconds": time.monotonic() - began, "skew": None, "error": said, "forbidden": []}
    finally:
        client.close()


def _source(config: Config, known: bool) -> CredentialSource:
    """The agent's credentials, or a stranger's where this is no agent's Pod."""
    if known:
        return credential_source(
            kubeconfig=config.kubeconfig,
            api_server=config.api_server,
            kubelet_kubeconfig=config.kubelet_kubeconfig,
        )

    def read() -> Credentials:
        server = find_api_server(config.api_server, config.kubelet_kubeconfig, os.environ)
        return Credentials(server, verify=False)

    return CredentialSource(read)


def _forbidden(client: ApiClient) -> list[str]:
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "kube-system"},
    }
    status = client.write("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review)["status"]
    return [] if status.get("incomplete") else not_allowed(status.get("resourceRules", ()))


def not_allowed(rules: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the agent needs and these rules do not give, as `kubectl auth can-i` takes it."""

    def allowed(need: Need, verb: str) -> bool:
        return any(
            {verb, "*"} & set(rule["verbs"])
            and {need.group, "*"} & set(rule.get("apiGroups", ()))
            and {need.resource, "*"} & set(rule.get("resources", ()))
            and not rule.get("resourceNames")
            for rule in rules
        )

    return [
        f"{verb} {need.resource}{'.' + need.group if need.group else ''}"
        for need in NEEDS
        for verb in need.verbs
        if not allowed(need, verb)
    ]
