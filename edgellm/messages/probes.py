"""What a chat template makes of messages that are known to the last character."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edgellm.formats.errors import TemplateError
from edgellm.tokenizer.special_ids import END_OF_GENERATION

USER = {"role": "user", "content": "Say something."}
CONTENT, REASONING = "ContentOfTheProbe", "ReasoningOfTheProbe"
NAMES = ("probe_alpha", "probe_omega")
IDS = ("call00001", "call00002")
KEYS = ("first_key", "second_key")
VALUES = ("ValueNumberOne", "ValueNumberTwo")
THINKING: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": True, "thinking": True},
)  # arguments that switch the reasoning on
TAG = re.compile(r"<[^<>\s]*(?:\s[^<>]*)?>|<[^<>\s]*|\[/?[A-Z_]+\]|\[\|[^\[\]|]*\|\]|\s+|[^<\[\s]+|\[")


class Template(Protocol):
    """What is needed of a ``ChatTemplate``."""

    source: str

    def render_text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **more: Any
    ) -> str:
        """The prompt of messages."""
        ...


def call(number: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One of the two calls of the probes."""
    function = {"name": NAMES[number], "arguments": dict(arguments)}
    return {"id": IDS[number], "type": "function", "function": function}


def tool(name: str) -> dict[str, Any]:
    """The description of a tool that takes both keys."""
    properties = {key: {"type": "string", "description": "a text"} for key in KEYS}
    parameters = {"type": "object", "properties": properties, "required": []}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}


TOOLS = [tool(name) for name in NAMES]
ARGUMENTS = dict(zip(KEYS, VALUES, strict=True))


def tags(text: str) -> list[str]:
    """Text in tags, words and blanks; joined they are the text."""
    return TAG.findall(text)


def common_head(one: str, other: str) -> str:
    """What two texts begin with, in whole tags."""
    out, at = [], 0
    for a, b in zip(tags(one), tags(other), strict=False):
        if a != b:
            break
        out.append(a)
        at += len(a)
    return one[:at]


def common_tail(one: str, other: str) -> str:
    """What two texts end with, in whole tags."""
    n = 0
    for a, b in zip(reversed(tags(one)), reversed(tags(other)), strict=False):
        if a != b:
            break
        n += len(a)
    return one[len(one) - n :]


class Probes:
    """One template, tried; None where it refuses."""

    def __init__(self, template: Template, ends: Sequence[str] = ()) -> None:
        self.template = template
        self.ends = {*ends, *END_OF_GENERATION}
        self.prompt = self._render([USER], True) or ""
        content = self.answer(CONTENT)
        before, _, after = (content or "").partition(CONTENT)
        self.before, self.after = before, after
        first = next((tag for tag in tags(after) if not tag.isspace()), "")
        if first:
            self.ends.add(first if len(first) > 1 else after.split()[0])

    @property
    def shows_calls(self) -> bool:
        """Whether it writes calls at all."""
        without, given = (self.answer("", calls) or "" for calls in ((), [call(0, ARGUMENTS)]))
        return given.count(NAMES[0]) > without.count(NAMES[0])

    def _render(self, messages: Sequence[Mapping[str, Any]], generation: bool = False, **more: Any) -> str | None:
        try:
            return self.template.render_text(messages, generation, tools=TOOLS, **more)
        except TemplateError as error:
            if error.code == "TEMPLATE_BUDGET":
                raise
            return None

    def answer(
        self, content: str | None, calls: Sequence[Mapping[str, Any]] = (), reasoning: str | None = None, **more: Any
    ) -> str | None:
        """A user's message and this answer to it, without what may come next."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = list(calls)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        return self._render([USER, message], **more)

    def written(self, answer: str) -> tuple[str, str]:
        """What of a rendered answer stood in the prompt, and what the model wrote, without what ends its turn."""
        head = common_head(self.prompt, answer)
        rest = answer[len(head) :]
        rest = rest[: len(rest) - len(common_tail(rest, self.after))]
        stops = [at for end in self.ends if (at := rest.find(end)) >= 0]
        return head, rest[: min(stops, default=len(rest))]
