"""What a checkpoint says about ending, special tokens and sampling reaches the GGUF metadata, or is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import edit_json
from test_checkpoint_hostile import TOKENIZER, write

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.quantize.general_metadata import SAMPLING, UNSAID
from edgellm.quantize.inputs import open_input
from edgellm.tokenizer import Tokenizer


def metadata_of(folder: Path) -> dict[str, Any]:
    with open_input(folder) as source:
        return {key: value for key, (value, _) in source.metadata.items()}


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], set[int]]] = {
    # generation_config.json, changes of config.json -> ids that end an answer, beside those that the texts tell
    "a number": ({"eos_token_id": 7}, {}, {7}),
    "a list of one": ({"eos_token_id": [7]}, {}, {7}),
    "a list of two": ({"eos_token_id": [7, 5]}, {}, {5, 7}),
    "the config's number": ({}, {"eos_token_id": 6}, {6}),
    "the config's list of one": ({}, {"eos_token_id": [6]}, {6}),
    "generation before config": ({"eos_token_id": 7}, {"eos_token_id": [6]}, {7}),
    "no token": ({"eos_token_id": [99, -1]}, {}, set()),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_id_that_ends_an_answer_is_kept(name: str, tmp_path: Path) -> None:
    generation, config, ends = ENDS[name]
    write(tmp_path, generation_config__json=generation, tokenizer_config__json={"eos_token": "<|end|>"})
    edit_json(tmp_path / "config.json", **config)
    metadata = metadata_of(tmp_path)
    assert metadata["tokenizer.ggml.eos_token_id"] == 9
    assert Tokenizer.from_gguf(metadata).eog_ids == {9} | ends


def test_tokens_that_no_answer_holds_are_kept(tmp_path: Path) -> None:
    write(tmp_path, generation_config__json={"suppress_tokens": [7, 5, 99]})
    metadata = metadata_of(tmp_path)
    assert metadata["tokenizer.ggml.suppress_tokens"] == [7, 5]
    assert Tokenizer.from_gguf(metadata).suppressed_ids == {5, 7}
    write(tmp_path, generation_config__json={"suppress_tokens": "7"})
    with pytest.raises(FormatError, match="suppress_tokens is"):
        open_input(tmp_path)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["7", 7.0, True, ["7"], {}, [[7]]])
def test_an_end_that_is_no_id_is_named(file: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path)
    edit_json(tmp_path / file, eos_token_id=value)
    with pytest.raises(FormatError, match=rf"{file}: eos_token_id is") as caught:
        open_input(tmp_path)
    assert caught.value.code == "CHECKPOINT_CONFIG"


def test_special_ids_of_generation_config_count_where_no_other_file_has_them(tmp_path: Path) -> None:
    write(tmp_path, generation_config__json={"bos_token_id": 3, "pad_token_id": 4})
    metadata = metadata_of(tmp_path)
    assert metadata["tokenizer.ggml.bos_token_id"] == 3
    assert metadata["tokenizer.ggml.padding_token_id"] == 4


def test_recommended_sampling_is_kept_as_transformers_means_it(tmp_path: Path) -> None:
    said = {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7, "repetition_penalty": 1.1}
    write(tmp_path, generation_config__json=said)
    found = {key: value for key, value in metadata_of(tmp_path).items() if key.startswith("general.sampling.")}
    names = {key: f"general.sampling.{name}" for key, (name, _) in SAMPLING.items()}
    assert found == {names[key]: said[key] for key in SAMPLING} | {"general.sampling.penalty_last_n": -1}
    edit_json(tmp_path / "generation_config.json", do_sample=False)
    found = {key: value for key, value in metadata_of(tmp_path).items() if key.startswith("general.sampling.")}
    assert found == {"general.sampling.temp": 0.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", "0.9"),
        ("top_k", 2.5),
        ("temperature", True),
        ("min_p", [1]),
        ("top_p", 7.0),
        ("temperature", -1),
        ("repetition_penalty", 0),
    ],
)
def test_a_recommendation_that_none_can_follow_is_named(key: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, generation_config__json={key: value})
    with pytest.raises(FormatError, match=f"{key}|{SAMPLING[key][0]}"):
        open_input(tmp_path)


def test_what_gguf_cannot_say_is_noted_by_name_and_silence_is_not(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of generation is transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    write(tmp_path, generation_config__json=defaults | transformers.GenerationConfig().to_dict())
    with open_input(tmp_path) as source:
        assert not source.notes
    for key in UNSAID:
        write(tmp_path, generation_config__json={key: 12345})
        with open_input(tmp_path) as source:
            assert any(key in note for note in source.notes)


# -- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens"])
def test_a_token_with_a_special_part_is_a_mark_unless_words_are_made_of_it(part: str, tmp_path: Path) -> None:
    vocab = {c: i for i, c in enumerate("abcdefg")} | {"<end>": 7, "ab": 8}
    tokenizer = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocab}}
    for text, kind in (("<end>", 3), ("ab", 1), ("a", 1)):
        word: Any = text if part.endswith("_token") else [text]
        write(tmp_path, tokenizer__json=tokenizer, tokenizer_config__json={part: word})
        assert metadata_of(tmp_path)["tokenizer.ggml.token_type"][vocab[text]] == kind


@pytest.mark.parametrize("key", ["add_prefix_space", "do_lower_case"])
def test_older_tokenizers_that_change_a_text_are_refused_by_name(key: str, tmp_path: Path) -> None:
    vocab = {c: i for i, c in enumerate("abcdefgh")} | {"ab": 8}
    files = {"tokenizer.json": None, "vocab.json": vocab, "merges.txt": b"#version: 0.2\na b\n"}
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"}, **files)
    assert metadata_of(tmp_path)["tokenizer.ggml.pre"] == "gpt-2"
    edit_json(tmp_path / "tokenizer_config.json", **{key: True})
    with pytest.raises(UnsupportedError, match=key):
        open_input(tmp_path)
