"""What of an untrusted ``tokenizer.json`` is believed: parts of known kinds, with bounded settings.

The tokenizers library runs whatever such a file describes: replacements nested until memory ends, patterns that take
hours, ids drawn by lot. ``check_parts`` reads the description alone, before the library sees it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edgellm.formats.findings import short
from edgellm.tokenizer.charsmap import MAX_REPLACEMENT_NBYTES, checked_charsmap
from edgellm.tokenizer.json_patterns import Slow, Unfit, check_pattern

# fmt: off
NORMALIZERS = frozenset((
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "ByteLevel", "Prepend",
    "Replace", "Precompiled",
))
PRE_TOKENIZERS = frozenset((
    "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
    "UnicodeScripts", "CharDelimiterSplit",
))
# fmt: on
MODELS = frozenset(("BPE", "WordLevel", "WordPiece", "Unigram"))
MAX_PARTS = 32
MAX_GROWTH = 64  # characters of one character after all replacements
MAX_SETTING_CHARS = 256  # of a text among the settings of a part
MAX_WORD_CHARS = 1000  # WordPiece takes the square of it
MAX_PIECE_CHARS = 1024  # Unigram looks this far at each character


def check_parts(description: Any) -> None:
    """Raise Unfit for parts of other kinds, settings out of bounds, replacements that make a text grow without end.

    Slow, a kind of Unfit, where nothing else is wrong than a pattern that takes too long.
    """
    if not isinstance(description, dict):
        raise Unfit(f"it is {short(description)}, not an object")
    _check_model(description.get("model"))
    added = description.get("added_tokens") or []
    if not isinstance(added, list) or not all(_is_added_token(token) for token in added):
        raise Unfit("its added tokens are not a list of ids and texts")
    slow: Slow | None = None
    growth = 1.0
    parts = [*_parts(description.get("normalizer"), NORMALIZERS, "normalizer", "normalizers")]
    parts += _parts(description.get("pre_tokenizer"), PRE_TOKENIZERS, "pre-tokenizer", "pretokenizers")
    for part in parts:
        try:
            growth *= _growth(part)
        except Slow as error:
            slow = slow or error
        if growth > MAX_GROWTH:
            raise Unfit(f"its normalizers make one character more than {MAX_GROWTH}")
    if slow is not None:
        raise slow


def merge_pairs(model: Mapping[str, Any]) -> list[list[str]]:
    """The two tokens of each merge of a model whose parts are checked."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ()]


def strips_first_space(description: Mapping[str, Any]) -> bool:
    """Whether its decoder leaves out a blank at the start of a text."""
    parts = [description.get("decoder")]
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        if kind == "Sequence" and isinstance(part.get("decoders"), list):
            parts += part["decoders"]
        if kind == "Strip" and part.get("content") == " " and part.get("start"):
            return True
        if kind == "Metaspace" and part.get("add_prefix_space", True) and part.get("prepend_scheme") != "never":
            return True
    return False


def _parts(found: Any, known: frozenset[str], name: str, list_key: str) -> Iterator[dict[str, Any]]:
    """The parts of a component, those of sequences one by one."""
    waiting, n = [found] if found is not None else [], 0
    while waiting:
        part = waiting.pop(0)
        n += 1
        if not isinstance(part, dict) or n > MAX_PARTS:
            raise Unfit(f"its {name} has more than {MAX_PARTS} parts, or a part that is no object")
        kind = part.get("type")
        if kind == "Sequence" and isinstance(part.get(list_key), list):
            waiting = part[list_key][: MAX_PARTS + 1] + waiting
            continue
        if not isinstance(kind, str) or kind not in known:
            raise Unfit(f"it has the {name} {short(kind)}; known: {', '.join(sorted(known))}")
        for key, value in part.items():
            if isinstance(value, str) and len(value) > MAX_SETTING_CHARS and key != "precompiled_charsmap":
                raise Unfit(f"the {key} of its {name} {kind} has {len(value):,} characters")
        yield part


def _growth(part: Mapping[str, Any]) -> float:
    """How many characters one may become by this part, beyond what Unicode's own forms do."""
    if part["type"] == "Precompiled":
        _check_charsmap(part.get("precompiled_charsmap"))
    if part["type"] == "Prepend":
        return 1.0 + len(part.get("prepend") or "")
    if part["type"] not in ("Replace", "Split"):
        return 1.0
    length, content = _pattern_of(part), part.get("content")
    if part["type"] == "Split":
        return 1.0
    if not isinstance(content, str):
        raise Unfit("a replacement without its content")
    return max(1.0, len(content) / length)


def _pattern_of(part: Mapping[str, Any]) -> int:
    """Check the pattern of a Split or Replace; how many characters a match has at least."""
    pattern = part.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return len(text)
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str) or not regex:
        raise Unfit(f"the pattern {short(pattern)}; expected a text or a regular expression")
    check_pattern(regex)
    return 1


def _check_charsmap(found: Any) -> None:
    def unfit() -> Unfit:
        return Unfit(f"a precompiled_charsmap that is not sound, or replaces by over {MAX_REPLACEMENT_NBYTES} bytes")

    if not isinstance(found, str):
        raise unfit()
    try:
        blob = base64.b64decode(found, validate=True)
    except (binascii.Error, ValueError):
        raise unfit() from None
    checked_charsmap(blob, unfit)


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        raise Unfit("it has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if not isinstance(kind, str) or kind not in MODELS:
        raise Unfit(f"its model is of the kind {short(kind)}; known: {', '.join(sorted(MODELS))}")
    _MODEL_CHECKS[kind](model)


def _check_bpe(model: Mapping[str, Any]) -> None:
    if model.get("dropout"):
        raise Unfit("its model leaves out merges by lot (dropout), so a text has no one list of ids")
    _check_vocab(model)
    merges = model.get("merges") or []
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        raise Unfit("its merges are no list of two tokens each")


def _is_merge(merge: Any) -> bool:
    if isinstance(merge, str):
        return merge.count(" ") == 1
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def _check_vocab(model: Mapping[str, Any]) -> None:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise Unfit("the vocabulary of its model is no object of ids")


def _check_word_piece(model: Mapping[str, Any]) -> None:
    _check_vocab(model)
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or not 0 < longest <= MAX_WORD_CHARS:
        raise Unfit(f"max_input_chars_per_word is {short(longest)}; expected up to {MAX_WORD_CHARS}")


def _check_unigram(model: Mapping[str, Any]) -> None:
    vocab = model.get("vocab")
    pairs: list[Any] = vocab if isinstance(vocab, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise Unfit("the vocabulary of its model is no list of pieces with scores")
    if max((len(pair[0]) for pair in pairs), default=0) > MAX_PIECE_CHARS:
        raise Unfit(f"a piece of more than {MAX_PIECE_CHARS} characters")


_MODEL_CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "BPE": _check_bpe,
    "WordLevel": _check_vocab,
    "WordPiece": _check_word_piece,
    "Unigram": _check_unigram,
}


def _is_added_token(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
