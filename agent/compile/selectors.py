"""Label selectors: what matches, and which of many selectors match, without trying them all.

    Selector.matches(labels)                   one selector, one object
    SelectorIndex.matching(scopes, labels)     many selectors, one object: a Pod's labels changed

A selector that asks for `app` to be `web` can only match an object that has this label, so the index files
it under (`app`, `web`), its anchor.  An object is shown to the selectors filed under its own labels, and to
the few without an anchor (those that exclude, or select everything).  A selector counts within a scope: a
namespace, or the namespaces that another selector matches.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

from agent.cluster.model import Labels, LabelSelector, Requirement

MOST_ANCHORS = 16  # of a selector `In` with more values: all objects that have the key are shown to it

Anchor: TypeAlias = tuple[str, str | None] | None
M = TypeVar("M", bound=Hashable)


class Selector:
    """A label selector in one form: `matchLabels: {a: b}` and `a In [b]` are equal."""

    __slots__ = ("_hash", "_tests", "requirements")

    def __init__(self, selector: LabelSelector) -> None:
        labels = {Requirement(key, "In", (value,)) for key, value in selector.match_labels}
        each = labels | set(selector.match_expressions)
        self.requirements = tuple(sorted(each, key=lambda of: (of.key, of.operator, of.values)))
        self._tests = tuple((of.key, of.operator, frozenset(of.values)) for of in self.requirements)
        self._hash = hash(self.requirements)

    def matches(self, labels: Labels) -> bool:
        """Whether all requirements hold; NotIn and DoesNotExist hold for an object without the key."""
        for key, operator, values in self._tests:
            value = labels.get(key)
            if operator == "In":
                holds = value in values
            elif operator == "NotIn":
                holds = value is None or value not in values
            else:
                holds = (value is not None) is (operator == "Exists")
            if not holds:
                return False
        return True

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """Labels of which every object that matches has at least one; (None,) when there are none."""
        best: tuple[Anchor, ...] = (None,)
        for key, operator, values in self._tests:
            if operator == "In" and len(values) <= MOST_ANCHORS:
                if best[0] is None or best[0][1] is None or len(values) < len(best):
                    best = tuple((key, value) for value in sorted(values))
            elif operator in {"In", "Exists"} and best[0] is None:
                best = ((key, None),)
        return best

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selector) and self.requirements == other.requirements

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return ",".join(map(_text, self.requirements)) or "*"

    def __repr__(self) -> str:
        return f"Selector({self})"


def _text(of: Requirement) -> str:
    """A requirement as kubectl writes it."""
    values = ",".join(of.values)
    if of.operator == "In":
        return f"{of.key}={values}" if len(of.values) == 1 else f"{of.key} in ({values})"
    return {"NotIn": f"{of.key} notin ({values})", "Exists": of.key}.get(of.operator, f"!{of.key}")


def anchors_of(labels: Labels) -> Iterator[Anchor]:
    """All anchors under which a selector that matches these labels may be filed."""
    yield None
    for key, value in labels.items():
        yield key, value
        yield key, None


class SelectorIndex(Generic[M]):
    """Members by their scope and selector; finding those that match costs the labels, not the members."""

    def __init__(self) -> None:
        self._entries: dict[M, tuple[Hashable, Selector]] = {}
        self._filed: dict[Hashable, dict[Anchor, set[M]]] = {}

    def add(self, member: M, scope: Hashable, selector: Selector) -> None:
        """File a member, in the place of what it was filed under before."""
        self.discard(member)
        self._entries[member] = scope, selector
        filed = self._filed.setdefault(scope, {})
        for anchor in selector.anchors:
            filed.setdefault(anchor, set()).add(member)

    def discard(self, member: M) -> None:
        """Forget a member."""
        if member not in self._entries:
            return
        scope, selector = self._entries.pop(member)
        filed = self._filed[scope]
        for anchor in selector.anchors:
            filed[anchor].discard(member)
            if not filed[anchor]:
                del filed[anchor]
        if not filed:
            del self._filed[scope]

    def matching(self, scopes: Iterable[Hashable], labels: Labels) -> set[M]:
        """The members of these scopes whose selectors match these labels."""
        found: set[M] = set()
        for scope in scopes:
            filed = self._filed.get(scope)
            if filed is not None:
                for anchor in anchors_of(labels):
                    for member in filed.get(anchor, ()):
                        if self._entries[member][1].matches(labels):
                            found.add(member)
        return found
