"""Drafts for another model, as their makers publish them: the file that is written, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import draft_files as files
import numpy as np
import pytest
from checkpoint_folders import save_byte_level, save_tensors
from tiny_models import write_tiny_model

import edgellm
from edgellm.formats.gguf import GGUFFile
from edgellm.models import build_program
from edgellm.models.drafts import Target, build_draft
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input

IDS = [5, 11, 12, 40, 41, 100, 200, 270]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 9, "hidden_size": 64} | {
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": files.N_VOCAB,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model no more than its settings and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    save_byte_level(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    return folder


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = files.SIZES | {"n_layer": 9}
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model.gguf", "llama", "F32", tied=False, **sizes)


def save(folder: Path, kind: str, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(files.config_of(kind) | config), "utf-8")
    save_tensors(folder / "model.safetensors", tensors)
    return folder


def speculators(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that another trainer gives the same tensors."""
    return {name.replace("midlayer.", "layers.0."): array for name, array in tensors.items()}


INNER = {
    key: value for key, value in files.config_of("eagle3").items() if key not in ("architectures", "draft_vocab_size")
}
EAGLES: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]] = {
    "as EAGLE has it": (files.eagle_tensors(IDS), {}, {}),
    "under the class of its model": (files.eagle_tensors(IDS), {"architectures": ["LlamaForCausalLM"]}, {}),
    "with all ids": (files.eagle_tensors(None), {"draft_vocab_size": files.N_VOCAB}, {}),
    "as speculators has it": (
        speculators(files.eagle_tensors(IDS)),
        {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "norm_before_residual": True}
        | {"transformer_layer_config": INNER, "eagle_aux_hidden_state_layer_ids": [1, 5, 9], "fc_norm": False},
        {"norm_before_residual": True, "target_layers": [1, 5, 9]},
    ),
    "as NVIDIA has it": (
        files.eagle_tensors(IDS, norm_before_fc=True),
        {"eagle_config": {"norm_before_fc": True, "use_aux_hidden_state": True, "parallel_draft_step": 1}
         | {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}},
        {"norm_before_fc": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EAGLES)
def test_an_eagle_checkpoint_becomes_the_file_that_llama_cpp_reads(name: str, base: Path, tmp_path: Path) -> None:
    tensors, config, keys = EAGLES[name]
    own = {f"eagle3.{key}": value for key, value in ({"target_layers": [2, 4, 6]} | keys).items()}
    plain = {name.replace("layers.0.", "midlayer."): array for name, array in tensors.items()}
    expected = files.write_draft(tmp_path / "expected.gguf", "eagle3", plain, own)
    with open_input(save(tmp_path / "draft", "eagle3", tensors, **config), base=base) as source:
        (path,) = convert(source, tmp_path / "draft.gguf")
    check_same(path, expected, "eagle3", {"norm_before_fc", "norm_before_residual"})


def test_a_dflash_checkpoint_becomes_the_file_that_llama_cpp_reads(base_file: Path, tmp_path: Path) -> None:
    expected = files.write_draft(tmp_path / "expected.gguf", "dflash", files.flash_tensors())
    with open_input(save(tmp_path / "draft", "dflash", files.flash_tensors()), base=base_file) as source:
        (path,) = convert(source, tmp_path / "draft.gguf")
    check_same(path, expected, "dflash", set())


def check_same(path: Path, expected: Path, kind: str, more: set[str]) -> None:
    with GGUFFile.open(path) as got, GGUFFile.open(expected) as judge:
        assert got.tensors.keys() == judge.tensors.keys()
        for name, tensor in judge.tensors.items():
            assert got.tensors[name].quant.name == tensor.quant.name
            np.testing.assert_array_equal(got.tensors[name].dequantize(), tensor.dequantize())
        for key, value in judge.metadata.items():
            if key.startswith((f"{kind}.", "tokenizer.ggml.tokens", "tokenizer.ggml.mask")):
                assert np.array_equal(got.metadata[key], value), key
        assert {key for key in got.metadata if key.startswith(f"{kind}.")} >= {f"{kind}.{key}" for key in more}
        assert "tokenizer.chat_template" not in got.metadata


def test_a_converted_draft_drafts_for_its_model(base_file: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "draft", "eagle3", files.eagle_tensors(IDS))
    with open_input(folder, base=base_file) as source:
        (path,) = convert(source, tmp_path / "draft.gguf", "f16")
    with GGUFFile.open(base_file) as gguf, GGUFFile.open(path) as draft:
        made = build_draft(draft, Target.of(build_program(gguf)))
        assert made.ids is not None and made.ids.tolist() == IDS and made.features.layers == (2, 4, 6)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray], str]] = {
    "other layers": ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 4, 8]}}, {}, "layer_ids"),
    "a norm for each layer": ("eagle3", {"fc_norm": True}, {}, "fc_norm"),
    "states after the norm": ("eagle3", {"norm_output": True}, {}, "norm_output"),
    "several tokens at once": ("eagle3", {"eagle_config": {"parallel_draft_step": 4}}, {}, "parallel_draft_step"),
    "a window": ("eagle3", {"layer_types": ["sliding_attention"]}, {}, "layer_types"),
    "an unknown key": ("eagle3", {"tree_depth": 3}, {}, "tree_depth"),
    "an unknown tensor": ("eagle3", {}, {"midlayer.extra.weight": np.ones((2, 2), np.float32)}, "extra"),
    "ids of another model": ("eagle3", {}, {"d2t": np.full(8, 500)}, "d2t"),
    "ids twice": ("eagle3", {}, {"d2t": -np.arange(8)}, "d2t"),
    "a head of another size": ("eagle3", {}, {"lm_head.weight": np.ones((9, 64), np.float32)}, "output.weight"),
    "a selector": ("dflash", {}, {"selector_hidden.weight": np.ones((4, 64), np.float32)}, "selector"),
    "sliding layers": ("dflash", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {}, "slid"),
    "more of DFlash": ("dflash", {"dflash_config": {"mask_token_id": 1, "target_layer_ids": [1], "x": 2}}, {}, "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_edgellm_does_not_know_is_refused_by_name(name: str, base: Path, tmp_path: Path) -> None:
    kind, config, more, word = REFUSED[name]
    tensors = (files.eagle_tensors(IDS) if kind == "eagle3" else files.flash_tensors()) | more
    with pytest.raises(edgellm.EdgeLLMError, match=word):
        open_input(save(tmp_path / "draft", kind, tensors, **config), base=base)


def test_a_draft_needs_its_model_and_nothing_else_has_one(base: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "draft", "eagle3", files.eagle_tensors(IDS))
    for given in (None, tmp_path / "nothing"):
        with pytest.raises(edgellm.ParameterError, match="--base"):
            open_input(folder, base=given)
    with pytest.raises(edgellm.ParameterError, match="neither"):
        open_input(base, base=base)
