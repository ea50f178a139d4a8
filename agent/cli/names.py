"""The names that Tab offers, asked where the command itself would ask.

    words so far --split--> kinds and namespace --asked--> objects --offers--> words that may stand there
    deploy/shop/w           Pods of shop                                       deploy/shop/web

Of an API server nothing but metadata is listed, of the kinds that the word may still become. Nothing is said
while somebody types: who cannot be asked, or not in time, offers nothing. Names come from the cluster and go
to a shell: what is no Kubernetes name is not offered.
"""

from __future__ import annotations

import io
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

if TYPE_CHECKING:  # every command's help would pay for these
    from agent.cli.cluster import Asked
    from agent.cluster.client import ApiClient
    from agent.cluster.model import Kind, Pod, Service
    from agent.cluster.store import Snapshot

LIMIT_S = 2.0
WORKLOAD = "Workload"
"""Stands for whatever made Pods: a Deployment, a StatefulSet, ..."""

SHORT = {
    "Pod": "pod",
    "Service": "svc",
    "Node": "node",
    "Namespace": "ns",
    "NetworkPolicy": "netpol",
    "Deployment": "deploy",
    "StatefulSet": "sts",
    "DaemonSet": "ds",
    "ReplicaSet": "rs",
    "Job": "job",
}
"""The word that is offered for a kind, and no other kind is named in help."""

_LISTED: tuple[Kind, ...] = ("Pod", "Service", "Node", "Namespace", "NetworkPolicy")
_PORT_NAME = re.compile(r"[a-z0-9-]{1,15}")
_CONTEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]*")

Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]


@dataclass(frozen=True, slots=True)
class Takes:
    """What a parameter takes.

    `bare` are the kinds that are named by their name alone, `words` those that may stand before it (svc/api)
    and what they mean; `spaces` whether names may say a namespace, `ports` whether :PORT may follow.
    """

    bare: tuple[str, ...] = ()
    words: Mapping[str, str] | None = None
    spaces: bool = True
    ports: Literal["", "numbers", "all"] = ""
    files: bool = False
    others: tuple[str, ...] = ()


NODE = Takes(("Node",), spaces=False)
NAMESPACE = Takes(("Namespace",), spaces=False)


class Offer(NamedTuple):
    """A word, and what it is; after an open one something may follow without a space."""

    word: str
    help: str
    open: bool = False


class Named(NamedTuple):
    """Something that has a name; `of` are the Pods of a Pod or workload, or the Service."""

    kind: str
    namespace: str
    name: str
    of: tuple[Pod | Service, ...] = ()

    @property
    def sort(self) -> str:
        """The kind that parameters know it by."""
        return self.kind if self.kind in _LISTED else WORKLOAD

    @property
    def title(self) -> str:
        """The kind for a person; kinds of somebody else's may be any text."""
        return self.kind if self.kind in SHORT else WORKLOAD


@dataclass(frozen=True, slots=True)
class Word:
    """The unfinished word in its parts: svc/, the Service it means, shop, and the beginning of a name."""

    head: str
    kind: str
    space: str
    name: str


# What may stand there. Pure.


def split(text: str, takes: Takes) -> Word:
    """The parts of a word, as names are read."""
    head, slash, rest = text.partition("/")
    kind = (takes.words or {}).get(head.lower(), "") if slash else ""
    space, slash, name = (rest if kind else text).partition("/")
    space, name = (space, name) if slash else ("", space)
    return Word(f"{head}/" if kind else "", kind, space, name)


def kinds_of(word: Word, takes: Takes) -> set[Kind]:
    """The kinds that need to be known to go on with a word."""
    sorts = {word.kind} if word.kind else set(takes.bare)
    if not word.kind and not word.space:
        sorts |= set((takes.words or {}).values())
    if word.space:
        sorts -= {"Node", "Namespace"}
    elif takes.spaces:
        sorts.add("Namespace")
    return {kind for kind in _LISTED if kind in sorts} | ({"Pod"} if sorts - set(_LISTED) else set())


def offers(snapshot: Snapshot, takes: Takes, text: str, namespace: str) -> list[Offer]:
    """The words that begin so. Names that say no namespace are of this one; "" for all namespaces."""
    word = split(text, takes)
    place = word.space or namespace
    there = [each for each in _named(snapshot) if each.namespace in ("", place) or not place]
    if word.space:
        there = [each for each in there if each.namespace]
    found = [*_forms(there, takes, word, text), *_spaces(snapshot, takes, word, namespace)]
    found += [Offer(each, "") for each in takes.others]
    return _begun(found, text)


def meant(snapshot: Snapshot, takes: Takes, text: str, namespace: str) -> Pod | Service | None:
    """Whose ports a finished name's are: the Service's, or those of the first of the Pods."""
    word = split(text, takes)
    for each in _named(snapshot):
        fits = each.kind == word.kind if word.kind else each.sort in takes.bare
        if fits and each.of and (each.namespace, each.name) == (word.space or namespace, word.name):
            return each.of[0]
    return None


def ports_of(item: Pod | Service, takes: Takes, text: str) -> list[Offer]:
    """The ports that it declares, by number and by name, behind the name that was typed."""
    return _begun(_ports(item, takes, text.rpartition(":")[0]), text)


def _ports(item: Pod | Service, takes: Takes, name: str) -> Iterator[Offer]:
    for each in item.ports:
        if getattr(each, "role", "") == "init":
            continue
        known = _PORT_NAME.fullmatch(each.name) is not None
        yield Offer(f"{name}:{each.port}", f"{each.protocol} {each.name}" if known else each.protocol)
        if known and takes.ports == "all":
            yield Offer(f"{name}:{each.name}", f"{each.protocol} {each.port}")


def _begun(found: Iterable[Offer], text: str) -> list[Offer]:
    """Those that begin so, each word once, as what comes first."""
    words: dict[str, Offer] = {}
    for each in found:
        if each.word.startswith(text):
            words.setdefault(each.word, each)
    return list(words.values())


def _forms(there: Sequence[Named], takes: Takes, word: Word, text: str) -> Iterator[Offer]:
    """Each with the word for its kind, and by its name alone where that means it and nothing else."""
    space = f"{word.space}/" if word.space else ""
    known = {(each.sort, each.kind, each.name) for each in there if each.sort in takes.bare}
    ends = Counter(name for sort, _, name in known if sort != WORKLOAD)
    made = Counter(name for sort, _, name in known if sort == WORKLOAD)
    for each in there:
        if word.kind:
            if each.kind == word.kind:
                yield Offer(f"{word.head}{space}{each.name}", each.title, bool(takes.ports))
            continue
        alike = ends[each.name] + (made[each.name] if each.sort == WORKLOAD else 0)
        short = SHORT.get(each.kind, "")
        worded = not space and short in (takes.words or {})
        bare = each.sort in takes.bare and alike == 1
        if bare and (text or each.kind == "Pod" or not worded):
            yield Offer(f"{space}{each.name}", each.title, bool(takes.ports))
        if worded and (text or each.kind != "Pod" or not bare):
            yield Offer(f"{short}/{each.name}", each.title, bool(takes.ports))


def _spaces(snapshot: Snapshot, takes: Takes, word: Word, namespace: str) -> Iterator[Offer]:
    kinds = {word.kind} if word.kind else set(takes.bare)
    if takes.spaces and not word.space and kinds - {"Node", "Namespace"}:
        for each in _named(snapshot):
            if each.kind == "Namespace" and each.name != namespace:
                yield Offer(f"{word.head}{each.name}/", "Namespace", open=True)


def _named(snapshot: Snapshot) -> Iterator[Named]:
    """All that has a name of Kubernetes', in order: Pods, Services, workloads, nodes, ..."""
    from agent.cluster.values import object_name  # noqa: PLC0415 - only completion needs it

    for each in _objects(snapshot):
        if object_name(each.name) and (not each.namespace or object_name(each.namespace)):
            yield each


def _objects(snapshot: Snapshot) -> Iterator[Named]:
    from agent.explain.ends import Workload, workload_of  # noqa: PLC0415 - only completion needs it

    made: dict[Workload, list[Pod]] = {}
    for key, pod in sorted(snapshot.pods.items()):
        if not pod.finished:
            yield Named("Pod", *key, (pod,))
            made.setdefault(workload_of(pod), []).append(pod)
    yield from (Named("Service", *key, (of,)) for key, of in sorted(snapshot.services.items()))
    for workload, pods in sorted(made.items()):
        if workload.kind != "Pod":
            yield Named(*workload, tuple(pods))
    yield from (Named("Node", "", name) for name in sorted(snapshot.nodes))
    yield from (Named("NetworkPolicy", *key) for key in sorted(snapshot.policies))
    yield from (Named("Namespace", "", name) for name in sorted(snapshot.namespaces))


# Asking


def completes(takes: Takes | Callable[[click.Context], Takes], *, of_lab: bool = False) -> Completer:
    """What a parameter's `shell_complete` is to be; `of_lab` for commands that know the lab alone."""

    def items(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        wanted = takes(ctx) if callable(takes) else takes
        found = _quietly(lambda: _offered(ctx, wanted, incomplete, of_lab=of_lab))
        shown = [CompletionItem(each.word, help=each.help or None, open=each.open) for each in found]
        files = [CompletionItem(incomplete, type="file")] if wanted.files else []
        return [*files, *shown]  # bash's script forgets what comes before files

    return items


def contexts(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The contexts of the kubeconfig."""
    found = _quietly(lambda: _contexts(ctx))
    return [CompletionItem(each.word) for each in found if each.word.startswith(incomplete)]


class _TooLongError(BaseException):
    """Nobody waits any more; whatever is being done must not go on for that."""


def _quietly(answer: Callable[[], list[Offer]]) -> list[Offer]:
    """The answer, or nothing: without a word, and within the limit."""

    def late(*_: object) -> NoReturn:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with redirect_stderr(io.StringIO()):
            return answer()
    except (Exception, KeyboardInterrupt, _TooLongError):  # whatever it is, a prompt is no place for it
        return []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _offered(ctx: click.Context, takes: Takes, text: str, *, of_lab: bool) -> list[Offer]:
    asked = _asked(ctx, of_lab=of_lab)
    if asked is None:
        return []
    namespace = "" if ctx.params.get("everywhere") else asked.namespace
    name, colon, _ = text.rpartition(":")
    client = asked.client()
    try:
        if colon and takes.ports:
            word = split(name, takes)
            kinds = kinds_of(word, takes) - {"Node", "Namespace"}
            snapshot = _snapshot(asked, client, kinds, word.space or namespace)
            item = meant(snapshot, takes, name, namespace)
            return ports_of(_whole(client, item), takes, text) if item else []
        word = split(text, takes)
        snapshot = _snapshot(asked, client, kinds_of(word, takes), word.space or namespace)
        return offers(snapshot, takes, text, namespace)
    finally:
        if client:
            client.close()


def _asked(ctx: click.Context, *, of_lab: bool) -> Asked | None:
    """What the line says so far; None where it names files that cannot be read."""
    from agent.cli.cluster import DEFAULT_NAMESPACE, Asked  # noqa: PLC0415 - it imports this module

    said = ctx.params
    files = said.get("asked_files") or ()
    if not files and ctx.get_parameter_source("asked_files") is ParameterSource.COMMANDLINE:
        return None
    return Asked(
        files=files,
        lab=of_lab or bool(said.get("lab")),
        kubeconfig=said.get("kubeconfig"),
        context=said.get("context") or "",
        namespace=said.get("namespace") or DEFAULT_NAMESPACE,
    )


def _snapshot(asked: Asked, client: ApiClient | None, kinds: Iterable[Kind], namespace: str) -> Snapshot:
    """The objects; of an API server only these kinds, and their metadata. Raises what asking raises."""
    if client is None:
        return asked.snapshot(lambda _: None)
    from agent.cluster.errors import NotFound, Refused  # noqa: PLC0415 - only this way needs it
    from agent.cluster.store import snapshot_of  # noqa: PLC0415

    found: list[Any] = []
    for kind in kinds:
        with suppress(Refused, NotFound):  # who may not list one kind may list others
            found += client.metadata(kind, "" if kind in ("Node", "Namespace") else namespace)
    return snapshot_of(found)


def _whole(client: ApiClient | None, item: Pod | Service) -> Any:
    """The object with all that it says. Raises ApiError."""
    from agent.cluster.model import kind_of  # noqa: PLC0415 - only completion needs it

    return item if client is None else client.get(kind_of(item), item.key)


def _contexts(ctx: click.Context) -> list[Offer]:
    import yaml  # noqa: PLC0415 - only completion needs it

    from agent.cli.cluster import default_kubeconfig  # noqa: PLC0415 - it imports this module

    paths = str(ctx.params.get("kubeconfig") or default_kubeconfig() or "").split(":")
    found: list[str] = []
    for path in filter(None, paths):
        with suppress(OSError), open(path, encoding="utf-8") as file:  # noqa: PTH123 - as it is written
            content = yaml.safe_load(file) or {}
            found += (str(each["name"]) for each in content.get("contexts") or ())
    return [Offer(name, "") for name in dict.fromkeys(found) if _CONTEXT.fullmatch(name)]
