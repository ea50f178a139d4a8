"""What several Services may want or have: ports of addresses, of which one gets each, and endpoints.

Claim(10.96.0.1, TCP, 80)   wanted by shop/web, a/young   -> the oldest has it
(10.244.1.7, 8080)          of shop/web, shop/api         -> one number for both
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, TypeVar

from agent.compile import service_chains as chains
from agent.compile.endpoints import Backend
from agent.compile.service import Claim
from agent.compile.service_ids import Numbers, backend_digest

ServiceKey: TypeAlias = tuple[str, str]
K = TypeVar("K")
Users: TypeAlias = dict[K, ServiceKey | set[ServiceKey]]
"""Who uses something; a set only where there are several."""


class Claims:
    """Who wants which port of which address, and who has it: the oldest."""

    def __init__(self) -> None:
        self._wanted: Users[Claim] = {}
        self._rank: dict[ServiceKey, tuple[float, ServiceKey]] = {}

    def holder(self, claim: Claim) -> ServiceKey | None:
        wanted = self._wanted.get(claim)
        return min(wanted, key=self._rank.__getitem__) if isinstance(wanted, set) else wanted

    def move(
        self, key: ServiceKey, age: float, before: Iterable[Claim], after: Iterable[Claim]
    ) -> set[ServiceKey]:
        """Let a Service want other claims than before; returns those that want one of either as well."""
        rivals: set[ServiceKey] = set()
        for claim in before:
            rivals |= _leave(self._wanted, claim, key)
        self._rank[key] = age, key
        for claim in after:
            rivals |= _enter(self._wanted, claim, key)
        if not after:
            del self._rank[key]
        return rivals


class Endpoints:
    """The endpoints of one family that are in some list, and whose they are."""

    def __init__(self) -> None:
        self.numbers = Numbers[Backend](chains.MAGIC, backend_digest)
        self._of: Users[Backend] = {}

    def move(self, key: ServiceKey, before: set[Backend], after: set[Backend]) -> set[ServiceKey]:
        """Let a Service have other endpoints; whose endpoints' numbers changed."""
        changed: set[Backend] = set()
        for backend in before - after:
            if not _leave(self._of, backend, key):
                changed |= self.numbers.drop(backend)
        for backend in after - before:
            if not _enter(self._of, backend, key):
                changed |= self.numbers.take(backend)
        return set().union(*(_several(self._of[backend]) for backend in changed if backend in self._of))


def _enter(users: Users[K], of: K, key: ServiceKey) -> set[ServiceKey]:
    """Let a Service use something; the others that do."""
    others = _several(users[of]) if of in users else set()
    users[of] = others | {key} if others else key
    return others


def _leave(users: Users[K], of: K, key: ServiceKey) -> set[ServiceKey]:
    """Let a Service use something no longer; the others that do."""
    others = _several(users.pop(of)) - {key}
    if others:
        users[of] = others if len(others) > 1 else next(iter(others))
    return others


def _several(users: ServiceKey | set[ServiceKey]) -> set[ServiceKey]:
    return users if isinstance(users, set) else {users}
