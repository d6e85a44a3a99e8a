"""The tokenizer of a Hugging Face checkpoint as GGUF metadata: tokens, types, scores or merges, special ids, template.

Keys and conventions are those of llama.cpp's converter. The original tokenizer.json travels along, so that edgellm cuts
text by the model's own rules even where GGUF has no name for them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.findings import short
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.vocabulary_checks import BYTE_TEXT
from edgellm.tokenizer import checkpoint_encoders as encoders
from edgellm.tokenizer import hugging_face, tokenizer
from edgellm.tokenizer.charsmap import checked_charsmap, stored_charsmaps
from edgellm.tokenizer.checkpoint_ranks import rank_description
from edgellm.tokenizer.checkpoint_specials import Specials
from edgellm.tokenizer.checkpoint_tokens import ADDED_SCORE, MAX_TOKENIZER_NBYTES, Tokens, below, invalid, vocab_of
from edgellm.tokenizer.json_parts import check_parts, merge_pairs
from edgellm.tokenizer.json_patterns import Slow, Unfit
from edgellm.tokenizer.library_faults import LibraryFault, library_faults
from edgellm.tokenizer.pre_detection import find_pre
from edgellm.tokenizer.vocabulary import TokenType

ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
CLASS_PRE = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}  # of checkpoints without tokenizer.json
# tokens that some checkpoints forget to mark as special
_LOOKS_SPECIAL = re.compile("<\\|.*\\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\\[@BOS@\\]", re.DOTALL)


def tokenizer_metadata(
    checkpoint: Checkpoint, n_vocab: int, *, space_prefix: bool, pre: str | None = None, with_json: bool = True
) -> tuple[TypedMetadata, list[str]]:
    """The tokenizer's keys, and what the user should know of it.

    n_vocab       rows of the embedding; ids beyond the tokenizer's are filled up as unused
    space_prefix  what a SentencePiece vocabulary does where the files do not say
    pre           the name of the pre-tokenizer, instead of looking for it
    with_json     carry tokenizer.json in the file

    FormatError ``VOCAB_INVALID`` for files that do not fit together, UnsupportedError for other kinds of tokenizers.
    """
    description = _description(checkpoint) or _encoder_description(checkpoint)
    notes: list[str] = []
    if description is None and (ranks := rank_description(checkpoint, n_vocab, pre, _added(checkpoint, None))):
        description, pre, notes = ranks
    slow = _slowness(description)
    added = _added(checkpoint, description)
    beyond = {text: token_id for token_id, (text, _) in added.items() if token_id >= n_vocab}
    if beyond:
        notes.append(_dropped_note(beyond, n_vocab))
        description = description and _without(description, beyond)
    tokens, found, pre = _tokens(checkpoint, description, n_vocab, space_prefix, pre, slow, notes)
    _add_tokens(tokens, added)
    ids = {text: i for i, text in reversed(list(enumerate(tokens.texts)))}
    specials = Specials(checkpoint, ids, description, tokens.kind)
    _mark_specials(tokens, specials.texts(), ids)
    head: TypedMetadata = {
        "tokenizer.ggml.model": (tokens.kind, "STRING"),
        "tokenizer.ggml.pre": (pre, "STRING"),
        "tokenizer.ggml.tokens": (tokens.texts, "ARRAY[STRING]"),
    }
    if tokens.scores is not None:
        head["tokenizer.ggml.scores"] = (np.array(tokens.scores, np.float32), "ARRAY[FLOAT32]")
    head["tokenizer.ggml.token_type"] = (np.array(tokens.types, np.int32), "ARRAY[INT32]")
    if tokens.merges:
        head["tokenizer.ggml.merges"] = (tokens.merges, "ARRAY[STRING]")
    found = head | specials.metadata() | found
    if description is not None and with_json:
        text = json.dumps(description, ensure_ascii=False, separators=(",", ":"))
        why_not = slow or _disagreement(found | {hugging_face.KEY: (text, "STRING")})
        if why_not:
            notes.append(f"tokenizer.json is not carried in the file: {why_not}. The GGUF vocabulary is used alone.")
        else:
            found[hugging_face.KEY] = (text, "STRING")
    return found, notes


def _tokens(
    checkpoint: Checkpoint,
    description: dict[str, Any] | None,
    n_vocab: int,
    space_prefix: bool,
    pre: str | None,
    slow: str,
    notes: list[str],
) -> tuple[Tokens, TypedMetadata, str]:
    """The tokens by the kind of vocabulary, what else is said of that kind, and the name of its pre-tokenizer."""
    found: TypedMetadata = {}
    if description is None and checkpoint.files.has("tokenizer.model"):
        tokens = _from_sentence_piece(checkpoint, n_vocab)
        found["tokenizer.ggml.add_space_prefix"] = (_model_adds_space(checkpoint, space_prefix), "BOOL")
        pre = "default"
    elif description is None:
        tokens, pre = _from_vocab_and_merges(checkpoint, n_vocab, pre)
    elif (kind := _kind(description)) in _ENCODER_KINDS:
        pieces, more = _ENCODER_KINDS[kind]
        tokens = pieces(description, n_vocab)
        found |= more(description)
        if tokens.kind == "t5":
            found["tokenizer.ggml.add_space_prefix"] = (_adds_space(description), "BOOL")
        elif not encoders.normalizes_as_bert(description):
            notes.append("The tokenizer keeps Chinese characters or control characters in words, which GGUF has no key "
                         "for. edgellm reads the original, which is in the file; other programs will cut some texts "
                         "differently.")  # fmt: skip
        pre = "default"
    elif kind == "SentencePiece":
        tokens = _from_sentence_piece(checkpoint, n_vocab, description)
        found["tokenizer.ggml.add_space_prefix"] = (_adds_space(description), "BOOL")
        pre = "default"
    else:
        model = description["model"]
        # a space inside a part, which the file's form cannot hold, is spelled in the byte alphabet
        merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merge_pairs(model)]
        tokens = _byte_pairs(model.get("vocab"), merges, n_vocab)
        pre = pre or _found_pre(description, slow, notes)
    return tokens, found, pre


def _description(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """tokenizer.json, with the tokens that other files of the folder add to it, as transformers adds them."""
    description = checkpoint.json("tokenizer.json", MAX_TOKENIZER_NBYTES)
    listed = (description or {}).get("added_tokens")
    if description is None or not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
        return description
    known = {text for token in listed if isinstance(text := token.get("content"), str)}
    decoder = (checkpoint.json("tokenizer_config.json") or {}).get("added_tokens_decoder")
    given = decoder if isinstance(decoder, dict) else {}
    late = []
    for token_id, (text, special) in _added(checkpoint, None).items():
        if text not in known:
            entry = given.get(str(token_id))
            flags = {name: bool(isinstance(entry, dict) and entry.get(name)) for name in ADDED_FLAGS}
            late.append({"id": token_id, "content": text, "special": special, **flags})
    return {**description, "added_tokens": [*listed, *late]} if late else description


def _slowness(description: dict[str, Any] | None) -> str:
    """Why tokenizer.json may not cut long texts, or ""; FormatError for one that is not sound at all."""
    try:
        if description is not None:
            check_parts(description)
    except Slow as error:
        return str(error)
    except Unfit as error:
        raise invalid(f"a tokenizer.json that is not believed: {error}", "the parts of a tokenizer") from None
    return ""


def _disagreement(metadata: TypedMetadata) -> str:
    """Why the JSON does not go with the vocabulary that was made of the checkpoint, or ""."""
    try:
        tokenizer.Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})
    except FormatError as error:
        if hugging_face.KEY not in str(error):
            raise
        return str(error)
    return ""


# -- kinds -----------------------------------------------------------------------------------------------------------


_ENCODER_KINDS: dict[str, tuple[Callable[..., Tokens], Callable[..., TypedMetadata]]] = {
    "WordPiece": (encoders.word_pieces, encoders.word_piece_metadata),
    "Unigram": (encoders.unigram_pieces, encoders.unigram_metadata),
}


def _kind(description: Mapping[str, Any]) -> str:
    """One of _ENCODER_KINDS, "BPE" for GPT-2's byte pairs, or "SentencePiece" for those over characters.

    UnsupportedError for any other kind.
    """
    model = description["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind in _ENCODER_KINDS:
        return str(kind)
    if kind == "BPE" and '"ByteLevel"' in json.dumps(description.get("pre_tokenizer")):
        return "BPE"
    if kind == "BPE" and model.get("byte_fallback"):
        return "SentencePiece"
    raise UnsupportedError(
        f"tokenizer.json is of the kind {short(kind)}; edgellm converts byte pairs over bytes (GPT-2's), "
        "SentencePiece's with byte fallback, WordPiece and Unigram. Take another model of this family.",
        code="TOKENIZER_MODEL",
    )


def _encoder_description(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The tokenizer.json that an encoder's older file stands for, None without one."""
    if checkpoint.files.has("tokenizer.model"):
        return None
    if checkpoint.files.has(encoders.UNIGRAM_FILE):
        return encoders.unigram_description(checkpoint)
    if checkpoint.files.has(encoders.WORD_PIECE_FILE):
        return encoders.word_piece_description(checkpoint)
    return None


def _byte_pairs(vocab: Any, merges: list[str], n_vocab: int) -> Tokens:
    tokens = Tokens.empty("gpt2", n_vocab)
    for text, token_id in vocab_of(vocab, n_vocab).items():
        tokens.put(token_id, text, TokenType.NORMAL)
    tokens.merges = merges
    return tokens


def _found_pre(description: dict[str, Any], slow: str, notes: list[str]) -> str:
    try:
        with library_faults():
            pre, whole = find_pre(Tokenizer.from_str(json.dumps(description)), description)
    except LibraryFault as error:
        raise invalid(f"tokenizer.json that cannot be read ({short(str(error))})", "a tokenizer") from None
    if not whole and slow:
        raise UnsupportedError(
            f"tokenizer.json cuts text in a way that GGUF has no name for, and cannot be carried: {slow}. If the model "
            "is of a family whose pre-tokenizer has a name, give it with --pre.",
            code="TOKENIZER_PRE",
        )
    if not whole:
        notes.append(
            "The tokenizer cuts text in a way that GGUF has no name for. edgellm reads the original, which is in the "
            f"file; other programs will read {pre or 'default'!r} and cut some texts differently. A name can be given "
            "with --pre."
        )
    return pre or "default"


def _from_vocab_and_merges(checkpoint: Checkpoint, n_vocab: int, pre: str | None) -> tuple[Tokens, str]:
    """The older pair of files, vocab.json and merges.txt; the class of the tokenizer says how it cuts."""
    vocab = checkpoint.json("vocab.json", MAX_TOKENIZER_NBYTES)
    lines = checkpoint.text("merges.txt", MAX_TOKENIZER_NBYTES)
    if vocab is None or lines is None:
        raise FormatError(
            f"{checkpoint.folder.name}: has no tokenizer: tokenizer.json, tokenizer.model, a file of tiktoken's ranks, "
            "or vocab.json with merges.txt was expected. Download all files of the checkpoint into one folder.",
            code="VOCAB_MISSING",
        )
    config = checkpoint.json("tokenizer_config.json") or {}
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    for key in ("add_prefix_space", "do_lower_case"):
        if config.get(key) not in (None, False):
            raise UnsupportedError(
                f"{checkpoint.folder.name}/tokenizer_config.json: {key} is {short(config[key])}, which vocab.json and "
                "merges.txt cannot say in a GGUF file. Take a checkpoint of the model with tokenizer.json.",
                code="TOKENIZER_PRE",
            )
    pre = pre or CLASS_PRE.get(name)
    if pre is None:
        raise UnsupportedError(
            f"{checkpoint.folder.name}: has no tokenizer.json, and the class {short(name)} does not tell how it cuts "
            "text. Give the name of its pre-tokenizer with --pre.",
            code="TOKENIZER_PRE",
        )
    merges = [line for line in lines.split("\n") if line.count(" ") == 1 and not line.startswith("#version")]
    return _byte_pairs(vocab, merges, n_vocab), pre


def _from_sentence_piece(checkpoint: Checkpoint, n_vocab: int, description: Mapping[str, Any] | None = None) -> Tokens:
    """Scores come from tokenizer.model where it is there, else from the order of the merges, which gives the same.

    Where the two have other tokens, tokenizer.json counts, as in transformers.
    """
    tokens = Tokens.empty("llama", n_vocab)
    vocab = vocab_of(description["model"].get("vocab"), n_vocab) if description is not None else {}
    n_pieces = 0
    if checkpoint.files.has("tokenizer.model"):
        n_pieces = _read_sentence_piece(checkpoint, tokens)
        if any(tokens.texts[i] != text for text, i in vocab.items() if i < n_pieces):
            tokens, n_pieces = Tokens.empty("llama", n_vocab), 0
    model = description["model"] if description is not None else {}
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merge_pairs(model)):
        ranks.setdefault(left + right, rank)
    for text, token_id in vocab.items():
        if token_id < n_pieces:
            continue
        kind = TokenType.BYTE if BYTE_TEXT.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == model.get("unk_token") else kind
        tokens.put(token_id, text, kind, -float(ranks.get(text, len(ranks))) if kind == TokenType.NORMAL else 0.0)
    return tokens


def _processor(checkpoint: Checkpoint) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        model = checkpoint.files.read("tokenizer.model", MAX_TOKENIZER_NBYTES) or b""
        for table in stored_charsmaps(model):
            checked_charsmap(table, lambda: RuntimeError("its table of replacements points outside itself"))
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise invalid(f"tokenizer.model that sentencepiece refuses ({short(str(error))})", "its model file") from error
    return processor


def _read_sentence_piece(checkpoint: Checkpoint, tokens: Tokens) -> int:
    """Put the pieces of tokenizer.model; how many."""
    processor = _processor(checkpoint)
    kinds = (
        (TokenType.UNKNOWN, processor.IsUnknown),
        (TokenType.CONTROL, processor.IsControl),
        (TokenType.UNUSED, processor.IsUnused),
        (TokenType.BYTE, processor.IsByte),
    )
    for i in range(processor.GetPieceSize()):
        kind = next((kind for kind, is_one in kinds if is_one(i)), TokenType.NORMAL)
        score = processor.GetScore(i)
        if not math.isfinite(score):
            raise invalid(f"the score {score} of the piece {short(processor.IdToPiece(i))}", "a number")
        if i >= len(tokens.texts):
            if kind in (TokenType.NORMAL, TokenType.BYTE):
                raise invalid(f"the piece {short(processor.IdToPiece(i))} with id {i:,}", below(len(tokens.texts)))
            continue
        if kind == TokenType.NORMAL and score != int(score):
            raise UnsupportedError(
                "tokenizer.model is a unigram model; edgellm converts SentencePiece's byte pairs. Take another model "
                "of this family.",
                code="TOKENIZER_MODEL",
            )
        tokens.put(i, processor.IdToPiece(i), kind, score)
    return min(processor.GetPieceSize(), len(tokens.texts))


def _model_adds_space(checkpoint: Checkpoint, default: bool) -> bool:
    """Whether a SentencePiece model puts a space before a text; its class in transformers may say otherwise."""
    config = checkpoint.json("tokenizer_config.json") or {}
    given = config.get("add_prefix_space", config.get("add_dummy_prefix"))
    if isinstance(given, bool):
        return given
    pieces = _processor(checkpoint).encode("a", out_type=str)
    return default and bool(pieces) and pieces[0].startswith("\u2581")


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before a text: a Prepend normalizer, or Metaspace."""
    parts = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
    return '"Prepend"' in parts or ('"Metaspace"' in parts and '"prepend_scheme": "never"' not in parts)


# -- added tokens ----------------------------------------------------------------------------------------------------


def _add_tokens(tokens: Tokens, added: Mapping[int, tuple[str, bool]]) -> None:
    """Tokens that were added to the vocabulary: marks are CONTROL, words USER_DEFINED. Ids beyond it are left out."""
    for token_id, (text, special) in added.items():
        if token_id >= len(tokens.texts):
            continue
        if tokens.types[token_id] == TokenType.UNKNOWN and tokens.texts[token_id] == text:
            continue
        # an encoder's pieces keep the score that they have
        score = tokens.scores[token_id] if tokens.scores is not None and tokens.kind == "t5" else ADDED_SCORE
        if special or _LOOKS_SPECIAL.fullmatch(text):
            tokens.put(token_id, text, TokenType.CONTROL, score)
        elif tokens.kind == "bert":
            tokens.put(token_id, encoders.spelled(text), TokenType.USER_DEFINED)
        else:
            # texts are stored as people write them, with real spaces
            tokens.put(token_id, text.replace("\u2581", " "), TokenType.USER_DEFINED, score)


def _mark_specials(tokens: Tokens, texts: list[str], ids: Mapping[str, int]) -> None:
    """Make marks of words that have a special part and that no merge makes: "!" as padding stays a word."""
    made = {merge.replace(" ", "") for merge in tokens.merges}
    for text in texts:
        known = text in ids and tokens.types[ids[text]] in (TokenType.NORMAL, TokenType.USER_DEFINED)
        if known and tokens.merges and len(text) > 1 and text not in made:
            tokens.types[ids[text]] = int(TokenType.CONTROL)


def _added(checkpoint: Checkpoint, description: Mapping[str, Any] | None) -> dict[int, tuple[str, bool]]:
    """id -> (text, special), from every file that may list them; the later ones know better."""
    found: dict[str, tuple[int, bool]] = {}

    def add(token_id: Any, text: Any, special: Any) -> None:
        if type(token_id) is not int or not 0 <= token_id < 1 << 31 or not isinstance(text, str) or not text:
            raise invalid(f"the added token {short(text)} with id {short(token_id)}", "a text and an id below 2^31")
        found[text] = (token_id, bool(special))

    for text, token_id in (checkpoint.json("added_tokens.json") or {}).items():
        add(token_id, text, False)
    decoder = (checkpoint.json("tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and key.isdecimal():
            add(int(key), entry.get("content"), entry.get("special"))
    listed = (description or {}).get("added_tokens") or []
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            add(entry.get("id"), entry.get("content"), entry.get("special"))
    return {token_id: (text, special) for text, (token_id, special) in found.items()}


def _without(description: Mapping[str, Any], beyond: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json without these added tokens, whose texts are plain text then."""
    listed = description.get("added_tokens") or []
    kept = [entry for entry in listed if not (isinstance(entry, dict) and entry.get("content") in beyond)]
    model = dict(description["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {text: i for text, i in vocab.items() if beyond.get(text) != i}
    return {**description, "added_tokens": kept, "model": model}


def _dropped_note(beyond: Mapping[str, int], n_vocab: int) -> str:
    shown = ", ".join(f"{short(text)} ({token_id:,})" for text, token_id in list(beyond.items())[:3])
    more = f" and {len(beyond) - 3:,} more" if len(beyond) > 3 else ""
    return (
        f"The tokenizer has {len(beyond):,} added tokens beyond the {n_vocab:,} rows of the embedding: {shown}{more}. "
        "The model cannot read them; they are left out, and text that spells one is plain text."
    )
