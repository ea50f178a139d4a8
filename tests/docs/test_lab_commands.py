"""Each page's commands for the lab, typed in the order of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import state
from lab.world import Lab
from tests.docs.blocks import blocks, pages
from tests.docs.run import follow

PAGES = [page for page in pages() if any(block.world == "lab" for block in blocks(page))]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A page begins without a lab, and leaves none."""
    assert not state.remains()
    yield
    forgotten = state.remains()
    if forgotten:
        Lab().down()
    assert not forgotten, "the page's last command for the lab is `podwall lab down`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: "-".join(page.parts[-2:]))
def test_the_page_is_true(page: Path) -> None:
    follow(block for block in blocks(page) if block.world == "lab")
