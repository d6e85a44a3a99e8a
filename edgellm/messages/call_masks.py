"""The grammars of calls, made once for a model, its tools and what is asked of them."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.formats.errors import EdgeLLMError, ParameterError, UnsupportedError
from edgellm.messages.calls_grammar import CallsGrammar
from edgellm.messages.tool_schemas import is_strict, is_well_formed, name_of, parameters
from edgellm.structured import compile_grammar

if TYPE_CHECKING:
    from edgellm.messages.shapes import Shape
    from edgellm.structured import Grammar
    from edgellm.tokenizer import Tokenizer

MAX_KEPT = 32  # of one tokenizer

_kept: weakref.WeakKeyDictionary[Tokenizer, OrderedDict[tuple[Any, ...], Grammar]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def forced_calls(
    tokenizer: Tokenizer,
    form: Shape,
    tools: Sequence[Mapping[str, Any]],
    *,
    parallel: bool,
    answer: Mapping[str, Any] | bool | None = None,
) -> Grammar:
    """Calls from the first token on, or ``answer`` in their place. Errors as ``compile_grammar``'s, and TOOLS."""
    return _made(tokenizer, form, tools, parallel, False, answer)


def begun_calls(
    tokenizer: Tokenizer, form: Shape, tools: Sequence[Mapping[str, Any]], *, parallel: bool
) -> Grammar | None:
    """What a call must be once the model has begun one; None where all may come.

    Where nothing announces a call, only tools that are strict, or a limit to one call, make one of what looks like it.
    In channels whose answer has no header that is known, nothing does.
    """
    must = not parallel or any(map(is_strict, tools))
    if form.channels is not None and not (form.call_begins or form.channels.says):
        return None
    if not must and not form.call_begins:
        return None
    try:
        return _made(tokenizer, form, tools, parallel, True, None)
    except EdgeLLMError as error:
        if must or (isinstance(error, ParameterError | UnsupportedError) and error.code == "TOOLS"):
            raise
        return None  # more tools than a grammar holds, or nothing here that keeps one


def _made(
    tokenizer: Tokenizer,
    form: Shape,
    tools: Sequence[Mapping[str, Any]],
    parallel: bool,
    behind: bool,
    answer: Mapping[str, Any] | bool | None,
) -> Grammar:
    key = (form, parallel, behind, json.dumps(tools, default=str), json.dumps(answer, default=str))
    with _lock:
        kept = _kept.setdefault(tokenizer, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return kept[key]

    begins = [form.call_begins] if behind and form.call_begins else []

    def grammar(some: Sequence[Mapping[str, Any]], free: Sequence[str], triggers: Sequence[str] = begins) -> Grammar:
        text = CallsGrammar(tokenizer, form, some, parallel=parallel, behind=behind, answer=answer, free=free).text
        return compile_grammar(tokenizer, lark=text, triggers=triggers)

    broken = [name_of(tool) for tool in tools if not _is_schema(tool)]
    try:
        found = grammar(tools, broken)
    except (ParameterError, UnsupportedError) as error:
        if error.code not in ("SCHEMA", "GRAMMAR"):
            raise
        others = [tool for tool in tools if name_of(tool) not in broken]
        found = grammar(tools, [*broken, *(name_of(tool) for tool in others if _is_too_much(grammar, tool))])
    with _lock:
        kept[key] = found
        while len(kept) > MAX_KEPT:
            kept.popitem(last=False)
    return found


def _is_schema(tool: Mapping[str, Any]) -> bool:
    """Whether a tool's arguments are described by a schema; ParameterError where one has to be kept that is none."""
    if is_well_formed(parameters(tool["function"])):
        return True
    if is_strict(tool):
        raise ParameterError(
            f"The tool {name_of(tool)} is strict, and its parameters are no JSON schema, or a very deep one. Mend it.",
            code="SCHEMA",
        )
    return False


def _is_too_much(grammar: Any, tool: Mapping[str, Any]) -> bool:
    """Whether no grammar keeps the schema of this tool; that of a strict one must be kept."""
    try:
        grammar([tool], (), ())
    except (ParameterError, UnsupportedError):
        if is_strict(tool):
            raise
        return True
    return False
