"""Beam search as a caller asks for it: ``llm.generate(..., num_beams=4)``."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from edgellm import arguments
from edgellm.engine.beams import Beam, BeamSearch, follow
from edgellm.engine.denoising import check_in_order
from edgellm.engine.requests import CancelFlag, GeneratedToken, Timings
from edgellm.formats.errors import ParameterError
from edgellm.generation import Generation, GenerationChunk, TextStream

if TYPE_CHECKING:
    from edgellm.adapters.chosen import Choice

MOST_BEAMS = 128


def beam_search(
    llm: Any,
    prompt: Any,
    *,
    num_beams: int = 4,
    num_return_sequences: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    max_tokens: int | None = None,
    cancel: CancelFlag | None = None,
    special: bool = False,
    tools: Any = None,
    template_kwargs: Any = None,
    parse_special: bool = False,
    ignore_eos: bool = False,
    lora: Choice = None,
    control_vectors: Choice = None,
    **others: Any,
) -> list[Generation]:
    """The likeliest answers of an ``LLM``, best first, each with its ``score``; see ``engine.beams`` for the search.

    num_return_sequences   how many of them, at most ``num_beams``; None: one

    The rest is as in ``LLM.stream``. There is no sampling, and no form and no stop string: ParameterError names what
    is asked for beside it.
    """
    llm.check_answers()
    check_in_order(llm.program)
    if wrong := sorted(name for name, value in others.items() if value is not None and value not in ((), [])):
        raise ParameterError(f"num_beams does not go together with {wrong[0]}. Leave one of them out.")
    arguments.whole_number("num_beams", num_beams, 1, MOST_BEAMS)
    n = 1 if num_return_sequences is None else num_return_sequences
    arguments.whole_number("num_return_sequences", n, 1, num_beams)
    arguments.number("length_penalty", length_penalty, -arguments.MOST_LENGTH_PENALTY, arguments.MOST_LENGTH_PENALTY)
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise arguments.wrong("early_stopping", early_stopping, 'True, False or "never"')
    adapters = llm.adapter_scales(lora, control_vectors)
    ids = llm.prompt_ids(prompt, tools=tools, template_kwargs=template_kwargs, parse_special=parse_special)
    llm.engine.check(ids, max_tokens)
    room, eog_ids = llm.n_ctx - len(ids) + 1, llm.engine.eog_ids
    limit = room if max_tokens is None or max_tokens == -1 else min(room, max_tokens)
    banned = set(llm.tokenizer.suppressed_ids) | (set(eog_ids) if ignore_eos else set())
    ends = frozenset() if ignore_eos else eog_ids
    search, began = BeamSearch(num_beams, ends, limit, length_penalty, early_stopping), perf_counter()
    if limit:
        whole = follow(llm.engine, ids, search, banned, cancel, adapters)
    else:
        whole, search.finished = True, [Beam((), 0.0)]
    ms, prompt_ms = 1e3 * (perf_counter() - began), 1e3 * search.prompt_s
    # a search that was broken off has its best running texts
    found = search.finished if whole else [*search.finished, *search.running]
    full = "length" if limit == max_tokens else "context_full"
    answers = []
    for beam in found[:n]:
        times = Timings(len(ids), search.n_reused, prompt_ms, len(beam.tokens), ms - prompt_ms, prompt_ms)
        reason = "stop" if beam.tokens[-1:] and beam.tokens[-1] in ends else full if whole else "cancelled"
        answer = Generation.of(_chunks(llm, beam, reason, times, special=special))
        answer.score = beam.score
        answers.append(answer)
    return answers


def best_answer(llm: Any, prompt: Any, params: Any = None, **options: Any) -> Generation:
    """The best of ``beam_search``; ``beams`` are all that were asked for."""
    if params is not None:
        raise ParameterError("num_beams does not go together with params. Leave one of them out.")
    found = beam_search(llm, prompt, **options)
    found[0].beams = tuple(found)
    return found[0]


def answer_chunks(llm: Any, prompt: Any, *, progress: Any = None, **options: Any) -> Iterator[GenerationChunk]:
    """The best answer as chunks, which all come at the end; of progress nothing is told."""
    best = best_answer(llm, prompt, **options)
    yield GenerationChunk(best.text, None, None, None, best.timings)
    yield GenerationChunk("", None, None, best.finish_reason, best.timings, best.stop)


def _chunks(llm: Any, beam: Beam, reason: Any, times: Timings, *, special: bool) -> Iterator[GenerationChunk]:
    text = TextStream(llm.tokenizer, special=special)
    for i, token in enumerate(beam.tokens, 1):
        yield from text.chunks(GeneratedToken(token, None, reason if i == len(beam.tokens) else None, times))
    if not beam.tokens:
        yield from text.chunks(GeneratedToken(None, None, reason, times))
