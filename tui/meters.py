"""The line of figures: context, reuse, rates, memory. Every number is the engine's; what does not fit is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.segment import Segment
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from edgellm.machine.progress import STAGES
from edgellm.machine.terminal import human_bytes
from edgellm.tui.narrow import whole_parts
from edgellm.tui.painting import paint, strip_of
from edgellm.tui.palette import Palette

MARGIN = 2  # cells left and right
BAR = 10  # cells of the context's bar
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Meters(Widget):
    """One line, drawn from facts that the application hands over."""

    ALLOW_SELECT = False

    def __init__(self, palette: Palette, **options: Any) -> None:
        super().__init__(**options)
        self.palette = palette
        self._parts: list[Text] = []
        self._line = Text(end="")

    def on_resize(self) -> None:
        """Other parts fit now."""
        self.show(self._parts)

    def show(self, parts: list[Text]) -> None:
        """Draw the parts that fit, in order; those at the end are left out first."""
        self._parts = parts
        width = max(self.size.width - 2 * MARGIN, 10)
        line = Text("   ", no_wrap=True, end="").join(list(whole_parts(parts, width)) or parts[:1])
        line.truncate(width, overflow="ellipsis")
        if line != self._line:
            self._line = line
            paint(self, self.size.region, self.render_lines(self.size.region))

    def render(self) -> Text:
        """The line."""
        return self._line

    def render_lines(self, crop: Region) -> list[Strip]:
        """The line between its margins."""
        base = self.palette.base
        strip = strip_of([Segment(" " * MARGIN, base)], self._line, self.size.width, base, self.app.console)
        for line_filter in self.get_line_filters():
            strip = strip.apply_filter(line_filter, self.background_colors[1])
        return [strip.crop(*crop.column_span)] * crop.height


def context_part(palette: Palette, used: int, n_ctx: int) -> Text:
    """``context ▮▮▮▯▯ 812/8,192``."""
    share = min(used / n_ctx, 1.0) if n_ctx else 0.0
    style = palette.error if share > 0.95 else palette.warning if share > 0.8 else palette.accent
    full = round(share * BAR) or (1 if used else 0)
    text = Text(end="")
    text.append("━" * full, style).append("━" * (BAR - full), palette.faint)
    return text.append(f" {used:,}/{n_ctx:,}", palette.muted)


def timing_parts(palette: Palette, timings: Mapping[str, float], memory: int) -> list[Text]:
    """What the last or growing answer cost, the most telling first."""
    parts = []
    muted = palette.muted
    if timings.get("generation_tps"):
        parts.append(Text(f"{timings['generation_tps']:.0f} t/s", palette.ink))
    if timings.get("drafted_n"):
        parts.append(Text(f"{timings.get('accepted_n', 0):.0f} of {timings['drafted_n']:.0f} drafted", muted))
    if timings.get("prompt_n"):
        reused, computed = int(timings.get("reused_n", 0)), int(timings.get("computed_n", 0))
        rate = f" at {timings['prompt_tps']:.0f} t/s" if timings.get("prompt_tps") else ""
        parts.append(Text(f"{reused:,} reused + {computed:,} read{rate}", muted))
    if timings.get("time_to_first_token_ms"):
        parts.append(Text(f"first {timings['time_to_first_token_ms'] / 1e3:.2f} s", muted))
    if memory:
        parts.append(Text(human_bytes(memory, 0), muted))
    return parts


def stage_part(palette: Palette, stage: tuple[str, int, int | None, str], tick: int) -> Text:
    """``⠋ compiling kernels for your CPU 3/12``."""
    kind, done, total, _ = stage
    text = Text(f"{SPINNER[tick % len(SPINNER)]} ", palette.accent, end="")
    text.append(STAGES.get(kind, kind), palette.muted)
    if kind == "pull":
        text.append(f" {human_bytes(done, 0)}" + (f" of {human_bytes(total, 0)}" if total else ""), palette.muted)
    elif total and kind != "load":
        text.append(f" {done}/{total}", palette.muted)
    return text
