"""Embedding and rerank endpoints: the protocols' shapes, the makers' clients as judges, and broken requests."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from served import served
from server_client import client_of
from starlette.testclient import TestClient
from test_malformed_requests import FIELD, NO_JSON, N, broken
from tiny_encoders import random_bert, write_bert
from tiny_models import write_tiny_model
from wire_schemas import check_ollama

import edgellm
from edgellm.server.app import App
from edgellm.server.models import CHATS, RERANKERS, VECTOR_MODELS, ModelEntry, Models
from edgellm.server.protocols import embeddings as protocol
from edgellm.server.server import Server

TEXTS = ["the quick brown fox", "a lazy dog"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Tiny models: one for embeddings, one for scores, one for chats, one that pools nothing."""
    folder = tmp_path_factory.mktemp("models")
    ranker = random_bert("BertForSequenceClassification", num_labels=1, max_position_embeddings=64)
    paths = {
        "bert": write_bert(folder / "bert.gguf", random_bert(max_position_embeddings=64)),
        "ranker": write_bert(folder / "ranker.gguf", ranker, 4),
        "chat": write_tiny_model(folder / "chat.gguf", "qwen3"),
        "rows": write_bert(folder / "rows.gguf", random_bert(max_position_embeddings=64), 0),
    }
    return Server(Models([ModelEntry((name,), path) for name, path in paths.items()]))


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def vectors(server: Server) -> np.ndarray:
    """What the library gives."""
    with edgellm.load(server.models.names() and server.models._given["bert"].path) as llm:  # type: ignore[index]
        found: np.ndarray = llm.embed(TEXTS)
        return found


def test_openais_form_in_floats_and_base64(client: TestClient, vectors: np.ndarray) -> None:
    for form in ("float", "base64", None):
        body = {"model": "bert", "input": TEXTS} | ({"encoding_format": form} if form else {})
        told = client.post("/v1/embeddings", json=body).json()
        assert told["object"] == "list" and told["model"] == "bert"
        assert told["usage"] == {"prompt_tokens": 11, "total_tokens": 11}
        assert [(one["object"], one["index"]) for one in told["data"]] == [("embedding", 0), ("embedding", 1)]
        given = [one["embedding"] for one in told["data"]]
        if form == "base64":
            given = [np.frombuffer(base64.b64decode(one), "<f4") for one in given]
        assert np.array_equal(np.array(given, np.float32), vectors)


def test_tokens_dimensions_and_a_single_text(client: TestClient, vectors: np.ndarray) -> None:
    ids = client.post("/tokenize", json={"model": "bert", "content": TEXTS[0], "add_special": True}).json()["tokens"]
    for given in (TEXTS[0], [TEXTS[0]], ids, [ids]):
        told = client.post("/v1/embeddings", json={"model": "bert", "input": given}).json()
        assert np.array_equal(np.float32(told["data"][0]["embedding"]), vectors[0]), given
    cut = client.post("/v1/embeddings", json={"model": "bert", "input": "a", "dimensions": 8}).json()["data"][0]
    assert len(cut["embedding"]) == 8 and np.isclose(np.linalg.norm(cut["embedding"]), 1)
    chat = client.post("/v1/embeddings", json={"model": "chat", "input": "a"}).json()["data"][0]
    assert np.isclose(np.linalg.norm(chat["embedding"]), 1, atol=1e-5)


def test_what_cannot_be_embedded_is_refused_by_name(client: TestClient) -> None:
    long = "the quick brown fox " * 40
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": long}, "truncate"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": [10**6]}, "vocabulary"),
        ({"input": "a", "dimensions": 9999}, "dimensions"),
        ({"input": "a", "model": "ranker"}, "scores"),
        ({"input": "a", "model": "nobody"}, "model"),
    ]
    for more, word in cases:
        reply = client.post("/v1/embeddings", json={"model": "bert"} | more)
        assert 400 <= reply.status_code < 500 and word in reply.json()["error"]["message"], (more, reply.text)
    too_long = client.post("/v1/embeddings", json={"model": "bert", "input": long}).json()["error"]
    assert (too_long["code"], too_long["n_ctx"]) == ("context_length_exceeded", 64)
    assert client.post("/v1/embeddings", json={"model": "bert", "input": long, "truncate": True}).status_code == 200


def test_a_reply_has_so_many_texts_and_numbers_at_most(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    places = (("/v1/embeddings", "input"), ("/embedding", "content"), ("/api/embed", "input"))
    for path, field in places:
        reply = client.post(path, json={"model": "bert", field: ["a"] * (protocol.MAX_TEXTS + 1)})
        assert reply.status_code == 400 and field in reply.text, reply.text
    monkeypatch.setattr(protocol, "MAX_NUMBERS", 3 * 48)
    for path, field in places:
        assert client.post(path, json={"model": "bert", field: ["a"] * 3}).status_code == 200
        reply = client.post(path, json={"model": "bert", field: ["a"] * 4})
        assert reply.status_code == 400 and "192 numbers" in reply.text, reply.text
    cut = {"model": "bert", "input": ["a"] * 4, "dimensions": 8}
    assert client.post("/v1/embeddings", json=cut).status_code == client.post("/api/embed", json=cut).status_code == 200
    for texts, status in (("a", 200), (["a", "a"], 400)):  # three tokens each
        assert client.post("/embedding", json={"model": "rows", "content": texts}).status_code == status
    ids = client.post("/v1/embeddings", json={"model": "bert", "input": [7] * (protocol.MAX_TEXTS + 1)})
    assert ids.json()["error"]["code"] == "context_length_exceeded", "tokens are counted as texts"


def test_a_file_that_pools_nothing_gives_rows_and_no_vectors(client: TestClient, vectors: np.ndarray) -> None:
    for path, field in (("/v1/embeddings", "input"), ("/api/embed", "input"), ("/api/embeddings", "prompt")):
        reply = client.post(path, json={"model": "rows", field: TEXTS[0]})
        assert reply.status_code == 400 and "model: its file" in reply.text, reply.text
    told = client.post("/embedding", json={"model": "rows", "content": TEXTS, "embd_normalize": -1}).json()
    means = np.array([np.mean(one["embedding"], axis=0) for one in told])
    assert np.allclose(means / np.linalg.norm(means, axis=1, keepdims=True), vectors, atol=1e-5)


def test_who_names_no_model_gets_one_of_the_right_kind(client: TestClient, server: Server) -> None:
    for kinds, name in ((CHATS, "chat"), (VECTOR_MODELS, "bert"), (RERANKERS, "ranker"), ((), "bert")):
        assert asyncio.run(server.models.find(None, kinds)).name == name
    assert client.post("/v1/embeddings", json={"input": "a"}).json()["model"] == "bert"
    assert client.post("/rerank", json={"query": "a", "documents": ["b"]}).json()["model"] == "ranker"
    told = {one["name"]: one["capabilities"] for one in client.get("/v1/models").json()["models"]}
    assert told == {"bert": ["embedding"], "ranker": ["rerank"], "chat": ["completion"], "rows": ["embedding"]}
    only = Models([ModelEntry(("bert",), server.models._given["bert"].path)])  # type: ignore[index]
    assert asyncio.run(only.find(None)).name == "bert"


def test_llama_servers_own_form(client: TestClient, vectors: np.ndarray) -> None:
    for path in ("/embedding", "/embeddings"):
        for field in ("content", "input"):
            told = client.post(path, json={"model": "bert", field: TEXTS}).json()
            assert [one["index"] for one in told] == [0, 1]
            assert np.array_equal(np.float32([one["embedding"][0] for one in told]), vectors)
    body = {"model": "bert", "content": "a"}
    told = {n: client.post("/embedding", json=body | {"embd_normalize": n}).json() for n in (-1, 0, 1, 2)}
    rows = {n: np.array(of_text[0]["embedding"]) for n, of_text in told.items()}
    assert np.isclose(np.abs(rows[0]).max(), 32760) and np.isclose(np.abs(rows[1]).sum(), 1)
    assert np.allclose(rows[-1] / np.linalg.norm(rows[-1]), rows[2], atol=1e-6)


def test_rerank_in_the_forms_of_jina_and_of_text_embeddings_inference(client: TestClient) -> None:
    documents = ["paris", "a lazy dog", "rivers run to the sea"]
    for path in ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"):
        body = {"model": "ranker", "query": "what is the capital of france?", "documents": documents}
        told = client.post(path, json=body).json()
        scores = [one["relevance_score"] for one in told["results"]]
        assert scores == sorted(scores, reverse=True) and {one["index"] for one in told["results"]} == {0, 1, 2}
        assert told["model"] == "ranker" and told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] > 20
    body |= {"documents": [{"text": text} for text in documents], "top_n": 2, "return_documents": True}
    two = client.post("/v1/rerank", json=body).json()["results"]
    assert [one["relevance_score"] for one in two] == scores[:2]
    assert [one["document"]["text"] for one in two] == [documents[one["index"]] for one in two]
    body = {"model": "ranker", "query": "what is the capital of france?", "texts": documents, "return_text": True}
    assert [one["score"] for one in client.post("/rerank", json=body).json()] == scores
    for more, word in (
        ({"documents": documents}, "documents"),
        ({"texts": []}, "texts"),
        ({"model": "bert"}, "classifier"),
        *(
            ({field: value}, field)
            for field, value in {
                "truncation_direction": "left", "max_tokens_per_doc": 9, "max_chunks_per_doc": 1,
                "rank_fields": ["title"], "raw_scores": False,
            }.items()
        ),
    ):  # fmt: skip
        reply = client.post("/rerank", json=body | more)
        assert reply.status_code == 400 and word in reply.json()["error"]["message"]


def test_ollamas_forms(client: TestClient, vectors: np.ndarray) -> None:
    told = client.post("/api/embed", json={"model": "bert", "input": TEXTS, "keep_alive": "5m"}).json()
    assert np.array_equal(np.float32(told["embeddings"]), vectors)
    assert told["prompt_eval_count"] == 11 and told["total_duration"] >= told["load_duration"] >= 0
    assert client.post("/api/embed", json={"model": "bert:latest", "input": ""}).json()["embeddings"] == []
    long = "the quick brown fox " * 40
    assert client.post("/api/embed", json={"model": "bert", "input": long}).status_code == 200
    refused = client.post("/api/embed", json={"model": "bert", "input": long, "truncate": False})
    assert refused.status_code == 400 and "64" in refused.json()["error"]
    check_ollama(told, "EmbedResponse")
    nothing = client.post("/api/embed", json={"model": "bert"})
    assert (nothing.status_code, nothing.json()["embeddings"]) == (200, [])
    whole = client.post("/api/embed", json={"model": "bert", "input": TEXTS, "dimensions": 9999}).json()["embeddings"]
    assert np.array_equal(np.float32(whole), vectors)
    told = client.post("/api/embeddings", json={"model": "bert", "prompt": TEXTS[0]}).json()
    check_ollama(told, "EmbeddingsResponse")
    one = told["embedding"]
    assert np.allclose(one / np.linalg.norm(one), vectors[0], atol=1e-6)
    shown = client.post("/api/show", json={"model": "bert"}).json()
    assert shown["capabilities"] == ["embedding"]


def test_chats_with_a_model_for_embeddings_are_refused_with_a_word(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": messages, "max_tokens": 4}),
        ("/completion", {"prompt": "Hi"}),
        ("/api/chat", {"messages": messages, "stream": False}),
        ("/api/generate", {"prompt": "Hi", "stream": False}),
    ):
        reply = client.post(path, json={"model": "bert", **body})
        assert reply.status_code == 400 and "use embed" in reply.text, (path, reply.text)


def test_openais_and_ollamas_clients(server: Server, vectors: np.ndarray) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    ollama = pytest.importorskip("ollama", reason="pip install ollama")
    with served(server) as url:
        for options in ({}, {"encoding_format": "float"}):
            # what it asks for by itself is base64, which its strict form takes for a mistake
            strict = bool(options)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=strict)
            found = client.embeddings.create(model="bert", input=TEXTS, **options)
            assert np.array_equal(np.float32([one.embedding for one in found.data]), vectors)
            assert found.usage.prompt_tokens == 11
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="bert", input="a", dimensions=4096)
        local = ollama.Client(host=url)
        assert np.array_equal(np.float32(local.embed("bert", TEXTS).embeddings), vectors)
        assert len(local.embeddings("bert", TEXTS[0]).embedding) == 48
        with pytest.raises(ollama.ResponseError, match="64"):
            local.embed("bert", "the fox " * 99, truncate=False)


VALID: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "bert", "input": ["a", "b"], "encoding_format": "float", "dimensions": 8, "user": "x"},
    "/embedding": {"model": "bert", "content": ["a", [2, 7, 3]], "embd_normalize": 1},
    "/v1/rerank": {"model": "ranker", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    "/rerank": {"model": "ranker", "query": "a", "texts": ["b", "c"], "return_text": True},
    "/api/embed": {"model": "bert", "input": ["a", "b"], "truncate": True, "dimensions": 8, "keep_alive": "5m"},
    "/api/embeddings": {"model": "bert", "prompt": "a", "keep_alive": 60},
}


@pytest.mark.parametrize("path", VALID)
def test_broken_fields_are_named_and_never_the_servers_fault(path: str, client: TestClient) -> None:
    chance, refused = random.Random(path), 0
    headers = {"content-type": "application/json"}
    assert client.post(path, json=VALID[path]).status_code == 200
    for _ in range(N):
        body, where = broken(VALID[path], chance)
        reply = client.post(path, content=json.dumps(body), headers=headers)
        assert reply.status_code < 500, (where, reply.text)
        if reply.status_code == 200:
            continue
        refused += 1
        error = reply.json()["error"]
        said = error if isinstance(error, str) else error["message"]
        about = {"texts": "documents", "content": "input"}.get(where[0], where[0])  # one stands for the other
        assert (named := FIELD.match(said)) and (where[0] in named[0] or about in named[0]), (where, said)
    assert refused > N // 4
    for raw in NO_JSON:
        assert client.post(path, content=raw, headers=headers).status_code == 400, raw[:20]
    assert client.get(path).status_code == 405


def test_the_document_describes_the_bodies(server: Server) -> None:
    from edgellm.server.openapi import document

    told = document(App(server).routes())
    body = told["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    named = told["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert "oneOf" in json.dumps(named["properties"]["input"]) and {"/v1/rerank", "/api/embed"} <= told["paths"].keys()
