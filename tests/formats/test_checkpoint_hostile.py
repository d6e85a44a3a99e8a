"""Checkpoints of a stranger: whatever a header, an index or a config claims, it ends in a named error or the truth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import save_sentence_piece

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.checkpoints import SCHEMES
from edgellm.formats.checkpoints.scheme_keys import ONLY, USED
from edgellm.formats.errors import EdgeLLMError, FormatError, ModelNotFoundError, ParameterError, UnsupportedError
from edgellm.formats.safetensors import SafetensorsFile
from edgellm.quantize.general_metadata import SAMPLING, UNSAID
from edgellm.quantize.inputs import open_input
from edgellm.tokenizer.checkpoint_vocabulary import tokenizer_metadata

LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate("abcdefgh")} | {"ab": 8}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "added_tokens": [{"id": 9, "content": "<|end|>", "special": True, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False}],
}  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    """The tensors of the smallest llama."""
    square = np.eye(8, dtype=np.float32)
    found = {f"model.layers.0.{name}.weight": square for name in (*LAYER, "mlp.down_proj")}
    found |= {f"model.layers.0.{name}.weight": square[0] for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": square[0], "model.embed_tokens.weight": np.ones((10, 8), np.float32)}


def safetensors(
    tensors: dict[str, np.ndarray], change: Callable[[dict[str, Any]], None] = lambda header: None
) -> bytes:
    """A file by hand; ``change`` may spoil the header."""
    header: dict[str, Any] = {}
    body = b""
    for name, array in tensors.items():
        start, body = len(body), body + array.tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, len(body)]}
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def write(folder: Path, **files: Any) -> Path:
    """A sound checkpoint with these files put in place of its own; None leaves one out."""
    contents: dict[str, Any] = {
        "config.json": CONFIG,
        "tokenizer.json": TOKENIZER,
        "model.safetensors": safetensors(arrays()),
    }
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    for name, content in contents.items():
        if content is not None:
            path = folder / name
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def code_of(folder: Path) -> str:
    with pytest.raises(EdgeLLMError) as raised:
        open_input(folder)
    assert str(folder) not in str(raised.value) or raised.value.code in ("CHECKPOINT_CONFIG", "MODEL_UNREADABLE")
    return raised.value.code


def test_the_sound_one_opens(tmp_path: Path) -> None:
    with open_input(write(tmp_path)) as source:
        assert source.tensors["blk.0.attn_q.weight"].rows().shape == (8, 8)


def entry(key: str, value: Any, name: str = "model.norm.weight") -> Callable[[dict[str, Any]], None]:
    """Change one entry of the header."""

    def change(header: dict[str, Any]) -> None:
        header[name][key] = value

    return change


def shifted(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = [n - 8 for n in header["model.norm.weight"]["data_offsets"]]


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an unknown dtype": (entry("dtype", "F7"), "CHECKPOINT_DTYPE"),
    "no dtype": (entry("dtype", None), "CHECKPOINT_DTYPE"),
    "a dtype of a list": (entry("dtype", ["F32"]), "CHECKPOINT_DTYPE"),
    "a dtype of another size": (entry("dtype", "F16"), "SAFETENSORS_BOUNDS"),
    "a negative dimension": (entry("shape", [-8]), "SAFETENSORS_SHAPE"),
    "a dimension of half": (entry("shape", [8.0]), "SAFETENSORS_SHAPE"),
    "a dimension of true": (entry("shape", [True]), "SAFETENSORS_SHAPE"),
    "dimensions that wrap": (entry("shape", [1 << 62, 1 << 62]), "SAFETENSORS_BOUNDS"),
    "a hundred dimensions": (entry("shape", [1] * 100), "SAFETENSORS_SHAPE"),
    "another shape": (entry("shape", [7]), "SAFETENSORS_BOUNDS"),
    "offsets backwards": (entry("data_offsets", [64, 32]), "SAFETENSORS_BOUNDS"),
    "three offsets": (entry("data_offsets", [0, 8, 32]), "SAFETENSORS_BOUNDS"),
    "offsets behind the end": (entry("data_offsets", [1 << 40, (1 << 40) + 32]), "MODEL_TRUNCATED"),
    "offsets of text": (entry("data_offsets", ["0", "32"]), "SAFETENSORS_BOUNDS"),
    "overlapping offsets": (shifted, "SAFETENSORS_OVERLAP"),
    "an entry of a number": (lambda header: header.update({"model.norm.weight": 4}), "SAFETENSORS_HEADER"),
    "an empty name": (lambda header: header.update({"": header.pop("model.norm.weight")}), "SAFETENSORS_HEADER"),
    "a tensor less": (lambda header: header.pop("model.norm.weight") and None, "SAFETENSORS_BOUNDS"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, code = HEADERS[name]
    assert code_of(write(tmp_path, model__safetensors=safetensors(arrays(), change))) == code


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "MODEL_TRUNCATED"),
        (b"\x00" * 7, "MODEL_TRUNCATED"),
        (b"\x00" * 8, "SAFETENSORS_HEADER"),
        ((1 << 63).to_bytes(8, "little"), "SAFETENSORS_HEADER"),
        ((1000).to_bytes(8, "little") + b"{}", "MODEL_TRUNCATED"),
        ((2).to_bytes(8, "little") + b"[]", "SAFETENSORS_HEADER"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "SAFETENSORS_HEADER"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "SAFETENSORS_HEADER"),
        ((17).to_bytes(8, "little") + b'{"a": 1, "a": 2} ', "SAFETENSORS_HEADER"),
        (b"PK\x03\x04" + bytes(100), "SAFETENSORS_HEADER"),
        (b"version https://git-lfs.github.com/spec/v1\n" + bytes(60), "SAFETENSORS_HEADER"),
        (safetensors(arrays())[:-1], "MODEL_TRUNCATED"),
        (safetensors(arrays()) + b"\0", "SAFETENSORS_BOUNDS"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(content: bytes, code: str, tmp_path: Path) -> None:
    assert code_of(write(tmp_path, model__safetensors=content)) == code


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", 7, "c:x.safetensors",
             "a\\b.safetensors", "a\0.safetensors", ""],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(arrays(), "a.safetensors") | {"model.norm.weight": name}}
    (tmp_path.parent / "model.safetensors").write_bytes(safetensors(arrays()))
    files = {"model.safetensors": None, "a.safetensors": safetensors(arrays())}
    folder = write(tmp_path, **files, **{"model.safetensors.index.json": index})
    assert code_of(folder) == "CHECKPOINT_INDEX"


@pytest.mark.parametrize("index", [[], {}, {"weight_map": 3}, {"weight_map": {}}, b"{", b"\xff"])
def test_an_index_that_is_none_is_refused(index: Any, tmp_path: Path) -> None:
    files = {"model.safetensors": None, "model.safetensors.index.json": index}
    assert code_of(write(tmp_path, **files)).startswith("CHECKPOINT")


def test_one_whole_file_counts_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    weight_map = dict.fromkeys(arrays(), "model-00001-of-00002.safetensors")
    with open_input(write(tmp_path, **{"model.safetensors.index.json": {"weight_map": weight_map}})) as source:
        assert source.tensors["blk.0.attn_q.weight"].rows().shape == (8, 8)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_never_left_out_without_a_word(name: str, tmp_path: Path) -> None:
    assert code_of(write(tmp_path, **{name: {}})) == "CHECKPOINT_ADAPTER"


def test_missing_and_doubled_shards_and_tensors_are_named(tmp_path: Path) -> None:
    names = list(arrays())
    first, second = ({name: arrays()[name] for name in part} for part in (names[:4], names[4:]))
    weight_map = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    files = {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": weight_map}}
    folder = write(tmp_path, **files, **{"a.safetensors": safetensors(first)})
    assert code_of(folder) == "CHECKPOINT_SHARD"
    write(folder, **files, **{"b.safetensors": safetensors(second)})
    open_input(folder).close()
    write(folder, **files, **{"b.safetensors": safetensors(first)})
    assert code_of(folder) == "CHECKPOINT_SHARD"
    write(folder, **files, **{"b.safetensors": safetensors(dict(list(second.items())[1:]))})
    assert code_of(folder) == "CHECKPOINT_TENSOR"


def test_a_whole_file_counts_before_an_index_that_does_not_name_it(tmp_path: Path) -> None:
    stale = {"weight_map": dict.fromkeys(arrays(), "model-00001-of-00002.safetensors")}
    folder = write(tmp_path, **{"model.safetensors.index.json": stale})
    open_input(folder).close()
    write(folder, **{"model-00001-of-00002.safetensors": b"the rest of an older one"})
    open_input(folder).close()
    named = {"weight_map": dict.fromkeys(arrays(), "model.safetensors") | {"more": "model-2.safetensors"}}
    write(folder, **{"model.safetensors.index.json": named})
    assert code_of(folder) == "CHECKPOINT_SHARD"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "adapter.*merge it"),
        ("model_index.json", "pictures"),
        ("params.json", "form of transformers"),
        ("m-Q4_K_M.gguf", "give the path of one"),
        ("other", "Give the folder that has it"),
    ],
)
def test_a_folder_of_something_else_is_called_by_its_name(file: str, words: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ModelNotFoundError, match=words):
        open_input(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    folder = write(tmp_path, **{"model.safetensors": None, "pytorch_model.bin": b"\x80\x02."})
    assert code_of(folder) == "CHECKPOINT_PICKLE"


# -- config.json -----------------------------------------------------------------------------------------------------

WRONG = [None, -1, 0, 1 << 80, 1.5, float("inf"), "8", [], {}, True, [[]], "\ud800"]


def is_read_or_refused_by_name(folder: Path) -> bool:
    """Whether a folder opens, or ends in an error of what is in it."""
    try:
        open_input(folder).close()
    except EdgeLLMError as error:
        return error.code.startswith(("CHECKPOINT", "MODEL_", "GGUF", "UNSUPPORTED", "VOCAB", "TOKENIZER"))
    return True


@pytest.mark.parametrize("key", [*CONFIG, "head_dim", "rope_scaling", "rope_theta", "rope_parameters", "text_config",
                                 "quantization_config", "layer_types", "eos_token_id", "hidden_act"])  # fmt: skip
def test_a_config_of_wrong_types_is_refused_or_read(key: str, tmp_path: Path) -> None:
    for value in WRONG:
        assert is_read_or_refused_by_name(write(tmp_path, config__json=CONFIG | {key: value})), value


SETTINGS = {
    "generation_config.json": [*SAMPLING, *UNSAID, "bos_token_id", "eos_token_id", "suppress_tokens", "do_sample"],
    "tokenizer_config.json": ["eos_token", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder",
                              "chat_template", "add_bos_token", "tokenizer_class", "add_prefix_space"],
    "special_tokens_map.json": ["bos_token", "additional_special_tokens"],
    "chat_template.json": ["chat_template"],
    "tokenizer.json": ["model", "pre_tokenizer", "normalizer", "post_processor", "decoder", "added_tokens"],
}  # fmt: skip


@pytest.mark.parametrize("file", SETTINGS)
def test_settings_of_wrong_types_are_refused_or_read(file: str, tmp_path: Path) -> None:
    write(tmp_path)
    sound = json.loads((tmp_path / file).read_bytes()) if (tmp_path / file).exists() else {}
    for key in SETTINGS[file]:
        for value in [*WRONG, [5], [None], {"0": 5}, {"0": {"content": 5}}, [{"name": "", "template": 5}]]:
            (tmp_path / file).write_text(json.dumps(sound | {key: value}))
            assert is_read_or_refused_by_name(tmp_path), (key, value)


@pytest.mark.parametrize("method", SCHEMES)
def test_settings_of_a_scheme_of_wrong_types_are_refused_or_read(method: str, tmp_path: Path) -> None:
    for key in sorted(USED | ONLY.keys()):
        for value in (-1, "8", [5], {"0": 5}):
            config = CONFIG | {"quantization_config": {"quant_method": method} | {key: value}}
            assert is_read_or_refused_by_name(write(tmp_path, config__json=config)), (key, value)


@pytest.mark.parametrize(("key", "value", "code"), [
    ("hidden_size", "8", "CHECKPOINT_CONFIG"), ("num_hidden_layers", 2, "MODEL_TENSOR_MISSING"),
    ("num_hidden_layers", 1 << 30, "CHECKPOINT_CONFIG"), ("intermediate_size", 9, "MODEL_SHAPE"),
    ("num_attention_heads", 3, "CHECKPOINT_CONFIG"), ("rms_norm_eps", "x", "CHECKPOINT_CONFIG"),
    ("rope_scaling", {"rope_type": "longrope"}, "CHECKPOINT_CONFIG"), ("hidden_act", "relu", "CHECKPOINT_CONFIG"),
    ("tie_word_embeddings", False, "CHECKPOINT_TENSOR"), ("num_local_experts", 8, "CHECKPOINT_CONFIG"),
    ("architectures", ["LlamaForSequenceClassification"], "CHECKPOINT_ARCHITECTURE"),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_named(key: str, value: Any, code: str, tmp_path: Path) -> None:
    assert code_of(write(tmp_path, config__json=CONFIG | {key: value})) == code


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    assert code_of(write(tmp_path, config__json=b" " * (1 << 24) + b"{}")) == "CHECKPOINT_CONFIG"


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    assert code_of(tmp_path) == "CHECKPOINT_CONFIG"
    assert code_of(write(tmp_path, **{"model.safetensors": None})) == "CHECKPOINT_SHARD"


@pytest.mark.parametrize("shape", [(8,), (4, 16), (2, 4, 8), (9, 8)])
def test_a_tensor_of_another_shape_is_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = arrays() | {"model.layers.0.self_attn.q_proj.weight": np.zeros(shape, np.float32)}
    assert code_of(write(tmp_path, model__safetensors=safetensors(tensors))) == "MODEL_SHAPE"


def test_a_tensor_that_has_no_place_is_named(tmp_path: Path) -> None:
    tensors = arrays() | {"model.layers.0.self_attn.sinks.weight": np.zeros(8, np.float32)}
    assert code_of(write(tmp_path, model__safetensors=safetensors(tensors))) == "MODEL_TENSOR_UNKNOWN"


# -- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": None}, "VOCAB_INVALID"),
        ({"model": {"type": "WordLevel", "vocab": {}}}, "TOKENIZER_MODEL"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"vocab": []}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"vocab": {"a": "0"}}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"vocab": {"a": 10}}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"vocab": {"a": -1}}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"vocab": {"a": 0, "b": 0}}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"merges": ["a b c"]}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"merges": [["a", 7]]}}, "VOCAB_INVALID"),
        ({"model": TOKENIZER["model"] | {"merges": [["x", "y"]]}}, "VOCAB_INVALID"),
        ({"added_tokens": [{"id": 1 << 40, "content": "x"}]}, "VOCAB_INVALID"),
        ({"added_tokens": [{"id": 1, "content": 5}]}, "VOCAB_INVALID"),
        ({"pre_tokenizer": {"type": "ByteLevel"}, "post_processor": {"type": "Magic"}}, "VOCAB_INVALID"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    assert code_of(write(tmp_path, tokenizer__json=TOKENIZER | change)) == code


def test_a_checkpoint_without_a_tokenizer_says_which_files_it_needs(tmp_path: Path) -> None:
    assert code_of(write(tmp_path, tokenizer__json=None)) == "VOCAB_MISSING"


@pytest.mark.parametrize("name", ["tiktoken.model", "hy.tiktoken"])
def test_a_tokenizer_of_ranks_alone_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **{"tokenizer.json": None, name: b"IQ== 0\n"})
    with pytest.raises(EdgeLLMError, match=rf"its tokenizer is {name}.*tokenizer\.json") as caught:
        open_input(folder)
    assert caught.value.code == "TOKENIZER_MODEL"


def test_a_tokenizer_model_of_noise_is_refused(tmp_path: Path) -> None:
    files = {"tokenizer.json": None, "tokenizer.model": random.Random(0).randbytes(4096)}
    assert code_of(write(tmp_path, **files)) == "VOCAB_INVALID"


def field(number: int, content: bytes) -> bytes:
    """A protobuf field with bytes in it."""
    length = len(content)
    return bytes((number << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14)) + content


@pytest.mark.parametrize("number", [3, 5])
@pytest.mark.parametrize("base", [1 << 10, 0x1FFFFF << 10])
def test_the_replacements_of_a_tokenizer_model_stay_inside_it(base: int, number: int, tmp_path: Path) -> None:
    save_sentence_piece(tmp_path)
    model = (tmp_path / "tokenizer.model").read_bytes()
    table = np.array([1 << 10, *[base] * 255], "<u4").tobytes()
    model += field(number, field(2, len(table).to_bytes(4, "little") + table + b"x\0"))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(model)
    checkpoint = Checkpoint(CheckpointFolder(tmp_path), {}, {})
    if base == 1 << 10:
        assert tokenizer_metadata(checkpoint, 400, space_prefix=True)
    else:
        with pytest.raises(FormatError, match="replacements") as error:
            tokenizer_metadata(checkpoint, 400, space_prefix=True)
        assert error.value.code == "VOCAB_INVALID"


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_the_scores_of_a_tokenizer_model_are_numbers(score: float, tmp_path: Path) -> None:
    save_sentence_piece(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.model").open("ab") as file:
        file.write(field(1, field(1, b"odd") + b"\x15" + np.array([score], "<f4").tobytes()))
    with pytest.raises(FormatError, match=r"score.*'?odd|odd.*score") as error:
        tokenizer_metadata(Checkpoint(CheckpointFolder(tmp_path), {}, {}), 401, space_prefix=True)
    assert error.value.code == "VOCAB_INVALID"


BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
SLOW = {"type": "Split", "pattern": {"Regex": r"\s+$"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [BOMB] * 12}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SLOW | {"pattern": {"Regex": "(a+)+$"}}, BYTES]}},
        {"model": TOKENIZER["model"] | {"dropout": 0.1}},
    ],
)
def test_a_tokenizer_that_would_do_harm_is_not_run(change: dict[str, Any], tmp_path: Path) -> None:
    assert code_of(write(tmp_path, tokenizer__json=TOKENIZER | change)) == "VOCAB_INVALID"


def test_a_tokenizer_that_is_slow_is_converted_by_name_only(tmp_path: Path) -> None:
    slow = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SLOW, BYTES]}}
    write(tmp_path, tokenizer__json=TOKENIZER | slow)
    assert code_of(tmp_path) == "TOKENIZER_PRE"
    with open_input(tmp_path, pre="gpt-2") as source:
        assert "linear time" in source.notes[0]
        assert "tokenizer.huggingface.json" not in source.metadata


# -- noise -----------------------------------------------------------------------------------------------------------


def test_any_changed_byte_of_a_header_ends_in_a_name_or_in_the_same_layout(tmp_path: Path) -> None:
    sound = safetensors(arrays())
    length = 8 + int.from_bytes(sound[:8], "little")
    noise = random.Random(0)
    path = tmp_path / "model.safetensors"
    for _ in range(600):
        content = bytearray(sound)
        for _ in range(noise.choice((1, 1, 2, 5))):
            content[noise.randrange(length)] = noise.choice((noise.randrange(256), ord("9"), ord("0"), ord("[")))
        path.write_bytes(content)
        try:
            file = SafetensorsFile.open(path)
        except (FormatError, UnsupportedError) as error:
            assert error.code.startswith(("SAFETENSORS", "CHECKPOINT", "MODEL"))
        else:
            assert sum(tensor.raw.size for tensor in file.tensors.values()) <= len(sound) - length


def test_settings_of_a_text_inside_are_for_models_that_also_see(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="text_config") as caught:
        open_input(write(tmp_path, config__json=CONFIG | {"text_config": CONFIG}))
    assert caught.value.code == "CHECKPOINT_CONFIG"


def test_a_base_needs_its_settings_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"no config\.json.*--base"):
        Checkpoint.of_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert Checkpoint.of_base(tmp_path).config == {"model_type": "llama"}
