"""Values of the API, read as strictly as Kubernetes checks them; what cannot be used becomes a `Problem`.

Each reader takes the value, the path of its field and the list of problems found so far; it returns None
after adding to that list.  Strict because other programs read the same text differently: `10.0.0.041` is
10.0.0.33 to some and 10.0.0.41 to others, and an address that reaches nftables unparsed is looked up in DNS.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, AF_INET6, inet_pton

from .model import PROTOCOLS, IPAddress, IPNetwork, Problem, Protocol

_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_LABEL_NAME = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])(?!.*--)[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
_IPV4_MAPPED = bytes(10) + b"\xff\xff"
_PREFIX = re.compile(r"0|[1-9][0-9]{0,2}")

Found = list[Problem]
MOST_LEFT_OUT = 64
"""Fields of a wrong type, after which an object is refused."""


@lru_cache(maxsize=2048)
def _address(text: str) -> IPAddress | None:
    """The address, or None; equal texts share one value, as Pods and endpoints repeat each other's."""
    try:  # inet_pton is as strict as `ipaddress`, takes no zone, and a tenth of its time
        if ":" not in text:
            return IPv4Address(inet_pton(AF_INET, text))
        packed = inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        return None
    # Go reads an IPv4-mapped address as IPv4, others as IPv6.
    return None if packed.startswith(_IPV4_MAPPED) else IPv6Address(packed)


@lru_cache(maxsize=1024)
def _network(text: str) -> IPNetwork | None:
    head, slash, prefix = text.partition("/")
    address = _address(head)
    if address is None or not slash or not _PREFIX.fullmatch(prefix):
        return None
    if int(prefix) > address.max_prefixlen:
        return None
    if isinstance(address, IPv4Address):
        return IPv4Network((address, int(prefix)), strict=False)
    return IPv6Network((address, int(prefix)), strict=False)


def address(value: object, field: str, found: Found) -> IPAddress | None:
    """An IPv4 or IPv6 address."""
    result = _address(value) if isinstance(value, str) else None
    if result is None:
        message = "is not an IPv4 or IPv6 address (no leading zeros, no zone, no IPv4-mapped IPv6 address)"
        _note(field, f"{shown(value)} {message}", found)
    return result


def network(value: object, field: str, found: Found) -> IPNetwork | None:
    """A range in CIDR notation; bits beyond the prefix are cleared, as Kubernetes does."""
    result = _network(value) if isinstance(value, str) else None
    if result is None:
        message = "is not a CIDR such as 10.0.0.0/8 or fd00::/8 (no leading zeros)"
        _note(field, f"{shown(value)} {message}", found)
    return result


def port(value: object, field: str, found: Found) -> int | None:
    """A port number from 1 to 65535."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
        return value
    _note(field, f"{shown(value)} is not a port number from 1 to 65535", found)
    return None


def port_or_name(value: object, field: str, found: Found) -> int | str | None:
    """A port number, or the name of a container's port."""
    if not isinstance(value, str):
        return port(value, field, found)
    if _PORT_NAME.fullmatch(value):
        return value
    message = "is not the name of a port: at most 15 of a-z, 0-9 and single '-' between them, with a letter"
    _note(field, f"{shown(value)} {message}; a number is written without quotes", found)
    return None


def protocol(value: object, field: str, found: Found) -> Protocol | None:
    """TCP, UDP or SCTP."""
    if value in PROTOCOLS:
        return value
    _note(field, f"{shown(value)} is not a protocol: allowed are TCP, UDP, SCTP", found)
    return None


def _note(field: str, message: str, found: Found) -> None:
    """Add a problem, unless the field was left out for its type (few are, and they come first)."""
    if all(problem.field != field for problem in found[:MOST_LEFT_OUT]):
        found.append(Problem(field, message))


def label_key(value: object) -> bool:
    """Is it a label's key: a name of at most 63 characters, after a DNS prefix and a slash if need be?"""
    if not isinstance(value, str):
        return False
    prefix, slash, name = value.rpartition("/")
    if slash and not object_name(prefix):
        return False
    return _LABEL_NAME.fullmatch(name) is not None


def label_value(value: object) -> bool:
    """Is it a label's value: empty, or at most 63 characters of letters, digits, '-', '_' and '.'?"""
    return isinstance(value, str) and (not value or _LABEL_NAME.fullmatch(value) is not None)


def object_name(value: str) -> bool:
    """Is it a DNS subdomain, as all objects that podwall reads are named?"""
    return len(value) <= 253 and _SUBDOMAIN.fullmatch(value) is not None


def shown(value: object) -> str:
    """A value for a message: quoted, without control characters, and cut when long."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
