"""Whether a value is what a rule or element names: a constant, a range, a network, several at once."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from agent.nft.model import Key, Range, Wildcard
from agent.nft.packet import UndecidedError, Unknown


def wide(key: Key) -> bool:
    """Whether an element stands for more than one value."""
    if isinstance(key, tuple):
        return any(wide(part) for part in key)
    return isinstance(key, (Range, Wildcard, IPv4Network, IPv6Network))


def covers(key: Any, value: Any) -> bool:
    """Whether a constant is this value or a range that holds it."""
    if isinstance(key, tuple):
        return isinstance(value, tuple) and all(map(covers, key, value))
    if isinstance(value, Unknown):
        return False
    if isinstance(key, Range):
        return _within(key, value)
    if isinstance(key, (IPv4Network, IPv6Network)):
        return value in key
    if isinstance(key, Wildcard):
        return str(value).startswith(key.prefix)
    return bool(key == value)


def _within(key: Range, value: Any) -> bool:
    if isinstance(key.low, int):
        return isinstance(value, int) and key.low <= value <= int(key.high)
    return isinstance(value, type(key.low)) and int(key.low) <= int(value) <= int(key.high)


def compare(value: Any, operator: str, right: Any) -> bool:
    """Whether a match with this operator of nft holds."""
    if operator in {"==", "!="}:
        return covers(right, value) is (operator == "==")
    if operator in {"in", "!"}:
        return bool(value & right) is (operator == "in")
    compared: dict[str, Callable[[], bool]] = {
        "<": lambda: value < right,
        ">": lambda: value > right,
        "<=": lambda: value <= right,
        ">=": lambda: value >= right,
    }
    return compared[operator]()


def bits(value: Any, operator: str, right: int) -> int:
    """A bitwise operation."""
    if isinstance(value, Unknown):
        raise UndecidedError("bits of a field that the packet's description does not have")
    number = int(value)
    results: dict[str, Callable[[], int]] = {
        "&": lambda: number & right,
        "|": lambda: number | right,
        "^": lambda: number ^ right,
        "<<": lambda: number << right & 0xFFFFFFFF,
        ">>": lambda: number >> right,
    }
    return results[operator]()
