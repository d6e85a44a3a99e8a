"""Tiny drafts for tests that are files of their own: as GGUF, as checkpoints, and what they compute in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import add_value, pair_neighbours, tiny_vocabulary

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM = 64, 96, 4, 2, 16
EPS, BASE = 1e-5, 10000.0
SIZES: dict[str, Any] = {
    "n_embd": N_EMBD, "n_ff": 64, "n_head": N_HEAD, "n_head_kv": N_HEAD_KV, "head_dim": HEAD_DIM, "n_layer": 5,
}  # fmt: skip
"""Of the model that they draft for."""
EAGLE_LAYERS, FLASH_LAYERS, BLOCK = (1, 2, 4), (2, 5), 6
N_VOCAB = len(tiny_vocabulary()[0])
MASK = 1

LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "hidden_norm.weight": "attn_norm_2.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


AROUND = {
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_norm.weight": "enc.output_norm.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "embed_tokens.weight": "token_embd.weight",
}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def numbers(shape: tuple[int, ...]) -> np.ndarray:
        found = rng.standard_normal(shape)
        return (found / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * found).astype(np.float32)

    return {name: numbers(shape) for name, shape in shapes.items()}


def layer_shapes(n_in: int) -> dict[str, tuple[int, ...]]:
    """Of a layer whose attention reads rows of ``n_in``."""
    q, kv = N_HEAD * HEAD_DIM, N_HEAD_KV * HEAD_DIM
    return {
        "self_attn.q_proj.weight": (q, n_in),
        "self_attn.k_proj.weight": (kv, n_in),
        "self_attn.v_proj.weight": (kv, n_in),
        "self_attn.o_proj.weight": (N_EMBD, q),
        "input_layernorm.weight": (N_EMBD,),
        "post_attention_layernorm.weight": (N_EMBD,),
        "mlp.gate_proj.weight": (N_FF, N_EMBD),
        "mlp.up_proj.weight": (N_FF, N_EMBD),
        "mlp.down_proj.weight": (N_EMBD, N_FF),
    }


def eagle_tensors(ids: Sequence[int] | None, *, norm_before_fc: bool = False, seed: int = 3) -> dict[str, np.ndarray]:
    """As EAGLE's and SpecForge's trainers save them; ``ids`` are the model's of the draft's own."""
    shapes = {f"midlayer.{name}": shape for name, shape in layer_shapes(2 * N_EMBD).items()}
    shapes |= {"midlayer.hidden_norm.weight": (N_EMBD,), "norm.weight": (N_EMBD,), "fc.weight": (N_EMBD, 3 * N_EMBD)}
    shapes |= {"input_norm.weight": (3 * N_EMBD,)} if norm_before_fc else {}
    shapes["lm_head.weight"] = (N_VOCAB if ids is None else len(ids), N_EMBD)
    found = random_tensors(shapes, seed)
    if ids is not None:
        back = np.zeros(N_VOCAB, bool)
        back[list(ids)] = True
        found |= {"d2t": np.array(ids, np.int64) - np.arange(len(ids)), "t2d": back}
    return found


def flash_tensors(seed: int = 4, n_layer: int = 2) -> dict[str, np.ndarray]:
    """As z-lab's are saved: neither embedding nor head."""
    heads = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{i}.{name}": shape for i in range(n_layer) for name, shape in (layer_shapes(N_EMBD) | heads).items()
    }
    shapes |= {"fc.weight": (N_EMBD, len(FLASH_LAYERS) * N_EMBD), "hidden_norm.weight": (N_EMBD,)}
    return random_tensors(shapes | {"norm.weight": (N_EMBD,)}, seed)


def config_of(kind: str, **more: Any) -> dict[str, Any]:
    """The config.json of one of these."""
    own: dict[str, dict[str, Any]] = {
        "eagle3": {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
        | {"draft_vocab_size": 8},
        "dflash": {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2}
        | {"block_size": BLOCK, "num_target_layers": 5}
        | {"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [i - 1 for i in FLASH_LAYERS]}},
    }
    sizes = {"hidden_size": N_EMBD, "intermediate_size": N_FF, "num_attention_heads": N_HEAD, "head_dim": HEAD_DIM}
    sizes |= {"num_key_value_heads": N_HEAD_KV, "rms_norm_eps": EPS, "rope_theta": BASE, "hidden_act": "silu"}
    sizes |= {"max_position_embeddings": 256, "vocab_size": N_VOCAB, "tie_word_embeddings": False}
    return own[kind] | sizes | {"torch_dtype": "float32"} | more


def write_draft(
    path: Path, kind: str, tensors: dict[str, np.ndarray], metadata: dict[str, Any] | None = None, **leave_out: Any
) -> Path:
    """The GGUF file of such tensors, written with the ``gguf`` package as llama.cpp's converter names them."""
    tokens, types, merges = tiny_vocabulary()
    keys: dict[str, Any] = {
        "block_count": 1 if kind == "eagle3" else 2, "context_length": 256, "embedding_length": N_EMBD,
        "feed_forward_length": N_FF, "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD_KV,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "rope.freq_base": BASE,
        "attention.layer_norm_rms_epsilon": EPS, "vocab_size": len(tokens), "rope.dimension_count": HEAD_DIM,
        "target_layers": list(EAGLE_LAYERS if kind == "eagle3" else FLASH_LAYERS),
    }  # fmt: skip
    keys |= {"target_hidden_size": N_EMBD} if kind == "eagle3" else {"block_size": BLOCK}
    whole = {f"{kind}.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    if kind == "dflash":
        whole["tokenizer.ggml.mask_token_id"] = MASK
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (whole | (metadata or {})).items():
        if value is not None:
            add_value(writer, key, value)
    for name, array in tensors.items():
        stored = gguf_name(name)
        if name == "d2t":
            array = array + np.arange(len(array))
        elif name == "t2d":
            continue
        elif kind == "eagle3" and "attn_q." in stored:
            array = pair_neighbours(array, N_HEAD)
        elif kind == "eagle3" and "attn_k." in stored:
            array = pair_neighbours(array, N_HEAD_KV)
        writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a checkpoint."""
    if name in AROUND:
        return AROUND[name]
    layer, _, rest = name.replace("midlayer.", "layers.0.").removeprefix("layers.").partition(".")
    return f"blk.{layer}.{LAYER[rest]}" if rest in LAYER else name


# ---- in plain numpy --------------------------------------------------------------------------------------------------


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Heads (n, n_heads, HEAD_DIM), whose rotated pairs are half a head apart."""
    angles = positions[:, None] * BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))
    half = HEAD_DIM // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


def heads(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (x @ weight.T).reshape(len(x), -1, HEAD_DIM)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    k, v = (np.repeat(x, N_HEAD // N_HEAD_KV, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", shares, v).reshape(len(q), -1)


def fused(t: dict[str, np.ndarray], inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Features of rows that layers read: [low | middle | high] F^T."""
    rows = np.concatenate(inputs, axis=1)
    return (normed(rows, t["input_norm.weight"]) if "input_norm.weight" in t else rows) @ t["fc.weight"].T


def eagle_logits(
    t: dict[str, np.ndarray], embeddings: np.ndarray, states: np.ndarray, *, norm_before_residual: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind the last row, and the state to go on from."""
    g = normed(states, t["midlayer.hidden_norm.weight"])
    h = np.concatenate([normed(embeddings, t["midlayer.input_layernorm.weight"]), g], axis=1)
    positions = np.arange(len(h))
    q, k, v = (heads(h, t[f"midlayer.self_attn.{x}_proj.weight"]) for x in "qkv")
    seen = positions[:, None] >= positions
    found = attend(turned(q, positions), turned(k, positions), v, seen)
    x = (g if norm_before_residual else states) + found @ t["midlayer.self_attn.o_proj.weight"].T
    x = x + mlp(t, "midlayer.", x)
    return normed(x[-1:], t["norm.weight"])[0] @ t["lm_head.weight"].T, x[-1]


def mlp(t: dict[str, np.ndarray], of: str, x: np.ndarray) -> np.ndarray:
    h = normed(x, t[f"{of}post_attention_layernorm.weight"])
    gate, up = (h @ t[f"{of}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (silu(gate) * up) @ t[f"{of}mlp.down_proj.weight"].T


def flash_logits(t: dict[str, np.ndarray], rows: np.ndarray, embeddings: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Logits of all tokens of a block with these embeddings, behind tokens whose layers' inputs are in ``rows``."""
    context, x = normed(rows @ t["fc.weight"].T, t["hidden_norm.weight"]), embeddings
    n = len(context)
    positions = np.arange(n + len(x))
    for i in range(2):
        of = f"layers.{i}."
        h = normed(x, t[f"{of}input_layernorm.weight"])
        q = normed(heads(h, t[f"{of}self_attn.q_proj.weight"]), t[f"{of}self_attn.q_norm.weight"])
        both = np.concatenate([context, h])
        k = normed(heads(both, t[f"{of}self_attn.k_proj.weight"]), t[f"{of}self_attn.k_norm.weight"])
        v = heads(both, t[f"{of}self_attn.v_proj.weight"])
        found = attend(turned(q, positions[n:]), turned(k, positions), v, np.ones((len(x), len(positions)), bool))
        x = x + found @ t[f"{of}self_attn.o_proj.weight"].T
        x = x + mlp(t, of, x)
    return normed(x, t["norm.weight"]) @ head.T
