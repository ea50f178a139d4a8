"""Ports of the node that lead to a Pod: how they are written down, and who has one already. Pure.

8080:80/tcp                 port 8080 on every address of the node -> port 80 of the Pod
53:5353/udp@10.0.0.1        on this address alone
443:8443/tcp@0.0.0.0        on every IPv4 address                    (:: on every IPv6 address)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from agent.pods.model import Attachment
from cni.spec import PortMapping

_WRITTEN = re.compile(r"(\d{1,5}):(\d{1,5})/(tcp|udp|sctp)(?:@([0-9a-f.:]+))?")
_FAMILIES = frozenset((4, 6))


def write(mappings: Iterable[PortMapping]) -> str:
    """The mappings in one word, "" for none."""
    return ",".join(
        f"{each.host_port}:{each.container_port}/{each.protocol}{each.host_ip and '@'}{each.host_ip}"
        for each in mappings
    )


def read(text: str) -> tuple[PortMapping, ...]:
    """What `write` wrote. ValueError for anything else."""
    return tuple(_read(word) for word in text.split(",")) if text else ()


def _read(word: str) -> PortMapping:
    found = _WRITTEN.fullmatch(word)
    if found is None:
        raise ValueError(f"{word!r} is no mapping of a port, such as 8080:80/tcp")
    host, container, protocol, address = found.groups()
    return PortMapping(int(host), int(container), protocol, str(ip_address(address)) if address else "")


def conflict(mappings: Sequence[PortMapping], attachments: Iterable[Attachment]) -> str:
    """Say which of a new Pod's host ports is taken, by itself or by whom of these; "" when none is."""
    for index, mapping in enumerate(mappings):
        if any(_clash(mapping, other) for other in mappings[:index]):
            return f"hostPort {_shown(mapping)} is given twice by the Pod itself"
    if not mappings:
        return ""
    for attachment in attachments:
        for mapping in mappings:
            if any(_clash(mapping, other) for other in attachment.port_mappings):
                return f"hostPort {_shown(mapping)} is taken by Pod {attachment} on this node"
    return ""


def _clash(one: PortMapping, other: PortMapping) -> bool:
    return (
        (one.host_port, one.protocol) == (other.host_port, other.protocol)
        and bool(_families(one) & _families(other))
        and (_everywhere(one) or _everywhere(other) or ip_address(one.host_ip) == ip_address(other.host_ip))
    )


def _everywhere(mapping: PortMapping) -> bool:
    return not mapping.host_ip or ip_address(mapping.host_ip).is_unspecified


def _families(mapping: PortMapping) -> frozenset[int]:
    return frozenset((ip_address(mapping.host_ip).version,)) if mapping.host_ip else _FAMILIES


def _shown(mapping: PortMapping) -> str:
    return f"{mapping.host_port}/{mapping.protocol} on {mapping.host_ip or 'every address'}"
