"""How work that takes long tells how far it is: a function that its caller gives, called a few times a second."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, "int | None", str], None]
"""Called with what is done, of how much (None while unknown), and what it works on."""

ByteProgress = Callable[[int, "int | None"], None]
"""The same for one download: the bytes that are here, and the bytes in all."""

StageProgress = Callable[[str, int, "int | None", str], None]
"""The same for work of several stages, the name of the stage first."""

STAGES = {
    "pull": "pulling",
    "load": "loading",
    "compile": "compiling kernels for your CPU",
    "prefill": "reading the prompt",
    "selftest": "testing kernels",
    "quantize": "quantizing",
    "write": "writing",
    "batch": "answering",
}
"""The stages that have a name of their own, in the words of the screens."""
