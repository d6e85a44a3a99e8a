"""Lines written to the terminal past Textual's compositor, which for one of them asks every widget for all of its own.

It is for what changes many times a second (a picture 1.5 ms in place of 5). A widget paints what its ``render_lines``
gives, so that the same stands there whenever Textual draws the screen. The way is Textual's own affair: a release that
has it no more draws everything itself.
"""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import App
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

try:
    from textual._compositor import Compositor, CompositorUpdate

    CAN_PAINT = hasattr(App, "_display") and hasattr(Compositor, "visible_widgets")
except ImportError:
    CompositorUpdate, CAN_PAINT = object, False  # type: ignore[assignment,misc]


def strip_of(left: list[Segment], text: Text, width: int, base: Style, console: Console) -> Strip:
    """A line of ``width`` cells: what stands ``left`` of the text, the text, and nothing up to the end."""
    ground = base + text.style if isinstance(text.style, Style) else base  # rich leaves it out of a row without spans
    segments = left.copy()
    for words, style, _ in text.render(console) if text.spans else [Segment(text.plain)]:
        if words != "\n":
            segments.append(Segment(words, ground + style if isinstance(style, Style) else ground))
    n_cells = sum(segment.cell_length for segment in segments)
    if n_cells < width:
        segments.append(Segment(" " * (width - n_cells), base))
    strip = Strip(Segment.simplify(segments), max(n_cells, width))
    return strip if n_cells <= width else strip.crop(0, width)


class _Lines(CompositorUpdate):
    """Strips one under the other, from a place of the screen on."""

    def __init__(self, x: int, y: int, strips: list[Strip]) -> None:
        self.x, self.y, self.strips = x, y, strips

    def render_segments(self, console: Console) -> str:
        return "".join(f"\x1b[{y + 1};{self.x + 1}H{s.render(console)}" for y, s in enumerate(self.strips, self.y))


def paint(widget: Widget, part: Region, strips: list[Strip]) -> None:
    """Write ``part`` of a widget to the terminal now. Where something lies over it Textual draws it, and soon."""
    app, screen, place = widget.app, widget.screen, part.translate(widget.region.offset)
    if CAN_PAINT and screen is app.screen and not getattr(app, "_batch_count", 1):
        for other, (region, clip) in screen._compositor.visible_widgets.items():  # from front to back
            if other is widget:
                app._display(screen, _Lines(place.x, place.y, strips))  # type: ignore[arg-type]
                return
            if region.intersection(clip).overlaps(place):
                break
    widget.refresh(part.translate(-widget.content_offset))
