"""An agent is replaced by one of another version, whose rules are made otherwise: no flow notices.

    this version's rules --SIGTERM, start--> another's --SIGTERM, start--> this version's    under traffic

The other version is a copy of the sources in which sets, chains and comments have other names, so that each
rule that looks something up is another, and everything has to be replaced at once.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import agents, manifests
from lab.agents import Agent
from lab.world import Lab
from tests.agent.test_agent_killed import (
    DENIED,
    PAIRS,
    POLICIES,
    STAY,
    elements,
    pod,
    process,
    rules,
    run,
    signal_and_wait,
)
from tests.agent.traffic import steady

SOURCES = Path(__file__).parents[2]
OTHERWISE = {
    "agent/compile/links.py": {
        '"pod_links4"': '"was_links4"',
        '"pod_links6"': '"was_links6"',
        '"to_link"': '"was_to_link"',
        "is not of this link": "was not of this link",
    },
    "agent/compile/verdicts.py": {
        '"isolated4"': '"was_isolated4"',
        '"isolated6"': '"was_isolated6"',
        '"policy_forward"': '"was_forward"',
    },
}
"""What is written otherwise in the other version, by file; `was` is in nothing of this one."""


@pytest.fixture
def other_version(tmp_path: Path) -> Path:
    for package in ("agent", "cni"):
        shutil.copytree(
            SOURCES / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "tests")
        )
    for name, words in OTHERWISE.items():
        text = (tmp_path / name).read_text()
        for this, other in words.items():
            assert this in text, f"{name} has no {this} any more"
            text = text.replace(this, other)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def lab() -> Iterator[Lab]:
    given = [pod(name, node, "other" if name == "stranger" else "friend") for name, node in STAY.items()]
    with Lab(nodes=2, given=[*given, *manifests.parse(POLICIES, "test")]) as made:
        yield made


def replace(agent: Agent, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End an agent as a DaemonSet does, and start the one whose sources lie there."""
    signal_and_wait(process(agent), signal.SIGTERM)
    arguments = Agent._arguments(agent)
    monkeypatch.setattr(agent, "_arguments", lambda: ["env", "--chdir", str(sources), *arguments])
    agent.start()
    agents.wait_until_ready([agent])


def test_another_version_takes_over_under_traffic(
    lab: Lab, other_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {node: (rules(lab, node), elements(lab, node)) for node in lab.agents}
    with steady(lab, PAIRS, DENIED):
        for agent in lab.agents.values():
            replace(agent, other_version, monkeypatch)
    for node in lab.agents:
        there = run(lab, node, "nft", "list", "ruleset")
        assert all(word in there for word in ("was_links4", "was_isolated6", "was_forward", "was not of"))
        assert '"pod_links4"' not in there
    with steady(lab, PAIRS, DENIED):
        for agent in lab.agents.values():
            replace(agent, SOURCES, monkeypatch)
    assert {node: (rules(lab, node), elements(lab, node)) for node in lab.agents} == before
