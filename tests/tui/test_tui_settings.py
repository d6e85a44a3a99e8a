"""Settings in the chat: checked before they are kept, taken back with a word when a model does not load with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_talk import Talk

from edgellm.formats.errors import EdgeLLMError, MemoryWouldExceedError
from edgellm.sessions import Session
from edgellm.tui.run import known_model

MOST = 8192  # tokens of context that this machine has room for


def small_machine(talk: Talk) -> list[Any]:
    """Loading fails beyond ``MOST`` tokens; the contexts that were asked for."""
    asked: list[Any] = []
    load = talk.load

    def limited(name: str, progress: Any = None, **options: Any) -> Any:
        asked.append(options.get("n_ctx"))
        if (options.get("n_ctx") or 0) > MOST:
            raise MemoryWouldExceedError("This needs more memory than there is.")
        return load(name, progress, **options)

    talk.chat.load = limited
    return asked


@pytest.mark.parametrize(
    "setting", ["n_ctx 99999999999", "n_ctx -5", "n_ctx x", "max_tokens 1e9", "temp nan", "context_overflow silently"]
)
def test_a_setting_that_cannot_be_is_told_and_not_kept(run: Any, setting: str) -> None:
    async def steps(talk: Talk) -> None:
        await talk.settled()
        await talk.ask("river")
        await talk.write(f"/set {setting}")
        await talk.settled()
        assert talk.chat.session.settings == {} and len(talk.models) == 1
        name, value = setting.split()
        assert name.removeprefix("temp") in talk.told() and value in talk.told()
        talk.chat.writer.flush()
        assert talk.chat.store.load(talk.chat.session.id).settings == {}

    run(steps)


def test_a_token_that_the_model_does_not_have_is_told_and_not_kept(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.settled()
        talk.llm.tokenizer.n_vocab = 100  # type: ignore[attr-defined]
        await talk.write("/set logit-bias 99+1,100+1")
        assert talk.chat.session.settings == {} and "100" in talk.told()
        await talk.write("/set logit-bias 99+1")
        assert talk.chat.session.settings == {"logit_bias": {99: 1.0}}
        await talk.ask("river")
        assert talk.llm.requests[-1][1]["logit_bias"] == {99: 1.0}

    run(steps)


def test_a_context_that_does_not_load_is_taken_back_to_the_one_that_did(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.settled()
        asked = small_machine(talk)
        await talk.ask("river")
        await talk.write("/set n_ctx 4096")
        await talk.settled()
        await talk.write("/set n_ctx 16777216")
        await talk.settled()
        assert asked == [4096, 16777216, 4096]
        assert talk.chat.session.settings == {"n_ctx": 4096}
        assert "more memory" in talk.told() and "n_ctx = 16777216 did not work; it is 4096 again" in talk.told()
        await talk.ask("river")
        assert talk.said[-1][0] == "assistant" and talk.said[-1][1]
        talk.chat.writer.flush()
        assert talk.chat.store.load(talk.chat.session.id).settings == {"n_ctx": 4096}

    run(steps)


def test_a_chat_that_was_saved_with_a_context_that_cannot_be_opens_with_a_word(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.settled()
        small_machine(talk)
        old = Session(model="fake", settings={"n_ctx": 100_000, "temperature": 0.5})
        old.tree.add("user", "river")
        talk.chat.store.save_all(old)
        talk.app.open_session(old.id)
        talk.chat.load_model()
        await talk.until(lambda: "did not work" in talk.told())  # a word goes after some seconds
        await talk.ask("river")
        assert talk.chat.session.settings == {"temperature": 0.5}
        assert talk.said[-1][0] == "assistant"

    run(steps)


def test_settings_that_something_else_wrote_are_left_out_with_a_word(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.settled()
        await talk.ask("river")
        chat = talk.chat
        chat.writer.flush()
        chat.store._db.execute('update sessions set settings = \'{"tools": [1], "logit_bias": 5, "top_k": 7}\'')
        talk.app.open_session(chat.session.id)
        await talk.pilot.pause()
        assert "tools" in talk.told() and "logit_bias" in talk.told()
        await talk.ask("river")
        assert talk.llm.requests[-1][1]["top_k"] == 7
        chat.store.save_preset("odd", {"cancel": 1, "top_k": 8})
        await talk.write("/preset odd")
        assert chat.session.settings == {"top_k": 8} and "cancel" in talk.told()

    run(steps)


def test_a_model_whose_file_changed_is_loaded_anew_for_the_next_message(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.settled()
        await talk.ask("river")
        first = talk.llm
        first.fail = EdgeLLMError("The file was cut short.", code="MODEL_FILE_CHANGED")
        await talk.ask("sort")
        assert "cut short" in talk.told() and first.closed and len(talk.models) == 1
        assert len(talk.said) == 3 and talk.app.prompt.text == "sort"
        await talk.pilot.press("enter")
        await talk.settled()
        assert len(talk.models) == 2 and talk.said[-1][0] == "assistant"

    run(steps)


def test_a_session_does_not_fetch_the_model_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    for name in (
        "https://example.org/evil.gguf",
        "hf:some/one:Q4_K_M",
        "/no/such/file.gguf",
        "",
        "x\0y",
        "pypi:x==1/y",
    ):
        assert known_model(name) == ""
    here = tmp_path / "model.gguf"
    here.write_bytes(b"GGUF")
    assert known_model(str(here)) == str(here)
    assert known_model("smollm2") == "smollm2"
