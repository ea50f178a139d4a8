"""Random NetworkPolicies, chosen so that most Pods are isolated and many packets meet an allow rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any


class PolicyChance(random.Random):
    """Draws from few labels, `namespaces`, `blocks` (ipBlock) and `ports`, so that things meet."""

    namespaces: Sequence[str]
    blocks: Sequence[dict[str, Any]]
    ports: Sequence[dict[str, Any]]

    def happens(self, of_ten: int) -> bool:
        return self.randrange(10) < of_ten

    def some(self, make: Callable[[], Any], *counts: int) -> list[Any]:
        return [make() for _ in range(self.choice(counts))]

    def labels(self) -> dict[str, str]:
        said = {"app": self.choice(("web", "web", "db"))} if self.happens(8) else {}
        return said | ({"tier": self.choice(("a", "b", ""))} if self.happens(4) else {})

    def policy_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"podSelector": self._selector()}
        if self.happens(8):
            spec["ingress"] = self.some(lambda: self._rule("from"), 0, 1, 1, 2)
        if self.happens(7):
            spec["egress"] = self.some(lambda: self._rule("to"), 0, 1, 1, 2)
        if self.happens(6):
            spec["policyTypes"] = self.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"]))
        return spec

    def _rule(self, peers: str) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self.happens(8):
            said[peers] = self.some(self._peer, 0, 1, 1, 1, 2, 3)
        if self.happens(6):
            said["ports"] = self.some(lambda: self.choice(self.ports), 0, 1, 1, 1, 2, 3)
        return said

    def _peer(self) -> dict[str, Any]:
        kind = self.choice(("pods", "namespaces", "both", "block"))
        if kind == "block":
            return {"ipBlock": self.choice(self.blocks)}
        peer = {} if kind == "namespaces" else {"podSelector": self._selector()}
        if kind != "pods":
            one = {"matchLabels": {"kubernetes.io/metadata.name": self.choice(self.namespaces)}}
            peer["namespaceSelector"] = one if self.happens(4) else self._selector()
        return peer

    def _selector(self) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self.happens(3):
            said["matchLabels"] = {"app": "web"} if self.happens(7) else self.labels()
        if self.happens(3):
            said["matchExpressions"] = self.some(self._term, 1, 1, 2)
        return said

    def _term(self) -> dict[str, Any]:
        operator = self.choice(("In", "NotIn", "Exists", "DoesNotExist"))
        term: dict[str, Any] = {"key": self.choice(("app", "tier")), "operator": operator}
        if operator in {"In", "NotIn"}:
            term["values"] = self.sample(("web", "db", "a", ""), self.choice((1, 2, 3)))
        return term
