"""DeepSeek V2, V3 and R1, Kimi K2, GLM 4.7 Flash: latent attention, experts in groups, some that all tokens share.

V2 chooses experts by a softmax and counts a group by its best one, as transformers has it (llama.cpp takes two), the
others by sigmoids and a bias, and a group by its best two. The first layers have none; so may all of them. All norms
have the epsilon of the file, as in llama.cpp; in transformers those of latents have 1e-6.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder, leave_out_drafts, project_logits
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    CheckpointForm,
    HeadRows,
    TypedMetadata,
    count_of,
    decoder_metadata,
    leading_dense_layers,
    refuse_activation,
    refuse_windows,
    typed_metadata,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotation
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERTS,
    SIGMOID,
    SOFTMAX,
    STACKED_EXPERTS,
    Experts,
    dense_then_experts,
    read_experts,
    read_gating,
    with_groups,
)
from edgellm.models.parts.hparams import HParams, flag, integer, read_hparams, real
from edgellm.models.parts.latent_attention import latent_attention, latent_rotation, read_latent_sizes

GLM_VOCABULARY, GLM_LAYERS = 154880, (47, 48)
"""Tokens and layers of GLM 4.7 Flash, whose first files do not say that its experts are chosen by sigmoids."""


def build(gguf: ModelFile) -> Program:
    """x += attention(h); x += experts(h), or a feed-forward in the first layers, each of h = RMSNorm(x)."""
    hp = read_hparams(gguf)
    m, sizes = ProgramBuilder(gguf, hp), read_latent_sizes(gguf, hp)
    rope, more = latent_rotation(m)
    m.ropes = {"rope": rope}
    scale = more / (sizes.n_nope + sizes.n_rot) ** 0.5
    n_layer, n_dense = hp.n_layer - leave_out_drafts(m), integer(gguf, "leading_dense_block_count", 0)
    experts = Experts(0, 0, 0) if n_dense >= n_layer else _experts(gguf, hp)
    ffn = dense_then_experts(experts, n_dense, integer(gguf, "expert_shared_count", 0) * experts.n_ff)
    m.embed("x")
    for i in range(n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        latent_attention(m, blk, sizes, scale)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        ffn(m, blk)
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


def _experts(gguf: ModelFile, hp: HParams) -> Experts:
    """How experts are chosen. FormatError for groups that do not hold them, UnsupportedError for another router."""
    is_glm = hp.n_vocab == GLM_VOCABULARY and hp.n_layer in GLM_LAYERS
    scores = read_gating(gguf, SIGMOID if is_glm else SOFTMAX)  # where none is said, as llama.cpp takes it
    experts = read_experts(
        gguf,
        over="chosen" if flag(gguf, "expert_weights_norm", False) else "all",
        scores=scores,
        best=1 if scores == "softmax" else 2,
        biased=any(name.endswith(".exp_probs_b.bias") for name in gguf.tensors),
        factor=real(gguf, "expert_weights_scale", 1.0) or 1.0,
    )
    return with_groups(gguf, experts)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SIGMOID_KINDS = ("deepseek_v3", "glm4_moe_lite")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    n_rot, rank = config.integer("qk_rope_head_dim"), config.integer("kv_lora_rank")
    for key, usual in (("head_dim", n_rot), ("num_key_value_heads", config.integer("num_attention_heads"))):
        if config.get(key) not in (None, usual):
            raise config.refuse(key, f"{usual} in models with these heads")
    if not config.flag("rope_interleave", True):
        raise config.refuse("rope_interleave", "heads whose rotated pairs are neighbours (true)")
    found = decoder_metadata(config, "deepseek2", _rotation) | _expert_metadata(config)
    found |= _yarn_metadata(_rotation(config), found)
    whole = {
        "vocab_size": config.integer("vocab_size"),
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + n_rot,
        "attention.value_length": rank,
        "attention.key_length_mla": config.integer("qk_nope_head_dim") + n_rot,
        "attention.value_length_mla": config.integer("v_head_dim"),
        "rope.dimension_count": n_rot,
    }
    if config.get("q_lora_rank") is not None:
        whole["attention.q_lora_rank"] = config.integer("q_lora_rank")
    return found | typed_metadata("deepseek2", whole)


def _expert_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of its experts. UnsupportedError where the class in transformers has another router than GGUF's."""
    sigmoids = config.model_type in SIGMOID_KINDS
    by_group = sigmoids or config.get("topk_method") == "group_limited_greedy"
    known = ("noaux_tc",) if sigmoids else ("greedy", "group_limited_greedy")
    if config.get("topk_method") not in (None, *known):
        raise config.refuse("topk_method", " or ".join(known))
    normed = config.flag("norm_topk_prob", sigmoids)
    if normed and not sigmoids:  # which the class does not heed, and other programs do
        raise config.refuse("norm_topk_prob", "false for models of this kind")
    n_dense = 1 if config.model_type == "glm4_moe_lite" else count_of(config, "first_k_dense_replace", 0)
    found: dict[str, float] = {
        "expert_count": config.integer("n_routed_experts"),
        "expert_used_count": config.integer("num_experts_per_tok"),
        "expert_feed_forward_length": config.integer("moe_intermediate_size"),
        "expert_shared_count": count_of(config, "n_shared_experts", 0),
        "expert_gating_func": SIGMOID if sigmoids else SOFTMAX,
        "leading_dense_block_count": min(leading_dense_layers(config, n_dense), config.n_layer),
        "expert_weights_scale": config.real("routed_scaling_factor", 1.0),
    }
    if by_group:
        found |= {"expert_group_count": config.integer("n_group")}
        found |= {"expert_group_used_count": config.integer("topk_group")}
    if normed:
        found["expert_weights_norm"] = True
    return typed_metadata("deepseek2", found)


def _rotation(config: CheckpointConfig) -> Rotation:
    rope = rotation(config, ("default", "yarn"), ("partial_rotary_factor",))
    if rope.numbers.get("partial_rotary_factor") not in (None, 1):
        raise config.refuse(f"{rope.key}.partial_rotary_factor", "1: all of the rotated part is rotated")
    return rope


def _yarn_metadata(rope: Rotation, found: TypedMetadata) -> TypedMetadata:
    """A tenth of ``mscale_all_dim``, as llama.cpp's converter writes it; without it GGUF readers differ."""
    if rope.kind != "yarn":
        return {}
    every = rope.real("mscale_all_dim", 0.0)
    if not every or rope.real("mscale", 0.0) != every or rope.numbers.get("attention_factor") is not None:
        expected = "yarn whose mscale and mscale_all_dim are one number, without attention_factor"
        raise rope.config.refuse(rope.key, expected)
    found.pop("deepseek2.rope.scaling.attn_factor", None)  # it would take back what there is none of
    return {"deepseek2.rope.scaling.yarn_log_multiplier": (0.1 * every, "FLOAT32")}


def _head_rows(config: CheckpointConfig) -> dict[str, HeadRows]:
    n_head, n_nope = config.integer("num_attention_heads"), config.integer("qk_nope_head_dim")
    d_v = config.integer("v_head_dim")
    return {
        "attn_k_b.weight": HeadRows(n_head, n_nope + d_v, 0, n_nope, turned=True),
        "attn_v_b.weight": HeadRows(n_head, n_nope + d_v, n_nope, d_v),
    }


def checkpoint_layer() -> dict[str, str]:
    """The modules of a layer."""
    latent = {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    }
    usual = {module: name for module, name in DECODER_LAYER.items() if name not in ("attn_k", "attn_v")}
    return usual | SHARED_EXPERTS | latent | {"mlp.gate": "ffn_gate_inp"}


CHECKPOINT = CheckpointForm(
    classes={
        "DeepseekV3ForCausalLM": "deepseek_v3",
        "DeepseekV3Model": "deepseek_v3",
        "DeepseekV2ForCausalLM": "deepseek_v2",
        "DeepseekV2Model": "deepseek_v2",
        "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
        "Glm4MoeLiteModel": "glm4_moe_lite",
    },
    renamed_kinds={"kimi_k2": "deepseek_v3"},
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(),
    layer=checkpoint_layer(),
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS | {"self_attn.kv_b_proj": ("attn_k_b", "attn_v_b")},
    bare={"mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",)},
    head_rows=_head_rows,
    extra=lambda _: {},
)
