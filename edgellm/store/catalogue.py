"""Models by name: the rows of models.toml, the store of what is here, and the way from a name to a file.

A name is a path, a row of the catalogue (``smollm2``), or a reference to a source (``hf:owner/repo:Q4_K_M``, ``https://...``).
A path that exists always wins; what is in the store needs no network.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edgellm.formats.errors import DownloadError, FormatError, ModelNotFoundError, ParameterError
from edgellm.formats.regular_file import NotAFileError, kind_of, open_regular
from edgellm.machine.file_lock import FileLock
from edgellm.machine.paths import config_dir, models_dir, path_if_there, typed_file
from edgellm.machine.progress import ByteProgress
from edgellm.store.sources import SOURCES, Expected, is_reference, source_of
from edgellm.store.sources.hub_address import reference_of
from edgellm.store.sources.source import check_sha256, split_names

MAX_NBYTES = 1 << 20  # of a models.toml
MAX_MODEL_NBYTES = 1 << 50

_INCOMING = ".incoming"  # of the store: what is on its way
_KEYS = frozenset({"description", "architecture", "licence", "source", "size", "sha256"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class CatalogueEntry:
    """One row of models.toml. ``source`` has one reference, or the chunks of one file in order."""

    name: str
    description: str
    architecture: str
    licence: str
    nbytes: int | None
    sha256: str | None
    source: tuple[str, ...]


@dataclass(frozen=True)
class InstalledModel:
    """A model of the store: the name that finds it again, its (first) file, and the bytes of all its files."""

    name: str
    path: Path
    nbytes: int


def catalogue() -> dict[str, CatalogueEntry]:
    """All rows by name, the user's own models.toml over the shipped one. FormatError CATALOGUE for a bad row."""
    rows: dict[str, CatalogueEntry] = {}
    for file in (_shipped(), config_dir() / "models.toml"):
        rows |= _read(file)
    return rows


def installed(name: str | os.PathLike[str]) -> Path:
    """The file of a path, or of a model that is in the store; never the network. ModelNotFoundError says what to do."""
    if (path := _find(name)) is None:
        name = os.fspath(name)
        if not references_of(name):
            raise _unknown(name)
        raise ModelNotFoundError(f"{name}: not here yet. `edgellm pull {name}` brings it.")
    return path


def fetched(name: str | os.PathLike[str], progress: ByteProgress | None = None) -> Path:
    """The same, and a known model that is not here is pulled. ModelNotFoundError, DownloadError."""
    return _find(name) or pull(os.fspath(name), progress)


def _find(name_or_path: str | os.PathLike[str]) -> Path | None:
    refused = None
    try:
        if (path := typed_file(name_or_path)) is not None:
            return path
    except ParameterError as error:  # a name needs no path
        refused = error
    references = references_of(os.fspath(name_or_path))
    if refused is not None and not references:
        raise refused
    if not references:
        return None
    found, typed = source_of(references[0]).installed(references, models_dir()), os.fspath(name_or_path)
    if found is None and is_reference(typed) and typed != references[0]:
        with contextlib.suppress(DownloadError):  # an earlier version kept it under its address
            found = source_of(typed).installed((typed,), models_dir())
    return found


def pull(name: str, progress: ByteProgress | None = None) -> Path:
    """Bring the model ``name`` into the store and give its (first) file; at once when it is there already.

    One process pulls a model, any other waits for it and takes what it brought. ModelNotFoundError, DownloadError.
    """
    references, expected = _looked_up(name)
    if not references:
        raise _unknown(name)
    source, root = source_of(references[0]), models_dir()
    work = root / _INCOMING / _work_name(references)

    def waiting(owner: int) -> None:
        if progress is not None:
            progress(sum(path.stat().st_size for path in work.glob("*") if path.is_file()), expected.nbytes)

    try:
        if (path := source.installed(references, root)) is not None:
            return path
        with FileLock(work.with_name(work.name + ".lock"), waiting):
            if (path := source.installed(references, root)) is not None:
                return path
            path = source.fetch(references, root, work, expected, progress)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DownloadError(
            f"{error.filename or root}: {error.strerror or error}. Check the folder's rights, "
            "or set EDGELLM_HOME to another one.",
            code="PULL_WRITE",
        ) from error
    return path


def installed_models() -> list[InstalledModel]:
    """The models of the store, by the catalogue's name or else a reference; a split model is one."""
    root = models_dir()
    names = {}
    for name, entry in catalogue().items():
        with contextlib.suppress(DownloadError):
            if (path := source_of(entry.source[0]).installed(entry.source, root)) is not None:
                names[path] = name
    found = []
    for path in sorted(root.glob("*/**/*.gguf")):
        parts = _files_of(path)
        if parts[0] == path and path.is_file() and path.relative_to(root).parts[0] != _INCOMING:
            nbytes = sum(part.stat().st_size for part in parts if part.is_file())
            found.append(InstalledModel(names.get(path) or _reference_to(path, root), path, nbytes))
    return sorted(found, key=lambda model: model.name)


def remove(name: str) -> int:
    """Delete a model of the store, its checkpoint, and what an unfinished pull of it left; the bytes that became free.

    ModelNotFoundError when the store holds neither. Files outside the store are never touched.
    """
    from edgellm.store.sources.hub_checkpoint import checkpoint_folder, is_repository

    root, freed, parts = models_dir(), 0, []
    match = next((model for model in installed_models() if model.name == name), None)
    references = references_of(name)
    path = match.path if match else references and source_of(references[0]).installed(references, root)
    if path and path.is_relative_to(root):
        parts = [part for part in _files_of(path) if part.is_file()]
    work = root / _INCOMING / _work_name(references) if references else None
    if work is not None and work.is_dir():
        parts += [part for part in work.glob("**/*") if part.is_file()]
    if references and is_repository(references[0]):
        parts += [part for part in checkpoint_folder(references[0], root).glob("**/*") if part.is_file()]
    if not parts:
        raise ModelNotFoundError(f"{name}: the store holds no such model. `edgellm list` shows what is here.")
    for part in parts:
        freed += part.stat().st_size
        part.unlink()
        _remove_empty_folders(part.parent, root)
    return freed


def _shipped() -> Path:
    """models.toml inside the package in an installed wheel, at the top of the repository in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "models.toml"
    return inside if inside.is_file() else package.parent / "models.toml"


def _read(file: Path) -> dict[str, CatalogueEntry]:
    def wrong(what: str) -> FormatError:
        return FormatError(f"{file}: {what}. Expected TOML, one table a model.", code="CATALOGUE")

    try:
        with open_regular(file) as opened:
            data = opened.read(MAX_NBYTES + 1)
        if len(data) > MAX_NBYTES:
            raise wrong(f"it is longer than {MAX_NBYTES >> 20} MiB")
        text = data.decode("utf-8-sig")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except NotAFileError as error:
        raise wrong(f"it is {error.kind}") from None
    except OSError as error:
        raise wrong(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise wrong(f"line {line} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError names the line
        raise wrong("it is nested too deeply" if isinstance(error, RecursionError) else str(error)) from error
    return {name: _entry(f"{file}{_line_of(name, text)}", name, table) for name, table in tables.items()}


def _line_of(name: str, text: str) -> str:
    """Where a table, or a value in its place, begins."""
    begins = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[].=]""")
    numbers = (number for number, line in enumerate(text.splitlines(), 1) if begins.match(line))
    number = next(numbers, None)
    return f", line {number}" if number else ""


def _entry(where: str, name: str, table: Any) -> CatalogueEntry:
    def wrong(what: str) -> FormatError:
        return FormatError(
            f"{where}: [{name[:80]}]: {what}. The head of the shipped models.toml shows a row.", code="CATALOGUE"
        )

    if not isinstance(table, dict):
        raise wrong(f"a table was expected, not {str(table)[:80]!r}")
    if not _NAME.fullmatch(name):
        raise wrong("the name of a model is made of letters, digits and . _ -, at most 64")
    if name.lower().endswith(".gguf"):
        raise wrong("a name that ends in .gguf would be taken for a file. Leave the ending away")
    if unknown := sorted(table.keys() - _KEYS):
        raise wrong(f"{unknown[0][:80]!r} means nothing here; known are {', '.join(sorted(_KEYS))}")
    about = {key: table.get(key, "") for key in ("description", "architecture", "licence")}
    if not all(isinstance(text, str) for text in about.values()):
        raise wrong("description, architecture and licence are text")
    nbytes = table.get("size")
    if nbytes is not None and (type(nbytes) is not int or not 0 < nbytes <= MAX_MODEL_NBYTES):
        raise wrong("size is a number of bytes")
    try:
        sha256 = check_sha256(table.get("sha256"))
    except (DownloadError, AttributeError, TypeError):
        raise wrong("sha256 is 64 hex digits") from None
    return CatalogueEntry(name, nbytes=nbytes, sha256=sha256, source=_sources(table.get("source"), wrong), **about)


def _sources(given: Any, wrong: Callable[[str], FormatError]) -> tuple[str, ...]:
    """One reference, or the wheels that hold the chunks of one file."""
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) for one in listed):
        raise wrong("source is missing, or neither a reference nor a list of them")
    try:
        sources = tuple(reference_of(one) for one in listed)
    except DownloadError as error:
        raise wrong(str(error).rstrip(".")) from None
    if bad := next((one for one in sources if not is_reference(one)), None):
        raise wrong(f"source {bad[:80]!r} is no reference such as hf:owner/repo or path:/models/m.gguf")
    if len(sources) > 1 and not all(one.startswith("pypi:") for one in sources):
        raise wrong("only pypi: models come in chunks to join")
    return sources


def references_of(name: str) -> tuple[str, ...]:
    """The references behind a name or a pasted address, none when it is neither a row nor a reference."""
    return _looked_up(name)[0]


def _looked_up(name: str) -> tuple[tuple[str, ...], Expected]:
    name = reference_of(name)
    if is_reference(name):
        return (name,), Expected()
    entry = catalogue().get(name)
    return (entry.source, Expected(entry.sha256, entry.nbytes)) if entry else ((), Expected())


def _unknown(name: str) -> ModelNotFoundError:
    if (path := path_if_there(name)) is not None:
        advice = "Give the path of a .gguf file."
        if (path / "config.json").is_file():
            advice = f"`edgellm convert {name}` makes one of this checkpoint."
        kind = "a folder" if path.is_dir() else kind_of(path.stat().st_mode)
        return ModelNotFoundError(f"{name}: is {kind}, and a model is one file. {advice}", code="MODEL_NOT_A_FILE")
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name):
        return ModelNotFoundError(f"{name}: nothing is fetched from {scheme[1]}:. Known are {', '.join(SOURCES)}.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not name.lower().endswith(".gguf"):
        return ModelNotFoundError(
            f"{name}: there is no such file. Check the path; a repository of the Hugging Face hub is hf:{name}."
        )
    if name.lower().endswith(".gguf") or "/" in name or os.sep in name:
        return ModelNotFoundError(
            f"{name}: there is no such file. Check the path, or give a name that `edgellm list` shows."
        )
    known = list(catalogue())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    some = ", ".join(known[:4])
    meant = f"Did you mean {' or '.join(near)}?" if near else f"`edgellm list` shows all its names: {some} ..."
    return ModelNotFoundError(f"{name}: neither a file nor a model of the catalogue. {meant}")


def _work_name(references: tuple[str, ...]) -> str:
    """A folder name for a pull, readable and never the same for two models."""
    digest = hashlib.sha256("\n".join(references).encode()).hexdigest()[:12]
    return re.sub(r"[^A-Za-z0-9]+", "-", references[0])[:60].strip("-") + f"-{digest}"


def _files_of(path: Path) -> list[Path]:
    return [path.with_name(name) for name in split_names(path.name)]


def _reference_to(path: Path, root: Path) -> str:
    """The reference that finds a file of the store again."""
    kind, *names = path.relative_to(root).parts
    if kind == "web":
        host = names[0].replace("+", ":")
        scheme = "http" if host.split(":")[0] in ("localhost", "127.0.0.1") else "https"
        return f"{scheme}://{host}/" + quote("/".join(names[1:]))
    return f"{kind}:" + "/".join(names)


def _remove_empty_folders(folder: Path, root: Path) -> None:
    while folder != root and folder.is_relative_to(root):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
