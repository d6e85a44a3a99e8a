"""What a check of a file found: one dataclass, turned into an error when loading and into a line when verifying."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgellm.formats.errors import EdgeLLMError, FormatError, ParameterError, UnsupportedError

PULL_AGAIN = "The file is damaged or cut short: pull or download it again."
REBUILD = "Ask whoever made the file for a sound one, or convert the model again."


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a file.

    code      stable and upper case, such as ``GGUF_COUNT``
    message   what was found and what was expected
    advice    what to do; "" where the message, of an error, says it
    file      name of the file (of the part, for a split model)
    offset    byte of the file where it stands, where there is one
    name      metadata key or tensor name, where there is one
    severity  ``error`` stops a load; ``warning`` is shown, by a verification or as a Python warning
    """

    code: str
    message: str
    advice: str = REBUILD
    file: str = ""
    offset: int | None = None
    name: str | None = None
    severity: str = "error"
    unsupported: bool = False

    def __str__(self) -> str:
        where = f" (byte {self.offset:,})" if self.offset is not None else ""
        name = f"{short(self.name)}: " if self.name else ""
        file = f"{short(self.file, 255)}: " if self.file else ""
        return f"{file}{name}{self.message.removesuffix('.')}{where}. {self.advice}".rstrip()

    def error(self) -> EdgeLLMError:
        """The exception that says the same; it keeps this finding as its attribute ``finding``."""
        kind: type[EdgeLLMError] = UnsupportedError if self.unsupported else FormatError
        error = kind(str(self), code=self.code)
        error.finding = self  # type: ignore[attr-defined]
        return error


Report = Callable[[Finding], None]
"""Takes a finding that need not end the reading: raises it when loading, collects it when verifying."""


def raise_finding(finding: Finding) -> None:
    """The report of a load: the first error ends it, the others are warned of."""
    if finding.severity == "error":
        raise finding.error()
    warnings.warn(str(finding), RuntimeWarning, stacklevel=2)


def override_error(key: str, message: str, code: str) -> ParameterError:
    """What is wrong with a value that the caller gave."""
    return ParameterError(f"The override of {short(key)}: {message}. Give another value, or leave it out.", code=code)


def wrong_config(folder: Path, key: str, found: object, expected: str) -> FormatError:
    """What stands under a key of a checkpoint's config.json, what was expected there."""
    return FormatError(
        f"{folder.name}/config.json: {key} is {short(found)}, expected {expected}. {PULL_AGAIN}",
        code="CHECKPOINT_CONFIG",
    )


def short(value: object, limit: int = 80) -> str:
    """A value of an untrusted file made fit for a message: printable, one line, cut."""
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no whole numbers of thousands of digits
        text = "a number of thousands of digits"
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
    return shown + ("..." if len(text) > limit else "")
