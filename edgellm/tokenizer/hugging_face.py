"""A file's own ``tokenizer.huggingface.json``: the model's original tokenizer, carried whole and believed in part.

It is used for how it cuts text. What the tokens are and which of them are marks is said by the GGUF vocabulary, and the
two must agree id for id. Marks in trusted text go through it under names that nobody can write, so everything it knows
of them holds (blanks they swallow, what counts as the start of a text), and marks in a user's text are just text.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from edgellm.formats.errors import FormatError
from edgellm.formats.findings import short
from edgellm.formats.json_text import parse_json
from edgellm.tokenizer import marks
from edgellm.tokenizer.added_tokens import AddedTokens
from edgellm.tokenizer.json_parts import check_parts, merge_pairs, strips_first_space
from edgellm.tokenizer.json_patterns import Unfit
from edgellm.tokenizer.library_faults import LibraryFault, library_faults
from edgellm.tokenizer.special_ids import SpecialIds
from edgellm.tokenizer.vocabulary import SPACE, Vocabulary

KEY = "tokenizer.huggingface.json"
_NAME = "\U0010fffe{secret}{token_id}\U0010ffff"  # two characters that Unicode keeps for nobody


class HuggingFaceJson:
    """Text to ids by the tokenizer that the file carries as JSON."""

    def __init__(self, vocabulary: Vocabulary, special: SpecialIds, mark_ids: frozenset[int]) -> None:
        self._vocabulary, self._watched = vocabulary, marks.watched_ids(special, mark_ids)
        secret = secrets.token_hex(8)
        self._names = {i: _NAME.format(secret=secret, token_id=i) for i in mark_ids if vocabulary.tokens[i]}
        try:
            with library_faults():
                description = parse_json(vocabulary.metadata[KEY], KEY, "VOCAB_INVALID")
                check_parts(description)
                check_ids(description, vocabulary)
                self.strips_first_space = strips_first_space(description)
                self._searcher = _searcher(description, vocabulary, mark_ids)
                named = with_names(description, self._names)
                self._tokenizer = Tokenizer.from_str(json.dumps(named))
                self._own_ids = self._ids_to_change(named)
        except (Unfit, LibraryFault, FormatError, ValueError, RecursionError) as error:
            raise unusable(str(error)) from None
        self._literal = _literally(named, self._names)

    def encode(self, text: str) -> list[int]:
        """The ids of a text of which nothing is trusted."""
        return self.encode_runs([(text, False)])

    def encode_runs(self, runs: Iterable[tuple[str, bool]]) -> list[int]:
        """The ids of texts, trusted or not, that follow one another: those that the original gives for the whole.

        FormatError VOCAB_INVALID where marks come out that no trusted text holds.
        """
        written: list[int] = []
        parts: list[str] = []
        for text, special in runs:
            found: Iterable[tuple[int, int, int | None]] = ((0, len(text), None),)
            for start, end, token_id in self._searcher.split(text) if special else found:
                if token_id in self._names:
                    written.append(token_id)
                parts.append(text[start:end] if token_id not in self._names else self._names[token_id])
        whole, written = "".join(parts), self._made(written)
        ids = self._ids(self._tokenizer, whole)
        if self._made(ids) != written and self._literal:
            ids = self._ids(Tokenizer.from_str(self._literal), whole)
        made = self._made(ids)
        if made != written:
            raise marks.made_of_text(self._vocabulary, set(made) - set(written) or {*made, *written})
        return ids

    def _made(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self._watched] if not self._watched.isdisjoint(ids) else []

    def _ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [self._own_ids.get(i, i) for i in ids] if self._own_ids else ids

    def _ids_to_change(self, named: Mapping[str, Any]) -> dict[int, int]:
        """Library's id -> the file's: the library counts on for added tokens that its model does not hold."""
        changes: dict[int, int] = {}
        for token in named["added_tokens"]:
            token_id = self._tokenizer.token_to_id(token["content"])
            if token_id is not None and token_id != token["id"]:
                changes[token_id] = token["id"]
        taken = Counter(self._tokenizer.get_vocab().values()) if changes else {}
        if any(taken[token_id] > 1 for token_id in changes):
            raise Unfit(f"its tokens do not have the ids that it says, such as {min(changes.values())}")
        return changes


def _searcher(description: Mapping[str, Any], vocabulary: Vocabulary, mark_ids: frozenset[int]) -> AddedTokens:
    """Finds marks in trusted text, and the added words that may overlap them."""
    added = description.get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added if token["id"] not in mark_ids}
    ids |= {vocabulary.tokens[i]: i for i in sorted(mark_ids, reverse=True)}  # of duplicates the first
    return AddedTokens(ids, whole_words={token["content"] for token in added if token.get("single_word")})


def _literally(named: Mapping[str, Any], names: Mapping[int, str]) -> str:
    """The description for texts in which the library misses a mark because it looks for it in normalized text only;
    "" where it looks so for none.
    """
    added = named["added_tokens"]
    if not any(token["id"] in names and token.get("normalized") for token in added):
        return ""
    added = [token | {"normalized": False} if token["id"] in names else token for token in added]
    return json.dumps({**named, "added_tokens": added})


def check_ids(description: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """Every token of the JSON is the token that the GGUF vocabulary has under this id; raises Unfit."""
    model, tokens = description["model"], vocabulary.tokens
    vocab = model["vocab"]
    pairs = list(vocab.items()) if isinstance(vocab, dict) else [(pair[0], i) for i, pair in enumerate(vocab)]
    pairs += [(token["content"], token["id"]) for token in description.get("added_tokens") or ()]
    for text, token_id in pairs:
        if not 0 <= token_id < len(tokens):
            raise Unfit(f"it has id {token_id}, the file's vocabulary ends at {len(tokens) - 1}")
        if tokens[token_id] != text and tokens[token_id] not in _spellings(text, vocabulary.kind):
            raise Unfit(f"id {token_id} is {short(text)!r} in it and {short(tokens[token_id])!r} in the vocabulary")


def _spellings(text: str, kind: str) -> tuple[str, ...]:
    """How GGUF may write a token: added words with real spaces, BERT's starts of words where BERT marks the others."""
    if kind == "bert":
        return (text.removeprefix("##"),) if text.startswith("##") else (SPACE + text,)
    return (text.replace(SPACE, " "),)


def with_names(description: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """The description with each mark under a name of its own, in its model too, and without what is not used."""
    added = [
        token | {"content": names[token["id"]], "single_word": False} if token["id"] in names else token
        for token in description.get("added_tokens") or ()
    ]
    listed = {token["id"] for token in added}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [{"id": i, "content": name, "special": True} | plain for i, name in names.items() if i not in listed]
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    model = _renamed(description["model"], names)
    return {**description, **unused, "model": model, "added_tokens": sorted(added, key=lambda token: token["id"])}


def _renamed(model: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """The model with these tokens renamed, and without the merges that spell them."""
    vocab, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocab, list):
        return {**model, "vocab": [[names.get(i, text), score] for i, (text, score) in enumerate(vocab)]}
    old = {text: names[token_id] for text, token_id in vocab.items() if token_id in names}
    new = {**model, "vocab": {old.get(text, text): token_id for text, token_id in vocab.items()}}
    if isinstance(unknown, str):
        new["unk_token"] = old.get(unknown, unknown)
    if old and isinstance(model.get("merges"), list):
        new["merges"] = [pair for pair in merge_pairs(model) if old.keys().isdisjoint((*pair, "".join(pair)))]
    return new


def unusable(reason: str) -> FormatError:
    """The error of a JSON that is not believed."""
    return FormatError(
        f"{KEY} in the file cannot be used: {reason}. Expected the JSON of a Hugging Face tokenizer for this "
        f"vocabulary. Leave it out with --override-kv {KEY}=str: to use the GGUF vocabulary itself.",
        code="VOCAB_INVALID",
    )
