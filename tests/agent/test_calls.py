"""What the command is answered fits into a message, however much there is and however long names are."""

from __future__ import annotations

import pytest

from agent.calls import listed
from cni import wire

CASES = {
    "nothing": ([], 0),
    "a few": ([{"name": "a"}] * 3, 3),
    "long names": ([{"name": "n" * 600}] * 5000, None),
    "letters that become longer": ([{"name": "\u00e9" * 600}] * 5000, None),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_fits(case: str) -> None:
    items, shown = CASES[case]
    answer = listed("flows", items)
    assert answer["total"] == len(items)
    assert shown is None or len(answer["flows"]) == shown
    assert len(answer["flows"]) > 100 or len(answer["flows"]) == len(items)
    wire.Answer({**answer, "lost": 12345}).encode()
