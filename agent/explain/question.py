"""What is asked: who wants to reach whom, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from agent.cluster.model import Family, IPAddress, Protocol
from agent.explain.world import End


class CannotAnswerError(Exception):
    """The question has no answer as it is asked; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """port: a number, or a name that the target's ports have; None: the only one it has.

    family: None is the first that both ends have. address: the target's, when it was asked for by one.
    by_name: the client looks the target's name up first. via: the node where a packet from outside comes in,
    "" when nobody knows.
    """

    source: End
    target: End
    port: int | str | None = None
    protocol: Protocol = "TCP"
    family: Family | None = None
    address: IPAddress | None = None
    by_name: bool = False
    via: str = ""
