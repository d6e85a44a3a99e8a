"""Checkpoints of models that write by denoising, made of transformers models whose layers they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import save_byte_level, save_model
from test_models import transformers_model

MASK = 279
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": False}
_SMALL = {"vocab_size": 280, "num_hidden_layers": 2}
# name -> (transformers' class, what its configuration has besides SMALL)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada": ("Llama", {"rms_norm_eps": 1e-5}),
    "llada all heads, tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llada-moe": ("Qwen3Moe", _EXPERTS | {"head_dim": 16, "num_key_value_heads": 4}),
    "dream": ("Qwen2", {}),
}
_LLADA_KEYS = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
    "attention_layer_norm": False, "bias_for_layer_norm": False, "block_type": "llama", "embedding_size": 280,
    "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
    "rope": True, "rope_full_precision": True, "scale_logits": False, "init_std": 0.02, "mlp_ratio": 4,
}  # fmt: skip
_LLADA_NAMES = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length", "tie_word_embeddings": "weight_tying",
}  # fmt: skip
_LLADA_TENSORS = (
    ("model.layers.", "model.transformer.blocks."),
    ("model.embed_tokens.", "model.transformer.wte."),
    ("model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ff_norm."),
    ("self_attn.o_proj.", "attn_out."),
    ("self_attn.", ""),
    ("mlp.gate_proj.", "ff_proj."),
    ("mlp.down_proj.", "ff_out."),
    ("mlp.", ""),
)
_KEPT = ("vocab_size", "rms_norm_eps", "rope_parameters", "eos_token_id", "pad_token_id", "mask_token_id")


def save_row(folder: Path, name: str) -> Any:
    """The checkpoint of a row of MODELS, with a tokenizer; the model as it is stored."""
    kind, options = MODELS[name]
    save_byte_level(folder)
    model = save_model(folder, transformers_model(kind, _SMALL | options))
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) | {"mask_token_id": MASK}
    if kind == "Llama":
        named = {new: config[old] for old, new in _LLADA_NAMES.items()}
        config = {key: config[key] for key in _KEPT if key in config} | named | _LLADA_KEYS
        _rename(folder / "model.safetensors", _LLADA_TENSORS)
    elif kind == "Qwen3Moe":
        named = {"expert_intermediate_size": config.pop("moe_intermediate_size"), "dense_intermediate_size": 96}
        config |= {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "qk_layernorm": True} | named
        config["moe_layer_freq"] = [1, 1]
        for key in ("decoder_sparse_step", "mlp_only_layers", "intermediate_size", "use_sliding_window"):
            config.pop(key, None)
    else:
        config |= {"architectures": ["DreamModel"], "model_type": "Dream", "use_mrope": False}
    file.write_text(json.dumps(config), "utf-8")
    return model


def _rename(file: Path, names: tuple[tuple[str, str], ...]) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")

    found = {}
    for stored, tensor in safetensors.load_file(file).items():
        for part, there in names:
            stored = stored.replace(part, there)
        found[stored] = np.ascontiguousarray(tensor)
    safetensors.save_file(found, file)


def both_ways(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits (n, n_vocab) of transformers where every token sees all of them."""
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        mask = torch.zeros(1, 1, len(tokens), len(tokens))
        return model(torch.tensor([tokens]), attention_mask=mask).logits[0].float().numpy()
