"""Weights of a checkpoint that its config.json does not speak of: as transformers takes them, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import edit_json
from test_checkpoint_config import MODELS, converted_logits, loaded_logits, model_folder
from test_models import ROUNDING, nmse

from edgellm.formats.errors import EdgeLLMError
from edgellm.quantize.inputs import open_input

torch = pytest.importorskip("torch", reason="the judge of checkpoints is transformers on torch")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def change_tensors(folder: Path, **changes: Any) -> None:
    """Change tensors of the checkpoint's only file; None takes one out, a dot is spelled as two underscores."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | {key.replace("__", "."): t for key, t in changes.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def noise(*shape: int) -> Any:
    """A tensor of random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.25


@pytest.mark.parametrize("model_type", MODELS)
def test_a_head_beside_a_tied_embedding_is_kept_where_it_differs(model_type: str, tmp_path: Path) -> None:
    model_folder(tmp_path, model_type, tie_word_embeddings=True)
    with open_input(tmp_path) as source:
        embedding = torch.from_numpy(np.array(source.tensors["token_embd.weight"].rows()))
        assert "output.weight" not in source.tensors
    change_tensors(tmp_path, lm_head__weight=embedding)
    with open_input(tmp_path) as source:
        assert "output.weight" not in source.tensors
        assert not source.notes
    change_tensors(tmp_path, lm_head__weight=noise(*embedding.shape))
    with open_input(tmp_path) as source:
        assert any("lm_head" in note for note in source.notes)
    assert nmse(converted_logits(tmp_path), loaded_logits(tmp_path)) <= ROUNDING


def test_a_tied_head_stands_for_a_missing_embedding(tmp_path: Path) -> None:
    model_folder(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(tmp_path, lm_head__weight=noise(280, 64), model__embed_tokens__weight=None)
    assert nmse(converted_logits(tmp_path), loaded_logits(tmp_path)) <= ROUNDING


@pytest.mark.parametrize("said", [False, None])
def test_a_missing_head_is_named_unless_the_config_ties_it(said: bool | None, tmp_path: Path) -> None:
    model_folder(tmp_path, "llama")
    change_tensors(tmp_path, lm_head__weight=None)
    edit_json(tmp_path / "config.json", tie_word_embeddings=said)
    with pytest.raises(EdgeLLMError, match=r"lm_head\.weight is missing") as caught:
        open_input(tmp_path)
    assert caught.value.code == "CHECKPOINT_TENSOR"


REFUSED_BIASES = {
    **{(name, True): r"attention_bias is True" for name in ("mixtral", "olmoe", "gemma", "gemma2")},
    **{(name, True): r"attention_bias is True" for name in ("qwen3_5_text", "qwen3_5_moe_text")},
    ("gpt_oss", False): r"blk\.0\.attn_q\.bias is missing",
}
"""What GGUF files of the architecture cannot say, by what the refusal names."""


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("model_type", [name for name in MODELS if name != "mistral"])
def test_biases_are_those_of_the_class_and_the_config(model_type: str, flag: bool, tmp_path: Path) -> None:
    model_folder(tmp_path, model_type, attention_bias=flag)
    if named := REFUSED_BIASES.get((model_type, flag)):
        with pytest.raises(EdgeLLMError, match=named):
            open_input(tmp_path)
        return
    assert nmse(converted_logits(tmp_path), loaded_logits(tmp_path)) <= ROUNDING


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_a_bias_that_the_model_has_not_is_refused_unless_it_is_zero(model_type: str, name: str, tmp_path: Path) -> None:
    model_folder(tmp_path, model_type)
    width = 96 if name == "mlp.up_proj" else 64
    key = f"model.layers.1.{name}.bias".replace(".", "__")
    change_tensors(tmp_path, **{key: torch.zeros(width)})
    assert nmse(converted_logits(tmp_path), loaded_logits(tmp_path)) <= ROUNDING
    change_tensors(tmp_path, **{key: torch.ones(width)})
    with pytest.raises(EdgeLLMError, match=rf"model\.layers\.1\.{name}\.bias") as caught:
        open_input(tmp_path)
    assert caught.value.code == "MODEL_TENSOR_UNKNOWN"


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    model_folder(tmp_path, "llama", attention_bias=True)
    change_tensors(tmp_path, model__layers__1__self_attn__k_proj__bias=None)
    with pytest.raises(EdgeLLMError, match=r"blk\.1\.attn_k\.bias") as caught:
        open_input(tmp_path)
    assert caught.value.code == "CHECKPOINT_TENSOR"


@pytest.mark.parametrize(("key", "value"), [("model_type", "mistral"), ("architectures", ["Qwen2ForCausalLM"])])
def test_a_class_and_a_model_type_that_contradict_each_other_are_named(key: str, value: Any, tmp_path: Path) -> None:
    model_folder(tmp_path, "llama")
    edit_json(tmp_path / "config.json", **{key: value})
    with pytest.raises(EdgeLLMError, match="model_type is") as caught:
        open_input(tmp_path)
    assert caught.value.code == "CHECKPOINT_ARCHITECTURE"


def test_a_program_of_the_authors_own_is_not_run_and_said(tmp_path: Path) -> None:
    model_folder(tmp_path, "llama")
    edit_json(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    with open_input(tmp_path) as source:
        assert any("auto_map" in note for note in source.notes)
