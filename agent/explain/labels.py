"""Label selectors as kubectl takes them with -l. Pure.

app=web   app==web   app!=web   tier in (a,b)   tier notin (a,b)   tier   !tier, joined by commas
"""

from __future__ import annotations

import re

from agent.cluster.model import LabelSelector, Requirement
from agent.compile.selectors import Selector

_KEY = r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?"
_VALUE = r"[A-Za-z0-9._-]*"
_PARTS = re.compile(r",(?![^(]*\))")
_TERM = re.compile(
    rf"(?P<not>!)?\s*(?P<key>{_KEY})\s*"
    rf"(?:(?P<equals>==?|!=)\s*(?P<value>{_VALUE})|\s(?P<among>in|notin)\s*\((?P<values>[^()]*)\))?"
)


class SelectorError(ValueError):
    """The text is no label selector; the message says which part."""


def selector(text: str) -> Selector:
    """What a text selects; the empty text everything. Raises SelectorError."""
    terms = [_term(each.strip()) for each in _PARTS.split(text)] if text.strip() else []
    return Selector(LabelSelector(match_expressions=tuple(terms)))


def _term(text: str) -> Requirement:
    found = _TERM.fullmatch(text)
    if found is None or (found["not"] and (found["equals"] or found["among"])):
        raise SelectorError(f"{text!r} is no label: write app=web, app!=web, app in (a,b), app or !app")
    key = found["key"]
    if found["among"]:
        values = tuple(sorted({each.strip() for each in found["values"].split(",")}))
        return Requirement(key, "In" if found["among"] == "in" else "NotIn", values)
    if found["equals"]:
        return Requirement(key, "NotIn" if found["equals"] == "!=" else "In", (found["value"],))
    return Requirement(key, "DoesNotExist" if found["not"] else "Exists")
