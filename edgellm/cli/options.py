"""What several commands share on the command line: paths by the rules of everywhere, and groups of options."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgellm.arguments import CACHE_TYPES, kv_keep
from edgellm.formats.errors import ParameterError
from edgellm.kernels import executors
from edgellm.machine.paths import typed_path

if TYPE_CHECKING:
    from edgellm.measure.perplexity import ChunkModel

F = TypeVar("F", bound=Callable[..., Any])

_BOOLS = {"true": True, "false": False}


class TypedPath(click.Path):
    """Gives a Path, ``~`` for a home; ``exists`` as in click.Path asks for a file that is there."""

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(exists=exists, dir_okay=not exists)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            path = typed_path(value)
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        super().convert(path, param, ctx)
        return path


FILE = TypedPath(exists=True)


class WholeNumber(click.IntRange):
    """click's, which calls what is none "not a valid integer range"."""

    name = "n"  # --help shows it in capitals

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """The same of any number; infinity is none, and what no range holds is none."""

    name = "x"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            is_one = math.isfinite(float(value))
        except ValueError:
            is_one = False
        return super().convert(value, param, ctx) if is_one else self.fail(f"{value!r} is not a number.", param, ctx)


def option_group(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator for several options, in the order in which ``--help`` shows them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def parse_override(text: str) -> tuple[str, Any]:
    """``KEY=TYPE:VALUE`` of ``--override-kv``, TYPE one of int, float, bool, str, as llama.cpp writes it."""
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    readers: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": _BOOLS.__getitem__}
    try:
        if key and equals and colon:
            return key, readers[kind](value)
    except (ValueError, KeyError):
        pass
    raise ParameterError(
        f"--override-kv is {text!r}; expected KEY=TYPE:VALUE with TYPE int, float, bool or str, such as "
        "tokenizer.ggml.add_bos_token=bool:false."
    )


def _read_overrides(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    try:
        return dict(parse_override(text) for text in texts)
    except ParameterError as error:
        raise click.UsageError(str(error)) from None


override_option = click.option(
    *("--override-kv", "overrides"),
    multiple=True,
    callback=_read_overrides,
    metavar="KEY=TYPE:VALUE",
    help="Replace a metadata value; TYPE is int, float, bool or str.",
)


draft_option = click.option(
    *("-md", "--draft", "--model-draft", "draft"),
    metavar="MODEL",
    help="A small model that drafts, best of the same vocabulary, or a draft made for the model: EAGLE-3, DFlash.",
)


def _read_device(ctx: click.Context, param: click.Parameter, name: str) -> str:
    try:
        return executors.known(name)
    except ParameterError as error:
        raise click.UsageError(str(error).replace("executor", "--device", 1)) from None


def _read_gpu_layers(ctx: click.Context, param: click.Parameter, text: str) -> executors.GPULayers:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or int(text) > executors.MAX_LAYERS:
        raise click.BadParameter(f"{text!r} is neither auto nor a number of layers.")
    return int(text)


device_options = option_group(
    click.option("--device", "--executor", "executor", default="cpu", show_default=True, callback=_read_device,
                 metavar="DEVICE",
                 help="What computes: auto, cpu, gpu, gpu:N or reference. `edgellm doctor` lists the GPUs."),
    click.option("-ngl", "--gpu-layers", "--n-gpu-layers", "gpu_layers", default="auto", show_default=True,
                 callback=_read_gpu_layers, metavar="N",
                 help="Layers on the GPU, from the last on; auto is what fits its memory."),
    click.option("-cmoe", "--cpu-moe", "cpu_moe", is_flag=True, help="Keep the experts of all layers on the CPU."),
)  # fmt: skip
"""What computes; ``device_values`` gives them as the library takes them."""


def _read_kv_keep(ctx: click.Context, parameter: click.Parameter, text: str) -> str | None:
    try:
        return None if kv_keep("--kv-keep", text) is None else text
    except ParameterError as error:
        raise click.BadParameter(str(error)) from error


cache_type_options = option_group(
    *(
        click.option(f"-ct{of[0]}", f"--cache-type-{of[0]}", f"cache_type_{of[0]}", type=click.Choice(CACHE_TYPES),
                     default="f16", show_default=True,
                     help=f"What {of} are kept as, a draft model's too; fewer bits need less memory.")
        for of in ("keys", "values")
    ),
    click.option("--kv-keep", "kv_keep", metavar="WAY", default="all", show_default=True, callback=_read_kv_keep,
                 help="Read fewer keys of a long context. quest:N: each token reads the N positions whose blocks can "
                      "matter most to it, all stay stored; what it misses may change an answer. snapkv:N: at the end "
                      "of a prompt N positions of it are kept for each head, those its last 32 tokens look at; the "
                      "rest is forgotten, and what an answer would have needed of it is lost."),
)  # fmt: skip
"""How the cache keeps a context; ``cache_type_values`` gives it as the library takes it."""


def cache_type_values(values: dict[str, Any]) -> dict[str, Any]:
    """What ``cache_type_options`` say, or their defaults where a command has none."""
    types = {name: values.get(name, "f16") for name in ("cache_type_k", "cache_type_v")}
    return {**types, "kv_keep": values.get("kv_keep")}


def device_values(values: dict[str, Any]) -> dict[str, Any]:
    """What ``device_options`` say, by the names of ``edgellm.load``."""
    return {name: values[name] for name in ("executor", "gpu_layers", "cpu_moe")}


chunk_options = option_group(
    click.option("-c", "--ctx-size", "n_ctx", type=WholeNumber(4), default=512, show_default=True,
                 help="Tokens of a chunk."),
    click.option("--chunks", "n_chunks", type=WholeNumber(1), help="Stop after so many.  [default: all]"),
    click.option("-t", "--threads", "n_threads", type=WholeNumber(1), help="[default: physical cores]"),
    device_options,
    cache_type_options,
    override_option,
)  # fmt: skip
"""Of a command that runs a text through a model in chunks."""


def chunk_model(path: Path, values: dict[str, Any], n_ctx: int | None = None, *, is_base: bool = False) -> ChunkModel:
    """The model as ``chunk_options`` say, open; ``n_ctx`` in place of theirs. A base keeps keys and values as f16."""
    from edgellm.measure.perplexity import ChunkModel

    kept = {} if is_base else cache_type_values(values)
    names = {**device_values(values), **kept, "n_threads": values["n_threads"], "kv_overrides": values["overrides"]}
    return ChunkModel(path, n_ctx or values["n_ctx"], **names)
