"""What is wrong with the tokenizer of a model file, for ``edgellm verify``: it is built, as a load would build it."""

from __future__ import annotations

from pathlib import Path

from edgellm.formats.errors import EdgeLLMError, UnsupportedError
from edgellm.formats.findings import REBUILD, Finding
from edgellm.formats.gguf import GGUFFile
from edgellm.tokenizer.marks import is_text_piece, named_ids
from edgellm.tokenizer.tokenizer import Tokenizer
from edgellm.tokenizer.vocabulary import TokenType

TEXTS = ("a" * 1000, " " * 1000, "The quick brown fox, 12345 \n\n\u00e9\u4e2d\U0001f917 <|im_end|></s>")


def tokenizer_findings(path: str | Path) -> list[Finding]:
    """The error that a load would end with, or warnings; nothing for a file without a vocabulary of text."""
    with GGUFFile.open(path) as gguf:
        if "tokenizer.ggml.model" not in gguf.metadata:
            return []
        try:
            tokenizer = Tokenizer.from_gguf(gguf.metadata, proved=True)
            for text in TEXTS:
                tokenizer.encode(text)
        except UnsupportedError as error:  # nothing is wrong with the file
            return [Finding(error.code, str(error), "", Path(path).name, severity="warning", unsupported=True)]
        except EdgeLLMError as error:
            return [Finding(error.code, str(error), "", Path(path).name)]
    vocabulary = tokenizer.vocabulary
    found = []
    for token_id in sorted(named_ids(vocabulary, tokenizer.special)):
        about = f"the token {vocabulary.tokens[token_id]!r} (id {token_id}) ends or begins a text"
        if is_text_piece(vocabulary, token_id):
            message = f"{about}, and is the only way to write this character: a user's text becomes it too"
        elif vocabulary.types[token_id] in (TokenType.UNDEFINED, TokenType.NORMAL):
            message = f"{about} and has the type of a piece of text; it is taken for a control token"
        else:
            continue
        found.append(Finding("VOCAB_SPECIAL_ID", message, REBUILD, Path(path).name, severity="warning"))
    return found
