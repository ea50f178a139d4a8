"""Connections one after another from one place, while a test does something; who answered each, and when."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from lab import netns
from lab.limits import SLOWNESS
from lab.names import Address


@dataclass(frozen=True, slots=True)
class Try:
    """One connection: when it began and ended, which Pod answered, or why none did."""

    began: float
    ended: float
    pod: str = ""
    error: str = ""


class Load:
    """Connects again and again until it is left, seconds of pause after each; gives up one after patience."""

    def __init__(
        self, where: Path, address: Address, port: int, *, pause: float = 0.005, patience: float = 5.0
    ) -> None:
        self._where = where
        self._target = (str(address), port)
        self._family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self._pause = pause
        self._patience = patience
        self._ending = Event()
        self._tries: list[Try] = []
        self._thread = Thread(target=self._run, name="podwall-load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def tries(self) -> Sequence[Try]:
        """All that have ended, in order."""
        return tuple(self._tries)

    @property
    def failed(self) -> list[Try]:
        """Those that nobody answered."""
        return [each for each in self.tries if each.error]

    def wait_for(self, more: int, seconds: float = 10.0) -> None:
        """Wait until so many more have ended."""
        wanted, deadline = len(self._tries) + more, time.monotonic() + seconds * SLOWNESS
        while len(self._tries) < wanted:
            assert time.monotonic() < deadline, f"{len(self._tries)} of {wanted}: {self._tries[-3:]}"
            self._ending.wait(self._pause)

    def _run(self) -> None:
        netns.enter(self._where)
        while not self._ending.wait(self._pause):
            began = time.monotonic()
            try:
                pod = self._connect()
                self._tries.append(Try(began, time.monotonic(), pod=pod))
            except OSError as error:
                self._tries.append(Try(began, time.monotonic(), error=str(error)))

    def _connect(self) -> str:
        with socket.socket(self._family, socket.SOCK_STREAM) as connection:
            connection.settimeout(self._patience)
            connection.connect(self._target)
            connection.sendall(b"name\n")
            if not (answer := connection.recv(4096)):
                raise ConnectionResetError("closed without an answer")
            return answer.decode().strip()


class Datagrams:
    """One UDP flow: the same two ports again and again, a question at a time."""

    def __init__(self, where: Path, address: Address, port: int) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self._socket = netns.run(where, socket.socket, family, socket.SOCK_DGRAM)
        self._socket.connect((str(address), port))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, seconds: float = 1.0) -> str:
        """Who answers now; "refused" or "silent" when nobody does."""
        self._socket.settimeout(seconds)
        try:
            self._socket.send(b"name\n")
            return self._socket.recv(4096).decode().strip()
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silent"
