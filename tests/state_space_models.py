"""What tiny_models.py needs to know of Mamba-2 and its hybrids: keys, tensors, and those of transformers' models."""

from __future__ import annotations

from typing import Any

import numpy as np

NEMOTRONS = ("nemotron_h", "nemotron_h_moe")
STATE_SPACES = ("mamba2", "granitehybrid", "falcon-h1", *NEMOTRONS)
"""Architectures with such layers: of Granite's each third is attention, of Falcon-H1's all have both; Nemotron's are
states, feed-forwards and attention in turn."""
N_EXPERT = 5
N_HEADS, N_GROUPS, N_STATE, N_TAPS = 8, 2, 24, 4
"""Of the states in tiny models."""
LATENT = 256
"""Columns that the experts of a tiny Nemotron work on."""
ARCHITECTURE_OF = {"granitemoehybrid": "granitehybrid", "falcon_h1": "falcon-h1"}
MIXERS = (".mamba.", ".mixer.")


def state_keys(architecture: str, n_inner: int, n_layer: int, n_head_kv: int, n_ff: int) -> dict[str, Any]:
    """The keys of a tiny model."""
    sizes = (N_TAPS, N_STATE, N_GROUPS, N_HEADS, n_inner)
    keys: dict[str, Any] = ssm_keys(*sizes)
    if architecture == "granitehybrid":
        keys["attention.head_count_kv"] = [n_head_kv * (i % 3 == 1) for i in range(n_layer)]
    if architecture == "mamba2":
        keys |= {"attention.head_count": 0, "feed_forward_length": 0}
    if architecture in NEMOTRONS:
        keys["attention.head_count_kv"] = [n_head_kv * (i % 3 == 2) for i in range(n_layer)]
        keys["feed_forward_length"] = [n_ff * (i % 3 == 1) for i in range(n_layer)]
        keys["attention.layer_norm_epsilon"] = 1e-5
    if architecture == "nemotron_h_moe":
        keys |= {"expert_count": N_EXPERT, "expert_used_count": 2, "expert_feed_forward_length": n_ff}
        keys |= {"expert_shared_feed_forward_length": 2 * n_ff, "moe_latent_size": LATENT}
        keys |= {"expert_weights_norm": True, "expert_weights_scale": 2.5}
    return keys


def ssm_keys(n_taps: int, n_state: int, n_groups: int, n_heads: int, n_inner: int) -> dict[str, int]:
    """The sizes of the states."""
    names = ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size")
    values = (n_taps, n_state, n_groups, n_heads, n_inner)
    return {f"ssm.{name}": value for name, value in zip(names, values, strict=True)}


def state_shapes(n_embd: int, *, normed: bool = True) -> dict[str, tuple[int, ...]]:
    """The tensors of a Mamba-2 layer of a tiny model."""
    n_inner = 2 * n_embd
    n_conv = n_inner + 2 * N_GROUPS * N_STATE
    found: dict[str, tuple[int, ...]] = {
        "ssm_in.weight": (n_inner + n_conv + N_HEADS, n_embd),
        "ssm_conv1d.weight": (n_conv, N_TAPS),
        "ssm_conv1d.bias": (n_conv,),
        "ssm_dt.bias": (N_HEADS,),
        "ssm_a": (N_HEADS, 1),
        "ssm_d": (N_HEADS, 1),
        "ssm_norm.weight": (N_GROUPS, n_inner // N_GROUPS),
        "ssm_out.weight": (n_embd, n_inner),
    }
    return found if normed else {name: shape for name, shape in found.items() if name != "ssm_norm.weight"}


def layer_shapes(
    architecture: str, i: int, layer: dict[str, tuple[int, ...]], n_embd: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of layer i of a tiny model, of which a decoder has ``layer``."""
    if architecture == "mamba2":
        return {"attn_norm.weight": (n_embd,)} | state_shapes(n_embd)
    if architecture == "falcon-h1":
        layer = {name.replace("ffn_norm.weight", "ffn_norm"): shape for name, shape in layer.items()}
        return layer | state_shapes(n_embd, normed=False)
    if architecture in NEMOTRONS:
        return nemotron_shapes(architecture, i, layer, n_embd)
    if i % 3 == 1:
        return layer
    attention = ("attn_q", "attn_k", "attn_v", "attn_output")
    return {name: shape for name, shape in layer.items() if not name.startswith(attention)} | state_shapes(n_embd)


def nemotron_shapes(
    architecture: str, i: int, layer: dict[str, tuple[int, ...]], n_embd: int
) -> dict[str, tuple[int, ...]]:
    """Those of a Nemotron-H."""
    norm: dict[str, tuple[int, ...]] = {"attn_norm.weight": (n_embd,)}
    if i % 3 == 0:
        return norm | state_shapes(n_embd)
    if i % 3 == 2:
        return {name: shape for name, shape in layer.items() if name.startswith("attn_")}
    n_ff = layer["ffn_up.weight"][0]
    if architecture == "nemotron_h":
        return norm | {"ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)}
    return norm | {
        "ffn_gate_inp.weight": (N_EXPERT, n_embd),
        "exp_probs_b.bias": (N_EXPERT,),
        "ffn_latent_down.weight": (LATENT, n_embd),
        "ffn_latent_up.weight": (n_embd, LATENT),
        "ffn_up_exps.weight": (N_EXPERT, n_ff, LATENT),
        "ffn_down_exps.weight": (N_EXPERT, LATENT, n_ff),
        "ffn_up_shexp.weight": (2 * n_ff, n_embd),
        "ffn_down_shexp.weight": (n_embd, 2 * n_ff),
    }


def fill(architecture: str, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
    """Numbers of a tensor that is no matrix, though it may look like one; None for any other."""
    if architecture == "falcon-h1" and name.endswith("ssm_conv1d.weight"):
        # no norm keeps the state in bounds, which grows as the cube of these: it would drown the attention beside it
        return (rng.standard_normal(shape) / 8).astype(np.float32)
    centre = {"ssm_a": -1.0, "ssm_d": 1.0, "ssm_norm.weight": 1.0, "ffn_norm": 1.0}.get(name.split(".", 2)[-1])
    if centre is None or (len(shape) == 1 and not name.endswith("ffn_norm")):
        return None
    return (centre + 0.1 * rng.standard_normal(shape)).astype(np.float32)


# ---- transformers' models --------------------------------------------------------------------------------------------


def transformers_keys(config: Any, architecture: str) -> dict[str, Any]:
    """What the sizes are called in transformers' settings, as the keys of a file; not those that all decoders have."""
    if architecture == "mamba2":
        inner = config.num_heads * config.head_dim
        sizes = ssm_keys(config.conv_kernel, config.state_size, config.n_groups, config.num_heads, inner)
        return sizes | {
            "block_count": config.num_hidden_layers,
            "context_length": 1 << 20,
            "embedding_length": config.hidden_size,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
            "vocab_size": config.vocab_size,
        }
    if architecture in NEMOTRONS:
        return nemotron_keys(config, architecture)
    inner = config.mamba_n_heads * config.mamba_d_head
    keys: dict[str, Any] = ssm_keys(
        config.mamba_d_conv, config.mamba_d_state, config.mamba_n_groups, config.mamba_n_heads, inner
    )
    if architecture == "granitehybrid":
        attends = [kind == "full_attention" for kind in config.layer_types]
        keys["attention.head_count_kv"] = [config.num_key_value_heads * one for one in attends]
        keys["rope.scaling.finetuned"] = config.position_embedding_type == "rope"
        if not config.num_local_experts:
            keys["feed_forward_length"] = config.shared_intermediate_size
    return keys


def nemotron_keys(config: Any, architecture: str) -> dict[str, Any]:
    """All keys of a Nemotron-H."""
    inner, kinds = config.mamba_num_heads * config.mamba_head_dim, config.layers_block_type
    n_ff = config.intermediate_size
    if architecture == "nemotron_h_moe":  # as the first files have it: without a key of the experts' own
        n_ff = config.moe_intermediate_size * config.num_experts_per_tok
    sizes = ssm_keys(config.conv_kernel, config.ssm_state_size, config.n_groups, config.mamba_num_heads, inner)
    keys = sizes | {
        "block_count": len(kinds),
        "context_length": 1 << 20,
        "embedding_length": config.hidden_size,
        "feed_forward_length": [n_ff * (kind in ("mlp", "moe")) for kind in kinds],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads * (kind == "full_attention") for kind in kinds],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "vocab_size": config.vocab_size,
    }
    if architecture == "nemotron_h_moe":
        keys |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok}
        keys |= {"expert_weights_norm": config.norm_topk_prob}
        keys |= {"expert_weights_scale": float(config.routed_scaling_factor)}
        keys |= {"expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size}
        keys |= {"moe_latent_size": config.moe_latent_size or 0}
    return keys


NEMOTRON_PLACES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate": "ffn_gate_inp",
    "shared_experts.up_proj": "ffn_up_shexp",
    "shared_experts.down_proj": "ffn_down_shexp",
    "fc1_latent_proj": "ffn_latent_down",
    "fc2_latent_proj": "ffn_latent_up",
}
NEMOTRON_BARE = {
    "gate.e_score_correction_bias": "exp_probs_b.bias",
    "experts.up_proj": "ffn_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def transformers_tensors(tensors: dict[str, Any], config: Any, architecture: str) -> dict[str, np.ndarray]:
    """Those tensors of a model that stand in a file under another name, or as other numbers, by their names there;
    what is taken is taken out of ``tensors``."""
    found: dict[str, np.ndarray] = {}
    for name in [name for name in tensors if any(part in name for part in MIXERS)]:
        layer, rest = name.split(".layers.")[1].split(".", 1)
        kind = rest.split(".", 1)[1]
        weight = tensors.pop(name).float().numpy()
        if architecture == "falcon-h1":
            weight = weight * falcon_factor(config, f"ssm.{kind}")
        if kind == "A_log":
            weight = -np.exp(weight)
        if kind == "norm.weight":
            groups = config.mamba_n_groups if ".mamba." in name else config.n_groups
            weight = weight.reshape(groups, -1)
        if kind in ("A_log", "D"):
            weight = weight[:, None]
        if kind == "conv1d.weight":
            weight = weight[:, 0]
        given = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias"} | NEMOTRON_BARE
        module, _, parameter = kind.rpartition(".")
        states = {"in_proj": "ssm_in", "conv1d": "ssm_conv1d", "norm": "ssm_norm", "out_proj": "ssm_out"}
        place = (states | NEMOTRON_PLACES).get(module)
        found[f"blk.{layer}.{given.get(kind, f'{place}.{parameter}')}"] = np.ascontiguousarray(weight)
    if architecture == "falcon-h1":
        for name, tensor in list(tensors.items()):
            tensors[name] = tensor * falcon_factor(config, name)
            if name.endswith("pre_ff_layernorm.weight"):
                found[f"blk.{name.split('.')[2]}.ffn_norm"] = tensors.pop(name).numpy()
    if architecture == "granitehybrid" and not config.num_local_experts:  # its shared feed-forward is the only one
        for name in [name for name in tensors if ".shared_mlp." in name]:
            layer, weight = name.split(".")[2], tensors.pop(name).numpy()
            parts = {"ffn_down": weight}
            if "input" in name:
                parts = dict(zip(("ffn_gate", "ffn_up"), np.split(weight, 2), strict=True))
            found |= {f"blk.{layer}.{part}.weight": np.ascontiguousarray(rows) for part, rows in parts.items()}
    return found


def falcon_factor(config: Any, name: str) -> Any:
    """What a tensor of Falcon-H1 is multiplied by."""
    inner, groups = config.mamba_n_heads * config.mamba_d_head, config.mamba_n_groups * config.mamba_d_state
    parts = np.repeat(config.ssm_multipliers, (inner, inner, groups, groups, config.mamba_n_heads)).astype(np.float32)
    gate, down = config.mlp_multipliers
    into = config.attention_in_multiplier
    factors = {
        "embed_tokens.weight": config.embedding_multiplier,
        "lm_head.weight": config.lm_head_multiplier,
        "q_proj.weight": into,
        "k_proj.weight": into * config.key_multiplier,
        "k_proj.bias": config.key_multiplier,
        "v_proj.weight": into,
        "o_proj.weight": config.attention_out_multiplier,
        "o_proj.bias": config.attention_out_multiplier,
        "ssm.in_proj.weight": config.ssm_in_multiplier * parts[:, None],
        "ssm.in_proj.bias": parts,
        "ssm.out_proj.weight": config.ssm_out_multiplier,
        "ssm.out_proj.bias": config.ssm_out_multiplier,
        "gate_proj.weight": gate,
        "gate_proj.bias": gate,
        "down_proj.weight": down,
        "down_proj.bias": down,
    }
    return next((factor for suffix, factor in factors.items() if name.endswith(suffix)), 1.0)
