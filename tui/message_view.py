"""One message as lines of the transcript: what was thought (folded), what was said, and a line about how it came."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from rich.text import Text

from edgellm.sessions import MessageNode
from edgellm.tui.markdown import CodeBlock, MarkdownDocument
from edgellm.tui.narrow import folded, whole_parts
from edgellm.tui.palette import Palette
from edgellm.tui.safe_text import safe_text, short_name

FOLDED_LINES = 12  # of a long message of the user
THINKING_LINES = 4  # shown while the thinking goes on

_REASONS = {
    "length": "cut off at the limit",
    "context_full": "cut off: the context is full",
    "cancelled": "stopped",
    None: "unfinished",
}
OUT_OF_CONTEXT = "left out of the context"


@dataclass
class Place:
    """Where a message stands among its siblings, and what is going on with it."""

    number: int = 1
    of: int = 1
    growing: bool = False
    first_code: int = 1
    left_out: bool = False  # the model is not told it any more


class MessageView:
    """The lines of one message. ``update`` draws it again as far as it changed, and says from which line on."""

    def __init__(self, node: MessageNode, palette: Palette, width: int) -> None:
        self.node = node
        self.palette = palette
        self.width = width
        self.unfolded: bool | None = None  # None: as it suits the message
        self.lines: list[Text] = []
        self.codes: list[CodeBlock] = []
        self.fold_line = -1  # the line that folds when it is clicked
        self._document: MarkdownDocument | None = None
        self._head_key: object = None

    def update(self, place: Place) -> int:
        """Draw the message; the number of the first line that changed."""
        if self.node.role != "user":
            return self._answer(place)
        self.lines = self._asked(place)
        return 0

    def _asked(self, place: Place) -> list[Text]:
        """The user's words as they are, on a ground of their own."""
        style, inner = self.palette.user, max(self.width - 2, 8)
        lines = []
        for part in safe_text(self.node.text).rstrip().split("\n"):
            text = Text(part, end="")
            lines += [text] if text.cell_len <= inner else folded(text, inner)
        n_more = len(lines) - FOLDED_LINES
        self.fold_line = -1
        if n_more > 3:
            self.fold_line = FOLDED_LINES if not self.unfolded else len(lines)
            word = f"… {n_more} more lines" if not self.unfolded else "… fold"
            lines = [*(lines if self.unfolded else lines[:FOLDED_LINES]), Text(word, self.palette.muted)]
        if place.of > 1:
            lines.append(Text(_branches(place), self.palette.accent))
        if place.left_out:
            lines.append(Text(OUT_OF_CONTEXT, self.palette.warning))
        drawn = []
        for number, line in enumerate(lines):
            row = Text(end="")
            row.append("❯ " if number == 0 else "  ", self.palette.mark)
            line.rstrip()
            row.append_text(line)
            row.append(" " * max(self.width - row.cell_len, 0))
            row.stylize_before(style)
            drawn.append(row)
        return [*drawn, Text("")]

    def _answer(self, place: Place) -> int:
        thought, said = self.node.parts()
        head = self._thinking(thought, bool(said), place) if thought else []
        key = [line.plain for line in head]
        if self._document is None or self._document.first_code != place.first_code:
            self._document, self._head_key = MarkdownDocument(self.palette, self.width, place.first_code), None
        document = self._document
        document.update(said)
        changed = len(head) + document.changed_from if key == self._head_key else 0
        self._head_key = key
        self.codes = [CodeBlock(c.code, c.language, c.line + len(head)) for c in document.codes]
        body = document.lines[:-1] if document.lines else []
        drawn = self.lines[changed:]
        del self.lines[changed:]
        self.lines += [*head, *body][changed:]
        if not self.lines and place.growing:
            self.lines.append(Text("…", self.palette.muted))
        foot = self._foot(place)
        if foot is not None:
            self.lines += [Text(""), foot] if body or head else [foot]
        self.lines.append(Text(""))
        same = takewhile(lambda pair: _alike(*pair), zip(drawn, self.lines[changed:], strict=False))
        return changed + sum(1 for _ in same)

    def _thinking(self, thought: str, over: bool, place: Place) -> list[Text]:
        """The fold, and under it all of it, its last lines, or nothing."""
        going_on = place.growing and not over
        lines: list[Text] = []
        for part in safe_text(thought).split("\n"):
            lines += folded(Text(part), max(self.width - 2, 8))
        is_open = self.unfolded if self.unfolded is not None else going_on
        shown = lines if self.unfolded else lines[-THINKING_LINES:]
        self.fold_line = 0
        n_words = len(thought.split())
        title = f"{'▾' if is_open else '▸'} {'thinking' if going_on else 'thought'} · {n_words} words"
        drawn = [Text(title, self.palette.muted)]
        if is_open:
            for line in shown:
                drawn.append(Text("┊ ", self.palette.faint).append(line.plain, self.palette.muted))
        return [*drawn, Text("")] if over or not going_on else drawn

    def _foot(self, place: Place) -> Text | None:
        """Who answered, how fast, how it ended; nothing while it grows."""
        if place.growing:
            return None
        node, facts = self.node, []
        tps = node.timings.get("generation_tps", 0)
        if node.model:
            facts.append(short_name(node.model))
        if node.tokens or node.timings.get("generation_n"):
            facts.append(f"{int(node.timings.get('generation_n', len(node.tokens)))} tokens")
        if tps:
            facts.append(f"{tps:.0f} t/s")
        behind = []  # these matter more
        if node.role == "assistant" and node.finish_reason != "stop":
            behind.append(Text(_REASONS.get(node.finish_reason, "unfinished"), self.palette.warning))
        if place.left_out:
            behind.append(Text(OUT_OF_CONTEXT, self.palette.warning))
        if place.of > 1:
            behind.append(Text(_branches(place), self.palette.accent))
        room = self.width - sum(part.cell_len + 3 for part in behind)
        text = Text(" · ".join(part.plain for part in whole_parts([Text(fact) for fact in facts], room)), end="")
        text.stylize(self.palette.faint)
        for part in whole_parts(behind, self.width):
            between = "" if not text.plain else "   " if part.plain.startswith("‹") else " · "
            text.append(between).append_text(part)
        return text if text.plain else None


def _alike(one: Text, other: Text) -> bool:
    return one == other and one.style == other.style  # rich compares words and spans


def _branches(place: Place) -> str:
    return f"‹ {place.number}/{place.of} ›"
