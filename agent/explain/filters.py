"""What others' chains do to a Pod's packet, as far as it can be told without the packet.

Rules are gone through in the kernel's order, into chains they jump to. One that fits only some packets of
Pods (a port, a state, a set) decides nothing, so "drops" means: unless a rule accepts that is not told here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
DEEPEST = 16
"""So many jumps are followed."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; `hook` "" for one that is only jumped to, `policy` accept or drop."""

    family: str
    table: str
    name: str
    hook: str = ""
    priority: int = 0
    policy: str = "accept"
    kind: str = ""

    def __str__(self) -> str:
        return f"table {self.family} {self.table}, chain {self.name}"


@dataclass(frozen=True, slots=True)
class Rule:
    """`fits`: every packet of some Pod meets its conditions. `verdict` "" goes on, `to` is a jump's chain."""

    fits: bool
    verdict: str = ""
    to: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """Chains by family, table and name, and the rules that were read of them."""

    chains: Mapping[tuple[str, str, str], Chain] = field(default_factory=dict)
    rules: Mapping[Chain, tuple[Rule, ...]] = field(default_factory=dict)

    def at_hooks(self) -> tuple[Chain, ...]:
        """The filter chains that a hook calls, in the order of hook and priority."""
        found = [each for each in self.chains.values() if each.hook and each.kind == "filter"]
        return tuple(sorted(found, key=lambda each: (HOOKS.index(each.hook), each.priority, str(each))))


def dropping(rules: Rules) -> Iterator[tuple[Chain, str]]:
    """Each chain at a hook that drops Pods' packets, and by what: its policy, or a rule of some chain."""
    for chain in rules.at_hooks():
        fate, where = _fate(rules, chain, DEEPEST)
        if fate == "drop":
            yield chain, f"a rule of chain {where.name}" if where != chain else "a rule"
        elif not fate and chain.policy == "drop":
            yield chain, "policy drop"


def _fate(rules: Rules, chain: Chain, deepest: int) -> tuple[str, Chain]:
    """What becomes of the packet in a chain, and where that is said; "" when the chain says nothing."""
    for rule in rules.rules.get(chain, ()):
        if not rule.fits or not rule.verdict:
            continue
        if rule.verdict in ("accept", "drop"):
            return rule.verdict, chain
        if rule.verdict == "return":
            break
        target = rules.chains.get((chain.family, chain.table, rule.to))
        fate = _fate(rules, target, deepest - 1) if target and deepest else ("", chain)
        if fate[0] or rule.verdict == "goto":
            return fate
    return "", chain


FOREIGN_NETWORKS = {
    "cali-": "Calico",
    "CILIUM_": "Cilium",
    "FLANNEL-": "Flannel",
    "WEAVE-": "Weave Net",
    "KUBE-ROUTER": "kube-router",
    "ANTREA-": "Antrea",
}
"""How the chains of other network plugins begin."""


def left_behind(rules: Rules) -> dict[str, list[str]]:
    """Which other network plugins have chains here, each with the names of some of its tables."""
    found: dict[str, set[str]] = {}
    for chain in rules.chains.values():
        for beginning, plugin in FOREIGN_NETWORKS.items():
            if chain.name.startswith(beginning):
                found.setdefault(plugin, set()).add(f"{chain.family} {chain.table}")
    return {plugin: sorted(tables) for plugin, tables in sorted(found.items())}
