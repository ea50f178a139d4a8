"""One connection to the API server, and what goes wrong on it, told in our own errors.

    credentials --> TCP (through a proxy if need be) --> TLS --> request --> answer, whole or line by line

`http.client` of the standard library: it costs 1 MB of memory (urllib3 4, aiohttp 13), and it leaves the
socket in our hands, so that a watch in another thread can be ended at once.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from .credentials import Credentials
from .decode import decode_status
from .errors import BY_STATUS, ApiError, Refused, Unauthorized, Unreachable

CONNECT_S = 5.0
ANSWER_S = 30.0
CHUNK = 65536
LONGEST_LINE = 16 * 1024 * 1024


class Connection:
    """One connection, used by one thread; `abort` may be called by any other."""

    def __init__(
        self,
        credentials: Credentials,
        tls: ssl.SSLContext | None,
        agent: str,
        connect_s: float = CONNECT_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        """Make it; each request opens it when need be. Limits are seconds, for one wait of several."""
        self.credentials = credentials
        self.used = False
        self._connect_s, self._answer_s = connect_s, answer_s
        self._headers = {"User-Agent": agent}
        if credentials.authorization:
            self._headers["Authorization"] = credentials.authorization
        self._tls = tls
        self._http: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._aborted = False

    @property
    def open(self) -> bool:
        """Is there anything to close?"""
        return self._http is not None

    def opened(self) -> socket.socket:
        """The socket to the server, TLS done, for another protocol than this one's. Raises Unreachable."""
        try:
            self._http = self._connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise self._unreachable(error) from error
        assert self._socket is not None
        return self._socket

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> http.client.HTTPResponse:
        """Send a request and return the answer's head; any status but 2xx is raised as an ApiError."""
        headers = {**self._headers, "Accept": accept}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            if self._http is None:
                self._http = self._connect()
            assert self._socket is not None
            self._socket.settimeout(self._answer_s)
            self._http.request(method, target, body=body, headers=headers)
            response = self._http.getresponse()
            self.used = True
            if response.status >= 300:
                raise _error(response, method, target)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise self._unreachable(error) from error
        return response

    def lines(self, response: http.client.HTTPResponse, silence_s: float) -> Iterator[list[bytes]]:
        """The answer's lines as they come, as many at a time as are there; ends when the server ends it.

        Raises Unreachable, also after `silence_s` seconds without a byte.
        """
        assert self._socket is not None
        rest = b""
        try:
            self._socket.settimeout(silence_s)
            while chunk := response.read1(CHUNK):
                *lines, rest = (rest + chunk if rest else chunk).split(b"\n")
                if lines:
                    yield lines
                elif len(rest) > LONGEST_LINE:
                    raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            if rest:
                yield [rest]
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise self._unreachable(error) from error

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """The whole answer.  Raises Unreachable."""
        try:
            return response.read()
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Close it; the next request opens another."""
        with self._lock:
            connection, self._http, self._socket = self._http, None, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """End it for good, whatever its thread is doing with it: that raises Unreachable there."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):
                    # Below TLS: the thread that reads holds the TLS object.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _connect(self) -> http.client.HTTPConnection:
        server = urlsplit(self.credentials.server)
        host, port = server.hostname or "", server.port or (443 if server.scheme == "https" else 80)
        connection = http.client.HTTPConnection(host, port)
        raw = self._open(host, port)
        self._keep(raw)
        try:
            if self._tls is not None:
                raw = self._tls.wrap_socket(raw, server_hostname=self.credentials.server_name or host)
                self._keep(raw)
        except BaseException:
            raw.close()
            raise
        connection.sock = raw
        return connection

    def _open(self, host: str, port: int) -> socket.socket:
        if self.credentials.proxy:
            proxy = urlsplit(self.credentials.proxy)
            tunnel = http.client.HTTPConnection(
                proxy.hostname or "", proxy.port or 80, timeout=self._connect_s
            )
            tunnel.set_tunnel(host, port)
            tunnel.connect()
            raw: socket.socket = tunnel.sock
        else:
            raw = socket.create_connection((host, port), timeout=self._connect_s)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A server that has vanished without a word is noticed after 30 s, not after the silence limit.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        return raw

    def _keep(self, raw: socket.socket) -> None:
        with self._lock:
            if self._aborted:
                raw.close()
                raise OSError("the connection is not wanted any more")
            self._socket = raw

    def _unreachable(self, error: Exception) -> Unreachable:
        why = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            why = "no answer in time"
        elif isinstance(error, http.client.IncompleteRead):
            why = "it ended the connection within an answer"
        return Unreachable(f"API server {self.credentials.server}: {why}")


def tls_context(credentials: Credentials) -> ssl.SSLContext | None:
    """TLS as the credentials want it; None for plain HTTP.  Raises Unauthorized for unusable ones."""
    if not credentials.server.startswith("https:"):
        return None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not credentials.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif credentials.ca:
            context.load_verify_locations(cadata=credentials.ca)
        else:
            context.load_default_certs()
        if credentials.certificate:
            _load_certificate(context, credentials)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise Unauthorized(
            f"the CA, certificate or key for the API server cannot be used: {error}"
        ) from error
    return context


def _load_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    """OpenSSL reads a certificate's key from a file only: one in memory, which no disk ever sees."""
    descriptor = os.memfd_create("podwall-credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, f"{credentials.certificate}\n{credentials.key}".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _error(response: http.client.HTTPResponse, method: str, target: str) -> ApiError:
    body = response.read(LONGEST_LINE)
    status = decode_status(body)
    text = status.message or body[:200].decode(errors="replace").strip() or response.reason
    wait = response.getheader("Retry-After") or ""
    kind = BY_STATUS.get(response.status, Refused)
    return kind(
        f"{method} {urlsplit(target).path}: {response.status} {text}",
        response.status,
        status.reason,
        float(wait) if wait.isascii() and wait.isdigit() else None,
    )
