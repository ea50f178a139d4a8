"""The CNI plugin that the lab runs: a real binary, on machines that mount /run as Debian does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lab.limits import SLOWNESS

PROJECT = Path(__file__).parents[2]
OWN_RUN = """
mount --make-rprivate /
mount -t tmpfs -o nosuid,nodev,noexec tmpfs /run
ip link set lo up
exec "$@"
"""


def test_the_demo_runs_where_nothing_in_run_can_be_executed() -> None:
    words = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words += ["sh", "-e", "-c", OWN_RUN, "sh"]
    words += [sys.executable, "-m", "agent.cli.main", "lab", "demo", "-f", "examples/hello"]
    done = subprocess.run(
        words, cwd=PROJECT, capture_output=True, text=True, timeout=120 * SLOWNESS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
