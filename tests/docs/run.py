"""Runs a page's commands as a reader types them: one after the other in one shell, from the checkout.

A comment says with which status a command ends that is meant to fail: "podwall why ...   # denied: status 1".
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping

from tests.docs.blocks import ROOT, Block, as_said

LIMIT_S = 600.0
_STATUS = re.compile(r"#.*\bstatus (\d+)")
_END = "--- end of command"


def follow(blocks: Iterable[Block], environment: Mapping[str, str] | None = None) -> None:
    """Type all commands; AssertionError for the first that ends or prints otherwise than the page says."""
    chosen = list(blocks)
    typed = [(block, command) for block in chosen for command in block.commands]
    script = "\n".join(f"{command.text}\nprintf '\\n{_END} %d\\n' $?" for _, command in typed)
    given = {**os.environ, **(environment or {})}
    done = subprocess.run(
        ["bash"],
        check=False,
        cwd=ROOT,
        env={**given, "PATH": f"{ROOT / '.venv' / 'bin'}:{given['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        input=script,
        timeout=LIMIT_S,
    )
    answers = re.split(rf"\n{_END} (\d+)\n", done.stdout)
    for (block, command), printed, status in zip(typed, answers[::2], answers[1::2], strict=False):
        said = f"{block.place}: {command.text}\n{printed}"
        meant = _STATUS.search(command.text)
        assert int(status) == int(meant[1] if meant else 0), f"status {status} of {said}"
        if command.printed:
            assert as_said(printed, command.printed), f"not as the page says: {said}"
    assert len(answers) // 2 == len(typed), f"the shell ended early: {done.stdout[-2000:]}"
