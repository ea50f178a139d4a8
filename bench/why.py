"""How long `podwall why` takes, from its start to its last line, in a lab and on a cluster.

    podwall why client svc/guarded:80 --start--> objects, agents, the kernels' rules --> printed

The real command as a process of its own, each question in turn; its CPU time hardly depends on what else
runs. The lab has two nodes and the objects of examples/troubleshooting. On a cluster it asks about that
example as well, which has to be applied there.

    .venv/bin/python bench/why.py [--rounds 15]
    .venv/bin/python bench/why.py --kubeconfig FILE [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stage import sandbox
from stage.figures import Target, machine, percentile, report, say, table

from lab import manifests
from lab.world import Lab

PODWALL = [sys.executable, "-m", "agent.cli.main"]
EXAMPLES = Path(__file__).parents[1] / "examples" / "troubleshooting"
IN_A_LAB_S, ON_A_CLUSTER_S = 0.3, 1.5
QUESTIONS = {
    "a Pod": ("client", "pod/web:8080"),
    "a Service": ("client", "svc/for-all:80"),
    "a Service without endpoints": ("client", "svc/empty:80"),
    "denied by a policy": ("client", "svc/guarded:80"),
    "the objects alone": ("client", "svc/guarded:80", "--objects-only"),
}


def cpu() -> float:
    """Seconds of the processor that all commands so far have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(where: Sequence[str], question: Sequence[str], rounds: int) -> list[tuple[float, float]]:
    """Seconds of each round, by the clock and of the processor; the nodes on the way must have answered."""
    taken = []
    for _ in range(rounds):
        begun, used = time.perf_counter(), cpu()
        done = subprocess.run(
            [*PODWALL, "why", *where, "-n", "broken", "-o", "json", *question],
            check=True,
            capture_output=True,
            text=True,
        )
        taken.append((time.perf_counter() - begun, cpu() - used))
        nodes = json.loads(done.stdout)["nodes"]
        if any(node["silent"] for node in nodes) or not (nodes or "--objects-only" in question):
            sys.exit(f"not all nodes on the way answered: {nodes}")
    return taken


def measure(where: Sequence[str], rounds: int, limit_s: float) -> None:
    rows, slowest = [], 0.0
    for name, question in QUESTIONS.items():
        say(name)
        taken = timed(where, question, rounds)
        clock, processor = ([each[of] for each in taken] for of in (0, 1))
        median = statistics.median(clock)
        rows.append((name, 1e3 * median, 1e3 * percentile(clock, 90), 1e3 * statistics.median(processor)))
        slowest = max(slowest, median)
    say("")
    print(*machine(), "", *table(("question", "median ms", "90 % ms", "CPU ms"), rows), "", sep="\n")
    report([Target("the slowest median", slowest, limit_s, "s")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kubeconfig")
    options = parser.parse_args()
    if options.kubeconfig:
        measure(["--kubeconfig", options.kubeconfig], options.rounds, ON_A_CLUSTER_S)
        return
    sandbox.enter()
    with Lab(nodes=2, given=manifests.read([EXAMPLES, EXAMPLES / "lab"])):
        measure(["--lab"], options.rounds, IN_A_LAB_S)


if __name__ == "__main__":
    main()
