"""Which form a model writes its messages in: declared by its checkpoint, derived from its template, or built in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from edgellm.formats.errors import EdgeLLMError, TemplateError
from edgellm.messages.built_in import CERTAIN, OTHERS, built_in, reasoning_in
from edgellm.messages.declared import KEY, declared
from edgellm.messages.derive import derive_calls, derive_content, derive_reasoning
from edgellm.messages.probes import ARGUMENTS, CONTENT, NAMES, REASONING, TOOLS, Probes, Template, call
from edgellm.messages.reader import MessageReader
from edgellm.messages.shapes import CallForm, Pair, Shape


class Vocabulary(Protocol):
    """What is needed of a ``Tokenizer``."""

    eog_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token."""
        ...


@dataclass(frozen=True)
class MessageForm(Shape):
    """See ``Shape``; ``of`` finds that of a model."""

    @classmethod
    def of(
        cls, template: Template, tokenizer: Vocabulary | None = None, metadata: Mapping[str, Any] | None = None
    ) -> MessageForm:
        """The form of the model that has this template."""
        ends = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.eog_ids] if tokenizer else []
        try:
            shape = found(template, ends, (metadata or {}).get(KEY))
        except TemplateError:  # one that is stopped; whoever renders with it is told
            shape = Shape(takes_tools=False)
        return cls(**{field.name: getattr(shape, field.name) for field in fields(Shape)})


def found(template: Template, ends: Sequence[str], declaration: Any = None) -> Shape:
    """What is declared, or built in, or what the template shows."""
    probes = Probes(template, ends)
    shape = _declared(declaration) or built_in(template.source, CERTAIN)
    if shape is None:
        shape = checked(derived(probes), probes)
        other = built_in(template.source, OTHERS) if shape.calls is None and not probes.shows_calls else None
        if other is not None:
            shape = replace(other, reasoning=other.reasoning or shape.reasoning)
    return replace(shape, takes_tools=NAMES[0] in probes.prompt)


def _declared(declaration: Any) -> Shape | None:
    try:
        return declared(declaration) if declaration else None
    except EdgeLLMError:  # it asks for more than markers can say, or is damaged
        return None


def derived(probes: Probes) -> Shape:
    """What the template shows."""
    reasoning = derive_reasoning(probes) or reasoning_in(probes.template.source)
    content = derive_content(probes, reasoning)
    calls = derive_calls(probes)
    if calls is not None and reasoning is not None:
        calls = without_reasoning(calls, reasoning)
    source = "derived" if calls or content else "plain"
    return Shape(reasoning, content, calls, source=source)


def without_reasoning(calls: CallForm, reasoning: Pair) -> CallForm:
    """The form without an empty block of reasoning that the template writes before the first call."""
    opened = calls.section.open
    for marker in (reasoning.open.strip(), reasoning.close.strip()):
        opened = opened.removeprefix(marker).lstrip() if marker else opened
    return replace(calls, section=Pair(opened, calls.section.close))


def checked(shape: Shape, probes: Probes) -> Shape:
    """The form less what does not read back as it was."""
    two = (call(0, ARGUMENTS), call(1, {}))
    if shape.calls is not None:
        answer = probes.answer("", two[:1] if shape.calls.one else two)
        if answer is None or names_read(shape, probes, answer) != list(NAMES[: 1 if shape.calls.one else 2]):
            shape = replace(shape, calls=None)
    answer = probes.answer(CONTENT)
    if shape.content is not None and (answer is None or not reads(shape, probes, answer, CONTENT, "")):
        shape = replace(shape, content=None)
    answer = probes.answer(CONTENT, reasoning=REASONING)
    if answer is not None and REASONING in answer and not reads(shape, probes, answer, CONTENT, REASONING):
        shape = replace(shape, reasoning=None)
    return shape


def names_read(shape: Shape, probes: Probes, answer: str) -> list[str]:
    """The names of the calls in a rendered answer."""
    head, written = probes.written(answer)
    reader = MessageReader(shape, head, TOOLS)
    reader.add(written)
    reader.finish()
    return [call.name for call in reader.message.tool_calls] if not reader.message.content else []


def reads(shape: Shape, probes: Probes, answer: str, content: str, reasoning: str) -> bool:
    """Whether a rendered answer reads back as what it was made of."""
    head, written = probes.written(answer)
    reader = MessageReader(shape, head, TOOLS)
    reader.add(written)
    reader.finish()
    return (reader.message.content.strip(), reader.message.reasoning) == (content, reasoning)
