"""Whether a cluster's nodes are well, from what their agents say and prove. Pure.

    each node's health, or why it is silent --> findings, the worst first --> well: only without any
                                            +-> remarks: worth knowing, and no node is ill of it

A finding is about a node: it cannot take Pods, its rules are not its own, packets do not pass, it does not
hear from the API server, its kernel lacks something that is needed. What is wrong with somebody's Service or
policy is a remark: the nodes are well, and do what can be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from agent.cli.agents import Silent

SILENCE_S = 150.0
"""A watch hears something about once a minute; the agent gives up on it after two."""

SLOW_MS = 1000.0
RANKS = ("silent", "not ready", "rules", "path", "API server", "kernel", "node", "addresses", "unproved")
"""What a finding is about, the worst first."""

Health = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a node; `about` is one of RANKS."""

    node: str
    about: str
    text: str

    @property
    def rank(self) -> tuple[int, str, str]:
        """Sorts the worst first."""
        return RANKS.index(self.about), self.node, self.text

    def to_json(self) -> dict[str, str]:
        """For a program."""
        return {"node": self.node, "about": self.about, "text": self.text}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What there is to say of `nodes` nodes."""

    nodes: int
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]

    @property
    def well(self) -> bool:
        """Whether every node is, and there is one."""
        return not self.findings and self.nodes > 0

    @property
    def summary(self) -> str:
        """One sentence: that all is well, or the worst there is."""
        if self.well:
            remarks = {0: "", 1: "; one remark"}.get(len(self.remarks), f"; {len(self.remarks)} remarks")
            return (
                "the only node is well" if self.nodes == 1 else f"all {self.nodes} nodes are well"
            ) + remarks
        if not self.findings:
            return "there is no node"
        worst, more = self.findings[0], len(self.findings) - 1
        others = f" (and {more} more {'findings' if more > 1 else 'finding'} below)" if more else ""
        return f"{worst.node}: {worst.text}{others}"


def judge(healths: Mapping[str, Health | Silent], cluster: Iterable[str]) -> Verdict:
    """The verdict on a cluster of these Nodes, of whose agents each said this."""
    cluster = set(cluster)
    findings = [
        Finding(node, "silent", "no podwall agent runs on it: see `kubectl -n kube-system get pods -o wide`")
        for node in cluster - healths.keys()
    ]
    remarks: list[str] = []
    for node, health in healths.items():
        if isinstance(health, Silent):
            findings.append(Finding(node, "silent", health.why))
            continue
        findings += (Finding(node, about, text) for about, text in _of_node(health))
        remarks += _remarks(node, health)
    findings += _between(healths)
    versions = {health["status"]["version"] for health in healths.values() if not isinstance(health, Silent)}
    if len(versions) > 1:
        remarks.append(f"the agents have different versions: {', '.join(sorted(versions))}")
    return Verdict(
        len(cluster | healths.keys()), tuple(sorted(findings, key=lambda of: of.rank)), tuple(_once(remarks))
    )


def _of_node(health: Health) -> Iterator[tuple[str, str]]:
    status = health["status"]
    yield from (("not ready", f"not ready: {reason}") for reason in status["not_ready"])
    yield from _rules(health["rules"])
    yield from (("path", text) for text in filters(health.get("filters", {})))
    yield from (("API server", text) for text in _lag(health))
    yield from (("kernel", text) for text in missing(health["features"]))
    yield from (("node", problem) for problem in status["problems"])
    for each in status["addresses"]:
        if each["used"] + each["resting"] >= each["size"]:
            resting = f", {each['resting']} rest" if each["resting"] else ""
            yield (
                "addresses",
                f"no address of {each['cidr']} is free ({each['used']} of {each['size']} in use{resting})",
            )
    for proof in ("rules", "paths", "filters", "features"):
        if error := health.get(proof, {}).get("error"):
            yield "unproved", error


def _rules(rules: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if rules.get("altered"):
        first = rules["differences"][0]
        more = f", and {rules['altered'] - 1} more differences" if rules["altered"] > 1 else ""
        yield (
            "rules",
            f"the kernel's rules are not podwall's: {first['difference']}{more}; the agent puts them right",
        )
    elif not rules.get("compared", True):
        yield "unproved", "the rules change so fast that they cannot be compared with the kernel's"


def filters(answer: Mapping[str, Any]) -> Iterator[str]:
    """Others' chains that drop Pods' packets on a node."""
    for each in answer.get("drops", ()):
        chain = f"table {each['table']}, chain {each['chain']} ({each['hook']}, {each['how']})"
        yield f"{chain} drops what Pods send and receive; not podwall's: `podwall doctor` says what mends it"


# Paths


def _between(healths: Mapping[str, Health | Silent]) -> Iterator[Finding]:
    """What is wrong with the ways between nodes; of a node that is cut off from all others that alone."""
    failed: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    tried: set[tuple[str, str]] = set()
    for node, health in healths.items():
        if isinstance(health, Silent):
            continue
        for other in health["paths"].get("without_path", ()):
            text = (
                f"there is no route to the Pods of {other}: it has no spec.podCIDRs, or they cannot be used"
            )
            yield Finding(node, "path", text)
        for path in health["paths"].get("paths", ()):
            tried.add((node, path["node"]))
            if not path["ok"]:
                failed.setdefault((node, path["node"]), []).append(path)
    alone = set(_cut_off(tried, failed.keys()))
    for node in alone:
        others = ", ".join(sorted({pair[0] for pair in failed if pair[1] == node and pair[0] not in alone}))
        text = f"it is cut off: no packet passes between its Pods and those of {others}, in either direction"
        yield Finding(node, "path", text)
    for (node, other), paths in failed.items():
        if not alone & {node, other}:
            families = " and ".join(f"IPv{path['family']}" for path in paths)
            text = f"its Pods do not reach those of {other} over {families}: {paths[0]['reason']}"
            yield Finding(node, "path", text)


def _cut_off(tried: Set[tuple[str, str]], failed: Set[tuple[str, str]]) -> Iterator[str]:
    """The nodes that nobody reaches and that reach nobody, where others reach each other."""
    if tried == failed:
        return
    for node in {pair[1] for pair in tried}:
        own = {pair for pair in tried if node in pair}
        if own <= failed and any(pair[0] == node for pair in own) and len(own) > 2:
            yield node


def _lag(health: Health) -> Iterator[str]:
    if error := health["lag"].get("error"):
        yield f"it is behind the cluster: {error}"
    for watch in health["status"].get("watches", ()):
        if watch["error"]:
            yield f"the watch of {watch['kind']} is interrupted: {watch['error']}"
        elif watch["heard_s"] is not None and watch["heard_s"] > SILENCE_S:
            yield f"the watch of {watch['kind']} has been silent for {watch['heard_s']:.0f} s"


def missing(answer: Mapping[str, Any]) -> Iterator[str]:
    """The kernel features that are missing and needed, with what follows."""
    for each in answer.get("features", ()):
        if not each["there"] and each["matters"]:
            yield (
                f"the kernel lacks {each['name']} ({each['module']}: {each['why_not']}); "
                f"without it: {each['without']}"
            )


# Remarks


def _remarks(node: str, health: Health) -> Iterator[str]:
    status = health["status"]
    if count := status.get("repairs", {}).get("last_hour"):
        tables = ", ".join(status["repairs"]["tables"]) or "which tables is not known"
        times = "once" if count == 1 else f"{count} times"
        what = f"somebody changed podwall's rules {times} in the last hour ({tables})"
        yield f"{node}: {what}; they were put right"
    for each in status["object_problems"]:
        yield f"{each['kind']} {each['object']}: {each['problem']}"
    if (left := status["object_problems_total"] - len(status["object_problems"])) > 0:
        yield f"{node}: and {left} more problems of objects"
    if not_tried := health["paths"].get("not_tried"):
        yield f"{node}: {not_tried} paths to other nodes were not tried: there are too many at once"
    if (lag := health["lag"].get("ms")) is not None and lag > SLOW_MS:
        yield f"{node}: what the cluster has by now takes {lag / 1000:.1f} s to be known"
    if (services := status["services"]) and services["state"] == "off":
        yield f"{node}: podwall serves no Services: {services['why']}"
    if (balancer := status.get("load_balancer")) and balancer["silent_because"]:
        yield f"{node}: it answers for no LoadBalancer address: {balancer['silent_because']}"
    for each in health["features"].get("features", ()):
        if not each["there"] and not each["matters"]:
            yield f"{node}: the kernel has no {each['name']}; where that is needed: {each['without']}"


def _once(remarks: Sequence[str]) -> Iterator[str]:
    """Each once: all nodes say the same of the same objects."""
    yield from dict.fromkeys(remarks)
