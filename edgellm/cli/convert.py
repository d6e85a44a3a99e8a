"""``edgellm convert``: a checkpoint, or a GGUF file, as a GGUF file of plain numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.options import TypedPath, WholeNumber
from edgellm.cli.progress import ProgressBar
from edgellm.formats.errors import ParameterError
from edgellm.machine.terminal import echo, fields, human_bytes, human_count, note

if TYPE_CHECKING:
    from edgellm.quantize.convert import Conversion
    from edgellm.quantize.input_model import InputModel

SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # llama.cpp's --split-max-size counts in tens


@click.command("convert")
@click.argument("source", metavar="SRC")
@click.argument("target", required=False, type=TypedPath(), metavar="[DST]")
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "f16", "bf16"]),
    default="auto",
    show_default=True,
    help="The type of matrices; auto keeps the source's.",
)
@click.option("--split-max-size", metavar="N[M|G]", help="Go on in another file after so many bytes.")
@click.option("--split-max-tensors", type=WholeNumber(1), default=None, help="Or after so many tensors.")
@click.option("--pre", help="Name of the pre-tokenizer.  [default: found from the tokenizer]")
@click.option("--no-tokenizer-json", is_flag=True, help="Do not carry the original tokenizer in the file.")
@click.option(
    "--base", metavar="DIR|GGUF", help="The model of an adapter or a draft.  [default: an adapter's own, if here]"
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the size, write nothing.")
def command(source: str, target: Path | None, outtype: str, dry_run: bool, **values: Any) -> None:
    """Convert a checkpoint to a GGUF file.

    SRC is a folder with a Hugging Face checkpoint (config.json, safetensors files, a tokenizer), hf:owner/repository,
    a GGUF file, or a name that `edgellm list` shows. Checkpoints that are quantized (GPTQ, AWQ, bitsandbytes, HQQ,
    FP8, compressed-tensors, MXFP4, MLX, Model Optimizer) are decoded. DST is the file to write, or a folder; what
    stands there is replaced when the new file is whole.

    SRC may also be the folder of a LoRA adapter of PEFT, or of a draft for another model (EAGLE-3, DFlash). Of that
    model the config.json is enough, for a draft with its tokenizer, or a GGUF file.

    \b
    Examples:
      edgellm convert ./Llama-3.2-1B-Instruct
      edgellm convert hf:Qwen/Qwen3-0.6B qwen3.gguf --outtype bf16
      edgellm convert ./checkpoint --dry-run
      edgellm convert ./my-lora my-lora.gguf --base ./Llama-3.2-1B-Instruct
      edgellm convert ./EAGLE3-LLaMA3.1-Instruct-8B draft.gguf --base llama-3.1-8b.gguf
    """
    from edgellm.quantize.convert import convert, plan_conversion
    from edgellm.quantize.inputs import open_input

    limit = split_nbytes(values["split_max_size"])
    tokenizer = {"pre": values["pre"], "with_json": not values["no_tokenizer_json"]}
    with ProgressBar() as progress:
        opened = _adapter(source, values["base"])
        opened = opened or open_input(source, progress.of("pull", source), base=values["base"], **tokenizer)
    with opened, ProgressBar() as progress:
        plan = plan_conversion(opened, outtype)
        path = target_path(opened, target, outtype, plan)
        if dry_run:
            echo(_plan(opened, plan, path))
            return
        files = convert(
            opened,
            path,
            outtype,
            max_part_nbytes=limit,
            max_part_tensors=values["split_max_tensors"],
            progress=progress.of("write"),
        )
    for text in opened.notes:
        note(text)
    for file in files:
        echo(f"{file} ({human_bytes(file.stat().st_size)})")


def _adapter(source: str, base: str | None) -> InputModel | None:
    """A folder with an adapter as a source; None for anything else."""
    from edgellm.machine.paths import path_if_there
    from edgellm.quantize.adapter import is_adapter_folder, open_adapter

    path = path_if_there(source)
    if path is not None and is_adapter_folder(path):
        return open_adapter(path, base)
    return None


def split_nbytes(text: str | None) -> int | None:
    """Bytes of ``300M`` or ``2G``. ParameterError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", text.upper())
    if match is None or not int(match[1]):
        raise ParameterError(f"--split-max-size is {text!r}. It must be a number with M or G, such as 2G.")
    return int(match[1]) * SIZES[match[2]]


def target_path(source: InputModel, target: Path | None, outtype: str, plan: Conversion) -> Path:
    """The file to write: as given, in the folder that is given, or in this one, named after the source."""
    if target is not None and not target.is_dir():
        return target
    from edgellm.quantize.general_metadata import folder_name

    kind = outtype.upper() if outtype != "auto" else next(iter(plan.types()), "F32")
    stem = folder_name(source.path).removesuffix(".gguf")
    path = (target or Path()) / f"{stem}-{kind}.gguf"
    if path.exists() and source.path.exists() and path.samefile(source.path):
        raise ParameterError(f"{path} is the source itself. Name another file to write.")
    return path


def _plan(source: InputModel, plan: Conversion, path: Path) -> str:
    types = ", ".join(f"{name} {human_bytes(nbytes)} in {n}" for name, (n, nbytes) in plan.types().items())
    kind = source.kind + (f", {source.scheme}" if source.scheme else "")
    rows = [
        ("source", f"{source.path} ({kind})"),
        ("architecture", source.architecture),
        ("parameters", human_count(source.n_elements)),
        ("tokenizer", " ".join(str(source.metadata.get(f"tokenizer.ggml.{k}", ("-",))[0]) for k in ("model", "pre"))),
        ("would write", str(path)),
        ("types", types),
        ("size", f"{human_bytes(plan.nbytes)} ({plan.nbytes:,} bytes)"),
        *(("note", note) for note in source.notes),
    ]
    return fields(rows)
