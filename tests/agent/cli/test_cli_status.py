"""The verdict on a cluster: well only when every node is; the first line names the worst."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from agent.cli.agents import Agents, Silent, SilentError
from agent.cli.main import main
from agent.cli.output import Coloured, Line
from agent.cli.status import Duration, Found
from agent.cli.verdict import Verdict, judge
from cni import wire

NODES = ("node1", "node2", "node3")
Spoil = Callable[[dict[str, Any]], object]


def path(node: str, family: int = 4) -> dict[str, Any]:
    cidr = f"10.244.{node[-1]}.0/24" if family == 4 else f"fd00:10:244:{node[-1]}::/64"
    return {
        "node": node,
        "family": family,
        "cidr": cidr,
        "way": "direct",
        "ok": True,
        "reason": "",
        "ms": 0.4,
        "bytes": 1450,
        "by": "eth0",
    }


def health(node: str) -> dict[str, Any]:
    """What the agent of a node says that is well."""
    return {
        "status": {
            "node": node,
            "version": "0.1.0",
            "kernel": "6.1.0",
            "started": 1.0,
            "not_ready": [],
            "problems": [],
            "pods": 2,
            "addresses": [
                {"cidr": "10.244.1.0/24", "used": 2, "resting": 0, "size": 254},
                {"cidr": "fd00:10:244:1::/64", "used": 2, "resting": 0, "size": 2**64 - 1},
            ],
            "object_problems": [],
            "object_problems_total": 0,
            "denied_packets_seen": 0,
            "commits": 3,
            "last_commit": 2.0,
            "repairs": {"total": 0, "last_hour": 0, "last": None, "tables": []},
            "watches": [{"kind": "Pod", "synced": True, "heard_s": 3.0, "error": ""}],
            "policies": {"selecting": 1, "waiting": 0, "audit": 0},
            "services": {"state": "on", "why": "services: on"},
        },
        "rules": {"compared": True, "altered": 0, "differences": [], "ms": 5.0},
        "paths": {
            "paths": [path(other, family) for other in NODES if other != node for family in (4, 6)],
            "without_path": [],
            "not_tried": 0,
        },
        "filters": {"drops": []},
        "features": {"features": [feature("nftables", True)]},
        "lag": {"ms": 4.0},
    }


def feature(name: str, there: bool, matters: bool = True) -> dict[str, Any]:
    why_not = "" if there else "No such file or directory"
    return {
        "name": name,
        "module": "nf",
        "there": there,
        "matters": matters,
        "without": "nothing works",
        "why_not": why_not,
    }


def judged(spoil: Spoil = lambda of: None, cluster: tuple[str, ...] = NODES) -> Verdict:
    """The verdict on three nodes, of which the second is spoilt."""
    healths: dict[str, Any] = {node: health(node) for node in NODES}
    spoil(healths["node2"])
    return judge(healths, cluster)


def set_in(*place: str, to: object) -> Spoil:
    def spoil(of: dict[str, Any]) -> None:
        for name in place[:-1]:
            of = of[name]
        of[place[-1]] = to

    return spoil


def fail_paths(reason: str, *families: int) -> Spoil:
    def spoil(of: dict[str, Any]) -> None:
        for each in of["paths"]["paths"]:
            if each["node"] == "node1" and each["family"] in families:
                each |= {"ok": False, "reason": reason, "ms": None}

    return spoil


def test_all_well_is_green() -> None:
    verdict = judged()
    assert (verdict.well, verdict.summary, verdict.remarks) == (True, "all 3 nodes are well", ())


def test_one_node_alone_is_well() -> None:
    alone = health("node1")
    alone["paths"]["paths"] = []
    assert judge({"node1": alone}, ["node1"]).summary == "the only node is well"


def test_no_node_is_not_well() -> None:
    assert not judge({}, []).well


ILL: Mapping[str, tuple[Spoil, str]] = {
    "not ready": (
        set_in("status", "not_ready", to=["there is no Node node2"]),
        "node2: not ready: there is no Node node2",
    ),
    "a rule altered": (
        set_in(
            "rules",
            to={
                "compared": True,
                "altered": 2,
                "differences": [{"part": "Services", "difference": "chain a of inet podwall is missing"}],
            },
        ),
        "node2: the kernel's rules are not podwall's: chain a of inet podwall is missing, and 1 more "
        "differences; the agent puts them right",
    ),
    "rules that could not be compared": (
        set_in("rules", to={"compared": False, "altered": 0, "differences": []}),
        "node2: the rules change so fast that they cannot be compared with the kernel's",
    ),
    "rules that could not be read": (
        set_in("rules", to={"error": "the rules cannot be read: no answer"}),
        "node2: the rules cannot be read: no answer",
    ),
    "a path of one family": (
        fail_paths("no answer", 6),
        "node2: its Pods do not reach those of node1 over IPv6: no answer",
    ),
    "a path of both families": (
        fail_paths("no answer", 4, 6),
        "node2: its Pods do not reach those of node1 over IPv4 and IPv6: no answer",
    ),
    "a node without route": (
        set_in("paths", "without_path", to=["node1"]),
        "node2: there is no route to the Pods of node1: it has no spec.podCIDRs, or they cannot be used",
    ),
    "no sockets": (
        set_in("paths", to={"error": "paths cannot be tried: Operation not permitted"}),
        "node2: paths cannot be tried: Operation not permitted",
    ),
    "a firewall": (
        set_in(
            "filters",
            "drops",
            to=[{"table": "ip filter", "chain": "FORWARD", "hook": "forward", "how": "policy drop"}],
        ),
        "node2: table ip filter, chain FORWARD (forward, policy drop) drops what Pods send and receive; "
        "not podwall's: `podwall doctor` says what mends it",
    ),
    "a watch that is interrupted": (
        set_in("status", "watches", to=[{"kind": "Pod", "error": "connection refused", "heard_s": 1.0}]),
        "node2: the watch of Pod is interrupted: connection refused",
    ),
    "a watch that is silent": (
        set_in("status", "watches", to=[{"kind": "Pod", "error": "", "heard_s": 400.0}]),
        "node2: the watch of Pod has been silent for 400 s",
    ),
    "behind the API server": (
        set_in("lag", to={"error": "the watch of policies does not get there"}),
        "node2: it is behind the cluster: the watch of policies does not get there",
    ),
    "a kernel feature missing": (
        set_in("features", "features", to=[feature("NFLOG", there=False)]),
        "node2: the kernel lacks NFLOG (nf: No such file or directory); without it: nothing works",
    ),
    "a kernel setting": (
        set_in("status", "problems", to=["net.ipv4.ip_forward is 0"]),
        "node2: net.ipv4.ip_forward is 0",
    ),
    "no address free": (
        set_in("status", "addresses", to=[{"cidr": "10.244.1.0/29", "used": 5, "resting": 1, "size": 6}]),
        "node2: no address of 10.244.1.0/29 is free (5 of 6 in use, 1 rest)",
    ),
}


@pytest.mark.parametrize("case", ILL)
def test_what_is_wrong_is_the_first_line(case: str) -> None:
    spoil, line = ILL[case]
    verdict = judged(spoil)
    assert (verdict.well, verdict.summary) == (False, line)


def test_the_worst_comes_first() -> None:
    def spoil(of: dict[str, Any]) -> None:
        for case in reversed(list(ILL)):
            if case not in ("rules that could not be compared", "rules that could not be read", "no sockets"):
                ILL[case][0](of)

    abouts = [each.about for each in judged(spoil, (*NODES, "node4")).findings]
    assert abouts[0] == "silent"
    assert abouts.index("rules") < abouts.index("path") < abouts.index("addresses")


def test_a_node_without_an_agent_is_named() -> None:
    verdict = judged(cluster=(*NODES, "node4"))
    assert verdict.summary.startswith("node4: no podwall agent runs on it")


def test_a_silent_agent_is_named_with_its_reason() -> None:
    healths: dict[str, Any] = {node: health(node) for node in NODES}
    healths["node3"] = Silent("the agent of node3 cannot be asked: forbidden")
    assert judge(healths, NODES).summary == "node3: the agent of node3 cannot be asked: forbidden"


def test_a_node_that_is_cut_off_is_the_only_finding() -> None:
    healths = {node: health(node) for node in NODES}
    for node, of in healths.items():
        for each in of["paths"]["paths"]:
            if "node2" in (node, each["node"]):
                each |= {"ok": False, "reason": "no answer", "ms": None}
    (finding,) = judge(healths, NODES).findings
    assert (finding.node, finding.about) == ("node2", "path")
    assert "it is cut off: no packet passes between its Pods and those of node1, node3" in finding.text


def test_where_nothing_passes_nobody_is_singled_out() -> None:
    healths = {node: health(node) for node in NODES}
    for of in healths.values():
        for each in of["paths"]["paths"]:
            each |= {"ok": False, "reason": "no answer", "ms": None}
    assert len(judge(healths, NODES).findings) == 6


REMARKED: Mapping[str, tuple[Spoil, str]] = {
    "rules put right": (
        set_in("status", "repairs", to={"last_hour": 2, "tables": ["inet podwall"]}),
        "node2: somebody changed podwall's rules 2 times in the last hour (inet podwall); "
        "they were put right",
    ),
    "a policy that cannot be used": (
        set_in(
            "status",
            "object_problems",
            to=[{"kind": "NetworkPolicy", "object": "a/b", "problem": "bad port"}],
        ),
        "NetworkPolicy a/b: bad port",
    ),
    "kube-proxy": (
        set_in("status", "services", to={"state": "off", "why": "kube-proxy's rules are there"}),
        "node2: podwall serves no Services: kube-proxy's rules are there",
    ),
    "no LoadBalancer addresses": (
        set_in("status", "load_balancer", to={"silent_because": "there is no uplink"}),
        "node2: it answers for no LoadBalancer address: there is no uplink",
    ),
    "a feature that nothing needs": (
        set_in("features", "features", to=[feature("VXLAN", there=False, matters=False)]),
        "node2: the kernel has no VXLAN; where that is needed: nothing works",
    ),
    "slow": (set_in("lag", to={"ms": 2500.0}), "node2: what the cluster has by now takes 2.5 s to be known"),
    "another version": (
        set_in("status", "version", to="0.2.0"),
        "the agents have different versions: 0.1.0, 0.2.0",
    ),
}


@pytest.mark.parametrize("case", REMARKED)
def test_what_makes_no_node_ill_is_remarked(case: str) -> None:
    spoil, remark = REMARKED[case]
    verdict = judged(spoil)
    assert verdict.well
    assert verdict.summary == "all 3 nodes are well; one remark"
    assert remark in verdict.remarks


def test_what_all_nodes_say_of_an_object_is_remarked_once() -> None:
    healths = {node: health(node) for node in NODES}
    for of in healths.values():
        of["status"]["object_problems"] = [{"kind": "Service", "object": "a/b", "problem": "bad"}]
        of["status"]["object_problems_total"] = 1
    assert judge(healths, NODES).remarks == ("Service a/b: bad",)


# What is printed


def text(of: Line) -> str:
    return of if isinstance(of, str) else of.text if isinstance(of, Coloured) else "".join(map(text, of))


def printed(healths: dict[str, Any], wide: bool = False) -> list[str]:
    return list(map(text, Found(healths, judge(healths, NODES)).lines(wide=wide)))


def test_a_table_has_every_node_also_the_silent_one() -> None:
    healths: dict[str, Any] = {node: health(node) for node in NODES}
    healths["node3"] = Silent("gone")
    lines = printed(healths)
    rows = [line.split() for line in lines[2:6]]
    assert rows[0][:3] == ["NODE", "STATE", "PODS"]
    assert [row[:2] for row in rows[1:]] == [["node1", "well"], ["node2", "well"], ["node3", "silent"]]
    assert "packets: 8 of 8 paths between nodes answer (direct), the slowest after 0.4 ms" in lines


def test_a_path_that_fails_shows_in_the_table() -> None:
    healths = {node: health(node) for node in NODES}
    fail_paths("no answer", 4)(healths["node2"])
    row = next(line for line in printed(healths) if line.startswith("node2 "))
    assert "3/4" in row
    assert "not well" in row


def test_a_person_is_not_told_hundreds_of_things() -> None:
    healths = {node: health(node) for node in NODES}
    problems = [{"kind": "Service", "object": f"a/{n}", "problem": "bad"} for n in range(100)]
    healths["node1"]["status"] |= {"object_problems": problems, "object_problems_total": 250}
    said = printed(healths)
    assert said[-1] == "  and 71 more: -o json has them all"
    found = Found(healths, judge(healths, NODES))
    assert len(found.to_json()["remarks"]) == 101
    assert found.to_json()["remarks"][-1] == "node1: and 150 more problems of objects"


def test_programs_get_everything() -> None:
    healths = {node: health(node) for node in NODES}
    content = Found(healths, judge(healths, NODES)).to_json()
    assert content["well"] is True
    assert [each["node"] for each in content["nodes"]] == list(NODES)
    assert content["nodes"][0]["rules"] == healths["node1"]["rules"]


def test_the_verdict_does_not_change_what_was_said() -> None:
    healths = {node: health(node) for node in NODES}
    before = copy.deepcopy(healths)
    judge(healths, NODES)
    assert healths == before


DURATIONS = {"90": 90.0, "90s": 90.0, "1.5m": 90.0, "1h": 3600.0}


@pytest.mark.parametrize("written", DURATIONS)
def test_durations(written: str) -> None:
    assert Duration().convert(written, None, None) == DURATIONS[written]


def test_what_is_no_duration_is_wrong_usage() -> None:
    with pytest.raises(click.UsageError, match="90s, 5m or 1h"):
        Duration().convert("soon", None, None)


# Where nobody can be asked


@pytest.mark.parametrize("command", [["status"], ["get", "pods"]])
def test_manifests_have_no_agents(command: list[str]) -> None:
    done = CliRunner().invoke(main, [*command, "-f", "examples/hello"])
    assert (done.exit_code, "No such option" in done.output) == (2, True)


@pytest.mark.parametrize("command", [["status"], ["status", "--wait", "--timeout", "1s"], ["get", "pods"]])
def test_an_api_server_that_is_not_there_is_told(command: list[str], tmp_path: Path) -> None:
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(
        "{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: "
        "{cluster: a, user: a}}], clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}], "
        "users: [{name: a, user: {}}]}"
    )
    done = CliRunner().invoke(main, [*command, "--kubeconfig", str(kubeconfig)])
    assert done.exit_code == 3, done.output
    assert "the API server cannot be asked" in done.output


@pytest.mark.parametrize(("not_ready", "status"), [([], 0), (["there is no uplink"], 1)])
def test_where_no_cluster_is_named_the_agent_of_this_machine_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_ready: list[str], status: int
) -> None:
    """As in an agent's Pod, where there is neither a kubeconfig nor a lab."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("lab.state._SETTINGS", tmp_path / "lab.json")
    monkeypatch.setattr("agent.cli.status.SOCKET", str(tmp_path / "agent.sock"))
    said = {**health("node1")["status"], "not_ready": not_ready, "paths": []}
    said["services"]["services"], said["services"]["problems"] = 0, {}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "agent.sock"))
        listening.listen()
        thread = threading.Thread(target=_answer_once, args=(listening, wire.Answer(said).encode()))
        thread.start()
        done = CliRunner().invoke(main, ["status"])
        thread.join(10)
    assert done.exit_code == status, done.output
    assert done.output.startswith("Node node1: not ready" if status else "Node node1: ready")


def _answer_once(listening: socket.socket, answer: bytes) -> None:
    listening.settimeout(10)
    connection, _ = listening.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


def test_where_nothing_is_there_at_all_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("lab.state._SETTINGS", tmp_path / "lab.json")
    monkeypatch.setattr("agent.cli.status.SOCKET", str(tmp_path / "agent.sock"))
    done = CliRunner().invoke(main, ["status"])
    assert (done.exit_code, "podwall lab up" in done.output) == (3, True)


class Older:
    """The line to an agent that knows the call `status` alone, and of it less."""

    def ask(self, call: str, body: Mapping[str, object]) -> Any:
        if call != "status":
            raise SilentError(f"no such call {call!r}")
        new = {"repairs", "watches", "policies"}
        return {name: value for name, value in health("node1")["status"].items() if name not in new}

    def close(self) -> None:
        """Nothing is held."""


def test_an_older_agent_is_told_apart_from_one_that_is_well() -> None:
    with Agents({"node1": Older}) as agents:
        found = Found.of_agents(agents, lambda: ("node1",))
    assert found.verdict.summary == "node1: its agent is older than this command, and proves nothing"
    assert any(line.startswith("node1") for line in map(text, found.lines(wide=True)))
