"""Checkpoint folders for tests: tiny random models and tokenizers, saved by transformers and its kin themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CHATML, tiny_vocabulary
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEXTS = (
    "the and in on\n\nThe  worlds don't ERR 12345 I'LL",
    "naïve 我想 🚀😶\u200d🌫️ е́ 3.14",
    "<|im_start|>user\nthe and<|im_end|>\n",
    "  leading and trailing  ",
    "tabs\tand\r\nlines\n\n\n",
    "",
)


def byte_level_tokenizer(pre: str = "smollm", *, bos: bool = False) -> Tokenizer:
    """A byte-pair tokenizer of 276 tokens that cuts like this family; with ``bos`` every text begins with one."""
    tokens, types, merges = tiny_vocabulary()
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab, [tuple(merge.split(" ")) for merge in merges], ignore_merges=pre == "llama-bpe", fuse_unk=False
    )
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    cuts = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")],
        "new": [pre_tokenizers.Split(Regex(r"\p{L}{1,2}|\P{L}"), "isolated")],
    }[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


def save_byte_level(folder: Path, pre: str = "smollm", *, bos: bool = False) -> Any:
    """Write the files of such a tokenizer; the transformers tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers writes the tokenizers of checkpoints")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(pre, bos=bos),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_sentence_piece(folder: Path) -> Any:
    """A byte-pair SentencePiece model of 400 pieces, trained on this repository's licence: tokenizer.model, and the
    tokenizer.json that transformers' converter makes of such a model. The sentencepiece processor.
    """
    import sentencepiece

    text = (Path(__file__).parent.parent / "LICENSE").read_text("utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    splits = [(piece[:i], piece[i:]) for piece in pieces[259:] for i in range(1, len(piece))]  # in order of score
    merges = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return processor


def save_model(folder: Path, model: Any, dtype: str = "float32", **saving: Any) -> Any:
    """Save a transformers model in this type; the model as it will be read back, in float32."""
    torch = pytest.importorskip("torch")

    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    return type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> Path:
    """A safetensors file of torch tensors, or of numpy arrays."""
    kind = "numpy" if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()) else "torch"
    safetensors = pytest.importorskip(f"safetensors.{kind}", reason="safetensors writes the tensors of checkpoints")
    safetensors.save_file(dict(tensors), path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")
