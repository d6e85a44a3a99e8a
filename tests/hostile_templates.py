# ruff: noqa: E501  (a template stays on one line)
"""Templates that want to run for ever, eat all memory or leave the sandbox. Run as a program under a memory limit:
prints one line of JSON per template (name, code of the error, seconds, peak memory in MiB over the start)."""

from __future__ import annotations

HOSTILE: dict[str, str] = {
    "nested_ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested_ranges_loopvar": "{% for i in range(99999) %}{% for j in range(99999) %}{{ loop.index }}{% endfor %}{% endfor %}",
    "big_range": "{{ range(1000000000)|list|length }}",
    "string_mul": "{{ 'a' * 10000000000 }}",
    "string_mul_chain": "{% set a = 'x' * 10000 %}{% set a = a * 10000 %}{% set a = a * 10000 %}{{ a|length }}",
    "list_mul": "{{ ([0] * 1000000000)|length }}",
    "doubling_concat": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "doubling_plus": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling_list": "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling_join": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    "doubling_replace": "{% set ns = namespace(s='xx') %}{% for i in range(64) %}{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
    "doubling_format": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "doubling_format2": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "doubling_setblock": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "laughs_list": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "laughs_dict": "{% set ns = namespace(a={}) %}{% for i in range(60) %}{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a|tojson }}",
    "laughs_compare": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "laughs_dict_call": "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = dict(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a }}",
    "laughs_varargs": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ f(0, 1) }}",
    "laughs_varargs_cmp": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1, varargs, varargs) }}{% else %}{% if varargs == varargs[:] %}{% endif %}{% endif %}{% endmacro %}{{ f(0, 1) }}",
    "laughs_kwargs": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}{% endif %}{% endmacro %}{{ f(0, a=1) }}",
    "laughs_tuple_key": "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}",
    "macro_recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro_fib": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macro_output": "{% macro f() %}{% for i in range(90000) %}{{ 'abcdefgh' * 4000 }}{% endfor %}{% endmacro %}{{ f() }}",
    "macro_output_const": "{% set a = 'a' * 1000000 %}{% macro f() %}{% for i in range(90000) %}{{ a }}{% endfor %}{% endmacro %}{{ f() }}",
    "huge_output": "{% set a = 'a' * 1000000 %}{% for i in range(90000) %}{{ a }}{% endfor %}",
    "huge_output_data": "{% for i in range(99999) %}" + "x" * 900000 + "{% endfor %}",
    "int_doubling": "{% set ns = namespace(s=3) %}{% for i in range(99999) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
    "shift_pow": "{{ 2 ** 100000000 }}",
    "neg_pow": "{{ (-2) ** 100000001 }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "method_center": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "format_width": "{{ '%1000000000d' % 1 }}",
    "format_star": "{{ '%*d' % (1000000000, 1) }}",
    "format_filter": "{{ '%01000000000d'|format(1) }}",
    "format_method": "{{ '{:>1000000000}'.format(1) }}",
    "format_nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_precision": "{{ '%.1000000000f' % 1.0 }}",
    "indent": "{{ ('a\n' * 10000)|indent(100000000) }}",
    "indent_str": "{{ ('a\n' * 10000)|indent('x' * 1000000) }}",
    "tojson_indent": "{{ [1,2,3]|tojson(indent=1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "wordwrap": "{{ ('a ' * 1000)|wordwrap(1, true, 'x' * 100000) }}",
    "striptags": "{{ ('<!--' * 100000)|striptags }}",
    "urlize": "{{ ('http://' * 100000)|urlize }}",
    "sum_lists": "{{ ([[1]] * 90000)|sum(start=[])|length }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "encode": "{{ 'a'.encode() * 10 ** 10 }}",
    "translate": "{{ ('a' * 10000).translate({97: 'b' * 100000}) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "fromkeys": "{{ {}.fromkeys(range(99999)) }}",
    "dunder": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "dunder_attr": "{{ ''|attr('__class__') }}{{ (''|attr('__class__'))() }}",
    "dunder_item": "{{ ''['__class__']['__mro__'] }}",
    "init_globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self_env": "{{ self._TemplateReference__context.environment }}",
    "format_dunder": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "map_dunder": "{{ ['']|map(attribute='__class__')|list }}{{ (['']|map(attribute='__class__')|list)[0].mro() }}",
    "append": "{% set x = [] %}{{ x.append(1) }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "pop": "{{ messages.pop() }}",
    "macro_func": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "caller_frames": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "gen_send": "{{ (messages|map('upper')).send(None) }}",
    "namespace_init": "{{ namespace.__init__.__globals__ }}",
    "namespace_private": "{{ namespace(__class__=1) }}",
    "joiner_globals": "{{ joiner.__init__.__globals__ }}",
    "recursive_loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive_loop_wide": "{% for x in [1] recursive %}{% if loop.depth < 40 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "while_like": "{% for i in range(99999) %}{% for j in range(99999) %}{% if j in range(99999) %}{% endif %}{% endfor %}{% endfor %}",
    "sort_cost": "{% for i in range(99999) %}{% set x = range(99999)|sort %}{% endfor %}",
    "contains_cost": "{% set a = 'a' * 4000000 %}{% set b = 'a' * 2000000 ~ 'b' %}{% for i in range(99999) %}{% if b in a %}{% endif %}{% endfor %}",
    "straightline": "{% set a = 'a' * 2000000 %}" + "{% if a * 2 == a %}{% endif %}" * 20000,
    "many_tokens": "{{ [" + "1," * 400000 + "] }}",
    "many_outputs": "{{ a }}" * 140000,
    "deep_parens": "{{ " + "(" * 200000 + ")" * 200000 + " }}",
    "deep_list": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "deep_not": "{{ " + "not " * 20000 + "1 }}",
    "deep_add": "{{ " + "1 + " * 20000 + "1 }}",
    "deep_if": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "deep_getattr": "{{ a" + ".a" * 20000 + " }}",
    "too_long": " " * (1 << 20) + "x",
    "unicode_blowup": "{{ ('ß' * 4000000)|upper|upper|lower|title }}" * 50,
    "autoescape": "{% autoescape true %}{% set ns = namespace(s='<') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{% endautoescape %}",
    "split_memory": "{% set ns = namespace(a=[]) %}{% for i in range(999) %}{% set ns.a = ns.a + [('a ' * 500000).split()] %}{% endfor %}",
    "list_chars": "{% for i in range(999) %}{% set x = ('a' * 1000000)|list %}{% endfor %}",
    "loop_length": "{% for i in range(99999) %}{% for j in range(99999) %}{% if loop.length %}{% endif %}{% endfor %}{% endfor %}",
    "call_block": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18
    + "x" * 1000
    + "{% endcall %}" * 18,
    "strftime": "{{ strftime_now('%c' * 10000000) }}",
    "many_filters": "{{ 'a'" + "|upper" * 20000 + " }}",
    "cycler": "{% set c = cycler('a' * 1000000, 'b') %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
    "pprint": "{{ messages|pprint }}",
    "slice_hoard": "{% set a = [1] * 90000 %}{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, a[:]] %}{% endfor %}",
    "percent_is_odd": "{{ '%2000000000d' is odd }}",
    "percent_is_even": "{{ '%2000000000d' is even }}",
    "percent_is_divisible": "{{ ['%2000000000d']|select('divisibleby', 2)|list }}",
    "percent_nested_key": "{{ '%(a(b)c)2000000000d' % {'a(b)c': 1} }}",
    "percent_many": "{{ ('%(a)999d' * 300000) % {'a': 1} }}",
    "format_many": "{{ ('{0:999}' * 300000).format(1) }}",
    "rfind": "{{ ('a' * 600000).rfind('b' + 'a' * 300000) }}",
    "rindex": "{{ ('a' * 600000).rindex('a' * 150000 + 'b' + 'a' * 150000) }}",
    "rsplit": "{{ ('a' * 600000).rsplit('a' * 150000 + 'b' + 'a' * 150000) }}",
    "rpartition": "{{ ('a' * 600000).rpartition('a' * 150000 + 'b' + 'a' * 150000) }}",
    "strip_long_set": "{{ ('é' * 1000000).strip('bcdefghijk' * 100000 + 'é') }}",
    "trim_long_set": "{{ ('é' * 1000000)|trim('bcdefghijk' * 100000 + 'é') }}",
    "sort_long_texts": "{% set h = 'a' * 9999 %}{% set ns = namespace(x=[]) %}{% for i in range(900) %}{% set ns.x = ns.x + [h ~ i] %}{% endfor %}{% for i in range(99999) %}{% set y = ns.x|sort %}{% endfor %}",
    "list_of_wide_chars": "{{ ('é' * 4000000)|list|length }}",
    "list_of_a_users_chars": "{{ (messages[0].content * 2000000)|list|length }}",
    "spread_of_a_users_chars": "{% macro f() %}{{ varargs|length }}{% endmacro %}{{ f(*(messages[0].content * 2000000)) }}",
    "ranges": "{% set ns = namespace(s='') %}{% for i in range(20) %}{% set ns.s = ns.s ~ 'x' ~ messages[0].content ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "ranges_split": "{% set ns = namespace(s='') %}{% for i in range(16) %}{% set ns.s = ns.s ~ 'x' ~ messages[0].content ~ ns.s %}{% endfor %}{% for i in range(9999) %}{% set y = ns.s.split('x') %}{% endfor %}",
    "wordcount": "{% for i in range(99) %}{{ ('a ' * 6000000)|wordcount }}{% endfor %}",
    "split_words": "{{ ('a ' * 6000000).split()|length }}",
    "same_hashes": "{% set ns = namespace(x=[]) %}{% for i in range(30000) %}{% set ns.x = ns.x + [(i * 2305843009213693951, 1)] %}{% endfor %}{{ dict(ns.x)|length }}",
    "private_filter": "{{ ['a']|map('\\x00concat')|list }}{{ ['a']|map('\\x00each')|list }}",
    "import": "{% import 'a' as b %}",
    "from": "{% from 'a' import b %}",
    "include": "{% include 'a' ignore missing %}",
    "extends": "{% extends 'a' %}",
    "hex_literal": "{{ 0x" + "f" * 400000 + " }}",
    "long_base": "{{ ('f' * 400000)|int(0, 16) }}",
    "hoard_of_texts": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + ['a' * 9000 ~ i] %}{% endfor %}",
    "cycler_of_chars": "{% set c = cycler(*('é' * 3000000)) %}{{ c.next() }}",
    "hashes": "{% set a = range(99999)|list %}{% for i in range(99999) %}{% if 'a' in a %}{% endif %}{% endfor %}",
    "safe": "{% set ns = namespace(s='<'|safe) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "escape": "{% set ns = namespace(s='&') %}{% for i in range(64) %}{% set ns.s = ns.s|forceescape %}{% set ns.s = ns.s * 2 %}{% endfor %}",
    "path_of_commas": "{{ ([{}] * 1000)|sort(attribute=',' * 100000)|length }}",
    "path_of_dots": "{{ ([{}] * 1000)|map(attribute='a.' * 200000, default={})|list|length }}",
    "filters_of_filters": "{% set ns = namespace(x=['a']) %}{% for i in range(99999) %}{% set ns.x = ns.x|map('upper') %}{% endfor %}",
    "elifs": "{% if a %}" + "{% elif b %}" * 5000 + "{% endif %}",
    "deep_and": "{{ " + "a and " * 5000 + "b }}",
}


def main() -> None:
    """Render each template once, in this process, and say what came of it."""
    import json
    import resource
    import time

    from edgellm.chat_template import ChatTemplate, Message
    from edgellm.formats.errors import TemplateError

    ChatTemplate("{{ 1 }}").render([])
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, source in HOSTILE.items():
        begun, code = time.process_time(), "NONE"
        try:
            ChatTemplate(source).render([Message("user", "hi")])
        except TemplateError as error:
            code = error.code
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024
        row = {"name": name, "code": code, "seconds": time.process_time() - begun, "peak_mib": peak}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
