"""What a caller asks an answer to be, as a grammar, and how the text of the answer becomes an object again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgellm import arguments
from edgellm.formats.errors import EdgeLLMError, ParameterError, UnsupportedError
from edgellm.sampling.mask import TokenMask
from edgellm.structured.grammar import compile_grammar
from edgellm.structured.json_schema import closed_schema

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

ResponseFormat = Mapping[str, Any] | type | None
Parse = Callable[[str], Any]
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


class MaskSource(Protocol):
    """What gives each answer a mask of its own, such as a ``Grammar``."""

    def constraint(self) -> TokenMask:
        """The mask of one answer."""
        ...


class AnswerForm(NamedTuple):
    """What an answer must be.

    parse   makes an object of the whole text; None where the form is no JSON
    """

    source: MaskSource
    parse: Parse | None = None


def answer_form(
    tokenizer: Tokenizer,
    response_format: ResponseFormat,
    regex: str | None,
    grammar: str | MaskSource | None,
    begins: str | None = None,
) -> AnswerForm | None:
    """The form that one of these asks for, None for plain text; see ``LLM.stream``. Errors as ``compile_grammar``'s.

    begins   the text that the form stands behind, which must come; a compiled grammar has its own
    """
    given = {"response_format": response_format, "regex": regex, "grammar": grammar}
    if sum(value is not None for value in given.values()) > 1:
        raise ParameterError(f"Only one of {', '.join(given)} can be kept. Give one.")
    if regex is not None:
        return AnswerForm(compile_grammar(tokenizer, regex=arguments.text("regex", regex), begins=begins))
    if isinstance(grammar, str):
        is_gbnf = _GBNF_RULE.search(grammar) is not None
        gbnf, lark = (grammar, None) if is_gbnf else (None, grammar)
        return AnswerForm(compile_grammar(tokenizer, gbnf=gbnf, lark=lark, begins=begins))
    if grammar is not None:
        if not hasattr(grammar, "constraint"):
            raise arguments.wrong("grammar", grammar, "the text of a Lark or GBNF grammar, or a compiled one")
        return AnswerForm(grammar)
    schema, parse = schema_of(response_format)
    return None if schema is None else AnswerForm(compile_grammar(tokenizer, json_schema=schema, begins=begins), parse)


def schema_of(response_format: ResponseFormat) -> tuple[Mapping[str, Any] | bool | None, Parse]:
    """The JSON schema of a ``response_format``, True for any object, None for plain text; and what reads the answer."""
    if isinstance(response_format, type):
        return _of_class(response_format)
    if response_format is None:
        return None, json.loads
    fields = arguments.mapping("response_format", response_format)
    kind = fields.get("type")
    if kind == "text":
        return None, json.loads
    if kind == "json_object":
        return fields.get("schema", True), json.loads
    if kind != "json_schema":
        return fields, json.loads
    schema = arguments.mapping("response_format.json_schema", fields.get("json_schema", {})).get("schema")
    if schema is None:
        raise ParameterError(
            'response_format has no schema. Expected {"type": "json_schema", "json_schema": {"schema": ...}}.'
        )
    return arguments.mapping("response_format.json_schema.schema", schema), json.loads


def _of_class(kind: Any) -> tuple[Mapping[str, Any], Parse]:
    """By pydantic for its models, else by msgspec: structs, dataclasses, typed dicts. Only the fields may come."""
    if hasattr(kind, "model_json_schema"):
        return closed_schema(kind.model_json_schema()), _named(kind, kind.model_validate_json)
    try:
        import msgspec
    except ImportError:
        raise UnsupportedError(
            f"response_format is the class {kind.__name__}, which is no pydantic model, and msgspec is not installed. "
            "Give a pydantic model or a JSON schema, or install msgspec.",
            code="EXTRA_MISSING",
        ) from None
    try:
        schema = msgspec.json.schema(kind)
    except TypeError as error:
        raise ParameterError(f"response_format: {kind.__name__} has no JSON schema: {error}.") from None
    return closed_schema(schema), _named(kind, msgspec.json.Decoder(kind).decode)


def _named(kind: Any, read: Parse) -> Parse:
    """A class may check more than its schema says; its refusal is an error of ours."""

    def parse(text: str) -> Any:
        try:
            return read(text)
        except Exception as error:  # pydantic's and msgspec's own kinds, and what a user's validator raises
            raise EdgeLLMError(
                f"The answer keeps the JSON schema of {kind.__name__}, but the class refuses it: {error}",
                code="ANSWER_REFUSED",
            ) from error

    return parse
