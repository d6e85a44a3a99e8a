"""Checkpoints against transformers: logits of the converted model, ids of its tokenizer, what llama.cpp makes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import TEXTS, edit_json, save_byte_level, save_model, save_sentence_piece, save_tensors
from llama_cpp_judge import llama_cpp_answer, take_gelu_of_a_table
from test_models import MODELS, ROUNDING, nmse, transformers_logits, transformers_model
from tiny_models import CHATML
from tokenizers import Tokenizer as Tokenizers

from edgellm.chat_template import ChatTemplate
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program, gpt_oss
from edgellm.models.parts.hparams import read_rope
from edgellm.quantize.convert import convert, plan_conversion
from edgellm.quantize.inputs import open_input
from edgellm.tokenizer import Tokenizer

pytest.importorskip("transformers", reason="the judge of checkpoints is transformers")

VOCAB = {"vocab_size": 280}
TOKENS = np.random.default_rng(0).integers(0, 270, 60).tolist()


def reference_logits(path: Path) -> np.ndarray:
    """Logits of every token of TOKENS, by the reference executor."""
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf).for_context(len(TOKENS))
        return ReferenceExecutor(program).run(Batch.single(program, TOKENS))


def save_tiny(folder: Path, name: str = "llama", pre: str = "smollm", dtype: str = "float32", **saving: Any) -> Any:
    """A checkpoint of one of MODELS with a tokenizer; the transformers model as it is stored."""
    kind, options = MODELS[name]
    save_byte_level(folder, pre)
    return save_model(folder, transformers_model(kind, options | VOCAB), dtype, **saving)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_converted_checkpoint_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "hf", name)
    with open_input(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    assert nmse(reference_logits(path), transformers_logits(model, TOKENS)) <= ROUNDING


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_auto_keeps_the_numbers_of_the_source(name: str, dtype: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "hf", name, dtype=dtype, max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    with open_input(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf")
        (wide,) = convert(source, tmp_path / "wide.gguf", "f32")
    kept = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    with GGUFFile.open(path) as gguf, GGUFFile.open(wide) as judge:
        for tensor_name, tensor in gguf.tensors.items():
            matrix = len(tensor.shape) == 2
            assert tensor.quant.name == (kept if matrix else "F32"), tensor_name
            assert np.array_equal(tensor.dequantize(), judge.tensors[tensor_name].dequantize())
    assert nmse(reference_logits(path), transformers_logits(model, TOKENS)) <= ROUNDING


@pytest.mark.parametrize(("outtype", "limit"), [("f16", 1e-5), ("bf16", 1e-3)])
def test_another_type_is_rounded_to_the_nearest(outtype: str, limit: float, tmp_path: Path) -> None:
    import gguf as gguf_package

    save_tiny(tmp_path / "hf")
    with open_input(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf", outtype)
        for tensor in gguf_package.GGUFReader(path).tensors:
            rows = source.tensors[tensor.name].rows()
            wanted = gguf_package.quants.quantize(rows, tensor.tensor_type)
            assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), wanted.view(np.uint8).reshape(-1))


JUDGED = (
    *("qwen35", "qwen35 tied, heads alike", "qwen35 one key head, odd"),
    *("qwen35moe", "qwen35moe tied", "qwen35moe one of many"),
    *("qwen3next", "qwen3next tied, heads alike", "qwen3next one key head, one of many"),
    *("llama 3 factors", "qwen2 tied", "qwen3", "gemma3", "lfm2"),
    *("qwen3moe", "qwen3moe one of many", "qwen3moe all", "qwen3moe some of few"),
    *("llama mixtral", "llama mixtral tied", "llama mixtral window"),
    *("qwen2moe", "qwen2moe one of many", "qwen2moe all", "olmoe all heads"),
    *("granite", "granite tied", "granite biases", "granite plain"),
    *("granitemoe", "granitemoe tied", "granitemoe shared", "granitemoe biases"),
    *("gemma", "gemma all heads", "gemma2", "gemma2 linear"),
    *("gemma4", "gemma4 inputs without shared", "gemma4 untied, odd sizes", "gemma4 dense", "gemma4 dense, all turn"),
    *("gemma4 experts", "gemma4 experts, one of many"),
    *("gpt-oss", "gpt-oss unscaled", "gpt-oss one of many"),
    *("mamba2", "mamba2 tied, one group", "granitehybrid", "granitehybrid dense, rotated, tied", "falcon-h1"),
    *("nemotron_h", "nemotron_h_moe", "nemotron_h_moe latent"),
    *("phi3 long", "mistral3", "cohere2", "glm4moe", "glm4", "command-r", "starcoder2", "smollm3", "olmo2", "exaone4"),
    *("qwen2vl", "qwen3vl", "qwen3vlmoe", "seed_oss", "ernie4_5", "hunyuan-dense", "minimax-m2", "lfm2moe"),
    *("deepseek2 lite", "deepseek2 groups", "deepseek2 flash"),
)
PROMPTS_BEHIND = [1, 2, 7, 33, 34, 60]  # tokens; windows are 33 wide


def _without_window(program: Program) -> Program:
    return replace(program, cache_layers=tuple(replace(layer, window=0) for layer in program.cache_layers))


def as_llama_cpp_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Program], Program]:
    """What llama.cpp does otherwise than the models' makers, done here too; what it changes of a program.

    GELU      a table of float16 for float16, in every architecture
    gpt-oss   YaRN's ramp begins and ends at whole dimensions, where the model has it between them
    window    files of architecture llama have none there
    """
    take_gelu_of_a_table(monkeypatch)
    if name == "gpt-oss":
        ramp = partial(read_rope, truncate=True)
        monkeypatch.setattr(gpt_oss, "read_rope", lambda *args, truncate, **more: ramp(*args, **more))
    return _without_window if name == "llama mixtral window" else lambda program: program


def centred(logits: np.ndarray) -> np.ndarray:
    """Logits, or log-probabilities, but for what is added to a whole row."""
    return logits.astype(np.float64) - logits.mean(axis=1, keepdims=True, dtype=np.float64)


@pytest.mark.parametrize("name", JUDGED)
def test_llama_cpp_and_edgellm_read_the_same_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same probabilities of all tokens, and without what llama.cpp does otherwise the same greedy text."""
    import edgellm

    save_tiny(tmp_path / "hf", name)
    with open_input(tmp_path / "hf") as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    with GGUFFile.open(path) as gguf:
        n_vocab, tokenizer = build_program(gguf).n_vocab, Tokenizer.from_gguf(gguf.metadata)
    judge = llama_cpp_answer(path, [TOKENS[:n] for n in PROMPTS_BEHIND], n_vocab, tokenizer.encode("a")[-1])
    with edgellm.load(path, executor="reference") as llm:
        text = llm.generate("the and", max_tokens=12, temperature=0)
    if name != "gpt-oss":
        assert judge.text == re.sub(r"\[PAD\d+\]", "", str(text))  # tokens that the tokenizer does not have
    change = as_llama_cpp_has_it(name, monkeypatch)
    with GGUFFile.open(path) as gguf:
        program = change(build_program(gguf)).for_context(256)  # as the judge has it
        logits = ReferenceExecutor(program).run(Batch.single(program, TOKENS))
    rows = logits[np.array(PROMPTS_BEHIND) - 1]
    limit = 1e-6 if name.startswith(("gemma", "starcoder2", "qwen2vl")) else 1e-9
    assert nmse(centred(rows), centred(judge.logprobs)) <= limit


@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe", "llama mixtral", "olmoe"])
def test_experts_in_one_tensor_are_those_that_come_one_by_one(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "each", name, dtype="bfloat16")
    save_tiny(tmp_path / "all", name, dtype="bfloat16")
    tensors = {key: tensor.bfloat16().contiguous() for key, tensor in model.state_dict().items()}
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors)
    save_tensors(tmp_path / "all" / "model.safetensors", tensors)
    with open_input(tmp_path / "each") as each, open_input(tmp_path / "all") as whole:
        assert list(each.tensors) == list(whole.tensors)
        for key, tensor in each.tensors.items():
            other = whole.tensors[key]
            assert (tensor.shape, tensor.quant) == (other.shape, other.quant)
            assert np.array_equal(tensor.rows(), other.rows()) and np.array_equal(tensor.data(), other.data())
            middle = tensor.n_rows // 3, 2 * tensor.n_rows // 3 + 1
            assert np.array_equal(tensor.rows(*middle), other.rows(*middle))


def test_experts_of_gpt_oss_in_mxfp4_are_those_that_transformers_unpacks(tmp_path: Path) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = save_tiny(tmp_path, "gpt-oss", dtype="bfloat16")
    tensors = {key: tensor.bfloat16().contiguous() for key, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, n_in, n_out = tensors[key].shape  # the other way round than in blocks
        blocks = torch.randint(0, 256, (n_experts, n_out, n_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, (n_experts, n_out, n_in // 32), dtype=torch.uint8)
        model.get_parameter(key).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        del tensors[key]
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_tensors(tmp_path / "model.safetensors", tensors)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    with open_input(tmp_path) as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    assert nmse(reference_logits(path), transformers_logits(model, TOKENS)) <= ROUNDING


# -- tokenizers ------------------------------------------------------------------------------------------------------


def ids_without_json(metadata: dict[str, tuple[Any, str]], text: str) -> list[int]:
    """The ids by the GGUF vocabulary alone, as other programs read it."""
    plain = {key: value for key, (value, _) in metadata.items() if key != "tokenizer.huggingface.json"}
    return Tokenizer.from_gguf(plain).encode(text, parse_special=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_the_pre_tokenizer_is_found_and_ids_equal_the_original(pre: str, bos: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    original = save_byte_level(tmp_path, pre, bos=bos)
    with open_input(tmp_path) as source:
        metadata = source.metadata
    assert metadata["tokenizer.ggml.pre"][0] == pre
    assert metadata["tokenizer.ggml.add_bos_token"][0] == bos
    assert not source.notes
    tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})
    for text in TEXTS:
        wanted = original.encode(text)
        assert tokenizer.encode(text, parse_special=True) == wanted, text
        assert ids_without_json(metadata, text) == wanted, text


def test_a_pre_tokenizer_without_a_name_travels_with_the_file(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    original = save_byte_level(tmp_path, "new")
    with open_input(tmp_path) as source:
        assert "no name" in source.notes[0]
        tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in source.metadata.items()})
    for text in TEXTS:
        assert tokenizer.encode(text, parse_special=True) == original.encode(text)


@pytest.mark.parametrize("files", ["tokenizer.json", "tokenizer.model", "tokenizer.json tokenizer.model"])
def test_sentence_piece_ids_equal_the_original(files: str, tmp_path: Path) -> None:
    kind, options = MODELS["llama"]
    save_model(tmp_path, transformers_model(kind, options | {"vocab_size": 402}))
    original = save_sentence_piece(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        if name not in files:
            (tmp_path / name).unlink()
    with open_input(tmp_path) as source:
        metadata = source.metadata
    assert metadata["tokenizer.ggml.model"][0] == "llama"
    assert ("tokenizer.huggingface.json" in metadata) == ("json" in files)
    tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})
    for text in [*TEXTS, "  Copyright (c) licence granted"]:
        wanted = [1, *original.encode(text)] if text else [1]
        assert ids_without_json(metadata, text) == wanted, text
        assert tokenizer.encode(text, parse_special=True) == wanted, text


PROMPTS = (
    *TEXTS,
    "<|im_start|>user\nthe License<|im_end|>\n<|im_start|>assistant\n",
    "hello</s>world </s> the<s>the",
    " <|im_start|> the  <|im_end|>  and <tool> x<tool>y",
)


def save_marked_sentence_piece(folder: Path, **rule: Any) -> Any:
    """A llama of SentencePiece's kind whose tokenizer.json has marks of chats; the transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    save_sentence_piece(folder)
    (folder / "tokenizer.model").unlink()
    description = json.loads((folder / "tokenizer.json").read_text("utf-8")) | rule
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, text in enumerate(("<|im_start|>", "<|im_end|>", "<tool>")):
        description["added_tokens"].append({"id": 400 + i, "content": text, "special": text != "<tool>"} | plain)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template=CHATML)
    kind, options = MODELS["llama"]
    save_model(folder, transformers_model(kind, options | {"vocab_size": 403}))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_without_tokenizer_json_blanks_are_put_where_llama_cpp_puts_them(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")
    save_marked_sentence_piece(tmp_path)
    with open_input(tmp_path, with_json=False) as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    program = """
import json, random, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, texts = sys.argv[1], json.loads(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
params.port = random.SystemRandom().randint(20000, 60000)
server = xllamacpp.Server(params)
address = server.listening_address + "/tokenize"
for text, special in texts:
    question = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
    request = urllib.request.Request(address, question, {"Content-Type": "application/json"})
    print("IDS", json.dumps(json.load(urllib.request.urlopen(request, timeout=60))["tokens"]))
"""
    texts = [(text, special) for text in PROMPTS for special in (False, True)]
    command = [sys.executable, "-c", program, str(path), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    answers = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("IDS ")]
    assert len(answers) == len(texts), done.stderr[-2000:]
    with GGUFFile.open(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    for (text, special), ids in zip(texts, answers, strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=special) == ids, (text, special)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_chats_of_a_converted_checkpoint_have_the_ids_that_transformers_gives(scheme: str, tmp_path: Path) -> None:
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    original = save_marked_sentence_piece(tmp_path, normalizer=None, pre_tokenizer=metaspace)
    with open_input(tmp_path) as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    with GGUFFile.open(path) as gguf:
        tokenizer, template = Tokenizer.from_gguf(gguf.metadata), ChatTemplate.from_metadata(gguf.metadata)
    for text in ("the License", " of\n", "", "<tool> x"):
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        wanted = original.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_segments(template.render(messages), add_special=False) == wanted
    answer = original.encode("the License", add_special_tokens=False)
    assert tokenizer.decode(answer) == original.decode(answer)


def test_another_tokenizer_json_counts_before_a_tokenizer_model(tmp_path: Path) -> None:
    kind, options = MODELS["llama"]
    save_model(tmp_path, transformers_model(kind, options | {"vocab_size": 402}))
    save_sentence_piece(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    vocab = description["model"]["vocab"]
    last, other = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[last], vocab[other] = vocab[other], vocab[last]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    with open_input(tmp_path) as source:
        assert source.metadata["tokenizer.ggml.tokens"][0][vocab[last]] == last
        metadata = source.metadata
    original = Tokenizers.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, last, other]:
        assert ids_without_json(metadata, text)[1:] == original.encode(text).ids[1:], text


IMAGE = {"content": "<image_soft_token>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BEYOND_TEXTS = ("a <image_soft_token> the and", "<image_soft_token>", *TEXTS)


def list_in_tokenizer_json(folder: Path, token_id: int, *, in_model: bool = False) -> None:
    """The token as an added one of tokenizer.json, and with ``in_model`` in its model too."""
    description = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    description["added_tokens"].append(IMAGE | {"id": token_id, "special": True})
    if in_model:
        description["model"]["vocab"][IMAGE["content"]] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(description), "utf-8")


def list_in_added_tokens(folder: Path, token_id: int) -> None:
    edit_json(folder / "added_tokens.json", **{str(IMAGE["content"]): token_id})


def list_in_decoder(folder: Path, token_id: int) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder={str(token_id): IMAGE | {"special": True}},
        pad_token=IMAGE["content"],
    )


LISTED = {
    "tokenizer.json": list_in_tokenizer_json,
    "its model too": partial(list_in_tokenizer_json, in_model=True),
    "added_tokens.json": list_in_added_tokens,
    "added_tokens_decoder": list_in_decoder,
}


KINDS = ("byte level", "sentence piece", "vocab and merges", "tokenizer.model")
# the last two kinds of folder have no tokenizer.json
LISTINGS = [(k, where) for k in KINDS for where in LISTED if k in KINDS[:2] or where.startswith("added_tokens")]


@pytest.mark.parametrize(("kind", "where"), LISTINGS)
def test_an_added_token_beyond_the_rows_is_left_out_and_told(kind: str, where: str, tmp_path: Path) -> None:
    n_vocab = 277 if kind in ("byte level", "vocab and merges") else 400
    model, options = MODELS["gemma3"]
    save_model(tmp_path, transformers_model(model, options | {"vocab_size": n_vocab}))
    if n_vocab == 277:
        save_byte_level(tmp_path, "gpt-2")
        description = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]
        edit_json(tmp_path / "vocab.json", **description["vocab"])
        merges = [" ".join(pair) for pair in description["merges"]]
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), "utf-8")
        edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    else:
        save_sentence_piece(tmp_path)
    if kind not in KINDS[:2]:
        (tmp_path / "tokenizer.json").unlink()
    with open_input(tmp_path) as source:
        without, notes = source.metadata, source.notes
    assert not notes
    LISTED[where](tmp_path, n_vocab)
    with open_input(tmp_path) as source:
        metadata, notes = source.metadata, source.notes
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    assert "<image_soft_token>" in notes[0] and f"{n_vocab} rows" in notes[0]
    assert metadata["tokenizer.ggml.tokens"] == without["tokenizer.ggml.tokens"]
    with GGUFFile.open(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    expected = Tokenizer.from_gguf({key: value for key, (value, _) in without.items()})
    for text in BEYOND_TEXTS:
        assert tokenizer.encode(text, parse_special=True) == expected.encode(text, parse_special=True), text
        assert ids_without_json(metadata, text) == ids_without_json(without, text), text
    spelled = tokenizer.encode(BEYOND_TEXTS[0], parse_special=True)
    assert max(spelled) < n_vocab
    assert BEYOND_TEXTS[0] in tokenizer.decode(spelled, special=True)


def test_the_file_that_knows_better_says_which_id_an_added_token_has(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    original = save_byte_level(tmp_path)
    edit_json(tmp_path / "added_tokens.json", **{"<tool_call>": 278, "<|im_end|>": 279})
    with open_input(tmp_path) as source:
        tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in source.metadata.items()})
        assert source.metadata["tokenizer.ggml.tokens"][0][278:] == ["[PAD278]", "[PAD279]"]
    text = "<tool_call> the<|im_end|>"
    assert tokenizer.encode(text, parse_special=True) == original.encode(text)


def test_the_metadata_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama 3 factors", max_shard_size="100KB")
    edit_json(
        tmp_path / "generation_config.json", temperature=0.6, top_p=0.9, top_k=40, eos_token_id=[2, 0], do_sample=True
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\nbase_model: some/model-1b\n---\n# A\n")
    with open_input(tmp_path) as source:
        metadata = plan_conversion(source, "bf16").metadata
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 40,
        "general.license": "mit",
        "general.base_model.0.organization": "some",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 3,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 280,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_ids": [2, 0],
    }
    assert {key: metadata[key][0] for key in wanted} == wanted
    assert metadata["general.languages"] == (["en"], "ARRAY[STRING]")
    assert "im_start" in metadata["tokenizer.chat_template"][0]
    types = metadata["tokenizer.ggml.token_type"][0]
    tokens = metadata["tokenizer.ggml.tokens"][0]
    assert types[tokens.index("<|im_end|>")] == 3
    assert types[tokens.index("<tool_call>")] == 4
    assert tokens[-1] == "[PAD279]"
    assert types[-1] == 5
