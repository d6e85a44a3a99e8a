"""ChatTemplate: load a template once, render messages many times."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import jinja2

from edgellm.chat_template.budget import MAX_SOURCE_BYTES, Budget, BudgetExceeded, text_bytes
from edgellm.chat_template.content import ContentForms
from edgellm.chat_template.messages import Message, template_data, template_messages
from edgellm.chat_template.named import NAMED_TEMPLATES
from edgellm.chat_template.sandbox import RaisedByTemplate, Sandbox, SecurityError
from edgellm.chat_template.user_text import Segment, segments
from edgellm.formats.errors import ParameterError, TemplateError
from edgellm.formats.findings import short

CONTINUE_TAG = "\ue000continue here\ue001 "  # its blank shows whether the template trims
SPECIAL_TOKENS = {  # the template's name of a token -> its id in the metadata
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
MAX_SAID = 500  # characters of an error
BASE_MODELS = "It may be a base model, which goes on with a text instead: `edgellm run --raw`."
HOW_TO_GIVE_ONE = "Give one with --chat-template (a name such as 'chatml', a file, or the Jinja text itself)."


@lru_cache(maxsize=1)
def sandbox() -> Sandbox:
    """The one environment of this process."""
    return Sandbox()


@contextmanager
def limits(budget: Budget, doing: str) -> Iterator[None]:
    """Run template code under ``budget`` and turn what it raises into a TemplateError."""
    active = sandbox().active
    outer, active.budget = active.budget, budget
    try:
        yield
    except BudgetExceeded as error:
        raise TemplateError(budget_message(doing, str(error)), code="TEMPLATE_BUDGET") from None
    except (RecursionError, MemoryError, OverflowError) as error:
        reason = "endless recursion" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise TemplateError(budget_message(doing, reason), code="TEMPLATE_BUDGET") from None
    except SecurityError as error:
        raise TemplateError(
            f"The chat template is unsafe: {said(error)}. Templates get messages and may only make text of them. "
            f"{HOW_TO_GIVE_ONE}",
            code="TEMPLATE_UNSAFE",
        ) from None
    except RaisedByTemplate as error:
        raise TemplateError(f"The chat template refuses these messages: {said(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"The chat template is broken in line {error.lineno}: {said(error)}. {HOW_TO_GIVE_ONE}"
        ) from None
    except TemplateError:
        raise
    except Exception as error:  # whatever an untrusted program may run into
        if budget.spent:
            raise TemplateError(budget_message(doing, budget.spent), code="TEMPLATE_BUDGET") from None
        raise TemplateError(
            f"The chat template failed while {doing}: {type(error).__name__}: {said(error)}. It expects messages of "
            f"another form, or is broken. {HOW_TO_GIVE_ONE}"
        ) from error
    finally:
        active.budget = outer


def said(error: Exception) -> str:
    """What an error of a template says, on one line; a template may have written it."""
    text = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)
    return short(" ".join((text or "")[: 2 * MAX_SAID].split()), MAX_SAID)


def budget_message(doing: str, reason: str) -> str:
    """The text of a TEMPLATE_BUDGET error."""
    return f"The chat template was stopped while {doing}: {reason}. No sane template needs that. {HOW_TO_GIVE_ONE}"


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """``source`` as a program of the sandbox; TemplateError when it is too long, broken or unsafe."""
    nbytes = len(source.encode("utf-8", "surrogatepass"))
    if nbytes > MAX_SOURCE_BYTES:
        raise TemplateError(
            f"The chat template has {nbytes:,} bytes; at most {MAX_SOURCE_BYTES:,} are allowed. {HOW_TO_GIVE_ONE}",
            code="TEMPLATE_BUDGET",
        )
    with limits(Budget(), "loading it"):
        return sandbox().from_string(source)


class ChatTemplate:
    """A model's chat template and the tokens it may name; safe to use from several threads.

    ``special_tokens`` are further names for the template (``unk_token`` ...). A token that is None stays undefined.
    ``tool_use`` is the source to use instead when tools are given, where a model has two.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        tool_use: str | None = None,
        special_tokens: Mapping[str, str | None] | None = None,
    ) -> None:
        self.source = source
        tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self.special_tokens = {name: str(text) for name, text in tokens.items() if text is not None}
        self._template = compiled(source)
        self._tool_use = compiled(tool_use) if tool_use is not None else self._template
        self._forms = ContentForms(partial(self._trial, self._template))
        self._tool_forms = ContentForms(partial(self._trial, self._tool_use))

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        bos_token: str | None = None,
        eos_token: str | None = None,
        override: str | None = None,
        name: str | None = None,
    ) -> ChatTemplate:
        """The template of a GGUF file, or ``override``: a name of ``NAMED_TEMPLATES`` or Jinja text.

        ``name`` picks ``tokenizer.chat_template.{name}``. Tokens not given are looked up in the file's vocabulary.
        A file without a template is a TemplateError, never a guess.
        """
        tokens = {**special_tokens(metadata)}
        tokens.update({k: v for k, v in (("bos_token", bos_token), ("eos_token", eos_token)) if v is not None})
        bos, eos = tokens.pop("bos_token", None), tokens.pop("eos_token", None)
        tool_use = None
        if override is not None:
            source = named_or_source(override)
        else:
            source = file_template(metadata, name)
            tool_use = metadata.get("tokenizer.chat_template.tool_use") if name is None else None
        return cls(source, bos, eos, tool_use=tool_use, special_tokens=tokens)

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **chat_template_kwargs: Any,
    ) -> list[Segment]:
        """The prompt of ``messages`` as segments; ``render_text`` joins them to transformers' bytes.

        ``chat_template_kwargs`` (``enable_thinking=False`` ...) are further names for the template.
        ``continue_final_message`` ends the prompt inside the last message, for the model to write on.
        ParameterError for messages or tools that no template can take.
        """
        if tools is not None and (isinstance(tools, str | bytes) or not isinstance(tools, Sequence)):
            raise ParameterError(f"tools is {type(tools).__name__}. It must be a list of descriptions of tools.")
        template, forms = (self._tool_use, self._tool_forms) if tools else (self._template, self._forms)
        prepared = template_messages(messages, forms.fit)
        last = mark_continuation(prepared) if continue_final_message else ""
        names = {
            **self.special_tokens,
            **{key: template_data(value, key) for key, value in chat_template_kwargs.items()},
            "messages": prepared,
            "tools": template_data(tools, "tools"),
            "documents": template_data(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        out = self._run(template, names)
        return cut_at_continuation(out, last) if continue_final_message else out

    def _run(self, template: jinja2.Template, names: dict[str, Any]) -> list[Segment]:
        budget = Budget(input_size(names), len(names["messages"]) + len(names["tools"] or ()))
        with limits(budget, "rendering the messages"):
            chunks = []
            for chunk in template.root_render_func(template.new_context(names)):
                budget.step()
                budget.allocate(16 + text_bytes(chunk))
                chunks.append(chunk)
            budget.allocate(sum(map(text_bytes, chunks)))
            return segments(chunks)

    def _trial(self, template: jinja2.Template, messages: list[dict[str, Any]]) -> str:
        """What ``template`` makes of messages as they are."""
        prepared = template_messages(messages, lambda message, where: message)
        names = {**self.special_tokens, "messages": prepared, "tools": None, "documents": None}
        return "".join(segment.text for segment in self._run(template, {**names, "add_generation_prompt": True}))

    def render_text(self, messages: Sequence[Message | Mapping[str, Any]], *args: Any, **kwargs: Any) -> str:
        """``render`` as one string."""
        return "".join(segment.text for segment in self.render(messages, *args, **kwargs))


def input_size(value: Any) -> int:
    """Bytes of ``value``: four to a character, 64 for each value."""
    if isinstance(value, str):
        return 64 + 4 * len(value)
    if isinstance(value, Mapping):
        return 64 + sum(input_size(key) + input_size(item) for key, item in value.items())
    return 64 + sum(map(input_size, value)) if isinstance(value, list | tuple) else 64


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that templates name, from the vocabulary of a GGUF file."""
    texts = metadata.get("tokenizer.ggml.tokens")
    found = {}
    for name, key in SPECIAL_TOKENS.items():
        token = metadata.get(key)
        if texts is not None and isinstance(token, numbers.Integral) and 0 <= int(token) < len(texts):
            found[name] = str(texts[int(token)])
    return found


def named_or_source(override: str) -> str:
    """``override`` itself when it is Jinja text, else the named template; TemplateError for an unknown name."""
    if override in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[override]
    if "{{" in override or "{%" in override:
        return override
    raise TemplateError(
        f"--chat-template: {override!r} is no known template. Expected Jinja text or one of: "
        f"{', '.join(sorted(NAMED_TEMPLATES))}."
    )


def file_template(metadata: Mapping[str, Any], name: str | None) -> str:
    """The Jinja text in the metadata of a GGUF file; TemplateError when there is none."""
    key = "tokenizer.chat_template" if name is None else f"tokenizer.chat_template.{name}"
    source = metadata.get(key)
    if isinstance(source, str) and source:
        return source
    have = sorted(k for k in metadata if k.startswith("tokenizer.chat_template"))
    found = f"no {key} (it has: {', '.join(have)}). " if have else f"no chat template. {BASE_MODELS} "
    raise TemplateError(f"The model file has {found}{HOW_TO_GIVE_ONE}")


def mark_continuation(messages: list[dict[str, Any]]) -> str:
    """Write a tag behind the text of the last message, and give that text."""
    last = messages[-1].get("content") if messages else None
    if isinstance(last, list):
        block = next((block for block in reversed(last) if isinstance(block, dict) and "text" in block), None)
        if block is not None:
            text = str(block["text"])
            block["text"] = template_data(text + CONTINUE_TAG, "messages")
            return text
    if not isinstance(last, str):
        raise TemplateError(
            "continue_final_message: the last message has no text to continue. Give its content as text."
        )
    messages[-1]["content"] = template_data(last + CONTINUE_TAG, "messages")
    return last


def cut_at_continuation(out: list[Segment], last: str) -> list[Segment]:
    """``out`` up to the tag behind ``last``; TemplateError when the template dropped either.

    A template that trims the message took the blank off the tag: then the message loses its own blanks too.
    """
    text = "".join(segment.text for segment in out)
    end = text.rfind(CONTINUE_TAG.strip())
    if end < 0 or last.strip() not in text:
        raise TemplateError(
            "continue_final_message: the chat template drops text of the last message. End with an assistant message."
        )
    if not text.startswith(CONTINUE_TAG, end):
        end = len(text[:end].rstrip())
    kept, position = [], 0
    for segment in out:
        kept.append(Segment(segment.text[: max(end - position, 0)], segment.special))
        position += len(segment.text)
    return [segment for segment in kept if segment.text]
