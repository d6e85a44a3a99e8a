"""Forms of published templates: what a template writes of a message reads back as that message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from published_templates import source_of

from edgellm.chat_template import ChatTemplate
from edgellm.formats.errors import TemplateError
from edgellm.messages.form import MessageForm
from edgellm.messages.probes import Probes
from edgellm.messages.reader import MessageReader, ReadMessage

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Hi"}

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "ratio": {"type": "number"},
    "metric": {"type": "boolean"},
    "more": {"type": "object"},
    "list": {"type": "array"},
    "nothing": {"type": "null"},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "It does.",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": []},
        },
    }
    for name in ("get_weather", "noop")
]
PLAIN = ("get_weather", {"city": "Köln", "days": 3})
DEEP = (
    "get_weather",
    {
        "city": '日本 🦜 "x" <b>&</b> \\n',
        "days": -3,
        "ratio": 1.5,
        "metric": True,
        "more": {"a": [1, {"b": None, "c": False}], "d": {}},
        "list": [1, "two", []],
        "nothing": None,
    },
)
MARKERS = ("get_weather", {"city": "one\n\n  two </tool_call> <tool_call> </parameter> [ARGS]\n"})
NOTHING = ("noop", {})

# what is tried -> (content, reasoning, calls)
MESSAGES: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "content": ("Some text.\n\nMore of it.", "", []),
    "reasoning": ("Text", "Thinking\n\nhard <b>", []),
    "a call": ("", "", [PLAIN]),
    "a call without arguments": ("", "", [NOTHING]),
    "two calls": ("", "", [PLAIN, NOTHING]),
    "deep arguments": ("", "", [DEEP]),
    "markers in a string": ("", "", [MARKERS]),
    "content and a call": ("Let me look.", "", [PLAIN]),
    "all": ("Let me look.", "Hm.", [PLAIN]),
}

# template -> (where its form is from, which messages it cannot show)
CALLING: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen2_5": ("derived", ()),
    "qwen3": ("derived", ()),
    "qwen3_instruct_2507": ("derived", ()),
    "qwen3_vl": ("derived", ()),
    "qwen3_5_think": ("derived", ()),
    "qwen3_6": ("derived", ()),
    "qwen3_8": ("derived", ()),
    "llama3_1": ("derived", ()),
    "llama3_2": ("derived", ()),
    "glm4moe": ("derived", ()),
    "gptoss": ("built-in", ("reasoning", "two calls", "content and a call", "all")),
    "lfm2_v2": ("derived", ()),
    "lfm2_2_5_vl": ("derived", ()),
    "gemma4": ("derived", ()),
    "gemma4_v2": ("derived", ()),
    "gemma4_v3": ("derived", ()),
    "gemma4_v4": ("derived", ()),
    "gemma4_v5": ("derived", ()),
    "axolotl_gemma4": ("derived", ()),
    "axolotl_gemma4_unified": ("derived", ()),
    "nemotron_3_nano": ("derived", ()),
    "nemotron_3_super": ("derived", ()),
    "deepseekv3": ("derived", ("content and a call", "all")),
    "axolotl_command_a_tool_use": ("derived", ()),
    "axolotl_exaone4": ("derived", ()),
    "axolotl_jamba": ("derived", ()),
    "axolotl_llama3_2_vision": ("derived", ()),
    "axolotl_llama4": ("built-in", ("content and a call", "all")),
    "axolotl_mistral_v2v3": ("derived", ()),
    "axolotl_mistral_v3_tekken": ("derived", ()),
}


def written(template: ChatTemplate, message: dict[str, Any]) -> tuple[str, str] | None:
    """What stood in the prompt and what the model wrote of a message, by its template; None where that refuses."""
    try:
        prompt = template.render_text([USER], tools=TOOLS)
        answer = template.render_text([USER, message], False, tools=TOOLS)
    except TemplateError:
        return None
    probes = Probes(template, ["</s>"])
    probes.prompt = prompt
    return probes.written(answer)


def as_message(title: str) -> dict[str, Any]:
    """A row of the table as a template takes it."""
    content, reasoning, calls = MESSAGES[title]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": f"call0000{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ]
    return message


def read(form: MessageForm, prompt: str, pieces: Any) -> ReadMessage:
    """A message."""
    reader = MessageReader(form, prompt, TOOLS, lambda: "made00000")
    for piece in pieces:
        reader.add(piece)
    reader.finish()
    return reader.message


def result(message: ReadMessage) -> tuple[str, str, list[tuple[str, Any]]]:
    """A message in plain values."""
    calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return message.content.strip(), message.reasoning, calls


def roundtrip(source: str, refused: tuple[str, ...] = ()) -> int:
    """How many messages read back as they were; those with more calls than the template takes are left out."""
    template = ChatTemplate(source, **TOKENS)
    form = MessageForm.of(template)
    good = 0
    for title, (content, reasoning, calls) in MESSAGES.items():
        rendered = written(template, as_message(title))
        if title in refused or rendered is None:
            continue
        prompt, text = rendered
        shown_content = content if content and content.split()[0] in text else ""
        shown_reasoning = reasoning if reasoning and reasoning.split()[0] in text else ""
        whole = read(form, prompt, [text])
        assert result(whole) == (shown_content, shown_reasoning, calls), (title, text)
        assert read(form, prompt, text) == whole, title
        good += 1
    return good


@pytest.mark.parametrize("name", CALLING)
def test_a_message_reads_back_from_what_its_template_writes(name: str) -> None:
    source, refused = CALLING[name]
    assert MessageForm.of(ChatTemplate(source_of(name), **TOKENS)).source == source
    assert roundtrip(source_of(name), refused) >= 5


HEAD = (
    "{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}{% for m in messages %}"
    "{% if m.role != 'assistant' %}<|user|>{{ m.content }}<|end|>{% else %}<|bot|>{{ m.content or '' }}"
)
TAIL = "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
ITEMS = "{% for k, v in c.arguments.items() %}"
SHOWN = "{{ v if v is string else v | tojson }}"

# families that no package carries: how their templates write calls
FAMILIES = {
    "granite 4": "{% for c in m.tool_calls %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}",
    "phi 4 mini": "{% for c in m.tool_calls %}<|tool_call|>{{ c.function | tojson }}<|/tool_call|>{% endfor %}",
    "functionary 3.1": "{% for c in m.tool_calls %}<function={{ c.function.name }}>{{ c.function.arguments | tojson }}"
    "</function>{% endfor %}",
    "mistral small 3.2": "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}",
    "devstral": "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}",
    "minimax m2": "{% if m.tool_calls %}\n<minimax:tool_call>\n{% for t in m.tool_calls %}{% set c = t.function %}"
    '<invoke name="{{ c.name }}">\n' + ITEMS + '<parameter name="{{ k }}">' + SHOWN + "</parameter>\n{% endfor %}"
    "</invoke>\n{% endfor %}</minimax:tool_call>{% endif %}",
    "seed oss": "{% for t in m.tool_calls %}{% set c = t.function %}\n<seed:tool_call>\n<function={{ c.name }}>\n"
    + ITEMS + "<parameter={{ k }}>" + SHOWN + "</parameter>\n{% endfor %}</function>\n</seed:tool_call>{% endfor %}",
    "deepseek 3.1": "{% for c in m.tool_calls %}{% if loop.first %}<｜tool▁calls▁begin｜>{% endif %}"
    "<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments | tojson }}<｜tool▁call▁end｜>"
    "{% endfor %}{% if m.tool_calls %}<｜tool▁calls▁end｜>{% endif %}",
    "deepseek 3.2": "{% if m.tool_calls %}\n\n<｜DSML｜function_calls>\n{% for t in m.tool_calls %}"
    '{% set c = t.function %}<｜DSML｜invoke name="{{ c.name }}">\n' + ITEMS + '<｜DSML｜parameter name="{{ k }}" '
    "string=\"{{ 'true' if v is string else 'false' }}\">" + SHOWN + "</｜DSML｜parameter>\n{% endfor %}"
    "</｜DSML｜invoke>\n{% endfor %}</｜DSML｜function_calls>{% endif %}",
    "kimi k2": "{% for c in m.tool_calls %}{% if loop.first %}<|tool_calls_section_begin|>{% endif %}"
    "<|tool_call_begin|>functions.{{ c.function.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
    "{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}"
    "{% if m.tool_calls %}<|tool_calls_section_end|>{% endif %}",
    "nemotron nano 2": "{% for c in m.tool_calls %}{% if loop.first %}<TOOLCALL>[{% endif %}{{ c.function | tojson }}"
    "{% if loop.last %}]</TOOLCALL>{% else %}, {% endif %}{% endfor %}",
    "apertus": "{% for c in m.tool_calls %}{% if loop.first %}<|tools_prefix|>[{% endif %}"
    '{"{{ c.function.name }}": {{ c.function.arguments | tojson }}}'
    "{% if loop.last %}]<|tools_suffix|>{% else %}, {% endif %}{% endfor %}",
    "minimax m1": "{% for c in m.tool_calls %}{% if loop.first %}<tool_calls>{% endif %}\n{{ c.function | tojson }}"
    "{% if loop.last %}\n</tool_calls>{% endif %}{% endfor %}",
    "minicpm 5": "{% for t in m.tool_calls %}{% set c = t.function %}\n<function name=\"{{ c.name }}\">" + ITEMS
    + '<param name="{{ k }}">' + SHOWN + "</param>{% endfor %}</function>{% endfor %}",
    "kimi k3": "{% if m.tool_calls %}<|open|>tools<|sep|>{% for t in m.tool_calls %}{% set c = t.function %}"
    '<|open|>call tool="{{ c.name }}" index="{{ loop.index }}"<|sep|>' + ITEMS + '<|open|>argument key="{{ k }}" type="'
    "{{ 'boolean' if v is boolean else 'null' if v is none else 'number' if v is number else 'string' if v is string"
    " else 'object' if v is mapping else 'array' }}\"<|sep|>" + SHOWN + "<|close|>argument<|sep|>{% endfor %}"
    "<|close|>call<|sep|>{% endfor %}<|close|>tools<|sep|>{% endif %}",
    "apriel": "{% if m.tool_calls %}\n<tool_calls>[{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]</tool_calls>{% endif %}",
    "solar": "{% for c in m.tool_calls %}{% if loop.first %}<|tool_calls|>{% endif %}<|tool_call:begin|>{{ c.id }}"
    "<|tool_call:name|>{{ c.function.name }}<|tool_call:args|>{{ c.function.arguments | tojson }}<|tool_call:end|>"
    "{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_no_package_carries_read_back(family: str) -> None:
    assert roundtrip(HEAD + FAMILIES[family] + TAIL) == len(MESSAGES)


# a template that leaves calls out of what was said -> an answer of its model
LEFT_OUT = {
    "<|tool_list_start|>": "<|tool_call_start|>[get_weather(city='Köln', days=3)]<|tool_call_end|>",
    "List of tools: [ <|im_start|>": "<|tool_call_start|>[get_weather(city='Köln', days=3)]<|tool_call_end|>",
    "[AVAILABLE_TOOLS]": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Köln", "days": 3}}]',
    "[AVAILABLE_TOOLS][TOOL_CALLS][ARGS]": '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "days": 3}',
    "respond with <|tool_call|>": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Köln", "days": 3}}]',
    "in <tool_call> tags": '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln", "days": 3}}</tool_call>',
    ">>>all\n<|start_header_id|>": 'get_weather\n{"city": "Köln", "days": 3}>>>all\nHm',
    "<|tool_calls_section_begin|><|tool_call_argument_begin|>": "<|tool_calls_section_begin|><|tool_call_begin|>"
    'functions.get_weather:0<|tool_call_argument_begin|>{"city": "Köln", "days": 3}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
}


@pytest.mark.parametrize("mark", LEFT_OUT)
def test_what_a_template_leaves_out_is_built_in(mark: str) -> None:
    template = ChatTemplate(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + mark + "{{ messages[-1].content }}"
    )
    form = MessageForm.of(template)
    assert form.source == "built-in" and form.takes_tools
    assert result(read(form, ">>>" if mark[0] == ">" else "", LEFT_OUT[mark]))[2] == [PLAIN]


@pytest.mark.parametrize("name", ["cohere", "gemma", "gemma3", "llama3", "phi3", "axolotl_chatml", "axolotl_phi_4"])
def test_a_template_without_tools_has_none(name: str) -> None:
    form = MessageForm.of(ChatTemplate(source_of(name), **TOKENS))
    assert not form.takes_tools and not form.has_calls


def test_what_the_prompt_opens_is_reasoning() -> None:
    for name, opens in (
        ("qwen3_5_think", True),
        ("qwen3_5_nothink", False),
        ("qwen3", False),
        ("nemotron_3_nano", True),
    ):
        template = ChatTemplate(source_of(name), **TOKENS)
        form = MessageForm.of(template)
        assert form.reasoning is not None and form.reasoning.close.strip() == "</think>"
        assert form.opened_by(template.render_text([USER])) == opens, name


# what is in a template's source -> the end of its prompt and an answer of its model, read as (content, reasoning)
THOUGHT = {
    "<|open|><|sep|><|close|>": (
        "<|open|>think<|sep|>",
        "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes.<|close|>response<|sep|>",
    ),
    "[BEGIN FINAL RESPONSE] <tool_calls>": (
        "Here are my reasoning steps:\n",
        "Hm.\n[BEGIN FINAL RESPONSE]\nYes.\n[END FINAL RESPONSE]",
    ),
    "<tool_calls> [BEGIN FINAL RESPONSE]": (
        "<|assistant|>\n",
        "Here are my reasoning steps:\nHm.\n[BEGIN FINAL RESPONSE]\nYes.",
    ),
}


@pytest.mark.parametrize("mark", THOUGHT)
def test_reasoning_that_a_template_does_not_show_is_built_in(mark: str) -> None:
    prompt, answer = THOUGHT[mark]
    form = MessageForm.of(ChatTemplate(mark + "{{ messages[-1].content }}{{ tools }}"))
    for pieces in ([answer], answer):
        assert result(read(form, prompt, pieces)) == ("Yes.", "Hm.", [])


def test_kimis_ids_are_its_own() -> None:
    source = HEAD + FAMILIES["kimi k2"] + TAIL
    form = MessageForm.of(ChatTemplate(source, **TOKENS))
    message = read(form, "", [LEFT_OUT["<|tool_calls_section_begin|><|tool_call_argument_begin|>"]])
    assert [call.id for call in message.tool_calls] == ["functions.get_weather:0"]
