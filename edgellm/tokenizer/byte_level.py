"""Byte-pair vocabularies ("gpt2" and its kin) on the tokenizers library, built in memory from tokens and merges."""

import contextlib

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from edgellm.formats.errors import FormatError
from edgellm.tokenizer import pre_tokenizers as table
from edgellm.tokenizer.library_faults import LibraryFault, library_faults
from edgellm.tokenizer.vocabulary import SPACE, TokenType, Vocabulary


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


class BytePairs:
    """Text to ids by byte-pair merges after the cuts of a pre-tokenizer."""

    strips_first_space = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.rule = table.pre_tokenizer(vocabulary.pre)
        self._tokenizer = Tokenizer(_byte_pair_model(vocabulary, self.rule))
        normalizer = self._normalizer(vocabulary)
        if normalizer is not None:
            self._tokenizer.normalizer = normalizer
        cuts = pre_tokenizer_of(self.rule)
        if cuts is not None:
            self._tokenizer.pre_tokenizer = cuts

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def words(self, text: str) -> list[str]:
        """The cuts of the pre-tokenizer, in the byte alphabet where the rule uses it."""
        split = self._tokenizer.pre_tokenizer
        return [word for word, _ in split.pre_tokenize_str(text)] if split is not None else [text]

    def _normalizer(self, vocabulary: Vocabulary) -> normalizers.Normalizer | None:
        if self.rule.escape_spaces:
            return normalizers.Replace(" ", SPACE)
        if vocabulary.pre == "whitespace" and vocabulary.flag("normalizer.lowercase", False):
            return normalizers.Lowercase()
        return normalizers.NFC() if self.rule.normalizer == "NFC" else None


def pre_tokenizer_of(rule: table.PreTokenizer) -> pre_tokenizers.PreTokenizer | None:
    """The steps of a rule as one pre-tokenizer of the library; None for a rule without any."""
    steps = [_step(step) for step in rule.steps]
    if rule.byte_level and table.BYTES not in rule.steps:
        steps.append(_step(table.BYTES))
    return pre_tokenizers.Sequence(steps) if steps else None


def _step(step: str) -> pre_tokenizers.PreTokenizer:
    return STEPS.get(step) or pre_tokenizers.Split(Regex(step), behavior="isolated")


STEPS = {  # those that are not a regular expression
    table.DIGITS: pre_tokenizers.Digits(individual_digits=True),
    table.DIGIT_RUNS: pre_tokenizers.Digits(individual_digits=False),
    table.PUNCTUATION_RUNS: pre_tokenizers.Punctuation("contiguous"),
    table.WHITESPACE: pre_tokenizers.WhitespaceSplit(),
    table.BYTES: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
}


def _byte_pair_model(vocabulary: Vocabulary, rule: table.PreTokenizer) -> models.BPE:
    """The merge table. Control tokens are left out of it, so that no word can become one."""
    if vocabulary.metadata.get("tokenizer.ggml.merges") is None:
        raise FormatError(
            f"The file has {vocabulary.n_vocab} byte-pair tokens but no tokenizer.ggml.merges; expected the list of "
            "merges beside them. It was converted wrongly: convert it again.",
            code="VOCAB_MERGES",
        )
    tokens = vocabulary.tokens
    ids = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))  # of duplicates the first
    control = {tokens[i] for i in vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)}
    for text in control:
        ids.pop(text, None)
    unknown = None
    settings: dict[str, object] = {}
    if not rule.byte_level:
        unknown_id = vocabulary.special_id("unknown_token_id")
        if unknown_id is not None:
            unknown = tokens[unknown_id]
            ids[unknown] = unknown_id
        settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": len(vocabulary.byte_ids) == 256}
    settings["ignore_merges"] = rule.ignore_merges
    merges = [_pair(merge) for merge in vocabulary.merges]
    try:
        with contextlib.suppress(LibraryFault), library_faults():  # a merge of, or to, a token that is not there
            return models.BPE(vocab=ids, merges=merges, **settings)
        merges = [pair for pair in merges if not control & {*pair, "".join(pair)}]
        with library_faults():
            return models.BPE(vocab=ids, merges=merges, **settings)
    except LibraryFault as error:
        raise FormatError(
            f"tokenizer.ggml.merges does not fit the tokens: {error}; expected merges of tokens into tokens. "
            "The file is damaged or was converted wrongly: download or convert it again.",
            code="VOCAB_MERGES",
        ) from None


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # the left part may itself begin with a space
    return (merge[:cut], merge[cut + 1 :]) if cut > 0 else ("", merge)
