"""A whole checkpoint of a Hugging Face hub, to be converted: its settings, its tokenizer and its safetensors files.

It lies under ``checkpoints/<owner>/<repo>/`` of the store. config.json comes last, so a folder that has it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgellm.formats.checkpoint import INDEX, MAX_INDEX_NBYTES, SINGLE, TEMPLATES, read_json
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.errors import DownloadError, FormatError
from edgellm.machine.file_lock import FileLock
from edgellm.machine.progress import ByteProgress
from edgellm.store.sources.hub import HubFile, fetch_files, hub_endpoint, list_files, parse
from edgellm.store.sources.source import path_in

CONFIG = "config.json"
SMALL = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "README.md", INDEX,
    "adapter_config.json", "hf_quant_config.json",
)  # fmt: skip
FOLDER = "checkpoints"  # of the store


def is_repository(reference: str) -> bool:
    """Whether ``hf:...`` names a repository as a whole, neither a file nor a quant of it."""
    if not reference.startswith("hf:"):
        return False
    _, file, tag = parse(reference.partition(":")[2])
    return file is None and tag is None


def installed_checkpoint(reference: str, root: Path) -> Path | None:
    """The folder of a checkpoint that is in the store ``root``, None when it is not, or not all of it."""
    folder = checkpoint_folder(reference, root)
    return folder if (folder / CONFIG).is_file() else None


def fetch_checkpoint(reference: str, root: Path, progress: ByteProgress | None = None) -> Path | None:
    """Bring the checkpoint of ``hf:owner/repo`` into the store; None when the repository holds none.

    DownloadError with a PULL_ code. What an earlier call has brought is not fetched again, and one process fetches.
    """
    repo = parse(reference.partition(":")[2])[0]
    folder, endpoint = checkpoint_folder(reference, root), hub_endpoint()
    listing = list_files(endpoint, repo)
    files = listing.files
    if CONFIG not in files or not any(name.endswith(".safetensors") for name in files):
        return None
    work = root / ".incoming" / ("checkpoint-" + "-".join(repo.split("/")))
    with FileLock(work.with_name(work.name + ".lock")):
        if (folder / CONFIG).is_file():
            return folder
        small = [files[name] for name in (*SMALL, *_templates(files)) if name in files]
        if small:
            fetch_files(listing, small, folder, work, None)
        shards = [files[name] for name in _shards(repo, folder, files)]
        fetch_files(listing, [*shards, files[CONFIG]], folder, work, progress)
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()
    return folder


def checkpoint_folder(reference: str, root: Path) -> Path:
    """Where the checkpoint of ``hf:owner/repo`` lies in the store, or would."""
    return path_in(root, FOLDER, *parse(reference.partition(":")[2])[0].split("/"))


def _templates(files: Iterable[str]) -> list[str]:
    """The further chat templates."""
    return sorted(name for name in files if re.fullmatch(rf"{TEMPLATES}/[^/]+\.jinja", name))


def _shards(repo: str, folder: Path, files: dict[str, HubFile]) -> list[str]:
    """The files with the weights: those that the index names, else the only one."""
    if SINGLE in files:  # as transformers: one file before an index
        wanted = [SINGLE]
    elif INDEX not in files:
        wanted = [name for name in files if name.endswith(".safetensors") and "/" not in name][:1]
    else:
        index = read_json(CheckpointFolder(folder), INDEX, MAX_INDEX_NBYTES) or {}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FormatError(f"{INDEX}: weight_map is no object of file names.", code="CHECKPOINT_INDEX")
        wanted = sorted(set(weight_map.values()))
    missing = [name for name in wanted if name not in files or "/" in name or not name.endswith(".safetensors")]
    if missing or not wanted:
        raise DownloadError(
            f"hf:{repo}: the repository lacks {', '.join(missing[:3]) or 'safetensors files'}, which its index names. "
            "Take another repository of the model.",
            code="PULL_NOT_FOUND",
        )
    return wanted
