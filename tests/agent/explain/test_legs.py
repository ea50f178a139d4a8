"""What a node's rules do, beside what they have to do."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from agent.explain.legs import Leg, differences

WEB, OTHER = (ip_address("10.244.1.3"), 8080), (ip_address("10.244.1.4"), 8080)
SERVICE = Leg(
    "node2", ip_address("10.244.0.2"), ip_address("10.96.0.1"), 80, "TCP", {WEB: True, OTHER: False}
)
EMPTY = replace(SERVICE, ends={})


def way(outcome: str, end: tuple[Any, int] = WEB, rule: str = "") -> dict[str, Any]:
    return {"outcome": outcome, "address": str(end[0]), "port": end[1], "source": None, "rule": rule}


@pytest.mark.parametrize(
    ("leg", "ways", "said"),
    [
        (SERVICE, [way("accept"), way("drop", OTHER)], []),
        (
            SERVICE,
            [way("drop", rule="inet podwall to, rule 2"), way("drop", OTHER)],
            ["they drop it in inet podwall to, rule 2, though it may reach 10.244.1.3:8080"],
        ),
        (
            SERVICE,
            [way("accept"), way("accept", OTHER)],
            ["they let it pass to 10.244.1.4:8080, though the policies deny it"],
        ),
        (
            replace(SERVICE, ends={WEB: True}),
            [way("accept"), way("accept", OTHER)],
            ["they lead it to 10.244.1.4:8080, which it must not reach"],
        ),
        (
            replace(SERVICE, ends={WEB: True, OTHER: True}),
            [way("accept")],
            ["they never lead it to 10.244.1.4:8080"],
        ),
        (replace(SERVICE, ends={WEB: True, OTHER: True}, sticky=True), [way("accept")], []),
        (EMPTY, [way("reject")], []),
        (EMPTY, [way("drop")], ["they drop it, instead of refusing it"]),
        (replace(EMPTY, silent=True), [way("reject")], ["they refuse it, instead of dropping it"]),
        (EMPTY, [way("accept")], ["they let it pass to 10.244.1.3:8080, where nobody is"]),
    ],
)  # fmt: skip
def test_what_differs_is_said(leg: Leg, ways: list[dict[str, Any]], said: list[str]) -> None:
    assert list(differences(leg, {"ways": ways, "whole": True})) == said


def test_of_more_picks_than_were_tried_none_is_missed() -> None:
    leg = replace(SERVICE, ends={WEB: True, OTHER: True})
    assert list(differences(leg, {"ways": [way("accept")], "whole": False})) == []
