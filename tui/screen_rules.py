"""What may open over the chat: one of a kind, asked for by the chat or by what is open; all else waits.

A key of the application reaches it while a dialog is open too, and Textual pushes whatever it is told to.
"""

from __future__ import annotations

from typing import Any, ClassVar

from textual import events
from textual.app import App
from textual.command import CommandList, CommandPalette
from textual.theme import ThemeProvider
from textual.widget import AwaitMount

from edgellm.tui.dialog import ClosesOnce


class Palette(ClosesOnce, CommandPalette):
    """Textual's list of commands."""

    def on_mount(self, event: events.Mount) -> None:
        """Closed while it opened, it gathers no commands: Textual's own part would look for what is not there."""
        if not self.is_on_screen:
            event.prevent_default()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Its list turns no page while there is no room for a row, as ``Rows`` does not."""
        turns = any(str(one).startswith("page_") for one in parameters)
        return not turns or bool(self.query_one(CommandList).scrollable_content_region)


class ScreenRules(App[int]):
    """An application with one thing open at a time.

    ALWAYS   its own actions that work over a dialog
    """

    ALWAYS: ClassVar[frozenset[str]] = frozenset({"interrupt", "leave"})

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Over the chat its own verbs wait; moving the focus, suspending and leaving do not."""
        own = (c for c in type(self).__mro__ if issubclass(c, ScreenRules))
        is_verb = action == "command_palette" or any(f"action_{action}" in vars(c) for c in own)
        return True if len(self.screen_stack) == 1 or not is_verb or action in self.ALWAYS else None  # drawn in grey

    def push_screen(self, screen: Any, *arguments: Any, **options: Any) -> Any:
        """One of a kind: when it is open already nothing happens."""
        if any(type(other) is type(screen) for other in self.screen_stack):
            return AwaitMount(self.screen, ())
        return super().push_screen(screen, *arguments, **options)

    def action_command_palette(self) -> None:
        """Everything by its name."""
        self.push_screen(Palette(id="--command-palette"))

    def search_themes(self) -> None:
        """Choose the colours from a list."""
        self.push_screen(Palette(providers=[ThemeProvider], placeholder="Search for themes…"))
