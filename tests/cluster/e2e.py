"""Upstream's own tests against the cluster: e2e.test with a focus, its own summary, and no success without a
test."""

import os
import re
import shlex
import socket
import subprocess

from tests.cluster import cluster, engine, kube
from tests.cluster.cache import root
from tests.cluster.cluster import Settings
from tests.cluster.console import ENDS_WITH_US, ClusterError, say
from tests.cluster.gobuild import programs
from tests.cluster.versions import GINKGO_MODULE, KUBERNETES_MODULE

SUMMARY = re.compile(r"Ran (\d+) of \d+ Specs")
SHOWN = re.compile(
    r"^\s*(• |Ran \d|(SUCCESS|FAIL)!|PASS\b|FAIL\b|Summarizing|\[(FAIL|PANICKED|TIMEDOUT|INTERRUPTED)\]"
    r"|Will run|\[sig-\S+\] \S)"
)
NEEDS_SCTP = r"\[Feature:SCTPConnectivity\]"


def run_tests() -> int:
    """Run the tests that FOCUS and SKIP select; return 0 only when at least one ran and none failed."""
    focus = os.environ.get("FOCUS") or r"\[sig-network\] Networking.*Granular Checks: Pods"
    started = not cluster.exists()
    settings = Settings.from_environment()
    if started:
        cluster.up(settings)
    try:
        return judge(*stream(command(focus, skipped(), settings)))
    finally:
        if started:
            cluster.down()


def skipped() -> str:
    """Return SKIP, and what this machine's kernel cannot do, which is said."""
    skip = os.environ.get("SKIP", "")
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        say(f"this kernel has no SCTP sockets: tests that connect over SCTP are skipped ({NEEDS_SCTP})")
        return "|".join(filter(None, [skip, NEEDS_SCTP]))
    return skip


def unready_system_pods() -> int:
    """Count system Pods that are not Ready, which the suite would otherwise await for ten minutes at its
    start.

    Without a network plugin (CNI=none) CoreDNS is not.
    """
    found = [
        pod["metadata"]["name"]
        for pod in kube.get("pods", "--namespace=kube-system")
        if not kube.condition(pod, "Ready")
    ]
    if found:
        say(f"not Ready, and not waited for: {', '.join(found)}")
    return len(found)


def command(focus: str, skip: str, settings: Settings) -> list[str]:
    """Return the command; it runs in the nodes' network, as some tests connect to node addresses
    themselves."""
    unready = unready_system_pods()
    return [
        *(engine.inside() if cluster.offline() else []),
        *runner(),
        f"--kubeconfig={cluster.kubeconfig()}",
        "--provider=skeleton",
        "--disable-log-dump",
        "--minStartupPods=0",
        *([f"--allowed-not-ready-nodes={unready}", "--system-pods-startup-timeout=5s"] if unready else []),
        f"--num-nodes={settings.nodes}",
        f"--ginkgo.focus={focus}",
        *([f"--ginkgo.skip={skip}"] if skip else []),
        "--ginkgo.no-color",
        "--ginkgo.v",
        "--ginkgo.timeout=6h",
    ]


def runner() -> list[str]:
    """Return the words before the suite's own: the suite itself, or with PARALLEL several of it at once."""
    suite = str(programs(KUBERNETES_MODULE) / "e2e.test")
    parallel = int(os.environ.get("PARALLEL", "1"))
    if parallel == 1:
        return [suite]
    return [
        str(programs(GINKGO_MODULE) / "ginkgo"),
        f"--procs={parallel}",
        "--timeout=6h",
        "--no-color",
        suite,
        "--",
    ]


def stream(words: list[str]) -> tuple[int, int]:
    """Run the tests, show their progress and summary lines; return exit status and number of tests run."""
    log = root() / "e2e.log"
    say(f"{shlex.join(word for word in words if 'ginkgo.' in word)}: every word of it goes to {log}")
    ran = 0
    with (
        log.open("w", buffering=1) as file,
        subprocess.Popen(
            [*ENDS_WITH_US, *words],
            env={**os.environ, **cluster.environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout
        try:
            for line in process.stdout:
                file.write(line)
                if SHOWN.match(line):
                    print(line, end="", flush=True)
                if found := SUMMARY.search(line):
                    ran = int(found[1])
            return process.wait(), ran
        finally:
            process.terminate()


def judge(status: int, ran: int) -> int:
    """Return the exit status for what was seen; raise `ClusterError` when no test ran."""
    if status == 0 and ran == 0:
        raise ClusterError("no test was run: FOCUS or SKIP selects none")
    return status
