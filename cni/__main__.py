"""The CNI plugin: a container runtime starts it for each command, and it asks the agent.

    environment, stdin --checked--> agent's socket --> stdout, exit status

It decides nothing: it checks what it was given, opens the Pod's network namespace, hands the descriptor to
the agent and prints what the agent answers. 50 of them may start at once on a small node, so it uses only
what is compiled into the interpreter: `posix` and `_socket` rather than `os` and `socket`.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import json
import posix
import sys

from cni import spec, wire

NS_GET_NSTYPE = 0xB703  # linux/nsfs.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
OWN_NETNS = "/proc/self/ns/net"
STDIN, STDOUT = 0, 1
CHUNK = 65536
REFUSED = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR)
BROKEN_OFF = (errno.EPIPE, errno.ECONNRESET)


def main() -> int:
    """Run the command that the environment asks for; return the exit status."""
    command = posix.environ.get(b"CNI_COMMAND", b"").decode(errors="replace")
    config = None
    try:
        if command in spec.COMMANDS:
            config = _config(command)  # first, for the version of an error
        given = spec.parameters(_environment())
        if command == spec.VERSION:
            _print(spec.version_answer(config))
            return 0
        result = _ask(spec.request(given, config))
    except spec.CniError as error:
        return _fail(command, config, error)
    except Exception as error:  # the runtime must get an error object whatever happens
        return _fail(
            command, config, spec.CniError(spec.FAILED, "podwall failed", f"{type(error).__name__}: {error}")
        )
    if result is not None:
        _print(result)
    return 0


def _environment() -> dict[str, str]:
    environment = {}
    for name, value in posix.environ.items():
        if name.startswith(b"CNI_"):
            try:
                environment[name.decode()] = value.decode()
            except UnicodeDecodeError as cause:
                text = name.decode(errors="replace")
                raise spec.CniError(spec.INVALID_ENVIRONMENT, f"{text} is not UTF-8") from cause
    return environment


def _config(command: str) -> object:
    data = _stdin()
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as cause:
        if command == spec.VERSION:  # needs none
            return None
        raise spec.CniError(
            spec.DECODING_FAILURE, "the network configuration on stdin is not JSON", str(cause)
        ) from cause


def _stdin() -> bytes:
    data = b""
    while len(data) <= wire.LIMIT:
        try:
            piece = posix.read(STDIN, CHUNK)
        except OSError as cause:
            raise spec.CniError(
                spec.IO_FAILURE, "the network configuration cannot be read from stdin", str(cause)
            ) from cause
        if not piece:
            return data
        data += piece
    raise spec.CniError(spec.IO_FAILURE, f"the network configuration is longer than {wire.LIMIT} bytes")


def _ask(request: spec.Request) -> object:
    """Return what ADD prints, None for the other commands. Raises CniError."""
    netns = _open_netns(request)
    body = request.body()
    if netns is None:
        body["netns"] = ""
    answer = _exchange(request, wire.Request(f"cni.{request.command}", body), netns)
    if isinstance(answer, wire.Failure):
        raise spec.CniError(answer.code, answer.msg, answer.details)
    if request.command != spec.ADD:
        return None
    if not isinstance(answer.ok, dict) or answer.ok.get("cniVersion") != request.cni_version:
        raise spec.CniError(spec.FAILED, f"the agent's result is not one of CNI {request.cni_version}")
    return answer.ok


def _open_netns(request: spec.Request) -> int | None:
    """Return a descriptor of the Pod's namespace; None where there is none, which only DEL may go on with."""
    if not request.netns:
        return None
    try:
        return _checked_netns(request.netns)
    except OSError as cause:
        if request.command == spec.DEL:  # the namespace is gone: the agent knows what was in it
            return None
        raise spec.CniError(
            spec.INVALID_ENVIRONMENT, f"CNI_NETNS {request.netns} cannot be opened", str(cause)
        ) from cause


def _checked_netns(path: str) -> int:
    # O_NONBLOCK: a FIFO must not hold us
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY)
    try:
        kind = fcntl.ioctl(descriptor, NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != CLONE_NEWNET:
        posix.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a network namespace")
    if _is_own(descriptor):
        posix.close(descriptor)
        raise OSError(errno.EINVAL, "it is the node's own network namespace")
    return descriptor


def _is_own(descriptor: int) -> bool:
    try:
        own = posix.stat(OWN_NETNS)
    except OSError:  # no /proc here; the agent compares too
        return False
    other = posix.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino)


def _exchange(request: spec.Request, message: wire.Request, netns: int | None) -> wire.Answer | wire.Failure:
    """Return the agent's answer. Raises CniError."""
    unavailable = spec.NOT_AVAILABLE if request.command == spec.STATUS else spec.TRY_AGAIN_LATER
    unusable = spec.NOT_AVAILABLE if request.command == spec.STATUS else spec.FAILED
    deadline = _now() + request.timeout
    try:
        frame = message.encode()
        connection = _connect(request.socket, deadline)
        _send(connection, frame, netns)
        return wire.decode_answer(_receive(connection, deadline))
    except wire.WireError as cause:
        raise spec.CniError(
            unusable, "the message to or from the agent cannot be used", str(cause)
        ) from cause
    except EOFError as cause:
        raise spec.CniError(unavailable, "the agent ended before it answered", request.socket) from cause
    except OSError as cause:
        msg, details = _unreachable(cause, request)
        raise spec.CniError(unavailable, msg, details) from cause


def _unreachable(cause: OSError, request: spec.Request) -> tuple[str, str]:
    if cause.errno in REFUSED:
        return f"the agent does not listen on {request.socket}", "podwall-agent must run on this node"
    if cause.errno == errno.EAGAIN:
        return f"the agent did not answer within {request.timeout} s", request.socket
    return f"the agent cannot be asked on {request.socket}", str(cause)


def _now() -> float:
    """Return seconds of a clock that only goes forward; `time` would read the time zone for it."""
    return posix.times().elapsed


def _connect(path: str, deadline: float) -> _socket.socket:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    _limit(connection, deadline)
    connection.connect(path)
    return connection


def _limit(connection: _socket.socket, deadline: float) -> None:
    """Let every call on the connection end at the deadline with EAGAIN, connect() on a full backlog too."""
    left = max(int((deadline - _now()) * 1_000_000), 1)
    long = 8 if sys.maxsize > 1 << 32 else 4
    timeval = b"".join(part.to_bytes(long, sys.byteorder) for part in divmod(left, 1_000_000))
    for option in (_socket.SO_SNDTIMEO, _socket.SO_RCVTIMEO):
        connection.setsockopt(_socket.SOL_SOCKET, option, timeval)


def _send(connection: _socket.socket, frame: bytes, netns: int | None) -> None:
    ancillary = []
    if netns is not None:
        ancillary.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, netns.to_bytes(4, sys.byteorder)))
    try:
        sent = connection.sendmsg([frame], ancillary, _socket.MSG_NOSIGNAL)
        while sent < len(frame):
            sent += connection.send(frame[sent:], _socket.MSG_NOSIGNAL)
    except OSError as error:
        if error.errno not in BROKEN_OFF:  # an agent that refuses early has still answered
            raise


def _receive(connection: _socket.socket, deadline: float) -> bytes:
    receiver = wire.Receiver()
    while True:
        try:
            data = connection.recv(CHUNK)
        except OSError as error:
            if error.errno not in BROKEN_OFF:
                raise
            data = b""
        if not data:
            raise EOFError
        payload = receiver.receive(data)
        if payload is not None:
            return payload
        _limit(connection, deadline)


def _fail(command: str, config: object, error: spec.CniError) -> int:
    if command == spec.DEL:
        error = spec.CniError(
            error.code, spec.worded_for_delete(error.msg), spec.worded_for_delete(error.details)
        )
    _print(error.to_json(spec.error_version(config)))
    return 1


def _print(answer: object) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[posix.write(STDOUT, data) :]


if __name__ == "__main__":
    posix._exit(main())  # nothing is buffered, and taking the interpreter down would cost a millisecond
