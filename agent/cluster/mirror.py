"""Endpoints as EndpointSlices, as the cluster's mirroring controller makes them.

Somebody writes Endpoints by hand for a Service without a selector (a database outside the cluster).  Each
subset becomes one slice per address family, of at most 1,000 addresses.
"""

from __future__ import annotations

from collections.abc import Iterator

from .model import SERVICE_NAME_LABEL, Endpoint, Endpoints, EndpointSlice, EndpointsSubset, Family

MANAGED_BY_LABEL = "endpointslice.kubernetes.io/managed-by"
SKIP_LABEL = "endpointslice.kubernetes.io/skip-mirror"
LEADER_ANNOTATION = "control-plane.alpha.kubernetes.io/leader"
MOST_ADDRESSES = 1000

_MIRRORING = "endpointslicemirroring-controller.k8s.io"


def mirrored(endpoints: Endpoints) -> tuple[EndpointSlice, ...]:
    """The slices of some Endpoints; none of those that ask not to be mirrored or only elect a leader."""
    if endpoints.labels.get(SKIP_LABEL) == "true" or LEADER_ANNOTATION in endpoints.annotations:
        return ()
    return tuple(
        _slice(endpoints, subset, family, part, number)
        for number, (subset, family, part) in enumerate(_parts(endpoints))
    )


def _parts(endpoints: Endpoints) -> Iterator[tuple[EndpointsSubset, Family, tuple[Endpoint, ...]]]:
    families: tuple[Family, ...] = (4, 6)
    for subset in endpoints.subsets:
        for family in families:
            some = tuple(e for e in subset.endpoints if e.addresses[0].version == family)
            for start in range(0, len(some), MOST_ADDRESSES):
                yield subset, family, some[start : start + MOST_ADDRESSES]


def _slice(
    endpoints: Endpoints,
    subset: EndpointsSubset,
    family: Family,
    part: tuple[Endpoint, ...],
    number: int,
) -> EndpointSlice:
    return EndpointSlice(
        namespace=endpoints.namespace,
        name=f"{endpoints.name}-mirror{number}",
        labels={**endpoints.labels, SERVICE_NAME_LABEL: endpoints.name, MANAGED_BY_LABEL: _MIRRORING},
        service=endpoints.name,
        address_type="IPv4" if family == 4 else "IPv6",
        endpoints=part,
        ports=subset.ports,
        annotations=endpoints.annotations,
        deleting=endpoints.deleting,
    )
