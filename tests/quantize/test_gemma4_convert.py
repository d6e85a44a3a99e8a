"""Gemma 4 without an encoder of pictures, by the names of its published classes: the text is that of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_folders import save_byte_level
from test_checkpoint_config import converted_logits
from test_checkpoint_convert import TOKENS, VOCAB
from test_models import GEMMA4, GEMMA4_WIDE, SMALL, nmse

torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
transformers = pytest.importorskip("transformers", reason="the judge of logits is transformers")

OPTIONS = SMALL | GEMMA4 | GEMMA4_WIDE | {"num_hidden_layers": 6} | VOCAB
del OPTIONS["hidden_size_per_layer_input"]


@pytest.mark.parametrize("sees", [False, True])
def test_the_text_of_a_unified_gemma_4_is_transformers(sees: bool, tmp_path: Path) -> None:
    config = transformers.Gemma4UnifiedTextConfig(**OPTIONS, attn_implementation="eager")
    make = transformers.Gemma4UnifiedForCausalLM
    if sees:
        config = transformers.Gemma4UnifiedConfig(text_config=config)
        make = transformers.Gemma4UnifiedForConditionalGeneration
    torch.manual_seed(1)
    model = make(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-0.2, 0.2) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()
    save_byte_level(tmp_path)
    model.save_pretrained(tmp_path)
    assert nmse(converted_logits(tmp_path), expected) <= 1e-10
