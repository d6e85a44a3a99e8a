"""Official schemas of the protocols, as judges: those that ship with llm-comply, and Ollama's OpenAPI document."""

from __future__ import annotations

import json
import os
import warnings
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


@lru_cache
def ollama_spec() -> Any:
    """Ollama's docs/openapi.yaml, where OLLAMA_OPENAPI names a copy of it."""
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    path = os.environ.get("OLLAMA_OPENAPI")
    if not path:
        pytest.skip("OLLAMA_OPENAPI names no copy of Ollama's docs/openapi.yaml")
    loader = schema.SpecLoader()
    loader._spec = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    loader._schemas = loader._spec["components"]["schemas"]
    return loader


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
