"""kube-proxy in a network namespace, behind a scripted API server: podwall's Services are measured beside it.

The binary is the one that `make cluster` builds. Its own limits (how often it may write) are off, so that it
is as quick as it can be.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Literal

from stage.api import URL, Object

from lab import netns, processes
from lab.names import NodePlace

Mode = Literal["nftables", "iptables"]

BINARIES = "podwall/cluster/go-kubernetes-*/bin/kube-proxy"


def binary() -> Path | None:
    """The newest kube-proxy that was built here; None when there is none."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return max(base.glob(BINARIES), key=lambda path: path.stat().st_mtime, default=None)


class KubeProxy:
    """One kube-proxy on a node."""

    def __init__(self, place: NodePlace, mode: Mode) -> None:
        """Its node has an API server on the loopback. Ends the benchmark when there is no kube-proxy."""
        program = binary()
        if program is None:
            sys.exit("there is no kube-proxy to measure beside: `make cluster` builds one")
        self.place, self.mode = place, mode
        self.path = netns.path(place.netns)
        self._program = program
        self._process: processes.Process | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process
        return self._process.pid

    @property
    def log(self) -> Path:
        """What it says."""
        return self.place.directory / "kube-proxy.log"

    def start(self) -> None:
        """Start it; does not wait for its rules."""
        self.place.directory.mkdir(parents=True, exist_ok=True)
        kubeconfig, config = (self.place.directory / name for name in ("kubeconfig.json", "config.json"))
        kubeconfig.write_text(json.dumps(_kubeconfig()))
        config.write_text(json.dumps(self._config(kubeconfig)))
        words = [str(self._program), f"--config={config}"]
        self._process = processes.start(self.path, words, self.log)

    def stop(self) -> None:
        """End it; its rules stay."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process
        self._process.wait()

    def _config(self, kubeconfig: Path) -> Object:
        quick = {"minSyncPeriod": "1ms", "syncPeriod": "1h0m0s"}  # 0s would be taken for the default, 1s
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": self.mode,
            "hostnameOverride": self.place.name,
            "clusterCIDR": ",".join(str(cidr) for cidr in self.place.pod_cidrs),
            "clientConnection": {
                "kubeconfig": str(kubeconfig),
                "contentType": "application/json",
                "acceptContentTypes": "application/json",
            },
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
            "nftables": quick,
            "iptables": quick,
        }


def _kubeconfig() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "bench", "cluster": {"server": URL}}],
        "users": [{"name": "bench", "user": {}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "current-context": "bench",
    }
