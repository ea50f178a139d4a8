"""What the agent keeps for those who ask on: each session ends when nobody has asked for it for a while.

keep(id, session)  --> kept for `expires_s`
get(id)            --> the session, kept for as long again
end(id), or nobody asks  --> close(), and nothing is kept of it

Who asks names the session, so that it can be ended by whoever went away before it was there.
"""

from __future__ import annotations

import asyncio
import re
from typing import Generic, Protocol, TypeVar

from agent.calls import Body
from cni import spec
from cni.spec import CniError

_ID = re.compile("[0-9a-f]{16}")


class Closing(Protocol):
    """What holds something until it is closed."""

    def close(self) -> None:
        """Give everything back."""


Session = TypeVar("Session", bound=Closing)


def chosen_id(body: Body) -> str:
    """The id that the caller chose for a session. Raises CniError."""
    name = str(body.get("id", ""))
    if not _ID.fullmatch(name):
        raise CniError(spec.INVALID_CONFIG, "a session is named by 16 hexadecimal digits")
    return name


class Sessions(Generic[Session]):
    """Sessions of one kind by their ids, at most so many at once."""

    def __init__(self, most: int, expires_s: float) -> None:
        self._most = most
        self._expires_s = expires_s
        self._kept: dict[str, tuple[Session, asyncio.TimerHandle]] = {}

    @property
    def full(self) -> bool:
        """Whether no more can be kept now."""
        return len(self._kept) >= self._most

    def keep(self, id_: str, session: Session) -> None:
        """Keep it from now on, under an id that no other has."""
        timer = asyncio.get_running_loop().call_later(self._expires_s, self.end, id_)
        self._kept[id_] = session, timer

    def get(self, id_: str) -> Session | None:
        """The session, which somebody asks for; None when it has ended."""
        if id_ not in self._kept:
            return None
        session, timer = self._kept[id_]
        timer.cancel()
        self.keep(id_, session)
        return session

    def end(self, id_: str) -> None:
        """Close it at once; one that has ended is no error."""
        if id_ in self._kept:
            session, timer = self._kept.pop(id_)
            timer.cancel()
            session.close()
