"""The container runtime's part: network namespaces for Pods, and the CNI plugin called for them as containerd
does.

    RunPodSandbox     namespace, loopback up, then ADD with the configuration that the agent wrote
    StopPodSandbox    processes ended, then DEL, then the namespace removed

What is known of a sandbox is on disk before ADD, so that DEL can be called for one whose maker was killed. An
answer "try again later" (11) is tried again for a while, as kubelet does.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from cni.spec import TRY_AGAIN_LATER
from lab import netns, processes
from lab.limits import SLOWNESS
from lab.names import Address, NodePlace
from lab.objects import Object

IFNAME = "eth0"
CALL_LIMIT = 60.0 * SLOWNESS
RETRY_LIMIT = 15.0 * SLOWNESS
_RETRY_PAUSE = 0.1

_BANDWIDTH = {"kubernetes.io/ingress-bandwidth": "ingress", "kubernetes.io/egress-bandwidth": "egress"}
_BURST = (1 << 31) - 1
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "": 1}


class PluginError(Exception):
    """The plugin answered with an error, or not at all; code is the specification's, 0 without an answer."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A Pod's network namespace and what the plugin was told of it."""

    container_id: str
    netns: str
    namespace: str
    pod: str
    uid: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    port_mappings: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the namespace is found."""
        return netns.path(self.netns)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The Pod's addresses as ADD answered; empty before."""
        return tuple(ip_interface(entry["address"]).ip for entry in self.result.get("ips", ()))

    @property
    def host_link(self) -> str:
        """The host end of the Pod's link as ADD answered; empty before."""
        links = (link["name"] for link in self.result.get("interfaces", ()) if not link.get("sandbox"))
        return next(links, "")


class Runtime:
    """One node's container runtime, as far as the network goes."""

    def __init__(self, node: NodePlace, command: Sequence[str], giving_up: Callable[[], bool]) -> None:
        """Call the plugin by this command; giving_up tells that nothing needs to be tried again."""
        self.node = node
        self.conf_dir = node.directory / "net.d"
        self._command = tuple(command)
        self._giving_up = giving_up
        self._sandboxes = node.directory / "sandboxes"

    def configuration(self) -> Object | None:
        """Return the network configuration list that the agent wrote, or None while there is none."""
        files = sorted(self.conf_dir.glob("*.conflist")) if self.conf_dir.is_dir() else []
        if not files:
            return None
        content: Object = json.loads(files[0].read_text(encoding="utf-8"))
        return content

    def sandboxes(self) -> Iterator[Sandbox]:
        """Yield what this node runs, or was about to run."""
        for file in sorted(self._sandboxes.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # it was stopped since
                yield Sandbox(**json.loads(file.read_text(encoding="utf-8")))

    def run(self, name: str, pod: Object) -> Sandbox:
        """Make a Pod's sandbox in a namespace of this name. Raises PluginError, and leaves nothing then."""
        metadata = pod["metadata"]
        sandbox = Sandbox(
            container_id=secrets.token_hex(32),
            netns=name,
            namespace=metadata["namespace"],
            pod=metadata["name"],
            uid=metadata["uid"],
            annotations=metadata.get("annotations") or {},
            port_mappings=_port_mappings(pod),
        )
        self._keep(sandbox)
        try:
            netns.create(name)
            result = self.call("ADD", sandbox)
        except BaseException:
            self.stop(sandbox, forced=True)
            raise
        sandbox = Sandbox(**{**asdict(sandbox), "result": result})
        self._keep(sandbox)
        return sandbox

    def stop(self, sandbox: Sandbox, *, forced: bool = False) -> None:
        """Remove a sandbox. Raises PluginError and keeps it when DEL fails; forced: removes it anyway."""
        processes.stop_in([sandbox.path])
        try:
            self.call("DEL", sandbox)
        except PluginError:
            if not forced:
                raise
        netns.remove(sandbox.netns)
        self._file(sandbox).unlink(missing_ok=True)

    def call(self, command: str, sandbox: Sandbox | None = None, **extra: object) -> dict[str, Any]:
        """Call every plugin of the list and return the last result; extra keys go into the configuration.

        Raises PluginError.
        """
        deadline = time.monotonic() + RETRY_LIMIT
        while True:
            try:
                return self.call_once(command, sandbox, extra)
            except PluginError as error:
                if error.code != TRY_AGAIN_LATER or self._giving_up() or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_PAUSE)

    def call_once(
        self, command: str, sandbox: Sandbox | None = None, extra: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Like call, but without trying again."""
        configuration = self.configuration()
        if configuration is None:
            raise PluginError(TRY_AGAIN_LATER, f"{self.conf_dir} holds no network configuration yet")
        plugins = configuration["plugins"]
        result = dict(sandbox.result) if sandbox else {}
        for plugin in reversed(plugins) if command == "DEL" else plugins:
            config = {
                "cniVersion": _version(configuration),
                "name": configuration["name"],
                **plugin,
                **(extra or {}),
            }
            if sandbox:
                config |= _runtime_config(plugin, sandbox)
            if result:
                config["prevResult"] = result
            answer = self._call_plugin(command, sandbox, config)
            result = answer if command == "ADD" else result
        return result

    def _call_plugin(self, command: str, sandbox: Sandbox | None, config: Object) -> dict[str, Any]:
        try:
            done = netns.run(
                netns.path(self.node.netns),
                subprocess.run,
                self._command,
                input=json.dumps(config).encode(),
                capture_output=True,
                env=self._environment(command, sandbox),
                timeout=CALL_LIMIT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as cause:
            raise PluginError(0, f"CNI {command}: {cause}") from cause
        if done.returncode == 0:
            answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
            return answer
        raise _failure(command, done)

    def _environment(self, command: str, sandbox: Sandbox | None) -> dict[str, str]:
        base = processes.environment({"PATH": os.environ.get("PATH", os.defpath)})
        base |= {"CNI_COMMAND": command, "CNI_PATH": str(Path(self._command[0]).parent)}
        if sandbox is None:
            return base
        names = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": sandbox.namespace,
            "K8S_POD_NAME": sandbox.pod,
            "K8S_POD_INFRA_CONTAINER_ID": sandbox.container_id,
            "K8S_POD_UID": sandbox.uid,
        }
        return base | {
            "CNI_CONTAINERID": sandbox.container_id,
            "CNI_NETNS": str(sandbox.path),
            "CNI_IFNAME": IFNAME,
            "CNI_ARGS": ";".join(f"{name}={value}" for name, value in names.items()),
        }

    def _keep(self, sandbox: Sandbox) -> None:
        self._sandboxes.mkdir(parents=True, exist_ok=True)
        scratch = self._file(sandbox).with_suffix(".new")
        scratch.write_text(json.dumps(asdict(sandbox)), encoding="utf-8")
        scratch.replace(self._file(sandbox))

    def _file(self, sandbox: Sandbox) -> Path:
        return self._sandboxes / f"{sandbox.container_id}.json"


def _version(configuration: Object) -> str:
    """Return the version that a current runtime speaks: the highest of those offered."""
    offered: list[str] = configuration.get("cniVersions") or [configuration["cniVersion"]]
    return max(offered, key=lambda text: tuple(int(part) for part in text.split(".")))


def _runtime_config(plugin: Object, sandbox: Sandbox) -> Object:
    """Return what containerd passes for the capabilities that a plugin declares."""
    bandwidth: dict[str, int] = {}
    for annotation, direction in _BANDWIDTH.items():
        if text := sandbox.annotations.get(annotation):
            bandwidth |= {f"{direction}Rate": _rate(text), f"{direction}Burst": _BURST}
    passed = {"bandwidth": bandwidth, "portMappings": list(sandbox.port_mappings)}
    declared = plugin.get("capabilities") or {}
    wanted = {name: value for name, value in passed.items() if value and declared.get(name)}
    return {"runtimeConfig": wanted} if wanted else {}


def _port_mappings(pod: Object) -> list[dict[str, Any]]:
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports") or ()]
    return [
        {
            "hostPort": port["hostPort"],
            "containerPort": port["containerPort"],
            "protocol": port.get("protocol", "TCP").lower(),
            "hostIP": port.get("hostIP", ""),
        }
        for port in ports
        if port.get("hostPort")
    ]


def _rate(text: str) -> int:
    digits = text.rstrip("kMGi")
    unit = text[len(digits) :]
    if not digits.isdecimal() or unit not in _UNITS:
        raise PluginError(0, f"the bandwidth {text!r} is not a quantity such as 10M")
    return int(digits) * _UNITS[unit]


def _failure(command: str, done: subprocess.CompletedProcess[bytes]) -> PluginError:
    try:
        error = json.loads(done.stdout)
        text = ": ".join(filter(None, [error["msg"], error.get("details", "")]))
        return PluginError(int(error["code"]), f"CNI {command}: {text} (code {error['code']})")
    except (ValueError, KeyError, TypeError):
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-500:]
        return PluginError(0, f"CNI {command}: the plugin ended with {done.returncode} and said: {said}")
