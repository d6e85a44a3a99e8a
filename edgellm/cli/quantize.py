"""``edgellm quantize``: a model in fewer bits."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.options import FILE, WholeNumber
from edgellm.cli.progress import ProgressBar
from edgellm.formats.errors import ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.paths import path_if_there, typed_path
from edgellm.machine.terminal import echo, human_bytes, note, table

if TYPE_CHECKING:
    from edgellm.quantize.calibration import Calibrated
    from edgellm.quantize.input_model import InputModel
    from edgellm.quantize.mixes import Recipe
    from edgellm.quantize.pipeline import ImportanceMatrix, QuantizationPlan, Quantized

MAX_DIGITS = 9  # of a number of threads


@click.command("quantize")
@click.argument("arguments", nargs=-1, required=True, metavar="SRC [DST] TYPE")
@click.option("--imatrix", type=FILE, metavar="FILE", help="Weigh errors with an importance matrix.")
@click.option("--include-weights", multiple=True, metavar="NAME", help="Use it for these tensors only; repeatable.")
@click.option("--exclude-weights", multiple=True, metavar="NAME", help="Do not use it for these; repeatable.")
@click.option("--pure", is_flag=True, help="One type for all matrices, no mix.")
@click.option("--tensor-type", multiple=True, metavar="RE=TYPE", help="A type for the tensors so named; repeatable.")
@click.option("--tensor-type-file", type=FILE, metavar="FILE", help="The same, from a file of such words.")
@click.option("--output-tensor-type", metavar="TYPE", help="The type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="The type of the token embeddings.")
@click.option("--leave-output-tensor", is_flag=True, help="Leave output.weight as it is.")
@click.option("--method", type=click.Choice(["gptq", "awq", "awq+gptq"]), help="Calibrate over the text of -f.")
@click.option("-f", "--file", "text", type=FILE, help="The calibration text of --method, UTF-8.")
@click.option("--chunks", "n_chunks", type=WholeNumber(1), help="So many chunks of 512 tokens of it.  [default: all]")
@click.option("--allow-requantize", is_flag=True, help="Take weights that were quantized before.")
@click.option("--keep-split", is_flag=True, help="As many parts as the source has.")
@click.option("--dry-run", is_flag=True, help="Show the plan and the size, write nothing.")
@click.option("--report", is_flag=True, help="Show the error of each tensor.")
@click.option("-y", "--overwrite", is_flag=True, help="Replace DST if it is there.")
@click.option("-t", "--threads", "n_threads", type=WholeNumber(1), default=None, help="[default: physical cores]")
def command(arguments: tuple[str, ...], **values: Any) -> None:
    """Write a model in fewer bits.

    SRC is a GGUF file, a folder with a Hugging Face checkpoint, or a name. DST is SRC's name with the type, beside
    SRC, unless given. TYPE is one of Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS MXFP4_MOE
    Q3_K_L Q3_K_M Q3_K_S Q2_K Q2_K_S TQ2_0 TQ1_0 BF16 F16 F32 COPY. The bytes are those of llama-quantize.

    \b
    Examples:
      edgellm quantize model-f16.gguf Q4_K_M
      edgellm quantize model-f16.gguf small.gguf Q3_K_M --imatrix model.imatrix.gguf --report
      edgellm quantize model-f16.gguf Q4_K_M --method gptq -f calibration.txt
      edgellm quantize ./checkpoint model.gguf Q4_K_M --tensor-type 'ffn_down=q6_k' --dry-run
    """
    from edgellm.quantize.inputs import open_input
    from edgellm.quantize.pipeline import plan_quantization

    name, target, recipe = _parsed(arguments, values)
    with ProgressBar() as progress:
        source = open_input(name, progress.of("pull", name))
        progress.finish()
        with source:
            planned = plan_quantization(
                source,
                recipe,
                importance=_importance(values),
                allow_requantize=values["allow_requantize"],
                keep_split=values["keep_split"],
            )
            _tell_notes(planned)
            if values["dry_run"]:
                _tell_plan(planned)
            else:
                _write(planned, _target(target, name, source, recipe, values["overwrite"]), values, progress)


def _parsed(arguments: tuple[str, ...], values: dict[str, Any]) -> tuple[str, Path | None, Recipe]:
    """Source, target and recipe of the command line; a last number is llama-quantize's way to give the threads."""
    from edgellm.quantize.mixes import Recipe, parse_file_type, parse_override, parse_tensor_type

    words = list(arguments)
    if len(words) > 2 and words[-1].isdecimal() and len(words[-1]) <= MAX_DIGITS:
        n_threads = max(1, int(words.pop()))
        values["n_threads"] = values["n_threads"] or n_threads
    if len(words) not in (2, 3):
        raise click.UsageError("SRC [DST] TYPE is expected, such as: edgellm quantize model-f16.gguf Q4_K_M")
    overrides = [*values["tensor_type"]]
    if values["tensor_type_file"]:
        overrides += read_text(values["tensor_type_file"]).split()
    output, embedding = values["output_tensor_type"], values["token_embedding_type"]
    recipe = Recipe(
        parse_file_type(words[-1]),
        pure=values["pure"],
        overrides=tuple(parse_override(text) for text in overrides),
        output_type=parse_tensor_type(output) if output else None,
        embedding_type=parse_tensor_type(embedding) if embedding else None,
        leave_output=values["leave_output_tensor"],
    )
    return words[0], typed_path(words[1]) if len(words) == 3 else None, recipe


def _importance(values: dict[str, Any]) -> ImportanceMatrix | None:
    """The importance matrix of --imatrix, less what --include-weights and --exclude-weights leave out."""
    path, included, excluded = values["imatrix"], values["include_weights"], values["exclude_weights"]
    if path is None:
        return None
    if included and excluded:
        raise click.UsageError("--include-weights and --exclude-weights cannot be used together")
    from edgellm.quantize.importance import read_imatrix
    from edgellm.quantize.pipeline import ImportanceMatrix

    read = read_imatrix(path)
    columns = {
        name: column
        for name, column in read.means.items()
        if not any(part in name for part in excluded) and (not included or any(part in name for part in included))
    }
    unmet = {name: experts for name, experts in read.unmet.items() if name in columns}
    return ImportanceMatrix(columns, str(path), read.datasets[0] if read.datasets else "", read.n_chunks, unmet)


def _target(given: Path | None, name: str, source: InputModel, recipe: Recipe, overwrite: bool) -> Path:
    """Where to write; a file that is there is replaced only when asked to."""
    from edgellm.quantize.pipeline import default_target, refuse_own_source

    folder = source.path.parent if path_if_there(name) else Path()
    target = given or folder / default_target(source, recipe.file_type)
    if target.is_dir():
        target = target / default_target(source, recipe.file_type)
    refuse_own_source(source, target)
    if target.exists() and not overwrite:
        raise ParameterError(
            f"{target} is there already. Give another name, or -y to replace it.", code="QUANTIZE_TARGET"
        )
    return target


def _write(planned: QuantizationPlan, target: Path, values: dict[str, Any], progress: ProgressBar) -> None:
    from edgellm.quantize.pipeline import quantize

    started = time.monotonic()
    with _calibrated(planned, values, progress) as calibrated:
        done = quantize(
            calibrated.plan(planned) if calibrated else planned,
            target,
            encoder=calibrated.blocks if calibrated else None,
            n_threads=values["n_threads"],
            report=values["report"],
            progress=progress.of("quantize"),
            on_compile=progress.of("compile"),
        )
    progress.finish()
    if values["report"]:
        _tell_errors(done)
    if done.without_importance:
        echo(f"not in the importance matrix: {', '.join(done.without_importance)}", err=True)
    _tell_unmet(planned)
    for path in done.paths:
        echo(f"{path}: {human_bytes(path.stat().st_size)}, {_bits(planned):.2f} bits per weight")
    echo(f"{time.monotonic() - started:.1f} s", err=True)


def _calibrated(
    planned: QuantizationPlan, values: dict[str, Any], progress: ProgressBar
) -> AbstractContextManager[Calibrated | None]:
    """What --method makes of the plan, nothing without it."""
    method, text = values["method"], values["text"]
    if (method is None) != (text is None):
        raise click.UsageError("--method and -f FILE go together.")
    if method is None:
        return nullcontext()
    if planned.source.gguf is None:
        raise ParameterError(
            "--method runs the model, which takes a GGUF file. Make one with `edgellm convert`, then quantize that."
        )
    from edgellm.quantize.calibration import CalibrationOptions, calibrate

    return calibrate(
        planned.source.gguf,
        {tensor.name: tensor.target.name for tensor in planned.tensors if tensor.changes},
        read_text(text),
        CalibrationOptions(method, n_chunks=values["n_chunks"], n_threads=values["n_threads"]),
        planned.importance.columns if planned.importance else None,
        progress.update,
    )


def _tell_unmet(planned: QuantizationPlan) -> None:
    """The experts that were rounded without knowing what they are asked."""
    from edgellm.quantize.importance import unmet_text

    known = planned.importance.unmet if planned.importance else {}
    unmet = {t.name: known[t.name] for t in planned.tensors if t.changes and t.name in known}
    if unmet:
        echo(f"experts that the calibration text never met, rounded evenly: {unmet_text(unmet)}", err=True)


# ---- what the user reads ---------------------------------------------------------------------------------------------


def _bits(planned: QuantizationPlan) -> float:
    return sum(tensor.nbytes for tensor in planned.tensors) * 8 / max(planned.source.n_elements, 1)


def _tell_notes(planned: QuantizationPlan) -> None:
    for text in planned.source.notes:
        note(text)
    alike: dict[tuple[str, str], list[str]] = {}
    for tensor in planned.tensors:
        if tensor.note:
            alike.setdefault((tensor.note, tensor.target.name), []).append(tensor.name)
    for (reason, target), names in alike.items():
        which = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        note(f"{which}: {reason}: {target} instead")


def _tell_plan(planned: QuantizationPlan) -> None:
    """A row for each tensor, a row for each type, the size of the file."""
    from edgellm.formats.file_types import type_counts

    rows = [
        (
            tensor.name,
            " x ".join(map(str, tensor.source.shape)),
            tensor.source.quant.name,
            tensor.target.name if tensor.changes else "",
            human_bytes(tensor.nbytes),
        )
        for tensor in planned.tensors
    ]
    echo(table(("tensor", "shape", "from", "to", "size"), rows, right=(4,)))
    echo("")
    counts = type_counts((tensor.target.name, tensor.nbytes) for tensor in planned.tensors)
    types = [(name, str(n), human_bytes(nbytes)) for name, (n, nbytes) in counts.items()]
    echo(table(("type", "tensors", "size"), types, right=(1, 2)))
    before = planned.source.nbytes
    echo(f"\n{human_bytes(before)} -> {human_bytes(planned.nbytes)}, {_bits(planned):.2f} bits per weight")


def _tell_errors(done: Quantized) -> None:
    """A row for each encoded tensor: root mean square error, the same relative to the weights, the largest."""
    from edgellm.quantize.pipeline import error_table

    rows = [
        (name, quant, f"{error.rmse:.3e}", f"{100 * error.relative:.3f} %", f"{error.largest:.3e}")
        for name, quant, error in error_table(done.errors, done.tensors)
    ]
    echo(table(("tensor", "type", "rmse", "relative", "largest"), rows, right=(2, 3, 4)))
