"""The command, asked of the real cluster as a user asks it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster import cluster
from tests.cluster.console import wait_for

PODWALL = Path(sys.executable).parent / "podwall"


def podwall(*words: str | Path, status: int = 0, limit: float = 60) -> str:
    """What it prints, ending with this status within so many seconds."""
    command = [PODWALL, *words, "--kubeconfig", cluster.kubeconfig()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr
    return done.stdout


def why(namespace: str, *words: str) -> Any:
    """The whole answer of `podwall why`, once the nodes' rules have followed what was applied last."""

    def look() -> Any:
        answer = json.loads(podwall("why", "-n", namespace, "-o", "json", *words, limit=30))
        return answer if all(each["agrees"] for each in answer["nodes"]) else None

    return wait_for(f"the rules to follow: {' '.join(words)}", look, limit=10, every=0.5)
