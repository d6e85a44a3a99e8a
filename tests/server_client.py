"""A server over a model, asked in process: what the tests of protocols share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs its extra: pip install edgellm[server]")
pytest.importorskip("msgspec", reason="the server needs its extra: pip install edgellm[server]")
pytest.importorskip("httpx2", reason="starlette's client needs it: pip install httpx2")

from conftest import real_model
from starlette.testclient import TestClient

from edgellm.llm import LLM
from edgellm.loading import LoadOptions
from edgellm.measure.model_card import ModelCard
from edgellm.server.app import App
from edgellm.server.models import ModelEntry, ModelFacts, Models
from edgellm.server.server import Server


def entry() -> ModelEntry:
    """SmolLM2 under its name."""
    return ModelEntry(("smollm2",), real_model("smollm2", "smollm2.gguf"))


CARD = ModelCard(
    *(Path("scripted.gguf"), "Scripted", "scripted", "1K", 1000, 4000, "F32", {}),
    *(1, 8, 1, 1, 8192, "gpt2", None, 49152, None, None, {}),
)
SCRIPTED = ModelFacts(CARD, 8192, 1 << 20)


def scripted_server(llm: LLM, **options: Any) -> Server:
    """A server whose one model, ``scripted``, is already there."""
    one = ModelEntry(("scripted",), llm.path, llm=llm, facts=SCRIPTED)
    return Server(Models([one], load=lambda _: llm), **options)


@contextmanager
def client_of(server: Server) -> Iterator[TestClient]:
    """A client of it; errors of handlers are responses."""
    with TestClient(App(server), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def real_server() -> Server:
    """SmolLM2, loaded by the first request."""
    return Server(Models([entry()], LoadOptions(n_ctx=2048, n_parallel=4)))


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last one of OpenAI's is "[DONE]"."""
    datas = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]
