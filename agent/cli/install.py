"""`podwall install` and `podwall uninstall`: the packaged manifests applied, and removed, with progress.

    install     every object by server-side apply, one line each; then until all Nodes have a ready agent
    uninstall   the objects go; a Pod per node removes links, routes, tables and files and says what is left;
                then it goes, and so do the Leases

Applied again, nothing changes. The settings of an installed podwall stay unless --set names them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import click

from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, context_option, kubeconfig_option
from agent.cli.manifest import (
    INSTALL,
    UNINSTALL,
    SettingError,
    changed,
    objects,
    packaged,
    restarted_by_settings,
    with_image,
    with_settings,
)
from agent.cli.output import NEGATIVE
from agent.cluster.client import LEASE_LABELS, ApiClient
from agent.cluster.errors import ApiError, NotFound
from agent.explain.findings import listed
from agent.log import printable

F = TypeVar("F", bound=Callable[..., Any])
Object = Mapping[str, Any]

MANAGER = "podwall-install"
APPLY = "application/apply-patch+yaml"
NAMESPACE = "kube-system"
LOOK_EVERY_S = 0.5
AGAIN = "mend the node and run `podwall uninstall --yes` again"

NETWORKS = {
    "antrea": "Antrea",
    "aws-node": "the Amazon VPC CNI",
    "azure-cni": "Azure CNI",
    "calico": "Calico",
    "canal": "Canal",
    "cilium": "Cilium",
    "flannel": "Flannel",
    "kindnet": "kindnet",
    "kube-flannel": "Flannel",
    "kube-router": "kube-router",
    "ovnkube": "OVN-Kubernetes",
    "weave-net": "Weave Net",
}
"""How the DaemonSets of other network plugins begin."""


def api_options(command: F) -> F:
    """The options that say which API server, and how long to wait for it."""
    limit = click.option(
        "--timeout",
        "limit_s",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        default=180.0,
        show_default=True,
        help="How long to wait.",
    )
    return kubeconfig_option(context_option(limit(command)))


@click.command("install")
@click.option("--print", "only_print", is_flag=True, help="Print the manifest; ask and change nothing.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting, see docs/configuration.md; may be given several times.",
)
@click.option("--image", default="", help="The image's name, where it is not podwall:VERSION.")
@click.option(
    "--wait/--no-wait", default=True, help="Wait until every node's agent is ready.  [default: wait]"
)
@click.option("--force", is_flag=True, help="Also where another network plugin is active.")
@api_options
def install(
    *,
    only_print: bool,
    changes: tuple[str, ...],
    image: str,
    wait: bool,
    force: bool,
    kubeconfig: Path | None,
    context: str,
    limit_s: float,
) -> None:
    """Install podwall into a cluster, or bring an installed one up to date.

    \b
    podwall install                                  and wait until every node is ready
    podwall install --set mode=vxlan --set mtu=1400  with other settings
    podwall install --image registry.example/podwall:0.1.0
    podwall install --print | kubectl diff -f -      what would change

    Settings that were made before stay; --set changes those it names. It ends with 1 when another network
    plugin is active (--force installs all the same) and when the nodes are not ready in time.
    """
    try:
        text = with_settings(with_image(packaged(INSTALL), image), _pairs(changes))
    except SettingError as error:
        raise click.UsageError(printable(str(error))) from error
    if only_print:
        click.echo(text, nl=False)
        return
    api = Api.of(kubeconfig, context)
    with api.translated():
        if not force:
            _refuse(api.read("/apis/apps/v1/daemonsets")["items"])
        wanted = objects(text if image else with_image(text, _kept_image(api)))
        _keep_settings(api, wanted, _pairs(changes))
        for each in wanted:
            click.echo(f"{shown(each)} {api.apply(each)}")
        if wait:
            await_agents(api, limit_s)


def _pairs(changes: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for each in changes:
        name, equals, value = each.partition("=")
        if not equals:
            raise click.UsageError(f"--set {printable(each)} must be NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _refuse(daemon_sets: Iterable[Object]) -> None:
    """Raise ClickException where another network plugin is active, naming it."""
    for each in daemon_sets:
        name, nodes = each["metadata"]["name"], each.get("status", {}).get("desiredNumberScheduled", 0)
        plugin = next((plugin for start, plugin in NETWORKS.items() if name.startswith(start)), "")
        if plugin and nodes:
            where = f"DaemonSet {each['metadata']['namespace']}/{name} on {nodes} nodes"
            raise click.ClickException(
                f"{plugin} is this cluster's network ({where}): two cannot share the nodes. Remove it first, "
                "and make its Pods again afterwards; --force installs podwall beside it"
            )


def _kept_image(api: Api) -> str:
    """Where the image of an installed podwall came from, with this version; "" for the usual place."""
    there = _image_of(api)
    if "@" in there:
        return there  # one that was chosen by its content
    repository, colon, tag = there.rpartition(":")
    repository = repository if colon and "/" not in tag else there
    return "" if repository in ("", "podwall") else f"{repository}:{version('podwall')}"


def _keep_settings(api: Api, wanted: list[dict[str, Any]], changes: Mapping[str, str]) -> None:
    """Take over the settings that the cluster has, and let the agents start again when they change."""
    own = next(each for each in wanted if each["kind"] == "ConfigMap")
    there = api.get(own)
    if there is not None and isinstance(said := (there.get("data") or {}).get("config.yaml"), str):
        own["data"]["config.yaml"] = changed(said, changes)
    daemon_set = next(each for each in wanted if each["kind"] == "DaemonSet")
    restarted_by_settings(daemon_set, own["data"]["config.yaml"])


def await_agents(api: Api, limit_s: float) -> None:
    """Wait until every agent is ready, and every Node. Raises ClickException naming those that are not."""
    daemon_set = _path("apps/v1", "DaemonSet", "podwall")
    if not _until(lambda: _rolled_out(api.read(daemon_set)), "agents ready", limit_s):
        raise click.ClickException(
            f"after {limit_s:g} s podwall is not ready everywhere: {_waiting(api)}; "
            "kubectl -n kube-system describe pods -l app.kubernetes.io/name=podwall"
        )
    if not _until(lambda: _nodes_ready(api.read("/api/v1/nodes")["items"]), "nodes Ready", limit_s):
        raise click.ClickException(
            "podwall is ready, but Nodes are not: kubectl describe nodes; podwall doctor"
        )


def _rolled_out(item: Object) -> tuple[int, int]:
    """How many nodes have the Pod as it is wanted, and how many shall."""
    status = item.get("status", {})
    wanted = status.get("desiredNumberScheduled", 0)
    if status.get("observedGeneration", 0) < item["metadata"]["generation"] or not wanted:
        return 0, max(wanted, 1)
    return min(status.get("updatedNumberScheduled", 0), status.get("numberReady", 0)), wanted


def _nodes_ready(nodes: Iterable[Object]) -> tuple[int, int]:
    conditions = [{each["type"]: each["status"] for each in node["status"]["conditions"]} for node in nodes]
    return sum(each.get("Ready") == "True" for each in conditions), len(conditions)


def _waiting(api: Api, name: str = "podwall") -> str:
    """Which nodes' Pods are not ready, and what the kubelet says of them."""
    query = urlencode({"labelSelector": f"app.kubernetes.io/name={name}"})
    said: dict[str, list[str]] = {}
    for pod in api.read(f"/api/v1/namespaces/{NAMESPACE}/pods?{query}")["items"]:
        if reason := _not_ready(pod):
            said.setdefault(reason, []).append(pod["spec"].get("nodeName", "no node"))
    return (
        "; ".join(f"{reason} on {listed(sorted(nodes))}" for reason, nodes in said.items())
        or "no Pod is there"
    )


def _not_ready(pod: Object) -> str:
    statuses = [*pod["status"].get("initContainerStatuses", ()), *pod["status"].get("containerStatuses", ())]
    for each in statuses:
        for state in ("waiting", "terminated"):
            found = each.get("state", {}).get(state)
            if found and found.get("reason") not in ("Completed", "PodInitializing"):
                return f"{found.get('reason')}: {found.get('message', '')}".rstrip(": ")
    ready = any(
        each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ())
    )
    return "" if ready else "the agent is not ready"


def _until(look: Callable[[], tuple[int, int]], what: str, limit_s: float) -> bool:
    """Look until all is as wanted, and tell each step of the way; whether it came in time."""
    end, told = time.monotonic() + limit_s, ""
    while True:
        done, wanted = look()
        if (said := f"{done} of {wanted} {what}") != told:
            click.echo(said)
            told = said
        if done >= wanted:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_EVERY_S)


# Uninstall


@click.command("uninstall")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@api_options
def uninstall(yes: bool, kubeconfig: Path | None, context: str, limit_s: float) -> None:
    """Remove podwall from a cluster and from its nodes, and show that nothing is left.

    Pods that still run lose their network. A Pod on each node removes podwall's links, routes, nftables
    tables and files, and says what it removed; then it goes, too. Run again, it goes on where it stopped.
    """
    api = Api.of(kubeconfig, context)
    with api.translated():
        if not yes:
            nodes = len(api.read("/api/v1/nodes")["items"])
            click.confirm(f"Remove podwall from {nodes} nodes? Their Pods lose the network", abort=True)
        image = _image_of(api)
        for each in reversed(objects(packaged(INSTALL))):
            click.echo(f"{shown(each)} {api.delete(each)}")
        agents = len(_pods(api, "podwall"))
        if agents and not _until(
            lambda: (agents - len(_pods(api, "podwall")), agents), "agents gone", limit_s
        ):
            raise click.ClickException(f"after {limit_s:g} s agents still run: {_waiting(api)}; {AGAIN}")
        (remover,) = objects(with_image(packaged(UNINSTALL), image))
        click.echo(f"{shown(remover)} {api.apply(remover)}")
        path = _path("apps/v1", "DaemonSet", remover["metadata"]["name"])
        whole = _until(lambda: _rolled_out(api.read(path)), "nodes cleared", limit_s)
        clear = [_tell(node, log) for node, log in _logs(api)]
        if not whole:
            left = _waiting(api, remover["metadata"]["name"])
            raise click.ClickException(f"after {limit_s:g} s not every node is cleared: {left}; {AGAIN}")
        click.echo(f"{shown(remover)} {api.delete(remover)}")
        labels = urlencode({"labelSelector": ",".join(f"{k}={v}" for k, v in LEASE_LABELS.items())})
        api.client.write("DELETE", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases?{labels}")
        click.echo("leases of podwall deleted")
    if not all(clear):
        raise SystemExit(NEGATIVE)


def _image_of(api: Api) -> str:
    """The image that is installed: where it came from, what removes it comes from, too."""
    there = api.get({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "podwall"}})
    return str(there["spec"]["template"]["spec"]["containers"][0]["image"]) if there else ""


def _pods(api: Api, name: str) -> list[Object]:
    query = urlencode({"labelSelector": f"app.kubernetes.io/name={name}"})
    return list(api.read(f"/api/v1/namespaces/{NAMESPACE}/pods?{query}")["items"])


def _logs(api: Api) -> Iterator[tuple[str, list[str]]]:
    for pod in sorted(_pods(api, "podwall-uninstall"), key=lambda each: str(each["spec"].get("nodeName"))):
        name = pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{quote(name)}/log?container=uninstall"
        try:
            text = api.client.read_text(path)
        except ApiError as error:
            text = f"what it did cannot be read: {error}"
        yield pod["spec"].get("nodeName", "no node"), text.splitlines()


def _tell(node: str, log: list[str]) -> bool:
    """Say what was removed from a node, and whether nothing is left; return that."""
    removed: dict[str, int] = {}
    for line in log:
        if line.startswith("removed "):
            kind = line.split()[1]
            removed[kind] = removed.get(kind, 0) + 1
    counts = ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in removed.items()) or "nothing"
    clear = "nothing of podwall is left" in log
    others = [line for line in log if not line.startswith("removed ")]
    click.echo(printable(f"{node}: removed {counts}; {'; '.join(others) or 'what is left is not known'}"))
    return clear


# The API server


@dataclass(frozen=True, slots=True)
class Api:
    """The API server, asked for objects as manifests name them."""

    client: ApiClient

    @classmethod
    def of(cls, kubeconfig: Path | None, context: str) -> Api:
        """The one that a kubeconfig names. Raises Unreachable without one."""
        client = Asked((), False, kubeconfig, context, "default").client()
        if client is None:
            raise Unreachable("there is no kubeconfig: --kubeconfig FILE, or set KUBECONFIG")
        return cls(client)

    def translated(self) -> _Translated:
        """Within it an ApiError becomes what click shows."""
        return _Translated(self.client)

    def read(self, target: str) -> Any:
        """The JSON there. Raises ApiError."""
        return self.client.read(target)

    def get(self, item: Object) -> Any:
        """The object of this name as it is, or None. Raises ApiError."""
        try:
            return self.read(_path_of(item))
        except NotFound:
            return None

    def apply(self, item: Object) -> str:
        """Make it as it is wanted; say what became of it. Raises ApiError."""
        before = self.get(item)
        query = urlencode({"fieldManager": MANAGER, "force": "true"})
        after = self.client.write("PATCH", f"{_path_of(item)}?{query}", item, APPLY)
        if before is None:
            return "created"
        # What has a generation has a status, too, that others write meanwhile.
        number = "generation" if "generation" in after["metadata"] else "resourceVersion"
        same = before["metadata"][number] == after["metadata"][number]
        return "unchanged" if same else "configured"

    def delete(self, item: Object) -> str:
        """Remove it with all that is its; what is gone already is no error. Raises ApiError."""
        try:
            self.client.write("DELETE", f"{_path_of(item)}?propagationPolicy=Background")
        except NotFound:
            return "was gone"
        return "deleted"


class _Translated:
    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._client.close()
        if isinstance(error, ApiError):
            if error.status in (0, 401):
                raise Unreachable(f"the API server cannot be asked: {error}") from error
            raise click.ClickException(f"the API server refuses: {error}") from error


def shown(item: Object) -> str:
    """An object as kubectl names it."""
    group = item["apiVersion"].rpartition("/")[0]
    return f"{item['kind'].lower()}{'.' + group if group else ''}/{item['metadata']['name']}"


def _path_of(item: Object) -> str:
    namespace = item["metadata"].get("namespace", "" if item["kind"].startswith("Cluster") else NAMESPACE)
    return _path(item["apiVersion"], item["kind"], item["metadata"]["name"], namespace)


def _path(api_version: str, kind: str, name: str, namespace: str = NAMESPACE) -> str:
    base = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    place = f"/namespaces/{namespace}" if namespace else ""
    return f"{base}{place}/{kind.lower()}s/{quote(name, safe='')}"
