"""Official schemas of the protocols, as judges: those that ship with llm-comply, and the types of Ollama's client."""

from __future__ import annotations

import json
import os
import warnings
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonschema", reason="pip install jsonschema")
llm_comply = pytest.importorskip("llm_comply", reason="pip install llm-comply==0.5.0")
schema = pytest.importorskip("llm_comply.schema")

# OpenAI's names for what Open Responses calls response.reasoning.*, and of a part that it does not list
RENAMED = {
    "response.reasoning_text.delta": "response.reasoning.delta",
    "response.reasoning_text.done": "response.reasoning.done",
}


@lru_cache
def spec(name: str) -> Any:
    """``openresponses``, ``anthropic`` or ``openai_chat``."""
    return schema.SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / f"{name}.json"))


# Ollama's schemas, and the official client's types of the same bodies
OLLAMA_TYPES = {
    **{name: name for name in ("ChatResponse", "GenerateResponse", "ListResponse", "ShowResponse")},
    "ChatStreamEvent": "ChatResponse",
    "GenerateStreamEvent": "GenerateResponse",
    "PsResponse": "ProcessResponse",
    "EmbedResponse": "EmbedResponse",
    "EmbeddingsResponse": "EmbeddingsResponse",
}


@lru_cache
def ollama_spec() -> Any:
    """Ollama's docs/openapi.yaml, of which OLLAMA_OPENAPI names a copy; no package registry has it."""
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    loader = schema.SpecLoader()
    loader._spec = yaml.safe_load(Path(os.environ["OLLAMA_OPENAPI"]).read_text(encoding="utf-8"))
    loader._schemas = loader._spec["components"]["schemas"]
    return loader


def check_ollama(data: Any, name: str) -> None:
    """By the types of Ollama's own client, strictly; and by the document where there is a copy of it."""
    if os.environ.get("OLLAMA_OPENAPI") and name != "EmbeddingsResponse":  # superseded, and not in the document
        check(ollama_spec(), data, name)
    types = pytest.importorskip("ollama._types", reason="pip install ollama")
    read = getattr(types, OLLAMA_TYPES[name]).model_validate_json(json.dumps(data), strict=True)
    told = read.model_dump(by_alias=True, exclude_none=True)
    assert told.keys() & data.keys() and _stands_in(told, data), f"{name}: the client read {told}\nof {data}"


def _stands_in(read: Any, data: Any) -> bool:
    """Whether what a client read is what it was told; it may have been told more, and make a time of a text."""
    if isinstance(read, dict):
        return all(key in data and _stands_in(value, data[key]) for key, value in read.items())
    if isinstance(read, list | tuple):
        return len(read) == len(data) and all(map(_stands_in, read, data))
    return read == data or isinstance(read, datetime)


def check(loader: Any, data: Any, name: str) -> None:
    """Fails with what the schema of that name finds wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how llm-comply asks jsonschema
        faults = loader.validate(data, name)
    assert not faults, f"{name}: {faults}\n{json.dumps(data)[:2000]}"


def check_response_event(data: dict[str, Any]) -> None:
    """An event of /v1/responses."""
    kind = RENAMED.get(data["type"], data["type"])
    check(spec("openresponses"), {**data, "type": kind}, schema.SSE_EVENT_TO_SCHEMA[kind])


def sse(chunks: list[bytes]) -> list[dict[str, Any]]:
    """The data of server-sent events; each one's name is its type."""
    found = []
    for part in b"".join(chunks).decode().split("\n\n"):
        if part.startswith("event: "):
            name, _, data = part.removeprefix("event: ").partition("\ndata: ")
            found.append(json.loads(data))
            assert found[-1]["type"] == name
    return found
