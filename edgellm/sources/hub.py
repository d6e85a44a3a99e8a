"""``hf:owner/repo/file.gguf``, ``hf:owner/repo:Q4_K_M``, ``hf:owner/repo``: a repository of a Hugging Face hub.

huggingface_hub says which files there are, how long, with which sha256, and who the user is; the bytes come through our
own downloader, which proves that sha256. ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` count as everywhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgellm.download import Progress, RemoteFile, check_space, download
from edgellm.formats.errors import DownloadError
from edgellm.sources.source import GGUF_MAGIC, Expected, check_name, check_sha256, one, path_in, split_names
from edgellm.web import STALL_S, TransientError, check_url, patiently

PUBLIC_HUB = "https://huggingface.co"
WANTED = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q8_0")  # the first that a repository has, when the user names none
NO_MODEL = ("mmproj", "imatrix")  # GGUF files that stand beside a model


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it."""

    name: str  # its path in the repository
    nbytes: int | None
    sha256: str | None


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
        self, references: tuple[str, ...], root: Path, work: Path, expected: Expected, progress: Progress | None
    ) -> Path:
        repo, file, tag = parse(one(references))
        endpoint = hub_endpoint()
        commit, files = patiently(lambda: list_files(endpoint, repo))
        chosen = file if file in files else choose(list(files), tag) if file is None else None
        if chosen is None or any(name not in files for name in split_names(chosen)):
            models = ", ".join(name for name in files if choose([name], None)) or "none"
            raise DownloadError(
                f"hf:{repo} has no file {file or tag or chosen}. Its models: {models}.", code="PULL_NOT_FOUND"
            )
        wanted = [files[name] for name in split_names(chosen)]
        if len(wanted) == 1:
            wanted = [HubFile(wanted[0].name, expected.nbytes or wanted[0].nbytes, expected.sha256 or wanted[0].sha256)]
        return fetch_files(endpoint, repo, commit, wanted, path_in(root, "hf", *repo.split("/")), work, progress)


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
    models = [
        name for name in names if name.lower().endswith(".gguf") and not any(word in name.lower() for word in NO_MODEL)
    ]
    firsts = sorted((name for name in models if split_names(name)[0] == name), key=lambda name: (len(name), name))
    for wanted in (tag,) if tag else WANTED:
        pattern = re.compile(rf"(^|[-._/]){re.escape(wanted)}([-./]|$)", re.IGNORECASE)
        for name in firsts:
            if pattern.search(name):
                return name
    return None if tag or not firsts else firsts[0]


def list_files(endpoint: str, repo: str) -> tuple[str, dict[str, HubFile]]:
    """The commit that ``main`` stands at, and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=STALL_S)
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"hf:{repo}: HF_HUB_OFFLINE is set. Unset it to pull.", code="PULL_NETWORK") from error
    except HFValidationError as error:
        raise DownloadError(f"hf:{repo}: {error}.", code="PULL_NAME") from error
    except HfHubHTTPError as error:
        raise _hub_failure(repo, error.response.status_code if error.response is not None else 0) from error
    except Exception as error:  # the hub's client has changed its network library before
        raise TransientError(
            f"hf:{repo}: the hub at {endpoint} does not answer ({error}). Check the network."
        ) from error
    files = {}
    for found in info.siblings or []:
        sha256 = getattr(found.lfs, "sha256", None) if found.lfs else None
        files[found.rfilename] = HubFile(found.rfilename, found.size, check_sha256(sha256))
    return info.sha or "main", files


def _hub_failure(repo: str, status: int) -> DownloadError:
    if status in (401, 403):
        return DownloadError(
            f"hf:{repo}: no such repository, or it is closed to you ({status}). Check the name; if it is "
            "gated, accept its terms on the web page and set HF_TOKEN.",
            code="PULL_AUTH",
        )
    if status == 404:
        return DownloadError(
            f"hf:{repo}: there is no such repository on the hub. Check the name.", code="PULL_NOT_FOUND"
        )
    return TransientError(f"hf:{repo}: the hub answered {status}. Try again later.", code="PULL_SERVER")


def fetch_files(
    endpoint: str, repo: str, commit: str, files: list[HubFile], folder: Path, work: Path, progress: Progress | None
) -> Path:
    """Bring these files into ``folder``, those that are there already not again; the path of the first."""
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    total = sum(file.nbytes or 0 for file in files) or None
    targets = [path_in(folder, *file.name.split("/")) for file in files]
    work.mkdir(parents=True, exist_ok=True)
    missing = sum(file.nbytes or 0 for file, target in zip(files, targets, strict=True) if not target.is_file())
    here = sum(path.stat().st_size for path in work.glob("*.part"))
    check_space(work, max(0, missing - here))
    done = 0
    for file, target in zip(files, targets, strict=True):
        if not target.is_file():
            url = hf_hub_url(repo, file.name, revision=commit, endpoint=endpoint)
            magic = GGUF_MAGIC if target.suffix.lower() == ".gguf" else b""
            remote = RemoteFile(url, file.sha256, file.nbytes, magic, headers)
            download(remote, target, work / f"{target.name}.part", _shifted(progress, done, total))
        done += target.stat().st_size
    return targets[0]


def _shifted(progress: Progress | None, done: int, total: int | None) -> Progress | None:
    """Progress of one file among several."""
    if progress is None:
        return None
    return lambda here, of: progress(done + here, total if total is not None else of)
