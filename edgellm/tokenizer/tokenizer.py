"""Text to token ids and back, from the metadata of a GGUF file alone.

``Tokenizer.from_gguf(metadata)`` picks the backend by ``tokenizer.ggml.model``. What a user writes never becomes a
mark (see ``marks``): marks are looked for only in text that is said to be special, no backend is given one to make,
and ids that hold one all the same are refused.

Where a space is put before a word: by the rule of the file's ``tokenizer.huggingface.json`` where it has one, which is
that of the model's own tokenizer. Else ``tokenizer.ggml.add_space_prefix`` counts as in llama.cpp: before all text, and
again after each mark and user-defined token.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.tokenizer import hugging_face, marks
from edgellm.tokenizer.added_tokens import AddedTokens
from edgellm.tokenizer.library_faults import LibraryFault, library_faults
from edgellm.tokenizer.special_ids import SpecialIds
from edgellm.tokenizer.stream_decoder import StreamDecoder
from edgellm.tokenizer.vocabulary import SPACE, TokenType, Vocabulary, invalid

_BYTE_PAIR_KINDS = frozenset(("gpt2", "gemma4", "whitespace"))
_SENTENCE_PIECE_KINDS = frozenset(("llama", "t5"))
_KINDS = _BYTE_PAIR_KINDS | _SENTENCE_PIECE_KINDS | {"bert"}


class TextSegment(Protocol):
    """A stretch of a rendered prompt; ``special`` where the template wrote it, not a user."""

    @property
    def text(self) -> str:
        """The text."""

    @property
    def special(self) -> bool:
        """Whether control tokens may stand in it."""


class _Text(NamedTuple):
    text: str
    special: bool


class Backend(Protocol):
    """What splits plain text."""

    strips_first_space: bool

    def encode(self, text: str) -> list[int]:
        """The ids of a text without marks."""


class Tokenizer:
    """One vocabulary, its splitting rule and its special ids. Immutable; safe from several threads.

    bos_id, eos_id   int, or None where the vocabulary has none
    eog_ids          frozenset of the ids that end a generation
    suppressed_ids   frozenset of the ids that no answer holds
    mark_ids         frozenset of the ids that steer the model and are no text
    n_vocab          number of ids
    kind, pre        the file's ``tokenizer.ggml.model`` and ``.pre``, or what was given instead
    """

    def __init__(self, vocabulary: Vocabulary, backend: Backend, special: SpecialIds, mark_ids: frozenset[int]) -> None:
        self.vocabulary = vocabulary
        self.special = special
        self.kind, self.pre = vocabulary.kind, vocabulary.pre
        self.n_vocab = vocabulary.n_vocab
        self.bos_id, self.eos_id, self.eog_ids = special.bos, special.eos, special.end_of_generation
        self.suppressed_ids = special.suppressed
        self.strip_first_space = backend.strips_first_space or vocabulary.kind == "bert"
        self._backend = backend
        self._control = marks.control_ids(vocabulary, special)
        self.mark_ids = mark_ids
        self._watched = marks.watched_ids(special, mark_ids)
        self._byte_of_id = {token_id: value for value, token_id in vocabulary.byte_ids.items()}
        self._pieces: dict[int, bytes] = {}
        user_defined = frozenset(vocabulary.ids_of(TokenType.USER_DEFINED)) - mark_ids
        self._user_defined = AddedTokens(self._texts(user_defined))
        self._all_added = AddedTokens(self._texts(user_defined | mark_ids))

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        pre: str | None = None,
        template: str | None = None,
        proved: bool = False,
    ) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describes.

        pre        the name of a pre-tokenizer to use instead of the file's
        template   a chat template, in Jinja, that is used besides the file's: the tokens it writes are marks too
        proved     the metadata are those of a ``GGUFFile``, whose arrays are checked already

        Raises FormatError (VOCAB_INVALID, VOCAB_SPECIAL_ID, VOCAB_MERGES) for a vocabulary that is not sound, and
        UnsupportedError for a kind or a pre-tokenizer that edgellm does not have.
        """
        vocabulary = Vocabulary.from_metadata(metadata, pre, proved=proved)
        special = SpecialIds.from_vocabulary(vocabulary, add_bos=_adds_bos(vocabulary))
        templates = marks.template_sources(vocabulary) + ([template] if template else [])
        try:
            with library_faults():
                found = marks.mark_ids(vocabulary, special, templates)
                return cls(vocabulary, _backend(vocabulary, special, found), special, found)
        except LibraryFault as fault:
            raise invalid(f"a vocabulary that the library refuses ({fault})", "distinct, sound tokens") from None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of ``text``.

        add_special     put BOS before and EOS after it where the vocabulary wants them
        parse_special   read control tokens that stand in the text; never for text of a user
        """
        return self.encode_segments((_Text(text, parse_special),), add_special)

    def encode_segments(self, segments: Sequence[TextSegment], add_special: bool = True) -> list[int]:
        """The ids of a prompt whose parts are trusted or not.

        A mark counts where it stands wholly in special text. All text between two marks is tokenized as one, whoever
        wrote which part of it: so where nobody writes marks as words, the ids are those of the whole text. A BOS that
        the text itself begins with is not doubled.

        Raises FormatError VOCAB_INVALID where the file's tokenizer would make a mark of plain text, ParameterError for
        a text that the tokenizer cannot cut.
        """
        try:
            with library_faults():
                ids = self._ids(segments)
        except LibraryFault as fault:
            raise ParameterError(
                f"The text cannot be tokenized: {fault}. Expected text without runs of millions of one character."
            ) from None
        if not add_special:
            return ids
        prefix, suffix = self.special.prefix, self.special.suffix
        if prefix and ids[: len(prefix)] == list(prefix):
            prefix = ()
        return [*prefix, *ids, *suffix]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        special   show control tokens as their text instead of leaving them out

        Raises ParameterError for an id outside the vocabulary.
        """
        shown = ids if special else (token_id for token_id in ids if token_id not in self._control)
        text = b"".join(map(self.token_bytes, shown))
        if self.strip_first_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", "replace")

    def stream_decoder(self, *, special: bool = False, shown: Collection[int] = ()) -> StreamDecoder:
        """A decoder for one stream of ids."""
        return StreamDecoder(self, special=special, shown=shown)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, those of its name for a control token; spaces are real spaces."""
        piece = self._pieces.get(token_id)
        if piece is None:
            if not 0 <= token_id < self.n_vocab:
                raise ParameterError(
                    f"The token id {token_id} is not in the vocabulary; expected 0 to {self.n_vocab - 1}."
                )
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def token_id(self, text: str) -> int | None:
        """The id of the token that the file spells ``text``, or None."""
        return self._id_of_text.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether the token is no part of an answer's text: by its type, or because it ends a generation."""
        return token_id in self._control

    def _piece(self, token_id: int) -> bytes:
        if token_id in self._byte_of_id:
            return bytes((self._byte_of_id[token_id],))
        text = self.vocabulary.tokens[token_id]
        if self._alphabet is None:
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        if token_id not in self._as_written:
            try:
                return bytes(map(self._alphabet.__getitem__, text))
            except KeyError:  # an added token without its type
                pass
        return text.encode("utf-8", "surrogateescape")  # added tokens stand in the file as they are written

    @cached_property
    def _alphabet(self) -> dict[str, int] | None:
        """char -> byte where tokens are spelled in GPT-2's byte alphabet, else None."""
        if self.kind not in _BYTE_PAIR_KINDS:
            return None
        from edgellm.tokenizer.byte_level import BYTE_OF_CHAR
        from edgellm.tokenizer.pre_tokenizers import pre_tokenizer

        return BYTE_OF_CHAR if pre_tokenizer(self.pre).byte_level else None

    @cached_property
    def _as_written(self) -> frozenset[int]:
        return frozenset(self.vocabulary.ids_of(TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))

    @cached_property
    def _id_of_text(self) -> dict[str, int]:
        tokens = self.vocabulary.tokens
        return dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))

    def _texts(self, ids: Iterable[int]) -> dict[str, int]:
        """Text as it stands in a prompt -> id. A run of spaces stands there as U+2581, as the originals list it: real
        spaces are left to the backend, which joins runs of both.
        """
        tokens = self.vocabulary.tokens
        ids = sorted(ids, reverse=True)  # of duplicates the first
        if self.kind not in _SENTENCE_PIECE_KINDS:
            return {tokens[i]: i for i in ids}
        return {tokens[i].replace(" ", SPACE) if tokens[i].isspace() else tokens[i]: i for i in ids}

    def _ids(self, segments: Sequence[TextSegment]) -> list[int]:
        if isinstance(self._backend, hugging_face.HuggingFaceJson):
            return self._backend.encode_runs(_joined(segments))
        ids: list[int] = []
        for part in self._parts(segments):
            if isinstance(part, int):
                ids.append(part)
            else:
                self._encode_plain(part, ids)
        return ids

    def _parts(self, segments: Sequence[TextSegment]) -> Iterator[str | int]:
        """Marks, and the whole text between two of them."""
        plain: list[str] = []
        for text, special in _joined(segments):
            if not special:
                plain.append(text)
                continue
            for start, end, token_id in self._all_added.split(text):
                if token_id not in self.mark_ids:
                    plain.append(text[start:end])
                    continue
                yield "".join(plain)
                plain.clear()
                yield token_id
        yield "".join(plain)

    def _encode_plain(self, text: str, ids: list[int]) -> None:
        for start, end, token_id in self._user_defined.split(text):
            if token_id is None:
                found = self._backend.encode(text[start:end])
                made = self._watched.intersection(found)
                if made:
                    raise marks.made_of_text(self.vocabulary, made)
                ids.extend(found)
            else:
                ids.append(token_id)


def _joined(segments: Sequence[TextSegment]) -> Iterator[tuple[str, bool]]:
    """The texts with neighbours of one kind joined, in sound Unicode."""
    run: list[str] = []
    special = False
    for segment in segments:
        if not segment.text:
            continue
        if run and segment.special != special:
            yield _sound("".join(run)), special
            run = []
        special = segment.special
        run.append(segment.text)
    yield _sound("".join(run)), special


def _sound(text: str) -> str:
    """Surrogate halves, which UTF-8 cannot carry, joined to characters or replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _adds_bos(vocabulary: Vocabulary) -> bool:
    """Whether BOS comes first when the file does not say."""
    if vocabulary.kind not in _BYTE_PAIR_KINDS:
        return vocabulary.kind in ("llama", "bert")
    from edgellm.tokenizer.pre_tokenizers import pre_tokenizer

    return pre_tokenizer(vocabulary.pre).add_bos


def _backend(vocabulary: Vocabulary, special: SpecialIds, mark_ids: frozenset[int]) -> Backend:
    """What splits the text of this kind of vocabulary, and makes no mark of it."""
    if vocabulary.kind not in _KINDS:
        raise UnsupportedError(
            f"The file's vocabulary is of the kind {vocabulary.kind!r}, which edgellm does not have. "
            "Supported: gpt2, llama, t5, bert, gemma4, whitespace. Use a model of another family.",
            code="TOKENIZER_MODEL",
        )
    carried = vocabulary.metadata.get(hugging_face.KEY, "")
    if not isinstance(carried, str) or carried:
        return hugging_face.HuggingFaceJson(vocabulary, special, mark_ids)
    vocabulary = vocabulary.without_text_for(mark_ids | vocabulary.not_text)
    if vocabulary.kind in _SENTENCE_PIECE_KINDS:
        from edgellm.tokenizer.sentence_piece import SentencePiece

        return SentencePiece(vocabulary)
    if vocabulary.kind in _BYTE_PAIR_KINDS:
        from edgellm.tokenizer.byte_level import BytePairs

        return BytePairs(vocabulary)
    from edgellm.tokenizer.word_piece import WordPiece

    return WordPiece(vocabulary)
