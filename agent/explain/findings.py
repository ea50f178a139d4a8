"""What is wrong with a node or a cluster, worst first, each with its cause in one sentence and what mends it.

    facts of each node (agent.doctor) --+
    objects of the cluster -------------+--> findings          pure: nothing is asked here
    nodes that gave no answer ----------+

`error`: connections fail or no Pod can start. `warning`: something fails under conditions that are near, or
works otherwise than it looks. `note`: worth knowing, nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from shlex import quote
from statistics import median_low
from typing import Any

from agent.cluster.model import Node
from agent.cluster.store import Snapshot

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)

CHECKED = (
    "agents and what they report",
    "kernel settings and features",
    "other networks' configuration, links and rules",
    "kube-proxy",
    "MTU",
    "clocks",
    "versions",
    "connection tracking and neighbour tables",
    "addresses for Pods",
    "the API server and what podwall may do there",
)
"""What all findings together look at."""
CHECKED_OBJECTS = ("the Nodes' podCIDRs, beside each other, the Nodes' addresses and the Services'",)
CHECKED_HERE = tuple(each for each in CHECKED if each not in ("clocks", "versions", "addresses for Pods"))
"""The same without agents, and on one machine alone."""

FULL, NEARLY_FULL = 0.97, 0.8
MANY_ADDRESSES = 0.9
SKEW_S = 5.0
SLOW_S = 1.0
RESTART = "kubectl -n kube-system rollout restart daemonset/podwall"
SETTINGS = "kubectl -n kube-system edit configmap podwall"

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """`node` "" is the whole cluster; `mend` is a command, or words where no single command does it."""

    severity: str
    topic: str
    node: str
    cause: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain data with stable keys."""
        return {
            "severity": self.severity,
            "topic": self.topic,
            "node": self.node,
            "cause": self.cause,
            "mend": self.mend,
        }


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is asked of the API server beside the nodes; None where nobody asked."""

    snapshot: Snapshot | None = None
    kube_proxy: bool | None = None
    silent: Mapping[str, str] = field(default_factory=dict)
    asked_at: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def findings(nodes: Mapping[str, Facts], cluster: Cluster) -> tuple[Finding, ...]:
    """Everything that is wrong, worst first."""
    found = [each for name, facts in nodes.items() for each in of_node(name, facts, cluster)]
    found += _between(nodes, cluster)
    if cluster.snapshot:
        found += _objects(cluster.snapshot, {*nodes, *cluster.silent})
    found += [_silent(name, why) for name, why in cluster.silent.items()]
    return tuple(sorted(set(found), key=_order))


def _silent(name: str, why: str) -> Finding:
    if "no such call" in why:
        cause = "the agent is older than this command, and cannot be asked what is wrong"
        return Finding(ERROR, "agent", name, cause, "podwall install")
    mend = "kubectl -n kube-system get pods -o wide -l app.kubernetes.io/name=podwall"
    return Finding(ERROR, "agent", name, f"the agent gives no answer: {why}", mend)


def wrong(found: Iterable[Finding]) -> bool:
    """Whether anything is more than a note."""
    return any(each.severity != NOTE for each in found)


ORDER = ("mtu", "kube-proxy", "cni", "filters", "pod-cidrs", "sysctls", "features", "rights", "api", "agent")
"""Causes before what they cause: an agent that is not ready says so last."""


def _order(finding: Finding) -> tuple[int, int, str, str]:
    place = ORDER.index(finding.topic) if finding.topic in ORDER else len(ORDER) - 1
    return SEVERITIES.index(finding.severity), place, finding.node, finding.cause


# One node


def of_node(name: str, facts: Facts, cluster: Cluster) -> Iterator[Finding]:
    """What is wrong with one node."""
    yield from _mtu(name, facts)
    yield from _kube_proxy(name, facts, cluster)
    yield from _other_networks(name, facts)
    yield from _filters(name, facts)
    yield from _kernel(name, facts)
    yield from _tables(name, facts)
    yield from _api(name, facts)
    yield from _agent(name, facts)
    for what, why in facts["unread"].items():
        yield Finding(NOTE, what, name, f"{what} could not be looked at: {why}")


def _mtu(name: str, facts: Facts) -> Iterator[Finding]:
    links, paths = facts["links"], facts["paths"] or ()
    pods = max(links["largest_pod_mtu"], facts["mtu"]["planned"]) if links else 0
    if pods and pods > links["uplink"]["mtu"]:
        uplink = links["uplink"]
        cause = f"MTU too large: Pods have {pods}, but the node's {uplink['name']} takes {uplink['mtu']}"
        yield Finding(ERROR, "mtu", name, cause, _set_mtu(0))
        return
    for path in paths:
        takes = path["takes"] - (path["asked"] - path["pod_mtu"])
        if path["takes"] and takes < path["pod_mtu"]:
            tunnel = " in the tunnel" if path["way"] == "vxlan" else ""
            cause = (
                f"MTU too large: Pods have {path['pod_mtu']}, but the way to node {path['node']} "
                f"({path['address']}) takes {takes}{tunnel}"
            )
            yield Finding(ERROR, "mtu", name, cause, _set_mtu(takes))
        elif not path["takes"]:
            cause = (
                f"node {path['node']} ({path['address']}) answers no ICMP echo, so its way is not measured"
            )
            yield Finding(NOTE, "mtu", name, cause)


def _set_mtu(size: int) -> str:
    return f"{SETTINGS}   # mtu: {size}; then {RESTART}, and make the Pods again"


def _kube_proxy(name: str, facts: Facts, cluster: Cluster) -> Iterator[Finding]:
    seen, setting = facts["kube_proxy"], facts["services"]
    if not seen or setting == "off":
        return
    remove = "kubectl -n kube-system delete daemonset kube-proxy; on each node: kube-proxy --cleanup"
    if (facts["agent"] or {}).get("services") == "on":
        cause = f"kube-proxy beside podwall: its rules ({seen}) are here while podwall serves Services too"
        yield Finding(ERROR, "kube-proxy", name, cause, remove)
    elif cluster.kube_proxy is False:
        cause = f"kube-proxy is gone, but its rules ({seen}) are here, so podwall leaves Services to it"
        yield Finding(ERROR, "kube-proxy", name, cause, "on the node: kube-proxy --cleanup")
    else:
        cause = f"kube-proxy beside podwall: its rules ({seen}) are here, so podwall leaves Services to it"
        mend = f'{remove}; or, if that is meant, {SETTINGS}   # services: "off"'
        yield Finding(WARNING, "kube-proxy", name, cause, mend)


def _other_networks(name: str, facts: Facts) -> Iterator[Finding]:
    if cni := facts["cni"]:
        files, directory, own = cni["files"], cni["directory"], cni["own"]
        if own not in files:
            cause = f"the runtime has no configuration of podwall in {directory}, so no Pod gets a network"
            yield Finding(ERROR, "cni", name, cause, f"kubectl -n kube-system logs {_pod(name)}")
        for file in files[: files.index(own)] if own in files else ():
            cause = f"another network's configuration sorts before podwall's: {directory}/{file}"
            path = quote(f"{directory}/{file}")
            mend = f"on the node: mv {path} {path}.off"
            yield Finding(ERROR, "cni", name, cause, mend)
        for file in files[files.index(own) + 1 :] if own in files else ():
            cause = f"another network's configuration is left in {directory}: {file}"
            yield Finding(NOTE, "cni", name, cause, f"on the node: rm {quote(f'{directory}/{file}')}")
    for plugin, of in (facts["links"] or {}).get("others", {}).items():
        links, more = of["links"], f" and {of['total'] - 3} more" if of["total"] > 3 else ""
        cause = f"links of {plugin} are on the node: {', '.join(links[:3])}{more}"
        mend = f"on the node: ip link delete {quote(links[0])}{'   # and the others' * (of['total'] > 1)}"
        yield Finding(WARNING, "cni", name, cause, mend)
    for plugin, tables in (facts["filters"] or {}).get("plugins", {}).items():
        cause = f"rules of {plugin} are on the node, in table {', '.join(tables)}"
        mend = (
            f"on the node: nft list table {_words(tables[0])}   # then delete the chains, or start it again"
        )
        yield Finding(WARNING, "cni", name, cause, mend)


HOOKS = {
    "forward": (ERROR, "what Pods send and receive"),
    "prerouting": (ERROR, "what Pods send and receive"),
    "postrouting": (ERROR, "what Pods send and receive"),
    "input": (WARNING, "what Pods send to their node, and other nodes' tunnels"),
    "output": (WARNING, "what the node sends to Pods"),
}


def _filters(name: str, facts: Facts) -> Iterator[Finding]:
    for each in (facts["filters"] or {}).get("drops", ()):
        severity, what = HOOKS[each["hook"]]
        table = f"{each['family']} {each['table']}"
        cause = f"nftables table {table}, chain {each['chain']} ({each['hook']}, {each['how']}) drops {what}"
        place = f"{_words(table)} {quote(each['chain'])}"
        mend = f"on the node: nft insert rule {place} {_link_of(each['hook'])} accept"
        yield Finding(severity, "filters", name, cause, mend)
    for program in (facts["filters"] or {}).get("legacy", ()):
        cause = f"{program} has rules of its own on the node, which are not looked at here"
        yield Finding(NOTE, "filters", name, cause, f"on the node: {program}-save -t filter")


def _link_of(hook: str) -> str:
    return f"""{"o" if hook in ("output", "postrouting") else "i"}ifname '"podwall*"'"""


def _words(table: str) -> str:
    """A table's family and name for a shell: others' names may be anything."""
    return " ".join(map(quote, table.split(" ", 1)))


def _kernel(name: str, facts: Facts) -> Iterator[Finding]:
    for each in facts["sysctls"] or ():
        setting = each["path"].replace("/", ".")
        is_ = f"is {each['found']}" if each["found"] is not None else "is not there"
        cause = f"{setting} {is_} and must be {each['value']}: {each['why']}"
        yield Finding(ERROR, "sysctls", name, cause, f"on the node: {each['command']}")
    for each in facts["features"] or ():
        cause = f"the kernel {facts['kernel']} lacks {each['name']} ({each['why_not']}): {each['without']}"
        severity = ERROR if each["matters"] else NOTE
        yield Finding(severity, "features", name, cause, f"on the node: modprobe {each['module'].split()[0]}")


def _tables(name: str, facts: Facts) -> Iterator[Finding]:
    if (table := facts["conntrack"]) and (full := _full(table)):
        cause = f"connection tracking holds {_of(table)} flows; when it is full new connections are dropped"
        mend = f"on the node: sysctl -w net.netfilter.nf_conntrack_max={2 * table['most']}"
        yield Finding(full, "conntrack", name, cause, mend)
    for table in facts["neighbours"] or ():
        if full := _full(table):
            family = "ipv4" if table["family"] == 4 else "ipv6"
            cause = (
                f"the neighbour table of {family} holds {_of(table)}; when it is full nothing new is reached"
            )
            mend = f"on the node: sysctl -w net.{family}.neigh.default.gc_thresh3={2 * table['most']}"
            yield Finding(full, "neighbours", name, cause, mend)
    for use in (facts["agent"] or {}).get("addresses", ()):
        taken = use["used"] + use["resting"]
        if taken >= MANY_ADDRESSES * use["size"]:
            severity = ERROR if taken >= use["size"] else WARNING
            cause = f"of {use['size']} addresses for Pods in {use['cidr']}, {taken} are in use or rest"
            mend = (
                "move Pods: kubectl cordon "
                + name
                + "; larger ranges need --node-cidr-mask-size and new Nodes"
            )
            yield Finding(severity, "addresses", name, cause, mend)


def _full(table: Mapping[str, int]) -> str:
    if table["used"] < NEARLY_FULL * table["most"]:
        return ""
    return ERROR if table["used"] >= FULL * table["most"] else WARNING


def _of(table: Mapping[str, int]) -> str:
    return f"{table['used']} of {table['most']}"


def _api(name: str, facts: Facts) -> Iterator[Finding]:
    api = facts["api"]
    if not api:
        return
    if api["error"]:
        mend = f"{SETTINGS}   # api_server: https://ADDRESS:6443; then {RESTART}"
        yield Finding(ERROR, "api", name, f"the API server cannot be asked: {api['error']}", mend)
    elif api["seconds"] > SLOW_S:
        cause = f"the API server took {api['seconds']:.1f} s to say its version"
        yield Finding(WARNING, "api", name, cause, "kubectl get --raw '/readyz?verbose'")
    if api["skew"] is not None and abs(api["skew"]) > SKEW_S:
        cause = f"the node's clock is {_seconds(api['skew'])} the API server's"
        yield Finding(WARNING, "clock", name, cause, "on the node: timedatectl set-ntp true")
    for right in api["forbidden"]:
        cause = f"podwall's ServiceAccount may not {right}"
        yield Finding(ERROR, "rights", "", cause, "podwall install   # puts its roles right")


def _seconds(skew: float) -> str:
    return f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'}"


def _agent(name: str, facts: Facts) -> Iterator[Finding]:
    agent = facts["agent"]
    if agent is None:
        return
    logs = f"kubectl -n kube-system logs {_pod(name)}"
    for reason in agent["not_ready"]:
        yield Finding(ERROR, "agent", name, f"no Pod can be put on this node: {reason}", logs)
    for problem in agent["problems"]:
        yield Finding(ERROR, "agent", name, problem, logs)
    if count := agent["object_problems"]:
        cause = f"{count} objects cannot be used as they are, such as {agent['first_object_problem']}"
        yield Finding(WARNING, "objects", name, cause, "podwall status")


def _pod(node: str) -> str:
    return f"-l app.kubernetes.io/name=podwall --field-selector spec.nodeName={node} --tail 50"


# Between nodes


def _between(nodes: Mapping[str, Facts], cluster: Cluster) -> Iterator[Finding]:
    if len(nodes) < 2:
        return
    yield from _unlike(nodes, "version", "agents have different versions of podwall", RESTART)
    yield from _unlike(nodes, "libnftables", "agents have different versions of libnftables", RESTART, NOTE)
    mtus = {name: facts["mtu"]["planned"] for name, facts in nodes.items() if facts["mtu"]["planned"]}
    if len(set(mtus.values())) > 1:
        cause = f"new Pods get different MTUs: {_groups(mtus)}"
        yield Finding(WARNING, "mtu", "", cause, _set_mtu(min(mtus.values())))
    yield from _clocks(nodes, cluster.asked_at)


def _unlike(
    nodes: Mapping[str, Facts], key: str, what: str, mend: str, severity: str = WARNING
) -> Iterator[Finding]:
    values = {name: facts[key] for name, facts in nodes.items() if facts[key]}
    if len(set(values.values())) > 1:
        yield Finding(severity, "versions", "", f"{what}: {_groups(values)}", mend)


def _groups(values: Mapping[str, object]) -> str:
    """node1, node2: 1500; node3: 1450"""
    by_value: dict[object, list[str]] = {}
    for name, value in sorted(values.items()):
        by_value.setdefault(value, []).append(name)
    return "; ".join(f"{listed(names)}: {value}" for value, names in by_value.items())


def listed(names: Sequence[str], most: int = 3) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _clocks(nodes: Mapping[str, Facts], asked_at: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """An answer is of a moment between question and answer by our clock; most nodes are taken as right."""
    off = {}
    for name, (asked, answered) in asked_at.items():
        when = nodes[name]["time"]
        off[name] = when - answered if when > answered else min(0.0, when - asked)
    if not off:
        return
    usual = median_low(off.values())
    for name, seconds in off.items():
        if abs(seconds - usual) > SKEW_S:
            cause = f"the node's clock is {_seconds(seconds - usual)} most other nodes'"
            yield Finding(WARNING, "clock", name, cause, "on the node: timedatectl set-ntp true")


# The cluster's objects


def _objects(snapshot: Snapshot, with_agent: set[str]) -> Iterator[Finding]:
    nodes = tuple(snapshot.nodes.values())
    for node in nodes:
        if not node.pod_cidrs:
            cause = "the Node has no spec.podCIDRs, so its Pods get no addresses"
            mend = "start the controller manager with --allocate-node-cidrs=true --cluster-cidr=RANGE"
            yield Finding(ERROR, "pod-cidrs", node.name, cause, mend)
        for problem in node.problems:
            yield Finding(
                ERROR, "pod-cidrs", node.name, f"the Node's {problem}", f"kubectl edit node {node.name}"
            )
        if with_agent and node.name not in with_agent:
            cause = "no agent of podwall runs on this node"
            mend = "kubectl -n kube-system describe daemonset podwall"
            yield Finding(ERROR, "agent", node.name, cause, mend)
    yield from _overlaps(nodes)
    yield from _taken(snapshot)


def _overlaps(nodes: Sequence[Node]) -> Iterator[Finding]:
    ranges = sorted(
        ((cidr, node.name) for node in nodes for cidr in node.pod_cidrs),
        key=lambda each: (each[0].version, int(each[0].network_address), each[0].prefixlen),
    )
    for (first, one), (second, other) in pairwise(ranges):
        if first.version == second.version and first.overlaps(second):
            cause = f"podCIDR {second} of Node {other} overlaps {first} of Node {one}"
            yield Finding(
                ERROR, "pod-cidrs", other, cause, f"kubectl delete node {other}   # and let it join again"
            )


def _taken(snapshot: Snapshot) -> Iterator[Finding]:
    """Pod ranges that hold addresses of nodes or Services: the first of each is enough to know."""
    mend = "give the controller manager another --cluster-cidr, and make the Nodes again"
    used = [
        (ip, f"address {ip} of Node {node.name}")
        for node in snapshot.nodes.values()
        for ip in node.internal_ips
    ]
    services = [
        (ip, f"ClusterIP {ip} of Service {'/'.join(service.key)}")
        for service in snapshot.services.values()
        for ip in service.cluster_ips
    ]
    for node in snapshot.nodes.values():
        for cidr in node.pod_cidrs:
            for group in (used, services):
                if what := next((words for ip, words in group if ip in cidr), ""):
                    cause = f"podCIDR {cidr} holds {what}"
                    yield Finding(ERROR, "pod-cidrs", node.name, cause, mend)
