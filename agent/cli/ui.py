"""`podwall ui`: one local web page that shows flows and policies, and asks why and plan by clicking."""

from __future__ import annotations

import html
import os
import signal
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from agent.cli.cluster import Asked, cluster_options
from agent.cli.signals import handled, interrupt


@click.command("ui")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="On 127.0.0.1; else any free one.")
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
@cluster_options
def ui(asked: Asked, port: int, no_browser: bool) -> None:
    """Serve one page for this machine's browser: who talks to whom, what is denied, and why.

    It listens on 127.0.0.1 alone, and answers only to the address that it prints, which holds a secret. It
    ends with Ctrl-C. It reads the same as the other commands and changes nothing.

    \b
    podwall ui                    the cluster of the kubeconfig, else the lab
    podwall ui -f manifests/      what manifests say; there is no traffic then
    podwall ui --port 8080 --no-browser    for `ssh -L 8080:127.0.0.1:8080`
    """
    from agent.ui.live import Live  # noqa: PLC0415 - help needs none of it
    from agent.ui.server import PageServer  # noqa: PLC0415

    live = Live(asked)
    live.looked()
    try:
        server = PageServer(live, port)
    except OSError as error:
        raise click.ClickException(f"port {port} of 127.0.0.1 cannot be used: {error.strerror}") from error
    click.get_current_context().with_resource(handled(signal.SIGTERM, by=interrupt))
    try:
        with _shown(server.url, show=not no_browser):
            click.echo(f"podwall ui of {asked.where}: {server.url}")
            click.echo("Ctrl-C ends it.", err=True)
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        click.echo("ended", err=True)
    finally:
        server.server_close()
        live.close()


@contextmanager
def _shown(url: str, *, show: bool) -> Iterator[None]:
    """Open the page by a file that only this user can read: a program's arguments, everybody can."""
    if not show or not _has_browser():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="podwall-ui-") as directory:
        page = Path(directory) / "open.html"
        page.write_text(f'<meta http-equiv="refresh" content="0; url={html.escape(url)}">\n')
        webbrowser.open(page.as_uri())
        yield


def _has_browser() -> bool:
    """Whether a browser may be started: there is a screen, and one's own user; browsers refuse root."""
    return os.geteuid() != 0 and bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
