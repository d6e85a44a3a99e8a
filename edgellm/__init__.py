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

# module -> the public names that it defines
_HOMES = {
    "llm": "LLM load",
    "conversation": "Conversation",
    "generation": "Generation GenerationChunk TokenLogprob",
    "engine.requests": "Timings",
    "sampling": "SamplingParams",
    "measure.scoring": "TextScore",
    "chat_template": "ChatTemplate Message",
    "tokenizer": "Tokenizer",
    "formats.gguf": "GGUFFile",
    "formats.errors": "ClosedError ContextFullError DownloadError EdgeLLMError FormatError MemoryWouldExceedError "
    "ModelNotFoundError NumericError ParameterError TemplateError UnsupportedError",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

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
    if name not in _HOME_OF:
        raise AttributeError(f"module 'edgellm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"edgellm.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
