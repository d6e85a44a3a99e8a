"""What each way to quantize costs in quality: KL divergence from the source, by type and method.

    python benchmarks/quantization_quality.py MODEL.gguf --calibrate CALIBRATION.txt --text TEXT.txt
    python benchmarks/quantization_quality.py MODEL.gguf --calibrate C.txt --text T.txt --types Q4_K_M --methods gptq

MODEL is brought to F32 first, so one that was quantized before stands for a source whose weights it is. Every method
gives files of the same types and size; "imatrix" has the very bytes of llama-quantize --imatrix. The texts should have
nothing in common. One line of JSON for each file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from edgellm.measure.divergence import Base, Comparison, base_writer, compare_with_base
from edgellm.measure.perplexity import ChunkModel
from edgellm.quantize.calibration import METHODS, CalibrationOptions, calibrate
from edgellm.quantize.importance import collect
from edgellm.quantize.inputs import open_input
from edgellm.quantize.mixes import Recipe
from edgellm.quantize.pipeline import ImportanceMatrix, plan_quantization, quantize

ALL_METHODS = ("plain", "imatrix", *METHODS)


def write(
    source_path: Path, target: Path, file_type: str, method: str, importance: ImportanceMatrix, args: argparse.Namespace
) -> None:
    """Quantize one file by one method."""
    with open_input(source_path) as source:
        planned = plan_quantization(
            source,
            Recipe(file_type),
            importance=None if method in ("plain", "F32") else importance,
            allow_requantize=True,
        )
        if method not in METHODS:
            quantize(planned, target, n_threads=args.threads)
            return
        types = {tensor.name: tensor.target.name for tensor in planned.tensors if tensor.changes}
        options = CalibrationOptions(method, n_chunks=args.calibration_chunks, n_threads=args.threads)
        text = args.calibrate.read_text(encoding="utf-8")
        assert source.gguf is not None, "calibration runs a GGUF file"
        with calibrate(source.gguf, types, text, options, importance.columns) as calibrated:
            quantize(calibrated.plan(planned), target, encoder=calibrated.blocks, n_threads=args.threads)


def measure_importance(path: Path, args: argparse.Namespace) -> ImportanceMatrix:
    """The importance matrix over the calibration text."""
    with ChunkModel(path, n_threads=args.threads) as model:
        chunks = model.chunks(model.ids(args.calibrate.read_text(encoding="utf-8")), args.imatrix_chunks)
        *_, imatrix = collect(model, chunks, args.calibrate.name)
    return ImportanceMatrix(imatrix.means, "", args.calibrate.name, imatrix.n_chunks)


def write_base(path: Path, target: Path, args: argparse.Namespace) -> None:
    """The source's answers over the text."""
    with ChunkModel(path, n_threads=args.threads) as model:
        ids = model.ids(args.text.read_text(encoding="utf-8"))
        chunks = model.chunks(ids, args.chunks)
        with base_writer(target, ids, model.n_ctx, len(chunks), model.program.n_vocab) as write:
            for chunk in chunks:
                write(model.logits(chunk))


def main() -> None:
    """Read the command line, make the files one after another, print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M"])
    parser.add_argument("--methods", nargs="+", default=list(ALL_METHODS), choices=ALL_METHODS)
    parser.add_argument("--calibration-chunks", type=int, default=100, help="of 512 tokens, for gptq (default 100)")
    parser.add_argument("--imatrix-chunks", type=int, default=64, help="for the importance matrix (default 64)")
    parser.add_argument("--chunks", type=int, help="of the text to measure on; all by default")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgellm-quality-") as folder:
        base, source = Path(folder) / "base", Path(folder) / "source-f32.gguf"
        importance = measure_importance(args.model, args)
        write_base(args.model, base, args)
        write(args.model, source, "F32", "F32", importance, args)
        for file_type in args.types:
            for method in args.methods:
                target = Path(folder) / f"{file_type}-{method}.gguf"
                start = time.perf_counter()
                write(source, target, file_type, method, importance, args)
                seconds = time.perf_counter() - start
                with ChunkModel(target, n_threads=args.threads) as model:
                    figures = Comparison.joined(list(compare_with_base(model, Base(base)))).figures()
                known = {"model": args.model.name, "type": file_type, "method": method, "nbytes": target.stat().st_size}
                print(json.dumps(known | {"seconds": round(seconds, 1)} | figures), flush=True)
                target.unlink()


if __name__ == "__main__":
    main()
