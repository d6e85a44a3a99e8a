"""Which ids begin, end and separate text, from the file's keys and from texts that are known to end a turn.

The lists and exceptions are the ones llama.cpp derives ``special_eog_ids`` from.
"""

from dataclasses import dataclass

import numpy as np

from edgellm.tokenizer.vocabulary import TokenType, Vocabulary, has_mark_shape, invalid

# fmt: off
END_OF_GENERATION = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<|ifm|im_end|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
    )
)
# padding, repository and file marks of fill-in-the-middle models: a model that writes one has finished
FILL_IN_END = frozenset(
    (
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<REPO>", "<reponame>", "<|file_sep|>",
    )
)
# fmt: on
ENDING_KEYS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id", "eot_token_id", "eom_token_id")
# id defaults of files without the key, (bos, eos, unknown, separator)
_DEFAULT_IDS: dict[str, tuple[int | None, int | None, int | None, int | None]] = {
    "llama": (1, 2, 0, None),
    "bert": (101, None, 100, 102),
    "t5": (None, 1, 2, None),
}


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a meaning; None where the vocabulary has none.

    prefix, suffix   ids that stand before and after a text when specials are added
    suppressed       ids that the model may compute and no answer holds, such as the ends of an image
    """

    bos: int | None
    eos: int | None
    unknown: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    end_of_generation: frozenset[int]
    suppressed: frozenset[int] = frozenset()

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, *, add_bos: bool = False) -> "SpecialIds":
        """Read them; ``add_bos`` is what the kind of vocabulary does when the file is silent.

        Raises FormatError VOCAB_SPECIAL_ID where a text is to get a token, or an answer is to end by one, whose id is
        missing or no id. Ids that nothing depends on count as missing, as in llama.cpp.
        """
        default_bos, default_eos, default_unknown, default_sep = _DEFAULT_IDS.get(vocabulary.kind, (None,) * 4)
        if vocabulary.kind == "bert":  # files of either habit: BERT's [CLS] under its own key, or as BOS
            default_bos = vocabulary.special_id("cls_token_id", default_bos)
        bos = vocabulary.special_id("bos_token_id", default_bos)
        eos = vocabulary.special_id("eos_token_id", default_eos)
        unknown = vocabulary.special_id("unknown_token_id", default_unknown)
        # GGUF spells this key without its second "a"
        separator = vocabulary.special_id("seperator_token_id", default_sep)
        prefix = _wanted(vocabulary, "bos", bos, add_bos)
        suffix = _wanted(vocabulary, "eos", eos, vocabulary.kind == "t5")
        if vocabulary.kind == "bert" and not suffix:  # newer files say that [SEP] is the end of a text
            suffix = _wanted(vocabulary, "sep", separator, True)
        suppressed = frozenset(_listed(vocabulary, "suppress_tokens"))
        return cls(bos, eos, unknown, prefix, suffix, _end_of_generation(vocabulary, eos), suppressed)


def _wanted(vocabulary: Vocabulary, name: str, token_id: int | None, default: bool) -> tuple[int, ...]:
    named = {"sep": "seperator"}.get(name, name) + "_token_id"
    wrong = vocabulary.wrong_id(named)
    if not vocabulary.flag(f"add_{name}_token", default and (wrong or token_id is not None)):
        return ()
    if wrong or token_id is None:
        off = f"tokenizer.ggml.add_{name}_token"
        other = f", or leave the token out with --override-kv {off}=bool:false"
        raise vocabulary.id_error(named, f"since every text is to get the token ({off})", other)
    return (token_id,)


def _end_of_generation(vocabulary: Vocabulary, eos: int | None) -> frozenset[int]:
    # a text alone ends nothing: only tokens that a user's plain words cannot make (see marks.py)
    candidates = vocabulary.ids_of(TokenType.CONTROL, TokenType.USER_DEFINED)
    texts = {vocabulary.tokens[i]: i for i in candidates}
    texts |= {text: i for i, text in enumerate(vocabulary.tokens) if text not in texts and has_mark_shape(text)}
    found = {text: texts[text] for text in texts.keys() & END_OF_GENERATION}
    if {"<|return|>", "<|call|>"} <= found.keys() or (
        found.keys() & {"<|call|>", "<|calls|>"} and "<|flush|>" in found
    ):
        found.pop("<|end|>", None)  # here it ends a message, not the turn
    if "</s>" in found and vocabulary.types[found["</s>"]] == TokenType.USER_DEFINED:
        del found["</s>"]  # the tag of struck-out text, as in Gemma's vocabularies
    ids = {eos, *found.values(), *(texts[text] for text in texts.keys() & FILL_IN_END)}
    ids.update(map(vocabulary.special_id, ENDING_KEYS))
    # a list that Ollama's converter writes
    ids.update(_listed(vocabulary, "eos_token_ids"))
    found_ids = frozenset(i for i in ids if i is not None)
    if not found_ids and vocabulary.wrong_id("eos_token_id"):
        raise vocabulary.id_error("eos_token_id", "since no other token ends an answer")
    return found_ids


def _listed(vocabulary: Vocabulary, name: str) -> list[int]:
    """The ids of a list, without those that are none of this vocabulary."""
    found = np.atleast_1d(vocabulary.metadata.get(f"tokenizer.ggml.{name}", []))
    if found.size and (found.ndim != 1 or found.dtype.kind not in "iu"):
        raise invalid(f"tokenizer.ggml.{name} that is no list of whole numbers", "ids of tokens")
    return [int(i) for i in found if 0 <= i < vocabulary.n_vocab]
