"""The real cluster's command line: python -m tests.cluster COMMAND

    up      make a cluster and install podwall, or bring a running one up to date; prints the line to export
    down    remove it and everything made for it but the cache
    e2e     run upstream's tests: FOCUS and SKIP are regular expressions
    build   build what the cluster is made of, once
    image   write podwall's image into an archive:  image FILE
    node    run a command on a node:  node NAME COMMAND ...
    outside run a command on the machine outside the cluster
    kubectl run kubectl against the cluster

NODES=3, CNI=none, KUBE_PROXY=nftables or iptables come from the environment.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster import cluster, image
from tests.cluster.console import status_of
from tests.cluster.e2e import run_tests
from tests.cluster.gobuild import programs
from tests.cluster.versions import KUBERNETES_MODULE


def main(words: list[str]) -> int:
    """Carry out one command and return the exit status."""
    command, rest = (words[0], words[1:]) if words else ("", [])
    match command:
        case "up":
            print(f"export KUBECONFIG={cluster.up(cluster.Settings.from_environment())}")
        case "down":
            cluster.down()
        case "e2e":
            return run_tests()
        case "build":
            cluster.build()
        case "image":
            image.save(Path(*rest))
        case "node":
            return passed_on(["docker", "exec", "-i", *rest])
        case "outside":
            return passed_on(["docker", "exec", "-i", cluster.OUTSIDE, *rest])
        case "kubectl":
            return passed_on([str(programs(KUBERNETES_MODULE) / "kubectl"), *rest])
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


def passed_on(words: list[str]) -> int:
    """Run a command with the cluster's environment on the caller's own terminal."""
    return subprocess.call(words, env={**os.environ, **cluster.environment()})


if __name__ == "__main__":
    sys.exit(status_of(main))
