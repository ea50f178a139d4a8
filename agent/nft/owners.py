"""Who wants what: the wanted ruleset as the union of what its owners want.

    ("node", "n1")       --> elements of @cluster, @pod_cidrs
    ("link", "c0ffee..") --> elements of @links4, @links6                 union = the ruleset
    ("links",)           --> tables, chains, sets

An owner is compiled alone and replaces what it owned before. An item that several owners want is there as
long as one of them wants it. Where they want it differently the smallest owner wins, whatever the order of
events; the compilers see to it that this does not happen. What a replacement costs is the size of that
owner, and what a transaction costs is the size of the change.
"""

from collections.abc import Iterable

from agent.nft.diff import Change
from agent.nft.model import Item, ItemId, Owner, Ruleset


class Desired:
    """The wanted ruleset, by owner, and what changed in it since the last `take`."""

    def __init__(self) -> None:
        self.ruleset = Ruleset()
        self._owned: dict[Owner, dict[ItemId, Item]] = {}
        self._holder: dict[ItemId, Owner | set[Owner]] = {}  # a set only where there are several
        self._before: dict[ItemId, Item | None] = {}

    @property
    def owners(self) -> frozenset[Owner]:
        """Those that want something."""
        return frozenset(self._owned)

    def owned(self, owner: Owner) -> tuple[Item, ...]:
        """What an owner wants now."""
        return tuple(self._owned.get(owner, {}).values())

    def replace(self, owner: Owner, items: Iterable[Item]) -> None:
        """Let an owner want exactly these items, none to remove it.

        ValueError if two of them have one name and differ.
        """
        wanted: dict[ItemId, Item] = {}
        for item in items:
            if wanted.setdefault(item.id, item) != item:
                raise ValueError(f"{owner} wants {item.id} in two ways")
        had = self._owned.pop(owner, {})
        self._owned[owner] = wanted
        for name in had.keys() - wanted.keys():
            self._release(owner, name, had[name])
        for name, item in wanted.items():
            if had.get(name) != item:
                self._hold(owner, name, item)
        if not wanted:
            del self._owned[owner]

    def take(self) -> dict[ItemId, Change]:
        """The changes since the last call; what changed back is left out."""
        changes = {name: Change(before, self.ruleset.get(name)) for name, before in self._before.items()}
        self._before = {}
        return {name: change for name, change in changes.items() if change.before != change.after}

    def forget(self) -> None:
        """Let the changes since the last call go, where the whole ruleset is compared anyway."""
        self._before = {}

    def _hold(self, owner: Owner, name: ItemId, item: Item) -> None:
        self._remember(name)
        holder = self._holder.get(name)
        if holder is None or holder == owner:
            self._holder[name] = owner
            self.ruleset.add(item)
            return
        holders = holder if isinstance(holder, set) else {holder}
        holders.add(owner)
        self._holder[name] = holders
        self.ruleset.add(self._owned[min(holders)][name])

    def _release(self, owner: Owner, name: ItemId, item: Item) -> None:
        self._remember(name)
        holder = self._holder[name]
        if not isinstance(holder, set):
            del self._holder[name]
            self.ruleset.discard(item)
            return
        holder.discard(owner)
        self.ruleset.add(self._owned[min(holder)][name])
        if len(holder) == 1:
            self._holder[name] = holder.pop()

    def _remember(self, name: ItemId) -> None:
        if name not in self._before:
            self._before[name] = self.ruleset.get(name)
