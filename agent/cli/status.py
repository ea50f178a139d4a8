"""`podwall status`: whether every node is well, proved by each node's agent and by packets between them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import click

from agent.cli import one_node
from agent.cli.agents import NOBODY, Agents, Silent
from agent.cli.ask import CANNOT_REACH, Unreachable, ask
from agent.cli.cluster import Asked, live_cluster_options
from agent.cli.get_tables import ENDLESS
from agent.cli.output import NEGATIVE, Coloured, Column, age, output_option, show, table
from agent.cli.verdict import Health, Verdict, judge
from agent.log import printable
from cni.wire import SOCKET

EVERY_S = 1.0
OLDER = "no such call"  # what an agent says to a question that came after it
FRESH_S = 15.0
"""What was compared since then was compared for this answer; very large rulesets are not."""

MOST_SAID = 30
"""Findings, and remarks, that a person is told at once."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Found:
    """What each node's agent said, and the verdict on it."""

    healths: Mapping[str, Health | Silent]
    verdict: Verdict

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Ask every agent of the cluster. Raises Unreachable when there is none."""
        with asked.agents() as agents:
            return cls.of_agents(agents, asked.nodes)

    @classmethod
    def of_agents(cls, agents: Agents, cluster: Callable[[], Iterable[str]]) -> Self:
        """Ask these agents, and meanwhile which Nodes the cluster has. Raises Unreachable."""
        with ThreadPoolExecutor(1) as beside:
            nodes = beside.submit(cluster)
            if not agents.nodes:
                raise Unreachable(NOBODY)
            healths = agents.ask_all("health")
            unlike = [
                node for node, each in healths.items() if isinstance(each, Silent) and OLDER in each.why
            ]
            healths |= {
                node: _of_older(each) for node, each in agents.ask_all("status", nodes=unlike).items()
            }
            return cls(healths, judge(healths, nodes.result()))

    @property
    def answered(self) -> dict[str, Health]:
        """What those said that said something."""
        return {node: each for node, each in self.healths.items() if not isinstance(each, Silent)}

    def to_json(self) -> dict[str, Any]:
        """For a program: the verdict, and all that was said."""
        return {
            "well": self.verdict.well,
            "summary": self.verdict.summary,
            "findings": [each.to_json() for each in self.verdict.findings],
            "remarks": list(self.verdict.remarks),
            "nodes": [
                {"node": node, "silent": each.why} if isinstance(each, Silent) else {"node": node, **each}
                for node, each in sorted(self.healths.items())
            ],
        }

    def lines(self, *, wide: bool) -> Iterator[str | Coloured]:
        """For a person: the verdict, a table of the nodes, then findings and remarks."""
        yield Coloured(self.verdict.summary, "green" if self.verdict.well else "red")
        yield ""
        yield from table([_Row(self, node) for node in self._nodes()], COLUMNS, wide=wide)
        yield ""
        yield _paths(self.answered)
        for title, said in (
            ("findings, the worst first:", [f"{of.node}: {of.text}" for of in self.verdict.findings]),
            ("remarks:", list(self.verdict.remarks)),
        ):
            if said:
                yield ""
                yield title
                yield from (f"  {each}" for each in said[:MOST_SAID])
                if len(said) > MOST_SAID:
                    yield f"  and {len(said) - MOST_SAID} more: -o json has them all"

    def _nodes(self) -> list[str]:
        return sorted({*self.healths, *(of.node for of in self.verdict.findings)})


def _of_older(status: Any) -> Health | Silent:
    """What an agent can say that proves nothing yet; it is told apart from one that is well."""
    if isinstance(status, Silent):
        return status
    unproved = {"error": "its agent is older than this command, and proves nothing"}
    return {"status": status, "rules": unproved, "paths": {}, "features": {}, "lag": {}}


@dataclass(frozen=True, slots=True)
class _Row:
    """One node of the table; what a silent one would say is nothing."""

    found: Found
    node: str

    @property
    def health(self) -> Health | None:
        return self.found.answered.get(self.node)

    def get(self, *path: str) -> Any:
        """A field of what the node's agent said, None without it."""
        value: Any = self.health
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def state(self) -> str:
        """One word."""
        if self.health is None:
            return "silent"
        return "not well" if any(of.node == self.node for of in self.found.verdict.findings) else "well"

    def rules(self) -> str:
        """Whether the kernel's rules are podwall's."""
        if self.get("rules", "altered"):
            return "altered"
        if not self.get("rules", "compared"):
            return ""
        at = self.get("rules", "at")
        return "checked" if not at or time.time() - at < FRESH_S else f"checked {age(at)} ago"

    def paths(self) -> str:
        """How many paths to other nodes answer, of all."""
        tried = self.get("paths", "paths")
        if tried is None:
            return ""
        lost = len(self.get("paths", "without_path") or ())
        return f"{sum(path['ok'] for path in tried)}/{len(tried) + lost}"

    def features(self) -> str:
        """How many kernel features there are, of those that podwall uses."""
        known = self.get("features", "features")
        return f"{sum(each['there'] for each in known)}/{len(known)}" if known else ""

    def addresses(self) -> list[str]:
        """How many addresses are in use, of those that a range has, a range each."""
        ranges = self.get("status", "addresses") or ()
        return [f"{of['used']}/{of['size']}" if of["size"] < ENDLESS else str(of["used"]) for of in ranges]

    def lag(self) -> str:
        """How far it is behind the cluster."""
        ms = self.get("lag", "ms")
        return "" if ms is None else f"{ms:.0f}ms"

    def policies(self) -> str:
        """How many policies select its Pods, how many wait, and how many are in audit mode."""
        states = self.get("status", "policies")
        if states is None:
            return ""
        words = {"waiting": "wait", "audit": "audit"}
        notes = [f"{states[what]} {word}" for what, word in words.items() if states.get(what)]
        return str(states["selecting"]) + (f" ({', '.join(notes)})" if notes else "")


COLUMNS: tuple[Column[_Row], ...] = (
    Column("NODE", lambda row: row.node),
    Column("STATE", _Row.state),
    Column("PODS", lambda row: row.get("status", "pods")),
    Column("ADDRESSES", lambda row: row.addresses()[:1]),
    Column("RULES", _Row.rules),
    Column("PATHS", _Row.paths),
    Column("LAG", _Row.lag),
    Column("LAST COMMIT", lambda row: row.health and age(row.get("status", "last_commit"))),
    Column("SERVICES", lambda row: row.get("status", "services", "state")),
    Column("POLICIES", _Row.policies),
    Column("VERSION", lambda row: row.get("status", "version")),
    Column("KERNEL", lambda row: row.get("status", "kernel"), wide=True),
    Column("FEATURES", _Row.features, wide=True),
    Column("REPAIRS", lambda row: row.get("status", "repairs", "last_hour"), wide=True),
    Column("COMMITS", lambda row: row.get("status", "commits"), wide=True),
    Column("DENIED", lambda row: row.get("status", "denied_packets_seen"), wide=True),
    Column("UP", lambda row: row.health and age(row.get("status", "started")), wide=True),
    Column("ALL ADDRESSES", _Row.addresses, wide=True),
)


def _paths(answered: Mapping[str, Health]) -> str:
    """What the packets between nodes proved, in a sentence."""
    tried = [path for health in answered.values() for path in health["paths"].get("paths", ())]
    if not tried:
        return "packets: there is no other node to send any to"
    ways = ", ".join(sorted({path["way"] for path in tried}))
    took = [path["ms"] for path in tried if path["ok"]]
    slowest = f", the slowest after {max(took):.1f} ms" if took else ""
    return f"packets: {len(took)} of {len(tried)} paths between nodes answer ({ways}){slowest}"


class Duration(click.ParamType[float]):
    """Seconds: 90, 90s, 5m, 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it. Raises click's usage error."""
        if isinstance(value, (int, float)):
            return float(value)
        found = _DURATION.fullmatch(str(value))
        if found is None:
            self.fail("a duration is written 90s, 5m or 1h", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


@click.command()
@click.option("--wait", is_flag=True, help="Wait until all is well; say meanwhile what for.")
@click.option(
    "--timeout", type=Duration(), default="5m", show_default=True, help="How long to wait: 90s, 5m, 1h."
)
@click.option("--socket", type=click.Path(path_type=Path), help="Ask only the agent behind this socket.")
@output_option
@live_cluster_options
def status(asked: Asked, wait: bool, timeout: float, socket: Path | None, output: str) -> None:
    """Say whether every node is well; otherwise the first line names the worst.

    Every node's agent is asked at the same time. Each compares the kernel's rules with those that should be
    there, sends packets, small ones and full ones, to the Pod ranges of all other nodes in both families,
    looks for each kernel feature that podwall uses, and measures how far it is behind the API server.

    \b
    podwall status                          the cluster of the kubeconfig, or the lab
    podwall status --wait --timeout 2m      after an installation
    podwall status -o wide                  what was proved, in more columns
    podwall status --socket /run/podwall/agent.sock   this node's agent alone

    The exit status is 0 when all is well, 1 when it is not, 3 when no agent can be asked.
    """
    if socket is None and not asked.named and Path(SOCKET).exists():
        socket = Path(SOCKET)
    if socket is not None:
        _of_one(socket, output)
        return
    found = _waited_for(asked, timeout) if wait else Found.of(asked)
    show(output, found.to_json(), lambda: found.lines(wide=output == "wide"))
    if not found.answered:
        raise SystemExit(CANNOT_REACH)
    if not found.verdict.well:
        raise SystemExit(NEGATIVE)


def _of_one(socket: Path, output: str) -> None:
    """One agent's own words; exit status 1 when its node takes no Pods. Raises Unreachable."""
    state = cast("dict[str, Any]", ask(socket, "status", {}))
    show(output, state, lambda: one_node.lines(state))
    if state["not_ready"]:
        raise SystemExit(NEGATIVE)


def _waited_for(asked: Asked, timeout_s: float) -> Found:
    """What is found when all is well, or when the time is over. Raises Unreachable."""
    until = time.monotonic() + timeout_s
    said = ""
    while True:
        try:
            found = Found.of(asked)
            waiting_for = found.verdict.summary
        except Unreachable as error:
            if time.monotonic() >= until:
                raise
            found, waiting_for = None, error.message
        if found and (found.verdict.well or time.monotonic() >= until):
            return found
        if waiting_for != said:
            click.echo(printable(f"waiting: {waiting_for}"), err=True)
            said = waiting_for
        time.sleep(EVERY_S)
