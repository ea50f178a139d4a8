"""Has connections tried by the agents of their sources' nodes, from inside of the source Pods.

    ways by source Pod --by node--> questions of at most PER_QUESTION connections --probe--> what was seen

Nodes are asked at the same time, each one question after the other. What no agent could try is `failed`, with
the reason.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import click

from agent.cli.agents import MOST_AT_ONCE, Agents, SilentError
from agent.cli.cluster import Asked
from agent.cluster.model import Pod
from agent.explain.matrix import Column, Matrix, Way
from agent.explain.seen import Attempt, Observed, Seen, attempt, differs

PER_QUESTION = 2000
PAUSE_S = 1.0

Wanted: TypeAlias = tuple[Pod, Attempt]


def tried(asked: Asked, matrices: Iterable[Matrix]) -> Observed:
    """What the agents saw of these pairs; what differs is tried again a little later.

    A packet may have been lost, or a change been under way. Raises Unreachable.
    """
    ways: list[tuple[Pod, Column, Way]] = [
        (source, column, way) for each in matrices for source, column, cell in each.cells() for way in cell
    ]
    if len(ways) > PER_QUESTION and sys.stderr.isatty():
        click.echo(f"connecting: {len(ways)} connections", err=True)
    with asked.agents() as agents:
        seen = dict(observe(agents, ((way[0], attempt(*way)) for way in ways)))
        again = [way for way in ways if differs(way[1], way[2], seen[attempt(*way)])]
        if again:
            time.sleep(PAUSE_S)
            seen.update(observe(agents, ((way[0], attempt(*way)) for way in again)))
    return seen


def observe(agents: Agents, wanted: Iterable[Wanted]) -> Observed:
    """What became of each connection; each is tried once, however often it is wanted."""
    by_node: dict[str, dict[Attempt, None]] = defaultdict(dict)
    for pod, each in wanted:
        by_node[pod.node][each] = None
    if not by_node:
        return {}
    seen: dict[Attempt, Seen] = {}
    with ThreadPoolExecutor(min(len(by_node), MOST_AT_ONCE)) as threads:
        for found in threads.map(
            lambda node: _observe_from(agents, node, list(by_node[node])), sorted(by_node)
        ):
            seen.update(found)
    return seen


def _observe_from(agents: Agents, node: str, attempts: Sequence[Attempt]) -> dict[Attempt, Seen]:
    seen: dict[Attempt, Seen] = {}
    why = "" if node else "the Pod is on no node yet"
    for start in range(0, len(attempts), PER_QUESTION):
        some = attempts[start : start + PER_QUESTION]
        if not why:
            try:
                seen.update(_answered(some, agents.ask(node, "probe", _question(some))))
                continue
            except SilentError as error:
                why = str(error)
        seen.update(dict.fromkeys(some, Seen("failed", why)))
    return seen


def _question(attempts: Sequence[Attempt]) -> dict[str, Any]:
    return {
        "pods": [
            {"namespace": namespace, "name": name, "targets": [_target(each) for each in of]}
            for (namespace, name), of in _by_pod(attempts)
        ]
    }


def _target(of: Attempt) -> list[object]:
    _, address, protocol, port = of
    return [str(address), port, protocol]


def _answered(attempts: Sequence[Attempt], answer: Any) -> Iterator[tuple[Attempt, Seen]]:
    for (_, of), outcomes in zip(_by_pod(attempts), answer["pods"], strict=True):
        for each, (verdict, words) in zip(of, outcomes, strict=True):
            yield each, Seen(str(verdict), str(words))


def _by_pod(attempts: Iterable[Attempt]) -> list[tuple[tuple[str, str], list[Attempt]]]:
    found: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for each in attempts:
        found[each[0]].append(each)
    return list(found.items())
