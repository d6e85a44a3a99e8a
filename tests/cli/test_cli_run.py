"""``edgellm run``: where the prompt comes from, what reaches the model, and what reaches standard output."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM

import edgellm
from edgellm import beam_search
from edgellm.cli import main
from edgellm.cli.answer import Answer, timing_block
from edgellm.cli.options import parse_override
from edgellm.engine.requests import Timings
from edgellm.formats.errors import ContextFullError, ModelNotFoundError, ParameterError, TemplateError
from edgellm.generation import GenerationChunk
from edgellm.sampling import SamplingParams
from edgellm.sampling.options import SAMPLING_OPTIONS


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeLLM:
    """What ``edgellm.load`` gives; standard input is a terminal that nobody types at."""
    fake = FakeLLM()

    def load(name: Any, progress: Any = None, **options: Any) -> FakeLLM:
        fake.load_options = {"name": str(name), **options}
        return fake

    monkeypatch.setattr(edgellm, "load", load, raising=False)
    monkeypatch.setattr("edgellm.cli.standard_input.brought_along", lambda: None)
    monkeypatch.setattr("edgellm.cli.standard_input.is_terminal", lambda: True)
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGELLM_DEBUG", raising=False)
    return fake


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("edgellm.cli.standard_input.brought_along", lambda: text)
    monkeypatch.setattr("edgellm.cli.standard_input.read_all", lambda: text)
    monkeypatch.setattr("edgellm.cli.standard_input.is_terminal", lambda: False)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_answer_and_nothing_else_goes_to_standard_output(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "smollm2", "Name three rivers."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "echo: Name three rivers.\n"
    assert captured.err == ""
    assert llm.requests[0][0] == user("Name three rivers.")
    assert llm.load_options["name"] == "smollm2"
    assert llm.closed


@pytest.mark.parametrize(
    ("arguments", "model", "prompt"),
    [
        (["m.gguf", "hi"], "m.gguf", "hi"),
        (["m.gguf", "several", "words"], "m.gguf", "several words"),
        (["m.gguf", "-p", "hi"], "m.gguf", "hi"),
        (["-m", "m.gguf", "hi there"], "m.gguf", "hi there"),
        (["-m", "m.gguf", "-p", "hi"], "m.gguf", "hi"),
        (["-p", "hi"], "smollm2", "hi"),
        (["a prompt for the default model"], "smollm2", "a prompt for the default model"),
        (["日本の首都は?"], "smollm2", "日本の首都は?"),
        (["Why?"], "smollm2", "Why?"),
        (["2*3="], "smollm2", "2*3="),
        (["--", "m.gguf", "-p"], "m.gguf", "-p"),
    ],
)
def test_model_and_prompt_are_told_apart(llm: FakeLLM, arguments: list[str], model: str, prompt: str) -> None:
    assert main(["run", *arguments]) == 0
    assert (llm.load_options["name"], llm.requests[0][0]) == (model, user(prompt))


def test_the_prompt_may_come_from_a_file_or_a_pipe(
    llm: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file: ä\n", "utf-8")
    assert main(["run", "m", "-f", str(file)]) == 0
    assert main(["run", "m", "--raw", "-f", str(file)]) == 0
    pipe(monkeypatch, "from a pipe\n")
    assert main(["run", "m"]) == 0
    assert main(["run", "m", "-f", "-"]) == 0
    assert main(["run", "m", "Sum this up."]) == 0
    assert main(["run", "m", "Sum this up.", "-f", "-"]) == 0
    assert main(["run", "m", "Sum this up.", "--no-stdin"]) == 0
    assert llm.requests.pop(1)[0] == "from a file: ä"  # one end of a line belongs to the file, as in llama.cpp
    prompts = [request[0][-1]["content"] for request in llm.requests]
    both = "from a pipe\n\nSum this up."
    assert prompts == ["from a file: ä", "from a pipe", "from a pipe", both, both, "Sum this up."]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "m"],
        ["run"],
        ["run", "m", "  "],
        ["run", "m", "one", "-p", "two"],
        ["run", "m", "-f", "-", "--no-stdin"],
        ["run", "m", "x", "--raw", "-sys", "be nice"],
        ["run", "m", "x", "-sys", "a", "-sysf", "b"],
        ["run", "m", "x", "--chat-template-kwargs", "[1]"],
        ["run", "m", "x", "--chat-template-kwargs", "{"],
        ["run", "m", "x", "--temp", "warm"],
        ["run", "m", "x", "--temp", "-1"],
        ["run", "m", "x", "--temp", "nan"],
        ["run", "m", "x", "--top-k", "1.5"],
        ["run", "m", "x", "--samplers", "top_k;wrong"],
        ["run", "m", "x", "-l", "12"],
        ["run", "m", "x", "-n", "-2"],
        ["run", "m", "x", "-t", "0"],
        ["run", "m", "x", "--override-kv", "a=b"],
    ],
)
def test_wrong_usage_is_told_before_a_model_is_loaded(
    llm: FakeLLM, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert llm.load_options == {}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["Hello"], ["Name", "three", "rivers."]])
def test_a_word_that_is_no_model_is_told_how_to_be_a_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    pipe(monkeypatch, "text")
    assert main(["run", *arguments]) == 1
    assert "give all of that with -p" in capsys.readouterr().err


def test_what_goes_with_a_model_and_is_not_there_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str, **options: Any) -> None:
        raise ModelNotFoundError(f"{options['draft']}: there is no such file.")

    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    monkeypatch.setattr(edgellm, "load", load, raising=False)
    assert main(["run", "smollm2", "Hello", "--no-stdin", "--draft", "small.gguf"]) == 1
    told = capsys.readouterr().err
    assert "small.gguf: there is no such file." in told and "-p" not in told


@pytest.mark.parametrize("name", ["m", "my-model", "./models/m.gguf", "modèles/m.gguf", "hf:owner/repo:Q4_K_M", "~/m"])
def test_a_lone_name_is_a_model(llm: FakeLLM, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name]) == 2
    assert f"{name} was taken as the model" in capsys.readouterr().err


def test_every_sampling_flag_reaches_its_field(llm: FakeLLM) -> None:
    samples = {"samplers": "top_k;temperature", "logit_bias": "13-inf,7+1.5", "dry_sequence_breakers": "\\n;:"}
    samples["adaptive_decay"] = "0.5"
    expected: dict[str, Any] = {"samplers": "top_k;temperature", "logit_bias": {13: float("-inf"), 7: 1.5}}
    expected |= {"dry_sequence_breakers": ("\n", ":"), "adaptive_decay": 0.5}
    for option in SAMPLING_OPTIONS:
        text = samples.get(option.field, "1")
        for flag in option.flags:
            assert main(["run", "m", "x", flag, text]) == 0, flag
            given = llm.requests[-1][1]
            assert given[option.field] == expected.get(option.field, 1), flag
            SamplingParams(**{option.field: given[option.field]})
    assert main(["run", "m", "x", "--ignore-eos"]) == 0
    assert llm.requests[-1][1]["ignore_eos"] is True


def test_only_what_was_said_is_passed_on_so_that_the_model_may_recommend(llm: FakeLLM) -> None:
    main(["run", "m", "x"])
    assert llm.requests[0][1] == {"max_tokens": -1, "stop": (), "template_kwargs": {}}


def test_the_other_flags_reach_the_library(llm: FakeLLM, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    arguments = ["-n", "7", "-c", "128", "-t", "3", "-r", "END", "-r", "STOP", "-sys", "Be brief.", "--force"]
    arguments += ["--speculate", "ngram", "--device", "gpu:1", "-ngl", "12", "--cpu-moe", "-ctv", "q8_0"]
    arguments += ["--kv-keep", "quest:512"]
    arguments += ["--chat-template", str(template), "--chat-template-kwargs", '{"enable_thinking": false}']
    arguments += ["--override-kv", "llama.context_length=int:99", "--override-kv", "a.b=str:c=d:e"]
    assert main(["run", "m", "hello there", *arguments]) == 0
    messages, options = llm.requests[0]
    assert messages == [{"role": "system", "content": "Be brief."}, *user("hello there")]
    assert options == {"max_tokens": 7, "stop": ("END", "STOP"), "template_kwargs": {"enable_thinking": False}}
    assert llm.load_options == {
        "name": "m",
        "n_ctx": 128,
        "n_threads": 3,
        "executor": "gpu:1",
        "gpu_layers": 12,
        "cpu_moe": True,
        "chat_template": "{{ messages }}",
        "kv_overrides": {"llama.context_length": 99, "a.b": "c=d:e"},
        "speculate": "ngram",
        "draft": None,
        "cache_type_k": "f16",
        "cache_type_v": "q8_0",
        "kv_keep": "quest:512",
        "force": True,
    }


def test_beams_reach_the_library_and_their_answer_is_written(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def answer_chunks(llm: Any, prompt: Any, **options: Any) -> Any:
        asked.append(options)
        yield GenerationChunk("found", None, None, "stop", Timings())

    monkeypatch.setattr(beam_search, "answer_chunks", answer_chunks)
    assert main(["run", "m", "x", "--num-beams", "3", "--length-penalty", "0.5", "-n", "9"]) == 0
    assert capsys.readouterr().out == "found\n"
    given = {name: asked[0][name] for name in ("num_beams", "length_penalty", "max_tokens")}
    assert given == {"num_beams": 3, "length_penalty": 0.5, "max_tokens": 9}
    assert main(["run", "m", "x", "--length-penalty", "0.5"]) == 2


def test_a_form_reaches_the_library_as_text_or_from_a_file(
    llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, gbnf = {"type": "object", "properties": {}}, 'root ::= "yes" | "no"'
    (tmp_path / "schema.json").write_text(json.dumps(schema), "utf-8")
    (tmp_path / "answer.gbnf").write_text(gbnf, "utf-8")
    for arguments, expected in (
        (["--json-schema", json.dumps(schema)], {"response_format": schema}),
        (["-j", str(tmp_path / "schema.json")], {"response_format": schema}),
        (["--grammar", str(tmp_path / "answer.gbnf")], {"grammar": gbnf}),
        (["--grammar", 'start: "a"'], {"grammar": 'start: "a"'}),
        (["--regex", "[ab]{2}"], {"regex": "[ab]{2}"}),
        ([], {}),
    ):
        assert main(["run", "smollm2", "Hi.", *arguments]) == 0
        given = llm.requests[-1][1]
        assert {name: given[name] for name in ("response_format", "grammar", "regex") if name in given} == expected
    capsys.readouterr()
    assert main(["run", "smollm2", "Hi.", "--json-schema", '{"a']) == 1
    assert main(["run", "smollm2", "Hi.", "--json-schema", str(tmp_path / "none.json")]) == 1
    assert main(["run", "smollm2", "Hi.", "--regex", "a", "--grammar", 'start: "a"']) == 2
    assert "only one of --grammar and --regex" in capsys.readouterr().err


def test_values_may_stand_close_to_short_flags_as_in_llama_cpp(llm: FakeLLM) -> None:
    assert main(["run", "m", "x", "-n5", "-s42", "-t2"]) == 0
    assert llm.requests[0][1]["seed"] == 42 and llm.load_options["n_threads"] == 2


@pytest.mark.parametrize("flag", ["--raw", "-no-cnv"])
def test_raw_completes_text_without_a_template(llm: FakeLLM, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", flag, "-p", "Once upon a time"]) == 0
    assert llm.requests[0] == ("Once upon a time", {"max_tokens": -1, "stop": ()})


def test_a_model_without_a_template_is_refused_before_the_prompt_is_read(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_template(self: FakeLLM) -> str:
        raise TemplateError("there is no template")

    monkeypatch.setattr(FakeLLM, "chat_template", property(no_template))
    assert main(["run", "m", "x"]) == 1
    assert "[TEMPLATE_ERROR]" in capsys.readouterr().err
    assert llm.closed and not llm.requests
    assert main(["run", "m", "--raw", "x"]) == 0


def test_json_is_one_object(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "hi ä", "--json", "-n", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == "echo: hi" and record["finish_reason"] == "length" and record["model"] == "m"
    assert record["timings"]["generation_n"] == 3 and record["timings"]["prompt_tps"] > 0


@pytest.mark.parametrize("flag", ["-v", "--verbose", "--show-timings"])
def test_timings_go_to_standard_error(llm: FakeLLM, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "hi", flag]) == 0
    captured = capsys.readouterr()
    assert captured.out == "echo: hi\n"
    assert "t/s" in captured.err and "1 reused" in captured.err and "of 64 tokens" in captured.err


def test_timings_tell_of_drafts_where_there_were_some() -> None:
    t = Timings(prompt_n=9, generation_n=40, drafted_n=30, accepted_n=21)
    assert "drafted      30 tokens, 21 accepted" in timing_block(Answer("text", "stop", t, False))
    assert "drafted" not in timing_block(Answer("text", "stop", t._replace(drafted_n=0), False))
    assert (t.as_dict()["drafted_n"], t.as_dict()["accepted_n"]) == (30, 21)


def test_an_error_of_the_model_is_reported_and_the_model_closed(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.fail = ContextFullError("The prompt has 99 tokens, the context has room for 64.")
    assert main(["run", "m", "x"]) == 1
    assert "99 tokens" in capsys.readouterr().err
    assert llm.closed


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_ctrl_c_keeps_what_was_said_and_ends_with_130(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.on_chunk = lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 3 else None
    before = signal.getsignal(signal.SIGINT)
    assert main(["run", "m", "count forever"]) == 130
    assert capsys.readouterr().out == "echo: count forever\n"
    assert llm.closed and signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_a_ctrl_c_that_is_ignored_stays_so(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what runs in its background
    llm.on_chunk = lambda i: os.kill(os.getpid(), signal.SIGINT)
    assert main(["run", "m", "count"]) == 0
    assert capsys.readouterr().out == "echo: count\n"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_a_second_ctrl_c_leaves_at_once(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(i: int) -> None:
        if i == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    llm.on_chunk = press
    before = signal.getsignal(signal.SIGINT)
    assert main(["run", "m", "count forever"]) == 130
    assert llm.closed and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=int:-3", ("a.b", -3)),
        ("a=float:1e-5", ("a", 1e-5)),
        ("a=bool:true", ("a", True)),
        ("a=bool:false", ("a", False)),
        ("a=str:", ("a", "")),
        ("a=str:x:y=z", ("a", "x:y=z")),
    ],
)
def test_override_kv_reads_every_type(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["", "a", "a=1", "a=int:x", "a=bool:maybe", "=int:1", "a=tensor:1", "a=int:1.5"])
def test_override_kv_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(ParameterError, match="KEY=TYPE:VALUE"):
        parse_override(text)


@pytest.mark.parametrize("command", ["run", "chat", "perplexity", "imatrix", "bench"])
def test_override_kv_is_an_option_of_what_runs_a_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "model.gguf", "--override-kv", "a=tensor:1"]) == 2
    assert "KEY=TYPE:VALUE" in capsys.readouterr().err
