"""A program in a container, its standard input and output as lines: what `kubectl exec -i` does.

our request --> API server, switched to WebSocket (v4.channel.k8s.io) --> kubelet --> container
each message begins with the channel's number: 0 input, 1 output, 2 errors, 3 how it ended
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import websocket

from .client import ApiClient
from .errors import BY_STATUS, ApiError, Refused, Unreachable

PROTOCOL = "v4.channel.k8s.io"
INPUT, OUTPUT, ERRORS, ENDED = range(4)


class Execution:
    """A running program; used by one thread. Raises ApiError from the beginning on."""

    def __init__(
        self,
        client: ApiClient,
        namespace: str,
        pod: str,
        *,
        container: str,
        command: Sequence[str],
        limit_s: float,
    ) -> None:
        query = [("container", container), *(("command", word) for word in command)]
        query += [("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        target = f"/api/v1/namespaces/{namespace}/pods/{pod}/exec?{urlencode(query)}"
        self._rest, self._said = b"", b""
        connection = client.connection()
        credentials = connection.credentials
        header = [f"Authorization: {credentials.authorization}"] if credentials.authorization else []
        try:
            self._socket = websocket.create_connection(
                credentials.server.replace("http", "ws", 1).rstrip("/") + target,
                socket=connection.opened(),
                header=header,
                subprotocols=[PROTOCOL],
                timeout=limit_s,
                suppress_origin=True,
            )
        except websocket.WebSocketBadStatusException as error:
            connection.close()
            raise _refused(error) from error
        except (OSError, websocket.WebSocketException) as error:
            connection.close()
            raise Unreachable(f"API server {credentials.server}: {error}") from error

    def write(self, line: str) -> None:
        """Send a line to its standard input. Raises Unreachable."""
        try:
            self._socket.send_binary(bytes([INPUT]) + line.encode() + b"\n")
        except (OSError, websocket.WebSocketException) as error:
            raise Unreachable(f"the program cannot be written to: {error}") from error

    def read_line(self) -> str:
        """The next line of its standard output. Raises ApiError when there is none in time."""
        while b"\n" not in self._rest:
            self._receive()
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode(errors="replace")

    def _receive(self) -> None:
        try:
            message = self._socket.recv()
        except websocket.WebSocketTimeoutException as error:
            raise Unreachable("the program says nothing in time") from error
        except (OSError, websocket.WebSocketException) as error:
            raise Unreachable(f"the program cannot be read from: {error}") from error
        data = message.encode() if isinstance(message, str) else message
        if not data:
            raise Unreachable(f"the program ended: {self._said.decode(errors='replace').strip()}")
        channel, content = data[0], data[1:]
        if channel == OUTPUT:
            self._rest += content
        elif channel == ERRORS:
            self._said += content
        elif channel == ENDED:
            raise Refused(_why(content, self._said))

    def close(self) -> None:
        """End it: its standard input ends."""
        self._socket.close(timeout=1)


def _refused(error: websocket.WebSocketBadStatusException) -> ApiError:
    status = error.status_code or 0
    try:
        message = json.loads(error.resp_body or b"{}").get("message", str(error))
    except ValueError:
        message = str(error)
    return BY_STATUS.get(status, Refused)(message, status)


def _why(content: bytes, said: bytes) -> str:
    try:
        status: dict[str, Any] = json.loads(content)
    except ValueError:
        status = {}
    words = said.decode(errors="replace").strip()
    return f"the program ended: {words or status.get('message') or 'without a word'}"
