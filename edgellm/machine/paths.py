"""Where edgellm keeps things on this machine, and what a path means that a person typed.

Models, chats, the user's own settings and what can be made again stand under ``EDGELLM_HOME``; without it they stand
where the operating system wants them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs

from edgellm.formats.errors import ParameterError

NAME_NBYTES, PATH_NBYTES = 255, 4096  # of one name, of all of it: more than this no usual file system takes


def typed_path(text: str | os.PathLike[str]) -> Path:
    """The path that a person wrote, ``~`` and ``~user`` for a home. ParameterError PATH for what can be none."""
    typed = os.fspath(text)
    if not typed or "\0" in typed:
        raise _no_path(typed, "no name of a file is empty or holds a zero character", "Give the name of a file")
    try:
        os.fsencode(typed)
    except UnicodeEncodeError:
        raise _no_path(typed, "it holds half a character, which no name of a file can", "Give another name") from None
    path = Path(os.path.expanduser(typed))
    if typed[0] == "~" and os.path.expanduser(typed) == typed:  # nobody's home: to a shell it is a name like others
        path = Path(typed)
        if not os.path.lexists(path):
            user = path.parts[0][1:]
            found = f"this machine knows no user {user!r}" if user else "this user has no home folder"
            raise _no_path(typed, found, f"Write the path in full, or ./{typed} for a name that begins with ~")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > NAME_NBYTES or len(os.fsencode(path)) > PATH_NBYTES:
        found = f"one name has {longest} bytes" if longest > NAME_NBYTES else f"it has {len(os.fsencode(path))} bytes"
        raise _no_path(typed, f"{found}, {NAME_NBYTES} for a name and {PATH_NBYTES} in all are the most", "Shorten it")
    if not path.is_absolute():
        try:
            os.getcwd()
        except OSError:
            raise _no_path(
                typed, "the folder that this program was started in is gone", "cd to another, or give the whole path"
            ) from None
    return path


def line_path(text: str) -> Path:
    """The same for the rest of a chat's line, where a name with blanks may stand in quotes."""
    return typed_path(unquoted(text))


def unquoted(text: str) -> str:
    """The rest of a chat's line without blanks and quotes around it."""
    return text.strip().strip("\"'")


def typed_file(text: str | os.PathLike[str]) -> Path | None:
    """The file that a person named, None when there is none. ParameterError PATH as in typed_path, and when a folder
    on the way may not be looked into."""
    path = typed_path(text)
    found = look_at(path)
    return path if found is not None and stat.S_ISREG(found.st_mode) else None


def path_if_there(text: str | os.PathLike[str]) -> Path | None:
    """What stands under a text that may as well be a name or prose: None for whatever cannot be seen."""
    try:
        return path if look_at(path := typed_path(text)) is not None else None
    except ParameterError:
        return None


def look_at(path: Path) -> os.stat_result | None:
    """What stands under a path, None when nothing does. ParameterError PATH when that cannot be seen."""
    try:
        return path.stat()
    except PermissionError as error:
        raise _no_path(str(path), f"{error.strerror}: a folder on the way is closed", "Check its rights") from None
    except (OSError, ValueError):
        return None


def models_dir() -> Path:
    """The store of models that were pulled. ParameterError PATH, as in the others: nobody says where files of this
    user go, or EDGELLM_HOME can be no folder."""
    return _folder("models", platformdirs.user_data_path, "models")


def config_dir() -> Path:
    """The user's own models.toml and settings."""
    return _folder("config", platformdirs.user_config_path)


def cache_dir() -> Path:
    """What may be deleted at any time."""
    return _folder("cache", platformdirs.user_cache_path)


def sessions_dir() -> Path:
    """Chats, and what is kept to go on with them at once. For the user's eyes only."""
    return _folder("sessions", platformdirs.user_data_path, "sessions")


def kernels_dir() -> Path:
    """Compiled kernels: ``EDGELLM_KERNEL_CACHE``, or a folder of the cache."""
    return variable_path("EDGELLM_KERNEL_CACHE") or cache_dir() / "kernels"


def variable_path(name: str) -> Path | None:
    """The path in an environment variable, None when it is not set. ParameterError PATH names the variable."""
    typed = os.environ.get(name)
    try:
        return typed_path(typed).absolute() if typed else None
    except ParameterError as error:
        raise ParameterError(f"{name}: {error}", code=error.code) from None


def _folder(name: str, usual: Callable[..., Path], below: str = "") -> Path:
    home = variable_path("EDGELLM_HOME")
    if home is not None:
        return home / name
    try:
        path = usual("edgellm", appauthor=False) / below
    except RuntimeError:  # an unknown user without HOME, as in some containers; older versions give a relative path
        path = Path("~")
    if not path.is_absolute():
        raise ParameterError(
            f"there is no home folder for {name}: HOME is not set to a whole path, and the system names none. "
            "Set HOME, or EDGELLM_HOME to a folder for all that edgellm keeps.",
            code="PATH",
        )
    return path


def _no_path(typed: str, found: str, advice: str) -> ParameterError:
    shown = typed if len(typed) <= 100 else f"{typed[:60]}...{typed[-30:]}"
    return ParameterError(f"{shown!r}: {found}. {advice}.", code="PATH")
