"""A chat that has become longer than the context: what does not fit, and the two ways on.

The oldest turns may be left out of the prompt, or the model sums the chat up and the summary begins a new one. Neither
happens by itself: ``fit`` raises with the figures unless it was told to leave turns out, and says how much it left out.
Knows no model: ``count`` gives the tokens of messages as the model would be sent them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgellm.formats.errors import ContextFullError

Messages = list[Any]
Count = Callable[[Messages], int]

ANSWER_TOKENS = 256  # kept free for an answer without a limit of its own
ANSWER_SHARE = 4  # an answer keeps at most one part in so many of the context free
REFILL_SHARE = 2  # what is kept fills one part in so many: to drop a little each time would read all of it each time
MESSAGE_TOKENS = 64  # around a message, for sure; text has no more tokens than bytes
TEMPLATE_TOKENS = 1024  # around the whole
SUMMARY_TOKENS = 512  # of a summary at most
SUMMARY_REQUEST = (
    "Sum up our conversation so far, so that we can go on from your summary alone. Keep names, numbers, decisions, "
    "what I asked for and what is still open. Write the summary and nothing else."
)
GAP = "\n[…]\n"  # in a message that no context holds


class ChatTooLongError(ContextFullError):
    """A chat does not fit the context with room for an answer; the message has all figures.

    n_prompt   tokens of the chat with the new message       n_ctx      of the context
    n_turns    oldest turns to leave out so that it fits, 0 where that would not help
    n_kept     tokens that are left then
    """

    def __init__(self, n_prompt: int, n_ctx: int, n_turns: int, n_kept: int) -> None:
        self.n_prompt, self.n_turns, self.n_kept = n_prompt, n_turns, n_kept
        if n_ctx > n_prompt:
            found = f"leaves {n_ctx - n_prompt:,} for the answer"
        else:
            found = f"is {n_prompt - n_ctx:,} too few" if n_prompt > n_ctx else "leaves none for the answer"
        advice = "Load the model with a larger context, or begin a new chat."
        if n_turns:
            advice = f"Without the oldest {turns(n_turns)} it has {n_kept:,} tokens. {advice}"
        super().__init__(
            f"The chat with this message has {n_prompt:,} tokens; the context of {n_ctx:,} {found}. {advice}",
            n_tokens=n_prompt,
            n_ctx=n_ctx,
        )

    @property
    def n_free(self) -> int:
        """Tokens of the context that are left for an answer to the whole chat; negative where it does not fit."""
        return self.n_ctx - self.n_prompt


class Fitted(NamedTuple):
    """Messages that fit. ``left_out`` counts those after the system messages that are not among them."""

    messages: Messages
    left_out: int


@dataclass(frozen=True)
class Room:
    """What there is: the context, and how much of it an answer may need (None or -1: no limit)."""

    n_ctx: int
    max_tokens: int | None = None

    @property
    def prompt(self) -> int:
        """Tokens for the prompt."""
        wanted = ANSWER_TOKENS if self.max_tokens in (None, -1) else self.max_tokens
        return self.n_ctx - min(wanted or 0, self.n_ctx // ANSWER_SHARE)

    def surely_holds(self, messages: Messages, n_extra: int = 0) -> bool:
        """Whether the messages fit whatever their tokens are, which is known without counting them."""
        nbytes = sum(len(text.encode("utf-8", "replace")) for message in messages for text in texts(message))
        return nbytes + MESSAGE_TOKENS * len(messages) + TEMPLATE_TOKENS + n_extra <= self.prompt


def fit(
    messages: Messages, count: Count, room: Room, left_out: int = 0, *, drop: bool = False, n_extra: int = 0
) -> Fitted:
    """The messages that the model is sent: all of them, or those that ``left_out`` before leaves when all do not fit.

    With ``drop`` the oldest turns are left out until the rest is well below the context. The system messages and the
    last turn always stay. ``n_extra`` tokens are sent behind them. ChatTooLongError when it does not fit.
    """
    head = n_system(messages)
    rest = messages[head:]
    cuts = [i for i, message in enumerate(rest) if role_of(message) == "user" and i]
    if left_out not in cuts:
        left_out = 0

    def kept(n: int) -> Messages:
        return [*messages[:head], *rest[n:]]

    if not left_out and room.surely_holds(messages, n_extra):
        return Fitted(messages, 0)
    n_all = count(messages)
    if n_all <= (room.prompt if not left_out else room.prompt // REFILL_SHARE):  # a larger context takes all back
        return Fitted(messages, 0)
    n_now = count(kept(left_out)) if left_out else n_all
    if n_now <= room.prompt:
        return Fitted(kept(left_out), left_out)
    cut, n_kept = _cut([n for n in cuts if n > left_out], lambda n: count(kept(n)), room)
    if drop and cut:
        return Fitted(kept(cut), cut)
    n_turns = sum(1 for message in rest[left_out:cut] if role_of(message) == "user")
    raise ChatTooLongError(n_now, room.n_ctx, n_turns, n_kept)


def _cut(cuts: Sequence[int], n_after: Callable[[int], int], room: Room) -> tuple[int, int]:
    """(where to cut, tokens left): well below the context, else just so that it fits, else (0, 0)."""
    for most in (room.prompt // REFILL_SHARE, room.prompt):
        at = bisect_left(cuts, True, key=lambda cut: n_after(cut) <= most)
        if at < len(cuts):
            return cuts[at], n_after(cuts[at])
    return 0, 0


class SummaryPrompt(NamedTuple):
    """Messages to answer with at most ``max_tokens``; the answer to the ``last`` one is the summary."""

    messages: Messages
    max_tokens: int
    last: bool


def summary_prompts(messages: Messages, count: Count, n_ctx: int) -> Generator[SummaryPrompt, str, None]:
    """The prompts that lead to a summary of all messages; each answer is given back by ``send``.

    A chat that is longer than the context is read in parts, each with the summary of what came before it.
    """
    max_tokens = max(min(SUMMARY_TOKENS, n_ctx // ANSWER_SHARE), 1)
    request = {"role": "user", "content": SUMMARY_REQUEST}
    n_head = n_system(messages)
    head, rest = list(messages[:n_head]), list(messages[n_head:])
    before: Messages = []
    most = n_ctx - max_tokens

    def prompt(part: Messages) -> Messages:
        return [*head, *before, *_alternating([*part, request])]

    while True:
        n = bisect_right(range(1, len(rest) + 1), most, key=lambda n: count(prompt(rest[:n])))
        if not n and rest:
            rest[0] = _shortened(rest[0], lambda message: count(prompt([message])), most)
            n = 1
        answer = yield SummaryPrompt(prompt(rest[:n]), max_tokens, n >= len(rest))
        before = [request, {"role": "assistant", "content": answer}]
        rest = rest[n:]
        if not rest:
            return


def _shortened(message: Any, n_with: Callable[[Any], int], most: int) -> Any:
    """A message that no context holds, with its middle left out."""
    text = "".join(said(message))
    length = len(text)
    while True:
        length //= 2
        half = length // 2
        shorter = {"role": role_of(message), "content": text[:half] + GAP + text[len(text) - half :]}
        if n_with(shorter) <= most or not length:
            return shorter


def _alternating(messages: Messages) -> Messages:
    """Roles that take turns, as many templates ask: a part may begin or end in the middle of a turn."""
    joined: Messages = []
    for message in messages:
        role, text = role_of(message), "".join(said(message))
        if joined and joined[-1]["role"] == role:
            joined[-1] = {"role": role, "content": f"{joined[-1]['content']}\n\n{text}"}
        else:
            joined.append({"role": role, "content": text})
    if joined[0]["role"] != "user":
        joined.insert(0, {"role": "user", "content": GAP.strip()})
    return joined


def n_system(messages: Messages) -> int:
    """Messages at the beginning that are the system's and always stay."""
    return next((i for i, message in enumerate(messages) if role_of(message) != "system"), len(messages))


def role_of(message: Any) -> str:
    """Whose message it is, a Message or a mapping."""
    return str(message["role"] if isinstance(message, Mapping) else message.role)


def said(message: Any) -> list[str]:
    """The text of a message, without what was thought."""
    content = message["content"] if isinstance(message, Mapping) else message.content
    parts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    return [str(part) for part in parts if part]


def texts(message: Any) -> list[str]:
    """All text of a message that a template may show."""
    fields = message if isinstance(message, Mapping) else message.to_dict()
    return said(message) + [str(value) for name, value in fields.items() if name not in ("role", "content") and value]


def turns(n: int) -> str:
    """``turn`` or ``6 turns``."""
    return "turn" if n == 1 else f"{n} turns"
