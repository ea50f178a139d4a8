"""Who is at the other end: one set of addresses per distinct selector, shared by all policies that use it.

    namespaceSelector: {team: a}            set peer4_<id> { 10.244.0.7, 10.244.3.2, ... }
    podSelector: {app: web}           -->   set peer6_<id> { fd00::7, ... }

    the same, egress to port `http`   -->   set ports4_<id> { 10.244.0.7 . tcp . 8080, ... }

A named port is the receiver's, and may be another number on every Pod: on egress it is looked up together
with the address.  A Pod that comes, goes or changes its labels is one element in each set that it is in,
however many policies use that set; the elements belong to the Pod (owner "member"), the set to the selector
(owner "peer").

An id has 96 bits: whoever may write policies chooses what it stands for, and must not find another selector
with the id of somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import TypeAlias

from agent.cluster.model import EVERYTHING, ContainerPort, Family, Pod, Protocol, SelectorPeer
from agent.compile.names import TABLE, comment
from agent.compile.packets import ADDRESS_TYPES, FAMILIES
from agent.compile.selectors import Selector
from agent.nft.model import Address, Element, Owner, Proto, Set, SetName

ID_DIGITS = 24
PROTO: dict[Protocol, Proto] = {"TCP": Proto.TCP, "UDP": Proto.UDP, "SCTP": Proto.SCTP}

Scope: TypeAlias = str | Selector | None
"""Namespaces: one by its name, those whose labels match, or all (those that nobody has declared too)."""

PortName: TypeAlias = tuple[Protocol, str]


def identity(*parts: str) -> str:
    """What stands for these parts in names, the same on every node and different for different parts."""
    joined = "".join(f"{len(part.encode())}:{part}" for part in parts)
    return sha256(joined.encode()).hexdigest()[:ID_DIGITS]


@dataclass(frozen=True, slots=True)
class Peer:
    """Pods, by their namespaces and labels; with `ports` only at their ports of these names."""

    scope: Scope
    pods: Selector
    ports: tuple[PortName, ...] = ()
    id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", identity(*self._parts()))

    def _parts(self) -> Iterator[str]:
        yield from ("in", self.scope) if isinstance(self.scope, str) else ()
        yield from ("where", *_words(self.scope)) if isinstance(self.scope, Selector) else ()
        yield from ("pods", *_words(self.pods))
        yield from ("ports", *(word for port in self.ports for word in port)) if self.ports else ()

    @property
    def owner(self) -> Owner:
        """Who owns its sets."""
        return ("peer", self.id)

    def name(self, family: Family) -> str:
        """Its set of this family."""
        return f"{'ports' if self.ports else 'peer'}{family}_{self.id}"

    def sets(self) -> tuple[Set, ...]:
        """Its sets, without elements."""
        port = ("inet_proto", "inet_service") if self.ports else ()
        return tuple(
            Set(TABLE, self.name(family), (ADDRESS_TYPES[family], *port), comment=comment(str(self)))
            for family in FAMILIES
        )

    def matches(self, pod: Pod) -> bool:
        """Whether a Pod of its namespaces is one of these Pods, now or once it has an address."""
        if pod.host_network or pod.finished or not self.pods.matches(pod.labels):
            return False
        return not self.ports or any(name in self.ports for name in named_ports(pod.ports))

    def elements(self, pod: Pod, addresses: Iterable[Address]) -> Iterator[Element]:
        """A matching Pod's elements; a port of its that has the same number under two names is one."""
        if not self.ports:
            for address in addresses:
                yield Element(_set(self, address), address)
            return
        numbers = named_ports(pod.ports)
        wanted = {(PROTO[port[0]], numbers[port]) for port in self.ports if port in numbers}
        for address in addresses:
            for protocol, number in wanted:
                yield Element(_set(self, address), (address, protocol, number))

    def __str__(self) -> str:
        where = f"[{self.scope}]" if isinstance(self.scope, Selector) else self.scope or "*"
        ports = "".join(f" {name}/{protocol}" for protocol, name in self.ports)
        return f"{where}: {self.pods}{ports}"


@lru_cache(maxsize=16384)
def peer_of(namespace: str, of: SelectorPeer, ports: tuple[PortName, ...] = ()) -> Peer:
    """The Pods that a peer of a policy in this namespace means."""
    pods = Selector(of.pod_selector or EVERYTHING)
    if of.namespace_selector is None:
        return Peer(namespace, pods, ports)
    return Peer(Selector(of.namespace_selector), pods, ports)


@lru_cache(maxsize=1024)
def anybody(ports: tuple[PortName, ...]) -> Peer:
    """Every Pod that has one of these ports: what a named port means where no Pods are named."""
    return Peer(None, Selector(EVERYTHING), ports)


def named_ports(ports: Iterable[ContainerPort]) -> dict[PortName, int]:
    """The number behind each name; the first container that uses a name has it, as for Services.

    An init container has ended when its Pod serves, so its ports are nobody's.
    """
    found: dict[PortName, int] = {}
    for port in ports:
        if port.name and port.role != "init":
            found.setdefault((port.protocol, port.name), port.port)
    return found


def _set(peer: Peer, address: Address) -> SetName:
    return SetName(TABLE, peer.name(address.version))


def _words(selector: Selector) -> Iterator[str]:
    for of in selector.requirements:
        yield from (of.key, of.operator, str(len(of.values)), *of.values)
