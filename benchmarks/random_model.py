"""Write a GGUF file of a real model's shape with random, sane weights: for speed and memory, not for text.

    python benchmarks/random_model.py 1b Q4_K_M random-1b-q4_k_m.gguf

1b has the shape of Llama 3.2 1B, 4b that of Qwen3 4B, with their vocabularies' sizes and tied embeddings, 8b that of
Llama 3.1 8B; delta-0.8b and delta-4b are Qwen3.5's; states-1.5b is Falcon-H1's and states-7b that of Granite 4 H Tiny;
inputs-4b is Gemma 4 E4B's; experts-30b, experts-7b and experts-20b are the first layers of Qwen3-30B-A3B, OLMoE and
gpt-oss; latent-30b has layers of GLM 4.7 Flash, and latent-16b of DeepSeek V2 Lite, whose attention is that of a
latent; convs-8b is LFM2 8B A1B's shape, and states-30b the first 13 of the 52 layers of Nemotron 3 Nano 30B A3B. Blocks
are random bytes whose scales give the weights a deviation of 1 / sqrt(n_in), so that activations stay in their range
and no two lines of the file are alike. Q4_K_M gives every tensor the type that llama.cpp's mix of that name does, MXFP4
is that of experts alone: the rest is Q8_0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.gguf_writer import TensorPlan, rows_in_chunks, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES


@dataclass(frozen=True)
class Shape:
    """The hyperparameters of a model.

    experts   how many there are and how many a token is sent to, each n_ff wide
    delta     key heads, value heads and their size in the layers that are delta-nets: all but each fourth
    states    heads, their size, groups and state size of Mamba-2 in layers that have it: in all beside attention
              (falcon-h1), or in all but four in place of it (granitehybrid)
    shared    width of the expert that all tokens share
    inputs    of a Gemma 4: columns of a layer's own input, layers without keys, the head size of each sixth layer,
              which sees everything, and the window of the others
    kinds     a letter for each layer, where most have no attention: * attention, M Mamba-2, C short convolution,
              E experts in place of these (nemotron_h_moe)
    dense     layers at the front whose feed-forward has no experts, and its width
    latent    rank of queries (0 for none), of keys and values, parts of a head that are not rotated and that are, its
              values
    """

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    rope_base: float
    experts: tuple[int, int] | None = None
    delta: tuple[int, int, int] | None = None
    is_tied: bool = True
    n_rot: int | None = None
    states: tuple[int, int, int, int] | None = None
    shared: int = 0
    inputs: tuple[int, int, int, int] | None = None
    latent: tuple[int, int, int, int, int] | None = None
    kinds: str = ""
    dense: tuple[int, int] = (0, 0)

    def wide(self, layer: int) -> bool:
        """Whether a layer of a Gemma 4 sees everything."""
        return layer % 6 == 5

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        if self.kinds:
            return self.kinds[layer] == "*"
        if self.architecture == "granitehybrid":
            return layer in (5, 15, 25, 35)
        return not self.delta or (layer + 1) % 4 == 0

    def kind(self, layer: int) -> str:
        """The letter of a layer, where they have some."""
        return self.kinds[layer : layer + 1]

    def has_states(self, layer: int) -> bool:
        """Whether a layer has Mamba-2."""
        if self.kinds:
            return self.kind(layer) == "M"
        return bool(self.states) and (self.architecture == "falcon-h1" or not self.attends(layer))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return bool(self.experts) and layer >= self.dense[0] and (not self.is_sparse or self.kind(layer) == "E")

    @property
    def is_sparse(self) -> bool:
        """Whether layers are one thing each, and feed-forwards squared ReLUs without gates."""
        return self.architecture == "nemotron_h_moe"


SHAPES = {
    "1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 500000.0),
    "8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 500000.0, is_tied=False),
    "4b": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 1000000.0),
    "delta-0.8b": Shape("qwen35", 24, 1024, 3584, 8, 2, 256, 248320, 1e7, delta=(16, 16, 128), n_rot=64),
    "delta-4b": Shape("qwen35", 32, 2560, 9216, 16, 4, 256, 248320, 1e7, delta=(16, 32, 128), n_rot=64),
    "states-1.5b": Shape("falcon-h1", 24, 2048, 4096, 8, 2, 128, 65537, 1e11, states=(48, 64, 1, 256), is_tied=False),
    "states-7b": Shape(
        "granitehybrid", 40, 1536, 512, 12, 4, 128, 100352, 1e4, experts=(64, 6), states=(48, 64, 1, 128), shared=1024
    ),
    "experts-30b": Shape("qwen3moe", 8, 2048, 768, 32, 4, 128, 151936, 1e6, experts=(128, 8), is_tied=False),
    "experts-7b": Shape("olmoe", 8, 2048, 1024, 16, 16, 128, 50304, 1e4, experts=(64, 8), is_tied=False),
    "experts-20b": Shape("gpt-oss", 6, 2880, 2880, 64, 8, 64, 201088, 150000.0, experts=(32, 4), is_tied=False),
    "inputs-4b": Shape("gemma4", 42, 2560, 10240, 8, 2, 256, 262144, 1e6, inputs=(256, 18, 512, 512)),
    "latent-30b": Shape(
        "deepseek2",
        6,
        2048,
        1536,
        20,
        1,
        576,
        154880,
        1e6,
        experts=(64, 4),
        is_tied=False,
        n_rot=64,
        shared=1536,
        latent=(768, 512, 192, 64, 256),
    ),
    "latent-16b": Shape(
        "deepseek2",
        26,
        2048,
        1408,
        16,
        1,
        576,
        102400,
        1e4,
        experts=(64, 6),
        is_tied=False,
        n_rot=64,
        shared=2816,
        latent=(0, 512, 128, 64, 128),
    ),
    "convs-8b": Shape(
        "lfm2moe",
        24,
        2048,
        1792,
        32,
        8,
        64,
        65536,
        1e6,
        experts=(32, 4),
        kinds="CC*CCC*CCC*CCC*CCC*CC*CC",
        dense=(2, 7168),
    ),
    "states-30b": Shape(
        "nemotron_h_moe",
        13,
        2688,
        1856,
        32,
        2,
        128,
        131072,
        1e4,
        experts=(128, 6),
        is_tied=False,
        states=(64, 64, 8, 128),
        shared=3712,
        kinds="MEMEM*EMEMEM*",
    ),
}
MIXES = ("Q4_K_M", "Q8_0", "MXFP4")

# float16 fields of a block: byte, and the multiple of the scale that centres the values
SCALES = {"Q8_0": ((0, 1.0),), "Q5_0": ((0, 1.0),), "Q4_K": ((0, 1.0), (2, 7.5)), "Q6_K": ((208, 1.0),)}


def tensor_type(mix: str, name: str, layer: int, n_layer: int) -> str:
    """The type of a matrix: Q4_K_M keeps the embedding, and half of attn_v and ffn_down, at six bits."""
    if mix == "MXFP4":
        return mix if name.endswith("_exps") else "Q8_0"
    if mix != "Q4_K_M":
        return mix
    more = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    six = name in ("token_embd", "per_layer_token_embd", "output")
    six = six or (name in ("attn_v", "ffn_down", "ffn_down_exps") and more)
    return "Q6_K" if six else "Q4_K"


def random_matrix(name: str, shape: tuple[int, ...], quant_name: str, seed: int) -> TensorPlan:
    """A matrix of random blocks, or one for each expert, made while it is written.

    Rows that are no multiple of 256 long get the type that llama.cpp gives them.
    """
    if shape[-1] % QUANT_TYPES[quant_name].block_size:
        quant_name = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}[quant_name]
    quant = QUANT_TYPES[quant_name]
    row_nbytes = quant.row_nbytes(shape[-1])

    def blocks(rng: np.random.Generator, n_rows: int, scale: float) -> np.ndarray:
        data = rng.integers(0, 256, (n_rows * row_nbytes // quant.block_nbytes, quant.block_nbytes), np.uint8)
        for at, multiple in SCALES.get(quant_name, ()):
            data[:, at : at + 2] = np.array([scale * multiple], "<f2").view(np.uint8)
        if quant_name == "MXFP4":  # a power of two
            data[:, 0] = 127 + round(math.log2(scale))
        return data

    def chunks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        sample = quant.dequantize(blocks(rng, 1, 1.0))
        scale = 1 / math.sqrt(shape[-1]) / float(np.std(sample))
        for start, stop in rows_in_chunks(math.prod(shape[:-1]), row_nbytes):
            yield blocks(rng, stop - start, scale)

    return TensorPlan(name, shape, quant, chunks)


def numbers(name: str, shape: tuple[int, ...], value: float) -> TensorPlan:
    """A tensor of float32 that are all the same: the weight of a norm, a bias."""
    return TensorPlan(name, shape, QUANT_TYPES["F32"], lambda: [np.full(shape, value, np.float32)])


def random_floats(name: str, shape: tuple[int, int], seed: int) -> TensorPlan:
    """A matrix of float32, a router or a convolution."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) / math.sqrt(shape[1])).astype(np.float32)
    return TensorPlan(name, shape, QUANT_TYPES["F32"], lambda: [values])


def layer_matrices(s: Shape, attends: bool, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of a layer that are quantized."""
    found: dict[str, tuple[int, ...]] = {}
    if s.inputs:
        width, n_shared, head_dim, _ = s.inputs
        size = head_dim if s.wide(layer) else s.head_dim
        found = {"attn_q": (s.n_head * size, s.n_embd), "attn_output": (s.n_embd, s.n_head * size)}
        if layer < s.n_layer - n_shared:
            found |= {f"attn_{x}": (s.n_head_kv * size, s.n_embd) for x in "kv"}
        found |= {"inp_gate": (width, s.n_embd), "proj": (s.n_embd, width)}
        found |= {f"ffn_{x}": (s.n_ff, s.n_embd) for x in ("gate", "up")}
        return found | {"ffn_down": (s.n_embd, s.n_ff)}
    if s.delta and not attends:
        n_k, n_v, dim = s.delta
        found = {
            "attn_qkv": ((2 * n_k + n_v) * dim, s.n_embd),
            "attn_gate": (n_v * dim, s.n_embd),
            "ssm_alpha": (n_v, s.n_embd),
            "ssm_beta": (n_v, s.n_embd),
            "ssm_out": (s.n_embd, n_v * dim),
        }
    elif s.latent:
        q_rank, rank, n_nope, n_rot, d_v = s.latent
        n_q = s.n_head * (n_nope + n_rot)
        found = {"attn_q_a": (q_rank, s.n_embd), "attn_q_b": (n_q, q_rank)} if q_rank else {"attn_q": (n_q, s.n_embd)}
        found |= {"attn_kv_a_mqa": (rank + n_rot, s.n_embd), "attn_k_b": (s.n_head, rank, n_nope)}
        found |= {"attn_v_b": (s.n_head, d_v, rank), "attn_output": (s.n_embd, s.n_head * d_v)}
    elif s.kind(layer) == "C":
        found = {"shortconv.in_proj": (3 * s.n_embd, s.n_embd), "shortconv.out_proj": (s.n_embd, s.n_embd)}
    elif attends:
        found = {
            "attn_q": (s.n_head * s.head_dim * (2 if s.delta else 1), s.n_embd),
            "attn_k": (s.n_head_kv * s.head_dim, s.n_embd),
            "attn_v": (s.n_head_kv * s.head_dim, s.n_embd),
            "attn_output": (s.n_embd, s.n_head * s.head_dim),
        }
    if s.has_states(layer):
        heads, dim, groups, size = s.states or (0, 0, 0, 0)
        found["ssm_in"] = (2 * heads * dim + 2 * groups * size + heads, s.n_embd)
        found["ssm_out"] = (s.n_embd, heads * dim)
    return found | feed_forward_matrices(s, layer)


def feed_forward_matrices(s: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    """Those of its feed-forward; without gates where it is squared ReLUs."""
    if s.is_sparse and not s.has_experts(layer):
        return {}
    found: dict[str, tuple[int, ...]] = {}
    gates = ("up",) if s.is_sparse else ("gate", "up")
    if s.shared:
        found |= {f"ffn_{name}_shexp": (s.shared, s.n_embd) for name in gates}
        found["ffn_down_shexp"] = s.n_embd, s.shared
    n_ff = s.n_ff if layer >= s.dense[0] else s.dense[1]
    of_experts, suffix = ((s.experts[0],), "_exps") if s.experts and s.has_experts(layer) else ((), "")
    for name in gates:
        found[f"ffn_{name}{suffix}"] = (*of_experts, n_ff, s.n_embd)
    return found | {f"ffn_down{suffix}": (*of_experts, s.n_embd, n_ff)}


Filled = tuple[tuple[int, ...], float]  # a tensor's shape, and what it is filled with


def layer_numbers(s: Shape, attends: bool, layer: int = 0) -> dict[str, Filled]:
    """Shapes of the other tensors of a layer, by their whole names, and what they are filled with."""
    if s.inputs:
        _, n_shared, head_dim, _ = s.inputs
        size = head_dim if s.wide(layer) else s.head_dim
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
        of_gemma: dict[str, Filled] = {f"{x}.weight": ((s.n_embd,), 1.0) for x in norms}
        of_gemma |= {"attn_q_norm.weight": ((size,), size**-0.5), "layer_output_scale.weight": ((1,), 1.0)}
        return of_gemma | ({"attn_k_norm.weight": ((size,), 1.0)} if layer < s.n_layer - n_shared else {})
    found: dict[str, Filled] = {"attn_norm.weight": ((s.n_embd,), 1.0)}
    second = "post_attention_norm" if s.architecture in ("qwen35", "gpt-oss") else "ffn_norm"
    if not s.is_sparse:
        found[second if s.architecture == "falcon-h1" else f"{second}.weight"] = (s.n_embd,), 1.0
    if s.architecture == "lfm2moe" and attends:
        found |= {f"attn_{x}_norm.weight": ((s.head_dim,), 1.0) for x in "qk"}
    if s.kinds and s.experts and s.has_experts(layer):
        found["exp_probs_b.bias"] = s.experts[:1], 0.0
    if s.has_states(layer):
        heads, dim, groups, size = s.states or (0, 0, 0, 0)
        found |= {"ssm_a": ((heads, 1), -0.1), "ssm_d": ((heads, 1), 1.0), "ssm_dt.bias": ((heads,), 0.0)}
        found["ssm_conv1d.bias"] = (heads * dim + 2 * groups * size,), 0.1
        if s.architecture != "falcon-h1":
            found["ssm_norm.weight"] = (groups, heads * dim // groups), 1.0
    if s.delta and not attends:
        _, n_v, dim = s.delta
        return found | {"ssm_norm.weight": ((dim,), 1.0), "ssm_a": ((n_v,), -0.1), "ssm_dt.bias": ((n_v,), 0.0)}
    if s.latent:
        ranks = {"attn_q_a_norm": s.latent[0], "attn_kv_a_norm": s.latent[1]}
        found |= {f"{name}.weight": ((width,), 1.0) for name, width in ranks.items() if width}
    if s.architecture in ("qwen3", "qwen3moe", "qwen35"):
        found |= {f"attn_{x}_norm.weight": ((s.head_dim,), 1.0) for x in "qk"}
    if s.architecture == "olmoe":
        found |= {f"attn_{x}_norm.weight": ((n * s.head_dim,), 1.0) for x, n in (("q", s.n_head), ("k", s.n_head_kv))}
    if s.architecture == "gpt-oss" and s.experts:
        found["attn_sinks.weight"] = (s.n_head,), 0.0
        sizes = {name: size[:-1] for name, size in layer_matrices(s, attends).items()}
        found |= {f"{name}.bias": (size, 0.01) for name, size in (sizes | {"ffn_gate_inp": s.experts[:1]}).items()}
    return found


def tensors(shape: Shape, mix: str) -> list[TensorPlan]:
    """All tensors in the order of llama.cpp's converter."""
    s = shape
    embedding = tensor_type(mix, "token_embd", 0, s.n_layer)
    plans = [
        random_matrix("token_embd.weight", (s.n_vocab, s.n_embd), embedding, 0),
        numbers("token_embd_norm.weight" if s.architecture == "lfm2moe" else "output_norm.weight", (s.n_embd,), 1.0),
    ]
    if not s.is_tied:
        plans.append(random_matrix("output.weight", (s.n_vocab, s.n_embd), tensor_type(mix, "output", 0, 1), 1 << 20))
    if s.inputs:
        whole = s.n_layer * s.inputs[0]
        plans += [
            numbers("rope_freqs.weight", (s.inputs[2] // 2,), 1.0),
            random_matrix("per_layer_token_embd.weight", (s.n_vocab, whole), embedding, 1 << 21),
            random_floats("per_layer_model_proj.weight", (whole, s.n_embd), 1 << 22),
            numbers("per_layer_proj_norm.weight", s.inputs[:1], 1.0),
        ]
    for layer in range(s.n_layer):
        attends, seed = s.attends(layer), 1 + layer * 16
        for name, (size, value) in layer_numbers(s, attends, layer).items():
            plans.append(numbers(f"blk.{layer}.{name}", size, value))
        if s.has_states(layer) and s.states:
            heads, dim, groups, n_state = s.states
            n_conv = heads * dim + 2 * groups * n_state
            plans.append(random_floats(f"blk.{layer}.ssm_conv1d.weight", (n_conv, 4), seed + 14))
        if s.delta and not attends:
            n_qkv = (2 * s.delta[0] + s.delta[1]) * s.delta[2]
            plans.append(random_floats(f"blk.{layer}.ssm_conv1d.weight", (n_qkv, 4), seed + 14))
        if s.kind(layer) == "C":
            plans.append(random_floats(f"blk.{layer}.shortconv.conv.weight", (s.n_embd, 3), seed + 14))
        if s.experts and s.has_experts(layer):
            plans.append(random_floats(f"blk.{layer}.ffn_gate_inp.weight", (s.experts[0], s.n_embd), seed + 15))
        for i, (name, size) in enumerate(layer_matrices(s, attends, layer).items()):
            quant = tensor_type(mix, name, layer, s.n_layer)
            plans.append(random_matrix(f"blk.{layer}.{name}.weight", size, quant, seed + i))
    return plans


def metadata(shape: Shape, name: str) -> dict[str, tuple[Any, str]]:
    """The keys that a runner needs, and a byte-level vocabulary of the right size whose words mean nothing."""
    s, a = shape, shape.architecture
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    words = [f"{letters[64 + i % 26]}{i}" for i in range(s.n_vocab - 259)]
    tokens = [*letters, "he", "in", *words, "<|end|>"]
    return {
        "general.architecture": (a, "STRING"),
        "general.name": (name, "STRING"),
        f"{a}.context_length": (32768, "UINT32"),
        f"{a}.embedding_length": (s.n_embd, "UINT32"),
        f"{a}.block_count": (s.n_layer, "UINT32"),
        f"{a}.feed_forward_length": (s.n_ff, "UINT32"),
        f"{a}.attention.head_count": (s.n_head, "UINT32"),
        f"{a}.attention.head_count_kv": (s.n_head_kv, "UINT32"),
        f"{a}.attention.key_length": (s.head_dim, "UINT32"),
        f"{a}.attention.value_length": (s.head_dim, "UINT32"),
        f"{a}.attention.layer_norm_rms_epsilon": (1e-6, "FLOAT32"),
        f"{a}.rope.dimension_count": (s.n_rot or s.head_dim, "UINT32"),
        f"{a}.rope.freq_base": (s.rope_base, "FLOAT32"),
        "tokenizer.ggml.model": ("gpt2", "STRING"),
        "tokenizer.ggml.pre": ("llama-bpe", "STRING"),
        "tokenizer.ggml.tokens": (tokens, "ARRAY[STRING]"),
        "tokenizer.ggml.token_type": ([1] * (len(tokens) - 1) + [3], "ARRAY[INT32]"),
        "tokenizer.ggml.merges": (["h e", "i n"], "ARRAY[STRING]"),
        "tokenizer.ggml.eos_token_id": (len(tokens) - 1, "UINT32"),
        "tokenizer.ggml.add_bos_token": (False, "BOOL"),
    } | own_metadata(s)


def own_metadata(shape: Shape) -> dict[str, tuple[Any, str]]:
    """The keys of architectures with experts, delta-nets or windows."""
    found: dict[str, tuple[Any, str]] = {}
    if shape.experts:
        found["expert_count"], found["expert_used_count"] = ((n, "UINT32") for n in shape.experts)
        if shape.architecture not in ("olmoe", "granitehybrid"):
            found["expert_feed_forward_length"] = shape.n_ff, "UINT32"
    if shape.architecture == "gpt-oss":
        found["attention.sliding_window"] = 128, "UINT32"
    if shape.inputs:
        width, n_shared, head_dim, window = shape.inputs
        found |= dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"), (head_dim, "UINT32")
        )
        near = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
        found |= dict.fromkeys(near, (shape.head_dim, "UINT32"))
        found["attention.sliding_window"] = window, "UINT32"
        found["attention.sliding_window_pattern"] = [not shape.wide(i) for i in range(shape.n_layer)], "ARRAY[BOOL]"
        found |= {"attention.shared_kv_layers": (n_shared, "UINT32"), "rope.freq_base_swa": (1e4, "FLOAT32")}
        found |= {"embedding_length_per_layer_input": (width, "UINT32"), "final_logit_softcapping": (30.0, "FLOAT32")}
    if shape.latent:
        q_rank, rank, n_nope, n_rot, d_v = shape.latent
        sizes = {"kv_lora_rank": rank, "value_length": rank, "key_length_mla": n_nope + n_rot, "value_length_mla": d_v}
        found |= {f"attention.{key}": (value, "UINT32") for key, value in sizes.items()}
        if q_rank:
            found["attention.q_lora_rank"] = q_rank, "UINT32"
        found["expert_shared_count"] = shape.shared // shape.n_ff, "UINT32"
        found["expert_gating_func"] = 2, "UINT32"
        found["expert_weights_norm"] = True, "BOOL"
    if shape.states:
        heads, dim, groups, size = shape.states
        sizes = {"conv_kernel": 4, "state_size": size, "group_count": groups, "time_step_rank": heads}
        found |= {f"ssm.{key}": (value, "UINT32") for key, value in (sizes | {"inner_size": heads * dim}).items()}
    if shape.architecture == "granitehybrid":
        found["attention.head_count_kv"] = (
            [shape.n_head_kv * shape.attends(i) for i in range(shape.n_layer)],
            "ARRAY[INT32]",
        )
        found["expert_shared_feed_forward_length"] = shape.shared, "UINT32"
        found["rope.scaling.finetuned"] = False, "BOOL"
        scales = {"attention.scale": 0.0078125, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 6.0}
        found |= {key: (value, "FLOAT32") for key, value in scales.items()}
    if shape.kinds:
        found |= kinds_metadata(shape)
    if shape.delta:
        n_k, n_v, dim = shape.delta
        counts = {
            "conv_kernel": 4,
            "state_size": dim,
            "group_count": n_k,
            "time_step_rank": n_v,
            "inner_size": n_v * dim,
        }
        found |= {f"ssm.{key}": (value, "UINT32") for key, value in counts.items()}
        found["full_attention_interval"] = 4, "UINT32"
        found["rope.dimension_sections"] = np.array([11, 11, 10, 0], np.int32), "ARRAY[INT32]"
    return {f"{shape.architecture}.{key}": value for key, value in found.items()}


def kinds_metadata(shape: Shape) -> dict[str, tuple[Any, str]]:
    """The keys of architectures whose layers have a letter each, without the architecture's name."""
    of_layers = [shape.n_head_kv * shape.attends(i) for i in range(shape.n_layer)]
    found: dict[str, tuple[Any, str]] = {
        "attention.head_count_kv": (of_layers, "ARRAY[INT32]"),
        "vocab_size": (shape.n_vocab, "UINT32"),
    }
    if not shape.is_sparse:
        found |= {"shortconv.l_cache": (3, "UINT32"), "leading_dense_block_count": (shape.dense[0], "UINT32")}
        return found | {"feed_forward_length": (shape.dense[1], "UINT32"), "expert_gating_func": (2, "UINT32")}
    of_layers = [shape.n_ff * shape.has_experts(i) for i in range(shape.n_layer)]
    return found | {
        "feed_forward_length": (of_layers, "ARRAY[INT32]"),
        "attention.layer_norm_epsilon": (1e-5, "FLOAT32"),
        "rope.scaling.finetuned": (False, "BOOL"),
        "expert_shared_feed_forward_length": (shape.shared, "UINT32"),
        "expert_shared_count": (1, "UINT32"),
        "expert_weights_norm": (True, "BOOL"),
        "expert_weights_scale": (2.5, "FLOAT32"),
        "expert_group_count": (1, "UINT32"),
        "expert_group_used_count": (1, "UINT32"),
    }


def write_random_model(shape_name: str, mix: str, path: Path) -> list[Path]:
    """The file of a shape and a mix, whole under its name; the parts that were written."""
    shape = SHAPES[shape_name]
    return write_gguf(path, metadata(shape, f"Random {shape_name} {mix}"), tensors(shape, mix))


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", choices=MIXES)
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    for path in write_random_model(options.shape, options.mix, options.path):
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
