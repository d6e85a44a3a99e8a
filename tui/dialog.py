"""A frame for everything that opens over the chat: a question, a line to fill in, a list that is searched.

A dialog makes its parts when it is made, and holds them: one that closes, or whose application ends, while it opens is
never composed, and Textual tells it all the same that it is there. What it then does to its parts is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgellm.tui.aside import Aside
from edgellm.tui.own_keys import LineInput

SHORT = 22  # rows; below, nothing is spent on space
T = TypeVar("T")


class ClosesOnce:
    """Of a screen that only closes itself: a second click on its list finds it closed, and closes nothing else."""

    @property
    def is_on_screen(self) -> bool:
        """Whether it is, or will be, on the terminal: not once it is closed or the application ends."""
        screen: Any = self
        return bool(screen.is_attached and screen.app.is_running and screen in screen.app.screen_stack)

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """Close it with a result; when it is closed already, or a question stands over it, nothing happens."""
        screen: Any = super()
        return screen.dismiss(result) if screen.app.screen is self else AwaitComplete.nothing()

    def action_close(self) -> None:
        """Close it without a result."""
        self.dismiss(None)


class Dialog(ClosesOnce, ModalScreen[T]):
    """A panel in the middle with a title and a line of hints. Esc closes it without a result."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "Close", show=False)]
    TITLE_TEXT: str = ""
    HINT: ClassVar[str] = "Esc close"

    def __init__(self, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self.title_line = Static(id="dialog-title")

    @property
    def aside(self) -> Aside:
        """Where the application does what may take long."""
        aside: Aside = self.app.aside  # type: ignore[attr-defined]
        return aside

    def compose(self) -> ComposeResult:
        with Vertical(id="dialog"):
            self.title_line.update(Text(self.TITLE_TEXT))
            yield self.title_line
            yield from self.body()
            yield Static(Text(self.HINT), id="dialog-hint")

    def body(self) -> ComposeResult:
        """What stands between the title and the hints."""
        yield from ()

    def on_resize(self, event: events.Resize) -> None:
        """A low screen has no room for space."""
        self.set_class(event.size.height < SHORT, "short")

    def ask(self, title: str, then: Callable[[str], Any], value: str = "", placeholder: str = "") -> None:
        """Ask for a line; ``then`` gets it, unless the user leaves it by Esc."""
        dialog = LineDialog(title, value, placeholder)
        self.app.push_screen(dialog, lambda text: None if text is None else then(text))


class Rows(OptionList):
    """A list of Textual's, whose page keys wait while there is no room for a row: it would look for the row's line."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether an action may be run now."""
        return bool(self.scrollable_content_region) or not action.startswith("page_")


class LineDialog(Dialog[str]):
    """Asks for one line."""

    HINT = "Enter ok   Esc cancel"

    def __init__(self, title: str, value: str = "", placeholder: str = "") -> None:
        super().__init__(classes="small")
        self.TITLE_TEXT = title
        self.line = LineInput(value, placeholder=placeholder, compact=True, select_on_focus=False)

    def body(self) -> ComposeResult:
        yield self.line

    def on_mount(self) -> None:
        """The cursor stands in the line."""
        self.line.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Give the line back."""
        event.stop()
        self.dismiss(event.value)


class ConfirmDialog(Dialog[bool]):
    """Asks yes or no; anything but y is no."""

    HINT = "y yes   n no"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes", show=False),
        Binding("n,enter", "answer(False)", "No", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__(classes="small")
        self.question = question

    def body(self) -> ComposeResult:
        yield Static(Text(self.question))

    def action_answer(self, answer: Any) -> None:
        """Give the answer back."""
        self.dismiss(bool(answer))


class SearchDialog(Dialog[T]):
    """A list under a line of words: what is typed searches, up and down mark a row. ``refill`` finds the rows."""

    PLACEHOLDER: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "move(1)", show=False, priority=True),
        Binding("up", "move(-1)", show=False, priority=True),
    ]

    def __init__(self, words: str = "") -> None:
        super().__init__()
        self.words = words
        self.found: list[Any] = []
        self.line = LineInput(words, placeholder=self.PLACEHOLDER, compact=True)
        self.list = Rows(markup=False, compact=True)
        self.list.can_focus = False

    def body(self) -> ComposeResult:
        yield self.line
        yield self.list

    def on_mount(self) -> None:
        """Show all of them; the cursor stands in the search."""
        self.line.focus()
        self.refill()

    def refill(self) -> None:
        """Put what ``words`` finds into ``found`` and into the list."""
        raise NotImplementedError

    def fill(self, rows: Sequence[Text], nothing: str, at: int = 0) -> None:
        """Show the rows with a mark ``at`` one of them, or why there is none."""
        self.list.clear_options()
        self.list.add_options([Option(row) for row in rows] or [Option(Text(nothing, "dim"), disabled=True)])
        self.list.highlighted = at if rows else None

    @property
    def marked(self) -> Any:
        """What was found and stands under the bar."""
        at = self.list.highlighted
        return self.found[at] if at is not None and at < len(self.found) else None

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search while the user types."""
        if event.value != self.words:
            self.words = event.value
            self.refill()

    def action_move(self, step: int) -> None:
        """Up and down while the cursor stays in the search."""
        if self.found:
            self.list.highlighted = max(0, min((self.list.highlighted or 0) + step, len(self.found) - 1))
