"""Encoders that transformers does not have: their published equations in numpy, and llama.cpp on the same file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import edit_json, save_tensors
from encoder_tokenizers import BERT_VOCAB, save_unigram, save_word_piece
from llama_cpp_judge import llama_cpp_vector
from test_encoders import batch_of, nmse

import edgellm
from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.checkpoint import open_checkpoint
from edgellm.quantize.convert import convert

N_EMBD, N_HEAD, N_FF, N_LAYER, N_EXPERT, N_USED = 48, 6, 80, 3, 4, 2
"""Six heads: no power of two, so that slopes of two kinds are among them."""
EPS = 1e-5
LENGTHS = (1, 3, 17, 90)
Tensors = dict[str, np.ndarray]

NOMIC: dict[str, Any] = {
    "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "gelu",
    "n_embd": N_EMBD, "n_head": N_HEAD, "n_inner": N_FF, "n_layer": N_LAYER, "n_positions": 2048,
    "max_trained_positions": 2048, "layer_norm_epsilon": EPS, "rotary_emb_base": 10000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "prenorm": False,
    "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True, "causal": False, "use_rms_norm": None,
    "parallel_block": False, "parallel_block_tied_norm": False, "scale_attn_weights": True, "type_vocab_size": 1,
    "moe_every_n_layers": 2, "moe_impl": "megablocks", "moe_normalize_expert_weights": False, "moe_resid_pdrop": 0.0,
    "moe_top_k": N_USED, "num_experts": N_EXPERT, "num_shared_experts": 0, "expert_choice_router": False, "ffn_div": 1,
    "router_aux_loss_coef": 0.1, "add_pooling_layer": False, "pad_vocab_to_multiple_of": 64, "pad_token_id": 1,
}  # fmt: skip
JINA: dict[str, Any] = {
    "architectures": ["JinaBertForMaskedLM"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": N_EMBD,
    "intermediate_size": N_FF, "num_attention_heads": N_HEAD, "num_hidden_layers": N_LAYER, "layer_norm_eps": EPS,
    "max_position_embeddings": 8192, "position_embedding_type": "alibi", "feed_forward_type": "geglu",
    "type_vocab_size": 2, "emb_pooler": "mean", "attn_implementation": "torch", "model_max_length": 8192,
}  # fmt: skip


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Every tensor at random, norms and biases too."""
    rng, found = np.random.default_rng(3), Tensors()
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        size = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        found[name] = (is_norm + size * rng.standard_normal(shape)).astype(np.float32)
    return found


def linear_shapes(name: str, n_out: int, n_in: int, *, biased: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if biased else {})


def norm_shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (N_EMBD,) for name in names for kind in ("weight", "bias")}


# ---- the equations ---------------------------------------------------------------------------------------------------


def linear(t: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ t[f"{name}.weight"].astype(np.float64).T + t.get(f"{name}.bias", 0.0)


def norm(t: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPS)
    return x * t[f"{name}.weight"] + t[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def heads(x: np.ndarray) -> np.ndarray:
    """(n, width) as (heads, n, head size)"""
    return x.reshape(len(x), N_HEAD, -1).swapaxes(0, 1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]) + bias
    return (softmax(scores) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


def rotated(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def nomic(t: Tensors, ids: np.ndarray) -> np.ndarray:
    """Hidden states: attention of rotated heads, a feed-forward or the sum of two experts, each with a norm behind."""
    embeddings = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.token_type_embeddings.weight"][0]
    x = norm(t, "emb_ln", embeddings.astype(np.float64))
    for i in range(N_LAYER):
        blk = f"encoder.layers.{i}."
        q, k, v = (heads(part) for part in np.split(linear(t, f"{blk}attn.Wqkv", x), 3, axis=1))
        x = norm(t, f"{blk}norm1", x + linear(t, f"{blk}attn.out_proj", attend(rotated(q), rotated(k), v)))
        if i % 2 == 1:
            y = experts(t, f"{blk}mlp.", x)
        else:
            y = linear(t, f"{blk}mlp.fc2", gelu(linear(t, f"{blk}mlp.fc1", x)))
        x = norm(t, f"{blk}norm2", x + y)
    return x


def experts(t: Tensors, mlp: str, x: np.ndarray) -> np.ndarray:
    shares = softmax(linear(t, f"{mlp}router.layer", x))
    first, second = (t[f"{mlp}experts.mlp.{w}"].reshape(N_EXPERT, N_FF, N_EMBD) for w in ("w1", "w2"))
    out = np.zeros_like(x)
    for row, chosen in enumerate(np.argsort(-shares, axis=1)[:, :N_USED]):
        for e in chosen:
            out[row] += shares[row, e] * (gelu(x[row] @ first[e].T.astype(np.float64)) @ second[e])
    return out + t[f"{mlp}experts.bias"]


def slopes() -> np.ndarray:
    """ALiBi's, of four heads and of every other one of eight."""
    return np.array([2.0 ** -(2 * (i + 1)) for i in range(4)] + [2.0 ** -(2 * i + 1) for i in range(N_HEAD - 4)])


def jina(t: Tensors, ids: np.ndarray) -> np.ndarray:
    """Hidden states: scores that fade by the distance, gated units; with norms of q, k and x once more for code."""
    table = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
    x = norm(t, "embeddings.LayerNorm", (t[table[0]][ids] + t[table[1]][0]).astype(np.float64))
    place = np.arange(len(ids))
    bias = -slopes()[:, None, None] * np.abs(place[:, None] - place[None, :])
    for i in range(N_LAYER):
        blk = f"encoder.layer.{i}."
        q, k, v = (linear(t, f"{blk}attention.self.{name}", x) for name in ("query", "key", "value"))
        for_code = f"{blk}layer_norm_1.weight" in t
        if for_code:
            q, k = (norm(t, f"{blk}attention.self.layer_norm_{n}", y) for n, y in (("q", q), ("k", k)))
        attended = linear(t, f"{blk}attention.output.dense", attend(heads(q), heads(k), heads(v), bias))
        y = norm(t, f"{blk}attention.output.LayerNorm", x + attended)
        x = norm(t, f"{blk}layer_norm_1", x + y) if for_code else y
        if for_code:
            up, gate = np.split(linear(t, f"{blk}mlp.up_gated_layer", x), 2, axis=1)
            x = norm(t, f"{blk}layer_norm_2", x + linear(t, f"{blk}mlp.down_layer", up * gelu(gate)))
        else:
            gate, up = np.split(linear(t, f"{blk}mlp.gated_layers", x), 2, axis=1)
            x = norm(t, f"{blk}mlp.layernorm", x + linear(t, f"{blk}mlp.wo", gelu(gate) * up))
    return x


# ---- their checkpoints -----------------------------------------------------------------------------------------------


def save_nomic(folder: Path) -> Tensors:
    n_vocab = save_unigram(folder)
    edit_json(folder / "config.json", vocab_size=n_vocab, **NOMIC)
    tables = {"embeddings.word_embeddings.weight": (n_vocab, N_EMBD)}
    shapes = tables | {"embeddings.token_type_embeddings.weight": (1, N_EMBD)} | norm_shapes("emb_ln")
    for i in range(N_LAYER):
        blk = f"encoder.layers.{i}."
        shapes |= linear_shapes(f"{blk}attn.Wqkv", 3 * N_EMBD, N_EMBD) | norm_shapes(f"{blk}norm1", f"{blk}norm2")
        shapes |= linear_shapes(f"{blk}attn.out_proj", N_EMBD, N_EMBD)
        if i % 2 == 1:
            shapes |= linear_shapes(f"{blk}mlp.router.layer", N_EXPERT, N_EMBD, biased=False)
            shapes |= {f"{blk}mlp.experts.mlp.{w}": (N_EXPERT * N_FF, N_EMBD) for w in ("w1", "w2")}
            shapes |= {f"{blk}mlp.experts.bias": (N_EMBD,)}
        else:
            shapes |= linear_shapes(f"{blk}mlp.fc1", N_FF, N_EMBD) | linear_shapes(f"{blk}mlp.fc2", N_EMBD, N_FF)
    return random_tensors(shapes)


def save_nomic_without_bias(folder: Path) -> Tensors:
    return {name: tensor * (not name.endswith("experts.bias")) for name, tensor in save_nomic(folder).items()}


def save_jina(folder: Path) -> Tensors:
    return _save_jina(folder, for_code=False)


def save_jina_for_code(folder: Path) -> Tensors:
    return _save_jina(folder, for_code=True)


def _save_jina(folder: Path, *, for_code: bool) -> Tensors:
    save_word_piece(folder)
    edit_json(folder / "config.json", vocab_size=len(BERT_VOCAB), **JINA)
    shapes = {"embeddings.word_embeddings.weight": (len(BERT_VOCAB), N_EMBD)} | norm_shapes("embeddings.LayerNorm")
    shapes |= {"embeddings.token_type_embeddings.weight": (2, N_EMBD)} | linear_shapes("pooler.dense", N_EMBD, N_EMBD)
    for i in range(N_LAYER):
        blk = f"encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear_shapes(f"{blk}attention.{name}", N_EMBD, N_EMBD)
        shapes |= norm_shapes(f"{blk}attention.output.LayerNorm")
        up, down = ("up_gated_layer", "down_layer") if for_code else ("gated_layers", "wo")
        shapes |= linear_shapes(f"{blk}mlp.{up}", 2 * N_FF, N_EMBD, biased=False)
        shapes |= linear_shapes(f"{blk}mlp.{down}", N_EMBD, N_FF)
        if for_code:
            shapes |= norm_shapes(*(f"{blk}attention.self.layer_norm_{x}" for x in "qk"))
            shapes |= norm_shapes(f"{blk}layer_norm_1", f"{blk}layer_norm_2")
        else:
            shapes |= norm_shapes(f"{blk}mlp.layernorm")
    return random_tensors(shapes)


# name -> (writes all but the weights, the equations, whether llama.cpp reads the file)
MODELS: dict[str, tuple[Callable[[Path], Tensors], Callable[[Tensors, np.ndarray], np.ndarray], bool]] = {
    "nomic-bert-moe": (save_nomic, nomic, False),
    "nomic-bert-moe without a bias of experts": (save_nomic_without_bias, nomic, True),
    "jina-bert-v2": (save_jina, jina, True),
    "jina-bert-v2 for code": (save_jina_for_code, jina, True),
}


def save(folder: Path, name: str) -> Tensors:
    """The checkpoint of one of MODELS; its tensors."""
    folder.mkdir(exist_ok=True)
    tensors = MODELS[name][0](folder)
    save_tensors(folder / "model.safetensors", tensors)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling").mkdir()
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)
    return tensors


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensors, Path]:
    """One of MODELS: its name, tensors, the GGUF file."""
    folder = tmp_path_factory.mktemp("encoder")
    tensors = save(folder / "hf", request.param)
    with open_checkpoint(folder / "hf") as source:
        convert(source, folder / "model.gguf", "f32")
        assert any("may refuse" in note for note in source.notes) == (request.param == "nomic-bert-moe")
    return request.param, tensors, folder / "model.gguf"


def test_states_are_those_of_the_published_equations_alone_and_among_others(
    converted: tuple[str, Tensors, Path],
) -> None:
    name, tensors, path = converted
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        assert program.architecture == name.split()[0] and program.is_encoder
        assert program.context_length == (512 if name.startswith("nomic") else 8192)
        rng = np.random.default_rng(5)
        texts = [rng.integers(5, program.n_vocab, n).astype(np.int32) for n in LENGTHS]
        reference = ReferenceExecutor(program, 0, max_tokens=sum(LENGTHS))
        whole = reference.run(batch_of(texts)).copy()
        fast = {n: CPUExecutor(program, 0, n, max_tokens=sum(LENGTHS)) for n in (1, 2)}
        quick = fast[2].run(batch_of(texts)).copy()
        end = 0
        for text in texts:
            start, end = end, end + len(text)
            assert nmse(whole[start:end], MODELS[name][1](tensors, text)) <= 1e-10, len(text)
            assert nmse(quick[start:end], whole[start:end]) <= 1e-6, len(text)
            for executor in fast.values():
                assert np.array_equal(executor.run(batch_of([text])), quick[start:end])
        for executor in fast.values():
            executor.close()


def test_llama_cpp_makes_the_same_vector_of_a_text(converted: tuple[str, Tensors, Path]) -> None:
    name, _, path = converted
    if not MODELS[name][2]:
        pytest.skip("llama.cpp leaves out the bias of experts")
    text = "the license of any work and the end"
    judge = llama_cpp_vector(path, text)
    with edgellm.load(path, executor="reference") as llm:
        vector = llm.embed([text])[0]
    assert vector @ judge / np.linalg.norm(judge) > 1 - 1e-5  # its curve of GELU is the other one, in float16


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts of other layers": ("nomic-bert-moe", {"moe_top_k": 9}, "expert_used_count"),
    "experts that are normed": ("nomic-bert-moe", {"moe_normalize_expert_weights": True}, "moe_normalize_expert_we"),
    "experts that choose": ("nomic-bert-moe", {"expert_choice_router": True}, "expert_choice_router"),
    "too many experts": ("nomic-bert-moe", {"num_experts": 7}, "rows of 7 experts"),
    "another curve": ("nomic-bert-moe", {"activation_function": "swiglu"}, "activation_function"),
    "rows for positions": ("jina-bert-v2", {"position_embedding_type": "absolute"}, "position_embedding_type"),
    "another unit": ("jina-bert-v2", {"feed_forward_type": "reglu"}, "feed_forward_type"),
    "a class of BERT": ("jina-bert-v2", {"architectures": ["BertModel"]}, "alibi|feed_forward_type"),
    "a new key": ("jina-bert-v2", {"new": 1}, "new is 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_settings_that_no_program_computes_are_refused_by_name(what: str, tmp_path: Path) -> None:
    name, keys, named = BAD[what]
    save(tmp_path / "hf", name)
    edit_json(tmp_path / "hf" / "config.json", **keys)
    with pytest.raises(EdgeLLMError, match=named):
        open_checkpoint(tmp_path / "hf")
