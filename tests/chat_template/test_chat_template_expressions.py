# ruff: noqa: E501  (a template stays on one line)
"""Every operator, filter, test and method of a template gives what jinja2 gives, in Hugging Face's own environment."""

from __future__ import annotations

from typing import Any

import pytest

from edgellm.chat_template import ChatTemplate
from edgellm.chat_template.calls import METHODS
from edgellm.chat_template.filters import chat_filters
from edgellm.chat_template.operations import chat_tests
from edgellm.chat_template.string_methods import STRING_METHODS
from edgellm.chat_template.template import sandbox
from edgellm.formats.errors import TemplateError

CONTENT = "  Ab <b>c</b> & 'd' %s {} ß\n\ttwo  words\r\nend "
SETUP = "{% set c = messages[0].content %}{% set w = 'a <b> c' %}{% set h = '<i>%s</i> {}'|safe %}{% set n = [3, 1, 2] %}{% set d = {'b': 1, 'a': [2, {'z': c}]} %}{% set words = ['b', 'A', 'c', 'a'] %}"

EXPRESSIONS = [
    # comparisons, chained ones among them
    "1 < 2 < 3", "1 < 3 < 2", "3 > 2 >= 2 != 1", "1 == 1.0", "c == c", "c != w", "'a' < 'b' <= 'b'", "n == [3, 1, 2]",
    "[1, [2]] < [1, [3]]", "d == d", "1 in n", "5 not in n", "'b' in d", "'b>' in c", "c in [c]", "'' in c",
    "('a', 1) in [('a', 1)]", "2 in range(3)", "'a' in d.values()|list", "1 in (n|map('int'))", "nothing == 1", "nothing in n",
    "0 < nothing.x < 1 if false else 7", "2 < 1 < nothing.x.y", "c < 1", "1 in 2",
    # tests
    "3 is odd", "2 is even", "9 is divisibleby(3)", "'a' is odd", "'%d' is odd", "'%d' is even", "c is string", "n is sequence", "n is iterable",
    "d is mapping", "none is none", "nothing is defined", "nothing is undefined", "1 is number", "1.5 is float", "1 is integer",
    "true is boolean", "true is true", "c is lower", "'ABC' is upper", "5 is lower", "h is escaped", "c is escaped", "n is sameas n",
    "c is callable", "1 is eq 1", "1 is ne 2", "1 is lt 2", "3 is ge 3", "1 is in n", "'x' is filter", "'upper' is filter",
    "'odd' is test", "n|select('odd')|list", "n|reject('equalto', 1)|list", "n|select('in', [1, 2])|list", "n is not none",
    # arithmetic
    "1 + 2 * 3 - 4 / 2 // 1 % 3", "2 ** 10", "2 ** -1", "-7 // 2", "-7 % 3", "1.5 * 2", "'ab' * 3", "3 * 'ab'", "c * 2", "'ab' * -1", "n + [4]", "n * 2",
    "2 * n", "(1, 2) + (3,)", "true + 1", "c + w", "w ~ 1 ~ none ~ c ~ n", "n + 1", "c - 1", "1 + '2'", "nothing + 1", "+5", "-(3)", "not c",
    # formats
    "'%s' % c", "'%s-%s' % (c, 1)", "'%5d|%-5s|%05.1f' % (3, 'a', 2.5)", "'%(a)s %(b)d' % {'a': c, 'b': 2}", "'%(a(b)c)s' % {'a(b)c': 1}",
    "'%r' % c", "'%%' % ()", "'%x %o %e' % (255, 8, 1.5)", "'%s' % n", "'%s'|format(c)", "'%(x)s'|format(x=1)", "'{} {}'.format(c, 1)",
    "'{0} {0!r} {1:>5}'.format('a', 2)", "'{a} {b[0]}'.format(a=1, b=n)", "'{:.2f} {:,}'.format(1.239, 12345)", "'%d' % 'a'", "'%s'", "'{{}}'.format()",
    "'%c' % 'x'", "'%s %s' % c", "'%z' % 1", "'%' % 1", "'%(a' % d",
    # string methods
    "c.upper()", "c.lower()", "c.title()", "c.capitalize()", "c.swapcase()", "c.casefold()", "c.strip()", "c.lstrip()", "c.rstrip()", "c.strip(' A')",
    "c.strip().split()", "c.split(' ')", "c.split(' ', 2)", "c.split(None, 1)", "c.split(sep=' ', maxsplit=1)", "c.rsplit(' ', 1)", "c.rsplit()", "c.splitlines()",
    "c.splitlines(true)", "c.partition('<')", "c.rpartition('<')", "c.partition('zz')", "c.replace('b', 'XX')", "c.replace('b', 'X', 1)", "c.replace('', '-')",
    "c.find('b')", "c.rfind('b')", "c.find('b', 6, 99)", "c.index('b')", "c.rindex('b')", "c.count('b')", "c.count('')", "c.startswith('  A')", "c.startswith(('x', ' '))",
    "c.endswith('end ')", "'a'.center(7, '*')", "'a'.ljust(4) + '|'", "'a'.rjust(4)", "'-7'.zfill(5)", "'ab'.join(['1', '2'])", "c.join(['1', '2'])",
    "'abc'.removeprefix('a')", "'abc'.removesuffix('c')", "'12'.isdigit()", "'a1'.isalnum()", "' '.isspace()", "c.isidentifier()", "c.index('zz')", "'a'.join([1])",
    # indices and slices
    "c[2]", "c[-1]", "c[1:4]", "c[::-1]", "c[-3:]", "c[5:1]", "n[1:]", "n[::2]", "n[-1]", "d['a'][0]", "d.a[1].z", "(1, 2)[0:1]", "d.nothing", "n[9]", "c[99]", "range(9)[2:4]",
    # filters
    "c|upper", "c|lower", "c|capitalize", "c|title", "c|trim", "c|trim(' d')", "c|replace('b', 'x')", "c|replace('b', 'x', 1)", "c|length", "c|count", "c|wordcount", "n|sum",
    "n|sort", "n|sort(reverse=true)", "words|sort", "words|sort(case_sensitive=true)", "words|unique|list", "words|min", "words|max", "n|first", "n|last", "c|first", "c|last",
    "c|list|length", "n|reverse|list", "c|reverse", "n|batch(2)|list", "n|batch(2, 0)|list", "n|slice(2)|list", "n|join('-')", "c|list|join('')", "[c, w]|join(' ')", "d|dictsort", "d|items|list",
    "[{'k': 1, 'v': 2}, {'k': 1, 'v': 3}]|groupby('k')|list|length", "[{'k': 1}]|map(attribute='k')|list", "[{'k': 1}]|sum(attribute='k')", "[{'k': c}]|join(',', attribute='k')",
    "words|map('upper')|join", "words|map('replace', 'a', 'b')|list", "[{'k': 1}, {}]|selectattr('k', 'defined')|list", "[{'k': 1}, {}]|rejectattr('k')|list",
    "nothing|default('x')", "''|default('x', true)", "nothing|d", "c|indent", "c|indent(2, true, true)", "c|indent('> ')", "'a'|center(9)", "c|truncate(9)", "c|truncate(9, true, '..')",
    "'3'|int", "'x'|int(7)", "'ff'|int(0, 16)", "'2.5'|float", "2.567|round(1)", "2.1|round(0, 'ceil')", "-3|abs", "5|string", "c|string", "n|string", "c|tojson", "d|tojson", "d|tojson(indent=2)",
    "n|tojson(separators=(',', ':'))", "d|attr('keys')|string|length > 1", "words|map('length')|list", "n|list", "'x'|e",
    # safe text escapes what is added to it
    "h", "h + c", "c + h", "h + h", "h ~ c", "h % c", "h % (c,)", "'%s' % h", "h|string + c", "h.format('<', 1) + '<'", "h|upper + '<'", "h|trim + '<'", "h|replace('i', '<')", "h.replace('i', '<')",
    "h.replace('i', '<') + '<'", "h[1:] + '<'", "h * 2 + '<'", "h|capitalize + '<'", "h|title + '<'", "h.split('>')[0] + '<'", "h.join(['<', '>']) + '<'", "h|join('<')", "[h, '<']|join('<')",
    "h|indent(1, true) + '<'", "h|truncate(5, true, '<', 0) + '<'", "h|center(30) + '<'", "h.center(30, '<')", "h|e + '<'", "c|e", "c|e + c", "c|forceescape", "h|forceescape", "w|safe|tojson + '<'", "h == '<i>%s</i> {}'", "h|length",
    "h.upper().lower().strip() + '&'", "h|reverse + '<'", "h|first + '<'", "h.partition('>')[2] + '<'", "5|safe + '<'", "h in ['<i>%s</i> {}']", "h|list|join + '<'", "('<'|e)|string + '<'", "h|format('<')",
    "{'a': h}", "[h]", "h|default('') + '<'", "(h if c else w) + '<'", "'<' ~ (h + '<')",
]  # fmt: skip

STATEMENTS = [
    "{% for x in c %}{{ loop.length }}{{ x }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "{% for x in n if x > 1 %}{{ loop.length }}{{ loop.last }}{{ x }}{% else %}none{% endfor %}",
    "{% for x in [] %}{% else %}none{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}{{ v }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{% if x is number %}{{ x }}{{ loop.depth }}{% else %}({{ loop(x) }}){% endif %}{% endfor %}",
    "{% for x in n %}{{ loop.cycle('a', 'b') }}{{ loop.changed(x > 1) }}{{ loop.revindex }}{{ loop.first }}{% endfor %}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(*n) }}{{ f(1, **{'b': 3, 'z': 4}) }}{{ f(*'xyz') }}",
    "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}{{ c }}{% endcall %}{{ f is defined }}",
    "{% set x %}<b>{{ h }}</b>{% endset %}{{ x + '<' }}{% filter upper %}{{ h }}<{% endfilter %}",
    "{% macro f() %}<b>{% endmacro %}{{ f() + '<' }}{{ (f()|safe) + '<' }}",
    "{% set ns = namespace(a=1, **{'b': 2}) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% set k = cycler(1, 2) %}{{ k.next() }}{{ k.next() }}{{ k.current }}{% set j = joiner(', ') %}{{ j() }}{{ j() }}",
    "{% block a %}{{ messages[0].content }}{% endblock %}{{ self.a() }}{% with z = 1 %}{{ z }}{% endwith %}{{ z is defined }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ dict(a=1, **{'b': 2}) }}{{ dict([('x', 1)]) }}{{ {'a': 1}.get('b', 3) }}{{ n.index(1) }}{{ n.count(3) }}",
    "{{ range(5, 0, -2)|list }}{{ range(3) }}{{ d.keys() }}{{ d.values() }}{{ (n|map('string')) is iterable }}{{ 1.0.is_integer() }}",
    "{% raw %}{{ c }}{% endraw %}{# c #}{%- if c -%} x {%- endif %}{{ 'a' if c else 'b' }}{{ 1 if none }}",
    "{% generation %}{{ c }}{% endgeneration %}{% for x in n %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
]


def judged(source: str) -> str | None:
    """What Hugging Face's environment prints, or None when it raises."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="its environment judges the text")
    try:
        return utils.render_jinja_template([[{"role": "user", "content": CONTENT}]], chat_template=source)[0][0]
    except Exception:
        return None


def rendered(source: str) -> str | None:
    """What ours prints, or None when it refuses; never for its cost."""
    try:
        return ChatTemplate(source).render_text([{"role": "user", "content": CONTENT}], add_generation_prompt=False)
    except TemplateError as error:
        assert error.code == "TEMPLATE_ERROR", error
        return None


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_gives_what_jinja2_gives(expression: str) -> None:
    source = SETUP + "{{ " + expression + " }}"
    assert rendered(source) == judged(source)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_prints_what_jinja2_prints(statement: str) -> None:
    assert rendered(SETUP + statement) == judged(SETUP + statement)


def uses(name: str) -> Any:
    """Whether an expression or statement above uses a name."""
    return any(name in source for source in (*EXPRESSIONS, *STATEMENTS))


def test_every_row_of_the_tables_has_an_expression() -> None:
    names = [name for name in chat_filters(sandbox()) if not name.startswith("\0")]
    names += [
        *STRING_METHODS,
        *(name for _, name in METHODS),
        *(name for name in chat_tests(sandbox()) if name.isalpha()),
    ]
    rare = {
        "reset",
        "copy",
        "isascii",
        "isdecimal",
        "islower",
        "isnumeric",
        "isprintable",
        "istitle",
        "isupper",
        "isalpha",
        "lessthan",
        "greaterthan",
        "le",
        "gt",
        "false",
        "escape",
    }
    assert [name for name in names if not uses(name) and name not in rare] == []
