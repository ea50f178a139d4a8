"""The wanted ruleset is the union of what its owners want, whatever the history."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.nft.diff import Change
from agent.nft.model import Chain, Element, Item, Ruleset, Set, SetName, Table, TableName
from agent.nft.owners import Desired

INET = TableName("inet", "podwall")
PEERS = Set(INET, "peers", ("ipv4_addr",))


def _peer(last: int, comment: str = "") -> Element:
    return Element(SetName(INET, "peers"), IPv4Address(f"10.0.0.{last}"), comment=comment)


def test_an_item_stays_while_one_owner_wants_it() -> None:
    desired = Desired()
    desired.replace(("node", "a"), [_peer(1)])
    desired.replace(("node", "b"), [_peer(1)])
    desired.take()

    desired.replace(("node", "a"), [])
    assert desired.take() == {}
    assert desired.ruleset == Ruleset([_peer(1)])

    desired.replace(("node", "b"), [])
    assert desired.take() == {_peer(1).id: Change(_peer(1), None)}
    assert desired.owners == frozenset()


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_the_smallest_owner_wins_in_any_order(order: tuple[str, ...]) -> None:
    desired = Desired()
    for name in order:
        desired.replace((name,), [_peer(1, name)])
    assert list(desired.ruleset.items()) == [_peer(1, "a")]
    desired.replace(("a",), [])
    assert list(desired.ruleset.items()) == [_peer(1, "b")]
    desired.replace(("b",), [])
    assert list(desired.ruleset.items()) == [_peer(1, "c")]


def test_one_owner_cannot_want_two_ways() -> None:
    desired = Desired()
    with pytest.raises(ValueError, match="two ways"):
        desired.replace(("a",), [_peer(1, "x"), _peer(1, "y")])
    assert desired.ruleset == Ruleset()


def test_changes_gather_until_they_are_taken() -> None:
    desired = Desired()
    desired.replace(("a",), [_peer(1)])
    desired.replace(("a",), [_peer(1), _peer(2)])
    desired.replace(("a",), [_peer(2, "x")])
    assert desired.take() == {_peer(2).id: Change(None, _peer(2, "x"))}
    assert desired.take() == {}


def test_what_changes_back_is_no_change() -> None:
    desired = Desired()
    desired.replace(("a",), [_peer(1)])
    desired.take()
    desired.replace(("a",), [])
    desired.replace(("a",), [_peer(1)])
    assert desired.take() == {}


def test_a_chain_and_a_set_of_one_name_are_two_items() -> None:
    items: list[Item] = [Table(*INET), Chain(INET, "peers"), PEERS]
    desired = Desired()
    desired.replace(("a",), items)
    assert list(desired.ruleset.items()) == items
    assert all(desired.ruleset.get(item.id) == item for item in items)


OWNERS = st.sampled_from([("a",), ("b",), ("c",)])
ITEMS = st.lists(
    st.builds(_peer, st.integers(1, 4), st.sampled_from(["", "x"])), unique_by=lambda item: item.key
)


@given(st.lists(st.tuples(OWNERS, ITEMS, st.booleans())))
def test_any_history_ends_in_the_union(history: list[tuple[tuple[str, ...], list[Element], bool]]) -> None:
    desired, mirror = Desired(), Ruleset()
    for owner, items, take in history:
        desired.replace(owner, items)
        if take:
            _apply(mirror, desired)
    _apply(mirror, desired)

    last = {owner: items for owner, items, _ in history}
    fresh = Desired()
    for owner in sorted(last):
        fresh.replace(owner, last[owner])
    assert mirror == desired.ruleset == fresh.ruleset


def _apply(mirror: Ruleset, desired: Desired) -> None:
    for name, (before, after) in desired.take().items():
        assert mirror.get(name) == before
        if after is not None:
            mirror.add(after)
        elif before is not None:
            mirror.discard(before)


def test_a_copy_and_its_original_do_not_see_each_others_changes() -> None:
    original = Ruleset([_peer(1), _peer(2)])
    copied = original.copy()
    original.add(_peer(3))
    original.discard(_peer(1))
    assert copied == Ruleset([_peer(1), _peer(2)])

    again = original.copy()
    again.discard(_peer(2))
    again.discard(_peer(3))
    again.add(_peer(4))
    assert original == Ruleset([_peer(2), _peer(3)])
    assert copied == Ruleset([_peer(1), _peer(2)])
    assert again == Ruleset([_peer(4)])
