"""Tokenizers from the metadata of a GGUF file: ``Tokenizer.from_gguf`` and ``StreamDecoder``."""

from .stream_decoder import StreamDecoder
from .tokenizer import Tokenizer
from .vocabulary import TokenType

__all__ = ["StreamDecoder", "TokenType", "Tokenizer"]
