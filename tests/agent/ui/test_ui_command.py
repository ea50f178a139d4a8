"""`podwall ui` as a program: it says where it is, answers there, and ends when it is told to."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples" / "policies"
LIMIT_S = 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_it_ends_cleanly_and_lets_go_of_its_port(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "agent.cli.main", "ui", "-f", str(EXAMPLES), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)", said)
        assert found, said
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=LIMIT_S)
        connection.request("GET", "/api/state", headers={"Authorization": f"Bearer {found[2]}"})
        state = json.load(connection.getresponse())
        connection.close()
        assert state["live"] is False
        assert str(EXAMPLES) in state["where"]
        process.send_signal(number)
        try:
            _, complaints = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
        assert (process.returncode, complaints) == (0, "Ctrl-C ends it.\nended\n")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(found[1])))


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "agent.cli.main", "ui", "-f", str(EXAMPLES), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in done.stderr
