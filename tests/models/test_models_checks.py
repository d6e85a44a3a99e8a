"""Files that contradict themselves: each is a named error, and no program comes out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import raw_gguf
from gguf_files import write_gguf
from state_space_models import STATE_SPACES
from tiny_encoders import DECODERS
from tiny_models import EXPERTS, tensor_shapes, write_tiny_model

from edgellm.formats.errors import EdgeLLMError, FormatError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.hparam_checks import RANGES
from edgellm.formats.validate import findings
from edgellm.kernels.program import Program
from edgellm.models import build_program
from edgellm.models.parts.hparam_keys import NEUTRAL, NEUTRAL_IN, READ, READ_IN, WITHOUT_EFFECT
from edgellm.models.parts.hparams import hparam_error, integers, read_hparams

SIZES: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16}


def program_of(path: Path) -> Program:
    """The program of a file."""
    with GGUFFile.open(path) as gguf:
        return build_program(gguf)


BAD_METADATA: dict[str, Any] = {
    "block_count": [0, 513, 2**32 - 1, 2**32, -1, 2.0, "2", True, 1, 3],
    "context_length": [0, 2**40, -5],
    "embedding_length": [0, 63, 128, 2**31],
    "feed_forward_length": [0, 32, 2**32],
    "attention.head_count": [0, 3, 8, 2**32 - 1],
    "attention.head_count_kv": [0, 3, 4, 8, 2**32 - 1],
    "attention.key_length": [0, 1, 8, 17, 2**32 - 1],
    "attention.value_length": [0, 8, 2**32 - 1],
    "attention.layer_norm_rms_epsilon": [0.0, -1.0, float("nan"), float("inf"), 5.0, "small"],
    "rope.dimension_count": [0, 1, 15, 18, 2**32 - 1],
    "rope.freq_base": [0.0, 1.0, -10.0, float("nan"), float("inf")],
    "rope.scaling.factor": [-1.0, float("nan"), float("inf")],
}


CODES = {"MODEL_HPARAMS", "MODEL_SHAPE", "MODEL_TENSOR_MISSING", "MODEL_TENSOR_UNKNOWN", "GGUF_KEY_TYPE"}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in BAD_METADATA.items() for v in values])
def test_bad_hyperparameter_is_a_named_error(key: str, value: object, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "bad.gguf", metadata={f"llama.{key}": value}, **SIZES)
    with pytest.raises(EdgeLLMError) as caught:
        program_of(path)
    assert caught.value.code in CODES
    assert "bad.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_hyperparameter_is_named(key: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "bad.gguf", leave_out=(f"llama.{key}",), **SIZES)
    with pytest.raises(FormatError, match=f"llama.{key} is missing") as caught:
        program_of(path)
    assert caught.value.code == "MODEL_HPARAMS"


def name_of_first(name: str, names: Iterable[str]) -> str:
    """What is missed where a tensor is not there: the first of those that may stand in its place."""
    recurrent = name.replace("attn_qkv", "ssm_conv1d") in names  # a delta-net's, which is never in three parts
    name = name.replace("gate_up_exps", "gate_exps")
    return name if recurrent else name.replace("attn_qkv.weight", "attn_q.weight")


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_tensor_is_demanded_and_its_shape_compared(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "good.gguf", architecture, "F32", tied=False, n_layer=1, **SIZES)
    program = program_of(path)
    optional = {"output.weight"}  # without it the embedding is used
    optional |= {name for name in program.tensors if name.endswith("ffn_down_exps.scale")}
    if architecture == "qwen2moe":
        optional |= {name for name in program.tensors if name.endswith(".bias")}
    if architecture == "deepseek2":
        optional |= {name for name in program.tensors if name.endswith("exp_probs_b.bias")}
    if architecture in STATE_SPACES:
        optional |= {name for name in program.tensors if name.endswith("ssm_conv1d.bias")}
    if architecture == "ernie4_5-moe":
        optional |= {name for name in program.tensors if name.endswith("exp_probs_b.bias")}
    for name in program.tensors:
        if name.startswith("ones."):  # in no file
            continue
        with GGUFFile.open(path) as gguf:
            del gguf.tensors[name]
            if name in optional:
                assert name not in build_program(gguf).tensors
                continue
            with pytest.raises(FormatError, match=re.escape(name_of_first(name, program.tensors))) as caught:
                build_program(gguf)
            assert caught.value.code == "MODEL_TENSOR_MISSING"


@pytest.mark.parametrize(
    "name", ["blk.0.attn_k.weight", "blk.1.ffn_norm.weight", "blk.1.ffn_down.weight", "output_norm.weight"]
)
def test_wrong_shape_says_both_shapes(name: str, tmp_path: Path) -> None:
    shape = (3, 64)
    path = write_tiny_model(
        tmp_path / "bad.gguf",
        quant="F32",
        leave_out=(name,),
        extra_tensors={name: np.zeros(shape, np.float32)},
        **SIZES,
    )
    with pytest.raises(FormatError, match=rf"{name} has the shape \(3, 64\)") as caught:
        program_of(path)
    assert caught.value.code == "MODEL_SHAPE"


def test_unknown_tensor_is_refused_and_a_vision_tower_is_not(tmp_path: Path) -> None:
    zeros = np.zeros((2, 32), np.float32)
    seen = write_tiny_model(tmp_path / "vision.gguf", extra_tensors={"v.blk.0.attn_q.weight": zeros}, **SIZES)
    assert "v.blk.0.attn_q.weight" not in program_of(seen).tensors
    unknown = write_tiny_model(tmp_path / "unknown.gguf", extra_tensors={"blk.0.attn_gate.weight": zeros}, **SIZES)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_gate\.weight") as caught:
        program_of(unknown)
    assert caught.value.code == "MODEL_TENSOR_UNKNOWN"


@pytest.mark.parametrize("architecture", ["rwkv6", "blocks", "hparams", "..", "llama.evil", "os", "Llama", "__init__"])
def test_an_unknown_architecture_is_told_where_the_known_ones_are_listed(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "other.gguf", metadata={"general.architecture": architecture}, **SIZES)
    with pytest.raises(EdgeLLMError) as caught:
        program_of(path)
    if isinstance(caught.value, UnsupportedError):
        assert "edgellm doctor" in str(caught.value) and len(str(caught.value)) < 300


def test_an_architecture_that_is_nearly_known_is_told_which_one_it_is_like(tmp_path: Path) -> None:
    for name, like in (("qwen3-moe", "qwen3moe"), ("Llama", "llama"), ("gemma3m", "gemma3"), ("q" * 5000, None)):
        path = write_tiny_model(tmp_path / "other.gguf", metadata={"general.architecture": name}, **SIZES)
        with pytest.raises(EdgeLLMError) as caught:
            program_of(path)
        assert (f"most like it: {like}" in str(caught.value)) == bool(like)
        assert len(str(caught.value)) < 300


NOT_MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA adapter": ("llama", {"general.type": "adapter", "adapter.type": "lora"}, "adapter.*Merge it"),
    "projector": ("clip", {"general.type": "mmproj", "clip.has_vision_encoder": True}, "pictures.*other file"),
    "old projector": ("clip", {"clip.has_vision_encoder": True}, "pictures.*other file"),
    "control vector": ("controlvector", {"controlvector.model_hint": "llama"}, "control vector.*model itself"),
    "importance matrix": ("llama", {"general.type": "imatrix"}, "importance matrix.*--imatrix"),
}


@pytest.mark.parametrize("what", NOT_MODELS)
def test_what_goes_with_a_model_is_called_by_its_name(what: str, tmp_path: Path) -> None:
    architecture, metadata, words = NOT_MODELS[what]
    tensors: dict[str, Any] = {"blk.0.attn_q.weight.lora_a": np.ones((4, 64), np.float32)}
    path = write_gguf(tmp_path / "file.gguf", {"general.architecture": architecture, **metadata}, tensors)
    assert not findings(path)
    with pytest.raises(UnsupportedError, match=f"file.gguf: is .*{words}") as caught:
        program_of(path)
    assert caught.value.code == "GGUF_NOT_A_MODEL"


def test_an_importance_matrix_of_llama_cpp_has_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    kind = raw_gguf.kv("general.type", raw_gguf.STRING, "imatrix")
    path.write_bytes(raw_gguf.gguf_bytes([kind], [raw_gguf.tensor("a.in_sum2", [32])], bytes(128)))
    with GGUFFile.open(path) as gguf, pytest.raises(UnsupportedError, match="importance matrix"):
        _ = gguf.architecture


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    shapes = tensor_shapes("llama", 276, 2, 64, 64, 64, 32, 16, True)
    path = write_tiny_model(tmp_path / "vocab.gguf", leave_out=tuple(shapes), **SIZES)
    with pytest.raises(UnsupportedError, match="vocabulary without weights"):
        program_of(path)


BAD_STATES: dict[str, list[Any]] = {
    "ssm.conv_kernel": [0, 1, 3, 65, "4"],
    "ssm.state_size": [0, 8, 25, 1 << 31],
    "ssm.group_count": [0, 1, 3, 4, 16],
    "ssm.time_step_rank": [0, 3, 7, 16],
    "ssm.inner_size": [0, 63, 100, 1 << 31],
    "attention.head_count_kv": [[2, 2], [0], [0, 3], [0, 0, 0], 2],
    "feed_forward_length": [[0, 0], [64], [64, 0]],
    "expert_count": [0, 7],
    "expert_used_count": [0, 6],
    "expert_feed_forward_length": [32, [64, 32], 1 << 31],
    "expert_shared_feed_forward_length": [0, 64],
    "expert_weights_scale": [-1.0, float("nan"), float("inf")],
    "expert_weights_norm": [1, "true"],
    "expert_group_count": [2],
    "moe_latent_size": [0, 64, 1 << 31],
    "nextn_predict_layers": [1, 2, 65],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_STATES.items() for value in values])
def test_a_state_space_of_wrong_sizes_is_a_named_error(key: str, value: Any, tmp_path: Path) -> None:
    """A state, then experts: of a Nemotron-H."""
    metadata = {f"nemotron_h_moe.{key}": value}
    path = write_tiny_model(tmp_path / "bad.gguf", "nemotron_h_moe", metadata=metadata, **SIZES)
    if (key, value) == ("nextn_predict_layers", 1):  # a layer that is not run
        assert all(not name.startswith("blk.1.") for name in program_of(path).tensors)
        return
    with pytest.raises(EdgeLLMError, match=r"bad\.gguf") as caught:
        program_of(path)
    assert caught.value.code in CODES | {"MODEL_KEY_UNKNOWN", "UNSUPPORTED"}


@pytest.mark.parametrize("architecture", [name for name in EXPERTS if name != "granitehybrid"])  # which need none
def test_an_expert_that_is_not_there_is_named(architecture: str, tmp_path: Path) -> None:
    for key, value, named in (
        ("expert_used_count", 6, "up to expert_count, which is 5"),
        ("expert_used_count", 0, "expert_used_count is 0"),
        ("expert_count", 0, "expert_count is 0"),
        ("expert_count", 7, r"ffn_gate_inp\.weight has the shape"),
        ("expert_count", "5", "expert_count: is STRING"),
    ):
        path = write_tiny_model(tmp_path / "moe.gguf", architecture, metadata={f"{architecture}.{key}": value}, **SIZES)
        with pytest.raises(FormatError, match=named):
            program_of(path)


BAD_DELTA: dict[str, list[Any]] = {
    "ssm.conv_kernel": [0, 1, 3, 65],
    "ssm.state_size": [0, 8, 17, 1 << 31],
    "ssm.group_count": [0, 3, 4],
    "ssm.time_step_rank": [0, 3, 8],
    "ssm.inner_size": [0, 63, 1 << 31],
    "full_attention_interval": [0, 1, 3, 513],
    "attention.recurrent_layers": [[True], [True] * 3, [False, True], [1, 2]],
    "nextn_predict_layers": [1, 2, 65],
    "attention.value_length": [8, 32],
    "rope.dimension_count": [0, 3, 18],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_DELTA.items() for value in values])
def test_a_delta_net_of_wrong_sizes_is_a_named_error(key: str, value: Any, tmp_path: Path) -> None:
    if (key, value) == ("nextn_predict_layers", 1):  # a layer that is not run: its own numbers do not matter
        program = program_of(
            write_tiny_model(tmp_path / "drafts.gguf", "qwen35", metadata={f"qwen35.{key}": 1}, **SIZES)
        )
        assert all(not name.startswith("blk.1.") for name in program.tensors)
        return
    path = write_tiny_model(tmp_path / "bad.gguf", "qwen35", metadata={f"qwen35.{key}": value}, **SIZES)
    with pytest.raises(EdgeLLMError, match=r"bad\.gguf") as caught:
        program_of(path)
    assert caught.value.code in CODES


def test_a_granite_that_divides_by_nothing_is_named(tmp_path: Path) -> None:
    for value in (0.0, -1.0, float("nan")):
        path = write_tiny_model(tmp_path / "granite.gguf", "granite", metadata={"granite.logit_scale": value}, **SIZES)
        with pytest.raises(FormatError, match="logit_scale") as caught:
            program_of(path)
        assert caught.value.code == "MODEL_HPARAMS"


def test_a_granite_that_was_trained_without_positions_is_not_rotated(tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "granite.gguf", "granite", metadata={"granite.rope.scaling.finetuned": False}, **SIZES
    )
    assert not program_of(path).ropes and all(op.name != "rope" for op in program_of(path).ops)


def test_unknown_rope_scaling_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "rope.gguf", metadata={"llama.rope.scaling.type": "longrope"}, **SIZES)
    with pytest.raises(UnsupportedError, match="longrope"):
        program_of(path)


def test_rope_factors_divide_the_frequencies_and_are_no_weights(tmp_path: Path) -> None:
    plain = program_of(write_tiny_model(tmp_path / "plain.gguf", **SIZES)).ropes["rope"].inv_freq
    factors = np.arange(1, 9).astype(np.float32)
    path = write_tiny_model(tmp_path / "rope.gguf", extra_tensors={"rope_freqs.weight": factors}, **SIZES)
    program = program_of(path)
    assert np.array_equal(program.ropes["rope"].inv_freq, plain / factors)
    assert "rope_freqs.weight" not in program.tensors


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_hyperparameter_that_gguf_knows_is_read_or_refused_by_name(architecture: str, tmp_path: Path) -> None:
    """Whatever the gguf package can write beside what the program reads: neutral values pass, others are named."""
    sections = (gguf_package.Keys.LLM, gguf_package.Keys.Attention, gguf_package.Keys.Rope)
    names = {value.removeprefix("{arch}.") for section in sections for key, value in vars(section).items()
             if isinstance(value, str) and value.startswith("{arch}.") and "{" not in value[6:]}  # fmt: skip
    unread = names - READ - READ_IN[architecture] - WITHOUT_EFFECT
    told = {"attention.scale", "logit_scale", "attn_logit_softcapping", "rope.dimension_sections"}
    assert told - READ_IN[architecture] <= unread
    neutral = NEUTRAL | NEUTRAL_IN.get(architecture, {})
    with GGUFFile.open(write_tiny_model(tmp_path / "key.gguf", architecture, **SIZES)) as gguf:
        written = dict(gguf.metadata)
        for key in sorted(unread):
            value = 3 if type(RANGES.get(key, (0.0,))[0]) is int else 3.5
            gguf.metadata[f"{architecture}.{key}"] = value
            with pytest.raises(UnsupportedError, match=rf"{architecture}\.{key} is {value}") as caught:
                build_program(gguf)
            assert caught.value.code == "MODEL_KEY_UNKNOWN"
            restore(gguf.metadata, written)
            for value in neutral.get(key, ()):
                gguf.metadata[f"{architecture}.{key}"] = value
                build_program(gguf)
                restore(gguf.metadata, written)


def restore(metadata: dict[str, Any], written: dict[str, Any]) -> None:
    """Make the metadata those that were written."""
    metadata.clear()
    metadata |= written


WITHOUT_ROTATION = ("mamba2", "nemotron_h", "nemotron_h_moe", "gpt2", "starcoder")


@pytest.mark.parametrize("architecture", [name for name in DECODERS if name not in WITHOUT_ROTATION])
def test_every_architecture_applies_rope_factors_and_scaling(architecture: str, tmp_path: Path) -> None:
    scaling = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 2.0}
    name = "rope_freqs.weight"
    n = max(
        len(r.inv_freq) for r in program_of(write_tiny_model(tmp_path / "n.gguf", architecture, **SIZES)).ropes.values()
    )
    options: dict[str, Any] = SIZES | {"leave_out": (name,)}
    factors = {name: np.ones(n, np.float32)} if architecture == "gemma4" else {}  # which must have some
    plain = program_of(write_tiny_model(tmp_path / "plain.gguf", architecture, extra_tensors=factors, **options)).ropes
    factors = {name: np.arange(1, n + 1).astype(np.float32)}
    changed = write_tiny_model(tmp_path / "rope.gguf", architecture, metadata=scaling, extra_tensors=factors, **options)
    for kind, rope in program_of(changed).ropes.items():
        slides = kind in ("local", "near")
        wanted = plain[kind].inv_freq if slides else plain[kind].inv_freq / factors[name] / 2
        assert np.array_equal(rope.inv_freq, wanted)


def test_a_magnitude_counts_without_any_scaling_too(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "none", "llama.rope.scaling.attn_factor": 1.5}
    path = write_tiny_model(tmp_path / "rope.gguf", metadata=metadata, **SIZES)
    assert program_of(path).ropes["rope"].magnitude == pytest.approx(1.5)


def test_rope_factors_must_be_positive(tmp_path: Path) -> None:
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        factors = np.array([1.0] * 7 + [bad], np.float32)
        path = write_tiny_model(tmp_path / "rope.gguf", extra_tensors={"rope_freqs.weight": factors}, **SIZES)
        with pytest.raises(FormatError, match="rope_freqs"):
            program_of(path)


def test_heads_that_differ_by_layer_are_refused_and_equal_ones_accepted(tmp_path: Path) -> None:
    key = "llama.attention.head_count_kv"
    assert (
        program_of(write_tiny_model(tmp_path / "same.gguf", metadata={key: [2, 2]}, **SIZES)).cache_layers[0].n_kv_heads
        == 2
    )
    with pytest.raises(UnsupportedError, match="differs from layer to layer"):
        program_of(write_tiny_model(tmp_path / "mixed.gguf", metadata={key: [2, 4]}, **SIZES))


def test_an_architecture_may_ask_for_sizes_layer_by_layer(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count_kv": [2, 0], "llama.feed_forward_length": [64, 32]}
    with GGUFFile.open(write_tiny_model(tmp_path / "mixed.gguf", metadata=metadata, **SIZES)) as gguf:
        hp = read_hparams(gguf, by_layer=("n_head_kv", "n_ff"))
        assert (hp.n_head, hp.n_head_kv, hp.n_ff) == (4, 2, 64)
        assert [(hp.layer(i).n_head, hp.layer(i).n_head_kv, hp.layer(i).n_ff) for i in (0, 1)] == [
            (4, 2, 64),
            (4, 0, 32),
        ]
        assert integers(gguf, "attention.head_count", 2) == [4, 4]
        for by_layer in ((), ("n_ff",)):
            with pytest.raises(UnsupportedError, match="head_count_kv differs from layer to layer"):
                read_hparams(gguf, by_layer)


@pytest.mark.parametrize(
    ("values", "message"),
    [([2], "an array of 1'?, expected one value for each of 2"), ([4, 3], "is 3, expected a divisor")],
)
def test_sizes_layer_by_layer_are_checked_in_each(tmp_path: Path, values: list[int], message: str) -> None:
    metadata = {"llama.attention.head_count_kv": values}
    path = write_tiny_model(tmp_path / "bad.gguf", metadata=metadata, **SIZES)
    with GGUFFile.open(path) as gguf, pytest.raises(FormatError, match=message) as caught:
        read_hparams(gguf, by_layer=("n_head_kv",))
    assert caught.value.code == "MODEL_HPARAMS"


def test_gemma3_slides_where_its_pattern_says(tmp_path: Path) -> None:
    pattern = "gemma3.attention.sliding_window_pattern"
    for name, value, windows in [
        ("six", None, [8, 8, 8, 8, 8, 0, 8]),
        ("two", 2, [8, 0, 8, 0, 8, 0, 8]),
        ("array", [True, False, False, True, True, True, False], [8, 0, 0, 8, 8, 8, 0]),
    ]:
        path = write_tiny_model(
            tmp_path / f"{name}.gguf",
            "gemma3",
            n_layer=7,
            sliding_window=8,
            leave_out=(pattern,) if value is None else (),
            metadata={} if value is None else {pattern: value},
            **SIZES,
        )
        program = program_of(path)
        assert [layer.window for layer in program.cache_layers] == windows
        assert [group.window for group in program.groups] == [0, 8]


def test_gemma3_with_capped_logits_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "cap.gguf", "gemma3", metadata={"gemma3.final_logit_softcapping": 30.0}, **SIZES)
    with pytest.raises(UnsupportedError, match="softcapping"):
        program_of(path)


@pytest.mark.parametrize("architecture", DECODERS)
def test_programs_are_complete(architecture: str, tmp_path: Path) -> None:
    program = program_of(write_tiny_model(tmp_path / "model.gguf", architecture, **SIZES))
    assert program.architecture == architecture
    assert program.buffers["logits"].rows == "outputs"
    assert program.buffers["logits"].width == program.n_vocab == 276
    written = [layer for op in program.ops for layer in op.written_layers()]
    assert sorted(written) == list(range(len(program.cache_layers))) and len(written) >= 2
    named = {name for op in program.ops for name in (*op.read_buffers(), *op.written_buffers())}
    assert named == set(program.buffers)
    weights = {name for op in program.ops for name in op.weight_names()}
    assert weights == set(program.tensors)


def test_every_range_is_a_range() -> None:
    assert all(low < high for low, high in RANGES.values())


def test_message_has_three_parts(tmp_path: Path) -> None:
    with GGUFFile.open(write_tiny_model(tmp_path / "model.gguf", **SIZES)) as gguf:
        message = str(hparam_error(gguf, "block_count", 0, "1 to 512"))
    assert message.startswith("model.gguf: llama.block_count is 0, expected 1 to 512.")
    assert "download it again" in message
