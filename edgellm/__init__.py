"""Run GGUF language models on the machine you have.

    import edgellm

    with edgellm.load("smollm2") as llm:
        for chunk in llm.stream([{"role": "user", "content": "Why is the sky blue?"}]):
            print(chunk.text, end="", flush=True)

Importing this takes a few milliseconds: the names below bring what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.chat_template import ChatTemplate, Message
    from edgellm.conversation import Conversation
    from edgellm.engine.requests import Timings
    from edgellm.formats.errors import (
        ClosedError,
        ContextFullError,
        DownloadError,
        EdgeLLMError,
        FormatError,
        MemoryWouldExceedError,
        ModelNotFoundError,
        NumericError,
        ParameterError,
        TemplateError,
        UnsupportedError,
    )
    from edgellm.formats.gguf import GGUFFile
    from edgellm.generation import Generation, GenerationChunk, TokenLogprob
    from edgellm.llm import LLM, load
    from edgellm.measure.scoring import TextScore
    from edgellm.sampling import SamplingParams
    from edgellm.tokenizer import Tokenizer

# public name -> the module that defines it
_HOMES = {
    "LLM": "llm",
    "load": "llm",
    "Conversation": "conversation",
    "Generation": "generation",
    "GenerationChunk": "generation",
    "TokenLogprob": "generation",
    "Timings": "engine.requests",
    "SamplingParams": "sampling",
    "TextScore": "measure.scoring",
    "Message": "chat_template",
    "ChatTemplate": "chat_template",
    "Tokenizer": "tokenizer",
    "GGUFFile": "formats.gguf",
    "EdgeLLMError": "formats.errors",
    "ClosedError": "formats.errors",
    "ContextFullError": "formats.errors",
    "DownloadError": "formats.errors",
    "FormatError": "formats.errors",
    "MemoryWouldExceedError": "formats.errors",
    "ModelNotFoundError": "formats.errors",
    "NumericError": "formats.errors",
    "ParameterError": "formats.errors",
    "TemplateError": "formats.errors",
    "UnsupportedError": "formats.errors",
}

__all__ = [
    "LLM",
    "ChatTemplate",
    "ClosedError",
    "ContextFullError",
    "Conversation",
    "DownloadError",
    "EdgeLLMError",
    "FormatError",
    "GGUFFile",
    "Generation",
    "GenerationChunk",
    "MemoryWouldExceedError",
    "Message",
    "ModelNotFoundError",
    "NumericError",
    "ParameterError",
    "SamplingParams",
    "TemplateError",
    "TextScore",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "UnsupportedError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgellm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"edgellm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
