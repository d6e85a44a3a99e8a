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

from edgellm import arguments
from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.structured.constraint import Constraint, reason
from edgellm.structured.gbnf import gbnf_to_lark
from edgellm.structured.json_schema import kept_schema, names_are_free
from edgellm.structured.regex_cost import check_repeats
from edgellm.structured.start import Start
from edgellm.structured.token_trie import TokenTrie, llguidance, token_trie

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 1 << 20  # of a schema or grammar
MAX_KEPT = 64  # grammars of one tokenizer
# of llguidance's parser: a mask that takes much longer than 10 ms ends the answer
LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# JSON in one line, with or without a space behind comma and colon: where more is allowed, small models write hundreds
# of blanks at temperature 1
JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}
# a property that is named might come again as another one, spelled by such escapes; all but control characters have
# another spelling
NO_UNICODE_ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}
_NAMES = {"json_schema": "JSON schema", "regex": "regex", "lark": "Lark grammar", "gbnf": "GBNF grammar"}


class Grammar:
    """What an answer must look like. ``constraint()`` follows one answer."""

    def __init__(self, trie: TokenTrie, matcher: Any, texts: Sequence[str] = (), must_come: bool = False) -> None:
        self.trie = trie
        self._fresh = matcher
        self._start = Start(trie, texts, must_come, matcher) if texts else None

    def constraint(self) -> Constraint:
        """The state of one answer, at its beginning."""
        return Constraint(self.trie, self._fresh.deep_copy(), self._start)


_kept: weakref.WeakKeyDictionary[Tokenizer, OrderedDict[tuple[Any, ...], Grammar]] = weakref.WeakKeyDictionary()
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
    if begins is not None and triggers:
        raise ParameterError("begins and triggers are both given. Give one of them.")
    texts = [arguments.text("begins", begins)] if begins is not None else list(triggers)
    if not all(isinstance(text, str) and text for text in texts):
        raise arguments.wrong("triggers" if triggers else "begins", texts, "texts that are not empty")
    source = _schema_text(json_schema) if kind == "json_schema" else arguments.text(kind, given[kind])
    if len(source) > MAX_SOURCE_CHARS:
        raise ParameterError(f"{kind} has {len(source)} characters. Expected at most {MAX_SOURCE_CHARS}.")
    key = (kind, source, begins is not None, *texts)
    with _lock:
        kept = _kept.setdefault(tokenizer, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
    trie = token_trie(tokenizer)
    grammar = Grammar(trie, _matcher(trie, kind, source, bool(texts)), texts, begins is not None)
    with _lock:
        kept[key] = grammar
        while len(kept) > MAX_KEPT:
            kept.popitem(last=False)
    return grammar


def lark_json(schema: Mapping[str, Any] | bool, options: Mapping[str, Any] | None = None) -> str:
    """``%json {...}`` to stand in a rule of a Lark grammar, for a schema that is kept as ``json_schema`` keeps it.

    options   of llguidance, in place of single ones of ``JSON_OPTIONS``
    """
    return _embedded(_schema_text(schema), options)


def _embedded(source: str, options: Mapping[str, Any] | None = None) -> str:
    return "%json " + json.dumps({**json.loads(source), "x-guidance": {**_options(source), **(options or {})}})


def _options(source: str) -> dict[str, Any]:
    return {**JSON_OPTIONS, **(NO_UNICODE_ESCAPES if names_are_free(json.loads(source)) else {})}


def _schema_text(schema: Any) -> str:
    """The schema to keep, as JSON in its own order."""
    if schema is True:
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        raise arguments.wrong("json_schema", schema, "a mapping, or True for any JSON object")
    try:
        return json.dumps(kept_schema(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"The JSON schema is no JSON: {error}.", code="SCHEMA") from None


def _matcher(trie: TokenTrie, kind: str, source: str, behind_text: bool) -> Any:
    """llguidance's matcher at the beginning of a grammar; behind a text, blanks may come before JSON."""
    package = llguidance()
    matcher, limits = package.LLMatcher, package.LLParserLimits(**LIMITS)
    if kind == "json_schema" and behind_text:
        text = matcher.grammar_from_lark(f"start: /[ \\n]{{1,4}}/? json\njson: {_embedded(source)}")
    elif kind == "json_schema":
        try:
            text = matcher.grammar_from_json_schema(source, overrides=_options(source))
        except ValueError as error:  # a number beyond 64 bits
            raise ParameterError(f"The JSON schema cannot be read: {error}.", code="SCHEMA") from None
    elif kind == "regex":
        check_repeats(source, "The regex")
        text = matcher.grammar_from_regex(source)
    else:
        text = matcher.grammar_from_lark(gbnf_to_lark(source) if kind == "gbnf" else source)
    fresh = matcher(trie.ll, text, log_level=0, limits=limits)
    fresh.compute_bitmask()  # tells what can never be kept, and answers begin with a warm lexer
    if fresh.is_error():
        raise UnsupportedError(f"The {_NAMES[kind]} cannot be kept: {reason(fresh)}", code="GRAMMAR")
    return fresh
