"""Tables of Markdown: columns as wide as their words want and the screen allows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.text import Text

from edgellm.tui.narrow import folded
from edgellm.tui.palette import Palette

GAP = 3  # cells between two columns, a thin line in the middle
LEAST = 3  # width of a column


def column_widths(rows: Sequence[Sequence[Text]], n_columns: int, width: int) -> list[int]:
    """Each column's own width; when they do not fit, the widest ones give."""
    widths = [max((row[i].cell_len for row in rows if i < len(row)), default=LEAST) for i in range(n_columns)]
    widths = [max(one, LEAST) for one in widths]
    room = max(width - GAP * (n_columns - 1), LEAST * n_columns)
    while sum(widths) > room:
        widest = max(widths)
        at = widths.index(widest)
        second = max((one for one in widths if one < widest), default=LEAST)
        n_widest = widths.count(widest)
        cut = min(widest - second or 1, max(1, (sum(widths) - room) // n_widest))
        if widest <= LEAST:
            break
        widths[at] = max(LEAST, widest - cut)
    return widths


def table_lines(rows: Sequence[Sequence[Text]], aligned: Sequence[str], width: int, palette: Palette) -> list[Text]:
    """The first row is the head. ``aligned`` is left, right or center for each column."""
    n_columns = max(len(row) for row in rows)
    widths = column_widths(rows, n_columns, width)
    lines: list[Text] = []
    for number, row in enumerate(rows):
        cells = [row[i].copy() if i < len(row) else Text("") for i in range(n_columns)]
        if number == 0:
            for cell in cells:
                cell.stylize_before("bold")
        for parts in zip_longest(*map(folded, cells, widths)):
            line = Text(end="")
            for i, part in enumerate(parts):
                if i:
                    line.append(" │ ", palette.faint)
                shown = part.copy() if part is not None else Text("")
                how = aligned[i] if i < len(aligned) and aligned[i] in ("right", "center") else "left"
                shown.align(how, widths[i])  # type: ignore[arg-type]
                line.append_text(shown)
            line.truncate(width)
            lines.append(line)
        if number == 0:
            lines.append(Text("─┼─".join("─" * w for w in widths)[:width], palette.faint))
    return lines
