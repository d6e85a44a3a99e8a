"""Tries the chat templates of a model file on a few conversations, for ``edgellm verify``.

A load does not do this: a model whose template is refused still goes on with plain text, or with another template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgellm.chat_template.content import CALL, HI, NEEDLE, conversation
from edgellm.chat_template.template import HOW_TO_GIVE_ONE, ChatTemplate
from edgellm.formats.errors import TemplateError
from edgellm.formats.findings import Finding, short

KEY = "tokenizer.chat_template"
MAX_TEMPLATES = 16  # a file may name more, and each may take seconds

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
LOOKED_UP = {"role": "tool", "name": "look", "tool_call_id": CALL["id"], "content": "{}"}

# messages and arguments of each render; a template may refuse some of them, such as a system message
CONVERSATIONS: tuple[tuple[list[dict[str, Any]], dict[str, Any]], ...] = (
    ([HI], {}),
    ([SYSTEM, HI], {}),
    ([HI, ANSWER, HI], {}),
    ([HI, ANSWER], {"add_generation_prompt": False}),
    ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}),
    ([HI], {"tools": [TOOL]}),
    ([HI, ASKED, LOOKED_UP, ANSWER, HI], {"tools": [TOOL]}),
    ([HI, *[ANSWER, HI] * 50], {"tools": [TOOL] * 32}),
)


def template_findings(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with each chat template of a model file."""
    keys = [key for key in metadata if key == KEY or key.startswith(KEY + ".")]
    for key in keys[:MAX_TEMPLATES]:
        if not isinstance(metadata[key], str):
            yield Finding("TEMPLATE_ERROR", "the chat template is no text", HOW_TO_GIVE_ONE, name=key)
            continue
        try:
            yield from try_template(key, ChatTemplate.from_metadata(metadata, name=key[len(KEY) + 1 :] or None))
        except TemplateError as error:
            yield finding(key, error)
    if len(keys) > MAX_TEMPLATES:
        message = f"{len(keys)} chat templates, of which {MAX_TEMPLATES} were tried"
        yield Finding("TEMPLATE_ERROR", message, "Keep those that the model was trained with.", severity="warning")


def try_template(key: str, template: ChatTemplate) -> Iterator[Finding]:
    """Findings of one; TemplateError when it is unsafe or over its budget."""
    refused = []
    for messages, arguments in CONVERSATIONS:
        try:
            template.render(messages, **arguments)
        except TemplateError as error:
            if error.code != "TEMPLATE_ERROR":
                raise
            refused.append(error)
    if len(refused) == len(CONVERSATIONS):
        yield finding(key, refused[0])
    elif template_drops_text(template):
        message = "the chat template drops the text of messages whose content is a text, not a list of parts"
        yield Finding("TEMPLATE_DROPS_TEXT", message, HOW_TO_GIVE_ONE, name=key, severity="warning")


def template_drops_text(template: ChatTemplate) -> bool:
    """Whether a user's text is missing from a prompt that renders without complaint."""
    try:
        return NEEDLE not in template.render_text(conversation("user", NEEDLE))
    except TemplateError as error:
        if error.code != "TEMPLATE_ERROR":
            raise
        return False


def finding(key: str, error: TemplateError) -> Finding:
    """The finding of a template that cannot be used."""
    message = str(error).removesuffix(HOW_TO_GIVE_ONE).rstrip(". ")
    return Finding(error.code, short(message, 400), HOW_TO_GIVE_ONE, name=key)
