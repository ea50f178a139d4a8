"""What the cluster's builder says and runs: progress lines, programs with a time limit, and waits that say
what for."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
STARTED = time.monotonic()
TAIL_LINES = 30
ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
"""Words before a command: when this process is killed, so is the command."""
_line = threading.Lock()


class ClusterError(Exception):
    """A step could not be done; the message names it and what to do."""


def say(text: str) -> None:
    """Print one progress line with the seconds since the start, to standard error."""
    with _line:
        print(f"{time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def status_of(main: Callable[[list[str]], int]) -> int:
    """Carry out this program's words; its exit status, of which a failure is said in one line.

    SIGTERM ends it as an interruption does, with everything put away.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return main(sys.argv[1:])
    except ClusterError as error:
        say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say that a step begins, and how long it took."""
    say(f"{text} ...")
    begun = time.monotonic()
    yield
    say(f"{text}: done in {time.monotonic() - begun:.1f} s")


def run(
    argv: Sequence[str | Path],
    *,
    limit: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | Path | None = None,
) -> str:
    """Run a program and return its standard output; raise `ClusterError` with its words when it fails or
    lasts too long.

    `limit` is in seconds; the program and its children are ended when it is over. `env` is added to the
    environment.
    """
    environment = {**os.environ, **(env or {})}
    if not shutil.which(argv[0], path=environment["PATH"]):
        raise ClusterError(f"{argv[0]}: there is no such program")
    source = stdin.open("rb") if isinstance(stdin, Path) else None
    process = subprocess.Popen(
        [*ENDS_WITH_US, *map(str, argv)],
        stdin=source or (subprocess.PIPE if isinstance(stdin, bytes) else subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=cwd,
        process_group=0,
    )
    try:
        out, err = process.communicate(stdin if isinstance(stdin, bytes) else None, timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ClusterError(f"{shlex.join(map(str, argv))}: not finished after {limit:.0f} s") from error
        raise
    finally:
        if source:
            source.close()
    if process.returncode:
        words = (err + out).decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
        command = shlex.join(map(str, argv))
        raise ClusterError(f"{command[:300]}: exit {process.returncode}\n" + "\n".join(words))
    return out.decode(errors="replace")


def leave_running(argv: Sequence[str | Path], log: Path, cwd: Path | None = None) -> None:
    """Start a program that outlives this one, in a session of its own, its words going to a file."""
    with log.open("wb") as file:
        words = ["setsid", "--fork", *map(str, argv)]
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=cwd, check=True)


def succeeds(argv: Sequence[str | Path], *, limit: float = 20, env: Mapping[str, str] | None = None) -> bool:
    """Say whether a program ends well within the limit."""
    try:
        run(argv, limit=limit, env=env)
    except (ClusterError, OSError):
        return False
    return True


def wait_for(what: str, look: Callable[[], T], *, limit: float, every: float = 0.2) -> T:
    """Look until the answer is true and return it; raise `ClusterError` naming what was awaited after `limit`
    seconds."""
    begun = time.monotonic()
    said = begun + 3
    while not (answer := look()):
        now = time.monotonic()
        if now - begun > limit:
            raise ClusterError(f"waited {limit:.0f} s in vain for {what}")
        if now > said:
            say(f"waiting for {what} ({now - begun:.0f} of at most {limit:.0f} s)")
            said = now + 10
        time.sleep(every)
    return answer
