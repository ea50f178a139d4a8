"""Removes everything of podwall from a node: `python3 -m agent.uninstall --root /host`.

For after the agent is gone for good: links, routes and neighbours, tables, files. Pods that still run lose
their network. Each part is removed whatever became of the others, and what is gone already is no error.
conf/uninstall.yaml runs it on every node.

At the end it looks again, and says that nothing is left, or what is.

An agent that still runs would repair what is removed, so its end is awaited first: by the lock on its state.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from agent import nfnetlink
from agent.files import hold
from agent.nft.kernel import FAMILIES as FAMILIES_OF_TABLES
from agent.nft.kernel import OWN_TABLES, Kernel
from agent.pods.rtnetlink import PROTOCOL

FILES = ("etc/cni/net.d/*podwall*", "opt/cni/bin/*podwall*", "var/lib/podwall", "run/podwall")
STATE = "var/lib/podwall"
AGENT_LIMIT_S = 60.0
FAMILIES = (socket.AF_INET, socket.AF_INET6)


def main() -> int:
    """Remove all parts, say what was removed, and return 1 when something could not be."""
    parser = argparse.ArgumentParser(prog="agent.uninstall", description="remove podwall from this node")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the node's files are mounted")
    root = parser.parse_args().root
    try:
        held = await_agent(root / STATE)
    except TimeoutError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    failed = False
    for what, remove in (
        ("file", lambda: remove_files(root)),
        ("link", remove_links),
        ("route", remove_routes),
        ("table", remove_tables),
    ):
        failed |= not attempt(what, remove)
    if held is not None:
        os.close(held)
    return 1 if failed | (not attempt("part", lambda: look_again(root))) else 0


def await_agent(state: Path, limit_s: float = AGENT_LIMIT_S) -> int | None:
    """Return when no agent uses this directory; while the descriptor is open none can. None: there is none.

    Raises TimeoutError.
    """
    try:
        return hold(state, limit_s)
    except FileNotFoundError:
        return None
    except TimeoutError:
        raise TimeoutError(f"an agent still runs on this node ({state} is in use): remove it first") from None


def attempt(what: str, remove: Callable[[], Iterator[str]]) -> bool:
    """Remove the parts of one kind and say so; return whether all went."""
    try:
        for name in remove():
            print(f"removed {what} {name}", flush=True)
    except Exception as error:
        print(f"cannot remove every {what}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def remove_files(root: Path) -> Iterator[str]:
    """Remove the network configuration first, so that the runtime asks no more for Pods' links."""
    for path in files(root):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield str(path)


def remove_links() -> Iterator[str]:
    """Remove all devices whose name begins with podwall, Pods' links and the overlay's."""
    with IPRoute() as kernel:
        for link in _links(kernel):
            kernel.link("del", index=link["index"])
            yield str(link.get_attr("IFLA_IFNAME"))


def remove_routes() -> Iterator[str]:
    """Remove all routes that carry podwall's protocol number."""
    with IPRoute() as kernel:
        for route in _routes(kernel):
            kernel.route("del", **{**route, "attrs": route["attrs"]})
            yield _destination(route)


def remove_tables() -> Iterator[str]:
    """Remove podwall's tables."""

    async def remove() -> None:
        async with Kernel() as kernel:
            await kernel.commit("".join(f"add table {each}\ndelete table {each}\n" for each in names))

    names = sorted(f"{table.family} {table.name}" for table in OWN_TABLES)
    asyncio.run(remove())
    yield from names


def look_again(root: Path) -> Iterator[str]:
    """Say that nothing of podwall is left. Raises LeftError naming what is."""
    left = [*map(str, files(root)), *links(), *routes(), *tables()]
    if left:
        raise LeftError(f"still there: {', '.join(left)}")
    print("nothing of podwall is left", flush=True)
    yield from ()


class LeftError(Exception):
    """Something is there again, or still; the message names it."""


def files(root: Path) -> list[Path]:
    """podwall's files."""
    return [path for pattern in FILES for path in sorted(root.glob(pattern))]


def links() -> list[str]:
    """The devices whose name begins with podwall."""
    with IPRoute() as kernel:
        return [str(link.get_attr("IFLA_IFNAME")) for link in _links(kernel)]


def _links(kernel: IPRoute) -> Iterator[Any]:
    return (each for each in kernel.get_links() if each.get_attr("IFLA_IFNAME").startswith("podwall"))


def routes() -> list[str]:
    """The routes that carry podwall's protocol number."""
    with IPRoute() as kernel:
        return list(map(_destination, _routes(kernel)))


def _routes(kernel: IPRoute) -> Iterator[Any]:
    found = (route for family in FAMILIES for route in kernel.get_routes(family=family))
    return (route for route in found if route["proto"] == PROTOCOL)


def _destination(route: Any) -> str:
    return f"{route.get_attr('RTA_DST')}/{route['dst_len']}"


def tables() -> list[str]:
    """podwall's tables."""
    numbers = {name: number for number, name in FAMILIES_OF_TABLES.items()}
    with nfnetlink.connect() as sock:
        return [
            f"table {of.family} {of.name}"
            for of in sorted(OWN_TABLES)
            if nfnetlink.has(
                sock, nfnetlink.GET_TABLE, numbers[of.family], {nfnetlink.TABLE_NAME: of.name.encode()}
            )
        ]


if __name__ == "__main__":
    sys.exit(main())
