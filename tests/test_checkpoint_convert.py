"""Checkpoints against transformers: logits of the converted model, ids of its tokenizer, what llama.cpp makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import TEXTS, edit_json, save_byte_level, save_model, save_sentence_piece
from test_gguf_writer import llama_cpp_text
from test_models import MODELS, nmse, transformers_logits, transformers_model

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.convert import convert, plan_conversion
from edgellm.quantize.source import open_source
from edgellm.tokenizer import Tokenizer

pytest.importorskip("transformers", reason="the judge of checkpoints is transformers")

VOCAB = {"vocab_size": 280}
TOKENS = np.random.default_rng(0).integers(0, 270, 60).tolist()


def reference_logits(path: Path) -> np.ndarray:
    """Logits of every token of TOKENS, by the reference executor."""
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        return ReferenceExecutor(program).run(Batch.single(program, TOKENS))


def save_tiny(folder: Path, name: str = "llama", pre: str = "smollm", dtype: str = "float32", **saving: Any) -> Any:
    """A checkpoint of one of MODELS with a tokenizer; the transformers model as it is stored."""
    kind, options = MODELS[name]
    save_byte_level(folder, pre)
    return save_model(folder, transformers_model(kind, options | VOCAB), dtype, **saving)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_converted_checkpoint_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "hf", name)
    with open_source(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    assert nmse(reference_logits(path), transformers_logits(model, TOKENS)) <= 1e-10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_auto_keeps_the_numbers_of_the_source(name: str, dtype: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "hf", name, dtype=dtype, max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    with open_source(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf")
        (wide,) = convert(source, tmp_path / "wide.gguf", "f32")
    kept = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    with GGUFFile.open(path) as gguf, GGUFFile.open(wide) as judge:
        for tensor_name, tensor in gguf.tensors.items():
            matrix = len(tensor.shape) == 2
            assert tensor.quant.name == (kept if matrix else "F32"), tensor_name
            assert np.array_equal(tensor.dequantize(), judge.tensors[tensor_name].dequantize())
    assert nmse(reference_logits(path), transformers_logits(model, TOKENS)) <= 1e-10


@pytest.mark.parametrize(("outtype", "limit"), [("f16", 1e-5), ("bf16", 1e-3)])
def test_another_type_is_rounded_to_the_nearest(outtype: str, limit: float, tmp_path: Path) -> None:
    import gguf as gguf_package

    save_tiny(tmp_path / "hf")
    with open_source(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf", outtype)
        for tensor in gguf_package.GGUFReader(path).tensors:
            rows = source.tensors[tensor.name].rows()
            wanted = gguf_package.quants.quantize(rows, tensor.tensor_type)
            assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), wanted.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("name", ["llama 3 factors", "qwen2 tied", "qwen3", "gemma3"])
def test_llama_cpp_and_edgellm_read_the_same_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")
    import edgellm

    save_tiny(tmp_path / "hf", name)
    with open_source(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    with edgellm.load(path, executor="reference") as llm:
        text = llm.generate("the and", max_tokens=12, temperature=0)
    assert llama_cpp_text(path) == f"TEXT {text!a}"


# -- tokenizers ------------------------------------------------------------------------------------------------------


def ids_without_json(metadata: dict[str, tuple[Any, str]], text: str) -> list[int]:
    """The ids by the GGUF vocabulary alone, as other programs read it."""
    plain = {key: value for key, (value, _) in metadata.items() if key != "tokenizer.huggingface.json"}
    return Tokenizer.from_gguf(plain).encode(text, parse_special=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_the_pre_tokenizer_is_found_and_ids_equal_the_original(pre: str, bos: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    original = save_byte_level(tmp_path, pre, bos=bos)
    with open_source(tmp_path) as source:
        metadata = source.metadata
    assert metadata["tokenizer.ggml.pre"][0] == pre
    assert metadata["tokenizer.ggml.add_bos_token"][0] == bos
    assert not source.notes
    tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})
    for text in TEXTS:
        wanted = original.encode(text)
        assert tokenizer.encode(text, parse_special=True) == wanted, text
        assert ids_without_json(metadata, text) == wanted, text


def test_a_pre_tokenizer_without_a_name_travels_with_the_file(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    original = save_byte_level(tmp_path, "new")
    with open_source(tmp_path) as source:
        assert "no name" in source.notes[0]
        tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in source.metadata.items()})
    for text in TEXTS:
        assert tokenizer.encode(text, parse_special=True) == original.encode(text)


@pytest.mark.parametrize("files", ["tokenizer.json", "tokenizer.model", "tokenizer.json tokenizer.model"])
def test_sentence_piece_ids_equal_the_original(files: str, tmp_path: Path) -> None:
    kind, options = MODELS["llama"]
    save_model(tmp_path, transformers_model(kind, options | {"vocab_size": 402}))
    original = save_sentence_piece(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        if name not in files:
            (tmp_path / name).unlink()
    with open_source(tmp_path) as source:
        metadata = source.metadata
    assert metadata["tokenizer.ggml.model"][0] == "llama"
    assert ("tokenizer.huggingface.json" in metadata) == ("json" in files)
    tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})
    for text in [*TEXTS, "  Copyright (c) licence granted"]:
        wanted = [1, *original.encode(text)] if text else [1]
        assert ids_without_json(metadata, text) == wanted, text
        assert tokenizer.encode(text, parse_special=True) == wanted, text


def test_the_metadata_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama 3 factors", max_shard_size="100KB")
    edit_json(
        tmp_path / "generation_config.json", temperature=0.6, top_p=0.9, top_k=40, eos_token_id=[2, 0], do_sample=True
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\nbase_model: some/model-1b\n---\n# A\n")
    with open_source(tmp_path) as source:
        metadata = plan_conversion(source, "bf16").metadata
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 40,
        "general.license": "mit",
        "general.base_model.0.organization": "some",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 3,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 280,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_ids": [2, 0],
    }
    assert {key: metadata[key][0] for key in wanted} == wanted
    assert metadata["general.languages"] == (["en"], "ARRAY[STRING]")
    assert "im_start" in metadata["tokenizer.chat_template"][0]
    types = metadata["tokenizer.ggml.token_type"][0]
    tokens = metadata["tokenizer.ggml.tokens"][0]
    assert types[tokens.index("<|im_end|>")] == 3
    assert types[tokens.index("<tool_call>")] == 4
    assert tokens[-1] == "[PAD279]"
    assert types[-1] == 5
