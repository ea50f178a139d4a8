"""The frozen binary's own `json` and `dataclasses` against the real ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import frozen_dataclasses, frozen_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NEARLY_JSON = st.text(alphabet='{}[]":,\\ue0123456789.-+Etrufalsn \n\x01/bD8', max_size=14)


@given(VALUES, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_it_reads_what_json_writes(value, ascii_only, indent):
    assert frozen_json.loads(json.dumps(value, ensure_ascii=ascii_only, indent=indent)) == value


@given(VALUES)
def test_json_reads_what_it_writes(value):
    assert json.loads(frozen_json.dumps(value)) == value


@given(NEARLY_JSON)
def test_it_refuses_what_json_refuses(text):
    assert outcome(frozen_json, text) == outcome(json, text)


def outcome(module, text):
    try:
        return repr(module.loads(text))
    except ValueError:
        return "refused"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[1,]",
        '{"a":1,}',
        '{"a"}',
        "01",
        "-",
        "1.",
        ".5",
        "1e",
        "1e+",
        "+1",
        "--1",
        "nul",
        "truefalse",
        '"',
        '"\\',
    ],
)
def test_bad_text(text):
    assert outcome(json, text) == "refused"
    with pytest.raises(frozen_json.JSONDecodeError):
        frozen_json.loads(text)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(text):
    with pytest.raises(frozen_json.JSONDecodeError):
        frozen_json.loads(text)


@pytest.mark.parametrize("value", [{1, 2}, b"x", {1: 2}, float("nan"), float("inf"), [object()]])
def test_values_that_json_does_not_have(value):
    with pytest.raises((TypeError, ValueError)):
        frozen_json.dumps(value)


def test_surrogate_pairs():
    assert frozen_json.loads('"\\ud83d\\ude00 \\ud83d \\ud83dx"') == "\U0001f600 \ud83d \ud83dx"


def test_a_constructor():
    @frozen_dataclasses.dataclass(frozen=True, slots=True)
    class Point:
        x: int
        y: int = 7

    assert (Point(1).x, Point(1).y) == (1, 7)
    assert (Point(1, 2).y, Point(x=1, y=3).y) == (2, 3)
