"""What a caller asks of an answer beside its messages: tools, which of them, and how much reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgellm import arguments
from edgellm.chat_template import Segment
from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.messages.call_masks import begun_calls, forced_calls
from edgellm.messages.form import MessageForm
from edgellm.messages.reasoning_mask import ReasoningMask
from edgellm.messages.tools import as_tools

if TYPE_CHECKING:
    from edgellm.sampling.mask import TokenMask
    from edgellm.structured.answer_form import MaskSource, Parse, ResponseFormat
    from edgellm.tokenizer import Tokenizer

ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]
Reasoning = bool | int | str | None

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_BUDGET = 1 << 24  # tokens


@dataclass(frozen=True)
class Asking:
    """Checked.

    tools             descriptions that the template gets and the reader looks for; None where no call is wanted
    names             tools one of which must be called; () where none must
    named             there is but one, by name: then it is called once
    parallel          whether several calls may stand in an answer
    template_kwargs   those of the caller and the template's switches of the reasoning
    thinks            whether there is to be reasoning; None as the template has it
    budget            tokens that it may have, None without limit
    """

    tools: list[dict[str, Any]] | None
    names: tuple[str, ...]
    named: bool
    parallel: bool
    template_kwargs: dict[str, Any]
    thinks: bool | None
    budget: int | None

    @classmethod
    def of(
        cls,
        form: MessageForm,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        reasoning: Reasoning = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Asking:
        """ParameterError for what cannot be asked, UnsupportedError where the form shows no tools or has no calls."""
        described = as_tools(tools) or None
        names = chosen(tool_choice, described)
        if tool_choice == "none":
            described = None
        if described and not (form.takes_tools and form.has_calls):
            what = "shows tools to the model" if not form.takes_tools else "says how the model calls tools"
            raise UnsupportedError(
                f"Nothing in this model's chat template {what}. Use a model that was trained to call tools, or give "
                "another template with chat_template=.",
                code="TOOLS",
            )
        thinks, budget, switches = switched(reasoning)
        given = {} if template_kwargs is None else arguments.mapping("template_kwargs", template_kwargs)
        parallel = arguments.flag("parallel_tool_calls", parallel_tool_calls)
        return cls(described, names, isinstance(tool_choice, Mapping), parallel, {**switches, **given}, thinks, budget)

    def opened(self, form: MessageForm, segments: list[Segment]) -> list[Segment]:
        """The prompt; where there is to be no reasoning and the template begins one all the same, it is ended."""
        end = "".join(segment.text for segment in segments[-2:])
        if self.thinks is False and form.reasoning is not None and form.opened_by(end):
            return [*segments, Segment(form.reasoning.close, True)]
        return segments

    def mask(
        self,
        tokenizer: Tokenizer,
        form: MessageForm,
        prompt: str,
        response_format: ResponseFormat = None,
        regex: str | None = None,
        grammar: str | MaskSource | None = None,
    ) -> tuple[TokenMask | None, Parse | None]:
        """What may be written behind ``prompt``, and what makes an object of it.

        A call that is asked for, or a form, begins behind the reasoning. A call that the model begins by itself goes on
        as one.
        """
        wants_form = response_format is not None or regex is not None or grammar is not None
        if self.names and wants_form:
            raise ParameterError("A call is asked for, and a form of the answer as well. Ask for one of them.")
        if self.tools and (regex is not None or grammar is not None):
            name = "regex" if grammar is None else "grammar"
            raise ParameterError(f"{name} is given, and tools, whose calls it would forbid. Give one of them.")
        inner: TokenMask | None = None
        parse: Parse | None = None
        if self.names:
            wanted = [tool for tool in self.tools or () if tool["function"]["name"] in self.names]
            several = self.parallel and not self.named
            inner = forced_calls(tokenizer, form, wanted, parallel=several).constraint()
        elif wants_form:
            from edgellm.structured.answer_form import answer_form, schema_of

            says = (form.channels.says if form.channels is not None else "") or None
            if (found := answer_form(tokenizer, response_format, regex, grammar, says)) is not None:
                source, parse = found
                if self.tools:
                    schema = schema_of(response_format)[0]
                    source = forced_calls(tokenizer, form, self.tools, parallel=self.parallel, answer=schema)
                inner = source.constraint()
        if inner is None:
            begun = begun_calls(tokenizer, form, self.tools, parallel=self.parallel) if self.tools else None
            inner = begun.constraint() if begun is not None else None
            if self.budget is None and (inner is None or form.call_begins):  # a call may begin within the reasoning
                return inner, parse
        if form.reasoning is None or (not form.opened_by(prompt) and not self._may_think(form, prompt)):
            return inner, parse
        opened = form.opened_by(prompt)
        return ReasoningMask(tokenizer, form.reasoning, inner, opened=opened, budget=self.budget), parse

    def _may_think(self, form: MessageForm, prompt: str) -> bool:
        """Whether the model may open reasoning by itself: it is not switched off, and the prompt has not ended one."""
        assert form.reasoning is not None, "asked for models that reason"
        return self.thinks is not False and not prompt.rstrip().endswith(form.reasoning.close.strip())


def chosen(tool_choice: ToolChoice, tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
    """The names of which one must be called."""
    expected = '"auto", "none", "required" or {"name": ...}'
    known = tuple(tool["function"]["name"] for tool in tools or ())
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function", tool_choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise arguments.wrong("tool_choice", tool_choice, expected)
        if name not in known:
            raise ParameterError(f"tool_choice names {name!r}. The tools are: {', '.join(known) or 'none'}.")
        return (name,)
    if tool_choice not in ("auto", "none", "required"):
        raise arguments.wrong("tool_choice", tool_choice, expected)
    if tool_choice == "required" and not known:
        raise ParameterError('tool_choice is "required" and there are no tools. Give some.')
    return known if tool_choice == "required" else ()


def switched(reasoning: Reasoning) -> tuple[bool | None, int | None, dict[str, Any]]:
    """Whether there is reasoning, its tokens at most, and the names by which templates know of it."""
    if reasoning is None:
        return None, None, {}
    if isinstance(reasoning, bool):
        return reasoning, None, {"enable_thinking": reasoning, "thinking": reasoning}
    if isinstance(reasoning, str):
        if reasoning not in EFFORTS:
            raise arguments.wrong("reasoning", reasoning, f"True, False, tokens, or one of {', '.join(EFFORTS)}")
        thinks = reasoning != "none"
        effort = {"reasoning_effort": reasoning} if thinks else {}
        return thinks, None, {"enable_thinking": thinks, "thinking": thinks, **effort}
    budget = arguments.whole_number("reasoning", reasoning, 0, MAX_BUDGET)
    return bool(budget), budget or None, {"enable_thinking": bool(budget), "thinking": bool(budget)}
