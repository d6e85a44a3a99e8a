r"""How each ``tokenizer.ggml.pre`` name cuts text into words before byte pairs are merged.

One row per rule, keyed by every name that asks for it. The patterns are the models' own, as their Hugging Face
``tokenizer.json`` files state them and llama.cpp's ``llama-vocab.cpp`` lists them, in Oniguruma syntax. Where an
original takes quadratic time on a long run, an equal pattern that does not stands here, with its reason.
"""

from dataclasses import dataclass

from edgellm.formats.errors import UnsupportedError

# Steps that are not a regular expression; the words are those of the tokenizers library.
DIGITS = "<each digit>"
DIGIT_RUNS = "<runs of digits>"
PUNCTUATION_RUNS = "<runs of punctuation>"
WHITESPACE = "<whitespace, removed>"
BYTES = "<to the byte alphabet>"


@dataclass(frozen=True)
class PreTokenizer:
    """The rule of one family of byte-pair vocabularies.

    steps          cuts applied one after another to what the step before left; a pattern keeps what it matches apart
    normalizer     "NFC", or "" for none
    ignore_merges  a word that is a token as a whole is taken as it is
    add_bos        whether a BOS comes first when the file does not say
    byte_level     False: tokens are raw text, spaces written as U+2581 when ``escape_spaces``, bytes as <0xNN>
    """

    steps: tuple[str, ...]
    normalizer: str = ""
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    escape_spaces: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_JAIS2 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}"
    # after a piece of the same run of blanks no newline is left in it: the look-behind saves reading on to see that
    r"|(?<![^\S\r\n])\s*[\r\n]+"
    + "".join(rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
    + r"|\s{1}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(contractions: str, digits: str) -> str:
    """Words cut where lower case turns to upper case, as in gpt-4o's ``o200k_base``."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{contractions}|{start}{_UPPER}+{_LOWER}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_GPT4O = _cased_words(_CONTRACTIONS + "?", r"\p{N}{1,3}")
_KIMI_WORD = r"[^\r\n\p{L}\p{N}]?"
_KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_K2 = (
    rf"[\p{{Han}}]+|{_KIMI_WORD}{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTIONS}?"
    rf"|{_KIMI_WORD}{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
)
_ASCII_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SPARK = (
    rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_LATIN_GREEK_CYRILLIC = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_LATIN_GREEK_CYRILLIC}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    # \s+$ looks at every start of a long run; the look-behind leaves it one, with the same matches
    r"(?<!\s)\s++$",
    _DEEPSEEK_CJK,
    DIGITS,
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _CJK_AND_KANA
)

# Thousands: digits in threes counted from the right. The originals, \d{1,3}(?=(?:\d{3})*\b) and (?=(\d{3})+(?!\d)),
# read to the end of the run at each group: quadratic. Here the run is cut out once, then its first one or two digits,
# and a pattern with \p{N}{1,3} cuts what is left, a multiple of three, into threes.
_NUMBER_TO_A_BOUNDARY = r"(?<!\d)\d++\b"
_LEADING_DIGITS = r"\A\d{1,2}(?=(?:\d{3})+\z)"

_PLAIN = PreTokenizer((_GPT2,))
_PLAIN_NFC = PreTokenizer((_GPT2,), normalizer="NFC")
_DIGITS_THEN_WORDS = PreTokenizer((DIGITS, _GPT2))
_LLAMA3_ROW = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_ROW = PreTokenizer((_QWEN2,))
_QWEN2_NFC = PreTokenizer((_QWEN2,), normalizer="NFC")
_DEEPSEEK3_ROW = PreTokenizer((r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK3))
_SPM_STYLE = PreTokenizer((), byte_level=False, escape_spaces=True)

_ROWS: tuple[tuple[str, PreTokenizer], ...] = (
    # names separated by blanks, rule
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3_ROW),
    ("dbrx smaug-bpe glm4 glm5 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("jais-2", PreTokenizer((_JAIS2,))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")), ignore_merges=True)),
    ("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM)),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, DIGITS))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3_ROW),
    ("spark2_5", PreTokenizer((r"\p{N}{1,3}", _CJK_AND_KANA, _SPARK, r"\p{N}"))),
    ("youtu", PreTokenizer((_YOUTU_SCRIPTS, _cased_words(_CONTRACTIONS + "?", r"\p{N}")), ignore_merges=True)),
    ("falcon", PreTokenizer((PUNCTUATION_RUNS, _GPT2, BYTES, DIGIT_RUNS, "[0-9][0-9][0-9]"))),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", _DIGITS_THEN_WORDS),
    ("command-r", PreTokenizer((DIGITS, _GPT2), normalizer="NFC")),
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum jais trillion", _PLAIN),
    ("exaone4 granite-docling jina-v1-en jina-v2-code roberta-bpe", _PLAIN),
    ("mpt olmo modern-bert", _PLAIN_NFC),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2", _QWEN2_NFC),
    ("hunyuan solar-open grok-2", _QWEN2_ROW),
    ("qwen35", PreTokenizer((_QWEN35,), normalizer="NFC")),
    ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(_CONTRACTIONS + "|"),))),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, DIGITS))),
    ("tekken", PreTokenizer((_cased_words("", r"\p{N}"),), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    ("granite-embed-multi-97m", PreTokenizer((_GPT4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((_NUMBER_TO_A_BOUNDARY, _LEADING_DIGITS, _GPT4O))),
    ("kimi-k2", PreTokenizer((_KIMI_K2,))),
    (
        "k2-horizon",
        PreTokenizer((_LLAMA3.replace(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}\u200C\u200D]+"),)),
    ),
    # words may run over spaces here: only numbers are cut (and "12²" once more than in the original)
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?<!\d)\d{1,2}(?=(?:\d{3})+(?!\d))", r"\d{3}"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "seed-coder",
        PreTokenizer(
            (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
        ),
    ),
    ("afmoe", PreTokenizer((r"\p{N}+", r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)", r"\p{N}{3}", _AFMOE_ASIAN, _DEEPSEEK3))),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                DIGITS,
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    # byte-pair merges over text whose spaces are U+2581, as SentencePiece writes them
    ("gemma4 granite-embed-multi-311m", PreTokenizer((), add_bos=True, byte_level=False, escape_spaces=True)),
    ("sarvam-moe mmbert", _SPM_STYLE),
    ("whitespace", PreTokenizer((WHITESPACE,), byte_level=False)),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for names, row in _ROWS for name in names.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rule of this ``tokenizer.ggml.pre`` name; UnsupportedError says how to give another one."""
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    raise UnsupportedError(
        f"The file asks for the pre-tokenizer {name!r}, which edgellm does not know. "
        f"Known: {', '.join(sorted(PRE_TOKENIZERS))}. "
        "If the model is of one of these families, name it: --override-kv tokenizer.ggml.pre=str:NAME, "
        "or pre=NAME in Python.",
        code="TOKENIZER_PRE",
    )
