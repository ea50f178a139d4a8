"""Who is answered: this machine's own name, its own page, and who has the token."""

from __future__ import annotations

import pytest

from agent.ui.guard import HEADERS, refusal

TOKEN = "s3cret"
OWN = {"host": "127.0.0.1:8080", "authorization": f"Bearer {TOKEN}"}

REFUSED = [
    ("a foreign name that resolves here", "/", {"host": "evil.example:8080"}, 421),
    ("a name that begins like ours", "/", {"host": "127.0.0.1.evil.example"}, 421),
    ("a name before an @", "/", {"host": "127.0.0.1@evil.example"}, 421),
    ("no name", "/", {}, 421),
    ("a broken name", "/", {"host": "[::1"}, 421),
    ("another address of this machine", "/", {"host": "192.0.2.1:8080"}, 421),
    ("another page", "/", {**OWN, "origin": "http://evil.example"}, 403),
    ("another port's page", "/api/state", {**OWN, "origin": "http://127.0.0.1:9"}, 403),
    ("a sandboxed page", "/api/state", {**OWN, "origin": "null"}, 403),
    ("no token", "/api/state", {"host": "127.0.0.1:8080"}, 401),
    ("another token", "/api/state", {**OWN, "authorization": "Bearer other"}, 401),
    ("the token as something else", "/api/state", {**OWN, "authorization": TOKEN}, 401),
    ("a token that is no ASCII", "/api/state", {**OWN, "authorization": "Bearer \u00e9\udc80"}, 401),
]
ANSWERED = [
    ("the page, without a token", "/", {"host": "127.0.0.1:8080"}),
    ("by the other name", "/app.js", {"host": "localhost:8080"}),
    ("through a tunnel from another port", "/api/state", {**OWN, "host": "localhost:9999"}),
    ("its own page", "/api/plan", {**OWN, "origin": "http://127.0.0.1:8080"}),
]


@pytest.mark.parametrize(
    ("path", "headers", "status"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_it_is_refused(path: str, headers: dict[str, str], status: int) -> None:
    found = refusal(path, headers, TOKEN)
    assert found is not None
    assert found.status == status


@pytest.mark.parametrize(("path", "headers"), [case[1:] for case in ANSWERED], ids=[c[0] for c in ANSWERED])
def test_it_is_answered(path: str, headers: dict[str, str]) -> None:
    assert refusal(path, headers, TOKEN) is None


def test_no_script_of_the_page_comes_from_elsewhere_or_from_text() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
