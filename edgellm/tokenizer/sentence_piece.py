"""SentencePiece vocabularies ("llama": merges by score; "t5": unigram), as sentencepiece models built in memory.

GGUF holds a score per token and no merges. sentencepiece joins the adjacent pair whose joined token has the best score,
takes user-defined tokens whole, and spells unknown characters in bytes, in n log n time. The model is a protobuf
(``sentencepiece_model.proto``) written here with numpy: 262,144 pieces in a few hundredths of a second.
"""

import numpy as np
import sentencepiece

from edgellm.formats.errors import FormatError
from edgellm.tokenizer.charsmap import MAX_REPLACEMENT_NBYTES, checked_charsmap
from edgellm.tokenizer.vocabulary import SPACE, TokenType, Vocabulary, invalid

# sentencepiece_model.proto: ModelProto {1 pieces, 2 trainer_spec, 3 normalizer_spec}, as tag bytes
_PIECES, _TRAINER, _NORMALIZER = b"\x0a", b"\x12", b"\x1a"
_UNIGRAM, _BPE = 1, 2


class SentencePiece:
    """Text to ids by sentencepiece; ids are those of the file, in its order."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.strips_first_space = self._adds_space = vocabulary.flag("add_space_prefix", True)
        self._unigram = vocabulary.kind == "t5"
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_model_proto(vocabulary, unigram=self._unigram))
        except RuntimeError as error:
            raise invalid(f"a vocabulary that sentencepiece refuses ({error})", "distinct, sound pieces") from error

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; a space goes before it where the vocabulary wants one at the start of words."""
        # a unigram model trims first, so sentencepiece itself adds the space there
        if self._adds_space and not self._unigram:
            text = " " + text
        return self._processor.encode(text)


def _model_proto(vocabulary: Vocabulary, *, unigram: bool) -> bytes:
    trainer = b"\x18%c" % (_UNIGRAM if unigram else _BPE)  # 3 model_type
    if len(vocabulary.byte_ids) == 256:
        trainer += b"\x98\x02\x01"  # 35 byte_fallback
    normalizer = b"\x0a\x08identity"  # 1 name
    if unigram:
        charsmap = _charsmap(vocabulary.metadata.get("tokenizer.ggml.precompiled_charsmap"))
        if charsmap:
            normalizer += b"\x12" + _varint(len(charsmap)) + charsmap  # 2 precompiled_charsmap
    # 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
    normalizer += b"\x18%c" % (unigram and vocabulary.flag("add_space_prefix", True))
    normalizer += b"\x20%c\x28\x01" % (unigram and vocabulary.flag("remove_extra_whitespaces", False))
    return b"".join(
        (
            _pieces(vocabulary),
            _TRAINER + _varint(len(trainer)) + trainer,
            _NORMALIZER + _varint(len(normalizer)) + normalizer,
        )
    )


def _pieces(vocabulary: Vocabulary) -> bytes:
    """All ``pieces`` messages, {1 piece: string, 2 score: float, 3 type: enum}, written as columns of one array."""
    texts, types = _piece_columns(vocabulary)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    head, tail = 8, 7  # 0a LLL 0a LLL text 15 SSSS 18 T, lengths as three-byte varints (text below 2 MiB)
    ends = np.cumsum(lengths + head + tail)
    out = np.empty(int(ends[-1]), dtype=np.uint8)
    is_text = np.ones(out.size, dtype=bool)
    heads = (ends - lengths - head - tail)[:, None] + np.arange(head)
    tails = (ends - tail)[:, None] + np.arange(tail)
    is_text[heads] = False
    is_text[tails] = False
    columns = np.empty((len(texts), head), dtype=np.uint8)
    columns[:, 0] = _PIECES[0]
    columns[:, 1:4] = _varints3(lengths + 4 + tail)
    columns[:, 4] = 0x0A
    columns[:, 5:8] = _varints3(lengths)
    out[heads] = columns
    columns = np.empty((len(texts), tail), dtype=np.uint8)
    columns[:, 0] = 0x15
    columns[:, 1:5] = vocabulary.scores.astype("<f4").view(np.uint8).reshape(-1, 4)
    columns[:, 5] = 0x18
    columns[:, 6] = types
    out[tails] = columns
    out[is_text] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    return out.tobytes()


def _piece_columns(vocabulary: Vocabulary) -> tuple[list[bytes], np.ndarray]:
    """Texts and types that sentencepiece accepts: one unknown piece, no text twice, bytes all there or none."""
    types = vocabulary.types.copy()
    types[types == TokenType.UNDEFINED] = TokenType.NORMAL
    types[types == TokenType.UNKNOWN] = TokenType.CONTROL
    texts = [token.encode("utf-8", "surrogateescape") for token in vocabulary.tokens]
    for token_id in np.flatnonzero(types == TokenType.USER_DEFINED).tolist():
        texts[token_id] = texts[token_id].replace(b" ", SPACE.encode())  # files write them with real spaces
    for value, token_id in vocabulary.byte_ids.items():
        texts[token_id] = b"<0x%02X>" % value
    if len(vocabulary.byte_ids) != 256:
        types[types == TokenType.BYTE] = TokenType.CONTROL
    unknown = vocabulary.special_id("unknown_token_id", 0)
    types[0 if unknown is None else unknown] = TokenType.UNKNOWN
    unusable = {b""} | {text for text in texts if b"\0" in text}
    if len(set(texts)) != len(texts) or not unusable.isdisjoint(texts):
        _silence(texts, types, unusable)
    return texts, types


def _silence(texts: list[bytes], types: np.ndarray, unusable: set[bytes]) -> None:
    """The first token of a text is the one that text becomes; later ones, and unusable ones, can only be decoded."""
    taken = set(texts) | unusable
    seen = set(unusable)
    for token_id, text in enumerate(texts):
        if text not in seen:
            seen.add(text)
            continue
        name = b"\xf4\x8f\xbf\xbf%d" % token_id
        while name in taken:
            name += b"+"
        taken.add(name)
        texts[token_id] = name
        if types[token_id] != TokenType.UNKNOWN:
            types[token_id] = TokenType.CONTROL


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints3(values: np.ndarray) -> np.ndarray:
    """(n, 3) uint8: each value as a varint of exactly three bytes, which protobuf reads like the shortest form."""
    return np.stack((values & 0x7F | 0x80, values >> 7 & 0x7F | 0x80, values >> 14), axis=1).astype(np.uint8)


def _charsmap(stored: object) -> bytes:
    """The normalization table of a unigram model, checked."""

    def unfit() -> FormatError:
        outside = f"points outside itself, or to over {MAX_REPLACEMENT_NBYTES} bytes"
        return invalid(f"a tokenizer.ggml.precompiled_charsmap that {outside}", "a sound normalization table")

    return b"" if stored is None else checked_charsmap(np.asarray(stored).astype(np.uint8).tobytes(), unfit)
