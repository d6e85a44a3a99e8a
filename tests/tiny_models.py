"""Tiny GGUF models for tests: complete random ones, and those that carry the weights of a transformers model.

    write_tiny_model(path, "llama", quant="Q4_K")     two layers, a byte-level BPE tokenizer, a chat template
    write_transformers_model(path, model)             a random LlamaForCausalLM ... as llama.cpp's converter writes it

Both write with the ``gguf`` package, so a test that reads them judges our reader too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import decoder_models
import gguf
import numpy as np
import state_space_models as spaces

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
N_EXPERT = 5
OWN_INPUT = 256
"""Columns that each layer of a Gemma 4 takes of a token's row in the second table."""
HYBRIDS = ("qwen35", "qwen35moe", "qwen3next")
"""Whose every other layer is a delta-net, here."""
EXPERTS = (
    "qwen2moe",
    "qwen3moe",
    "olmoe",
    "granitemoe",
    "granitehybrid",
    "gpt-oss",
    "qwen35moe",
    "qwen3next",
    "gemma4",
)
EXPERTS += decoder_models.WITH_EXPERTS
"""Architectures whose layers have experts."""
MERGES = "Ġ t|h e|Ġt he|i n|e r|a n|Ġ a|o n|r e|Ġ w|o r|l l|Ġ Ġ|in g|an d|Ġ and"

# bytes where the block keeps its scale, and the multiple of it that centres the values (for the minimum)
SCALE_FIELDS: dict[str, list[tuple[slice, str, float]]] = {
    "Q2_K": [(slice(80, 82), "<f2", 1.0), (slice(82, 84), "<f2", 1.5)],
    "Q3_K": [(slice(108, 110), "<f2", 1.0)],
    "Q4_K": [(slice(0, 2), "<f2", 1.0), (slice(2, 4), "<f2", 7.5)],
    "Q5_K": [(slice(0, 2), "<f2", 1.0), (slice(2, 4), "<f2", 15.5)],
    "Q6_K": [(slice(208, 210), "<f2", 1.0)],
    "IQ1_S": [(slice(0, 2), "<f2", 1.0)],
    "IQ2_XXS": [(slice(0, 2), "<f2", 1.0)],
    "IQ2_XS": [(slice(0, 2), "<f2", 1.0)],
    "IQ2_S": [(slice(0, 2), "<f2", 1.0)],
    "IQ3_XXS": [(slice(0, 2), "<f2", 1.0)],
    "IQ3_S": [(slice(0, 2), "<f2", 1.0)],
    "IQ4_NL": [(slice(0, 2), "<f2", 1.0)],
    "IQ4_XS": [(slice(0, 2), "<f2", 1.0)],
}


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], quant: str) -> np.ndarray:
    """A random matrix of standard deviation 1/sqrt(n_in): float values, or uint8 blocks (..., row_nbytes)."""
    sigma = 1 / math.sqrt(shape[-1])
    qtype = gguf.GGMLQuantizationType[quant]
    if quant not in SCALE_FIELDS:
        return gguf.quants.quantize((rng.standard_normal(shape) * sigma).astype(np.float32), qtype)
    block_size, block_nbytes = gguf.GGML_QUANT_SIZES[qtype]
    n_blocks = math.prod(shape) // block_size
    blocks = rng.integers(0, 256, (n_blocks, block_nbytes), dtype=np.uint8)
    _set_scale(blocks, quant, 1.0)
    _set_scale(blocks, quant, sigma / float(np.std(gguf.quants.dequantize(blocks, qtype))))
    return blocks.reshape(*shape[:-1], -1)


def _set_scale(blocks: np.ndarray, quant: str, scale: float) -> None:
    for place, dtype, multiple in SCALE_FIELDS[quant]:
        blocks[:, place] = np.frombuffer(np.array([scale * multiple], dtype).tobytes(), np.uint8)


def write_tiny_model(
    path: Path,
    architecture: str = "llama",
    quant: str = "Q8_0",
    *,
    quants: dict[str, str] | None = None,
    n_layer: int = 2,
    n_embd: int = 256,
    n_ff: int = 256,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    context_length: int = 256,
    sliding_window: int = 32,
    tied: bool = True,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a complete random model: 276 tokens of byte-level BPE with ChatML, weights of the type ``quant``.

    quants     another type for tensors whose name ends so: {"attn_v.weight": "Q6_K", "token_embd.weight": "Q8_0"}
    metadata   keys to write besides or instead ({"llama.block_count": 0})
    leave_out  keys and tensors to omit; extra_tensors: float32 arrays to add
    """
    rng = np.random.default_rng(seed)
    tokens, token_types, merges = tiny_vocabulary()
    keys: dict[str, Any] = {
        "general.name": f"tiny {architecture}",
        f"{architecture}.block_count": n_layer,
        f"{architecture}.context_length": context_length,
        f"{architecture}.embedding_length": n_embd,
        f"{architecture}.feed_forward_length": n_ff,
        f"{architecture}.attention.head_count": n_head,
        f"{architecture}.attention.head_count_kv": n_head_kv,
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": token_types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    if architecture in ("lfm2", "lfm2moe"):  # every layer but each third is a convolution
        keys[f"{architecture}.attention.head_count_kv"] = [n_head_kv if i % 3 == 1 else 0 for i in range(n_layer)]
        keys["lfm2.shortconv.l_cache"] = 3
    if architecture in spaces.STATE_SPACES:
        sizes = spaces.state_keys(architecture, 2 * n_embd, n_layer, n_head_kv, n_ff)
        keys |= {f"{architecture}.{key}": value for key, value in sizes.items()}
    if architecture in EXPERTS:
        keys |= {f"{architecture}.expert_count": N_EXPERT, f"{architecture}.expert_used_count": 2}
    if architecture in HYBRIDS:  # every other layer is attention
        sizes = delta_keys(2, 4, head_dim, 4) | {
            "full_attention_interval": 2,
            "rope.dimension_count": head_dim // 4 * 2,
        }
        keys |= {f"{architecture}.{key}": value for key, value in sizes.items()}
    if architecture in ("qwen2moe", "qwen3moe", "gpt-oss", "qwen35moe", "qwen3next", "gemma4"):
        keys[f"{architecture}.expert_feed_forward_length"] = n_ff
    if architecture in ("qwen2moe", "granitemoe", "granitehybrid", "qwen35moe", "qwen3next"):
        keys[f"{architecture}.expert_shared_feed_forward_length"] = 2 * n_ff
    if architecture.startswith("granite"):
        scales = {"attention.scale": 0.1, "embedding_scale": 6.0, "residual_scale": 0.3, "logit_scale": 2.5}
        keys |= {f"{architecture}.{key}": value for key, value in scales.items()}
    if architecture in ("gemma2", "gemma3", "gpt-oss", "gemma4"):
        keys[f"{architecture}.attention.sliding_window"] = sliding_window
    if architecture == "gemma3":
        keys["gemma3.attention.sliding_window_pattern"] = 2
    if architecture == "gemma2":
        keys |= {"gemma2.attn_logit_softcapping": 5.0, "gemma2.final_logit_softcapping": 3.0}
    if architecture == "gemma4":  # every other layer slides, those after the second read what the first two keep
        wide = dict.fromkeys(("attention.key_length", "attention.value_length"), 2 * head_dim)
        near = dict.fromkeys(("attention.key_length_swa", "attention.value_length_swa"), head_dim)
        sizes = wide | near | {"attention.sliding_window_pattern": [i % 2 == 0 for i in range(n_layer)]}
        sizes |= {"attention.shared_kv_layers": max(n_layer - 2, 0), "embedding_length_per_layer_input": OWN_INPUT}
        sizes |= {"feed_forward_length": [n_ff * (1 + (i >= 2)) for i in range(n_layer)]}
        keys |= {f"gemma4.{key}": value for key, value in (sizes | {"final_logit_softcapping": 3.0}).items()}
    keys |= decoder_models.tiny_keys(architecture, n_layer, head_dim, n_ff, sliding_window)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (keys | (metadata or {})).items():
        if key not in leave_out and value is not None:
            add_value(writer, key, value)
    shapes = tensor_shapes(
        architecture, len(tokens), n_layer, n_embd, n_ff, n_head * head_dim, n_head_kv * head_dim, head_dim, tied
    )
    for name, shape in shapes.items():
        if name in leave_out:
            continue
        if (numbers := spaces.fill(architecture, name, shape, rng)) is not None:
            writer.add_tensor(name, numbers)
            continue
        if len(shape) == 1:
            centre = {"bias": 0.0, "ssm_a": -1.0}.get(name.rpartition(".")[2], 1.0)
            # scores of these are not scaled: their norms are as small as is good for them
            unscaled = architecture in ("gemma3n", "gemma4") and name.endswith("attn_q_norm.weight")
            size = head_dim**-0.5 if unscaled else 1.0
            writer.add_tensor(name, (size * (centre + 0.1 * rng.standard_normal(shape))).astype(np.float32))
            continue
        kind = next((q for suffix, q in (quants or {}).items() if name.endswith(suffix)), quant)
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        kind = "F32" if name.endswith(("conv.weight", "conv1d.weight", ".bias")) or shape[-1] % block else kind
        writer.add_tensor(
            name,
            random_weight(rng, shape, kind),
            raw_dtype=None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind],
        )
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    _write(writer)
    return Path(path)


def tensor_shapes(
    architecture: str,
    n_vocab: int,
    n_layer: int,
    n_embd: int,
    n_ff: int,
    n_q: int,
    n_kv: int,
    head_dim: int,
    tied: bool,
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by name."""
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_q, n_embd),
        "attn_k.weight": (n_kv, n_embd),
        "attn_v.weight": (n_kv, n_embd),
        "attn_output.weight": (n_embd, n_q),
        "ffn_norm.weight": (n_embd,),
        "ffn_gate.weight": (n_ff, n_embd),
        "ffn_up.weight": (n_ff, n_embd),
        "ffn_down.weight": (n_embd, n_ff),
    }
    if architecture in ("qwen2", "qwen2moe", "gpt-oss"):
        layer |= {"attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
    if architecture in ("qwen3", "qwen3moe", "gemma3", "lfm2"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if architecture == "olmoe":
        layer |= {"attn_q_norm.weight": (n_q,), "attn_k_norm.weight": (n_kv,)}
    if architecture in EXPERTS and architecture != "gemma4":
        layer |= {"ffn_gate_inp.weight": (N_EXPERT, n_embd)}
        for name in ("gate", "up", "down"):
            layer[f"ffn_{name}_exps.weight"] = (N_EXPERT, *layer.pop(f"ffn_{name}.weight"))
    if architecture in ("qwen2moe", "granitemoe", "granitehybrid", "qwen35moe", "qwen3next"):
        for name in ("gate", "up", "down"):
            shape = (n_embd, 2 * n_ff) if name == "down" else (2 * n_ff, n_embd)
            layer[f"ffn_{name}_shexp.weight"] = shape
    if architecture in ("qwen2moe", "qwen35moe", "qwen3next"):
        layer |= {"ffn_gate_inp_shexp.weight": (n_embd,)}
    if architecture in HYBRIDS:
        layer["post_attention_norm.weight"] = layer.pop("ffn_norm.weight")
        layer |= {"attn_q.weight": (2 * n_q, n_embd), "attn_q_norm.weight": (head_dim,)}
        layer |= {"attn_k_norm.weight": (head_dim,)}
    if architecture == "gpt-oss":
        layer["post_attention_norm.weight"] = layer.pop("ffn_norm.weight")
        layer |= {"attn_output.bias": (n_embd,), "attn_sinks.weight": (n_q // head_dim,)}
        layer |= {"ffn_gate_inp.bias": (N_EXPERT,), "ffn_down_exps.bias": (N_EXPERT, n_embd)}
        layer |= {f"ffn_{name}_exps.bias": (N_EXPERT, n_ff) for name in ("gate", "up")}
    if architecture in ("gemma2", "gemma3"):
        layer |= {"post_attention_norm.weight": (n_embd,), "post_ffw_norm.weight": (n_embd,)}
    layer = decoder_models.tiny_layer(architecture, layer, n_embd, n_ff, head_dim)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, n_embd)}
    conv = {
        "shortconv.in_proj.weight": (3 * n_embd, n_embd),
        "shortconv.conv.weight": (n_embd, 3),
        "shortconv.out_proj.weight": (n_embd, n_embd),
    }
    if architecture in HYBRIDS:  # two key heads, four value heads
        conv = {
            "attn_qkv.weight": (8 * head_dim, n_embd),
            "attn_gate.weight": (4 * head_dim, n_embd),
            "ssm_alpha.weight": (4, n_embd),
            "ssm_beta.weight": (4, n_embd),
            "ssm_conv1d.weight": (8 * head_dim, 4),
            "ssm_a": (4,),
            "ssm_dt.bias": (4,),
            "ssm_norm.weight": (head_dim,),
            "ssm_out.weight": (n_embd, 4 * head_dim),
        }
        if architecture == "qwen3next":
            del conv["ssm_alpha.weight"], conv["ssm_beta.weight"]
            conv["ssm_ba.weight"] = (8, n_embd)
    if architecture == "gemma4":
        return shapes | gemma4_shapes(n_vocab, n_layer, n_embd, n_ff, n_q, n_kv, head_dim, tied)
    for i in range(n_layer):
        if architecture in spaces.STATE_SPACES:
            own = spaces.layer_shapes(architecture, i, layer, n_embd)
            shapes |= {f"blk.{i}.{name}": shape for name, shape in own.items()}
            continue
        convolves = (architecture in ("lfm2", "lfm2moe") and i % 3 != 1) or (architecture in HYBRIDS and i % 2 == 0)
        rest = {
            name: shape for name, shape in layer.items() if not name.startswith("attn_") or name == "attn_norm.weight"
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (rest | conv if convolves else layer).items()}
    shapes["token_embd_norm.weight" if architecture in ("lfm2", "lfm2moe") else "output_norm.weight"] = (n_embd,)
    if architecture == "starcoder2":
        shapes["output_norm.bias"] = (n_embd,)
    shapes = decoder_models.more.tiny_around(architecture, shapes, n_vocab, n_embd, 256)
    return shapes if tied else shapes | {"output.weight": (n_vocab, n_embd)}


def gemma4_shapes(
    n_vocab: int, n_layer: int, n_embd: int, n_ff: int, n_q: int, n_kv: int, head_dim: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Gemma 4 but the embedding, with all that one of the family may have."""
    whole = n_layer * OWN_INPUT
    shapes: dict[str, tuple[int, ...]] = {
        "output_norm.weight": (n_embd,),
        "rope_freqs.weight": (head_dim,),
        "per_layer_token_embd.weight": (n_vocab, whole),
        "per_layer_model_proj.weight": (whole, n_embd),
        "per_layer_proj_norm.weight": (OWN_INPUT,),
    }
    if n_layer == 1:  # it slides
        del shapes["rope_freqs.weight"]
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
    norms += ("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2")
    for i in range(n_layer):
        wide, shared = 1 + i % 2, i >= 2
        layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (n_embd,) for name in norms}
        layer |= {"attn_q.weight": (n_q * wide, n_embd), "attn_q_norm.weight": (head_dim * wide,)}
        if not shared:
            layer |= {"attn_k.weight": (n_kv * wide, n_embd), "attn_k_norm.weight": (head_dim * wide,)}
            layer |= {"attn_v.weight": (n_kv, n_embd)} if wide == 1 else {}
        layer |= {"attn_output.weight": (n_embd, n_q * wide), "layer_output_scale.weight": (1,)}
        layer |= {f"ffn_{name}.weight": (n_ff * (1 + shared), n_embd) for name in ("gate", "up")}
        layer |= {"ffn_down.weight": (n_embd, n_ff * (1 + shared))}
        layer |= {"inp_gate.weight": (OWN_INPUT, n_embd), "proj.weight": (n_embd, OWN_INPUT)}
        layer |= {"ffn_gate_inp.weight": (N_EXPERT, n_embd), "ffn_gate_inp.scale": (n_embd,)}
        layer |= {"ffn_gate_up_exps.weight": (N_EXPERT, 2 * n_ff, n_embd), "ffn_down_exps.scale": (N_EXPERT,)}
        layer |= {"ffn_down_exps.weight": (N_EXPERT, n_embd, n_ff)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes if tied else shapes | {"output.weight": (n_vocab, n_embd)}


def tiny_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges: three control tokens, 256 bytes, and what the merges make."""
    merges = MERGES.split("|")
    tokens = [*CONTROL_TOKENS, *byte_characters(), *(m.replace(" ", "") for m in merges)]
    tokens += [f"<|reserved_{i}|>" for i in range(-len(tokens) % 2)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    types = [int(control if t.startswith("<|") and t.endswith("|>") else normal) for t in tokens]
    return tokens, types, merges


def byte_characters() -> list[str]:
    """GPT-2's printable character for every byte: itself where it can be seen, else 256 and up in order."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [b for b in range(256) if b not in seen]
    return [chr(b) if b in seen else chr(256 + hidden.index(b)) for b in range(256)]


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a metadata value in the type that llama.cpp's converter uses for such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if 0 <= value < 1 << 32 else writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


ARCHITECTURE_OF = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "granitemoeshared": "granitemoe",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    **spaces.ARCHITECTURE_OF,
    **decoder_models.ARCHITECTURE_OF,
}
"""Kinds of transformers' settings that GGUF calls otherwise."""
PAIRED = ("llama", "granite", "granitemoe", "granitehybrid", *decoder_models.PAIRED)
"""Architectures whose rotated pairs are neighbours."""


def write_transformers_model(path: Path, model: Any, metadata: dict[str, Any] | None = None) -> Path:
    """Write a transformers model as F32 GGUF: names, order of rows and shifts as llama.cpp's converter has them."""
    config, tied = getattr(model.config, "text_config", model.config), model.config.tie_word_embeddings
    config.allow_global_per_layer_attribute_access = True  # where layers differ, gemma4_keys has them
    architecture = ARCHITECTURE_OF.get(config.model_type, config.model_type)
    if architecture == "nemotron_h" and "moe" in config.layers_block_type:
        architecture = "nemotron_h_moe"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_transformers_metadata(config, architecture) | (metadata or {})).items():
        add_value(writer, f"{architecture}.{key}", value)
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    apart = gemma4_tensors if architecture == "gemma4" else expert_matrices_apart
    tensors = dict(model.state_dict())
    if architecture in spaces.STATE_SPACES:
        for name, numbers in spaces.transformers_tensors(tensors, config, architecture).items():
            writer.add_tensor(name, numbers)
    for hf_name, tensor in apart(tensors, architecture == "gpt-oss").items():
        if (tied and hf_name == "lm_head.weight") or hf_name.startswith("model.visual."):
            continue
        hf_name = hf_name.replace("model.language_model.", "model.")
        hf_name = decoder_models.own_name(hf_name)
        named = hf_name.replace("linear_attn.dt_bias", "linear_attn.dt_proj.bias")
        name = names.get_name(named, try_suffixes=(".weight", ".bias"))
        name = name or {"lm_head.weight": "output.weight"}.get(hf_name)  # of an architecture that has none as a rule
        name = hf_name if hf_name.startswith("blk.") else name
        assert name is not None, hf_name
        name += ".weight" * name.endswith("attn_sinks")
        weight = tensor.float().numpy()
        if architecture in PAIRED and "attn_q." in name:
            weight = pair_neighbours(weight, config.num_attention_heads)
        if architecture in PAIRED and "attn_k." in name:
            weight = pair_neighbours(weight, config.num_key_value_heads)
        weight = decoder_models.own_rows(weight, name, config)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            weight = weight[0]
        if name.endswith("ssm_a"):
            weight = -np.exp(weight)
        if architecture.startswith("qwen35"):
            weight = with_tiled_heads(weight, name, config)
        shifted = architecture.startswith(("gemma", *HYBRIDS)) and architecture != "gemma4"
        if shifted and not name.endswith("ssm_norm.weight") and name.endswith("norm.weight"):
            weight = weight + 1
        if name.endswith(("shortconv.conv.weight", "ssm_conv1d.weight")):
            weight = weight[:, 0]
        named_rows = decoder_models.own_parts(name, weight, config) or qkv_and_z(weight, name, config)
        for part, rows in named_rows.items():
            writer.add_tensor(part, np.ascontiguousarray(rows))
    rope = getattr(config, "rope_parameters", None) or {}
    for name, numbers in decoder_models.own_tensors(config).items():
        writer.add_tensor(name, numbers)
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, _head_dim(config)))
    if architecture == "gemma4":
        wide, head_dim = rope["full_attention"], config.per_layer_config["full_attention"].head_dim
        turns = np.arange(head_dim // 2) < int(head_dim * wide.get("partial_rotary_factor", 1.0)) // 2
        writer.add_tensor("rope_freqs.weight", np.where(turns, wide.get("factor", 1.0), 1e30).astype(np.float32))
    _write(writer)
    return Path(path)


def expert_matrices_apart(tensors: dict[str, Any], transposed: bool) -> dict[str, Any]:
    """The tensors of a model with gate and up of its experts as two, named as a module is.

    transposed   matrices of experts are (n_in, n_out), and gate and up alternate
    """
    apart = {}
    for stored, tensor in tensors.items():
        name = stored.replace("block_sparse_moe.experts.", "mlp.experts.").replace(
            "moe.router.weight", "moe.router.layer.weight"
        )
        if "experts." in name and "blk" not in name and tensor.dim() > 1 and transposed:
            alternate, kind = name.endswith(("gate_up_proj", "gate_up_proj_bias")), ".bias" * name.endswith("_bias")
            rows = tensor if kind else tensor.transpose(1, 2)
            base = name.removesuffix("_bias") + (kind or ".weight")
            cuts = {base.replace("gate_up", one): rows[:, i::2] for i, one in enumerate(("gate", "up"))}
            apart |= cuts if alternate else {base: rows}
        elif name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            apart |= {name.replace("gate_up", kind) + ".weight": one for kind, one in (("gate", gate), ("up", up))}
        elif name.endswith("shared_mlp.input_linear.weight"):
            base = name.replace("shared_mlp.input_linear.weight", "mlp.shared_expert.")
            apart |= {
                f"{base}{kind}_proj.weight": one for kind, one in zip(("gate", "up"), tensor.chunk(2), strict=True)
            }
        else:
            apart[name + ".weight" * name.endswith("experts.down_proj")] = tensor
    return apart


def gemma4_tensors(tensors: dict[str, Any], transposed: bool) -> dict[str, Any]:
    """The tensors of a Gemma 4 named as modules are; what stands beside a matrix has its GGUF name."""
    named = {}
    for name, tensor in tensors.items():
        blk = "blk." + name.removeprefix("model.layers.").partition(".")[0]
        beside = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
        kind = next((kind for kind in beside if name.endswith(kind)), None)
        bare = name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj"))
        named[f"{blk}.{beside[kind]}" if kind else name + ".weight" * bare] = tensor
    return named


def with_tiled_heads(weight: np.ndarray, name: str, config: Any) -> np.ndarray:
    """The value heads of a delta-net, in groups by key head, one of each group after the other."""
    n_k, n_v, dim = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim

    def tiled(rows: np.ndarray) -> np.ndarray:
        groups = rows.reshape(n_k, n_v // n_k, len(rows) // n_v, *rows.shape[1:])
        return groups.swapaxes(0, 1).reshape(rows.shape)

    kind = name.split(".", 2)[-1]
    if kind in ("attn_qkv.weight", "ssm_conv1d.weight"):
        return np.concatenate([weight[: 2 * n_k * dim], tiled(weight[2 * n_k * dim :])])
    if kind in ("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"):
        return tiled(weight)
    return tiled(weight.T).T if kind == "ssm_out.weight" else weight


def qkv_and_z(weight: np.ndarray, name: str, config: Any) -> dict[str, np.ndarray]:
    """Of rows that are [q | k | v | z] by key head the two matrices that files have; any other as it is."""
    if not name.endswith("ssm_in.weight"):
        return {name: weight}
    n_k, dim = config.linear_num_key_heads, config.linear_value_head_dim
    n_values = config.linear_num_value_heads // n_k * dim
    heads = weight.reshape(n_k, 2 * dim + 2 * n_values, -1)
    *qkv, z = np.split(heads, np.cumsum([dim, dim, n_values]), axis=1)
    flat = [part.reshape(-1, weight.shape[1]) for part in qkv]
    blk = name.removesuffix("ssm_in.weight")
    return {f"{blk}attn_qkv.weight": np.concatenate(flat), f"{blk}attn_gate.weight": z.reshape(-1, weight.shape[1])}


def pair_neighbours(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder the rows of every head so that rotated pairs, half a head apart in transformers, are neighbours."""
    heads = weight.reshape(n_head, 2, weight.shape[0] // n_head // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """The tensor rope_freqs.weight: what every frequency is divided by, from Llama 3.1's four numbers."""
    old_length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((old_length / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _transformers_metadata(config: Any, architecture: str) -> dict[str, Any]:
    if architecture in ("mamba2", *spaces.NEMOTRONS):
        return spaces.transformers_keys(config, architecture)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.moe_intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(
            getattr(config, "norm_eps", 0) or getattr(config, "rms_norm_eps", 1e-5)
        ),
        "vocab_size": config.vocab_size,
    }
    if _head_dim(config) * config.num_attention_heads != config.hidden_size or architecture in (
        "qwen3",
        "qwen3moe",
        "gpt-oss",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "gemma",
        "gemma2",
        "gemma3",
    ):
        keys |= {"attention.key_length": _head_dim(config), "attention.value_length": _head_dim(config)}
    if n_experts := getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0):
        n_used = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
        keys |= {"expert_count": n_experts, "expert_used_count": n_used}
    named = {
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "shared_intermediate_size": "expert_shared_feed_forward_length",
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    keys |= {key: getattr(config, name) for name, key in named.items() if getattr(config, name, None) is not None}
    if architecture in HYBRIDS:
        keys |= delta_keys(
            config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim,
            config.linear_conv_kernel_dim,
        )  # fmt: skip
        keys["attention.recurrent_layers"] = [kind == "linear_attention" for kind in config.layer_types]
        keys["rope.dimension_count"] = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    if architecture in spaces.STATE_SPACES:
        keys |= spaces.transformers_keys(config, architecture)
        keys.pop("embedding_scale" if architecture == "falcon-h1" else "", None)  # which is in its weights
    if architecture == "gpt-oss":
        keys["expert_feed_forward_length"] = config.intermediate_size
    rope = config.rope_parameters
    if architecture == "lfm2":
        keys["attention.head_count_kv"] = [config.num_key_value_heads * (kind != "conv") for kind in config.layer_types]
        keys["shortconv.l_cache"] = config.conv_L_cache
        if config.block_auto_adjust_ff_dim:
            n_ff, multiple = int(2 * config.intermediate_size / 3), config.block_multiple_of
            keys["feed_forward_length"] = multiple * ((n_ff + multiple - 1) // multiple)
    if architecture == "gemma4":
        keys |= gemma4_keys(config)
    if architecture in ("gemma3", "gemma4"):
        keys["attention.sliding_window"] = config.sliding_window
        keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        keys["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    elif config.model_type in ("mistral", "mixtral", "gemma2", "gpt_oss") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    rope = rope.get("full_attention", rope)
    keys["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name):
                keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
    return keys | decoder_models.own_keys(config, architecture)


def gemma4_keys(config: Any) -> dict[str, Any]:
    """The sizes of the layers of a Gemma 4."""
    head_dim = config.per_layer_config["full_attention"].head_dim
    n_layer, shared = config.num_hidden_layers, config.num_kv_shared_layers
    wider = [1 + (config.use_double_wide_mlp and i >= n_layer - shared) for i in range(n_layer)]
    return {
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim),
        **{f"attention.{x}_length_swa": config.head_dim for x in ("key", "value")},
        "rope.dimension_count_swa": config.head_dim,
        "attention.head_count_kv": [config.per_layer_config[i].num_key_value_heads for i in range(n_layer)],
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "feed_forward_length": [config.intermediate_size * n for n in wider],
    }


def delta_keys(n_k: int, n_v: int, head_dim: int, n_taps: int) -> dict[str, Any]:
    """The sizes of a delta-net."""
    return {
        "ssm.conv_kernel": n_taps,
        "ssm.state_size": head_dim,
        "ssm.group_count": n_k,
        "ssm.time_step_rank": n_v,
        "ssm.inner_size": n_v * head_dim,
        "rope.dimension_sections": [11, 11, 10, 0],
    }


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
