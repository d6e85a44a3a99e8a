"""More of the long tail: what edgellm's converter makes of a checkpoint against transformers, and beside llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import save_byte_level, save_model
from llama_cpp_judge import llama_cpp_answer, take_gelu_of_a_table
from long_tail_models import ALIKE, CONVERTED, LAGUNA_ROPE, rename_checkpoint
from test_models import ROUNDING, nmse, transformers_logits, transformers_model
from tiny_models import write_tiny_model

import edgellm
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.ops import Activate
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.models.parts.checkpoint_keys import check_keys
from edgellm.models.parts.long_tail_keys import NOTED_IN
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input
from edgellm.tokenizer import Tokenizer

VOCAB = {"vocab_size": 280}
TOKENS = np.random.default_rng(0).integers(0, 270, 60).tolist()
APART = ("ernie4_5-moe every other layer, biases", "cohere2moe all layers global")
APART += tuple(name for name in CONVERTED if name.startswith("gemma3n"))
"""What llama.cpp does not load: other tensors; an architecture with windows where no layer slides, on which it aborts;
of Gemma 3n all but the one shape that test_gemma3n.py has."""
PROMPTS_BEHIND = [1, 2, 7, 33, 34, 60]  # tokens; windows are 33 wide


def save_row(folder: Path, name: str) -> Any:
    """The checkpoint of a row of CONVERTED, with a tokenizer; the model as it is stored."""
    kind, options = CONVERTED[name]
    save_byte_level(folder)
    own = {"rms_norm_eps": None} if kind == "Cohere2Moe" else {}
    model = save_model(folder, transformers_model(kind, own | options | VOCAB))
    if name in ALIKE:
        rename_checkpoint(folder, name)
    return model


@pytest.fixture(scope="module", params=CONVERTED)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A row of CONVERTED: its name, transformers' model, the GGUF file."""
    folder = tmp_path_factory.mktemp("row")
    model = save_row(folder / "hf", request.param)
    with open_input(folder / "hf") as source:
        (path,) = convert(source, folder / "out.gguf", "f32")
    return request.param, model, path


def test_logits_of_a_converted_checkpoint_equal_transformers(converted: tuple[str, Any, Path]) -> None:
    name, model, path = converted
    with GGUFFile.open(path) as gguf:
        assert gguf.architecture == name.split()[0].rstrip(",")
        program = build_program(gguf).for_context(len(TOKENS))
        logits = ReferenceExecutor(program).run(Batch.single(program, TOKENS))
    assert nmse(logits, transformers_logits(model, TOKENS)) <= ROUNDING


def test_llama_cpp_has_the_same_probabilities_of_all_tokens(
    converted: tuple[str, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, path = converted
    if name in APART:
        pytest.skip("llama.cpp does not load it")
    take_gelu_of_a_table(monkeypatch)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf).for_context(256)  # as the judge has it
        letter = Tokenizer.from_gguf(gguf.metadata).encode("a")[-1]
        judge = llama_cpp_answer(path, [TOKENS[:n] for n in PROMPTS_BEHIND], program.n_vocab, letter)
        logits = ReferenceExecutor(program).run(Batch.single(program, TOKENS))
    rows = logits[np.array(PROMPTS_BEHIND) - 1]
    with_curves = any(isinstance(op, Activate) for op in program.ops)  # which may round to another half step
    assert nmse(centred(rows), centred(judge.logprobs)) <= (1e-6 if with_curves else 1e-9)


def centred(logits: np.ndarray) -> np.ndarray:
    """Logits, or log-probabilities, but for what is added to a whole row."""
    return logits.astype(np.float64) - logits.mean(axis=1, keepdims=True, dtype=np.float64)


_FLAT = {"rope_parameters": LAGUNA_ROPE["full_attention"], "swa_rope_parameters": LAGUNA_ROPE["sliding_attention"]}
BESIDES: dict[str, tuple[dict[str, Any], ...]] = {
    "dots1": ({"scoring_func": "noaux_tc", "topk_method": "noaux_tc", "moe_layer_freq": 1},),
    "hunyuan-moe": (
        {"add_classification_head": False, "attention_head_dim": 16, "cla_share_factor": 2, "class_num": 0}
        | {"dense_list": [64, 0], "norm_type": "hf_rms", "n_group": False, "topk_group": False, "pad_id": 1}
        | {"sep_id": 2, "im_end_id": 3, "pool_type": "last", "position_embedding_xdrope": False, "use_cla": False}
        | {"use_rotary_pos_emb": True, "anyres_vit_max_image_size": 2048},
    ),
    "bailingmoe2": (
        {"using_split_qkv_in_self_attention": False, "sliding_window": 4096, "use_sliding_window": False},
    ),
    "laguna": (
        {"decoder_sparse_step": 1, "partial_rotary_factor": 0.5, "swa_attention_sink_enabled": False}
        | {"mlp_only_layers": [0], "qk_norm_type": "rmsnorm", "moe_router_use_sigmoid": True},
        _FLAT,
        _FLAT
        | {"rope_parameters": {key: value for key, value in _FLAT["rope_parameters"].items() if key[0] != "p"}}
        | {"partial_rotary_factor": 0.5, "mlp_layer_types": None, "mlp_only_layers": [0]},
    ),
    "gemma3n": ({"query_pre_attn_scalar": 256, "altup_coef_clip": 120.0, "altup_lr_multiplier": 1.0},),
    "minicpm": ({"mup_denominator": 32, "sparse_config": {"kernel_size": 32, "dense_len": 8192}},),
    "falcon": ({"ff_factor": 4},),
    "nemotron": ({"rope_percent": 0.25},),
}  # fmt: skip


@pytest.mark.parametrize("converted", BESIDES, indirect=True)
def test_what_published_settings_say_besides_changes_nothing(converted: tuple[str, Any, Path]) -> None:
    name, _, path = converted
    file = path.parent / "hf" / "config.json"
    written = file.read_text("utf-8")
    with open_input(file.parent) as source:
        metadata, notes = dict(source.metadata), source.notes
    for changes in BESIDES[name]:
        file.write_text(json.dumps(json.loads(written) | changes), "utf-8")
        with open_input(file.parent) as source:
            assert {key: str(value) for key, value in source.metadata.items()} == {
                key: str(value) for key, value in metadata.items()
            }
            assert [note for note in source.notes if note not in notes] == (
                ["config.json: sparse_config " + NOTED_IN["minicpm"]["sparse_config"] + "."] * (name == "minicpm")
            )
    file.write_text(written, "utf-8")


@pytest.mark.parametrize("converted", ["laguna"], indirect=True)
def test_a_rotation_of_laguna_that_says_no_part_is_of_whole_heads(converted: tuple[str, Any, Path]) -> None:
    file = converted[2].parent / "hf" / "config.json"
    written = file.read_text("utf-8")
    wide = {key: value for key, value in LAGUNA_ROPE["full_attention"].items() if key != "partial_rotary_factor"}
    for rope, n_rot in ((LAGUNA_ROPE | {"full_attention": wide}, 16), (None, 8)):
        file.write_text(json.dumps(json.loads(written) | {"rope_parameters": rope}), "utf-8")
        with open_input(file.parent) as source:
            assert source.metadata["laguna.rope.dimension_count"] == (n_rot, "UINT32")
    file.write_text(written, "utf-8")


def test_eurobert_may_say_its_tokens_as_texts(tmp_path: Path) -> None:
    texts = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    assert not check_keys(tmp_path, texts | {"mask_token": "<|mask|>", "clf_pooling": "late"}, "eurobert")
    with pytest.raises(EdgeLLMError, match="mask_text is"):
        check_keys(tmp_path, texts | {"mask_text": "<|mask|>"}, "eurobert")


REFUSED: dict[str, tuple[dict[str, Any], ...]] = {
    "dots1": ({"layer_types": ["sliding_attention"] * 3}, {"n_group": 3}, {"num_experts_per_tok": 9},
              {"scoring_func": "softmax"}),
    "ernie4_5-moe": ({"moe_layer_end_index": 1}, {"moe_k": 7}, {"moe_use_aux_free": False}, {"hidden_act": "gelu"}),
    "hunyuan-moe": (
        {"moe_topk": [2, 1, 2]}, {"num_shared_expert": [2, 2, 2]}, {"moe_intermediate_size": [48, 48, 48]},
        {"use_qk_norm": False}, {"use_cla": True}, {"attention_head_dim": 8}, {"norm_type": "fused"}, {"n_group": 2},
        {"add_classification_head": True}, {"position_embedding_xdrope": True}, {"use_rotary_pos_emb": False},
    ),
    "bailingmoe": ({"norm_head": True}, {"first_k_dense_replace": 1}, {"moe_shared_expert_intermediate_size": 5}),
    "bailingmoe2": ({"rotary_dim": 4}, {"score_function": "softmax"}, {"topk_group": 9}, {"use_qk_norm": False},
                    {"using_split_qkv_in_self_attention": True}, {"use_sliding_window": True, "sliding_window": 7}),
    "cohere2moe": (
        {"shared_expert_combination_strategy": "sum"}, {"expert_selection_fn": "x"}, {"logit_scale": 0},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]}, {"prefix_dense_sliding_window_pattern": 2},
    ),
    "laguna": (
        {"gating": False}, {"moe_router_logit_softcapping": 3.0}, {"num_attention_heads_per_layer": [4, 2]},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]}, {"moe_apply_router_weight_on_input": True},
        {"mlp_only_layers": [1]}, {"mlp_only_layers": 0}, {"decoder_sparse_step": 2}, {"partial_rotary_factor": 0.25},
        {"swa_attention_sink_enabled": True}, {"swa_rope_parameters": LAGUNA_ROPE["sliding_attention"]},
        {"qk_norm_type": "none"}, {"moe_router_use_sigmoid": False},
    ),
    "gemma3n": (
        {"altup_correct_scale": False}, {"hidden_activation": "gelu"}, {"activation_sparsity_pattern": [0.5]},
        {"activation_sparsity_pattern": [1.0] * 6}, {"intermediate_size": [96]}, {"num_kv_shared_layers": 5},
        {"altup_active_idx": 4}, {"final_logit_softcapping": 0}, {"vocab_size_per_layer_input": 0},
    ),
    "exaone": ({"activation_function": "relu"},),
    "internlm2": ({"rope_scaling": {"type": "yarn", "factor": 2.0}},),
    "minicpm": ({"scale_emb": 0}, {"scale_depth": -1}, {"dim_model_base": 0}),
    "stablelm": ({"qk_layernorm": True}, {"hidden_act": "gelu"}),
    "stablelm heads": ({"qk_layernorm": False},),
    "phi2": ({"qk_layernorm": True}, {"hidden_act": "gelu"}),
    "gptneox": ({"hidden_act": "quick_gelu"}, {"attention_bias": False}),
    "gpt2": ({"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True}),
    "starcoder": ({"multi_query": False}, {"scale_attn_weights": False}),
    "falcon": ({"alibi": True}, {"parallel_attn": False}, {"multi_query": False}, {"activation": "relu"}),
    "nemotron": ({"rope_percent": 0.5},),
    "olmo": ({"clip_qkv": 0.0}, {"clip_qkv": -8.0}),
}  # fmt: skip
GGUF_NAMES = {"n_group": "expert_group", "topk_group": "expert_group", "moe_k": "expert_used_count"}
GGUF_NAMES |= {"num_kv_shared_layers": "shared_kv_layers", "altup_active_idx": "altup.active_idx"}
GGUF_NAMES |= {"num_experts_per_tok": "expert_used_count", "qk_layernorm": "q_layernorm"}
"""Keys that the program of the file refuses, by the names of the file."""


def test_settings_that_no_program_computes_are_refused_by_name(converted: tuple[str, Any, Path]) -> None:
    name, _, path = converted
    file = path.parent / "hf" / "config.json"
    written = file.read_text("utf-8")
    for changes in (*REFUSED.get(name, ()), {"new_key": 1}):
        file.write_text(json.dumps(json.loads(written) | changes), "utf-8")
        key = next(iter(changes))
        with pytest.raises(EdgeLLMError, match=f"{key}|layer_types|{GGUF_NAMES.get(key, key)}"):
            open_input(file.parent)
    file.write_text(written, "utf-8")


SIZES: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16}
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups that do not fit": ("dots1", {"expert_group_count": 2}, "expert_group_count is 2, expected a divisor"),
    "groups with too few experts": (
        "bailingmoe2", {"expert_group_count": 5, "expert_group_used_count": 1}, "expert_group_used_count is 1",
    ),
    "more groups than there are": (
        "bailingmoe2", {"expert_group_count": 5, "expert_group_used_count": 9}, "expert_group_used_count is 9",
    ),
    "groups, and not how many count": (
        "dots1", {"expert_group_count": 5}, "expert_group_used_count is 0, expected 1 to 5",
    ),
    "groups of a latent model, likewise": (
        "deepseek2", {"expert_group_count": 5, "expert_group_used_count": None}, "expert_group_used_count is 0",
    ),
    "another router": ("cohere2moe", {"expert_gating_func": 3}, "expert_gating_func is 3"),
    "experts in no layer": ("ernie4_5-moe", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
    "experts in other layers": ("ernie4_5-moe", {"interleave_moe_layer_step": 2}, r"blk\.0\.ffn_(gate|up)\.weight"),
    "experts of another width": ("hunyuan-moe", {"expert_feed_forward_length": 32}, "expert_feed_forward_length is 32"),
    "no heads": ("laguna", {"attention.head_count": [4, 0]}, "attention.head_count is 0"),
    "heads that share no keys": ("laguna", {"attention.head_count": [4, 3]}, "divisor of attention.head_count"),
    "a turn of half a pair": ("laguna", {"rope.dimension_count_swa": 3}, "rope.dimension_count_swa is 3"),
    "a turn of more than a head": ("laguna", {"rope.dimension_count_swa": 18}, "rope.dimension_count_swa is 18"),
    "weights that do not sum to 1": ("laguna", {"expert_weights_norm": False}, "expert_weights_norm is False"),
    "logits by nothing": ("minicpm", {"logit_scale": 0.0}, "logit_scale is 0.0"),
    "rows for fewer positions": ("gpt2", {"context_length": 300}, r"position_embd\.weight has the shape"),
    "no window": ("cohere2moe", {"attention.sliding_window": 0}, "sliding_window is 0"),
    "another curve": ("gptneox", {"hidden_activation": "quick_gelu"}, "hidden_activation is '?quick_gelu"),
    "side by side or not": ("gptneox", {"use_parallel_residual": 2}, "use_parallel_residual"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_files_that_contradict_themselves_are_named_errors(what: str, tmp_path: Path) -> None:
    architecture, keys, named = BAD[what]
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    with (
        pytest.raises(EdgeLLMError, match=named) as caught,
        GGUFFile.open(write_tiny_model(tmp_path / "bad.gguf", architecture, metadata=metadata, **SIZES)) as gguf,
    ):
        build_program(gguf)
    assert "bad.gguf" in str(caught.value)


@pytest.mark.parametrize(("architecture", "n_layer"), [("stablelm", 2), ("command-r", 64)])
def test_heads_may_be_normed_each_by_a_weight_of_its_own(architecture: str, n_layer: int, tmp_path: Path) -> None:
    """As in StableLM 2 12B and Command R+; llama.cpp takes them for the latter by its number of layers."""
    rng, heads = np.random.default_rng(5), {"attn_q_norm": 4, "attn_k_norm": 2}
    names = [(f"blk.{i}.{name}.weight", n) for i in range(n_layer) for name, n in heads.items()]
    norms = {name: rng.normal(1, 0.3, (n, 16)).astype(np.float32) for name, n in names}
    left_out = tuple(f"blk.{i}.ffn_norm.{kind}" for i in range(n_layer) for kind in ("weight", "bias"))
    more: dict[str, Any] = {"n_layer": n_layer, "extra_tensors": norms, "leave_out": left_out}
    path = write_tiny_model(
        tmp_path / "heads.gguf", architecture, "F32", tied=architecture == "command-r", **more, **SIZES
    )
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf).for_context(256)
        letter = Tokenizer.from_gguf(gguf.metadata).encode("a")[-1]
        judge = llama_cpp_answer(path, [TOKENS[:n] for n in PROMPTS_BEHIND], program.n_vocab, letter)
        batch = Batch.single(program, TOKENS)
        logits = ReferenceExecutor(program).run(batch)
        executor = CPUExecutor(program, 4, 1, 64)
        assert nmse(executor.run(batch), logits) <= 1e-5
        executor.close()
    assert nmse(centred(logits[np.array(PROMPTS_BEHIND) - 1]), centred(judge.logprobs)) <= 1e-9


def test_a_context_is_no_longer_than_the_rows_for_positions(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "gpt2.gguf", "gpt2", n_embd=64, n_ff=64, n_head=4, head_dim=16)
    with edgellm.load(path, n_ctx=4096, n_threads=1) as llm:
        assert llm.n_ctx == 256
        answer = llm.generate(list(range(3, 250)), max_tokens=100, temperature=0)
        assert answer.finish_reason == "context_full" and len(answer.tokens) <= 10
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        for executor in (ReferenceExecutor(program, 16, 64), CPUExecutor(program, 16, 1, 64)):
            with pytest.raises(ParameterError, match="256 rows"):
                executor.run(Batch.single(program, [1, 2], start=255))
            executor.close()
