"""The page in a browser, against a lab whose connections and denials are real."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from agent.cli.cluster import Asked
from agent.ui.server import PageServer
from lab.limits import SLOWNESS
from lab.processes import until
from lab.world import Lab
from tests.ui import shop
from tests.ui.conftest import Open
from tests.ui.told import serving

VIEWS = ("graph", "table", "matrix", "policies")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with shop.running(2) as made:
        assert set(shop.talk(made, shop.ALLOWED)) == {"connected"}
        yield made


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[PageServer]:
    with serving(Asked((), True, None, "", "default")) as made:
        yield made


def places(page: Page) -> dict[str, str]:
    """Where each card stands."""
    found = page.eval_on_selector_all(
        ".card[role]", "of => of.map(e => [e.ariaLabel.split(',')[0], e.style.transform])"
    )
    return {str(name): str(at) for name, at in found}


def named(page: Page, title: str) -> None:
    """Wait for the panel of this title."""
    expect(page.locator("#panel h2")).to_have_text(title)


def test_a_denied_line_is_explained_by_a_click(server: PageServer, open_page: Open) -> None:
    page = open_page(server)
    page.wait_for_selector(".mark.denied")
    box = page.locator(".mark.denied").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    named(page, "Connection")
    panel = page.locator("#panel")
    expect(panel.locator(".sentence")).to_contain_text(
        "denied: ingress policy data/postgres of Pod data/postgres-"
    )
    expect(panel.locator(".ends")).to_contain_text("reports/nightly-")
    expect(panel.locator(".steps li").filter(has_text="ingress").first).to_contain_text("denied")
    expect(panel.locator(".steps")).to_contain_text("do just this")
    expect(panel).to_contain_text("It would be allowed with")
    expect(panel.locator("figure.policy")).to_have_attribute("aria-label", "NetworkPolicy data/postgres")


@contextmanager
def held(lab: Lab, server: PageServer) -> Iterator[None]:
    """A connection of the ledger to the database that lives on, as the page's server has heard."""
    with lab.socket("orders/ledger", socket.AF_INET, socket.SOCK_STREAM) as live:
        live.settimeout(5 * SLOWNESS)
        live.connect((str(lab.pod("data/postgres").address(4)), 5432))
        live.sendall(b"echo\n")
        port = live.getsockname()[1]
        until(
            lambda: any(each.raw["source"]["port"] == port for each in server.live.flows()),
            10,
            lambda: "the page's server knows nothing of a live connection",
        )
        yield


def test_a_policy_is_rehearsed_and_drawn(server: PageServer, lab: Lab, open_page: Open) -> None:
    page = open_page(server)
    page.get_by_role("tab", name="Policies").click()
    page.get_by_role("button", name=re.compile("^postgres")).click()
    expect(page.locator(".detail .peer").first).to_contain_text("all Pods of namespace orders")
    page.get_by_role("button", name="What if it were different?").click()
    manifest = page.get_by_label("Manifest: a NetworkPolicy, or others")
    before = manifest.input_value()
    manifest.fill(before.replace("metadata.name: orders", "metadata.name: reports"))
    page.get_by_role("tab", name="Graph").click()
    with held(lab, server):
        page.get_by_role("button", name="Rehearse").click()
        expect(page.locator("#panel .sentence")).to_contain_text("cuts")
    expect(page.locator("#panel")).to_contain_text("reports/nightly-")
    expect(page.locator(".picture .line.opened")).to_have_count(1)
    expect(page.locator(".picture .line.closed")).to_have_count(3)  # the mailer may not go there anyway
    page.get_by_role("button", name="Clear the graph").click()
    expect(page.locator(".picture .line.opened")).to_have_count(0)
    manifest.fill(before)
    page.get_by_role("button", name="Rehearse").click()
    expect(page.locator("#panel .sentence")).to_contain_text("It changes nothing")


CASHIER = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: checkout, namespace: orders}
spec:
  replicas: 3
  selector: {matchLabels: {app: cashier}}
  template:
    metadata: {labels: {app: cashier}}
    spec: {containers: [{name: checkout, image: shop, ports: [{name: http, containerPort: 8080}]}]}
"""


def test_a_workload_with_another_label_is_rehearsed_with_its_notes(
    server: PageServer, open_page: Open
) -> None:
    page = open_page(server, trusted=False)  # the checker brings a script of its own
    page.get_by_role("button", name="What if", exact=True).click()
    manifest = page.get_by_label("Manifest: a NetworkPolicy, or others")
    manifest.fill(CASHIER)
    page.get_by_role("button", name="Rehearse").click()
    notes = page.locator("#panel section").filter(has=page.get_by_role("heading", name="Notes"))
    expect(notes.get_by_role("listitem")).to_have_text(
        ["Deployment orders/checkout rolls out: its Pods are replaced, and their connections end"]
    )
    expect(page.locator("#panel .sentence")).to_contain_text("closes 1 way")
    expect(page.locator("#panel .ways").first).to_contain_text("orders/payments-")
    expect(page.locator(".picture .line.closed")).to_have_count(1)
    expect(page.locator("#said")).to_contain_text("1 note.")
    check(page, "what if, with notes")
    manifest.fill("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}}")
    page.get_by_role("button", name="Rehearse").click()
    expect(page.locator("#panel .failure")).to_contain_text("there is no NetworkPolicy")
    expect(page.locator(".picture .line.closed")).to_have_count(0)


def test_the_keyboard_alone_leads_everywhere(server: PageServer, open_page: Open) -> None:
    page = open_page(server)

    def focused() -> str:
        return str(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent"))

    def tab_to(text: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if text in focused():
                return
        raise AssertionError(f"Tab never came to {text}")

    page.keyboard.press("Tab")
    assert focused() == "Skip to the connections"
    tab_to("Graph")
    tab_to(", in ")
    seen = {focused()}
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
        seen.add(focused())
    assert len(seen) > 3
    card = focused()
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel h2:focus")
    tab_to("✓")
    page.keyboard.press("Enter")
    named(page, "Connection")
    expect(page.locator("#panel .sentence")).to_contain_text("allowed")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    assert focused() == card
    page.locator("#tab-graph").focus()
    for view in VIEWS[1:]:
        page.keyboard.press("ArrowRight")
        assert page.locator(f"#tab-{view}").get_attribute("aria-selected") == "true"
    page.locator("#tab-matrix").click()
    page.wait_for_selector(".cell")
    page.locator(".cell[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert " to " in focused()
    page.keyboard.press("Enter")
    named(page, "Ask why")
    expect(page.locator("#panel .sentence")).to_be_visible()


def test_a_new_denial_is_told_and_moves_nothing(server: PageServer, lab: Lab, open_page: Open) -> None:
    page = open_page(server)
    before = places(page)
    assert len(before) == len(shop.WORKLOADS)
    lines = page.locator(".picture .line.denied")
    expect(lines.first).to_be_attached()
    known = lines.count()
    assert page.locator("#said").get_attribute("aria-live") == "polite"
    assert set(shop.talk(lab, shop.DENIED_LATER[:1])) == {"silent"}
    expect(page.locator("#said")).to_contain_text("Denied: shop/recommendations-")
    expect(lines).to_have_count(known + 1)
    assert places(page) == before


def test_the_table_says_what_the_graph_draws(server: PageServer, open_page: Open) -> None:
    page = open_page(server)
    page.locator("#tab-table").click()
    rows = page.locator(".rows tbody tr")
    expect(rows.first).to_contain_text("denied")
    everything = rows.count()
    page.get_by_placeholder("Find Pod, address, port").fill("redis 6379")
    expect(rows.first).to_contain_text("data/redis-")
    assert 0 < rows.count() < everything
    page.get_by_placeholder("Find Pod, address, port").fill("")
    page.get_by_label("Denied only").check()
    expect(page.locator(".rows tbody tr.allowed")).to_have_count(0)
    page.get_by_role("button", name="From").click()
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("From")
    page.get_by_label("Denied only").uncheck()
    page.locator("#namespace").select_option("reports")
    expect(page.locator(".rows tbody tr").first).to_contain_text("reports/nightly")


def test_reading_is_not_disturbed_by_news(server: PageServer, open_page: Open) -> None:
    page = open_page(server)
    for view, item in (("table", ".rows tbody tr"), ("matrix", ".cell"), ("policies", ".detail figure")):
        page.locator(f"#tab-{view}").click()
        page.locator(item).first.evaluate("of => of.dataset.kept = 'yes'")
        with page.expect_response("**/api/state*"):
            pass
        page.evaluate("new Promise(requestAnimationFrame)")
        assert page.locator(item).first.get_attribute("data-kept") == "yes", view


def test_the_matrix_says_what_the_policies_allow(server: PageServer, open_page: Open) -> None:
    page = open_page(server)
    page.locator("#tab-matrix").click()
    cell = page.get_by_label("reports/nightly to data/postgres (2) TCP 5432: denied, seen")
    cell.click()
    named(page, "Ask why")
    expect(page.locator("#panel .sentence")).to_contain_text("denied")
    assert page.get_by_label("shop/cart (3) to data/redis (2) TCP 6379: allowed, seen").count() == 1


def test_a_question_can_be_typed(server: PageServer, open_page: Open) -> None:
    page = open_page(server)
    page.get_by_role("button", name="Ask why", exact=True).click()
    page.get_by_label("From", exact=True).fill("203.0.113.9")
    page.get_by_label("To", exact=True).fill("svc/data/postgres")
    page.get_by_label("Port", exact=True).fill("nothing")
    page.get_by_role("button", name="Why?").click()
    expect(page.locator("#panel .answer")).to_contain_text("nothing")
    page.get_by_label("To", exact=True).fill("pod/data/postgres-0")
    page.get_by_label("Port", exact=True).fill("5432")
    page.get_by_role("button", name="Why?").click()
    expect(page.locator("#panel .sentence")).to_contain_text("does not let 203.0.113.9")
    page.get_by_label("To", exact=True).fill("sts/data/postgres")
    page.get_by_role("button", name="Why?").click()
    expect(page.locator("#panel .sentence")).to_contain_text("the same for each of the 2 Pods of StatefulSet")


def check(page: Page, what: str) -> None:
    """Nothing that axe knows to be in somebody's way."""
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, f"{what}: {found.generate_report()}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_in_the_way_of_who_cannot_see_it(server: PageServer, open_page: Open, scheme: str) -> None:
    page = open_page(server, scheme=scheme, trusted=False)  # the checker brings a script of its own
    page.wait_for_selector(".mark.denied")
    check(page, "graph")
    page.locator("#tab-policies").click()
    page.wait_for_selector("figure")
    check(page, "policies")
    page.locator("#namespace").select_option("reports")  # a few rows are like all
    for view, content in (("matrix", ".cell"), ("table", "tr.denied")):
        page.locator(f"#tab-{view}").click()
        page.wait_for_selector(content)
        check(page, view)
    page.locator("tr.denied button").first.click()
    page.get_by_role("button", name="What if it were different?").first.wait_for()
    check(page, "why")
    page.get_by_role("button", name="What if it were different?").first.click()
    page.get_by_role("button", name="Rehearse").click()
    page.wait_for_selector("#panel .sentence")
    check(page, "what if")


def test_light_and_dark_can_be_chosen(server: PageServer, open_page: Open) -> None:
    page = open_page(server, scheme="light")

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = ground()
    page.get_by_role("button", name="Dark").click()
    assert ground() != light
    page.reload()
    page.wait_for_selector(".card")
    assert ground() != light
    assert page.get_by_role("button", name="Dark").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Auto").click()
    assert ground() == light


def test_a_narrow_window_needs_no_scrolling_aside(server: PageServer, open_page: Open) -> None:
    page = open_page(server, width=390)
    for view in VIEWS:
        page.locator(f"#tab-{view}").click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
