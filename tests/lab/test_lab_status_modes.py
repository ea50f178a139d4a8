"""`podwall status` proves the way that packets between Pods take, whichever it is."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab.world import Lab

MODES = {
    "direct, no tunnel anywhere": ("direct", False, "direct", "eth0", 1500),
    "tunnels on one link": ("vxlan", False, "vxlan", "podwall-vxlan", 1450),
    "tunnels through a router": ("auto", True, "vxlan", "podwall-vxlan", 1450),
}


@pytest.mark.parametrize("case", MODES)
def test_packets_take_the_way_that_is_told(case: str) -> None:
    mode, routed, way, device, size = MODES[case]
    with Lab(nodes=2, mode=mode, routed=routed):
        done = CliRunner().invoke(main, ["status", "--lab", "--wait", "--timeout", "30s", "-o", "json"])
        assert done.exit_code == 0, done.output[:2000]
        said = json.loads(done.stdout)
    paths = [path for node in said["nodes"] for path in node["paths"]["paths"]]
    assert len(paths) == 4
    assert {(path["way"], path["by"], path["bytes"]) for path in paths} == {(way, device, size)}
