"""Asks a node's agent over its socket, and waits for the answer."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import click

from cni import wire

LIMIT_S = 10.0
CANNOT_REACH = 3


class Unreachable(click.ClickException):
    """No answer came; the exit status is 3."""

    exit_code = CANNOT_REACH


def ask(path: Path, call: str, body: Mapping[str, object]) -> object:
    """Return the answer to one call. Raises Unreachable, or ClickException with the agent's own words."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(LIMIT_S)
            connection.connect(str(path))
            connection.sendall(wire.Request(call, body).encode())
            answer = wire.decode_answer(_receive(connection))
    except (OSError, wire.WireError) as error:
        raise Unreachable(
            f"the agent does not answer on {path}: {error}; is it running on this node, and are you root?"
        ) from error
    if isinstance(answer, wire.Failure):
        raise click.ClickException(answer.msg)
    return answer.ok


def _receive(connection: socket.socket) -> bytes:
    receiver = wire.Receiver()
    while data := connection.recv(1 << 16):
        payload = receiver.receive(data)
        if payload is not None:
            return payload
    raise wire.WireError("the connection ended before the answer")
