"""Sessions from a stranger's file, or from an own file that something else has written to: what may stand in them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from edgellm.engine.requests import Timings
from edgellm.formats.errors import FormatError
from edgellm.generation import TokenLogprob
from edgellm.sampling import SamplingParams
from edgellm.sessions import Session, SessionStore, from_json, records, to_json, to_markdown
from edgellm.sessions.rescue import rescue, rescue_report
from edgellm.sessions.settings import as_json, checked_all

MESSAGE = {"parent": None, "role": "user", "text": "hi"}
GOOD_SETTINGS = {
    "temperature": 0.5,
    "top_k": 3,
    "seed": 2**64 - 1,
    "max_tokens": -1,
    "n_ctx": 4096,
    "stop": ["\n", "END"],
    "samplers": ["top_k", "temperature"],
    "dry_sequence_breakers": ["\n"],
    "logit_bias": {"15": 1.5, "7": False},
    "ignore_eos": True,
    "template_kwargs": {"enable_thinking": False, "list": [1, "x"]},
    "context_overflow": "drop_oldest",
}
BAD_SETTINGS: list[dict[str, Any]] = [
    {"logit_bias": 5},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"1": math.inf}},
    {"logit_bias": {"1": math.nan}},
    {"logit_bias": {"-1": 1}},
    {"cancel": True},
    {"tools": [{"name": "rm"}]},
    {"hook": 1},
    {"parse_special": True},
    {"special": True},
    {"progress": 1},
    {"params": {}},
    {"prompt": "x"},
    {"logprobs": 100_000},
    {"n_probs": 100_000},
    {"processors": []},
    {"max_tokens": math.inf},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": 10**30},
    {"n_ctx": 99_999_999_999},
    {"n_ctx": -1},
    {"temperature": math.nan},
    {"temperature": "hot"},
    {"seed": 2**64},
    {"stop": "x" * 10_000},
    {"stop": [""]},
    {"stop": [5]},
    {"stop": ["x"] * 1000},
    {"samplers": ["none such"]},
    {"template_kwargs": {"messages": []}},
    {"template_kwargs": {"add_generation_prompt": False}},
    {"template_kwargs": {"tools": []}},
    {"template_kwargs": {"x": math.inf}},
    {"template_kwargs": {"x": "y" * 100_000}},
    {"template_kwargs": 3},
    {"context_overflow": "silently"},
    {"": 1},
    {"no such setting": 1},
]
BAD_FIELDS: list[dict[str, Any]] = [
    {"created": 1e30},
    {"created": math.inf},
    {"created": math.nan},
    {"created": -1},
    {"created": "yesterday"},
    {"title": 5},
    {"model": "m" * 10_000},
    {"settings": []},
    {"leaf": 7},
    {"leaf": -1},
    {"leaf": True},
    {"messages": [MESSAGE | {"parent": 0}]},
    {"messages": [MESSAGE, MESSAGE | {"parent": 2}, MESSAGE | {"parent": 1}]},
    {"messages": [MESSAGE | {"parent": -1}]},
    {"messages": [MESSAGE | {"parent": True}]},
    {"messages": [MESSAGE | {"parent": 0.0}]},
    {"messages": [MESSAGE | {"created": 1e18}]},
    {"messages": [MESSAGE | {"timings": {"prompt_n": math.inf}}]},
    {"messages": [MESSAGE | {"timings": {"prompt_n": -1}}]},
    {"messages": [MESSAGE | {"timings": {"generation_tps": 1e300}}]},
    {"messages": [MESSAGE | {"timings": {"surprise": 1}}]},
    {"messages": [MESSAGE | {"finish_reason": "surprise"}]},
    {"messages": [MESSAGE | {"finish_reason": {}}]},
    {"messages": [MESSAGE | {"tokens": [[math.inf, "x", None, None, None, []]]}]},
    {"messages": [MESSAGE | {"tokens": [[-1, "x", None, None, None, []]]}]},
    {"messages": [MESSAGE | {"tokens": [[1, "x", math.nan, None, None, []]]}]},
    {"messages": [MESSAGE | {"tokens": [[1, "x", 1e6, None, None, []]]}]},
    {"messages": [MESSAGE | {"tokens": [[1, "x", None, None, "s" * 1000, []]]}]},
]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = SessionStore(tmp_path / "sessions.db")
    yield opened
    opened.close()


def file_of(**fields: Any) -> str:
    return json.dumps({"format": "edgellm-session", "version": 1, "messages": [MESSAGE], **fields})


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda s: json.dumps(s)[:50])
def test_a_setting_that_no_chat_has_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as found:
        from_json(file_of(settings=settings))
    named = "NaN" if "NaN" in json.dumps(settings) else next(iter(settings))  # the reader of JSON takes no NaN at all
    assert found.value.code == "SESSION_FILE" and named in str(found.value)
    assert len(str(found.value)) < 1000


def test_good_settings_come_in_and_go_out_again_as_plain_json() -> None:
    session = from_json(file_of(settings=GOOD_SETTINGS))
    assert session.settings["logit_bias"] == {15: 1.5, 7: -math.inf}
    names = {"max_tokens", "n_ctx", "stop", "template_kwargs", "context_overflow"}
    SamplingParams(**{name: value for name, value in session.settings.items() if name not in names})

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    assert json.loads(to_json(session), parse_constant=no_constant)["settings"] == GOOD_SETTINGS
    assert from_json(to_json(session)).settings == session.settings


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda f: json.dumps(f)[:70])
def test_a_field_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as found:
        from_json(file_of(**fields))
    assert found.value.code == "SESSION_FILE"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" * 5000])
@pytest.mark.parametrize("place", ["created", "leaf", "temperature", "timings"])
def test_numbers_that_are_none_are_refused(number: str, place: str) -> None:
    text = {
        "created": file_of(created=77),
        "leaf": file_of(leaf=77),
        "temperature": file_of(settings={"temperature": 77}),
        "timings": file_of(messages=[MESSAGE | {"timings": {"prompt_n": 77}}]),
    }[place]
    with pytest.raises(FormatError):
        from_json(text.replace("77", number))


def test_a_title_becomes_a_short_line_without_control_characters(store: SessionStore) -> None:
    session = from_json(file_of(title="\x1b]0;evil\x07 a\nb\0" + "x" * 1_000_000))
    assert len(session.title) <= 60 and session.title.isprintable()
    store.save_all(session)
    assert store.summaries()[0].title == session.title


def test_lone_surrogates_do_not_keep_a_session_out_of_the_file(store: SessionStore) -> None:
    settings = {"stop": ["\ud800"], "template_kwargs": {"x": "\ud800"}}
    session = from_json(
        file_of(title="\ud800", model="\ud800", settings=settings, messages=[MESSAGE | {"text": "\ud800"}])
    )
    store.save_all(session)
    assert store.load(session.id).tree.leaf is not None


def test_a_very_long_chat_comes_in_and_loads_in_linear_time(store: SessionStore) -> None:
    n = 50_000  # with a path walked for every message this takes minutes
    deep = [{"parent": i - 1 if i else None, "role": "user", "text": ""} for i in range(n)]
    started = time.monotonic()
    session = from_json(file_of(messages=deep))
    store.save_all(session)
    again = store.load(session.id)
    plain = from_json(json.dumps([{"role": "user", "content": ""}] * n))
    assert len(again.tree.path) == len(plain.tree.path) == n
    assert time.monotonic() - started < 60


def test_a_tree_that_is_filled_at_once_reads_as_one_that_grew() -> None:
    grown = Session()
    first = grown.tree.add("user", "a")
    one = grown.tree.add("assistant", "b", first)
    grown.tree.add("user", "c", one)
    grown.tree.add("assistant", "d", first)
    grown.tree.select(one)
    filled = from_json(to_json(grown))
    assert [node.text for node in filled.tree.path] == ["a", "b", "c"]
    record = json.loads(to_json(grown)) | {"leaf": None}
    assert [node.text for node in from_json(json.dumps(record)).tree.path] == ["a", "d"]


def test_log_probabilities_of_nothing_are_written_as_json() -> None:
    session = Session()
    session.tree.add("assistant", "x", tokens=[TokenLogprob(1, b"x", -math.inf, (), -math.inf)])
    assert "Infinity" not in to_json(session)
    from_json(to_json(session))


# --- an own file that something else has written to -------------------------------------------------------------------


TAMPERED = [
    'update sessions set settings = \'{"logit_bias": 5, "cancel": 1, "temperature": 0.5}\'',
    "update sessions set settings = 'no json'",
    "update sessions set settings = '[1]'",
    "update sessions set settings = x'00ff'",
    "update sessions set created = 1e30, updated = 1e30",
    "update sessions set created = 'x', updated = 'x', title = x'00ff', system = 5.5, model = x'ff'",
    "update sessions set leaf = 'x'",
    "update messages set created = 9e999",
    "update messages set timings = '{\"prompt_n\": 1e999}'",
    "update messages set timings = 'x'",
    "update messages set timings = x'00'",
    "update messages set role = 'robot', finish_reason = 'surprise'",
    "update messages set text = x'00ff'",
    "update messages set parent = id",
    "update messages set parent = (select max(id) from messages)",
    "update token_runs set data = 'text'",
]


@pytest.mark.parametrize("change", TAMPERED)
def test_a_session_that_was_tampered_with_loads_and_says_what_was_dropped(store: SessionStore, change: str) -> None:
    session = Session(settings={"temperature": 0.5})
    asked = session.tree.add("user", "q")
    token = TokenLogprob(1, b"x", -0.5)
    session.tree.add("assistant", "a", asked, tokens=[token], timings={"prompt_n": 3}, finish_reason="stop")
    store.save_all(session)
    store._db.execute(change)
    again = store.load(session.id)
    assert len(again.tree) == 2
    assert checked_all(again.settings) == (again.settings, [])
    assert again.notes or "leaf" in change or "token_runs" in change
    for text in (to_json(again), to_markdown(again), as_json(again.settings)):
        text.encode()
    from_json(to_json(again))
    for summary in store.summaries():
        time.localtime(summary.updated)
        assert isinstance(summary.title, str) and isinstance(summary.model, str)


def test_settings_that_may_stay_are_kept_beside_those_that_may_not(store: SessionStore) -> None:
    session = Session()
    store.save_all(session)
    store._db.execute(TAMPERED[0])
    again = store.load(session.id)
    assert again.settings == {"temperature": 0.5}
    assert any("logit_bias" in note for note in again.notes) and any("cancel" in note for note in again.notes)


def test_presets_that_are_none_are_not_offered(store: SessionStore) -> None:
    store.save_preset("calm", {"temperature": 0.1})
    store._db.execute("insert into presets values ('broken', 'no json'), ('list', '[1]')")
    assert store.presets() == {"calm": {"temperature": 0.1}}


# --- a chat that its file did not take --------------------------------------------------------------------------------


def test_a_rescued_chat_is_whole_and_for_its_user_alone(tmp_path: Path) -> None:
    session = Session(settings={"temperature": 0.5})
    session.tree.add("user", "Remember me.")
    path = rescue(session, [tmp_path / "no such folder", tmp_path])
    assert path is not None and path.stat().st_mode & 0o077 == 0
    assert from_json(path.read_text("utf-8")).tree.roots[0].text == "Remember me."
    assert rescue(session, [tmp_path]) is None  # what is there is not written over


def test_a_chat_that_can_be_written_nowhere_is_told_in_full(monkeypatch: Any, tmp_path: Path) -> None:
    session = Session()
    session.tree.add("user", "Remember me.")
    error = FormatError("disk full", code="SESSION_WRITE")
    monkeypatch.setattr("edgellm.sessions.rescue.rescue_folders", lambda: [tmp_path / "none"])
    told = rescue_report([session], error)
    assert "disk full" in told and "Remember me." in told
    monkeypatch.setattr("edgellm.sessions.rescue.rescue_folders", lambda: [tmp_path])
    told = rescue_report([session], error)
    assert "sessions import" in told and str(tmp_path) in told


def test_every_count_of_an_answer_is_known_to_who_brings_a_chat_in() -> None:
    found = Timings(gained_n=-2.5).as_dict()
    assert records.timings(found) == found
