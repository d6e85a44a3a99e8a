"""Several models: by name, loaded when asked for, closed by predicted memory and when idle."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_files import ATTENTION, lora_pairs, write_lora
from scripted_executor import scripted_llm
from server_client import SCRIPTED, client_of, entry
from tiny_encoders import random_bert, write_bert
from tiny_models import write_tiny_model

import edgellm
from edgellm.adapters.loading import AdapterChoice
from edgellm.cli import main
from edgellm.formats.errors import EdgeLLMError, ModelNotFoundError
from edgellm.llm import LLM
from edgellm.loading import LoadOptions, open_model
from edgellm.memory import PROCESS_NBYTES, MemoryNeed
from edgellm.server.errors import ServerError
from edgellm.server.models import ModelEntry, Models, named
from edgellm.server.server import Server

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]


class Shelf:
    """Models of given sizes; ``loads`` are the names in the order in which they were loaded."""

    def __init__(self, sizes: dict[str, int], **options: Any) -> None:
        self.loads: list[str] = []
        self.sizes = sizes
        self.before_load: Callable[[], Any] = lambda: None
        entries = [
            ModelEntry((name,), Path(f"{name}.gguf"), facts=replace(SCRIPTED, need_nbytes=PROCESS_NBYTES + size))
            for name, size in sizes.items()
        ]
        self.models = Models(entries, load=self._load, **options)
        self.server = Server(self.models)

    def _load(self, entry: ModelEntry) -> LLM:
        self.before_load()
        self.loads.append(entry.name)
        llm = scripted_llm(lambda prompt: f"I am {entry.name}.", n_ctx=512)
        assert llm._model is not None
        llm._model.memory_need = MemoryNeed(self.sizes[entry.name], 0, 0, PROCESS_NBYTES)
        return llm

    def loaded(self) -> set[str]:
        return {entry.name for entry in self.models.loaded()}


def ask(client: Any, model: str, **more: Any) -> str:
    reply = client.post(CHAT, json={"model": model, "messages": HELLO, **more})
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def test_models_are_loaded_when_asked_for_and_the_longest_unused_makes_room() -> None:
    shelf = Shelf({"a": 40, "b": 40, "c": 40}, budget=100)
    with client_of(shelf.server) as client:
        assert shelf.loaded() == set()
        for name, there in (("a", {"a"}), ("b", {"a", "b"}), ("a", {"a", "b"}), ("c", {"a", "c"}), ("b", {"c", "b"})):
            assert ask(client, name) == f"I am {name}." and shelf.loaded() == there
    assert shelf.loads == ["a", "b", "c", "b"] and shelf.loaded() == set()


def test_a_model_that_answers_is_not_closed_and_the_other_waits_for_it() -> None:
    async def talk() -> list[str]:
        shelf = Shelf({"a": 60, "b": 60}, budget=100)
        order = []

        async def use(name: str, seconds: float) -> None:
            async with shelf.models.lease(name) as one:
                assert one.llm is not None
                order.append(f"{name} in")
                await asyncio.sleep(seconds)
                order.append(f"{name} out")

        first = asyncio.create_task(use("a", 0.2))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, use("b", 0))
        await shelf.models.close()
        return order

    assert asyncio.run(talk()) == ["a in", "a out", "b in", "b out"]


def test_a_model_whose_file_was_cut_short_is_loaded_anew_by_the_next_request() -> None:
    shelf = Shelf({"a": 1})
    with client_of(shelf.server) as client:
        assert ask(client, "a") == "I am a."
        (one,) = shelf.models.loaded()
        one.leased.executor.fail = EdgeLLMError("a.gguf: the file was cut short.", code="MODEL_FILE_CHANGED")  # type: ignore[attr-defined]
        cut = client.post(CHAT, json={"model": "a", "messages": [*HELLO, *HELLO]})
        assert cut.status_code == 500 and "cut short" in cut.json()["error"]["message"]
        assert shelf.loaded() == set()
        one.facts = replace(SCRIPTED, need_nbytes=PROCESS_NBYTES)
        assert ask(client, "a") == "I am a." and shelf.loads == ["a", "a"]


def test_a_model_whose_file_is_gone_is_not_found_and_its_place_is_not_told(tmp_path: Path) -> None:
    path = tmp_path / "secret" / "m.gguf"
    gone = ModelEntry(("m",), path)
    known = ModelEntry(("known",), path, facts=SCRIPTED)
    with client_of(Server(Models([gone, known]))) as client:
        for name in ("m", "known"):
            reply = client.post(CHAT, json={"model": name, "messages": HELLO})
            assert reply.status_code == 404 and "secret" not in reply.text and repr(name) in reply.text


def test_names_and_templates_that_are_no_utf8_are_shown_and_break_no_list(tmp_path: Path) -> None:
    """The bytes of a stranger: in a file's metadata, and in what the file is called."""
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    texts = {"general.name": "Caf@", "general.license": "mit@", "tokenizer.chat_template": "{{ messages[0].content }}@"}
    data = write_tiny_model(tmp_path / "m.gguf", metadata=texts).read_bytes()
    for text in texts.values():
        data = data.replace(text.encode(), text.encode().replace(b"@", b"\xe9"))
    try:
        path.write_bytes(data)
    except (OSError, UnicodeError):
        pytest.skip("names of files are UTF-8 here")
    other = ModelEntry(("scripted",), Path("scripted.gguf"), facts=SCRIPTED)
    server = Server(Models([ModelEntry((path.stem, "latin"), path), other], LoadOptions(n_ctx=64)))
    body = {"messages": HELLO, "max_tokens": 2}
    with client_of(server) as client:
        asked = [client.get(url) for url in ("/v1/models", "/api/tags", "/api/ps", "/props", "/tokenizer_info")]
        asked.append(client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}))
        asked += [client.post(url, json=body) for url in (CHAT, "/apply-template")]
        asked.append(client.post(CHAT, json=body | {"stream": True}))
        asked.append(client.post("/api/show", json={"model": "latin"}))
    assert [reply.status_code for reply in asked] == [200] * 10
    assert all("\N{REPLACEMENT CHARACTER}" in reply.text for reply in (*asked[:2], *asked[3:]))


def test_an_idle_model_is_closed_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> None:
        shelf = Shelf({"a": 1, "b": 1}, keep_alive=0.05)
        for name, keep in (("a", None), ("b", -1)):
            async with shelf.models.lease(name, keep):
                await shelf.models.close_idle()
                assert name in shelf.loaded()
        await asyncio.sleep(0.06)
        await shelf.models.close_idle()
        assert shelf.loaded() == {"b"}
        await shelf.models.close()

    asyncio.run(talk())


def test_many_who_ask_at_once_load_a_model_once_and_the_loop_goes_on() -> None:
    shelf = Shelf({"a": 1})
    release, loading = threading.Event(), threading.Event()

    def wait() -> None:
        loading.set()
        release.wait(30)

    shelf.before_load = wait

    with client_of(shelf.server) as client:
        answers: list[str] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(client, "a"))) for _ in range(5)]
        for thread in threads:
            thread.start()
        assert loading.wait(30)
        assert client.get("/health").status_code == 200  # while it loads
        release.set()
        for thread in threads:
            thread.join(30)
    assert answers == ["I am a."] * 5 and shelf.loads == ["a"]


def test_a_load_that_fails_is_told_and_may_be_tried_again() -> None:
    shelf = Shelf({"a": 1})
    failures = [ModelNotFoundError("a.gguf: it is gone. Pull it again.")]
    shelf.before_load = lambda: (_ for _ in ()).throw(failures.pop()) if failures else None
    with client_of(shelf.server) as client:
        reply = client.post(CHAT, json={"model": "a", "messages": HELLO})
        assert reply.status_code == 404 and "gone" in reply.json()["error"]["message"]
        assert ask(client, "a") == "I am a."


def test_without_a_name_the_first_answers_and_a_wrong_one_is_told_what_there_is() -> None:
    shelf = Shelf({"a": 1, "b": 1})
    with client_of(shelf.server) as client:
        reply = client.post(CHAT, json={"messages": HELLO}).json()
        assert reply["model"] == "a" and reply["choices"][0]["message"]["content"] == "I am a."
        wrong = client.post(CHAT, json={"model": "c", "messages": HELLO})
        assert wrong.status_code == 404 and "There is: a, b." in wrong.json()["error"]["message"]
        listed = client.get("/v1/models").json()
        assert [one["id"] for one in listed["data"]] == [one["slug"] for one in listed["models"]] == ["a", "b"]
        assert [one["status"]["value"] for one in listed["data"]] == ["loaded", "unloaded"]


def test_a_path_is_known_by_its_names_and_a_name_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "My-Model.Q4_K_M.gguf"
    file.write_bytes(b"")
    again = tmp_path / "other" / file.name
    again.parent.mkdir()
    again.write_bytes(b"")
    found = named([str(file), "smollm2", str(again)], Path, ["short"])
    assert found[0].names == ("My-Model.Q4_K_M", "My-Model.Q4_K_M.gguf", str(file), "short")
    assert found[1].names == ("smollm2",) and found[2].names == (str(again),)
    with pytest.raises(ModelNotFoundError):
        named([], Path)


def test_the_context_that_clients_are_told_is_the_servers() -> None:
    """Before it is loaded, and after."""
    server = Server(Models([entry()], LoadOptions(n_ctx=768)))
    with client_of(server) as client:
        for _ in range(2):
            listed = client.get("/v1/models").json()
            assert listed["data"][0]["meta"]["n_ctx"] == listed["models"][0]["context_window"] == 768
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})


def test_what_does_not_fit_while_others_answer_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.server import models

    monkeypatch.setattr(models, "WAIT_S", 0.0)

    async def talk() -> None:
        shelf = Shelf({"a": 60, "b": 60}, budget=100)
        async with shelf.models.lease("a"):
            with pytest.raises(ServerError, match="busy") as told:
                async with shelf.models.lease("b"):
                    pass
            assert told.value.status == 503 and told.value.headers["retry-after"]
        await shelf.models.close()

    asyncio.run(talk())


def test_a_broken_file_hides_no_other_model(tmp_path: Path) -> None:
    """It is not listed and never the one that answers without a name; asked for, it says what is wrong with it."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00 and then nothing")
    server = Server(Models([ModelEntry(("broken",), broken), entry()], LoadOptions(n_ctx=512)))
    with client_of(server) as client:
        listed = client.get("/v1/models").json()
        assert [one["id"] for one in listed["data"]] == ["smollm2"]
        assert [one["name"] for one in client.get("/api/tags").json()["models"]] == ["smollm2:latest"]
        reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert reply.status_code == 200 and reply.json()["model"] == "smollm2"
        wrong = client.post("/v1/completions", json={"prompt": "x", "model": "broken"})
        assert wrong.status_code == 500 and "broken.gguf" in wrong.json()["error"]["message"]


def facts_of(path: Path, options: LoadOptions) -> Any:
    models = Models([ModelEntry(("tiny",), path)], options)
    (entry,) = asyncio.run(models.usable())
    assert entry.facts is not None
    return entry.facts


def test_what_a_model_will_take_is_what_it_takes(tmp_path: Path) -> None:
    """With keys and values of few bits, adapters, a draft model or n-grams, before it is loaded as afterwards."""
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama", "Q8_0", n_embd=64, n_ff=64, head_dim=32)
    lora = write_lora(tmp_path / "one.gguf", lora_pairs(path, ATTENTION))
    cases: list[dict[str, Any]] = [
        {"cache_type_k": "q4_0", "cache_type_v": "q4_0"},
        {"lora": (AdapterChoice(lora, "", 1.0),)},
        {"draft": path, "n_ctx": 128},
        {"speculate": "ngram"},
    ]
    found = []
    for case in cases:
        options = LoadOptions(**({"n_ctx": 4096} | case))
        facts = facts_of(path, options)
        with LLM(open_model(path, options)) as llm:
            assert (facts.n_ctx, facts.need_nbytes) == (llm.n_ctx, llm.memory_estimate.total)
        found.append(facts.need_nbytes)
    assert found[0] < found[3] < found[1]


def test_a_model_that_cannot_draft_by_itself_is_listed_and_refused_where_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama")
    bert = write_bert(tmp_path / "bert.gguf", random_bert())
    assert facts_of(path, LoadOptions(n_ctx=64, speculate="mtp")).n_ctx == 64
    assert facts_of(bert, LoadOptions(speculate="mtp")).kind == "embedding"
    with edgellm.load(bert, n_threads=1, speculate="mtp") as llm:
        assert len(llm.embed("rivers"))
    assert main(["serve", str(path), "--speculate", "mtp", "--port", "0"]) == 1
    assert "tiny.gguf: edgellm knows no blocks that draft of a llama model" in capsys.readouterr().err
    assert main(["serve", str(path), "--draft", str(bert), "--port", "0"]) == 1
    assert "The draft model (bert) answers nothing" in capsys.readouterr().err
