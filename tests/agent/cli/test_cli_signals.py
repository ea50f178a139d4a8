"""Signals that commands handle: they end a command as Ctrl-C does, and are handled as before afterwards."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from agent.cli.signals import handled, interrupt


def test_a_signal_interrupts_and_is_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), handled(signal.SIGTERM, by=interrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_leaves_no_handler_behind(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(main, ["trace", "web", "db:80", "--kubeconfig", str(tmp_path / "none")])
    assert done.exit_code != 0
    assert signal.getsignal(signal.SIGTERM) is before
