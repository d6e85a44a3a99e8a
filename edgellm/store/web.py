"""Open a URL by the rules that an untrusted server must keep; every failure has a name.

https only, but for this machine itself (http to a loopback address). Redirects are followed by hand: at most ten, never
from https to anything else, and the authorization header stays with the host that it was meant for.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import ssl
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import IO, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from edgellm.formats.errors import DownloadError
from edgellm.store.connection import Proxy, TooMuchError, TooSlowError, proxy_of, request

MAX_REDIRECTS = 10
STALL_S = 30.0  # a connection that gives no byte for so long is dead
BACKOFF_S = 0.5  # before another try, doubled with each
MOST_WAIT_S = 60.0  # that a server may ask for before another try
PAGE_TRIES = 3
PAGE_NBYTES = 32 << 20  # the longest index page that is read

REDIRECTS = frozenset({301, 302, 303, 307, 308})
WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})


T = TypeVar("T")


class TransientError(DownloadError):
    """The same request may work a moment later. ``wait_s`` is how long the server asks to wait."""

    code = "PULL_NETWORK"
    wait_s: float | None = None


class RefusedError(DownloadError):
    """The server's answer was an error: its status, its own words, and its name for the error, where it gives them."""

    status = 0
    said = ""
    kind = ""


class Answer:
    """A server's answer: its status, its headers, and a body to read piece by piece."""

    def __init__(self, url: str, status: int, headers: Message, body: IO[bytes], proxy: Proxy | None = None) -> None:
        self.url = url
        self.status = status
        self.headers = headers
        self._body = body
        self._proxy = proxy
        self._ahead = b""

    def read(self, nbytes: int) -> bytes:
        """Up to ``nbytes`` as soon as any are there; empty at the end. TransientError when the connection fails."""
        if self._ahead:
            piece, self._ahead = self._ahead[:nbytes], self._ahead[nbytes:]
            return piece
        with _named_failures(self.url, self._proxy):
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

    DownloadError: PULL_URL, PULL_REDIRECT, PULL_NOT_FOUND, PULL_AUTH, PULL_HTTP, PULL_TLS, PULL_PROXY, PULL_CONTENT;
    RefusedError among them for an answer that is an error. TransientError: PULL_NETWORK, PULL_TIMEOUT, PULL_SLOW,
    PULL_SERVER.
    """
    url = as_sent(url)
    parts = check_url(url)
    sent = {"User-Agent": "edgellm", "Accept-Encoding": "identity", **(headers or {})}
    for _ in range(MAX_REDIRECTS + 1):
        proxy = None if is_loopback(parts.hostname) else proxy_of(url)  # it cannot reach this machine's own address
        with _named_failures(url, proxy):
            response = request(url, sent, proxy, STALL_S if stall_s is None else stall_s)
        answer = Answer(url, response.status, response.headers, response, proxy)
        try:
            if answer.status not in REDIRECTS or "Location" not in answer.headers:
                _check_status(answer, proxy)
                yield answer
                return
            target = urljoin(url, as_sent(answer.headers["Location"]))
        finally:
            answer._body.close()
        new = _check_redirect(parts, target)
        if (new.scheme, new.hostname, new.port) != (parts.scheme, parts.hostname, parts.port):
            sent.pop("Authorization", None)
        url, parts = target, new
    raise DownloadError(
        f"{shown(url)}: more than {MAX_REDIRECTS} redirects. The server leads in a circle.", code="PULL_REDIRECT"
    )


def as_sent(url: str) -> str:
    """A URL with its blanks, control codes and letters beyond ASCII spelled as a server wants them."""
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def patiently(ask: Callable[[], T]) -> T:
    """What ``ask`` gives, asked again after a TransientError, PAGE_TRIES times in all."""
    for waited in range(PAGE_TRIES - 1):
        try:
            return ask()
        except TransientError as error:
            pause(error, BACKOFF_S * 2**waited)
    return ask()


def pause(error: TransientError, seconds: float) -> None:
    """Wait before another try, as long as the server asks for; raises ``error`` when that is more than MOST_WAIT_S."""
    if (error.wait_s or 0.0) > MOST_WAIT_S:
        raise error
    time.sleep(max(seconds, error.wait_s or 0.0))


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


def _check_status(answer: Answer, proxy: Proxy | None) -> None:
    status, where = answer.status, shown(answer.url)
    transfer = answer.headers.get("Transfer-Encoding", "chunked").strip().lower()
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity" or transfer not in ("chunked", "identity"):
        raise DownloadError(f"{where}: the server packs its answer, which was not asked for.", code="PULL_CONTENT")
    if status in (200, 206, 416):
        return
    said = one_line_of(answer.headers.get("X-Error-Message", ""))
    words = f" and says: {said.rstrip('.')}" if said else ""
    if status in WORTH_ANOTHER_TRY:
        wait_s = _wanted_pause(answer.headers.get("Retry-After", ""))
        when = f"in {wait_s:.0f} seconds" if wait_s else "later"
        error = TransientError(f"{where}: the server answered {status}{words}. Try again {when}.", code="PULL_SERVER")
        error.wait_s = wait_s
        raise error
    if status == 407:
        raise _proxy_wants_password(where, proxy)
    code, advice = {
        401: ("PULL_AUTH", "it wants you to be known to it"),
        403: ("PULL_AUTH", "it wants you to be known to it"),
        404: ("PULL_NOT_FOUND", "there is no such file. Check the name"),
        410: ("PULL_NOT_FOUND", "there is no such file any more. Check the name"),
    }.get(status, ("PULL_HTTP", "200 was expected"))
    refused = RefusedError(f"{where}: the server answered {status}{words}; {advice}.", code=code)
    refused.status, refused.said, refused.kind = status, said, answer.headers.get("X-Error-Code", "")
    raise refused


def _wanted_pause(text: str) -> float | None:
    """Seconds of a Retry-After header, which may also be a date."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _proxy_wants_password(where: str, proxy: Proxy | None) -> DownloadError:
    by, setting = (str(proxy), proxy.setting) if proxy else ("a proxy", "HTTPS_PROXY")
    return DownloadError(
        f"{where}: {by} wants a name and a password (407). Write them into {setting}, "
        "as in http://name:password@host:port.",
        code="PULL_PROXY",
    )


@contextmanager
def _named_failures(url: str, proxy: Proxy | None) -> Iterator[None]:
    """Gives the many exceptions of a connection their names."""
    where, through = shown(url), f" through {proxy}" if proxy else ""
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
                f"{where}: no byte came{through} for too long. Check the network.", code="PULL_TIMEOUT"
            ) from raised
        if isinstance(error, TooSlowError):
            raise TransientError(
                f"{where}: the server is too slow{through} ({error}). Check the network, or pull again later.",
                code="PULL_SLOW",
            ) from raised
        if isinstance(error, TooMuchError):
            raise DownloadError(
                f"{where}: the server sends no sound answer ({error}).", code="PULL_CONTENT"
            ) from raised
        if "407" in str(error) and "unnel" in str(error):
            raise _proxy_wants_password(where, proxy) from raised
        advice = f"Check it, or set NO_PROXY={urlsplit(url).hostname}" if proxy else "Check the network"
        raise TransientError(f"{where}: the connection{through} failed ({error}). {advice}.") from raised


def shown(url: str) -> str:
    """The URL without its password and its query, which may be a signature; a very long one is cut."""
    plain = re.sub(r"//[^/?#]*@", "//", url).split("?", 1)[0].split("#", 1)[0]
    return plain if len(plain) <= 300 else f"{plain[:200]}...{plain[-60:]}"


def one_line_of(text: str) -> str:
    """A server's words on one line, as many as a message has room for."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else f"{words[:300]}..."
