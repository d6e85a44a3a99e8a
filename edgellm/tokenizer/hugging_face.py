"""A file's own ``tokenizer.huggingface.json``: the model's original tokenizer, carried whole."""

import json

from tokenizers import Tokenizer

from edgellm.formats.errors import FormatError
from edgellm.tokenizer.vocabulary import TokenType, Vocabulary

KEY = "tokenizer.huggingface.json"


class HuggingFaceJson:
    """Text to ids by the tokenizer that the file carries as JSON."""

    add_space_prefix = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        control = {vocabulary.tokens[i] for i in vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)}
        try:
            description = json.loads(vocabulary.metadata[KEY])
            added = description.get("added_tokens", [])
            # control tokens are recognised before this tokenizer sees the text, or not at all
            description["added_tokens"] = [token for token in added if token["content"] not in control]
            description["truncation"] = description["padding"] = None
            self._tokenizer = Tokenizer.from_str(json.dumps(description))
            highest = max(self._tokenizer.get_vocab().values(), default=0)
        except Exception as error:  # the library raises a bare Exception, or its own panic, for what it cannot read
            raise _unreadable(str(error)) from error
        if highest >= vocabulary.n_vocab:
            raise _unreadable(f"it has id {highest}, the file's vocabulary ends at {vocabulary.n_vocab - 1}")
        self._tokenizer.encode_special_tokens = True  # special tokens it still lists are plain text

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _unreadable(reason: str) -> FormatError:
    return FormatError(
        f"{KEY} in the file cannot be used: {reason}. Expected the JSON of a Hugging Face tokenizer for this "
        f"vocabulary. Leave it out with --override-kv {KEY}=str: to use the GGUF vocabulary itself.",
        code="VOCAB_INVALID",
    )
