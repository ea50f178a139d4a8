"""What tests of LoadBalancer addresses share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.agent.loadbalancer.onelink import Link, made


@pytest.fixture
def link() -> Iterator[Link]:
    """A node and a client on one link."""
    with made() as both:
        yield both
