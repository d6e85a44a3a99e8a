"""Find tokens that stand in a text as they are written: control and user-defined ones, before anything is merged.

The search is the tokenizers library's own (Aho-Corasick, leftmost and longest, linear time), so that overlaps fall out
as they do in Hugging Face tokenizers.
"""

from collections.abc import Collection, Iterator, Mapping

from tokenizers import AddedToken, Tokenizer, models

from edgellm.tokenizer.vocabulary import is_sound


class AddedTokens:
    """Cuts texts at a fixed set of tokens."""

    def __init__(self, ids: Mapping[str, int], whole_words: Collection[str] = ()) -> None:
        """ids: text -> id; empty texts, and those that are not Unicode, are never found.

        whole_words   those that count only between other characters than letters and digits
        """
        self._whole_words = whole_words
        self._ids = {text: token_id for text, token_id in ids.items() if text and is_sound(text)}
        self._searcher: Tokenizer | None = None

    def __bool__(self) -> bool:
        return bool(self._ids)

    def split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Yield (start, end, id) over all of ``text`` in order; id is None for the stretches between tokens."""
        if not self._ids:
            if text:
                yield 0, len(text), None
            return
        yield from self._found(text)

    def _found(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        if self._searcher is None:
            self._searcher = _searcher(self._ids, self._whole_words)
        encoding = self._searcher.encode(text, add_special_tokens=False)
        for (start, end), index in zip(encoding.offsets, encoding.ids, strict=True):
            yield start, end, self._ids[text[start:end]] if index else None


def _searcher(ids: Mapping[str, int], whole_words: Collection[str]) -> Tokenizer:
    # a model of one word that nothing matches: what lies between added tokens comes back whole, as id 0
    nothing = "\0" * (1 + max(map(len, ids)))
    searcher = Tokenizer(models.WordLevel({nothing: 0}, unk_token=nothing))
    added = (AddedToken(text, single_word=text in whole_words, normalized=False, special=False) for text in ids)
    searcher.add_tokens(list(added))
    return searcher
