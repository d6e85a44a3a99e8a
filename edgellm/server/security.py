"""Who may ask: the Host and the Origin of every request, the key, and what a page of another site may send.

A web page can make a browser send requests to this machine. It can never choose the Host header's name freely without
DNS rebinding, cannot leave out Origin on another site's POST, and cannot send application/json without asking first;
so all three are checked, on every method.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgellm.formats.errors import ParameterError
from edgellm.server.errors import ServerError


@dataclass(frozen=True)
class Access:
    """Who is let in.

    host      what the server listens on
    keys      any of them opens; none is needed where there are none, which only a loopback address may have
    names     further names in the Host header, such as that of a proxy
    origins   web origins that may call besides those of this machine, such as ``https://app.example``
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not all(key.isascii() and key.strip() == key and key for key in self.keys):
            raise ParameterError("--api-key must be letters, digits and signs of ASCII, without blanks around it.")
        if not self.keys and not is_loopback(self.host):
            raise ParameterError(
                f"--host {self.host} is open to other machines and there is no key. Give one with --api-key, or stay "
                "on 127.0.0.1."
            )

    def check(self, headers: Mapping[str, str], *, public: bool) -> None:
        """ServerError permission or authentication for a request that may not come in."""
        self.check_host(headers.get("host", ""))
        self.allowed_origin(headers)
        if not public and self.keys and not self.knows(headers):
            raise ServerError(
                "authentication",
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                headers={"www-authenticate": "Bearer"},
            )

    def check_host(self, host: str) -> None:
        """An address, this machine's own names, or one that was allowed: never a name that a stranger's DNS gives."""
        name = host_name(host)
        local = name == "localhost" or name.endswith(".localhost") or is_address(name)
        if not (local or name in self.names or name in own_names()):
            raise ServerError(
                "permission",
                f"The Host header is {host[:100]!r}, which is no name of this server. Allow it with --allowed-host.",
            )

    def allowed_origin(self, headers: Mapping[str, str]) -> str | None:
        """The Origin header, where there is one; ServerError permission for one that may not call."""
        origin = headers.get("origin")
        if origin is None:
            return None
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
            same = parts.netloc.lower() == headers.get("host", "").lower() != ""
        except ValueError:
            parts, name, same = None, "", False
        near = name == "localhost" or name.endswith(".localhost") or is_loopback(name)
        if parts is not None and parts.scheme in ("http", "https") and (same or near):
            return origin
        if origin in self.origins:
            return origin
        raise ServerError(
            "permission", f"The page {origin[:100]!r} may not call this server. Allow it with --allowed-origin."
        )

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Whether one of the keys was sent."""
        return self.key_of(headers) is not None

    def key_of(self, headers: Mapping[str, str]) -> str | None:
        """The key that was sent, as it stands in ``keys``."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        # each is compared with each: the time tells nothing
        matches = [key for one in sent for key in self.keys if hmac.compare_digest(one.encode(), key.encode())]
        return matches[0] if matches else None


def check_json(headers: Mapping[str, str]) -> None:
    """ServerError 415 unless the body is said to be JSON: any other type may come from a page without asking."""
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.lower().partition("charset=")[2].strip(' "')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8"):
        raise ServerError(
            "invalid_request",
            f"The content-type is {headers.get('content-type', '')[:100]!r}. It must be application/json, in UTF-8.",
            "content-type",
            status=415,
        )
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise ServerError(
            "invalid_request", "The body is compressed. Send it as it is.", "content-encoding", status=415
        )


def cors_headers(origin: str | None) -> dict[str, str]:
    """What lets the page of an allowed origin read the reply."""
    if origin is None:
        return {}
    return {"access-control-allow-origin": origin, "vary": "Origin"}


PREFLIGHT_HEADERS = {
    "access-control-allow-methods": "GET, HEAD, POST, DELETE, OPTIONS",
    "access-control-allow-headers": "*, Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta",
    "access-control-max-age": "600",
}


def host_name(host: str) -> str:
    """The Host header without its port, in lower case; of an IPv6 address what stands in the brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def is_address(name: str) -> bool:
    """Whether it is an address, which no DNS can turn around."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether only this machine reaches it."""
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def own_names() -> Iterable[str]:
    """The names by which the local network may know this machine."""
    name = socket.gethostname().lower()
    return (name, f"{name.partition('.')[0]}.local")
