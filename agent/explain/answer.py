"""An answer to `podwall why`: one sentence, the steps of the way, and what would change it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agent.explain.fields import Field
from agent.explain.legs import Leg
from agent.explain.remedy import Change
from agent.explain.route import Target

Stage = Literal["name", "dns", "service", "masquerade", "egress", "ingress", "audit"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the way; `ok` is whether the packet comes past it, None when nothing is decided there.

    fields: what in the objects decides it.
    """

    stage: Stage
    ok: bool | None
    text: str
    fields: tuple[Field, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the connection can be made; `cause` is a word for what decides, `changes` would allow it.

    denial: who denies it, without why. targets: where it may end, and whether it is let in there. legs: what
    the rules of the nodes on its way have to do with it.
    """

    allowed: bool
    cause: str
    sentence: str
    steps: tuple[Step, ...] = ()
    changes: tuple[Change, ...] = ()
    legs: tuple[Leg, ...] = ()
    targets: tuple[tuple[Target, bool], ...] = ()
    denial: str = ""
