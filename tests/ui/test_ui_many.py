"""More than anybody can read in one picture: the page says so, and stays quick."""

from __future__ import annotations

from ipaddress import ip_address

from playwright.sync_api import expect

from agent.cluster.model import Namespace, Node, Object, Owner, Pod
from agent.cluster.store import snapshot_of
from tests.ui.conftest import Open
from tests.ui.told import Told, flow, serving

NAMESPACES, WORKLOADS, REPLICAS = 20, 10, 3
FLOWS = 3000


def many() -> Told:
    objects: list[Object] = [Node("n"), *(Namespace(f"ns{i}") for i in range(NAMESPACES))]
    pods = [
        Pod(
            f"ns{i}",
            f"w{j}-{k}",
            node="n",
            phase="Running",
            ready=True,
            owners=(Owner("StatefulSet", f"w{j}", controller=True),),
            ips=(ip_address(f"10.{i}.{j}.{k}"),),
        )
        for i in range(NAMESPACES)
        for j in range(WORKLOADS)
        for k in range(REPLICAS)
    ]
    flows = [
        flow(_end(pods[n % len(pods)], 30000 + n), _end(pods[(n * 7 + 1) % len(pods)], 80))
        for n in range(FLOWS)
    ]
    return Told(snapshot_of([*objects, *pods]), {"n": {"flows": {"flows": flows, "total": FLOWS}}})


def _end(pod: Pod, port: int) -> tuple[str, int, str]:
    return str(pod.ips[0]), port, f"{pod.namespace}/{pod.name}"


def test_a_large_cluster_is_drawn_in_part(open_page: Open) -> None:
    with serving(many()) as server:
        page = open_page(server)
        expect(page.locator(".left")).to_have_text(
            "50 workloads are not drawn: choose a namespace, or search"
        )
        assert page.locator(".card[role]").count() == 150
        page.locator("#namespace").select_option("ns19")
        page.get_by_role("button", name="Arrange again").click()
        expect(page.locator(".card[aria-label*='in ns19']")).to_have_count(WORKLOADS)
        page.locator("#tab-table").click()
        expect(page.locator(".rows tbody tr").first).to_contain_text("ns19/")
