"""Adapters behind the server: llama-server's endpoints and field, and names of models as vLLM has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_files import ATTENTION, lora_pairs, write_lora
from server_client import client_of
from starlette.testclient import TestClient
from tiny_models import write_tiny_model

from edgellm.adapters.loading import AdapterChoice
from edgellm.loading import LoadOptions
from edgellm.server.models import ModelEntry, Models
from edgellm.server.server import Server


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("served")
    model = write_tiny_model(folder / "tiny.gguf", "llama", "Q8_0", n_embd=64, n_ff=64, head_dim=32)
    choices = []
    for seed, name in enumerate(("one", "two")):
        file = write_lora(folder / f"{name}.gguf", lora_pairs(model, ATTENTION, seed=seed, size=0.4))
        choices.append(AdapterChoice(file, "", 0.0))
    options = LoadOptions(n_ctx=256, n_threads=2, n_parallel=4, lora=tuple(choices))
    with client_of(Server(Models([ModelEntry(("tiny",), model)], options))) as client:
        yield client


def complete(client: TestClient, path: str = "/completion", **body: Any) -> str:
    asked = {"prompt": "The rivers run", "n_predict": 12, "temperature": 0, "ignore_eos": True, **body}
    reply = client.post(path, json=asked)
    assert reply.status_code == 200, reply.text
    data = reply.json()
    return str(data["choices"][0]["text"] if "choices" in data else data["content"])


def chat(client: TestClient, **body: Any) -> str:
    asked = {"messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 12, "temperature": 0, **body}
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_adapters_are_listed_and_their_scales_are_set_for_answers_that_choose_none(client: TestClient) -> None:
    listed = client.get("/lora-adapters").json()
    assert [(one["id"], one["path"], one["scale"]) for one in listed] == [(0, "one.gguf", 0.0), (1, "two.gguf", 0.0)]
    plain, chosen = complete(client), complete(client, lora=[{"id": 1, "scale": 1.0}])
    assert plain != chosen
    assert client.post("/lora-adapters", json=[{"id": 1, "scale": 1.0}]).json() == {"success": True}
    assert [one["scale"] for one in client.get("/lora-adapters").json()] == [0.0, 1.0]
    assert complete(client) == chosen
    assert complete(client, lora=[]) == plain
    assert client.post("/lora-adapters", json=[]).json() == {"success": True}
    assert complete(client) == plain


def test_scales_that_were_set_outlive_the_loaded_model(client: TestClient) -> None:
    plain, chosen = complete(client), complete(client, lora=[{"id": 1, "scale": 1.0}])
    assert client.post("/lora-adapters", json=[{"id": 1, "scale": 1.0}]).json() == {"success": True}
    assert client.post("/api/generate", json={"model": "tiny", "keep_alive": 0}).json()["done_reason"] == "unload"
    assert [one["scale"] for one in client.get("/lora-adapters").json()] == [0.0, 1.0]
    assert complete(client) == chosen
    assert client.post("/lora-adapters", json=[]).json() == {"success": True}
    assert client.post("/api/generate", json={"model": "tiny", "keep_alive": 0}).json()["done_reason"] == "unload"
    assert complete(client) == plain


def test_a_request_names_adapters_by_field_or_by_the_name_of_the_model(client: TestClient) -> None:
    by_id = [{"id": 0, "scale": 1.0}]
    for path in ("/completion", "/v1/completions"):
        assert complete(client, path, model="tiny:one") == complete(client, path, lora=by_id) != complete(client, path)
        assert complete(client, path, model="tiny:one", lora=[]) == complete(client, path), "the field counts more"
    assert chat(client, model="tiny:two") == chat(client, lora=[{"id": 1, "scale": 1.0}]) != chat(client)
    listed = client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", "tiny:one", "tiny:two"]
    assert listed["data"][1]["parent"] == "tiny"
    assert client.get("/v1/models/tiny:two").json()["id"] == "tiny:two"
    assert client.get("/v1/models/tiny:three").status_code == 404


def test_the_name_of_an_adapter_means_the_scale_that_it_was_loaded_with(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", "llama", "Q8_0", n_embd=64, n_ff=64, head_dim=32)
    file = write_lora(tmp_path / "one.gguf", lora_pairs(model, ATTENTION, size=0.4))
    for number, (choice, expected) in enumerate(
        (
            (AdapterChoice(file, "one", 0.4), 0.4),
            (AdapterChoice(file, "one", 0.4, idle=True), 0.4),
            (AdapterChoice(file, "one", 0.0), 1.0),
            (AdapterChoice(file, "a:b", -2.0), -2.0),
        )
    ):
        options = LoadOptions(n_ctx=256, n_threads=2, lora=(choice,))
        models = Models([ModelEntry(("tiny", "own:tiny"), model)], options)
        for name in ("tiny", "own:tiny"):
            assert models.scales_of(f"{name}:{choice.own_name}") == {choice.own_name: expected}
            assert models.scales_of(name) is models.scales_of(f"{name}:two") is None
        if number:  # the models have all that is looked at in answers
            continue
        with client_of(Server(models)) as client:
            named, half, whole = (
                complete(client, model="tiny:one"),
                *(complete(client, lora=[{"id": 0, "scale": scale}]) for scale in (0.4, 1.0)),
            )
            assert named == half != whole


VECTORS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/embeddings": ({"input": "Rivers"}, "data"),
    "/embedding": ({"content": "Rivers"}, ""),
    "/api/embed": ({"input": "Rivers"}, "embeddings"),
    "/api/embeddings": ({"prompt": "Rivers"}, "embedding"),
}


@pytest.mark.parametrize("path", VECTORS)
def test_vectors_of_a_model_with_an_adapter_are_its_own(client: TestClient, path: str) -> None:
    body, key = VECTORS[path]

    def vectors(name: str) -> Any:
        reply = client.post(path, json={"model": name, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()[key] if key else reply.json()

    plain, adapted = vectors("tiny"), vectors("tiny:one")
    assert client.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}]).json() == {"success": True}
    assert vectors("tiny") == adapted != plain
    assert client.post("/lora-adapters", json=[]).json() == {"success": True}
    assert vectors("tiny") == plain


@pytest.mark.parametrize("kind", ["chat", "prompt", "raw"])
def test_ollamas_protocol_answers_with_the_adapter_of_the_name(client: TestClient, kind: str) -> None:
    def text(name: str) -> str:
        asked: dict[str, Any] = {"model": name, "stream": False, "options": {"temperature": 0, "num_predict": 12}}
        if kind == "chat":
            asked["messages"] = [{"role": "user", "content": "Rivers?"}]
        else:
            asked |= {"prompt": "The rivers run", "raw": kind == "raw"}
        reply = client.post("/api/chat" if kind == "chat" else "/api/generate", json=asked)
        assert reply.status_code == 200, reply.text
        told = reply.json()
        return str(told["message"]["content"] if kind == "chat" else told["response"])

    assert text("tiny:one") == text("tiny:one:latest") != text("tiny") == text("tiny:latest")


def test_likelihoods_of_a_prompt_are_those_with_the_adapter(client: TestClient) -> None:
    body = {"prompt": "The rivers run", "max_tokens": 0, "echo": True, "logprobs": 1}
    plain, adapted, again = (
        client.post("/v1/completions", json=body | more).json()["choices"][0]["logprobs"]["token_logprobs"]
        for more in ({}, {"model": "tiny:one"}, {"lora": [{"id": 0, "scale": 1.0}]})
    )
    assert plain != adapted == again


TOO_MUCH: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": "The rivers run", "n_predict": 4},
    "/v1/completions": {"prompt": "The rivers run", "max_tokens": 0, "echo": True, "logprobs": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 4},
    "/v1/embeddings": {"input": "The rivers run"},
}


def test_scales_beyond_what_the_model_can_compute_are_an_error_of_whoever_gave_them(
    client: TestClient, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, far = complete(client), [{"id": 0, "scale": 1e4}]
    for path, body in TOO_MUCH.items():
        own = path != "/v1/embeddings"
        assert client.post("/lora-adapters", json=[] if own else far).status_code == 200
        reply = client.post(path, json=body | ({"lora": far} if own else {}))
        assert reply.status_code == 400, reply.text
        assert "lora: with adapters of the scales 10000, 0" in reply.text, path
    assert client.post("/lora-adapters", json=[]).status_code == 200
    assert complete(client) == plain
    assert "Traceback" not in capfd.readouterr().err


WRONG: dict[str, tuple[str, Any, str]] = {
    "unknown id": ("/completion", {"prompt": "a", "lora": [{"id": 2, "scale": 1.0}]}, "no adapter 2"),
    "twice": ("/completion", {"prompt": "a", "lora": [{"id": 0, "scale": 1}, {"id": 0, "scale": 2}]}, "named twice"),
    "far out": ("/completion", {"prompt": "a", "lora": [{"id": 0, "scale": 1e9}]}, "lora"),
    "a path": ("/completion", {"prompt": "a", "lora": [{"id": 0, "scale": 1, "path": "/etc/passwd"}]}, "path"),
    "a name": ("/completion", {"prompt": "a", "lora": "one"}, "lora"),
    "not a list": ("/lora-adapters", {"id": 0, "scale": 1.0}, "id"),
    "a list of numbers": ("/lora-adapters", [1], "adapters"),
    "unknown id to be set": ("/lora-adapters", [{"id": 7, "scale": 1.0}], "no adapter 7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_choice_is_refused_with_its_field(client: TestClient, case: str) -> None:
    path, body, message = WRONG[case]
    reply = client.post(path, json=body)
    assert reply.status_code == 400
    assert message in reply.text
