"""What the model is sent of a chat: all of it while that fits the context, else what the user has chosen to leave.

Counting the tokens of a long chat takes a while, so all of this runs on the thread of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgellm.context_overflow import Room, fit, summary_prompts
from edgellm.formats.errors import ParameterError
from edgellm.generation import TokenLogprob
from edgellm.sessions import MessageNode, Session
from edgellm.sessions.tree import left_out_of, prompt_messages
from edgellm.tui.answering import THOUGHTS, Answering, Sent, is_remote

UNTOLD = 1 << 20  # tokens of context of a server that does not tell: it will say when that is too many


def compose_answer(
    session: Session, node: MessageNode, prefix: Sequence[TokenLogprob], options: Mapping[str, Any], way: str
) -> Callable[[Answering], Sent]:
    """The messages before ``node``, and what stands of it already. ChatTooLongError when ``way`` is not to drop."""
    path, names = node.path()[:-1], template_names(options)
    messages, left_out = prompt_messages(session.system, path), left_out_of(path)

    def compose(answering: Answering) -> Sent:
        llm = answering.llm
        kept = [] if is_remote(llm) else [token.token for token in prefix]
        watched = _watched(answering)
        if node.text and not kept:
            kept = llm.tokenize(node.text, False, **watched)
        if not llm.n_ctx:  # a server that does not tell says itself what does not fit
            return _going_on(llm, node, messages, kept, 0, names)
        room = Room(llm.n_ctx, options.get("max_tokens") if way in ("ask", "drop_oldest") else 0)

        def count(part: list[Any]) -> int:
            return len(llm.prompt_ids(part, **names, **watched)) + len(kept)

        fitted = fit(messages, count, room, left_out, drop=way == "drop_oldest", n_extra=len(kept))
        return _going_on(llm, node, fitted.messages, kept, fitted.left_out, names)

    return compose


def _going_on(
    llm: Any, node: MessageNode, messages: list[Any], kept: list[int], left_out: int, names: Mapping[str, Any]
) -> Sent:
    """The messages, and behind them what stands of the answer: its tokens, or for a server its text."""
    if not node.text:
        return Sent(messages, left_out)
    if not is_remote(llm):
        prompt = llm.prompt_ids(messages, **names)
        if node.tokens and not node.timings:  # a new branch: only its tokens are sure
            node.text = llm.answer_text(prompt, kept, THOUGHTS)
        return Sent([*prompt, *kept], left_out, {"template_kwargs": None, "begun": len(kept)})
    if not node.parts()[1]:
        raise ParameterError("A server cannot go on in the middle of a thought. Regenerate the answer.")
    options = {"template_kwargs": {**names.get("template_kwargs", {}), "continue_final_message": True}}
    return Sent([*messages, *prompt_messages("", [node])], left_out, options)


def compose_summary(messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Callable[[Answering], Sent]:
    """A summary of all the messages; of a chat longer than the context part by part, the last part as the answer."""
    names = template_names(options)
    names["template_kwargs"] = {"enable_thinking": False, **names.get("template_kwargs", {})}

    def compose(answering: Answering) -> Sent:
        llm = answering.llm
        watched = _watched(answering)

        def count(part: list[Any]) -> int:
            return len(llm.prompt_ids(part, **names, **watched))

        prompts = summary_prompts(messages, count, llm.n_ctx or UNTOLD)
        prompt = next(prompts)
        while True:
            given = {**names, "max_tokens": prompt.max_tokens, "stop": None}
            if prompt.last or answering.cancel.is_set():
                return Sent(prompt.messages, 0, given)
            prompt = prompts.send(MessageNode("assistant", answering.whole(prompt.messages, given)).parts()[1])

    return compose


def _watched(answering: Answering) -> dict[str, Any]:
    """What breaks counting off where that is waiting for a server."""
    return {"cancel": answering.cancel} if is_remote(answering.llm) else {}


def template_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that rendering takes."""
    return {"template_kwargs": options["template_kwargs"]} if options.get("template_kwargs") else {}
