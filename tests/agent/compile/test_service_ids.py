"""Numbers of names: no two alike, and the same whatever the order in which names came and went."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from agent.compile.service_ids import FIRST_RESERVED, RESERVED, Name, Numbers, backend_digest, name_digest

MAGIC = 0x5000_0000
NAMES = st.sampled_from([(letter,) for letter in "abcdefghij"])


def _meeting(name: Name) -> int:
    """A digest that many names share."""
    return RESERVED + ord(name[0]) % 3


def _numbers(*names: Name) -> Numbers[Name]:
    made = Numbers[Name](MAGIC, _meeting)
    for name in names:
        made.take(name)
    return made


def test_the_first_by_order_has_the_digest_and_others_reserved_numbers() -> None:
    numbers = _numbers(("g",), ("a",), ("d",), ("b",))
    assert numbers.of(("a",)) == MAGIC | _meeting(("a",))
    assert numbers.of(("b",)) == MAGIC | _meeting(("b",))
    assert numbers.of(("d",)) == MAGIC | FIRST_RESERVED
    assert numbers.of(("g",)) == MAGIC | (FIRST_RESERVED + 1)


@given(st.lists(st.tuples(st.booleans(), NAMES), max_size=40))
def test_any_history_ends_with_the_same_numbers(history: list[tuple[bool, Name]]) -> None:
    numbers, there, known = _numbers(), set[Name](), dict[Name, int]()
    for comes, name in history:
        if comes is (name in there):
            continue
        changed = numbers.take(name) if comes else numbers.drop(name)
        there ^= {name}
        now = {each: numbers.of(each) for each in there}
        assert len(set(now.values())) == len(there)
        assert now == {each: _numbers(*sorted(there)).of(each) for each in there}
        assert {each for each in there & known.keys() if now[each] != known[each]} <= changed <= there
        known = now


def test_names_do_not_run_together() -> None:
    assert name_digest(("a", "bc")) != name_digest(("ab", "c"))
    assert name_digest(("a\udc80",)) >= RESERVED


def test_digests_fit_into_their_bits() -> None:
    for number in range(1000):
        for digest in (
            name_digest(("shop", f"web-{number}")),
            backend_digest((ip_address(number), number)),
            backend_digest((ip_address(f"fd00::{number:x}"), 65535)),
        ):
            assert RESERVED <= digest < 1 << 28
