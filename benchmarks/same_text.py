"""Greedy texts of every kernel form on the same prompts: how many are equal, and what lies behind each difference.

    python benchmarks/same_text.py model.gguf [--forms avx2,portable] [--prompts 100] [--tokens 64] [--save DIR]
    python benchmarks/same_text.py model.gguf --forms neon --against avx2.npz

Forms with a fused multiply-add promise the same bits, so all logits are compared by their checksum. One without
(portable on x86) rounds each product before it is added; its logits differ by rounding, and a text differs only where
the two best tokens stand closer together than that. For each such place the program prints the gap between the two in
both forms; how far the best logit moved at all other steps says what rounding can turn. ``--save`` keeps a run (tokens,
the two best logits and a checksum of all for every step), to be compared on another machine by ``--against``. The end
of a text is not minded: every prompt gives the same number of tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgellm.kernels.program import Program

STREAMS = 16  # prompts that decode together: the sums of one do not depend on the others
MAX_TOKENS = 256  # of a prompt in one step

TASKS = (
    "Explain {} to a child of ten.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "What do people get wrong about {}?",
    "Write the first paragraph of a story in which {} matters.",
    "Give three arguments for and three against {}.",
    "Translate into French: I have always been interested in {}.",
    "Write a Python function that has to do with {}.",
    "Compare {} with something that is quite different.",
    "Write a polite letter that complains about {}.",
)
SUBJECTS = (
    "the tides", "bread", "prime numbers", "a lighthouse", "the printing press", "bees", "night trains",
    "compound interest", "chess", "the weather on Mars",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one form made of the prompts; all arrays are (n_prompts, n_tokens).

    best, second           ids of the two largest logits; ``best`` is the text
    best_logit             and second_logit: their values, float32
    checksum               CRC-32 of all logits of the step
    """

    form: str
    best: np.ndarray
    second: np.ndarray
    best_logit: np.ndarray
    second_logit: np.ndarray
    checksum: np.ndarray

    def save(self, path: Path) -> None:
        """Write all of it."""
        np.savez_compressed(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(str(arrays["form"]), *(arrays[name] for name in list(cls.__annotations__)[1:]))


@dataclass(frozen=True)
class Difference:
    """Where a text first differs: the lead of the best token over the other form's choice, in both forms."""

    prompt: int
    position: int
    gap: float
    other_gap: float


@dataclass(frozen=True)
class Comparison:
    """Two runs, each text up to its first difference.

    n_steps      steps behind equal tokens
    n_same_bits  those whose logits have the same checksum
    moved        how far the best logit moved at each of the others, sorted
    """

    form: str
    other: str
    n_texts: int
    n_equal: int
    n_steps: int
    n_same_bits: int
    moved: np.ndarray
    differences: tuple[Difference, ...]

    @property
    def largest_move(self) -> float:
        """Of the best token's logit; 0 when all bits are the same."""
        return float(self.moved[-1]) if len(self.moved) else 0.0

    @property
    def explained(self) -> bool:
        """Whether each difference stands at a gap that the movement of two logits at other steps can turn."""
        return all(d.gap + d.other_gap <= 2 * self.largest_move for d in self.differences)


def prompts(n: int) -> list[str]:
    """The first n of the tasks, each about every subject."""
    return [task.format(subject) for subject in SUBJECTS for task in TASKS][:n]


def greedy(
    program: Program, form: str, texts: list[list[int]], n_tokens: int, n_threads: int = 2, streams: int = STREAMS
) -> Run:
    """Run the prompts, given as token ids, in one form."""
    from edgellm.kernels.cpu import CPUExecutor
    from edgellm.kernels.kv import BLOCK_TOKENS

    n_blocks = -(-(max(map(len, texts)) + n_tokens) // BLOCK_TOKENS)  # for each of the texts that run together
    executor = CPUExecutor(program, n_blocks * streams, n_threads, MAX_TOKENS, form=form)
    if executor.isa.name != form:
        raise SystemExit(f"the {form} kernels compute wrong numbers here; see edgellm doctor")
    steps = np.zeros((len(texts), n_tokens), _STEP)
    for first in range(0, len(texts), streams):
        _together(executor, texts[first : first + streams], steps[first : first + streams], n_blocks)
        print(
            f"\r{form}: {min(first + streams, len(texts))} of {len(texts)} texts", end="", file=sys.stderr, flush=True
        )
    executor.close()
    print(file=sys.stderr)
    return Run(form, *(steps[name] for name in _STEP.names or ()))


_STEP = np.dtype(
    [("best", "i4"), ("second", "i4"), ("best_logit", "f4"), ("second_logit", "f4"), ("checksum", "u4")]
)  # the fields of Run


def _together(executor, texts: list[list[int]], steps: np.ndarray, n_blocks: int) -> None:  # type: ignore[no-untyped-def]
    """Read the prompts one by one, then decode them all, a token each in a step."""
    from edgellm.kernels.program import Batch

    table = np.arange(len(texts) * n_blocks, dtype=np.int32).reshape(len(texts), n_blocks)
    tables = tuple(table for _ in executor.program.groups)

    def run(tokens: list[int], positions: list[int], sequences: list[int]) -> np.ndarray:
        outputs = np.append(np.diff(sequences) != 0, True)
        ids, places, rows = (np.array(values, np.int32) for values in (tokens, positions, sequences))
        return executor.run(Batch(ids, places, rows, outputs, tables))

    for i, ids in enumerate(texts):
        for start in range(0, len(ids), MAX_TOKENS):
            part = ids[start : start + MAX_TOKENS]
            logits = run(part, list(range(start, start + len(part))), [i] * len(part))
        steps[i, 0] = _step(logits[0])
    for t in range(1, steps.shape[1]):
        positions = [len(ids) + t - 1 for ids in texts]
        logits = run(steps["best"][:, t - 1].tolist(), positions, list(range(len(texts))))
        steps[:, t] = [_step(row) for row in logits]


def _step(logits: np.ndarray) -> tuple[int, int, float, float, int]:
    two = np.argpartition(logits, -2)[-2:]
    second, best = two[np.lexsort((-two, logits[two]))]  # of equal ones the lower id, as the sampler takes it
    return int(best), int(second), logits[best], logits[second], zlib.crc32(logits.tobytes())


def compare(one: Run, other: Run) -> Comparison:
    """Text by text, step by step."""
    n_texts = len(one.best)
    same = one.best == other.best
    agreed = np.where(same.all(1), same.shape[1], same.argmin(1))  # tokens before the first difference
    comparable = np.arange(same.shape[1]) <= agreed[:, None]  # the logits behind equal tokens
    same_bits = (one.checksum == other.checksum) & comparable
    moved = np.abs(one.best_logit - other.best_logit)[comparable & same & ~same_bits]
    found = [
        Difference(i, int(t), float(one.best_logit[i, t] - one.second_logit[i, t]),
                   float(other.best_logit[i, t] - other.second_logit[i, t]))
        for i, t in enumerate(agreed) if t < same.shape[1]
    ]  # fmt: skip
    n_equal = int(same.all(1).sum())
    return Comparison(
        one.form,
        other.form,
        n_texts,
        n_equal,
        int(comparable.sum()),
        int(same_bits.sum()),
        np.sort(moved),
        tuple(found),
    )


def report(result: Comparison, n_closest: int) -> str:
    """What a person wants to know; ``n_closest`` steps of the first run have a gap within the largest movement."""
    lines = [
        f"{result.form} and {result.other}: {result.n_equal} of {result.n_texts} texts are equal; the logits have the "
        f"same bits at {result.n_same_bits} of {result.n_steps} steps"
    ]
    if len(result.moved):
        lines.append(
            f"  elsewhere the best logit moved by {np.median(result.moved):.1e} in the median, "
            f"{result.largest_move:.1e} at most; {n_closest} steps have their two best tokens within twice that"
        )
    for d in result.differences:
        lines.append(
            f"  text {d.prompt}, token {d.position}: the two best stand {d.gap:.1e} and {d.other_gap:.1e} apart"
        )
    if result.differences:
        lines.append(f"  every difference is one of these steps: {'yes' if result.explained else 'NO'}")
    return "\n".join(lines)


def closest(run: Run, result: Comparison) -> int:
    """Steps whose two best tokens could change places by what rounding moved elsewhere."""
    return int((run.best_logit - run.second_logit <= 2 * result.largest_move).sum())


def main() -> None:
    """Run, compare, print."""
    from edgellm.chat_template import ChatTemplate, Message
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.cpu.compile import isa
    from edgellm.models import build_program
    from edgellm.tokenizer import Tokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--forms", default=",".join(isa.available_forms()))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=STREAMS, help="texts that decode together")
    parser.add_argument("--save", type=Path, help="folder for FORM.npz")
    parser.add_argument("--against", type=Path, action="append", default=[], help="a run that was saved")
    options = parser.parse_args()
    file = GGUFFile.open(options.model)
    program, tokenizer = build_program(file), Tokenizer.from_gguf(file.metadata)
    template = ChatTemplate.from_metadata(file.metadata)
    texts = [tokenizer.encode_segments(template.render([Message("user", p)]), False) for p in prompts(options.prompts)]
    runs = [Run.load(path) for path in options.against]
    for form in options.forms.split(","):
        runs.append(greedy(program, form, texts, options.tokens, options.threads, options.streams))
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            runs[-1].save(options.save / f"{form}.npz")
    results = [compare(runs[0], other) for other in runs[1:]]
    for result in results:
        print(report(result, closest(runs[0], result)))
    rows = [
        {name: value for name, value in vars(result).items() if name not in ("moved", "differences")}
        | {"largest_move": result.largest_move, "explained": result.explained}
        | {"differences": [vars(d) for d in result.differences]}
        for result in results
    ]
    print(json.dumps({"model": options.model.name, "tokens": options.tokens, "comparisons": rows}))


if __name__ == "__main__":
    main()
