"""Uninstalling waits for the agent's end: it would repair what is removed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from agent.main import claim
from agent.uninstall import await_agent


def test_it_waits_until_the_agent_has_ended(tmp_path: Path) -> None:
    agent = claim(tmp_path)
    threading.Timer(0.3, os.close, (agent,)).start()
    held = await_agent(tmp_path, limit_s=10)
    assert held is not None
    os.close(held)


def test_an_agent_that_stays_is_told(tmp_path: Path) -> None:
    agent = claim(tmp_path)
    with pytest.raises(TimeoutError, match="an agent still runs on this node"):
        await_agent(tmp_path, limit_s=0.2)
    os.close(agent)


def test_there_was_never_one(tmp_path: Path) -> None:
    assert await_agent(tmp_path / "nothing") is None
