"""BERT vocabularies: whole words first, then "##" continuations, on the tokenizers library."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from edgellm.tokenizer.vocabulary import SPACE, TokenType, Vocabulary, invalid


class WordPiece:
    """Text to ids by longest pieces of words.

    GGUF marks the start of a word with U+2581, where BERT marks its continuation with "##".
    """

    strips_first_space = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        ids: dict[str, int] = {}
        hidden = {*vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)}
        for token_id, token in enumerate(vocabulary.tokens):
            if token_id not in hidden:
                text = token[1:] if token.startswith(SPACE) else "##" + token
                ids.setdefault(text, token_id)
        unknown_id = vocabulary.special_id("unknown_token_id", 100)
        if unknown_id is None:
            raise invalid("no unknown token in a WordPiece vocabulary", "tokenizer.ggml.unknown_token_id")
        unknown = vocabulary.tokens[unknown_id]
        ids[unknown] = unknown_id
        lowercase = vocabulary.flag("normalizer.lowercase", True)
        strip_accents = vocabulary.flag("normalizer.strip_accents", lowercase)
        self._tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; unknown words become the unknown token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids
