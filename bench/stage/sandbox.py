"""Namespaces of a benchmark's own: nothing of the machine is changed, and nothing of it is left behind.

    benchmark --unshare--> the same program, with processes, mounts, network and /run of its own

All that it starts ends with it, also when it is killed, and its network namespaces go with its /run.
"""

from __future__ import annotations

import ctypes
import os
import sys

INSIDE = "PODWALL_BENCH_INSIDE"
SERVICE_ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"

_MOUNT = """mount --make-rprivate / && mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@" """
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def enter() -> None:
    """Go on inside, as the same command started anew; returns there."""
    if os.environ.get(INSIDE) == "1":
        _service_account()
        return
    if os.geteuid():
        sys.exit("this benchmark makes network namespaces: start it as root")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    words = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    inside = ["sh", "-c", _MOUNT, "sh", sys.executable, *sys.argv]
    os.execvpe(words[0], [*words, *inside], {**os.environ, INSIDE: "1"})  # noqa: S606 - no shell is meant


def _service_account() -> None:
    """What an agent in a Pod finds; the benchmark's API server asks nobody who he is."""
    os.makedirs(SERVICE_ACCOUNT, exist_ok=True)  # noqa: PTH103 - a fixed place
    for name in ("token", "ca.crt"):
        with open(f"{SERVICE_ACCOUNT}/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("bench\n")
