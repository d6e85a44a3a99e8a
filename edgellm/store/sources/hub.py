"""``hf:owner/repo/file.gguf``, ``hf:owner/repo:Q4_K_M``, ``hf:owner/repo``: a repository of a Hugging Face hub.

The hub's list says which files there are, how long and with which sha256; list and bytes come through our own door to
the network, with its rules, and that sha256 is proved. huggingface_hub knows who the user is. ``HF_ENDPOINT``,
``HF_TOKEN`` and ``HF_HUB_OFFLINE`` count as everywhere.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from edgellm.formats.errors import DownloadError
from edgellm.machine.progress import ByteProgress
from edgellm.store.download import MOST_NBYTES, RemoteFile, check_space, download
from edgellm.store.sources.source import GGUF_MAGIC, Expected, check_name, check_sha256, one, path_in, split_names
from edgellm.store.web import RefusedError, check_url, fetch_page, shown

PUBLIC_HUB = "https://huggingface.co"
WEIGHTS = (".gguf", ".safetensors")
SMALL_NBYTES = 256 << 20  # of any other file: a vocabulary, settings, an index
WANTED = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q8_0")  # the first that a repository has, when the user names none

_BESIDE = re.compile(  # GGUF files that stand beside a model; "imatrix" before a quant only says how that was made
    r"^mtp-|(^|[-._])mmproj([-._]|$)|(^|[-._])imatrix(?!.*[-._](I?Q\d|TQ\d|B?F16|F32|MXFP4))", re.IGNORECASE
)
_COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it."""

    name: str  # its path in the repository
    nbytes: int | None
    sha256: str | None


class Listing(NamedTuple):
    """The files of a repository by name, at one commit, and the token that the hub accepts for it."""

    endpoint: str
    repo: str
    commit: str
    files: dict[str, HubFile]
    token: str | None


class HubSource:
    """Keeps files under ``hf/<owner>/<repo>/``, by their names in the repository."""

    def installed(self, references: tuple[str, ...], root: Path) -> Path | None:
        repo, file, tag = parse(one(references))
        folder = path_in(root, "hf", *repo.split("/"))
        here = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.gguf"))]
        chosen = file if file else choose(here, tag)
        if chosen is None:
            return None
        paths = [path_in(folder, *name.split("/")) for name in split_names(chosen)]
        return paths[0] if all(path.is_file() for path in paths) else None

    def fetch(
        self, references: tuple[str, ...], root: Path, work: Path, expected: Expected, progress: ByteProgress | None
    ) -> Path:
        repo, file, tag = parse(one(references))
        endpoint = hub_endpoint()
        listing = list_files(endpoint, repo)
        files = listing.files
        chosen = file if file in files else choose(list(files), tag) if file is None else None
        if chosen is None or any(name not in files for name in split_names(chosen)):
            models = ", ".join(name for name in files if choose([name], None)) or "none"
            raise DownloadError(
                f"hf:{repo} has no file {file or tag or chosen}. Its models: {models}.", code="PULL_NOT_FOUND"
            )
        wanted = [files[name] for name in split_names(chosen)]
        if len(wanted) == 1:
            wanted = [HubFile(wanted[0].name, expected.nbytes or wanted[0].nbytes, expected.sha256 or wanted[0].sha256)]
        return fetch_files(listing, wanted, path_in(root, "hf", *repo.split("/")), work, progress)


def hub_endpoint() -> str:
    """The address of the hub."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB
    check_url(endpoint)
    return endpoint


def parse(reference: str) -> tuple[str, str | None, str | None]:
    """("owner/repo", file or None, quant tag or None) of what stands behind ``hf:``; DownloadError PULL_NAME."""
    body, _, tag = reference.partition(":")
    names = body.split("/")
    if len(names) < 2 or (len(names) > 2 and tag) or (len(names) > 2 and not body.lower().endswith(".gguf")):
        raise DownloadError(
            f"hf:{reference}: expected hf:owner/repo, hf:owner/repo:QUANT or hf:owner/repo/file.gguf.", code="PULL_NAME"
        )
    for name in names:
        check_name(name)
    return "/".join(names[:2]), "/".join(names[2:]) or None, tag or None


def choose(names: list[str], tag: str | None) -> str | None:
    """The model file of a quant: the shortest name that carries the tag, the first part of it when it is split.

    Without a tag the first of WANTED that is there, then the first file.
    """
    models = [name for name in names if name.lower().endswith(".gguf") and not _BESIDE.search(name.rpartition("/")[2])]
    firsts = sorted((name for name in models if split_names(name)[0] == name), key=lambda name: (len(name), name))
    for wanted in (tag,) if tag else WANTED:
        pattern = re.compile(rf"(^|[-._/]){re.escape(wanted)}([-./]|$)", re.IGNORECASE)
        for name in firsts:
            if pattern.search(name):
                return name
    return None if tag or not firsts else firsts[0]


def list_files(endpoint: str, repo: str) -> Listing:
    """The commit that ``main`` stands at, and its files. DownloadError with a PULL_ code."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"hf:{repo}: HF_HUB_OFFLINE is set. Unset it to pull.", code="PULL_NETWORK")
    url = f"{endpoint}/api/models/{repo}?blobs=true"
    text, token = as_user(repo, user_token(), lambda headers: fetch_page(url, headers))
    try:
        answer = json.loads(text)
        files = [_listed(entry) for entry in answer["siblings"]]
        commit = answer.get("sha")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, DownloadError):
        raise DownloadError(
            f"hf:{repo}: {shown(url)} sent no list of files as a hub does. Check HF_ENDPOINT.", code="PULL_CONTENT"
        ) from None
    revision = commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else "main"
    return Listing(endpoint, repo, revision, {file.name: file for file in files}, token)


def _listed(entry: dict[str, Any]) -> HubFile:
    """One file of the hub's list; ValueError, KeyError and the like when it is none."""
    name, nbytes, lfs = entry["rfilename"], entry.get("size"), entry.get("lfs") or {}
    if not isinstance(name, str) or isinstance(nbytes, bool) or not isinstance(nbytes, int | None) or (nbytes or 0) < 0:
        raise ValueError(entry)
    return HubFile(name, nbytes, check_sha256(lfs.get("sha256")))


def user_token() -> str | None:
    """The user's token for the hub, None without one. DownloadError PULL_AUTH for what can be none."""
    from huggingface_hub import get_token

    token = get_token() or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise DownloadError(f"{_token_name()} holds a character that no token has. Copy it again.", code="PULL_AUTH")
    return token


def as_user(repo: str, token: str | None, ask: Callable[[dict[str, str]], T]) -> tuple[T, str | None]:
    """What ``ask`` gives with the token, and the token; without it, after a warning, when the hub does not accept it
    and wants none. DownloadError in the hub's words."""
    try:
        return ask({"Authorization": f"Bearer {token}"} if token else {}), token
    except RefusedError as error:
        if token is None or error.status not in (401, 403):
            raise _hub_failure(repo, error, token) from error
        try:
            answer = ask({})
        except RefusedError:
            raise _hub_failure(repo, error, token) from error
        said = f" ({error.said})" if error.said else ""
        warnings.warn(
            f"the hub does not accept {_token_name()}{said}. hf:{repo} is public and is pulled without it. "
            "Renew the token, or unset it.",
            stacklevel=2,
        )
        return answer, None


def _token_name() -> str:
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token that is saved for the hub"


def _hub_failure(repo: str, error: RefusedError, token: str | None) -> DownloadError:
    said = f"; the hub says: {error.said.rstrip('.')}" if error.said else ""
    if error.kind == "GatedRepo":
        advice = "set HF_TOKEN" if token is None else f"use a token of that account ({_token_name()} is set)"
        page = f"{os.environ.get('HF_ENDPOINT', '').rstrip('/') or PUBLIC_HUB}/{repo}"
        return DownloadError(
            f"hf:{repo}: its owner gives it to those who accept its terms ({error.status}{said}). "
            f"Accept them at {shown(page)}, and {advice}.",
            code="PULL_AUTH",
        )
    if error.status in (401, 403) and token is not None:
        return DownloadError(
            f"hf:{repo}: the hub does not accept {_token_name()} for it, and gives it to nobody without one "
            f"({error.status}{said}). Check the name and the token.",
            code="PULL_AUTH",
        )
    if error.status in (401, 403):
        return DownloadError(
            f"hf:{repo}: no such repository, or it is closed to you ({error.status}{said}). Check the name; if it is "
            "gated, accept its terms on the web page and set HF_TOKEN.",
            code="PULL_AUTH",
        )
    if error.status == 404:
        return DownloadError(
            f"hf:{repo}: there is no such repository or file on the hub{said}. Check the name.", code="PULL_NOT_FOUND"
        )
    return error


def fetch_files(
    listing: Listing, files: list[HubFile], folder: Path, work: Path, progress: ByteProgress | None
) -> Path:
    """Bring these files into ``folder``, those that are there already not again; the path of the first."""
    token = listing.token
    total = sum(file.nbytes or 0 for file in files) or None
    targets = [path_in(folder, *file.name.split("/")) for file in files]
    work.mkdir(parents=True, exist_ok=True)
    missing = sum(file.nbytes or 0 for file, target in zip(files, targets, strict=True) if not target.is_file())
    here = sum(path.stat().st_size for path in work.glob("*.part"))
    check_space(work, max(0, missing - here))
    done = 0
    for file, target in zip(files, targets, strict=True):
        if not target.is_file():
            url = f"{listing.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(file.name)}"
            most = MOST_NBYTES if target.suffix.lower() in WEIGHTS else SMALL_NBYTES
            magic = GGUF_MAGIC if target.suffix.lower() == ".gguf" else b""

            def fetch(headers: dict[str, str]) -> Path:
                remote = RemoteFile(url, file.sha256, file.nbytes, magic, most, headers)  # noqa: B023  (called at once)
                return download(remote, target, work / f"{target.name}.part", _shifted(progress, done, total))  # noqa: B023

            _, token = as_user(listing.repo, token, fetch)
        done += target.stat().st_size
    return targets[0]


def _shifted(progress: ByteProgress | None, done: int, total: int | None) -> ByteProgress | None:
    """Progress of one file among several."""
    if progress is None:
        return None
    return lambda here, of: progress(done + here, total if total is not None else of)
