"""Foreign changes that were undone are counted, and those of the last hour are told apart."""

from __future__ import annotations

from agent.nft.kernel import Foreign
from agent.nft.model import TableName
from agent.repairs import KEPT, Repairs

PODWALL, SERVICES = TableName("inet", "podwall"), TableName("inet", "podwall_services")


def test_repairs_of_the_last_hour_are_told() -> None:
    now = 10_000.0
    repairs = Repairs(lambda: now)
    assert repairs.status() == {"total": 0, "last_hour": 0, "last": None, "tables": []}
    repairs.note(Foreign(frozenset({SERVICES})))
    now = 12_000.0
    repairs.note(Foreign(frozenset({PODWALL})))
    both = ["inet podwall", "inet podwall_services"]
    assert repairs.status() == {"total": 2, "last_hour": 2, "last": 12_000.0, "tables": both}
    now = 14_000.0
    assert repairs.status() == {"total": 2, "last_hour": 1, "last": 12_000.0, "tables": ["inet podwall"]}


def test_many_repairs_take_no_more_memory() -> None:
    repairs = Repairs(lambda: 1.0)
    for _ in range(KEPT + 5):
        repairs.note(Foreign(frozenset(), lost=True))
    assert (repairs.total, len(repairs.of_last_hour())) == (KEPT + 5, KEPT)
