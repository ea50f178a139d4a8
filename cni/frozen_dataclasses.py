"""`dataclasses` inside the frozen binary: only the constructor.

The real module imports `inspect`, `re` and more, which takes as long as everything else that the binary does.
Equality, immutability and the rest are for those who keep the values: the agent, which has the real one.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Class = TypeVar("Class", bound=type)


def dataclass(**_: bool) -> Callable[[Class], Class]:
    """Give a class a constructor that takes its annotated fields, in order or by name."""

    def decorate(cls: Class) -> Class:
        names = tuple(cls.__annotations__)

        def construct(self: object, *values: object, **named: object) -> None:
            for name, value in zip(names, values, strict=False):
                setattr(self, name, value)
            for name, value in named.items():
                setattr(self, name, value)

        cls.__init__ = construct  # type: ignore[misc]
        return cls

    return decorate
