"""Pods whose MTU is larger than their way takes: `podwall doctor` says so in its first line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests
from lab.world import Lab

HELLO = Path(__file__).parents[2] / "examples" / "hello"


@pytest.mark.parametrize(
    ("mode", "mtu", "cause"),
    [
        ("vxlan", 1500, r"error: node1: MTU too large: Pods have 1500, .* takes 1450 in the tunnel$"),
        (
            "direct",
            9000,
            r"error: node1, node2: MTU too large: Pods have 9000, but the node's eth0 takes 1500$",
        ),
    ],
)
def test_an_mtu_that_the_way_does_not_take(mode: str, mtu: int, cause: str) -> None:
    with Lab(nodes=2, mode=mode, flags={"mtu": str(mtu)}, given=manifests.read([HELLO])):
        done = CliRunner().invoke(main, ["doctor", "--lab"])
        assert done.exit_code == 1, done.output
        first, second, *_ = done.output.splitlines()
        assert re.match(cause, first), first
        assert "edit configmap podwall   # mtu: " in second
