"""Forms of models whose templates do not show them: they leave calls out, or show a form that a derivation misses.

A row counts where all its marks stand in the template's source. Written from the published formats of the families.
"""

from __future__ import annotations

from typing import NamedTuple

from edgellm.messages.shapes import PYTHON, CallForm, Channels, Dialect, Field, Header, Middle, Pair, Shape

HARMONY = Channels(
    start="<|start|>assistant",
    heads=("<|channel|>", "to="),
    open="<|message|>",
    ends=("<|end|>", "<|return|>", "<|call|>"),
    headers=(
        Header(r"to=functions\.(?P<name>[^\s<]+)", "call"),
        Header(r"^\s*<\|channel\|>\s*analysis", "reasoning"),
    ),
    call=Pair("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>"),
    thinks="<|channel|>analysis<|message|>",
    says="<|channel|>final<|message|>",
    begins="to=functions.",
)
FUNCTIONARY = Channels(
    start=">>>",
    heads=("",),
    open="\n",
    ends=(">>>",),
    headers=(Header(r"^all$", "content"), Header(r"^(?P<name>\S+)$", "call")),
    call=Pair("", "\n"),
    says="all\n",
)
MUSE = Channels(
    start="<|start|>assistant",
    heads=("to=",),
    open="<|message|>",
    ends=("<|eom|>", "<|eot|>"),
    headers=(Header(r"^to=self$", "reasoning"),),
    call=Pair("", ""),
)
GEMMA_DIALECT = Dialect(quotes=('<|"|>',), escapes=False, bare_keys=True, constants=PYTHON.constants)
THINK = Pair("<think>\n", "\n</think>\n\n")


def dsml(section: str) -> CallForm:
    """DeepSeek V3.2 and later: tags with a mark of their own, and the type of a value in its tag."""
    mark = "\uff5cDSML\uff5c"
    return CallForm(
        "tagged",
        section=Pair(f"<{mark}{section}>\n", f"\n</{mark}{section}>"),
        each=Pair(f'<{mark}invoke name="', f"\n</{mark}invoke>"),
        between="\n",
        head=(Field("name", '">\n'),),
        argument=Pair(f'<{mark}parameter name="', f"</{mark}parameter>"),
        middles=(
            Middle('" string="true">', ("string",)),
            Middle('" string="false">', ("integer", "number", "boolean", "null", "object", "array")),
        ),
    )


class BuiltIn(NamedTuple):
    """A form, and the texts by which a template is known to be of it."""

    marks: tuple[str, ...]
    shape: Shape


def _calls(calls: CallForm, reasoning: Pair | None = None) -> Shape:
    return Shape(reasoning=reasoning, calls=calls, source="built-in")


KIMI_K3 = CallForm(
    "tagged",
    section=Pair("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    each=Pair('<|open|>call tool="', "<|close|>call<|sep|>"),
    head=(Field("name", '" index="'), Field("", '"<|sep|>')),
    argument=Pair('<|open|>argument key="', "<|close|>argument<|sep|>"),
    middles=tuple(
        Middle(f'" type="{kind}"<|sep|>', ("integer", "number") if kind == "number" else (kind,))
        for kind in ("string", "number", "boolean", "null", "object", "array")
    ),
)
APRIEL = CallForm("json", section=Pair("<tool_calls>", "</tool_calls>"), keys=("name", "arguments", "id"), listed=True)
LFM2 = CallForm("python", section=Pair("<|tool_call_start|>", "<|tool_call_end|>"), listed=True, dialect=PYTHON)

# before anything is derived: the template shows only part of what the model writes
CERTAIN = (
    BuiltIn(("<|channel|>analysis", "<|message|>"), Shape(channels=HARMONY, source="built-in")),
    BuiltIn(
        ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
        _calls(
            CallForm(
                "header",
                section=Pair("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
                each=Pair("<|tool_call_begin|>functions.", "<|tool_call_end|>"),
                head=(Field("name", ":"), Field("", "<|tool_call_argument_begin|>")),
                id_of="functions.{name}:{index}",
            ),
            Pair("<think>", "</think>"),
        ),
    ),
    BuiltIn(
        ("<|python_start|>", "<|python_end|>"),
        Shape(
            content=Pair("<|python_start|>", "<|python_end|>"),
            calls=CallForm("python", listed=True, dialect=PYTHON),
            source="built-in",
        ),
    ),
    BuiltIn(
        ("<|open|>", "<|sep|>", "<|close|>"),
        Shape(
            reasoning=Pair("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
            content=Pair("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
            calls=KIMI_K3,
            source="built-in",
        ),
    ),
    BuiltIn(
        ("[BEGIN FINAL RESPONSE]", "<tool_calls>"),
        Shape(
            reasoning=Pair("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
            content=Pair("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
            calls=APRIEL,
            source="built-in",
        ),
    ),
    BuiltIn(("to=self<|message|>", "<|eom|>"), Shape(channels=MUSE, source="built-in")),
    BuiltIn((">>>all\n", "<|start_header_id|>"), Shape(channels=FUNCTIONARY, source="built-in")),
)

# when nothing was derived
OTHERS = (
    BuiltIn(
        ("<|tool_call>call:",),
        _calls(
            CallForm(
                "header",
                each=Pair("<|tool_call>call:", "<tool_call|>"),
                head=(Field("name", ""),),
                dialect=GEMMA_DIALECT,
            ),
            Pair("<|channel>thought\n", "\n<channel|>"),
        ),
    ),
    BuiltIn(("\uff5cDSML\uff5cfunction_calls",), _calls(dsml("function_calls"), Pair("<think>", "</think>"))),
    BuiltIn(("\uff5cDSML\uff5ctool_calls",), _calls(dsml("tool_calls"), Pair("<think>", "</think>"))),
    BuiltIn(("<|tool_list_start|>",), _calls(LFM2)),
    BuiltIn(("List of tools: [", "<|im_start|>"), _calls(LFM2)),
    BuiltIn(
        ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[ARGS]"),
        _calls(CallForm("header", each=Pair("[TOOL_CALLS]", ""), head=(Field("name", "[ARGS]"),))),
    ),
    BuiltIn(
        ("[AVAILABLE_TOOLS]",),
        _calls(CallForm("json", section=Pair("[TOOL_CALLS]", ""), keys=("name", "arguments", "id"), listed=True)),
    ),
    BuiltIn(
        ("<|tool_call|>", "<|/tool_call|>"), _calls(CallForm("json", each=Pair("<|tool_call|>", "<|/tool_call|>")))
    ),
    BuiltIn(("<|tool_call|>",), _calls(CallForm("json", section=Pair("<|tool_call|>", ""), listed=True))),
    BuiltIn(("<tool_call>",), _calls(CallForm("json", each=Pair("<tool_call>\n", "\n</tool_call>"), between="\n"))),
    BuiltIn(("<TOOLCALL>",), _calls(CallForm("json", section=Pair("<TOOLCALL>", "</TOOLCALL>"), listed=True))),
)

# reasoning of templates that leave it out of what was said before
REASONING = (
    THINK,
    Pair("<|START_THINKING|>", "<|END_THINKING|>"),
    Pair("[THINK]", "[/THINK]"),
    Pair("<seed:think>", "</seed:think>"),
    Pair("<|channel>thought\n", "\n<channel|>"),
)


def built_in(source: str, rows: tuple[BuiltIn, ...]) -> Shape | None:
    """The form of the first row whose marks stand in a template's source."""
    source = source.replace("\\n", "\n")
    return next((row.shape for row in rows if all(mark in source for mark in row.marks)), None)


def reasoning_in(source: str) -> Pair | None:
    """The markers of reasoning that a template's source speaks of."""
    return next((pair for pair in REASONING if pair.close.strip() in source), None)
