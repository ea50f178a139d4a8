"""`json` inside the frozen binary: `loads` and `dumps` for what the binary reads and writes.

The real package imports `re`, and its C half is not part of the interpreter's static library. This one reads
the grammar of RFC 8259 as the real one does (of equal names the last counts), but refuses NaN and Infinity.
"""

from __future__ import annotations

SPACE = " \t\n\r"
DIGITS = "0123456789"
NUMBER = frozenset("0123456789+-.eE")
LITERALS = {"t": ("true", True), "f": ("false", False), "n": ("null", None)}
UNESCAPED = {
    '"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
}  # fmt: skip
ESCAPED: dict[int, str] = {code: f"\\u{code:04x}" for code in range(0x20)}
ESCAPED |= {ord(character): f"\\{letter}" for letter, character in UNESCAPED.items() if letter != "/"}


class JSONDecodeError(ValueError):
    """The text is not JSON."""


def loads(text: str) -> object:
    """Return the value that the text holds. Raises JSONDecodeError."""
    try:
        value, at = _value(text, _skip(text, 0))
        at = _skip(text, at)
    except IndexError:
        raise JSONDecodeError("the text ends too early") from None
    if at != len(text):
        raise JSONDecodeError(f"text follows the value at character {at}")
    return value


def dumps(value: object, **_: object) -> str:
    """Return the value as text without spaces. Raises TypeError for what JSON does not have."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value.translate(ESCAPED)}"'
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value - value != 0:
            raise ValueError(f"{value} is not JSON")
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{_name(name)}:{dumps(each)}" for name, each in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([dumps(each) for each in value]) + "]"
    raise TypeError(f"{type(value).__name__} is not JSON")


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a name")
    return dumps(name)


def _skip(text: str, at: int) -> int:
    end = len(text)
    while at < end and text[at] in SPACE:
        at += 1
    return at


def _value(text: str, at: int) -> tuple[object, int]:
    first = text[at]
    if first == '"':
        return _string(text, at + 1)
    if first == "{":
        return _object(text, _skip(text, at + 1))
    if first == "[":
        return _array(text, _skip(text, at + 1))
    if first in LITERALS:
        word, value = LITERALS[first]
        if not text.startswith(word, at):
            raise JSONDecodeError(f"no value at character {at}")
        return value, at + len(word)
    return _number(text, at)


def _object(text: str, at: int) -> tuple[dict[str, object], int]:
    members: dict[str, object] = {}
    if text[at] == "}":
        return members, at + 1
    while True:
        if text[at] != '"':
            raise JSONDecodeError(f"no name at character {at}")
        name, at = _string(text, at + 1)
        at = _skip(text, at)
        if text[at] != ":":
            raise JSONDecodeError(f"no colon at character {at}")
        members[name], at = _value(text, _skip(text, at + 1))
        at = _skip(text, at)
        if text[at] == "}":
            return members, at + 1
        if text[at] != ",":
            raise JSONDecodeError(f"no comma at character {at}")
        at = _skip(text, at + 1)


def _array(text: str, at: int) -> tuple[list[object], int]:
    values: list[object] = []
    if text[at] == "]":
        return values, at + 1
    while True:
        value, at = _value(text, at)
        values.append(value)
        at = _skip(text, at)
        if text[at] == "]":
            return values, at + 1
        if text[at] != ",":
            raise JSONDecodeError(f"no comma at character {at}")
        at = _skip(text, at + 1)


def _string(text: str, at: int) -> tuple[str, int]:
    """Return the string that begins at `at`, behind its quote."""
    end = text.find('"', at)
    piece = text[at:end]
    if end < 0:
        raise JSONDecodeError(f"the string at character {at} does not end")
    if "\\" not in piece:
        return _printable(piece, at), end + 1
    pieces = []
    while True:
        escape = text.find("\\", at)
        end = text.find('"', at)
        if end < 0:
            raise JSONDecodeError(f"the string at character {at} does not end")
        if not 0 <= escape < end:
            pieces.append(_printable(text[at:end], at))
            return "".join(pieces), end + 1
        pieces.append(_printable(text[at:escape], at))
        character, at = _escape(text, escape + 1)
        pieces.append(character)


def _printable(piece: str, at: int) -> str:
    if piece and min(piece) < " ":
        raise JSONDecodeError(f"a control character in the string at character {at}")
    return piece


def _escape(text: str, at: int) -> tuple[str, int]:
    """Return the character that the escape at `at`, behind its backslash, stands for."""
    if text[at] != "u":
        if text[at] not in UNESCAPED:
            raise JSONDecodeError(f"no escape at character {at}")
        return UNESCAPED[text[at]], at + 1
    code, at = _code_unit(text, at + 1), at + 5
    if 0xD800 <= code < 0xDC00 and text.startswith("\\u", at):
        low = _code_unit(text, at + 2)
        if 0xDC00 <= low < 0xE000:
            return chr(0x10000 + (code - 0xD800 << 10 | low - 0xDC00)), at + 6
    return chr(code), at


def _code_unit(text: str, at: int) -> int:
    digits = text[at : at + 4]
    if len(digits) != 4 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        raise JSONDecodeError(f"no four hexadecimal digits at character {at}")
    return int(digits, 16)


def _number(text: str, at: int) -> tuple[int | float, int]:
    start, end = at, len(text)
    while at < end and text[at] in NUMBER:
        at += 1
    number = text[start:at]
    digits = number.removeprefix("-")
    whole = digits.replace(".", "e").replace("E", "e").partition("e")[0]
    if not _is_digits(whole) or (len(whole) > 1 and whole[0] == "0"):
        raise JSONDecodeError(f"no value at character {start}")
    if digits == whole:
        return int(number), at
    mantissa, _, exponent = digits.replace("E", "e").partition("e")
    _, point, fraction = mantissa.partition(".")
    if (point and not _is_digits(fraction)) or ("e" in digits.lower() and not _is_exponent(exponent)):
        raise JSONDecodeError(f"no number at character {start}")
    return float(number), at


def _is_digits(text: str) -> bool:
    return bool(text) and all(character in DIGITS for character in text)


def _is_exponent(text: str) -> bool:
    return _is_digits(text[1:] if text[:1] in ("+", "-") else text)
