"""From the bytes of a request to a typed body: UTF-8, JSON of bounded size and depth, every field known and in range.

A body is a msgspec Struct; its types and bounds are the checks, and an error names the field. A field that the Struct
does not have is refused by name, unless it is listed in ``ignored``: what changes nothing in the answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import msgspec

from edgellm.server.errors import ServerError, invalid

MAX_BODY_NBYTES = 16 << 20
MAX_DEPTH = 64

_AT = re.compile(r" - at `\$?(?P<path>[^`]*)`$")
_KEY_AT = re.compile(r" - at `key` in `\$?(?P<path>[^`]*)`$")
_NAMED = re.compile(r"field `(?P<name>[^`]*)`")

LARGE_NBYTES = 1 << 16  # a body that is read on a thread: others have their turn meanwhile

B = TypeVar("B", bound="Body")
T = TypeVar("T")


class Body(msgspec.Struct, kw_only=True):
    """A request's body."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    listed: ClassVar[str] = ""  # the field that a body is, where it is a list in place of an object


def decode(raw: bytes, body: type[B]) -> B:
    """``raw`` as a ``body``; ServerError invalid_request with the field's name for whatever is wrong."""
    return decode_both(raw, body)[0]


def decode_both(raw: bytes, body: type[B]) -> tuple[B, dict[str, Any]]:
    """The same, and beside it the JSON as it was sent, with the fields that are ignored."""
    data = parse(raw)
    if body.listed and isinstance(data, list):
        data = {body.listed: data}
    if not isinstance(data, dict):
        raise invalid(None, f"The body is JSON, but a {_kind(data)}. It must be an object.")
    known = {field.encode_name for field in msgspec.structs.fields(body)}
    for name in data:
        if name not in known and name not in body.ignored:
            raise invalid(_short(name), "edgellm does not know this field. Leave it out.")
    try:
        return msgspec.convert({name: value for name, value in data.items() if name in known}, body), data
    except msgspec.ValidationError as error:
        raise wrong_shape(error) from None


async def beside(nbytes: int, read: Callable[..., T], *arguments: Any) -> T:
    """``read(*arguments)``, on a thread where the body has many bytes."""
    return await asyncio.to_thread(read, *arguments) if nbytes > LARGE_NBYTES else read(*arguments)


def parse(raw: bytes) -> Any:
    """The JSON of a body; ServerError for what is none, or is nested too deeply."""
    if not raw.strip():
        raise invalid(None, "The body is empty. It must be a JSON object.")
    try:
        data = msgspec.json.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(None, f"The body is not JSON in UTF-8: {error}.") from None
    check_depth(data, MAX_DEPTH)
    return data


def check_depth(data: Any, most: int) -> None:
    """ServerError for values that are nested deeper than ``most``."""
    level, depth = [data], 0
    while level := [
        inner
        for value in level
        if isinstance(value, dict | list)
        for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > most:
            raise _too_deep()


def shown(text: str) -> str:
    """A text as clients get it: U+FFFD stands for what is no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _too_deep() -> ServerError:
    return invalid(None, f"The body is nested deeper than {MAX_DEPTH}. Send a flatter one.")


def wrong_shape(error: msgspec.ValidationError, where: str = "") -> ServerError:
    """msgspec's message with the field in front; ``where`` the part stands that was looked at, "" for all of a body."""
    message = str(error)
    found = _KEY_AT.search(message) or _AT.search(message)
    path = where + (found["path"] if found else "")
    said = message[: found.start()] if found else message
    missing = _NAMED.search(said)
    if missing and said.startswith(("Object missing", "Object contains")):
        path = f"{path}.{missing['name']}"
        said = "it is missing" if said.startswith("Object missing") else "edgellm does not know this field"
    return invalid(path.lstrip(".") or None, said.replace("`", "") + ".")


def _short(name: str) -> str:
    return name if len(name) <= 64 else name[:64] + "..."


def _kind(data: Any) -> str:
    return {list: "list", str: "text", bool: "boolean", type(None): "null"}.get(type(data), "number")
