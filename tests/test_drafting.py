"""How a draft model of another vocabulary reads a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgellm.drafting import MAX_END, TextReading
from edgellm.formats.gguf import GGUFFile
from edgellm.tokenizer import Tokenizer

TEXTS = ["北京是中华人民共和国的首都，也是全国的政治中心。" * 12, "a(b,c[d]);" * 60, "The rivers run to the sea. " * 20]


@pytest.mark.parametrize("text", TEXTS, ids=["chinese", "code", "english"])
def test_a_draft_encodes_the_end_of_a_text_again_and_not_all_of_it(
    text: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(smollm2_path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    tokens, n_encoded, encode = tokenizer.encode(text, False), list[int](), TextReading._ids

    def counted(self: TextReading, some: Any) -> list[int]:
        n_encoded.append(len(some))
        return encode(self, some)

    monkeypatch.setattr(TextReading, "_ids", counted)
    reading = TextReading(tokenizer, tokenizer)
    kept: list[int] = []
    for n in range(len(tokens) // 2, len(tokens) + 1):
        found = reading.read(tokens[:n])
        assert found is not None
        ids, n_stable = found
        assert list(ids[: len(kept)]) == kept
        if not kept:
            n_encoded.clear()  # the first time it was all of it
        kept = list(ids[:n_stable])
    assert ids == tokens
    assert max(n_encoded) <= MAX_END + 1
