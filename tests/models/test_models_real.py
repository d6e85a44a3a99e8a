"""The two real models against transformers, which reads the same GGUF file and runs it in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

N_TOKENS = 96
TEXT = """A program is free software if users have all of these freedoms: to run it as they wish, to study how it works
and change it, to give copies to others, and to publish what they have changed. Numbers such as 1984 or 3.14159, 名前,
and a few lines of code may stand in it:

    def area(radius: float) -> float:
        return 3.14159 * radius ** 2  # not exact
"""


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma_path"])
def test_logits_of_a_real_model_equal_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the judge of logits is transformers")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read a GGUF file")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(**where)(TEXT)["input_ids"][:N_TOKENS]
    assert len(tokens) == N_TOKENS
    with torch.no_grad():
        judge = model(torch.tensor([tokens])).logits[0].numpy().astype(np.float64)
    del model
    with GGUFFile.open(path) as gguf:
        executor = ReferenceExecutor(build_program(gguf))
        logits = executor.run(Batch.single(executor.program, tokens))
        executor.close()
    assert ((logits - judge) ** 2).sum() / (judge**2).sum() <= 1e-9
    assert (logits.argmax(axis=1) == judge.argmax(axis=1)).all()
