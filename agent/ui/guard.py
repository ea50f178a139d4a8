"""Who may ask the page's server what. Pure.

    Host     must be this machine's loopback: a foreign name that resolves here is refused (DNS rebinding)
    Origin   where one is sent, it must be this server: other pages' requests are refused
    token    every call under /api/ carries it as `Authorization: Bearer`; the page has it from its URL's
             fragment, which no browser sends to a server, writes into a Referer or shows another port

A cookie would do less: browsers show it to every port of 127.0.0.1 and send it whoever asks.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

OWN_NAMES = frozenset({"127.0.0.1", "localhost"})
API = "/api/"

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What every answer carries. Trusted types: markup cannot be made of text anywhere in the page."""


class Refusal(NamedTuple):
    """The HTTP status of a refusal, and what to say."""

    status: int
    message: str


def refusal(path: str, headers: Mapping[str, str], token: str) -> Refusal | None:
    """Why a request is not answered; None when it may be. `headers` are by their lower-case names."""
    if _hostname(f"//{headers.get('host', '')}") not in OWN_NAMES:
        return Refusal(421, "this server is asked as 127.0.0.1 or localhost only")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers["host"]:
        return Refusal(403, "another page may not ask this server")
    if path.startswith(API) and not _is_token(headers.get("authorization", ""), token):
        return Refusal(401, "the token is missing or wrong: open the address that `podwall ui` printed")
    return None


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_token(authorization: str, token: str) -> bool:
    return hmac.compare_digest(authorization.encode("utf-8", "replace"), f"Bearer {token}".encode())
