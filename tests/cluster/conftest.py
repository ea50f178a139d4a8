"""The cluster that this folder's tests share.

One that runs already is used and left; otherwise one is made and removed, or left with
PODWALL_CLUSTER=keep.
"""

import dataclasses
import os
from collections.abc import Iterator

import pytest

from tests.cluster import cluster, places
from tests.cluster.cluster import Settings
from tests.cluster.places import Asker


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[Settings]:
    """Make or find a cluster with podwall as it is now."""
    found = cluster.recorded() if cluster.exists() else None
    wanted = found or Settings.from_environment()
    settings = dataclasses.replace(
        wanted, nodes=max(wanted.nodes, cluster.TESTED_NODES), cni="podwall", kube_proxy="none"
    )
    found = found if found == settings else None
    try:
        cluster.up(settings)
        yield settings
    finally:
        if not found and os.environ.get("PODWALL_CLUSTER") != "keep":
            cluster.down()


@pytest.fixture(scope="module")
def nodes(real_cluster: Settings) -> dict[str, Asker]:
    """Return the nodes as places to ask from."""
    return {name: places.node(name) for name in cluster.nodes()}


@pytest.fixture(scope="session")
def outside(real_cluster: Settings) -> Asker:
    """Return the machine outside the cluster."""
    return places.outside()
