"""The cluster that a command asks about: a real one by kubeconfig, the lab, or a directory of manifests.

-f FILE|DIR           what manifests say, statuses included
--lab                 the lab of this machine
--kubeconfig, --context, else KUBECONFIG, else ~/.kube/config, else the lab if one is up
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import click

from agent.cli.ask import Unreachable
from agent.cli.names import NAMESPACE, completes, contexts
from agent.cluster.model import KINDS, Endpoints, Kind, Object, Pod
from agent.cluster.store import Snapshot, snapshot_of
from agent.log import printable

if TYPE_CHECKING:  # importing these takes longer than a command's help may
    from agent.cli.agents import Agents
    from agent.cluster.client import ApiClient
    from agent.cluster.decode import AnyKind
    from agent.cluster.documents import Place
    from agent.cluster.manifests import Manifests
    from agent.cluster.model import Key
    from lab.state import Settings

    Places = Mapping[tuple[AnyKind, Key], Place]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_NAMESPACE = "default"
PAGE = 500
FILES = "a file or a directory; may be given several times."
"""What help says of an option that takes manifests."""

namespace_option = click.option(
    "-n",
    "--namespace",
    default=DEFAULT_NAMESPACE,
    show_default=True,
    help="The namespace of names that say none.",
    shell_complete=completes(NAMESPACE),
)
context_option = click.option(
    "--context",
    default="",
    help="The kubeconfig's context; else its current one.",
    shell_complete=contexts,
)
kubeconfig_option = click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path),
    help="The kubeconfig; else KUBECONFIG, or ~/.kube/config.",
)
lab_option = click.option(
    "--lab", is_flag=True, help="Ask the lab of this machine, also where there is a kubeconfig."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Which cluster, and the namespace of names that say none."""

    files: tuple[Path, ...]
    lab: bool
    kubeconfig: Path | None
    context: str
    namespace: str

    def snapshot(self, tell: Callable[[str], None] | None = None) -> Snapshot:
        """All objects as they are now; `tell` (else standard error) gets manifests' errors.

        Raises Unreachable.
        """
        if self.files:
            return _of_files(self.files, tell or _to_stderr)[0]
        kubeconfig = self._kubeconfig()
        if kubeconfig is None:
            return _of_lab(tell or _to_stderr)
        return _of_api(kubeconfig, self.context)

    def objects(self, tell: Callable[[str], None] | None = None) -> tuple[Snapshot, Places]:
        """As snapshot, and where each object stands in the manifests. Raises Unreachable."""
        if not self.files:
            return self.snapshot(tell), {}
        snapshot, found = _of_files(self.files, tell or _to_stderr)
        return snapshot, found.places

    def with_templates(self) -> tuple[Snapshot, tuple[Pod, ...]]:
        """As snapshot; manifests' with Pods by the templates of workloads that have none, and these Pods."""
        if not self.files:
            return self.snapshot(), ()
        from agent.explain.imagined import with_pods  # noqa: PLC0415 - only this way needs it

        snapshot, found = _of_files(self.files, _to_stderr)
        return with_pods(snapshot, (each.body for each in found.documents))

    def agents(self) -> Agents:
        """The nodes' agents; none when manifests are asked. Raises Unreachable."""
        from agent.cli.agents import Agents, by_api, by_sockets  # noqa: PLC0415 - manifests need none of it
        from agent.cluster.errors import ApiError  # noqa: PLC0415

        if self.files:
            return Agents({})
        kubeconfig = self._kubeconfig()
        if kubeconfig is None:
            return by_sockets(_lab_sockets())
        try:
            return by_api(api_client(kubeconfig, self.context))
        except ApiError as error:
            raise Unreachable(f"the API server cannot be asked: {error}") from error

    def nodes(self) -> tuple[str, ...]:
        """The names of the cluster's Nodes, whether they have an agent or not. Raises Unreachable."""
        if self.files:
            return tuple(sorted(self.snapshot().nodes))
        kubeconfig = self._kubeconfig()
        return tuple(_lab_sockets()) if kubeconfig is None else _nodes_of_api(kubeconfig, self.context)

    @property
    def named(self) -> bool:
        """Whether some cluster is said, or found: manifests, a kubeconfig, or a lab."""
        from lab.state import read_settings  # noqa: PLC0415 - only this question needs it

        return bool(self.files or self.lab or self._kubeconfig() or read_settings())

    def client(self) -> ApiClient | None:
        """The API server; None where the lab or manifests are asked."""
        kubeconfig = None if self.files else self._kubeconfig()
        return api_client(kubeconfig, self.context) if kubeconfig else None

    @property
    def live(self) -> bool:
        """Whether there are agents to ask: it is not manifests."""
        return not self.files

    @property
    def where(self) -> str:
        """Which cluster it is, as a person would say it."""
        if self.files:
            return ", ".join(map(str, self.files))
        kubeconfig = self._kubeconfig()
        if kubeconfig is None:
            return "the lab of this machine"
        return f"context {self.context}" if self.context else str(kubeconfig)

    def _kubeconfig(self) -> Path | None:
        return None if self.lab else self.kubeconfig or default_kubeconfig()


def cluster_options(command: F) -> F:
    """The options that say which cluster; the command gets them as one `asked`."""
    return _with_options(command, "-f", "--filename")


def cluster_options_from(command: F) -> F:
    """The same for a command whose -f is something else: manifests to ask are --from."""
    return _with_options(command, "--from")


def live_cluster_options(command: F) -> F:
    """The same for a command that asks agents, which manifests have none of."""
    return _with_options(command)


def _with_options(command: F, *flags: str) -> F:
    @functools.wraps(command)
    def gathered(
        lab: bool,
        kubeconfig: Path | None,
        context: str,
        namespace: str,
        asked_files: tuple[Path, ...] = (),
        **others: Any,
    ) -> Any:
        return command(asked=Asked(asked_files, lab, kubeconfig, context, namespace), **others)

    gathered = lab_option(kubeconfig_option(context_option(namespace_option(gathered))))
    if flags:
        gathered = click.option(
            *flags,
            "asked_files",
            type=click.Path(exists=True, path_type=Path),
            multiple=True,
            help=f"Ask manifests instead of a cluster: {FILES}",
        )(gathered)
    return gathered  # type: ignore[return-value]  # the same command with other parameters


def default_kubeconfig() -> Path | None:
    """The kubeconfig where no option names one; None without any."""
    if said := os.environ.get("KUBECONFIG"):
        return Path(said)
    usual = Path("~/.kube/config").expanduser()
    return usual if usual.is_file() else None


def _to_stderr(text: str) -> None:
    click.echo(printable(text), err=True)


def _manifests(files: tuple[Path, ...], tell: Callable[[str], None]) -> Manifests:
    from agent.cluster.manifests import load  # noqa: PLC0415 - only this way needs it

    found = load(files)
    for error in (*found.errors, *found.problems):
        tell(str(error))
    return found


def _of_files(files: tuple[Path, ...], tell: Callable[[str], None]) -> tuple[Snapshot, Manifests]:
    """What files say; of those that nobody has applied yet, what they would come to."""
    found = _manifests(files, tell)
    if any(isinstance(item, Pod) and item.ips for item in found.objects):
        return snapshot_of(found.objects), found
    from agent.cli.unapplied import NOTE, applied, is_unapplied  # noqa: PLC0415 - only this way needs it
    from lab.objects import ManifestError  # noqa: PLC0415

    if not is_unapplied(found.documents):
        return snapshot_of(found.objects), found
    try:
        objects = applied(found.documents)
    except ManifestError as error:
        tell(f"no Pod of these files has an address, and they cannot be applied: {error}")
        return snapshot_of(found.objects), found
    tell(NOTE)
    return snapshot_of(objects), found


def _of_lab(tell: Callable[[str], None]) -> Snapshot:
    """What the lab's agents see: the statuses that they write themselves stand beside the objects."""
    from agent.cluster.manifests import with_statuses  # noqa: PLC0415 - only this way needs it
    from lab.names import RUN  # noqa: PLC0415

    _lab_settings()
    objects = _manifests((RUN / "cluster",), tell).objects
    statuses = RUN / "status"
    written = _manifests((statuses,), tell).objects if statuses.is_dir() else []
    return snapshot_of(with_statuses(objects, written))


def _lab_settings() -> Settings:
    from lab.state import read_settings  # noqa: PLC0415 - only this way needs it

    settings = read_settings()
    if settings is None or not settings.complete:
        raise Unreachable(
            "there is no kubeconfig and no lab is up: --kubeconfig FILE, `podwall lab up`, or -f DIR"
        )
    return settings


def _lab_sockets() -> dict[str, Path]:
    from lab.names import node  # noqa: PLC0415 - only this way needs it

    settings = _lab_settings()
    places = [node(number, routed=settings.routed) for number in range(1, settings.nodes + 1)]
    return {place.name: place.directory / "agent.sock" for place in places}


def api_client(kubeconfig: Path, context: str) -> ApiClient:
    """The API server that a kubeconfig names."""
    from agent.cluster.client import ApiClient  # noqa: PLC0415 - only this way needs it
    from agent.cluster.credentials import credential_source  # noqa: PLC0415

    return ApiClient(credential_source(kubeconfig=kubeconfig, context=context), "podwall")


def listed(client: ApiClient, path: str) -> Iterator[Any]:
    """The items of a list, page by page. Raises ApiError."""
    joint, continues = "&" if "?" in path else "?", ""
    while True:
        query = f"limit={PAGE}" + (f"&continue={quote(continues, safe='')}" if continues else "")
        page = client.read(f"{path}{joint}{query}")
        yield from page["items"]
        continues = page["metadata"].get("continue") or ""
        if not continues:
            return


def _nodes_of_api(kubeconfig: Path, context: str) -> tuple[str, ...]:
    from agent.cluster.errors import ApiError  # noqa: PLC0415 - only this way needs it

    client = api_client(kubeconfig, context)
    try:
        return tuple(sorted(node["metadata"]["name"] for node in listed(client, "/api/v1/nodes")))
    except ApiError as error:
        raise Unreachable(f"the API server cannot be asked: {error}") from error
    finally:
        client.close()


def _of_api(kubeconfig: Path, context: str) -> Snapshot:
    from agent.cluster.client import read_page  # noqa: PLC0415 - only this way needs it
    from agent.cluster.errors import ApiError  # noqa: PLC0415

    client = api_client(kubeconfig, context)

    def all_of(kind: Kind) -> list[Object]:
        connection = client.connection()
        try:
            found: list[Object] = []
            continues = ""
            while True:
                page = read_page(connection, kind, continues=continues)
                found += (each for each in page.objects if not isinstance(each, Endpoints))
                continues = page.continues
                if not continues:
                    return found
        finally:
            connection.close()

    try:
        with ThreadPoolExecutor(len(KINDS)) as threads:
            lists = list(threads.map(all_of, KINDS))
    except ApiError as error:
        raise Unreachable(f"the API server cannot be asked: {error}") from error
    finally:
        client.close()
    return snapshot_of(each for objects in lists for each in objects)
