"""What pip knows of this machine: its package indexes, and the download where they need more than a plain GET."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from edgellm.formats.errors import DownloadError
from edgellm.machine.progress import ByteProgress
from edgellm.store.connection import LEAST_RATE
from edgellm.store.download import check_space

ENVIRONMENT = {
    "index-url": ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": ("PIP_EXTRA_INDEX_URL",),
}
PUBLIC_INDEX = "https://pypi.org/simple"
POLL_S = 0.2
PATIENCE_S = 180.0  # pip has time limits of its own for a connection that says nothing

_SETTING = re.compile(r"(?P<section>[^.=]+)\.(?P<key>index-url|extra-index-url|no-index)=(?P<value>.*)")


def indexes() -> list[str]:
    """The http(s) indexes to ask, the first one first; empty when the machine is set up to use none."""
    settings = dict(_pip_settings()) if has_pip() else {}
    for key, names in ENVIRONMENT.items():
        value = next((os.environ[name] for name in names if os.environ.get(name)), None)
        if value is not None:
            settings[key] = value
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    found = [settings.get("index-url") or PUBLIC_INDEX, *settings.get("extra-index-url", "").split()]
    return [url for url in found if url.startswith(("https:", "http:"))]


def has_pip() -> bool:
    """Whether this Python can run pip."""
    return importlib.util.find_spec("pip") is not None


@cache
def _pip_settings() -> tuple[tuple[str, str], ...]:
    """The settings that name indexes, as ``pip config list`` prints them; [download] wins over [global]."""
    try:
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    ranked: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        match = _SETTING.fullmatch(line.strip())
        if match is None:
            continue
        rank = {"global": 0, "install": 1, "download": 2}.get(match["section"], -1)
        try:
            value = str(ast.literal_eval(match["value"]))
        except (SyntaxError, ValueError):
            value = match["value"]
        if rank > ranked.get(match["key"], (-1, ""))[0]:
            ranked[match["key"]] = (rank, value)
    return tuple((key, value) for key, (_, value) in ranked.items())


def pip_download(
    project: str,
    version: str,
    pattern: re.Pattern[str],
    work: Path,
    progress: ByteProgress | None,
    troubles: Iterable[str],
) -> Path:
    """The wheel of project==version in ``work``, fetched by pip with all of its own settings.

    DownloadError PULL_NOT_FOUND or PULL_NETWORK with ``troubles``, what was tried before, when pip cannot either.
    """
    tried = "; ".join(troubles) or "no index is set up"
    if not has_pip():
        raise DownloadError(
            f"{project}=={version}: {tried}. Set PIP_INDEX_URL to an index that has it, or install pip.",
            code="PULL_NOT_FOUND",
        )
    with tempfile.TemporaryDirectory(prefix="pip-", dir=work) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        command += ["--no-cache-dir", "--no-deps", "--only-binary", ":all:", "-d", folder, f"{project}=={version}"]
        status, said = _watched(command, Path(folder), progress)
        for path in Path(folder).glob("*.whl"):
            if status == 0 and pattern.fullmatch(path.name):
                return Path(shutil.move(path, work / path.name))
    reason = next(
        (line for line in reversed(said.splitlines()) if line.startswith("ERROR")), f"pip ended with {status}"
    )
    raise DownloadError(
        f"{project}=={version}: {tried}; pip: {reason}. Check the network and pip's index settings.",
        code="PULL_NOT_FOUND",
    )


def _watched(command: list[str], folder: Path, progress: ByteProgress | None) -> tuple[int, str]:
    """Run pip, tell ``progress`` how much lies in ``folder``, and give its exit status and what it said."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # TMPDIR: pip fetches into a temporary folder first, which would be on another disk and out of sight
        environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            started, since, before = time.monotonic(), time.monotonic(), 0
            while process.poll() is None:
                time.sleep(POLL_S)
                nbytes, now = _nbytes(folder), time.monotonic()
                if progress is not None:
                    progress(nbytes, None)
                check_space(folder, 0)
                if now - since >= PATIENCE_S:
                    if nbytes - before < LEAST_RATE * (now - since):
                        raise DownloadError(
                            f"pip has brought {nbytes:,} bytes in {now - started:.0f} seconds, which is too slow. "
                            "Check the network and pip's index settings.",
                            code="PULL_SLOW",
                        )
                    since, before = now, nbytes
        except BaseException:
            process.terminate()
            process.wait()
            raise
        output.seek(0)
        return process.returncode, output.read()


def _nbytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip has just moved it
            total += path.stat().st_size
    return total
