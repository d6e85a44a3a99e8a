"""From an address as people copy it out of a browser to a reference: one spelling for each model of a hub."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qs, quote, unquote, urlsplit

from edgellm.formats.errors import DownloadError

PUBLIC = "huggingface.co"
HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co"})
VIEWS = ("tree", "blob", "resolve", "raw")  # of a repository; a revision follows
NO_MODELS = frozenset({"datasets", "spaces", "docs", "blog", "papers", "collections", "organizations", "settings"})

_ADDRESS = re.compile(r"(?:https?://)?(?P<host>[^/?#]+)/(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_SCHEME = re.compile(r"(hf|https?|pypi|path):", re.IGNORECASE)


def reference_of(text: str) -> str:
    """The reference that a pasted address means; anything else as it is, without blanks around it.

    DownloadError PULL_NAME for a page of a hub that names no model that can be pulled.
    """
    text = text.strip()
    if scheme := _SCHEME.match(text):
        text = scheme[0].lower() + text[scheme.end() :]
    if text.startswith("hf:"):
        return _reference(text, PUBLIC, text[3:])
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return text
    host, view = match["host"].lower(), match["rest"].split("/")[2:3]
    if host not in HOSTS and (host not in _own_hub() or not view or view[0] not in VIEWS):  # a mirror has other files
        return text
    return _reference(text, host, match["rest"])


def _own_hub() -> set[str]:
    """The host of HF_ENDPOINT."""
    try:
        host = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    except ValueError:
        return set()
    return {host.lower()} if host else set()


def _reference(text: str, host: str, rest: str) -> str:
    path, _, query = rest.partition("#")[0].partition("?")
    names = [unquote(name) for name in path.split("/") if name]
    if names[:2] == ["api", "models"]:
        names = names[2:]
    elif names[:1] == ["models"]:
        names = names[1:]
    if text.startswith("hf:") and not rest.startswith("//") and (len(names) < 3 or names[2] not in VIEWS):
        return "hf:" + rest.rstrip("/")  # the source judges it
    if len(names) < 2 or names[0] in NO_MODELS:
        raise DownloadError(
            f"{text}: that page is no model. Expected https://{host}/owner/repo, or the address of one of its files.",
            code="PULL_NAME",
        )
    repo, inside = "/".join(names[:2]), names[2:]
    if not inside or inside[0] not in VIEWS:
        is_file = bool(inside) and inside[-1].lower().endswith(".gguf")
        return "hf:" + "/".join(names) if is_file or not text.lower().startswith("http") else f"hf:{repo}"
    revision, file = (inside[1] if len(inside) > 1 else "main"), "/".join(inside[2:])
    if not file:
        file = (parse_qs(query).get("show_file_info") or [""])[0]
    if revision != "main":
        if file.lower().endswith(".gguf"):
            return f"https://{host}/{repo}/resolve/{quote(revision, safe='')}/{quote(file)}"
        raise DownloadError(
            f"{text}: edgellm pulls from the revision main. For a file of {revision!r} give the file's own address.",
            code="PULL_NAME",
        )
    if file.lower().endswith(".gguf"):
        return f"hf:{repo}/{file}"
    return f"hf:{repo}:{file.rpartition('/')[2]}" if file and inside[0] == "tree" else f"hf:{repo}"
