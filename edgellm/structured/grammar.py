"""From a schema, a regular expression or a grammar to a ``Grammar``: what an answer must look like, made once.

A grammar is immutable, may be used by any number of answers at once, and is kept: the same text for the same tokenizer
is not compiled twice.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.formats.findings import short
from edgellm.structured.constraint import Constraint
from edgellm.structured.token_trie import TokenTrie, llguidance, token_trie

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 1 << 20  # of a schema or grammar
MAX_KEPT = 64  # grammars of one tokenizer
# llguidance's parser, at half of its defaults: a mask that would take longer than 10 ms ends the answer
LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
WHITESPACE = r"[ \n\t\r]{1,32}"  # at one place of a JSON text: without a bound a small model may write blanks for ever


class Grammar:
    """What an answer must look like. ``constraint()`` follows one answer."""

    def __init__(self, trie: TokenTrie, matcher: Any) -> None:
        self.trie = trie
        self._fresh = matcher

    def constraint(self) -> Constraint:
        """The state of one answer, at its beginning."""
        return Constraint(self.trie, self._fresh.deep_copy())


_kept: weakref.WeakKeyDictionary[Tokenizer, OrderedDict[tuple[str, ...], Grammar]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def compile_grammar(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | bool | None = None,
    regex: str | None = None,
    lark: str | None = None,
    gbnf: str | None = None,
    begins: str | None = None,
    triggers: Sequence[str] = (),
) -> Grammar:
    """The grammar of one of these texts, for answers in the tokens of ``tokenizer``.

    json_schema   a schema, or True for any JSON object
    regex         in the syntax of Rust's regex crate; the whole answer matches it
    lark, gbnf    a grammar in llguidance's dialect of Lark, or in llama.cpp's notation
    begins        the constraint starts behind this text or token, such as the end of reasoning; it must come
    triggers      likewise behind the first of these, which need not come: until then the answer is free

    ParameterError for a text that is none of its kind or too large, UnsupportedError for what cannot be kept, by name.
    """
    given = {"json_schema": json_schema, "regex": regex, "lark": lark, "gbnf": gbnf}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ParameterError(f"{', '.join(named) or 'None of them'} given. Give one of {', '.join(given)}.")
    kind = named[0]
    if begins is not None or triggers or gbnf is not None:
        raise UnsupportedError("gbnf, begins and triggers are not there yet.")
    source = json.dumps(_schema(json_schema)) if kind == "json_schema" else given[kind]
    if not isinstance(source, str) or len(source) > MAX_SOURCE_CHARS:
        raise ParameterError(
            f"{kind} is {short(repr(source))}. Expected at most {MAX_SOURCE_CHARS} characters of text."
        )
    with _lock:
        kept = _kept.setdefault(tokenizer, OrderedDict())
        if (kind, source) in kept:
            kept.move_to_end((kind, source))
            return kept[kind, source]
    grammar = _compiled(token_trie(tokenizer), kind, source)
    with _lock:
        kept[kind, source] = grammar
        while len(kept) > MAX_KEPT:
            kept.popitem(last=False)
    return grammar


def _schema(given: Mapping[str, Any] | bool | None) -> Any:
    return {"type": "object"} if given is True else given


def _compiled(trie: TokenTrie, kind: str, source: str) -> Grammar:
    package = llguidance()
    matcher = package.LLMatcher
    if kind == "json_schema":
        options = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
        text = matcher.grammar_from_json_schema(source, overrides=options)
    elif kind == "regex":
        text = matcher.grammar_from_regex(source)
    else:
        text = matcher.grammar_from_lark(source)
    fresh = matcher(trie.ll, text, log_level=0, limits=package.LLParserLimits(**LIMITS))
    if fresh.is_error():
        raise UnsupportedError(f"{kind} cannot be kept: {fresh.get_error()}.", code="GRAMMAR")
    return Grammar(trie, fresh)
