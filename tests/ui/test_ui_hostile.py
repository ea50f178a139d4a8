"""Names that try to become markup, and clusters that are not as they should be, in the page."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from playwright.sync_api import expect

from agent.cluster.model import Namespace, NetworkPolicy, Node, Owner, Pod, Service, ServicePort
from agent.cluster.store import snapshot_of
from tests.ui.conftest import Open
from tests.ui.told import Told, denial, flow, serving

MARKUP = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
JAVASCRIPT = "javascript:alert(3)//{{7*7}}"


def hostile() -> Told:
    owner = (Owner("ReplicaSet", MARKUP, controller=True),)
    web = Pod(
        MARKUP, MARKUP, node=MARKUP, phase="Running", ready=True, labels={"a": MARKUP}, owners=owner,
        ips=(ip_address("10.0.0.1"),),
    )  # fmt: skip
    db = Pod(MARKUP, JAVASCRIPT, node=MARKUP, phase="Running", ready=True, ips=(ip_address("10.0.0.2"),))
    objects = (
        Node(MARKUP),
        Namespace(MARKUP),
        web,
        db,
        NetworkPolicy(MARKUP, MARKUP),
        Service(MARKUP, MARKUP, cluster_ips=(ip_address("10.96.0.1"),), ports=(ServicePort(80, MARKUP),)),
    )
    name = f"{MARKUP}/{MARKUP}"
    flows = [flow(("10.0.0.1", 40000, name), ("203.0.113.9", 80, ""))]
    denials = [
        denial(
            "10.0.0.1",
            "10.0.0.2",
            80,
            pod=f"{MARKUP}/{JAVASCRIPT}",
            peer=name,
            policies=[name],
            last_time=4e9,
        )
    ]
    answers = {
        MARKUP: {
            "flows": {"flows": flows, "total": 1},
            "denials": {"denials": denials, "total": 1, "lost": 0},
        },
        f"{MARKUP}2": {"flows": MARKUP, "denials": MARKUP},
    }
    return Told(snapshot_of(objects), answers, where=MARKUP, problems=(MARKUP,))


def test_no_name_becomes_markup(open_page: Open) -> None:
    with serving(hostile()) as server:
        page = open_page(server)
        expect(page.locator("#where")).to_have_text(MARKUP)
        page.locator("#notices summary").click()
        for view in ("graph", "table", "matrix", "policies"):
            page.locator(f"#tab-{view}").click()
        expect(page.locator(".detail h2")).to_have_text(f"{MARKUP}/{MARKUP}")
        page.locator("#tab-table").click()
        page.locator("tr.denied button").first.click()
        expect(page.locator("#panel .ends")).to_contain_text(MARKUP)
        page.locator("#panel .sentence, #panel .failure").first.wait_for()
        page.locator("#tab-graph").click()
        page.locator(".card").first.dispatch_event("click")
        expect(page.locator("#panel h2")).to_contain_text("alert")
        assert page.locator("img, iframe, object").count() == 0
        assert page.locator("script").count() == 2
        assert page.locator("a[href^='javascript']").count() == 0


def test_a_page_without_the_token_shows_nothing(browser: object, open_page: Open) -> None:
    with serving(hostile()) as server:
        page = open_page(server)
        page.evaluate("sessionStorage.clear()")
        with page.expect_response("**/api/state*") as answered:
            page.reload()
        assert answered.value.status == 401
        expect(page.locator("#pulse")).to_contain_text("the token is missing or wrong")
        assert page.locator(".card").count() == 0
        page.goto(server.url.replace("#token=", "?#token="))  # so that no complaint of that answer remains
        page.wait_for_selector(".card")
        assert "token" not in page.url


def test_manifests_have_a_matrix_but_no_traffic(open_page: Open) -> None:
    cluster = hostile()
    cluster.live = False
    with serving(cluster) as server:
        page = open_page(server)
        expect(page.locator("#pulse")).to_have_text("manifests, no traffic")
        expect(page.locator("#summary")).to_contain_text("0 denied")


@pytest.mark.parametrize("objects", [(), (Node("n"), Namespace("default"))], ids=["nothing", "no Pods"])
def test_an_empty_cluster_is_no_failure(open_page: Open, objects: tuple[Node, ...]) -> None:
    with serving(Told(snapshot_of(objects), {"n": {}})) as server:
        page = open_page(server)
        for view in ("table", "matrix", "policies"):
            page.locator(f"#tab-{view}").click()
        expect(page.locator("#view")).to_contain_text("There is no NetworkPolicy")


def test_a_server_that_ended_is_told(open_page: Open) -> None:
    cluster = hostile()
    with serving(cluster) as server:
        page = open_page(server)
        page.route("**/api/state*", lambda route: route.abort())
        expect(page.locator("#pulse")).to_contain_text("does not answer")
        page.unroute("**/api/state*")
        expect(page.locator("#pulse")).to_have_text("live")


def test_a_pod_that_is_gone_is_told_apart(open_page: Open) -> None:
    web = Pod("shop", "web", node="n", phase="Running", ips=(ip_address("10.0.0.1"),))
    flows = [
        flow(("10.0.0.1", 40000, "shop/web"), ("10.0.0.9", 80, "shop/old-1")),
        flow(("10.0.0.9", 40001, "shop/old-1"), ("10.0.0.8", 80, "shop/old-2")),
    ]
    objects = (Node("n"), Namespace("shop"), web)
    cluster = Told(snapshot_of(objects), {"n": {"flows": {"flows": flows, "total": 2}}})
    with serving(cluster) as server:
        page = open_page(server)
        gone = page.locator(".card[aria-label^='Pods that are gone, in shop']")
        expect(gone).to_have_count(1)
        expect(page.locator(".picture .line.allowed")).to_have_count(2)
        page.locator("#tab-table").click()
        expect(page.locator(".rows tbody")).to_contain_text("shop/old-1 (gone)")
