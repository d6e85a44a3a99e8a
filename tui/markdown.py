"""Markdown as lines of a screen, made anew only where it grows.

A document is a list of top-level blocks. While an answer streams only its last block is parsed and drawn again, so that
a long answer costs no more than a short one. Nothing of it is trusted: no HTML, no links that open by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.text import Text

from edgellm.tui.highlight import highlighted
from edgellm.tui.markdown_table import table_lines
from edgellm.tui.narrow import PLAIN, folded
from edgellm.tui.palette import Palette
from edgellm.tui.safe_text import safe_text

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from markdown_it.tree import SyntaxTreeNode

BULLETS = ("•", "◦", "▪")
MAX_DEPTH = 12  # of lists and quotes that are drawn as such
MIN_WIDTH = 8


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt  # after the first picture: an empty screen needs none

    return MarkdownIt("commonmark", {"html": False, "maxNesting": 40}).enable(["table", "strikethrough"])


def prepare(palette: Palette) -> None:
    """Import what the first answer needs: 40 ms for the parser, 60 ms for code in colours."""
    MarkdownDocument(palette, MIN_WIDTH).update("```python\npass\n```")


@dataclass
class CodeBlock:
    """A fenced block: what can be copied by its number."""

    code: str
    language: str
    line: int  # of its head, within the document


@dataclass
class _Block:
    lines: list[Text]
    codes: list[CodeBlock]


@dataclass
class MarkdownDocument:
    """The lines of a growing text at one width. ``update`` draws what is new, from line ``changed_from`` on."""

    palette: Palette
    width: int
    first_code: int = 1  # number of its first code block
    lines: list[Text] = field(default_factory=list)
    codes: list[CodeBlock] = field(default_factory=list)
    changed_from: int = 0
    _blocks: list[_Block] = field(default_factory=list)
    _done: str = ""  # source of all blocks but the last
    _n_done: int = 0  # how many they are

    def update(self, text: str) -> None:
        """Draw ``text``, which mostly is the last one and a little more."""
        text = safe_text(text)
        if not text.startswith(self._done):
            self._blocks, self._done, self._n_done = [], "", 0
        tail = text[len(self._done) :]
        tokens = _parser().parse(tail)
        sources = _sources(tail, tokens)
        kept = self._blocks[: self._n_done]
        self.changed_from = sum(len(block.lines) + 1 for block in kept)
        del self.lines[self.changed_from :]
        self.codes = [code for block in kept for code in block.codes]
        for source in sources:
            block = self._draw(len(self.lines), tokens if len(sources) == 1 else _parser().parse(source))
            kept.append(block)
            self.codes += block.codes
            self.lines += [*block.lines, Text("")]
        self._blocks = kept
        self._done += "".join(sources[:-1])
        self._n_done = len(kept) - bool(sources)

    def _draw(self, start: int, tokens: list[Token]) -> _Block:
        drawing = _Drawing(self.palette, self.first_code + len(self.codes))
        lines = drawing.document(tokens, max(self.width, MIN_WIDTH))
        return _Block(lines, [CodeBlock(c.code, c.language, c.line + start) for c in drawing.codes])


def _sources(text: str, tokens: list[Token]) -> list[str]:
    """The sources of the top-level blocks, in order; together they are the text."""
    starts = sorted({token.map[0] for token in tokens if token.level == 0 and token.map})
    lines = text.splitlines(keepends=True)
    if len(starts) < 2:
        return [text] if text else []
    bounds = [0, *starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in pairwise(bounds)]


class _Drawing:
    """Draws the nodes of one block."""

    def __init__(self, palette: Palette, next_code: int) -> None:
        self.palette = palette
        self.next_code = next_code
        self.codes: list[CodeBlock] = []

    def document(self, tokens: list[Token], width: int) -> list[Text]:
        from markdown_it.tree import SyntaxTreeNode

        return self.blocks(SyntaxTreeNode(tokens).children, width, 0)

    def blocks(self, nodes: list[SyntaxTreeNode], width: int, depth: int, tight: bool = False) -> list[Text]:
        """Blocks one under the other, with an empty line between two of them unless ``tight``."""
        lines: list[Text] = []
        for number, node in enumerate(nodes):
            if number and not tight:
                lines.append(Text(""))
            n_codes = len(self.codes)
            drawn = self.block(node, width, depth)
            for code in self.codes[n_codes:]:
                code.line += len(lines)
            lines += drawn
        return lines

    def block(self, node: SyntaxTreeNode, width: int, depth: int) -> list[Text]:
        kind = node.type
        if kind in ("paragraph", "inline"):
            return self.wrapped(self.inline(node), width)
        if kind == "heading":
            text = self.inline(node)
            text.stylize_before(self.palette.heading)
            return self.wrapped(text, width)
        if kind in ("fence", "code_block"):
            return self.code(node, width)
        if kind in ("bullet_list", "ordered_list") and depth < MAX_DEPTH:
            return self.items(node, width, depth)
        if kind == "blockquote" and depth < MAX_DEPTH:
            inner = self.blocks(node.children, max(width - 2, MIN_WIDTH), depth + 1)
            return [self.behind("▎ ", line, self.palette.quote) for line in inner]
        if kind == "hr":
            return [Text("─" * width, self.palette.faint)]
        if kind == "table":
            rows = [[self.inline(cell) for cell in row.children] for part in node.children for row in part.children]
            head = node.children[0].children[0].children
            aligned = [str(cell.attrs.get("style", "")).rpartition(":")[2] for cell in head]
            return table_lines(rows, aligned, width, self.palette)
        if node.children:
            return self.blocks(node.children, width, depth)
        return self.wrapped(Text(node.content), width)

    def items(self, node: SyntaxTreeNode, width: int, depth: int) -> list[Text]:
        """A list: markers in a column of their own."""
        ordered = node.type == "ordered_list"
        start = int(node.attrs.get("start", 1)) if ordered else 0
        last = len(str(start + len(node.children) - 1))
        tight = all(child.hidden for item in node.children for child in item.children if child.type == "paragraph")
        lines: list[Text] = []
        for number, item in enumerate(node.children):
            marker = f"{start + number:>{last}}. " if ordered else f"{BULLETS[min(depth, 2)]} "
            n_codes = len(self.codes)
            inner = self.blocks(item.children, max(width - len(marker), MIN_WIDTH), depth + 1, tight)
            if number and not tight:
                lines.append(Text(""))
            for code in self.codes[n_codes:]:
                code.line += len(lines)
            for i, line in enumerate(inner or [Text("")]):
                lines.append(self.behind(marker if i == 0 else " " * len(marker), line, None))
        return lines

    def code(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        """Head, code on a ground of its own; a line that is too long is folded."""
        language = node.info.split()[0] if node.info.strip() else ""
        code = node.content.removesuffix("\n")
        self.codes.append(CodeBlock(code, language, 0))
        number = f"copy {self.next_code} "
        self.next_code += 1
        head = Text(f" {language[: max(width - len(number) - 2, 0)]}", self.palette.code_head)
        head.append(" " * max(width - head.cell_len - len(number), 0) + number)
        head.truncate(width)
        lines = [head]
        inner = max(width - 2, MIN_WIDTH)
        for line in highlighted(code, language, self.palette).split("\n", allow_blank=True):
            for part in line.wrap(PLAIN, inner, overflow="fold", no_wrap=line.cell_len <= inner) or [line]:
                row = Text(" ", self.palette.code).append_text(part)
                row.append(" " * max(width - row.cell_len, 0))
                lines.append(row)
        return lines

    def inline(self, node: SyntaxTreeNode) -> Text:
        """The words of a paragraph, a heading or a cell."""
        text = Text(end="")
        self._inline(node, text, 0)
        return text

    def _inline(self, node: SyntaxTreeNode, text: Text, depth: int) -> None:
        styles = {"strong": self.palette.strong, "em": self.palette.emphasis, "s": self.palette.struck}
        start = len(text)
        for child in node.children:
            kind = child.type
            if kind in ("softbreak", "hardbreak"):
                text.append("\n")
            elif kind == "code_inline":
                text.append(child.content, self.palette.inline_code)
            elif kind in ("text", "text_special"):
                text.append(_checkbox(child.content) if child is node.children[0] else child.content)
            elif child.children and depth < 2 * MAX_DEPTH:
                self._inline(child, text, depth + 1)
            elif child.content:
                text.append(child.content)
        if node.type in styles:
            text.stylize(styles[node.type], start)
        elif node.type in ("link", "image"):
            text.stylize(self.palette.link, start)
            target = str(node.attrs.get("href", node.attrs.get("src", "")))
            if target and target != text.plain[start:]:
                text.append(f" ({target})", self.palette.muted)

    def wrapped(self, text: Text, width: int) -> list[Text]:
        """Lines no wider than ``width``; words longer than that are folded."""
        if text.cell_len <= width and "\n" not in text.plain:
            return [text]
        return [line for part in text.split("\n", allow_blank=True) for line in folded(part, width)]

    def behind(self, marker: str, line: Text, style: object) -> Text:
        """A line with a marker in front of it."""
        row = Text(end="")
        row.append(marker, self.palette.mark if marker.strip() else "")
        row.append_text(line)
        if style is not None:
            row.stylize_before(style, len(marker))  # type: ignore[arg-type]
        return row


def _checkbox(content: str) -> str:
    for box, shown in (("[ ] ", "☐ "), ("[x] ", "☑ "), ("[X] ", "☑ ")):
        if content.startswith(box):
            return shown + content[len(box) :]
    return content
