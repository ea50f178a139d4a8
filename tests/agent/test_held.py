"""What an agent holds comes in pages: nothing twice, nothing lost, whatever comes and goes between two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.held import Key, page
from cni import wire

Things = dict[Key, Callable[[], dict[str, Any]]]


def things(names: list[tuple[str, str]], size: int = 10) -> Things:
    return {name: lambda name=name: {"key": list(name), "text": "x" * size} for name in names}  # type: ignore[misc]


def pages(of: Things, room: int, **asked: str) -> Iterator[dict[str, Any]]:
    after: Key = ()
    while True:
        found = page(of, after=after, room=room, **asked)  # type: ignore[arg-type]
        yield found
        if found["next"] is None:
            return
        after = tuple(found["next"])


NAMES = [(f"ns{n % 3}", f"pod{n}") for n in range(50)]


@pytest.mark.parametrize("room", [1, 60, 200, 10_000])
def test_pages_hold_everything_once(room: int) -> None:
    found = list(pages(things(NAMES), room))
    assert [tuple(item["key"]) for each in found for item in each["items"]] == sorted(NAMES)
    assert {each["total"] for each in found} == {50}
    assert (len(found) == 1) is (room == 10_000)


def test_what_comes_and_goes_between_pages_disturbs_nothing() -> None:
    of = things(NAMES)
    first, after = page(of, room=200), ()
    after = tuple(first["next"])
    del of["ns0", "pod0"], of[after]
    of["ns2", "later"] = lambda: {"key": ["ns2", "later"]}
    rest = page(of, after=after, room=10_000)
    seen = [tuple(item["key"]) for item in (*first["items"], *rest["items"])]
    assert len(seen) == len(set(seen)) == 51
    assert ("ns2", "later") in seen


def test_a_namespace_and_a_name_narrow_it() -> None:
    of = things(NAMES)
    assert {item["key"][0] for item in page(of, namespace="ns1")["items"]} == {"ns1"}
    assert [item["key"] for item in page(of, name="pod7")["items"]] == [["ns1", "pod7"]]
    assert page(of, namespace="ns0", name="pod7") == {"items": [], "total": 0, "next": None}


def test_a_page_fits_into_a_message() -> None:
    of = things([("ns", f"pod{n}") for n in range(5000)], size=1000)
    found = page(of)
    assert 500 < len(found["items"]) < 5000
    assert len(wire.Answer(found).encode()) <= wire.LIMIT
    assert len(json.dumps(found)) > wire.LIMIT * 0.9
