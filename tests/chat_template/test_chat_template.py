# ruff: noqa: E501  (a template stays on one line)
"""Chat templates: what callers give, what templates may use, which characters stay a user's, how errors read."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edgellm.chat_template import ChatTemplate, Message, Segment
from edgellm.chat_template.user_text import UserText, concat, spans_of, whole
from edgellm.formats.errors import ParameterError, TemplateError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(source: str, content: Any = "hi", **arguments: Any) -> list[Segment]:
    """Segments of one user message."""
    return ChatTemplate(source, "<s>", "</s>").render([{"role": "user", "content": content}], **arguments)


def text(source: str, content: Any = "hi", **arguments: Any) -> str:
    """The same as one string."""
    return "".join(segment.text for segment in render(source, content, **arguments))


def test_segments_tell_the_templates_text_from_the_users() -> None:
    assert ChatTemplate(CHATML).render([Message("user", "a<|im_end|>b")]) == [
        Segment("<|im_start|>user\n", True),
        Segment("a<|im_end|>b", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


def test_message_and_dict_render_alike() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    message = Message("assistant", "x", tool_calls=[call], reasoning_content="why", extra={"prefix": True})
    source = "{{ messages[0] | tojson }}"
    assert ChatTemplate(source).render_text([message]) == ChatTemplate(source).render_text([message.to_dict()])


def test_an_unknown_role_is_the_users_text() -> None:
    template = ChatTemplate("{{ '<|' + messages[0]['role'] + '|>' }}")
    assert template.render([Message("user", "")]) == [Segment("<|user|>", True)]
    assert template.render([Message("im_end", "")])[1] == Segment("im_end", False)


# expression over c = "  Ab<|x|>\n" -> (text, the part of it that is the user's)
ORIGINS = {
    "c": ("  Ab<|x|>\n", "  Ab<|x|>\n"),
    "'<' + c.strip() + '>'": ("<Ab<|x|>>", "Ab<|x|>"),
    "('<' + c + '>')[1:-1]|trim": ("Ab<|x|>", "Ab<|x|>"),
    "'<' ~ c|trim ~ '>'": ("<Ab<|x|>>", "Ab<|x|>"),
    "c.split('<')[0].strip() + '</s>'": ("Ab</s>", "Ab"),
    "('[T]' + c.strip()).split('|')[0]": ("[T]Ab<", "Ab<"),
    "('[T]' + c.strip()).split('b')|join('#')": ("[T]A#<|x|>", "A<|x|>"),
    "'%s</s>' % c.strip()": ("Ab<|x|></s>", "Ab<|x|>"),
    "'{}</s>'.format(c.strip())": ("Ab<|x|></s>", "Ab<|x|>"),
    "[c.strip(), '</s>']|join('|')": ("Ab<|x|>|</s>", "Ab<|x|>"),
    "'|'.join([c.strip(), '</s>'])": ("Ab<|x|>|</s>", "Ab<|x|>"),
    "('</s>' + c.strip())|upper": ("</S>AB<|X|>", "AB<|X|>"),
    "('</s>' + c.strip()).replace('x', '</s>')": ("</s>Ab<|</s>|>", "Ab<||>"),
    "'<s>'.replace('s', c.strip())": ("<Ab<|x|>>", "Ab<|x|>"),
    "c.strip()[0] + '!'": ("A!", "A"),
    "c.strip()|first + '!'": ("A!", "A"),
    "c.strip()|last + '!'": (">!", ">"),
    "c.strip()|list|join": ("Ab<|x|>", "Ab<|x|>"),
    "c.strip()|reverse": (">|x|<bA", ">|x|<bA"),
    "c|tojson": ('"  Ab<|x|>\\n"', '"  Ab<|x|>\\n"'),
    "{'k': c}|string": ("{'k': '  Ab<|x|>\\n'}", "{'k': '  Ab<|x|>\\n'}"),
    "[c]": ("['  Ab<|x|>\\n']", "['  Ab<|x|>\\n']"),
    "c.strip()|e": ("Ab&lt;|x|&gt;", "Ab&lt;|x|&gt;"),
    "c.strip()|safe": ("Ab<|x|>", "Ab<|x|>"),
    "c.strip().center(9)": (" Ab<|x|> ", " Ab<|x|> "),
    "c.strip()|truncate(4, true, '', 0)": ("Ab<|", "Ab<|"),
    "c.strip()|indent(2, true)": ("  Ab<|x|>", "  Ab<|x|>"),
    "c.strip() * 2": ("Ab<|x|>Ab<|x|>", "Ab<|x|>Ab<|x|>"),
    "[c.strip()]|map('lower')|first": ("ab<|x|>", "ab<|x|>"),
    "strftime_now(c.strip())": ("Ab<|x|>", "Ab<|x|>"),
    "'%s %d' % (c.strip(), 3)": ("Ab<|x|> 3", "Ab<|x|> 3"),
    "'%(a)s' % {'a': c.strip()}": ("Ab<|x|>", "Ab<|x|>"),
    "'{a}'.format(a=c.strip())": ("Ab<|x|>", "Ab<|x|>"),
    "c.partition('<')[1]": ("<", "<"),
    "(c ~ '')|trim|replace('|', '')": ("Ab<x>", "Ab<x>"),
}


@pytest.mark.parametrize("expression", ORIGINS)
def test_a_users_characters_stay_the_users(expression: str) -> None:
    segments = render("{% set c = messages[0].content %}{{ " + expression + " }}", "  Ab<|x|>\n")
    expected, users = ORIGINS[expression]
    assert "".join(segment.text for segment in segments) == expected
    assert "".join(segment.text for segment in segments if not segment.special) == users


STATEMENTS = [
    "{% for ch in c %}{{ ch }}{% endfor %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(c) }}",
    "{% macro f() %}{{ varargs[0] }}{% endmacro %}{{ f(*[c]) }}",
    "{% macro f() %}{% for k in kwargs %}{{ k }}{% endfor %}{% endmacro %}{{ f(**{c: 1}) }}",
    "{% for k in dict(**{c: 1}) %}{{ k }}{% endfor %}",
    "{% set x %}{{ c }}{% endset %}{{ x }}",
    "{% set ns = namespace(x=c) %}{{ ns.x }}",
    "{% set a, b = c[:1], c[1:] %}{{ a }}{{ b }}",
    "{% filter trim %}{{ c }}{% endfilter %}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{{ c }}{% endcall %}",
    "{% generation %}{{ c }}{% endgeneration %}",
    "{% for g in [{'a': c}]|groupby('a') %}{{ g.grouper }}{% endfor %}",
    "{% for k, v in {c: 1}|dictsort %}{{ k }}{% endfor %}",
    "{% block b %}{{ messages[0].content }}{% endblock %}",
    "{% set k = cycler(c) %}{{ k.next() }}",
    "{% for x in [1, 2] %}{{ loop.cycle(c, '') }}{% endfor %}",
]


@pytest.mark.parametrize("source", STATEMENTS)
def test_no_way_through_a_template_makes_a_users_text_special(source: str) -> None:
    assert render("{% set c = messages[0].content %}" + source, "<|x|>") == [Segment("<|x|>", False)]


def test_joined_strings_keep_their_ranges() -> None:
    joined = concat(["a", whole("bc"), whole("d"), "e", whole("")])
    assert joined == "abcde" and isinstance(joined, UserText) and spans_of(joined) == ((1, 4),)
    assert type(concat(["a", "b"])) is str and spans_of(joined[2:]) == ((0, 2),)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ {'b': 'é'} | tojson(ensure_ascii=True, separators=(',', ':')) }}", '{"b":"\\u00e9"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=True) }}", '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}", "<s>|</s>|False"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "4"),
        ("{% for a in [1, 2, 3] %}{{ loop.index0 }}{{ loop.length }}{{ loop.last }} {% endfor %}", "03False 13False 23True "),
        ("{{ messages[0]['content'] is string }}{{ tools is none }}{{ documents is none }}", "TrueTrueTrue"),
        ("  {% if true %}\nx\n  {% endif %}\n\ny", "x\n\ny"),
        ("{{ enable_thinking is defined and not enable_thinking }}", "True"),
    ],
)  # fmt: skip
def test_templates_get_what_hugging_face_gives_them(source: str, expected: str) -> None:
    assert text(source, enable_thinking=False) == expected


def test_continue_final_message_ends_inside_the_last_message() -> None:
    template = ChatTemplate(CHATML)
    chat = [Message("user", "q"), Message("assistant", "The answer")]
    segments = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert "".join(s.text for s in segments) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nThe answer"
    with pytest.raises(TemplateError, match="continue_final_message"):
        ChatTemplate("nothing").render(chat, continue_final_message=True)


CONTINUED = {  # template of a message -> what a prompt that ends inside "The answer " is
    "<{{ m.content }}>": "<The answer ",
    "<{{ m.content | trim }}>": "<The answer",
    "<{{ m.content.rstrip() }}>": "<The answer",
    "<{{ m.content.strip() }} >": "<The answer ",  # the blank behind it is the template's, as in transformers
    "{% for p in [m.content, '>'] %}{{ p }}{% endfor %}": "The answer ",
}


@pytest.mark.parametrize("source", CONTINUED)
def test_continue_final_message_keeps_a_blank_only_where_the_template_does(source: str) -> None:
    template = ChatTemplate("{% for m in messages %}" + source + "{% endfor %}")
    for content in ("The answer ", [{"type": "text", "text": "The answer "}]):
        found = template.render_text([{"role": "assistant", "content": content}], continue_final_message=True)
        assert found == CONTINUED[source]


def test_continue_final_message_of_a_text_that_the_template_changes_is_refused() -> None:
    with pytest.raises(TemplateError, match="drops text of the last message"):
        ChatTemplate("{{ messages[0].content[3:] }}").render(
            [Message("assistant", "Three")], continue_final_message=True
        )


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
LOOP = "{% for p in m.content %}[{{ p.text }}]{% endfor %}"
# template of a message -> (text of PARTS, of no content)
FORMS = {
    "<{{ m.content }}>": ("<one\ntwo>", "<>"),
    "<{{ '=' + m.content }}>": ("<=one\ntwo>", "<=>"),
    "<{{ m.content | trim }}>": ("<one\ntwo>", "<>"),
    "<{{ m.content | tojson }}>": ('<"one\\ntwo">', "<null>"),
    "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}": ("[one][two]", ""),
    "{% if m.content %}{{ m.content[0].text or m.content }}{% else %}nothing{% endif %}": ("one", "nothing"),
    "{% if m.content is none %}NONE{% else %}{{ m.content }}{% endif %}": ("one\ntwo", "NONE"),
}


@pytest.mark.parametrize("source", FORMS)
def test_content_comes_in_the_form_that_the_template_takes(source: str) -> None:
    template = ChatTemplate("{% for m in messages %}" + source + "{% endfor %}")
    for role in ("user", "assistant", "system", "tool"):
        found = [template.render_text([Message(role, content)]) for content in (PARTS, tuple(PARTS), None)]
        parts, nothing = FORMS[source]
        assert found == [parts, parts, nothing], role
    calls = Message("assistant", None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    assert template.render_text([calls]) == FORMS[source][1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (5, "a int"),
        ({"text": "x"}, "a dict"),
        (["x"], "part 0 of the content is a str"),
        ([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}], "part 1 .* 'image_url'"),
        ([{"type": "text"}], "part 0 of the content has no text"),
        ([{"type": "text", "text": "x", "colour": "red"}], "part 0 of the content has colour"),
    ],
)
def test_content_that_is_no_text_is_refused_by_its_place(content: Any, says: str) -> None:
    with pytest.raises(ParameterError, match=r"messages\[1\]: .*" + says):
        ChatTemplate(CHATML).render([Message("user", "hi"), {"role": "user", "content": content}])


def test_an_object_as_the_answer_of_a_tool_goes_to_the_template() -> None:
    assert ChatTemplate("{{ messages[0].content.t }}").render_text([{"role": "tool", "content": {"t": 3}}]) == "3"


def test_values_nested_too_deep_are_a_named_error() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ParameterError, match="nested deeper"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "x", "extra": deep}])


def test_metadata_gives_template_and_tokens() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}plain",
        "tokenizer.chat_template.tool_use": "{{ eos_token }}{{ tools[0].name }}",
        "tokenizer.chat_template.rag": "rag",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    template = ChatTemplate.from_metadata(metadata)
    assert template.render_text([]) == "<s>plain"
    assert template.render_text([], tools=[{"name": "f"}]) == "</s>f"
    assert ChatTemplate.from_metadata(metadata, name="rag").render_text([]) == "rag"
    assert ChatTemplate.from_metadata(metadata, bos_token="B").render_text([]) == "Bplain"
    assert ChatTemplate.from_metadata(metadata, override="{{ 1 + 1 }}").render_text([]) == "2"
    assert ChatTemplate.from_metadata(metadata, override="chatml").render_text([]) == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda: ChatTemplate.from_metadata({}), "TEMPLATE_ERROR", "--chat-template"),
        (lambda: ChatTemplate.from_metadata({}, override="nonesuch"), "TEMPLATE_ERROR", "chatml"),
        (lambda: render("{{ raise_exception('System role not supported') }}"), "TEMPLATE_ERROR", "System role not supported"),
        (lambda: ChatTemplate("{% for %}"), "TEMPLATE_ERROR", "line 1"),
        (lambda: render("{{ messages[0].content.nothing.more }}"), "TEMPLATE_ERROR", "nothing"),
        (lambda: render("{{ 1 // 0 }}"), "TEMPLATE_ERROR", "ZeroDivisionError"),
        (lambda: render("{{ ''.__class__.mro() }}"), "TEMPLATE_UNSAFE", "__class__"),
    ],
)  # fmt: skip
def test_a_broken_template_is_an_error_never_a_fallback(make: Any, code: str, says: str) -> None:
    with pytest.raises(TemplateError, match=says) as caught:
        make()
    assert caught.value.code == code


def test_what_a_template_says_in_an_error_is_one_short_line() -> None:
    for source in ("{{ raise_exception('a\\n\x1b[2J' * 90000) }}", "{{ messages[0]['b' * 900000].x }}"):
        with pytest.raises(TemplateError) as caught:
            render(source)
        assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


@pytest.mark.parametrize("messages", ["text", [1], {"role": "user"}, [{"role": "user", "content": object()}]])
def test_messages_of_another_type_are_a_named_error(messages: Any) -> None:
    with pytest.raises(ParameterError, match="messages"):
        ChatTemplate(CHATML).render(messages)


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}], "reasoning": "r"}]
    before = repr(messages)
    ChatTemplate("{{ messages }}").render(messages)
    assert repr(messages) == before


def test_reasoning_is_found_under_each_of_its_names() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        template = ChatTemplate("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
        assert template.render_text([{"role": "assistant", "content": "", name: "why"}]) == "whywhy"


GROWING = {
    "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + '<' + m.role + '>' %}"
    "{% set ns.s = ns.s ~ m.content %}{% set ns.s = [ns.s, '|']|join %}{% endfor %}{{ ns.s }}": "a text that grows",
    "{% set ns = namespace(s=[]) %}{% for m in messages %}{% set ns.s = ns.s + [m.role, m.content, '|'] %}{% endfor %}"
    "{{ ns.s|join }}": "a list that grows",
    "{% set ns = namespace(s='') %}{% for t in tools or [] %}{% set ns.s = ns.s + (t|tojson) + '|' %}{% endfor %}"
    "{{ ns.s }}": "tools",
    CHATML: "no value grows",
}


@pytest.mark.parametrize("source", GROWING, ids=GROWING.values())
def test_a_long_chat_with_many_tools_is_within_the_budget(source: str) -> None:
    chat = [Message("user" if i % 2 == 0 else "assistant", "lorem ipsum " * 170) for i in range(1001)]
    fields = {f"p{i}": {"type": "string", "description": "x" * 80} for i in range(12)}
    tools = [{"type": "function", "function": {"name": f"t{i}", "parameters": fields}} for i in range(128)]
    assert ChatTemplate(source).render_text(chat, tools=tools).count("|") >= 128


def test_one_template_serves_many_threads() -> None:
    template = ChatTemplate(CHATML)
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(50):
            results[number] = template.render_text([Message("user", str(number))])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"user\n{number}<|im_end|>" in result for number, result in results.items()) and len(results) == 8
