"""Vocabularies of ranks, as tiktoken reads them: a line for each token, its bytes in base64 and its rank.

How text is cut, and which marks follow the ranks, stands in a program of the model's author. The families whose
programs are known become the tokenizer.json that transformers makes of such a file, and go the same way; for another
one the name of a pre-tokenizer says how text is cut, and tokenizer_config.json has to list the marks.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short
from edgellm.tokenizer import pre_tokenizers as table
from edgellm.tokenizer.byte_level import BYTE_OF_CHAR, pre_tokenizer_of
from edgellm.tokenizer.checkpoint_tokens import MAX_TOKENIZER_NBYTES, below, invalid

MAX_TOKEN_NBYTES = 1024  # finding the merges of a token takes the square of it
MAX_MERGES_NBYTES = 1 << 26  # those of 200,000 tokens have less than 20 million
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


class Family(NamedTuple):
    """What the program of a family says: its pre-tokenizer's name, Unicode's form, and marks behind the ranks.

    marks   the one with this place behind the last rank and this id; None behind the last
    """

    pre: str
    normalizer: str
    marks: Callable[[int, int], str | None]


def _listed(*names: str, more: int = 0) -> Callable[[int, int], str | None]:
    """These, and behind them so many extra ones."""
    every = [*names, *(f"<|extra_{i}|>" for i in range(more))]
    return lambda place, _: every[place] if place < len(every) else None


# fmt: off
FAMILIES: dict[str, Family] = {
    "TikTokenTokenizer":  # Kimi, Moonlight
        Family("kimi-k2", "", lambda place, token_id: f"<|reserved_token_{token_id}|>" if place < 256 else None),
    "ChatGLM4Tokenizer": Family("chatglm-bpe", "", _listed(
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    )),
    "HYTokenizer": Family("hunyuan", "NFC", _listed(
        "<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", more=205,
    )),
    "QWenTokenizer": Family("qwen2", "NFC", _listed("<|endoftext|>", "<|im_start|>", "<|im_end|>", more=205)),
}
# fmt: on


def rank_description(
    checkpoint: Checkpoint, n_vocab: int, pre: str | None, listed: Mapping[int, tuple[str, bool]]
) -> tuple[dict[str, Any], str, list[str]] | None:
    """The tokenizer.json that a file of ranks stands for, the name of its pre-tokenizer, and what the user should know;
    None without such a file.

    listed   id -> (text, special) of the tokens that the folder's other files add; they go before the family's

    FormatError ``VOCAB_INVALID``; UnsupportedError for a family that is not known where ``pre`` says nothing.
    """
    name = _rank_file(checkpoint)
    if name is None:
        return None
    config = checkpoint.json("tokenizer_config.json") or {}
    kind = str(config.get("tokenizer_class"))
    family = FAMILIES.get(kind)
    if family is None and pre is None:
        raise UnsupportedError(
            f"{checkpoint.folder.name}: its tokenizer is {name}, ranks of byte sequences whose marks and cuts stand in "
            f"a program of its author; edgellm knows those of the classes {', '.join(FAMILIES)}, not {short(kind)}. "
            "Give the name of its pre-tokenizer with --pre if tokenizer_config.json lists its marks, write "
            "tokenizer.json with transformers, or take a GGUF file of the model.",
            code="TOKENIZER_MODEL",
        )
    ranks = _read_ranks(checkpoint, name, n_vocab)
    chosen = pre or (family.pre if family is not None else "")
    rule = table.pre_tokenizer(chosen)
    normalizer = family.normalizer if family is not None else rule.normalizer
    notes = []
    if normalizer != rule.normalizer:
        notes.append(f"The tokenizer brings text to Unicode's form {normalizer or 'as it is written'}, which {chosen!r}"
                     " does not say. edgellm reads the original, which is in the file; other programs will cut some "
                     "texts differently.")  # fmt: skip
    marks = {text: (i, special) for i, (text, special) in listed.items()}
    for token_id in range(len(ranks), n_vocab):
        text = family.marks(token_id - len(ranks), token_id) if family is not None else None
        if text is not None and token_id not in listed and text not in marks:
            marks[text] = token_id, True
    added = [{"id": i, "content": text, "special": special, **_PLAIN} for text, (i, special) in marks.items()]
    model = {"type": "BPE", "vocab": {_spelled(token): rank for token, rank in ranks.items()}, "merges": _merges(ranks)}
    return (
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": normalizer} if normalizer else None,
            "pre_tokenizer": _described(rule),
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": model | {"ignore_merges": True},  # a word that has a rank is taken whole
        },
        chosen,
        notes,
    )


def _rank_file(checkpoint: Checkpoint) -> str | None:
    files = checkpoint.files
    if files.has("vocab.json") and files.has("merges.txt"):
        return None
    found = [*files.names(".tiktoken"), *files.names("tiktoken.model")]
    if found or not files.has("tokenizer.model"):
        return found[0] if found else None
    start = (files.read("tokenizer.model", MAX_TOKENIZER_NBYTES) or b"")[: 2 * MAX_TOKEN_NBYTES]
    return "tokenizer.model" if _RANK_LINE.match(start) else None


def _read_ranks(checkpoint: Checkpoint, name: str, n_vocab: int) -> dict[bytes, int]:
    """Bytes of a token -> its rank, from 0 on, in the order of ranks."""
    found: dict[bytes, int] = {}
    for number, line in enumerate((checkpoint.files.read(name, MAX_TOKENIZER_NBYTES) or b"").splitlines(), 1):
        if not line:
            continue
        text, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            token = b""
        if not 0 < len(token) <= MAX_TOKEN_NBYTES or not rank.isdigit() or len(rank) > 9:
            expected = f"up to {MAX_TOKEN_NBYTES:,} bytes in base64, a space and a rank"
            raise invalid(f"line {number:,} of {name}, {short(line[:80].decode('latin-1'))}", expected)
        if token in found:
            raise invalid(f"a token twice in {name}, the second time in line {number:,}", "each once")
        found[token] = int(rank)
    ranks = sorted(found.values())
    if ranks != list(range(len(ranks))):
        raise invalid(f"ranks in {name} that leave one out or have one twice", "0, 1, 2 ...")
    if len(ranks) > n_vocab:
        raise invalid(f"{len(ranks):,} ranks in {name}", below(n_vocab))
    if missing := [byte for byte in range(256) if bytes((byte,)) not in found]:
        raise invalid(f"no rank for the byte {missing[0]} in {name}", "one for each of the 256")
    return dict(sorted(found.items(), key=lambda one: one[1]))


def _merges(ranks: Mapping[bytes, int]) -> list[list[str]]:
    """All pairs of tokens that make one, in the order of its rank: whichever of them stand side by side are merged."""
    merges: list[list[str]] = []
    spelled, nbytes = {token: _spelled(token) for token in ranks}, 0
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        nbytes += len(pairs) * (len(token) + 1)
        if nbytes > MAX_MERGES_NBYTES:
            raise invalid(f"merges of more than {nbytes:,} bytes", f"up to {MAX_MERGES_NBYTES:,}")
        merges += [[spelled[left], spelled[right]] for _, _, left, right in sorted(pairs)]
    return merges


def _spelled(token: bytes) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in token)


def _described(rule: table.PreTokenizer) -> Any:
    """The cuts of a rule as tokenizer.json has them."""
    tokenizer = Tokenizer(models.BPE())
    cuts = pre_tokenizer_of(rule)
    if cuts is None or not rule.byte_level:
        raise UnsupportedError(
            "The pre-tokenizer that --pre names is none of bytes, and ranks are of bytes. Give that of the family.",
            code="TOKENIZER_PRE",
        )
    tokenizer.pre_tokenizer = cuts
    return json.loads(tokenizer.to_str())["pre_tokenizer"]
