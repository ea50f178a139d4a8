"""Takes the pictures of docs/ui.md: the page in Chromium, against a lab of 30 Pods that really connect.

.venv/bin/python docs/images/ui.py        as root, with no lab up; writes docs/images/ui-*.png
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from agent.cli.cluster import Asked  # noqa: E402 - this file stands outside of the packages
from agent.ui.live import Live  # noqa: E402
from agent.ui.server import PageServer  # noqa: E402
from tests.ui import shop  # noqa: E402

WIDTH, HEIGHT = 1440, 900
CHROMIUM = "/usr/bin/chromium"


def main() -> None:
    with shop.running(3) as lab:
        shop.talk(lab, shop.ALLOWED, 2)
        shop.talk(lab, shop.ALLOWED[:12], by_service=True)
        shop.talk(lab, shop.DENIED_LATER)
        server = PageServer(Live(Asked((), True, None, "", "default")), 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            take(browser, server)
            browser.close()
        server.shutdown()
        server.server_close()
        server.live.close()


def take(browser: Browser, server: PageServer) -> None:
    light = opened(browser, server, "light")
    save(light, "ui-graph-light")
    light.locator(".switch", has_text="Workloads").get_by_text("Pods").click()
    save(light, "ui-pods-light")
    light.locator("#tab-table").click()
    light.locator("tr.denied button").first.click()
    light.locator("#panel .policy").first.wait_for()
    save(light, "ui-why-light")
    light.get_by_label("Close", exact=True).click()
    light.locator("#tab-policies").click()
    light.locator(".detail figure").wait_for()
    save(light, "ui-policy-light")
    dark = opened(browser, server, "dark")
    save(dark, "ui-graph-dark")
    dark.locator("#tab-matrix").click()
    dark.locator(".cell").first.wait_for()
    save(dark, "ui-matrix-dark")
    dark.locator("#tab-policies").click()
    dark.get_by_role("button", name="What if it were different?").click()
    manifest = dark.locator("textarea")
    manifest.fill(manifest.input_value().replace("metadata.name: orders", "metadata.name: reports"))
    dark.locator("#tab-graph").click()
    dark.get_by_role("button", name="Rehearse").click()
    dark.locator("#panel .sentence").wait_for()
    manifest.evaluate("of => of.scrollTop = 0")
    save(dark, "ui-plan-dark")


def opened(browser: Browser, server: PageServer, scheme: str) -> Page:
    page = browser.new_page(
        viewport={"width": WIDTH, "height": HEIGHT},
        color_scheme=scheme,  # type: ignore[arg-type]  # light or dark
        reduced_motion="reduce",
    )
    page.goto(server.url)
    page.locator(".mark.denied").first.wait_for()
    return page


def save(page: Page, name: str) -> None:
    """A picture; what is drawn has been told, so that two frames later it stands."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.screenshot(path=HERE / f"{name}.png")


if __name__ == "__main__":
    main()
