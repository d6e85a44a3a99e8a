"""llama.cpp as the judge of a model's numbers: what it answers, and the probability of every token behind a prompt.

It runs in a process of its own, as it aborts on what it does not like. Keys and values stay in float32 and attention is
made of plain products, so that what differs is what the two programs make of the model.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.kernels.ops.elementwise import CURVES, UNITS, gelu

_PROGRAM = """
import json, sys, xllamacpp
path, prompts, n_vocab, letter, loras = sys.argv[1], *map(json.loads, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, scale) for lora, scale in loras]
params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": "the and", "n_predict": 12, "temperature": 0, "seed": 1})
text = answer["choices"][0]["text"] if "choices" in answer else answer["content"]
rows = []
for prompt in prompts:  # the server is silent about tokens that are no whole letter, so it is told which to take
    request = {"prompt": prompt, "n_predict": 1, "n_probs": n_vocab, "logit_bias": [[letter, 1e4]]}
    told = server.handle_completions(request | {"temperature": 0})["choices"][0]["logprobs"]["content"][0]
    rows.append(sorted((t["id"], t["logprob"]) for t in told["top_logprobs"]))
print("ANSWER", json.dumps({"text": text, "rows": rows}))
"""

_EMBEDDING = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.warmup = sys.argv[1], True, False
params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 256, 256, 256, 1
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
told = server.handle_embeddings({"input": sys.argv[2], "model": "x"})
print("ANSWER", json.dumps(told["data"][0]["embedding"]))
"""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp says: the text behind "the and", greedily, and (n_prompts, n_vocab) the tokens' log-probabilities
    behind each prompt."""

    text: str
    logprobs: np.ndarray


def take_gelu_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's one GELU in place of ours: the form with tanh, of float16 for float16."""

    def found(x: np.ndarray) -> np.ndarray:
        made = gelu(x.astype(np.float16).astype(np.float32)).astype(np.float16).astype(np.float32)
        return np.where(x <= -10, 0, np.where(x >= 10, x, made))

    monkeypatch.setitem(UNITS, "gelu", lambda gate, up: found(gate) * up)
    for curve in ("gelu", "gelu_erf"):
        monkeypatch.setitem(CURVES, curve, found)


def llama_cpp_answer(
    path: Path, prompts: list[list[int]], n_vocab: int, letter: int, loras: Sequence[tuple[Path, float]] = ()
) -> Answer:
    """The answer to prompts of ids; skips the test where llama.cpp is not installed.

    letter   the id of any token that is a letter
    loras    files of adapters, and their scales
    """
    adapters = [(str(lora), scale) for lora, scale in loras]
    found = _told(_PROGRAM, str(path), *map(json.dumps, (prompts, n_vocab, letter, adapters)))
    assert all([token for token, _ in row] == list(range(n_vocab)) for row in found["rows"])
    return Answer(found["text"], np.array(found["rows"])[:, :, 1])


def llama_cpp_vector(path: Path, text: str) -> np.ndarray:
    """The mean of the rows of a text, of length 1; skips the test where llama.cpp is not installed."""
    return np.array(_told(_EMBEDDING, str(path), text))


def _told(program: str, *arguments: str) -> Any:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is the judge: pip install xllamacpp")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("ANSWER "))
