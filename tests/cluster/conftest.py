"""The cluster that this folder's tests share.

One that runs already is used and left; otherwise one is made and removed, or left with
PODWALL_CLUSTER=keep.
"""

import dataclasses
import os
from collections.abc import Iterator

import pytest

from tests.cluster import cluster
from tests.cluster.cluster import Settings


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[Settings]:
    """Make or find a cluster with podwall as it is now."""
    found = cluster.recorded() if cluster.exists() else None
    settings = found or Settings.from_environment()
    if settings.cni != "podwall":
        settings, found = dataclasses.replace(settings, cni="podwall"), None
    try:
        cluster.up(settings)
        yield settings
    finally:
        if not found and os.environ.get("PODWALL_CLUSTER") != "keep":
            cluster.down()
