"""A tokenizer as llguidance wants it: the bytes of every token in a trie, made once for each tokenizer.

Marks, the tokens that steer a model, are no text: no string of an answer may hold one, and a grammar names them as
``<|im_start|>`` or ``<[7]>``. Text that a grammar forces is cut into tokens as the tokenizer itself cuts it, so the
model reads what it knows; the tokens always spell that text to the byte.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgellm.formats.errors import EdgeLLMError, UnsupportedError

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

WORDS = (
    "[a-z]{1,16}"  # tokens that are allowed together; a regex of words: 290 -> 208 us of 49,152, 760 -> 553 of 262,144
)
_NEUTRAL = ("", "\n", "\x02", ":")  # what may stand before a text so that no space is put there


class TokenTrie:
    """What all grammars of one tokenizer share.

    ll        llguidance's tokenizer
    pieces    the bytes of each token
    threads   one thread: masks are worked out there while the executor computes
    crossings what ``Start`` has found of the vocabulary, by its texts
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.n_vocab = tokenizer.n_vocab
        self._splitter = _Splitter(tokenizer)
        self.eog_ids = tokenizer.eog_ids
        self.pieces = self._splitter.tokens
        blanks, *strings = llguidance().LLTokenizer.general_slices()
        self.ll = llguidance().LLTokenizer(
            self._splitter, eos_token=sorted(tokenizer.eog_ids) or None, slices=[blanks, WORDS, *strings]
        )
        self.crossings: dict[tuple[bytes, ...], list[tuple[int, bytes]]] = {}
        self.threads = ThreadPoolExecutor(1, "edgellm-mask")

    @property
    def ids(self) -> dict[bytes, int]:
        """The tokens that are text by their bytes; made when first asked for."""
        return self._splitter.ids


class _Splitter:
    """llguidance's view of a tokenizer, by the names that it looks for. Holds the tokenizer weakly: what is written in
    Rust is never looked through for circles.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.n_vocab)]
        self.special_token_ids = sorted(tokenizer.mark_ids)
        self.eos_token_id = tokenizer.eos_id

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell ``text`` in the middle of an answer; no mark among them."""
        tokenizer, wanted = self._tokenizer(), text.encode()
        for before in _NEUTRAL:
            if tokenizer is None:
                break
            try:
                ids = tokenizer.encode(before + text, False)
            except EdgeLLMError:  # a text that the tokenizer refuses
                continue
            spelled, start = b"".join(self.tokens[token] for token in ids), 0
            while ids and len(spelled) > len(wanted):
                spelled, start = spelled[len(self.tokens[ids[start]]) :], start + 1
            if spelled == wanted:
                return ids[start:]
        return self._longest(wanted)

    def _longest(self, text: bytes) -> list[int]:
        """Tokens that spell ``text``, the longest first, where a tokenizer changes what it reads."""
        ids, most = [], max(map(len, self.ids))
        while text:
            length = next((n for n in range(min(most, len(text)), 0, -1) if text[:n] in self.ids), 0)
            if not length:
                raise UnsupportedError(f"No token of the vocabulary spells {text[:8]!r}. Use another grammar.")
            ids.append(self.ids[text[:length]])
            text = text[length:]
        return ids

    @cached_property
    def ids(self) -> dict[bytes, int]:
        marks = set(self.special_token_ids)
        return {piece: token for token, piece in enumerate(self.tokens) if token not in marks and piece}


def llguidance() -> Any:
    """The package; UnsupportedError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UnsupportedError(
            "Structured output needs the package llguidance, which is not installed. Install it with "
            "`pip install edgellm[structured]`.",
            code="EXTRA_MISSING",
        ) from None
    return llguidance


_tries: weakref.WeakKeyDictionary[Tokenizer, TokenTrie] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def token_trie(tokenizer: Tokenizer) -> TokenTrie:
    """That of this tokenizer; the first call takes 0.1 s for 49,152 tokens, 1 s for 262,144."""
    with _lock:
        if tokenizer not in _tries:
            _tries[tokenizer] = TokenTrie(tokenizer)
        return _tries[tokenizer]
