"""The settings of a chat: every sampling parameter with meaning and default, the context, the system message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets.option_list import Option

from edgellm.formats.errors import ParameterError
from edgellm.sampling.options import DENOISING_OPTIONS, SAMPLING_OPTIONS
from edgellm.sessions.settings import typed
from edgellm.tui.dialog import Dialog, Rows
from edgellm.tui.safe_text import one_line, safe_text

SYSTEM = "system message"


@dataclass(frozen=True)
class Setting:
    """A row. ``default`` is what counts while nothing is set, ``source`` who says so."""

    name: str
    default: Any
    source: str
    meaning: str


def setting_rows(defaults: Any, recommended: Set[str], n_ctx: int, *, denoises: bool = False) -> list[Setting]:
    """All settings; ``defaults`` is the model's SamplingParams, ``recommended`` the fields that its file names."""
    rows = [
        Setting(SYSTEM, "", "", "Said to the model before everything else."),
        Setting("max_tokens", -1, "", "Tokens of an answer at most; -1 goes on to the end."),
        Setting("n_ctx", n_ctx, "", "Tokens of context; loads the model anew. 0 takes all."),
        Setting("context_overflow", "ask", "", "When a message does not fit: ask, drop_oldest turns, or stop."),
        Setting("stop", (), "", "Texts that end an answer, with ; between them."),
    ]
    for option in (*SAMPLING_OPTIONS, *(DENOISING_OPTIONS if denoises else ())):
        source = "model file" if option.field in recommended else ""
        rows.append(Setting(option.field, getattr(defaults, option.field, ""), source, option.help))
    return rows


class SettingsScreen(Dialog[None]):
    """Changes settings one by one through ``change(name, value)``; None takes the default again."""

    TITLE_TEXT = "Settings of this chat"
    HINT = "Enter change   Del default   s save preset   p presets   Esc close"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("delete,backspace", "reset", show=False),
        Binding("s", "save", show=False),
        Binding("p", "presets", show=False),
    ]

    def __init__(
        self,
        rows: list[Setting],
        values: Callable[[], Mapping[str, Any]],
        change: Callable[[str, Any], None],
        presets: tuple[Callable[[], list[str]], Callable[[str], None], Callable[[str], None]],
    ) -> None:
        """presets: the names, save under a name, use by name."""
        super().__init__()
        self.rows, self.values, self.change, self.presets = rows, values, change, presets
        self.list = Rows(markup=False, compact=True)

    def body(self) -> ComposeResult:
        yield self.list

    def on_mount(self) -> None:
        """Show all of them."""
        self.refill()
        self.list.focus()

    def on_resize(self, event: events.Resize) -> None:
        """Rows as wide as the panel."""
        super().on_resize(event)
        self.refill()

    def refill(self) -> None:
        """Draw the rows with the values of now."""
        at = self.list.highlighted or 0
        values = self.values()
        self.list.clear_options()
        self.list.add_options([Option(self._row(row, values)) for row in self.rows])
        self.list.highlighted = at

    def _row(self, row: Setting, values: Mapping[str, Any]) -> Text:
        value = values.get(row.name)
        is_set = value not in (None, "", [])
        default = (shown(row.default) or "none") + (f" ({row.source})" if row.source else "")
        width = max(min(self.size.width - 14, 90), 30)
        left = Text(f"{row.name:<22}")
        left.append(one_line(shown(value)) if is_set else default, "bold" if is_set else "dim")
        if is_set and row.name != SYSTEM:
            left.append(f"   default {default}", "dim")
        left.truncate(width, overflow="ellipsis")
        return Text(no_wrap=True, overflow="ellipsis", end="").append_text(left).append(f"\n  {row.meaning}", "dim")

    def _marked(self) -> Setting:
        return self.rows[self.list.highlighted or 0]

    def on_option_list_option_selected(self) -> None:
        """Ask for a value."""
        row = self._marked()
        value = self.values().get(row.name)
        now, default = "" if value is None else shown(value), shown(row.default) or "none"
        self.ask(f"{row.name}: {row.meaning}", lambda text: self._set(row.name, text), now, f"default {default}")

    def _set(self, name: str, text: str) -> None:
        try:
            self.change(name, text.strip() if name == SYSTEM else typed(name, text)[1])
        except ParameterError as error:
            self.app.notify(safe_text(str(error)), title=name, severity="error", markup=False)
        self.refill()

    def action_reset(self) -> None:
        """Back to the default."""
        self._set(self._marked().name, "")

    def action_save(self) -> None:
        """Save what is set under a name."""
        self.ask("Save these settings as", lambda name: self.presets[1](name.strip()) if name.strip() else None)

    def action_presets(self) -> None:
        """Use settings that were saved."""
        names = self.presets[0]()

        def named(name: str) -> None:
            if name:
                self.presets[2](name.strip())
                self.refill()

        hint = ", ".join(names) if names else "none saved yet"
        self.ask("Use the preset", named, names[0] if len(names) == 1 else "", hint)


def shown(value: Any) -> str:
    """A value as it can be typed again."""
    if isinstance(value, list | tuple):
        return ";".join(repr(part)[1:-1] if isinstance(part, str) else str(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{key}{number:+g}" for key, number in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
