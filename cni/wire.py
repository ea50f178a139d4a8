"""The message on the agent's socket: what the CNI binary and the command ask, and what the agent answers.

A connection carries one request and one answer, each framed alike:

    +----------------+---------------------------+
    | length, 4 bytes| UTF-8 JSON object         |      length: big-endian, 1 to 1,048,576
    +----------------+---------------------------+

    request  {"call": "cni.ADD", "body": {...}}
    answer   {"ok": ...}   or   {"error": {"code": 11, "msg": "...", "details": "..."}}

Descriptors (a Pod's network namespace) come by SCM_RIGHTS with the first bytes of the request. This module
is pure: bytes in, messages out. The blocking binary and the agent's event loop both feed it what they read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

TYPE_CHECKING = False  # importing `typing` would cost the binary more than the rest of its start
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = "/run/podwall/agent.sock"
HEADER = 4
LIMIT = 1 << 20
DESCRIPTORS = 4
"""How many descriptors a receiver must make room for."""


class WireError(ValueError):
    """What came over the socket is not a message."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call to the agent: a dotted name such as `cni.ADD` and its arguments."""

    call: str
    body: Mapping[str, object]

    def encode(self) -> bytes:
        """Return the framed message. Raises WireError when it is too long."""
        return frame({"call": self.call, "body": self.body})


@dataclass(frozen=True, slots=True)
class Answer:
    """The agent did what was asked; `ok` is the call's result, any JSON value."""

    ok: object = None

    def encode(self) -> bytes:
        """Return the framed message. Raises WireError when it is too long."""
        return frame({"ok": self.ok})


@dataclass(frozen=True, slots=True)
class Failure:
    """The agent did not; the fields are those of the CNI error object."""

    code: int
    msg: str
    details: str = ""

    def encode(self) -> bytes:
        """Return the framed message. Raises WireError when it is too long."""
        return frame({"error": {"code": self.code, "msg": self.msg, "details": self.details}})


class Receiver:
    """Collects one message from pieces of any size."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = b""

    @property
    def started(self) -> bool:
        """Whether any byte has come: tells a connection that was never used from one that broke off."""
        return bool(self._data)

    def receive(self, data: bytes) -> bytes | None:
        """Take what was read; return the payload once it is whole, else None.

        Raises WireError for a length outside the limits and for bytes behind the message.
        """
        self._data += data
        if len(self._data) < HEADER:
            return None
        end = HEADER + length(self._data[:HEADER])
        if len(self._data) > end:
            raise WireError(f"{len(self._data) - end} bytes follow the message")
        return self._data[HEADER:] if len(self._data) == end else None


def frame(message: object) -> bytes:
    """Return a JSON value as a framed message. Raises WireError when it is too long or no JSON."""
    try:
        payload = json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as cause:
        raise WireError(f"the message cannot be written as JSON: {cause}") from cause
    if len(payload) > LIMIT:
        raise WireError(f"a message of {len(payload)} bytes is longer than {LIMIT}")
    return len(payload).to_bytes(HEADER, "big") + payload


def length(header: bytes) -> int:
    """Return how many bytes follow a header of four bytes. Raises WireError outside 1 to LIMIT."""
    size = int.from_bytes(header, "big")
    if not 1 <= size <= LIMIT:
        raise WireError(f"the message's length {size} is not between 1 and {LIMIT}")
    return size


def decode_request(payload: bytes) -> Request:
    """Return the request in a payload. Raises WireError naming what is wrong."""
    message = _object(payload)
    call, body = message.get("call"), message.get("body")
    if not isinstance(call, str) or not call:
        raise WireError("the request's call is not a name")
    if not isinstance(body, dict):
        raise WireError("the request's body is not an object")
    return Request(call, body)


def decode_answer(payload: bytes) -> Answer | Failure:
    """Return the answer in a payload. Raises WireError naming what is wrong."""
    message = _object(payload)
    if "error" not in message:
        if "ok" not in message:
            raise WireError("the answer holds neither ok nor error")
        return Answer(message["ok"])
    error = message["error"]
    if not isinstance(error, dict):
        raise WireError("the answer's error is not an object")
    code, msg, details = error.get("code"), error.get("msg"), error.get("details", "")
    if not isinstance(code, int) or isinstance(code, bool) or code <= 0:
        raise WireError("the answer's error code is not a positive number")
    if not isinstance(msg, str) or not isinstance(details, str):
        raise WireError("the answer's error msg and details are not strings")
    return Failure(code, msg, details)


def _object(payload: bytes) -> dict[str, object]:
    try:
        message = json.loads(payload.decode())
    except (ValueError, RecursionError) as cause:
        raise WireError(f"the message is not UTF-8 JSON: {cause}") from cause
    if not isinstance(message, dict):
        raise WireError("the message is not a JSON object")
    return message
