"""What compiling policies costs in Python: cold, and for one changed object, by the size of the cluster.

    python bench/policy_compile.py [PODS] [POLICIES]

110 Pods are on this node, of all namespaces, so nearly every policy selects some of them and nearly all
peers are in use: the worst case.  Half of the policies name Pods of their own namespace, half others.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address

from msgspec.structs import replace

from agent.cluster.model import (
    ContainerPort,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyPort,
    PolicyRule,
    SelectorPeer,
)
from agent.cluster.store import Changed
from agent.compile.incremental import PolicyCompiler
from agent.compile.members import LocalPod
from agent.nft.owners import Desired

NODE, LOCAL, NAMESPACES, ROUNDS = "node-1", 110, 50, 100


def labelled(**labels: str) -> LabelSelector:
    return LabelSelector(tuple(sorted(labels.items())))


def pods(count: int) -> list[Pod]:
    return [
        Pod(
            namespace=f"ns-{number % NAMESPACES}",
            name=f"pod-{number}",
            labels={
                "app": f"app-{number // NAMESPACES % 20}",
                "tier": f"tier-{number % 3}",
                "pod-template-hash": f"{number // 5:x}",
                "kubernetes.io/os": "linux",
            },
            node=NODE if number < LOCAL else f"node-{2 + number % 50}",
            phase="Running",
            ips=(ip_address(0x0A000000 + number + 2), ip_address(0xFD << 120 | number + 2)),
            ports=(ContainerPort("http", 8080),),
        )
        for number in range(count)
    ]


def policies(count: int) -> list[NetworkPolicy]:
    made = []
    for number in range(count):
        near = SelectorPeer(pod_selector=labelled(app=f"app-{number // NAMESPACES % 20}"))
        far = SelectorPeer(
            labelled(app=f"app-{number % 20}"),
            labelled(**{"kubernetes.io/metadata.name": f"ns-{number % 49}"}),
        )
        rule = PolicyRule((near if number % 2 else far,), (PolicyPort("TCP", 80), PolicyPort("TCP", "http")))
        made.append(
            NetworkPolicy(
                namespace=f"ns-{number % NAMESPACES}",
                name=f"policy-{number}",
                pod_selector=labelled(tier=f"tier-{number % 3}") if number % 7 else LabelSelector(),
                policy_types=frozenset({"Ingress", "Egress"}),
                ingress=(rule,),
                egress=(rule,),
            )
        )
    return made


class Bench:
    def __init__(self, pod_count: int, policy_count: int) -> None:
        self.compiler, self.desired = PolicyCompiler(NODE), Desired()
        self.pods, self.policies = pods(pod_count), policies(policy_count)
        self.namespaces = [
            Namespace(f"ns-{n}", labels={"kubernetes.io/metadata.name": f"ns-{n}"}) for n in range(NAMESPACES)
        ]

    def run(self, owners: frozenset[tuple[str, ...]]) -> None:
        for owner in owners:
            self.desired.replace(owner, self.compiler.items(owner))
        self.desired.take()

    def cold(self) -> None:
        everything = [
            Changed(kind, of.key, None, of)  # type: ignore[arg-type]
            for kind, objects in (
                ("Namespace", self.namespaces),
                ("Pod", self.pods),
                ("NetworkPolicy", self.policies),
            )
            for of in objects  # type: ignore[attr-defined]
        ]
        owners = self.compiler.apply(everything)
        for pod in self.pods[:LOCAL]:
            owners |= self.compiler.attach(LocalPod(pod.name, "eth0", pod.namespace, pod.name, pod.ips))
        self.run(owners | {("policy",)})

    def change(self, before: object, after: object, kind: str) -> None:
        of = after or before
        self.run(self.compiler.apply([Changed(kind, of.key, before, after)]))  # type: ignore[arg-type, union-attr]


def timed(body: Callable[[], None]) -> float:
    begun = time.process_time()
    body()
    return (time.process_time() - begun) * 1e3


def main() -> None:
    pod_count, policy_count = (int(each) for each in (*sys.argv[1:], "5000", "1000")[:2])
    bench = Bench(pod_count, policy_count)
    gc.collect()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cold = timed(bench.cold)
    ruleset = bench.desired.ruleset
    elements = sum(map(len, ruleset.elements.values()))
    print(f"cluster pods={pod_count} policies={policy_count} namespaces={NAMESPACES} local={LOCAL}")
    print(f"ruleset chains={len(ruleset.chains)} sets={len(ruleset.sets)} elements={elements}")
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    print(f"cold ms={cold:.0f} memory_mib={grown_mib:.0f}")
    remote = bench.pods[-1]
    local = bench.pods[0]
    policy = bench.policies[0]
    relabelled = replace(remote, labels={**remote.labels, "app": "app-3", "tier": "tier-0"})
    cases: dict[str, tuple[object, object, str]] = {
        "remote Pod relabelled": (remote, relabelled, "Pod"),
        "remote Pod gone": (remote, None, "Pod"),
        "remote Pod ready": (remote, replace(remote, ready=True), "Pod"),
        "local Pod relabelled": (local, replace(local, labels={**local.labels, "tier": "tier-1"}), "Pod"),
        "policy gone": (policy, None, "NetworkPolicy"),
        "policy widened": (policy, replace(policy, ingress=(PolicyRule(),)), "NetworkPolicy"),
        "namespace relabelled": (
            bench.namespaces[7],
            replace(bench.namespaces[7], labels={"kubernetes.io/metadata.name": "ns-8"}),
            "Namespace",
        ),
    }
    for name, (one, other, kind) in cases.items():
        taken = [timed(partial(bench.change, *ends, kind)) for ends in ((one, other), (other, one)) * ROUNDS]
        p99 = statistics.quantiles(taken, n=100)[98]
        print(f"{name:24} p50_ms={statistics.median(taken):.3f} p99_ms={p99:.3f}")


if __name__ == "__main__":
    main()
