"""Which tokens are marks: they steer the model, so no text of a user may become one.

A file's token types alone do not say so. Older conversions type their turn marks USER_DEFINED or NORMAL, and a program
that believed them would let a user end a turn. A token is a mark by what it does, whichever of these holds:

* its type is CONTROL or UNKNOWN;
* it ends a generation, or a key such as ``tokenizer.ggml.eot_token_id`` names it;
* it has the shape ``<|...|>``, which no training on text makes;
* the model's own chat template writes it: ``<think>``, ``<tool_response>``, ``<start_of_turn>``.
"""

from collections.abc import Iterable

import numpy as np

from edgellm.formats.errors import FormatError
from edgellm.tokenizer.added_tokens import AddedTokens
from edgellm.tokenizer.special_ids import SpecialIds
from edgellm.tokenizer.vocabulary import TokenType, Vocabulary, has_mark_shape

# fmt: off
NAMING_KEYS = (
    "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "seperator_token_id",
    "cls_token_id", "mask_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id",
    "fim_rep_token_id", "fim_sep_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id",
)
# fmt: on
_TEXT_TYPES = (TokenType.UNDEFINED, TokenType.NORMAL)
_BRACKETS = frozenset("<>[]{}|\uff5c")


def named_ids(vocabulary: Vocabulary, special: SpecialIds) -> frozenset[int]:
    """The ids that end a generation or that a key of the file, or the default for a missing one, names.

    Padding is left out where its type is that of text: files name any token for it.
    """
    named = {_named(vocabulary, key) for key in NAMING_KEYS}
    padding = _named(vocabulary, "padding_token_id")
    if padding is not None and vocabulary.types[padding] not in _TEXT_TYPES:
        named.add(padding)
    named |= {special.bos, special.eos, special.unknown, *special.prefix, *special.suffix}
    return frozenset(i for i in named if i is not None) | special.end_of_generation


def _named(vocabulary: Vocabulary, key: str) -> int | None:
    value = vocabulary.metadata.get(f"tokenizer.ggml.{key}")
    return int(value) if isinstance(value, int | np.integer) and 0 <= value < vocabulary.n_vocab else None


def is_text_piece(vocabulary: Vocabulary, token_id: int) -> bool:
    """Whether text cannot be written without this token: a byte or a single character, whatever a key says of it."""
    kind = vocabulary.types[token_id]
    return kind == TokenType.BYTE or (kind in _TEXT_TYPES and len(vocabulary.tokens[token_id]) <= 1)


def control_ids(vocabulary: Vocabulary, special: SpecialIds) -> frozenset[int]:
    """The ids that are no part of an answer's text: by their type, or because a key names them."""
    typed = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
    named = (i for i in named_ids(vocabulary, special) if not is_text_piece(vocabulary, i))
    return frozenset((*typed, *named))


def mark_ids(vocabulary: Vocabulary, special: SpecialIds, templates: Iterable[str] = ()) -> frozenset[int]:
    """All ids that only trusted text may make; ``templates``: chat templates in Jinja that this model is used with."""
    tokens = vocabulary.tokens
    marks = set(control_ids(vocabulary, special))
    marks.update(i for i in _of_text(vocabulary) if has_mark_shape(tokens[i]))
    added = vocabulary.ids_of(TokenType.USER_DEFINED, TokenType.UNUSED)
    marks.update(i for i in added if has_mark_shape(tokens[i]))
    marks |= _written_by(templates, {tokens[i]: i for i in added if i not in marks and _may_be_mark(tokens[i])})
    return frozenset(marks)


def template_sources(vocabulary: Vocabulary) -> list[str]:
    """The chat templates that the file carries."""
    found = vocabulary.metadata.items()
    texts = (text for key, text in found if key.startswith("tokenizer.chat_template") and isinstance(text, str))
    return [text.encode("utf-8", "replace").decode() for text in texts]


def watched_ids(special: SpecialIds, mark_ids: frozenset[int]) -> frozenset[int]:
    """The marks that may not come of plain text: all but the unknown token, where that ends nothing."""
    unknown = {special.unknown} - {special.bos, *special.end_of_generation}
    return mark_ids - unknown


def made_of_text(vocabulary: Vocabulary, made: Iterable[int]) -> FormatError:
    """The error of a file whose tokenizer turned plain text into these marks."""
    names = ", ".join(f"{vocabulary.tokens[i]!r} (id {i})" for i in sorted(set(made))[:3])
    return FormatError(
        f"The file's tokenizer makes a mark that steers the model of plain text, or hides one: {names}. Expected a "
        "vocabulary that keeps marks and text apart. Use another file, or convert it again.",
        code="VOCAB_INVALID",
    )


def _of_text(vocabulary: Vocabulary) -> list[int]:
    return [i for i in vocabulary.ids_of(*_TEXT_TYPES) if vocabulary.tokens[i].startswith("<")]


def _may_be_mark(text: str) -> bool:
    """Letters in brackets or bars; white space, words and plain punctuation stand in templates as text."""
    return not _BRACKETS.isdisjoint(text) and any(map(str.isalnum, text))


def _written_by(templates: Iterable[str], candidates: dict[str, int]) -> set[int]:
    if not candidates:
        return set()
    searcher = AddedTokens(candidates)
    found = (token_id for source in templates for _, _, token_id in searcher.split(source))
    return {token_id for token_id in found if token_id is not None}
