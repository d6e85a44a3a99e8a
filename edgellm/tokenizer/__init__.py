"""Tokenizers from the metadata of a GGUF file: ``Tokenizer.from_gguf`` and ``StreamDecoder``."""

from edgellm.tokenizer.stream_decoder import StreamDecoder
from edgellm.tokenizer.tokenizer import Tokenizer
from edgellm.tokenizer.vocabulary import TokenType

__all__ = ["StreamDecoder", "TokenType", "Tokenizer"]
