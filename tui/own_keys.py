"""Keys of an input that act at once.

Textual inserts a letter where it comes in, but asks all parents of an input, one after the other, before it runs one of
the input's own keys. Over a slow line or while a long answer is drawn, letters would overtake a Backspace.
"""

from __future__ import annotations

import functools
import re

from textual import events
from textual.binding import Binding
from textual.widget import Widget
from textual.widgets import Input

from edgellm.tui.safe_text import safe_text


async def acts(widget: Widget, event: events.Key) -> bool:
    """Whether it was one of the widget's own keys; it has done what it does then."""
    action = None if event.is_printable else _actions(type(widget)).get(event.key)
    return action is not None and await widget.app.run_action(action, widget)


class LineInput(Input):
    """Textual's line of text, with keys and letters in their order, and every line of a paste in one."""

    async def _on_key(self, event: events.Key) -> None:
        if await acts(self, event):
            event.stop()
            event.prevent_default()
        else:
            await super()._on_key(event)

    def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        text = " ".join(safe_text(line) for line in re.split("\r\n?|\n", event.text))
        if text:
            self.replace(text, *self.selection)


@functools.cache
def _actions(kind: type[Widget]) -> dict[str, str]:
    """Key -> action, of a kind of input and what it is made from."""
    classes = [c for c in reversed(kind.__mro__) if issubclass(c, Widget) and "BINDINGS" in vars(c)]
    return {b.key: b.action for c in classes for b in Binding.make_bindings(c.BINDINGS)}
