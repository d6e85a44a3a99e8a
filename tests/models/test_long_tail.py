"""More of the long tail: what edgellm's converter makes of a checkpoint against transformers, and beside llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import save_byte_level, save_model
from long_tail_models import ALIKE, CONVERTED, rename_checkpoint
from test_gguf_writer import llama_cpp_text
from test_models import nmse, transformers_logits, transformers_model

import edgellm
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input

VOCAB = {"vocab_size": 280}
TOKENS = np.random.default_rng(0).integers(0, 270, 60).tolist()
APART = ("ernie4_5-moe every other layer, biases",)
"""What llama.cpp loads otherwise, or has another curve for."""


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
    assert nmse(logits, transformers_logits(model, TOKENS)) <= 1e-10


def test_llama_cpp_and_edgellm_read_the_same_model(converted: tuple[str, Any, Path]) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")
    name, _, path = converted
    if name in APART:
        pytest.skip("llama.cpp computes another curve")
    with edgellm.load(path, executor="reference") as llm:
        text = llm.generate("the and", max_tokens=12, temperature=0)
    text = re.sub(r"\[PAD\d+\]", "", str(text))  # names of tokens that the tokenizer does not have: not shown there
    assert llama_cpp_text(path) == f"TEXT {text!a}"
