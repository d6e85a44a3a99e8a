"""One file per architecture, named as ``general.architecture`` names it (with _ for -); each turns a GGUF file into a
program.

To add an architecture, add its file: a module here with ``build(gguf) -> Program`` is found by its name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short
from edgellm.formats.gguf import check_is_model

if TYPE_CHECKING:
    from edgellm.formats.model_file import ModelFile
    from edgellm.kernels.program import Program


DRAFTS = ("dflash", "eagle3")
"""What files are called that draft for one other model, from what its layers read (drafts/)."""
WITH_UNDERSCORES = ("ernie4_5", "ernie4_5-moe", "nemotron_h", "nemotron_h_moe", "seed_oss")
"""Architectures whose names have some: in all others _ of a file's name is - ."""


def architectures() -> list[str]:
    """The names of the architectures that can be run."""
    own = {name.replace("-", "_"): name for name in WITH_UNDERSCORES}
    files = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(own.get(name, name.replace("_", "-")) for name in files)


def module_of(architecture: str) -> ModuleType:
    """The file of one of them."""
    return importlib.import_module(f"{__name__}.{architecture.replace('-', '_')}")


def alike(name: str, known: Sequence[str]) -> str:
    """Words about the known names that are closest to one, for a message; none where none is close."""
    found = difflib.get_close_matches(name[:64], known, 3)
    return f" (most like it: {', '.join(found)})" if found else ""


def build_program(gguf: ModelFile) -> Program:
    """The program of the file's model, every hyperparameter in range and every shape compared.

    FormatError for a file that contradicts itself, UnsupportedError for an architecture that has no file here, and for
    a file that is no model.
    """
    check_is_model(gguf)
    if gguf.architecture in DRAFTS:
        raise UnsupportedError(
            f"{Path(gguf.path).name} is a draft for another model ({gguf.architecture}), which answers nothing by "
            f"itself. Load that model, with --draft {Path(gguf.path).name}.",
            code="DRAFT_MODEL",
        )
    if gguf.architecture not in architectures():  # a name from an untrusted file is looked up, never imported as it is
        known = architectures()
        raise UnsupportedError(
            f"{Path(gguf.path).name}: the architecture is {short(gguf.architecture, 40)!r}, which is none of the "
            f"{len(known)} that edgellm runs{alike(gguf.architecture, known)}; `edgellm doctor` lists them. "
            "Take a GGUF file of one of these."
        )
    return module_of(gguf.architecture).build(gguf)


def build_nextn_program(gguf: ModelFile) -> Program:
    """The program of the block that drafts the token after the next, of a file whose model ``build_program`` builds.

    UnsupportedError where the file has none, or its architecture's is not known here.
    """
    build = module_of(gguf.architecture).build
    if "nextn" not in inspect.signature(build).parameters:
        raise UnsupportedError(
            f"{Path(gguf.path).name}: edgellm knows no blocks that draft of a {gguf.architecture} model. Draft with "
            "n-grams or a small model.",
            code="NO_NEXTN",
        )
    program: Program = build(gguf, nextn=True)
    return program
