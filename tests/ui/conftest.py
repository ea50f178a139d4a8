"""A headless Chromium of the distribution, and pages that must end without a complaint in their console."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from agent.ui.server import PageServer
from lab.limits import SLOWNESS

LIMIT_MS = 10_000 * SLOWNESS
Open: TypeAlias = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or make test")
    expect.set_options(timeout=LIMIT_MS)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # it refuses root else
        yield made
        made.close()


def is_complaint(message: ConsoleMessage) -> bool:
    """Whether the page did something wrong; a question that was refused is none of that."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a server's page; at the end nothing may have been complained of or fetched from elsewhere."""
    contexts = []
    complaints: list[str] = []
    asked: set[str] = set()
    servers: set[str] = set()

    def opened(server: PageServer, *, scheme: str = "light", width: int = 1440, trusted: bool = True) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]  # light or dark
            reduced_motion="reduce",
            bypass_csp=not trusted,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        page.on("console", lambda of: complaints.append(of.text) if is_complaint(of) else None)
        page.on("pageerror", lambda of: complaints.append(str(of)))
        page.on("dialog", lambda of: complaints.append(f"dialog {of.message}"))
        page.on("request", lambda of: asked.add(of.url))
        servers.add(f"http://127.0.0.1:{server.server_port}/")
        page.goto(server.url)
        page.wait_for_selector("#summary span")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(tuple(servers))] == []
