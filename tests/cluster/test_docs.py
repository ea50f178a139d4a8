"""Each page's commands for a cluster, typed in the order of the page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster import cluster
from tests.cluster.cluster import Settings
from tests.cluster.gobuild import programs
from tests.cluster.versions import KUBERNETES_MODULE
from tests.docs.blocks import blocks, pages
from tests.docs.run import follow

PAGES = [page for page in pages() if any(block.world == "cluster" for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: "-".join(page.parts[-2:]))
def test_the_page_is_true(real_cluster: Settings, page: Path) -> None:
    path = f"{programs(KUBERNETES_MODULE)}:{os.environ['PATH']}"
    follow(
        (block for block in blocks(page) if block.world == "cluster"),
        {**cluster.environment(), "PATH": path},
    )
