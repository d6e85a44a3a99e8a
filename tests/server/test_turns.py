"""Turns of the system in the midst of a talk, with every template known by name: nothing moves and nothing is lost."""

from __future__ import annotations

import pytest
from server_client import Server

from edgellm.chat_template import ChatTemplate
from edgellm.chat_template.named import NAMED_TEMPLATES
from edgellm.server.turns import fitting

__all__ = ["Server"]  # skips without the extra

# drops turns of the system that are not the first, and says nothing
DROPS = """\
{%- for message in messages %}
{%- if message.role != 'system' or loop.first %}[{{ message.role }}]{{ message.content }}{% endif %}
{%- endfor %}"""
TALK = [
    {"role": "system", "content": "one"},
    {"role": "system", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
    {"role": "system", "content": "five"},
    {"role": "user", "content": "six"},
    {"role": "user", "content": [{"type": "text", "text": "seven"}]},
]
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.mark.parametrize("name", [*NAMED_TEMPLATES, "drops"])
def test_every_turn_is_in_the_prompt_in_its_place(name: str) -> None:
    template = ChatTemplate(DROPS if name == "drops" else NAMED_TEMPLATES[name], "<s>", "</s>")
    text = template.render_text(fitting(template, TALK))
    places = [text.find(word) for word in WORDS]
    talk = places[2:]  # where the first words of the system stand is the template's own affair
    assert -1 not in places and talk == sorted(talk), text


@pytest.mark.parametrize("name", [*NAMED_TEMPLATES, "drops"])
def test_a_talk_that_goes_on_has_the_same_beginning(name: str) -> None:
    template = ChatTemplate(DROPS if name == "drops" else NAMED_TEMPLATES[name], "<s>", "</s>")
    short = template.render_text(fitting(template, TALK[:4]), add_generation_prompt=False)
    long = template.render_text(fitting(template, TALK), add_generation_prompt=False)
    assert long.startswith(short.rstrip())


def test_what_a_template_takes_is_left_as_it_is() -> None:
    template = ChatTemplate(NAMED_TEMPLATES["chatml"])
    assert fitting(template, TALK) is TALK
