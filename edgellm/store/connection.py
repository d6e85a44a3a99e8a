"""One request to a server: through this machine's proxies, by the certificates it trusts, and never for ever.

A server that says little, slowly and without end is given up: each byte that it sends, of headers, chunk sizes and
trailers too, is counted where it leaves the socket.
"""

from __future__ import annotations

import http.client
import importlib.util
import io
import os
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from edgellm.formats.errors import DownloadError

LEAST_RATE = 1000  # bytes a second, a fifth of what an old modem had
WINDOW_S = 60.0  # of waiting for bytes, over which the rate is taken
OVERHEAD_NBYTES = 1 << 20  # of all that is not the body
OVERHEAD_SHARE = 8  # times the body: a chunk of one byte has five more around it
PROXY_SCHEMES = ("http", "https")


class TooSlowError(OSError):
    """The server sends less than LEAST_RATE."""


class TooMuchError(OSError):
    """The server sends more around the body than any body needs."""


class Proxy(NamedTuple):
    """A proxy and where it is set, such as ``HTTPS_PROXY``."""

    url: str
    setting: str

    def __str__(self) -> str:
        without_password = re.sub(r"^(.*//)?[^/]*@", r"\1", self.url)
        return f"the proxy {without_password} ({self.setting})"


def proxy_of(url: str) -> Proxy | None:
    """The proxy that this machine's settings want for a URL. DownloadError PULL_PROXY for one of an unknown kind."""
    parts, settings = urlsplit(url), urllib.request.getproxies()
    for scheme in (parts.scheme, "all"):
        if scheme in settings and not urllib.request.proxy_bypass(parts.netloc):
            names = (name for name in os.environ if name.lower() == f"{scheme}_proxy" and os.environ[name])
            proxy = Proxy(settings[scheme], next(names, "the system's settings"))
            kind = proxy.url.partition("://")[0].lower() if "://" in proxy.url else "http"
            if kind not in PROXY_SCHEMES:
                raise DownloadError(
                    f"{proxy} is of the kind {kind}. edgellm speaks with http proxies. Set {proxy.setting} to an "
                    f"http:// address, or NO_PROXY={parts.hostname} to go without.",
                    code="PULL_PROXY",
                )
            return proxy
    return None


def request(url: str, headers: Mapping[str, str], proxy: Proxy | None, timeout_s: float) -> http.client.HTTPResponse:
    """The answer to one GET, whatever its status. DownloadError PULL_TLS for certificates that cannot be read;
    OSError, HTTPException and ValueError as urllib raises them, TooSlowError and TooMuchError from its body too."""
    scheme = urlsplit(url).scheme
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({scheme: proxy.url} if proxy else {}),
        _HTTP(),
        _HTTPS(context=tls_context() if scheme == "https" else None),
    ):
        opener.add_handler(handler)
    answer: http.client.HTTPResponse = opener.open(
        urllib.request.Request(url, headers=dict(headers)), timeout=timeout_s
    )
    return answer


def tls_context() -> ssl.SSLContext:
    """What this machine trusts. DownloadError PULL_TLS for certificates that cannot be read."""
    return _trusted(tuple((name, os.environ.get(name)) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")))


@cache
def _trusted(variables: tuple[tuple[str, str | None], ...]) -> ssl.SSLContext:
    """The system's certificates, certifi's, and those of the variables, which OpenSSL passes over when they are bad."""
    context = ssl.create_default_context()
    if importlib.util.find_spec("certifi"):  # some Pythons know no certificate authority of their own
        import certifi

        context.load_verify_locations(certifi.where())
    for name, value in variables:
        try:
            if value and name == "SSL_CERT_FILE":
                context.load_verify_locations(cafile=value)
            elif value and not all(Path(folder).is_dir() for folder in value.split(os.pathsep)):
                raise NotADirectoryError(0, "no such folder")
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            reason = getattr(error, "strerror", None) or str(error)
            raise DownloadError(
                f"{name}={value}: {reason}. Set it to the PEM certificates that you trust besides the usual ones, "
                "or unset it.",
                code="PULL_TLS",
            ) from None
    return context


class _Counted(io.RawIOBase):
    """The bytes of a socket, with an eye on their rate and their number."""

    def __init__(self, sock: socket.socket) -> None:
        self._raw = sock.makefile("rb", buffering=0)
        self._total = self._useful = self._window = 0
        self._waited_s = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        n: int | None = self._raw.readinto(buffer)
        self._waited_s += time.monotonic() - began
        self._total, self._window = self._total + (n or 0), self._window + (n or 0)
        if not n:
            return n
        if self._waited_s >= WINDOW_S:
            if self._window < LEAST_RATE * self._waited_s:
                raise TooSlowError(f"{self._window} bytes came in {self._waited_s:.0f} seconds")
            self._waited_s, self._window = 0.0, 0
        if self._total > OVERHEAD_NBYTES + OVERHEAD_SHARE * self._useful:
            raise TooMuchError(f"{self._total:,} bytes of headers and the like for {self._useful:,} of the body")
        return n

    def used(self, n: int) -> None:
        """So many bytes of the body have reached the reader."""
        self._useful += n

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self._counted = _Counted(sock)
        self.fp = io.BufferedReader(self._counted)

    def read1(self, n: int = -1) -> bytes:
        piece: bytes = super().read1(n)
        self._counted.used(len(piece))
        return piece


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=self._context)  # type: ignore[attr-defined]
