"""What a node adds to a bug report, part by part and page by page: rules, links, routes, settings, counters.

    {"part": "rules", "at": 0}   --> {"data": BASE64, "next": 524288, "of": "4f1c..."}     made now, and kept
    {"part": "rules", "at": N, "of": "4f1c..."} --> {"data": ..., "next": null, ...}       and forgotten

A part is lines of text, compressed at once, so that what is kept for the next page is small, and no message
is too long. Few parts are kept at a time, and none that nobody asks on for. Only podwall's own tables are
told; of others the names of the chains at hooks.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import secrets
import socket
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from agent.calls import Answer, Body
from agent.config import Config
from agent.explain.filters import HOOKS
from agent.nft import foreign
from agent.nft.kernel import OWN_TABLES, Kernel
from agent.pods.rtnetlink import (
    ROUTE,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    Rtnetlink,
    parse_address,
    parse_link,
    parse_route,
)
from cni import spec
from cni.spec import CniError

PAGE = 512 * 1024
"""Bytes of a page before they are written as text."""
LARGEST = 64 << 20
"""Bytes of a part before it is compressed; what is more is cut off, and the last line says so."""
MOST_KEPT, KEPT_S = 4, 60.0

_COUNTERS = ("net/stat/nf_conntrack", "net/snmp", "net/snmp6", "net/netstat", "net/softnet_stat", "net/dev")
_SETTINGS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/*",
    "net/ipv6/conf/*",
    "net/ipv4/neigh/default",
    "net/ipv6/neigh/default",
    "net/netfilter",
)
_BEGIN, _END = b'{"nftables": [', b"]}"
_BETWEEN = re.compile(rb', (?=\{"(?:table|chain|rule|set|map)": \{"family": )')
"""Each object but the first begins with its family; what is inside of one does not, nor can a string."""
_EMPTY_HEADER = {RTM_GETLINK: bytes(16), RTM_GETADDR: bytes(8)}

Lines: TypeAlias = Iterable[str]
Part: TypeAlias = Callable[[Config], Awaitable[Lines]]


@dataclass(frozen=True, slots=True)
class _Made:
    part: str
    data: bytes
    when: float


def answers(config: Config) -> Mapping[str, Answer]:
    """The call `bugreport`."""
    kept: dict[str, _Made] = {}

    async def bugreport(body: Body) -> object:
        part, at, of = str(body.get("part", "")), int(body.get("at") or 0), str(body.get("of") or "")
        if part not in PARTS:
            raise CniError(spec.INVALID_CONFIG, f"{part!r} is none of {', '.join(PARTS)}")
        if not at:
            of = secrets.token_hex(8)
            _make_room(kept)
            kept[of] = _Made(part, await _compressed(PARTS[part], config), time.monotonic())
        made = kept.get(of)
        if made is None or made.part != part:
            raise CniError(spec.TRY_AGAIN_LATER, f"this page of {part} is no longer kept: begin again")
        following = at + PAGE if at + PAGE < len(made.data) else None
        if following is None:
            del kept[of]
        data = base64.b64encode(made.data[at : at + PAGE]).decode()
        return {"data": data, "next": following, "of": of}

    return {"bugreport": bugreport}


def _make_room(kept: dict[str, _Made]) -> None:
    for of, made in list(kept.items()):
        if time.monotonic() - made.when > KEPT_S:
            del kept[of]
    while len(kept) >= MOST_KEPT:
        del kept[next(iter(kept))]


async def _compressed(part: Part, config: Config) -> bytes:
    lines = await part(config)
    return await asyncio.to_thread(compress, lines)


def compress(lines: Lines, largest: int = LARGEST) -> bytes:
    """The lines, as far as they are no more than so many bytes."""
    packer = zlib.compressobj()
    packed, size = bytearray(), 0
    for line in lines:
        data = line.encode(errors="replace") + b"\n"
        size += len(data)
        if size > largest:
            packed += packer.compress(b"(the rest is cut off)\n")
            break
        packed += packer.compress(data)
    return bytes(packed + packer.flush())


# The parts


async def _rules(config: Config) -> Lines:
    """podwall's tables, an object a line; listed by a libnftables of its own, so that no commit waits."""
    async with Kernel() as kernel:
        listings = [await kernel.listing(table) for table in sorted(OWN_TABLES)]
    return (line for listing in listings for line in objects(listing))


def objects(listing: bytes) -> Iterator[str]:
    """libnftables' objects, each as JSON of its own; not parsed, which would take ten times the memory."""
    start = len(_BEGIN)
    for found in _BETWEEN.finditer(listing):
        yield listing[start : found.start()].decode(errors="replace")
        start = found.end()
    if listing:
        yield listing[start : listing.rindex(_END)].decode(errors="replace")


async def _foreign(config: Config) -> Lines:
    rules = await asyncio.to_thread(foreign.read, {(of.family, of.name) for of in OWN_TABLES}, ())
    at_hooks = [each for each in rules.chains.values() if each.hook]
    at_hooks.sort(key=lambda each: (HOOKS.index(each.hook), each.priority))
    return [f"{each}: {each.kind} {each.hook} {each.priority}, policy {each.policy}" for each in at_hooks]


async def _links(config: Config) -> Lines:
    return await asyncio.to_thread(_listing, RTM_GETLINK, lambda body: parse_link(body)._asdict())


async def _addresses(config: Config) -> Lines:
    def told(body: bytes) -> dict[str, object]:
        index, ip, length = parse_address(body)
        return {"device": index, "address": f"{ip}/{length}"}

    return await asyncio.to_thread(_listing, RTM_GETADDR, told)


async def _routes(config: Config) -> Lines:
    return await asyncio.to_thread(_all_routes)


def _listing(kind: int, told: Callable[[bytes], Mapping[str, object]]) -> list[str]:
    with Rtnetlink() as kernel:
        return [json.dumps(told(body)) for body in kernel.listing(kind, _EMPTY_HEADER[kind])]


def _all_routes() -> list[str]:
    """Plain unicast routes of the main tables, and how many others there are."""
    found, others = [], 0
    with Rtnetlink() as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            for body in kernel.listing(RTM_GETROUTE, ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
                route = parse_route(body)
                if route is None:
                    others += 1
                    continue
                (ip, length), via = route.target, f" via {route.gateway}" if route.gateway else ""
                target = f"{ip}/{length}" if ip else "default"
                found.append(f"{target}{via} dev {route.device} proto {route.protocol}")
    return [*found, f"and {others} of other kinds or tables"]


async def _sysctls(config: Config) -> Lines:
    return await asyncio.to_thread(lambda: list(_settings(config.sysctl_dir)))


def _settings(root: Path) -> Iterator[str]:
    for pattern in _SETTINGS:
        place = pattern.removesuffix("/*")
        directories = [root / place]
        if place != pattern:
            names = sorted(each.name for each in (root / place).iterdir())
            # each Pod's link has its own, all alike
            directories = [root / place / name for name in names if not name.startswith("podwall")]
        for directory in directories:
            files = sorted(directory.iterdir()) if directory.is_dir() else [directory]
            for file in files:
                yield from _setting(root, file)


def _setting(root: Path, file: Path) -> Iterator[str]:
    try:
        if file.is_file():
            yield f"{file.relative_to(root)} = {file.read_text().strip()}"
    except OSError as error:
        yield f"{file.relative_to(root)}: {error.strerror}"  # stable_secret, and what has no value yet


async def _counters(config: Config) -> Lines:
    def read() -> Iterator[str]:
        for name in _COUNTERS:
            yield f"# /proc/{name}"
            try:
                yield from (Path("/proc") / name).read_text().splitlines()
            except OSError as error:
                yield str(error)

    return await asyncio.to_thread(lambda: list(read()))


async def _configuration(config: Config) -> Lines:
    values = ((each.name, getattr(config, each.name)) for each in dataclasses.fields(config))
    return [f"{name}: {value}" for name, value in values]


PARTS: Mapping[str, Part] = {
    "rules": _rules,
    "foreign-chains": _foreign,
    "links": _links,
    "addresses": _addresses,
    "routes": _routes,
    "sysctls": _sysctls,
    "counters": _counters,
    "configuration": _configuration,
}
"""Each part by its name."""
