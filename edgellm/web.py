"""Open a URL by the rules that a stranger's server must keep; every failure has a name.

https only, but for this machine itself (http to a loopback address). Redirects are followed by hand: at most ten, never
from https to anything else, and the authorization header stays with the host that it was meant for.
"""

from __future__ import annotations

import http.client
import importlib.util
import ipaddress
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from functools import cache
from typing import IO, Any, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from edgellm.formats.errors import DownloadError

MAX_REDIRECTS = 10
STALL_S = 30.0  # a connection that gives no byte for so long is dead
BACKOFF_S = 0.5  # before another try, doubled with each
PAGE_TRIES = 3
PAGE_NBYTES = 32 << 20  # the longest index page that is read

REDIRECTS = frozenset({301, 302, 303, 307, 308})
WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})


T = TypeVar("T")


class TransientError(DownloadError):
    """The same request may work a moment later."""

    code = "PULL_NETWORK"


class Answer:
    """A server's answer: its status, its headers, and a body to read piece by piece."""

    def __init__(self, url: str, status: int, headers: Message, body: IO[bytes]) -> None:
        self.url = url
        self.status = status
        self.headers = headers
        self._body = body
        self._ahead = b""

    def read(self, nbytes: int) -> bytes:
        """Up to ``nbytes`` as soon as any are there; empty at the end. TransientError when the connection fails."""
        if self._ahead:
            piece, self._ahead = self._ahead[:nbytes], self._ahead[nbytes:]
            return piece
        with _named_failures(self.url):
            return self._body.read1(nbytes)  # type: ignore[attr-defined]

    def peek(self, nbytes: int) -> bytes:
        """The next ``nbytes``, fewer only at the end, without taking them away."""
        ahead = self._ahead
        while len(ahead) < nbytes:
            self._ahead = b""
            if not (piece := self.read(nbytes - len(ahead))):
                break
            ahead += piece
        self._ahead = ahead
        return ahead

    def length(self) -> int | None:
        """The length that the server promises for this body."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else None


def is_loopback(host: str | None) -> bool:
    """Whether a host name means this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def check_url(url: str, code: str = "PULL_URL") -> SplitResult:
    """The parts of ``url`` when it may be opened; DownloadError otherwise. Passwords inside a URL are refused too."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"{url!r} is not a URL: {error}.", code=code) from None
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise DownloadError(
            f"{shown(url)}: models are fetched over https only (http just from this machine itself). "
            "Give an https address, or download the file yourself and pass its path.",
            code=code,
        )
    if not host or "@" in parts.netloc:
        raise DownloadError(f"{shown(url)}: the address needs a host and may not hold a password.", code=code)
    return parts


@contextmanager
def open_url(url: str, headers: Mapping[str, str] | None = None, stall_s: float | None = None) -> Iterator[Answer]:
    """The answer to GET ``url``, redirects followed; status 200, 206 or 416, anything else is an error.

    DownloadError: PULL_URL, PULL_REDIRECT, PULL_NOT_FOUND, PULL_AUTH, PULL_HTTP, PULL_TLS.
    TransientError: PULL_NETWORK, PULL_TIMEOUT, PULL_SERVER.
    """
    parts = check_url(url)
    sent = {"User-Agent": "edgellm", "Accept-Encoding": "identity", **(headers or {})}
    for _ in range(MAX_REDIRECTS + 1):
        answer = _get(url, sent, is_loopback(parts.hostname), STALL_S if stall_s is None else stall_s)
        try:
            if answer.status not in REDIRECTS:
                _check_status(answer)
                yield answer
                return
            target = urljoin(url, answer.headers.get("Location", ""))
        finally:
            answer._body.close()
        new = _check_redirect(parts, target)
        if (new.scheme, new.hostname, new.port) != (parts.scheme, parts.hostname, parts.port):
            sent.pop("Authorization", None)
        url, parts = target, new
    raise DownloadError(
        f"{shown(url)}: more than {MAX_REDIRECTS} redirects. The server leads in a circle.", code="PULL_REDIRECT"
    )


def patiently(ask: Callable[[], T]) -> T:
    """What ``ask`` gives, asked again after a TransientError, PAGE_TRIES times in all."""
    for waited in range(PAGE_TRIES - 1):
        try:
            return ask()
        except TransientError:
            time.sleep(BACKOFF_S * 2**waited)
    return ask()


def fetch_page(url: str, headers: Mapping[str, str] | None = None) -> str:
    """The text of a small page such as a package index; DownloadError as in open_url."""
    return patiently(lambda: _read_page(url, headers))


def _read_page(url: str, headers: Mapping[str, str] | None) -> str:
    with open_url(url, headers) as answer:
        body = bytearray()
        while piece := answer.read(1 << 16):
            body += piece
            if len(body) > PAGE_NBYTES:
                raise DownloadError(
                    f"{shown(url)}: the page is longer than {PAGE_NBYTES >> 20} MiB.", code="PULL_CONTENT"
                )
    return body.decode("utf-8", errors="replace")


def _check_redirect(parts: SplitResult, target: str) -> SplitResult:
    new = check_url(target, code="PULL_REDIRECT")
    if parts.scheme == "https" and new.scheme != "https":
        raise DownloadError(
            f"{parts.hostname} redirects from https to {shown(target)}. edgellm does not follow it.",
            code="PULL_REDIRECT",
        )
    return new


def _check_status(answer: Answer) -> None:
    status, where = answer.status, shown(answer.url)
    if status in (200, 206, 416):
        return
    if status in WORTH_ANOTHER_TRY:
        raise TransientError(f"{where}: the server answered {status}. Try again later.", code="PULL_SERVER")
    if status in (401, 403):
        raise DownloadError(
            f"{where}: the server answered {status}, it wants you to be known to it. "
            "For a Hugging Face model accept its terms on the web page and set HF_TOKEN.",
            code="PULL_AUTH",
        )
    if status in (404, 410):
        raise DownloadError(f"{where}: there is no such file ({status}). Check the name.", code="PULL_NOT_FOUND")
    raise DownloadError(f"{where}: the server answered {status}, 200 was expected.", code="PULL_HTTP")


class _StopAtRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


@cache
def _opener(loopback: bool) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if importlib.util.find_spec("certifi"):  # some Pythons know no certificate authority of their own
        import certifi

        context.load_verify_locations(certifi.where())
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=context), _StopAtRedirect]
    if loopback:  # a proxy cannot reach this machine's own address
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _get(url: str, headers: Mapping[str, str], loopback: bool, stall_s: float) -> Answer:
    request = urllib.request.Request(url, headers=dict(headers))
    with _named_failures(url):
        try:
            response = _opener(loopback).open(request, timeout=stall_s)
        except urllib.error.HTTPError as answered:
            return Answer(url, answered.code, answered.headers, answered)
        return Answer(url, response.status, response.headers, response)


@contextmanager
def _named_failures(url: str) -> Iterator[None]:
    """Gives the many exceptions of a connection their names."""
    where = shown(url)
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as raised:
        error = raised.reason if isinstance(raised, urllib.error.URLError) else raised
        if isinstance(error, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{where}: its certificate is not to be trusted ({error.verify_message}). Behind a company proxy set "
                "SSL_CERT_FILE to its certificates.",
                code="PULL_TLS",
            ) from raised
        if isinstance(error, TimeoutError):
            raise TransientError(
                f"{where}: no byte came for too long. Check the network.", code="PULL_TIMEOUT"
            ) from raised
        raise TransientError(f"{where}: the connection failed ({error}). Check the network.") from raised


def shown(url: str) -> str:
    """The URL without its password and its query, which may be a signature."""
    return re.sub(r"//[^/?#]*@", "//", url).split("?", 1)[0].split("#", 1)[0]
