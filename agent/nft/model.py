"""The words of nftables as values: tables, chains with their rules, sets, maps and elements.

Everything that podwall says to the kernel is made of these values, and everything that it reads back becomes
them again, so that "is the kernel as it should be?" is one comparison, and a packet can be judged by the same
values that were loaded (no text is ever interpreted).

    Table
     +- Chain (Hook: where packets enter it; none: reached by jump, goto or verdict map)
     |   +- Rule: statements, left to right; a Match that fails ends the rule
     |       Match(Payload("ip", "saddr"), "==", Named("peers"))   Counter()   ACCEPT
     +- Set (a map when it has data)
         +- Element: key, and data in a map

Values inside are numbers, `ipaddress` objects, interface names and tuples of them (a concatenation).
Constants of the kernel (protocols, connection states, ICMP types) are plain numbers; the enumerations here
name them.

What the kernel implies need not be said: `Payload("tcp", "flags")` asks for TCP by itself and
`Payload("ip6", "saddr")` for IPv6, as nft itself adds and hides these conditions. `agent.nft.normal` brings
different spellings of one condition to one form; rules are compared in that form.

An owner (a Node, a Pod's link, a policy class) is no part of an item: `agent.nft.owners` knows
which owner has which items.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import force_setattr

Family = Literal["inet", "ip", "ip6", "arp", "netdev", "bridge"]
Operator = Literal["==", "!=", "<", ">", "<=", ">=", "in", "!"]  # in: any bit of right is set; !: none is
Owner: TypeAlias = tuple[str, ...]


class Proto(IntEnum):
    """Transport protocols, as in `meta l4proto`."""

    ICMP = 1
    IGMP = 2
    TCP = 6
    UDP = 17
    ICMPV6 = 58
    SCTP = 132


class NfProto(IntEnum):
    """Network families of a packet in an `inet` table, as in `meta nfproto`."""

    IPV4 = 2
    IPV6 = 10


class EtherType(IntEnum):
    """Link-layer protocols, as in `meta protocol`."""

    IP = 0x0800
    ARP = 0x0806
    VLAN = 0x8100
    IP6 = 0x86DD


class CtState(IntFlag):
    """States of a packet's connection, as in `ct state`."""

    INVALID = 1
    ESTABLISHED = 2
    RELATED = 4
    NEW = 8
    UNTRACKED = 64


class CtStatus(IntFlag):
    """What happened to a connection so far, as in `ct status`."""

    EXPECTED = 1
    SEEN_REPLY = 2
    ASSURED = 4
    CONFIRMED = 8
    SNAT = 16
    DNAT = 32
    DYING = 512


class CtDirection(IntEnum):
    """Directions of a connection, as in `ct direction`."""

    ORIGINAL = 0
    REPLY = 1


class TcpFlag(IntFlag):
    """Flags of the TCP header."""

    FIN = 1
    SYN = 2
    RST = 4
    PSH = 8
    ACK = 16
    URG = 32
    ECN = 64
    CWR = 128


class FibType(IntEnum):
    """Kinds of a route's destination, as in `fib daddr type`."""

    UNSPEC = 0
    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8


class PacketType(IntEnum):
    """To whom a frame was addressed, as in `meta pkttype`."""

    HOST = 0
    BROADCAST = 1
    MULTICAST = 2
    OTHER = 3


class IcmpType(IntEnum):
    """ICMP types, as in `icmp type`."""

    ECHO_REPLY = 0
    DESTINATION_UNREACHABLE = 3
    SOURCE_QUENCH = 4
    REDIRECT = 5
    ECHO_REQUEST = 8
    ROUTER_ADVERTISEMENT = 9
    ROUTER_SOLICITATION = 10
    TIME_EXCEEDED = 11
    PARAMETER_PROBLEM = 12


class Icmp6Type(IntEnum):
    """ICMPv6 types, as in `icmpv6 type`."""

    DESTINATION_UNREACHABLE = 1
    PACKET_TOO_BIG = 2
    TIME_EXCEEDED = 3
    PARAMETER_PROBLEM = 4
    ECHO_REQUEST = 128
    ECHO_REPLY = 129
    MLD_LISTENER_QUERY = 130
    MLD_LISTENER_REPORT = 131
    MLD_LISTENER_DONE = 132
    ROUTER_SOLICIT = 133
    ROUTER_ADVERT = 134
    NEIGHBOR_SOLICIT = 135
    NEIGHBOR_ADVERT = 136
    REDIRECT = 137
    ROUTER_RENUMBERING = 138
    MLD2_LISTENER_REPORT = 143


class ArpOperation(IntEnum):
    """Operations of ARP, as in `arp operation`."""

    REQUEST = 1
    REPLY = 2


# Values


class Range(Struct, frozen=True, order=True, gc=False):
    """All values from `low` to `high`, both included."""

    low: "int | IPv4Address | IPv6Address"
    high: "int | IPv4Address | IPv6Address"


class Wildcard(Struct, frozen=True, gc=False):
    """All interface names that begin with `prefix`."""

    prefix: str


class Named(Struct, frozen=True, gc=False):
    """A set or map of the same table, by its name."""

    name: str


Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Scalar: TypeAlias = int | str | Address | Network | Range | Wildcard
Key: TypeAlias = Scalar | tuple[Scalar, ...]


# Expressions: what a packet, its connection or the host says


class Meta(Struct, frozen=True, gc=False):
    """A fact beside the packet: iifname, oifname, l4proto, nfproto, mark, protocol, pkttype, ..."""

    key: str


class Ct(Struct, frozen=True, gc=False):
    """A fact of the connection: state, mark, status; with a direction also "ip saddr", "proto-dst"."""

    key: str
    direction: Literal["", "original", "reply"] = ""


class Payload(Struct, frozen=True, gc=False):
    """A header field as nft names it: ip saddr, th dport, tcp flags, icmpv6 type, arp "saddr ip"."""

    protocol: str
    field: str


class Exthdr(Struct, frozen=True, gc=False):
    """An IPv6 extension header (hbh, rt, frag, dst, mh); without a field: whether it is there, as a bool."""

    name: str
    field: str = ""


class Fib(Struct, frozen=True, gc=False):
    """What the routing tables say: `result` is type, oif or oifname; with a bool: is there an oif."""

    flags: tuple[str, ...]
    result: str


class Numgen(Struct, frozen=True, gc=False):
    """A number from `offset` to `offset + mod - 1`, random or counting."""

    mode: Literal["random", "inc"]
    mod: int
    offset: int = 0


class Hash(Struct, frozen=True):
    """A number from 0 to `mod - 1` that follows from what another expression says (jhash)."""

    of: "Expression"
    mod: int
    seed: int


class Concat(Struct, frozen=True):
    """Several facts at once, as the key of a set or map."""

    parts: "tuple[Expression, ...]"


class Lookup(Struct, frozen=True):
    """What a map holds for a key; nothing there: the rule ends."""

    key: "Expression"
    data: "Named | frozenset[tuple[Key, Key]]"


class Bits(Struct, frozen=True):
    """A bitwise operation with a constant."""

    left: "Expression"
    operator: Literal["&", "|", "^", "<<", ">>"]
    right: int


Expression: TypeAlias = Meta | Ct | Payload | Exthdr | Fib | Numgen | Hash | Concat | Lookup | Bits


# Statements


class Match(Struct, frozen=True):
    """The rule goes on only when this holds; `right` is a value, a set of values, or a named set.

    A set of values is a set of its own in the kernel, which walks through all sets of a table to make or find
    one: 2,000 rules with one each take 530 ms to load, without 20 ms (kernel 6.18), and every later commit
    lists them. Where there may be many, share a named set or write one rule for each value.
    """

    left: Expression
    operator: Operator
    right: "Key | frozenset[Key] | Named"

    def __post_init__(self) -> None:
        if isinstance(self.right, frozenset):
            force_setattr(self, "right", frozenset(map(settled, self.right)))
        elif not isinstance(self.right, Named):
            force_setattr(self, "right", settled(self.right))


class Assign(Struct, frozen=True):
    """`meta mark set ...`, `ct mark set ...`."""

    key: Meta | Ct | Payload
    value: "Expression | int"


class Verdict(Struct, frozen=True, gc=False):
    """What becomes of the packet; jump and goto name a chain of the same table."""

    kind: Literal["accept", "drop", "continue", "return", "jump", "goto"]
    chain: str = ""


ACCEPT, DROP, CONTINUE, RETURN = Verdict("accept"), Verdict("drop"), Verdict("continue"), Verdict("return")


class VerdictMap(Struct, frozen=True):
    """The verdict that a map holds for a key; nothing there: the rule ends and the next one follows."""

    key: Expression
    data: "Named | frozenset[tuple[Key, Verdict]]"


class Nat(Struct, frozen=True):
    """dnat, snat, redirect or masquerade; `family` is needed with an address in `inet` tables.

    A map whose data is a concatenation of address and port gives both: then `port` stays empty.
    """

    kind: Literal["dnat", "snat", "redirect", "masquerade"]
    family: Literal["", "ip", "ip6"] = ""
    address: "Expression | Address | Range | None" = None
    port: "Expression | int | Range | None" = None
    flags: frozenset[str] = frozenset()  # random, fully-random, persistent


class Reject(Struct, frozen=True, gc=False):
    """Refuse: "tcp reset" (after a match of TCP), or an ICMP error with a code by nft's name."""

    kind: Literal["tcp reset", "icmp", "icmpv6", "icmpx"] = "icmpx"
    code: str = "port-unreachable"


class Log(Struct, frozen=True, gc=False):
    """Log; to a netlink group (NFLOG) when given, with at most `snaplen` bytes of the packet."""

    prefix: str = ""
    group: int | None = None
    snaplen: int = 0
    queue_threshold: int = 0


class Limit(Struct, frozen=True, gc=False):
    """Holds for at most `rate` packets `per` second, minute, hour or day; `over`: holds for those beyond."""

    rate: int
    per: Literal["second", "minute", "hour", "day", "week"] = "second"
    burst: int = 5
    over: bool = False


class Counter(Struct, frozen=True, gc=False):
    """Count packets and bytes; the count itself is no part of the value."""


class Notrack(Struct, frozen=True, gc=False):
    """Leave the packet out of connection tracking."""


class Update(Struct, frozen=True):
    """Add, refresh or delete an element of a dynamic set or map; timeout in seconds, 0: that of the set."""

    operator: Literal["add", "update", "delete"]
    set: str
    key: Expression
    data: "Expression | int | None" = None
    timeout: int = 0
    statements: "tuple[Counter | Limit, ...]" = ()


class Unparsed(Struct, frozen=True, gc=False):
    """Something in the kernel that this model does not know, as listed; podwall never writes it."""

    text: str


Statement: TypeAlias = (
    Match | Assign | Verdict | VerdictMap | Nat | Reject | Log | Limit | Counter | Notrack | Update | Unparsed
)


# Items


class TableName(NamedTuple):
    """A table's family and name."""

    family: Family
    name: str


class ChainName(NamedTuple):
    """Where a chain is: its table, and its own name."""

    table: TableName
    name: str


class SetName(NamedTuple):
    """Where a set or map is; `kind` keeps it apart from a chain of the same name."""

    table: TableName
    name: str
    kind: Literal["set"] = "set"


class Table(Struct, frozen=True, gc=False):
    """A table; flags (dormant, owner, persist) are given when it is made and not compared.

    nft 1.0.6 cannot list a table with flags as JSON (it aborts), so podwall gives its own none there.
    """

    family: Family
    name: str
    flags: frozenset[str] = frozenset()

    @property
    def id(self) -> TableName:
        """What names it in a ruleset."""
        return TableName(self.family, self.name)


class Rule(Struct, frozen=True):
    """Statements, and a comment for the reader of `nft list table` (at most 127 bytes)."""

    statements: tuple[Statement, ...]
    comment: str = ""


class Hook(Struct, frozen=True, gc=False):
    """Where a base chain stands; `device` only in the family netdev (read back from nft 1.0.7)."""

    type: Literal["filter", "nat", "route"]
    hook: Literal["prerouting", "input", "forward", "output", "postrouting", "ingress", "egress"]
    priority: int
    policy: Literal["accept", "drop"] = "accept"
    device: str = ""


class Chain(Struct, frozen=True):
    """A chain and all its rules, in order."""

    table: TableName
    name: str
    rules: tuple[Rule, ...] = ()
    hook: Hook | None = None

    @property
    def id(self) -> ChainName:
        """What names it in a ruleset."""
        return ChainName(self.table, self.name)


class Set(Struct, frozen=True):
    """A set, or with `data` a map; types by nft's names: ipv4_addr, inet_proto, mark, ifname, verdict, ...

    flags: interval, timeout, constant, and dynamic for a set that rules fill: its elements come from packets
    and are neither compared nor written. timeout and gc_interval in seconds; size 0: no limit.
    """

    table: TableName
    name: str
    type: tuple[str, ...]
    data: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    size: int = 0
    timeout: int = 0
    gc_interval: int = 0
    comment: str = ""

    @property
    def id(self) -> SetName:
        """What names it in a ruleset."""
        return SetName(self.table, self.name)

    @property
    def dynamic(self) -> bool:
        """Whether packets fill it."""
        return "dynamic" in self.flags


class Element(Struct, frozen=True, gc=False):
    """One element of a set or map; a key or datum of several parts is a tuple."""

    set: SetName
    key: Key
    data: "Key | Verdict | None" = None
    comment: str = ""

    def __post_init__(self) -> None:
        if type(self.key) is tuple or isinstance(self.key, (Range, IPv4Network, IPv6Network)):
            force_setattr(self, "key", settled(self.key))

    @property
    def id(self) -> "tuple[SetName, Key]":
        """What names it in a ruleset."""
        return self.set, self.key


Item: TypeAlias = Table | Chain | Set | Element
ItemId: TypeAlias = TableName | ChainName | SetName | tuple[SetName, Key]


class Ruleset:
    """Tables, chains, sets and elements by their names; what the kernel holds, or should.

    A copy shares the elements of each set until either side changes that set.
    """

    __slots__ = ("_shared", "chains", "elements", "sets", "tables")

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.tables: dict[TableName, Table] = {}
        self.chains: dict[ChainName, Chain] = {}
        self.sets: dict[SetName, Set] = {}
        self.elements: dict[SetName, dict[Key, Element]] = {}
        self._shared: set[SetName] = set()
        for item in items:
            self.add(item)

    def add(self, item: Item) -> None:
        """Put an item in, in the place of one with the same name."""
        if isinstance(item, Element):
            self._own_elements(item.set)[item.key] = item
        elif isinstance(item, Chain):
            self.chains[item.id] = item
        elif isinstance(item, Set):
            self.sets[item.id] = item
        else:
            self.tables[item.id] = item

    def discard(self, item: Item) -> None:
        """Take the item of this name out, if there is one."""
        if isinstance(item, Element):
            of = self._own_elements(item.set)
            of.pop(item.key, None)
            if not of:
                del self.elements[item.set]
        elif isinstance(item, Chain):
            self.chains.pop(item.id, None)
        elif isinstance(item, Set):
            self.sets.pop(item.id, None)
        else:
            self.tables.pop(item.id, None)

    def get(self, name: ItemId) -> Item | None:
        """The item of this name, or None."""
        if isinstance(name, TableName):
            return self.tables.get(name)
        if isinstance(name, ChainName):
            return self.chains.get(name)
        if isinstance(name, SetName):
            return self.sets.get(name)
        return self.elements.get(name[0], {}).get(name[1])

    def copy(self) -> "Ruleset":
        """The same items, for a reader who must not see later changes."""
        made = Ruleset()
        made.tables, made.chains, made.sets = dict(self.tables), dict(self.chains), dict(self.sets)
        made.elements = dict(self.elements)
        self._shared, made._shared = set(self.elements), set(self.elements)
        return made

    def _own_elements(self, name: SetName) -> dict[Key, Element]:
        """The elements of a set, to be changed."""
        of = self.elements.setdefault(name, {})
        if name in self._shared:
            self._shared.discard(name)
            of = self.elements[name] = dict(of)
        return of

    def items(self) -> Iterator[Item]:
        """All items, tables first and elements last."""
        yield from self.tables.values()
        yield from self.chains.values()
        yield from self.sets.values()
        for of in self.elements.values():
            yield from of.values()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ruleset):
            return NotImplemented
        return (self.tables, self.chains, self.sets, self.elements) == (
            other.tables,
            other.chains,
            other.sets,
            other.elements,
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Ruleset({list(self.items())!r})"


# One form for one meaning


def settled(value: Key) -> Key:
    """The value in the form in which the kernel lists it: a network of one address is that address, ..."""
    return tuple(map(_scalar, value)) if isinstance(value, tuple) else _scalar(value)


def _scalar(value: Scalar) -> Scalar:
    if isinstance(value, (IPv4Network, IPv6Network)):
        return value.network_address if value.prefixlen == value.max_prefixlen else value
    if isinstance(value, Range):
        return _range(value)
    return value


def _range(value: Range) -> Scalar:
    if value.low == value.high:
        return value.low
    if isinstance(value.low, int):
        return value
    size = int(value.high) - int(value.low) + 1
    if size > 0 and size & (size - 1) == 0 and int(value.low) % size == 0:
        kind = IPv4Network if isinstance(value.low, IPv4Address) else IPv6Network
        return kind((int(value.low), value.low.max_prefixlen - size.bit_length() + 1))
    return value
