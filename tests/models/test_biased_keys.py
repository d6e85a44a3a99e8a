"""Keys with large constant parts, as Qwen2's biases make them: what cache types lose, by transformers' logits.

Biases of tens stand in a few dimensions that the rotation of positions hardly turns; the others vary by about one. A
scale that a token's dimensions share is as wide as the bias; one that a dimension's positions share is not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_models import transformers_model
from tiny_models import write_transformers_model

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.models import build_program

N_TOKENS, N_SCORED = 250, 100
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
SHAPE = {
    "hidden_size": HEADS * HEAD_DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 2,
}
LIMITS = {"f16": 1e-4, "q8_0": 0.02, "q5_1": 0.8, "q4_0": 3.0, "kivi2": 0.6}
"""Of the mean divergence. Found: 2e-5, 0.007, 0.40, 1.37, 0.34; bf16 0.0016, q5_0 0.37, q4_1 1.29, iq4_nl 1.61."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def test_what_cache_types_lose_of_keys_with_large_biases(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
    model = transformers_model("Qwen2", SHAPE)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("k_proj.bias"):
                bias = rng.normal(0, 1, (KV_HEADS, 2, HEAD_DIM // 2))
                bias[:, :, -3:] = rng.choice([-1, 1], (KV_HEADS, 2, 3)) * rng.uniform(10, 40, (KV_HEADS, 2, 3))
                weight.copy_(torch.from_numpy(bias.reshape(-1)))
            elif name.endswith("q_proj.weight"):
                weight.mul_(1.5)  # so that it matters which keys are looked at
        model.get_output_embeddings().weight.mul_(3)
        ids = rng.integers(0, 131, N_TOKENS)
        judged = log_softmax(model(torch.from_numpy(ids)[None]).logits[0, -N_SCORED:].numpy())
    found = dict[str, float]()
    with GGUFFile.open(write_transformers_model(tmp_path / "model.gguf", model)) as gguf:
        for name in LIMITS:
            program = with_cache_types(build_program(gguf), name, name)
            executor = ReferenceExecutor(program, N_TOKENS // 32 + 1, N_TOKENS, kv_dtype="float16")
            rows = log_softmax(executor.run(Batch.single(program, ids.astype(np.int32)))[-N_SCORED:])
            found[name] = float((np.exp(judged) * (judged - rows)).sum(axis=1).mean())
    assert all(found[name] <= limit for name, limit in LIMITS.items()), found
    assert found["kivi2"] < found["q4_0"] / 2
