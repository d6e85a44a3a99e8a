"""The model picker: what is here, what the catalogue can bring, and any reference that is typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text
from textual.widgets import Input, OptionList

from edgellm.machine.paths import path_if_there
from edgellm.machine.terminal import human_bytes
from edgellm.tui.dialog import SearchDialog
from edgellm.tui.safe_text import one_line

if TYPE_CHECKING:
    from edgellm.remote.model import RemoteServer


@dataclass(frozen=True)
class ModelRow:
    """A model to choose."""

    name: str
    is_here: bool
    nbytes: int | None
    about: str


def model_rows() -> list[ModelRow]:
    """The models of the store, GGUF files of this folder, then the rest of the catalogue."""
    from edgellm.store.catalogue import catalogue, installed_models

    known = catalogue()
    rows = []
    for model in installed_models():
        entry = known.get(model.name)
        rows.append(ModelRow(model.name, True, model.nbytes, entry.description if entry else str(model.path.name)))
    for path in sorted(Path(".").glob("*.gguf"))[:50]:
        if path_if_there(path) is not None:  # not a link that leads nowhere
            rows.append(ModelRow(str(path), True, path.stat().st_size, "file of this folder"))
    here = {row.name for row in rows}
    for name, entry in known.items():
        if name not in here:
            licence = f", {entry.licence}" if entry.licence else ""
            rows.append(ModelRow(name, False, entry.nbytes, entry.description + licence))
    return rows


def server_rows(server: RemoteServer) -> list[ModelRow]:
    """The models of a server."""
    rows = []
    for model in server.models():
        facts = ("in memory" if model.is_loaded else "", f"{model.n_ctx:,} tokens of context" if model.n_ctx else "")
        about = ", ".join(filter(None, facts)) or f"on {server.authority}"
        rows.append(ModelRow(server.full_name(model.name), True, model.nbytes or None, about))
    return rows


class ModelScreen(SearchDialog[str]):
    """Gives back the name of a model; one that is not here will be pulled."""

    TITLE_TEXT = "Models"
    HINT = "Enter use (↓ pulls it first)   a path or hf:owner/repo:QUANT works too   Esc close"
    PLACEHOLDER = "Name, path or reference"

    def __init__(self, rows: Sequence[ModelRow], current: str, words: str = "") -> None:
        super().__init__(words)
        self.rows, self.current = list(rows), current

    def refill(self) -> None:
        """The rows with the words that were typed."""
        words = self.words.lower().split()
        self.found = [row for row in self.rows if all(w in f"{row.name} {row.about}".lower() for w in words)]
        width = max(min(self.size.width - 14, 92), 24)
        names = [row.name for row in self.found]
        at = names.index(self.current) if self.current in names else 0
        nothing = f"Enter tries {one_line(self.words)!r} as it stands."
        self.fill([self._row(row, width) for row in self.found], nothing, at)

    def _row(self, row: ModelRow, width: int) -> Text:
        mark = "● " if row.name == self.current else "  " if row.is_here else "↓ "
        size = human_bytes(row.nbytes, 0) if row.nbytes else ""
        name = Text(mark + one_line(row.name), "" if row.is_here else "dim")
        name.truncate(max(width - 10, 10), overflow="ellipsis", pad=True)
        text = Text(no_wrap=True, overflow="ellipsis", end="").append_text(name).append(f"{size:>9}", "dim")
        return text.append(f"\n    {one_line(row.about)}", "dim")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """The marked model, or what was typed."""
        if name := self.marked.name if self.marked else event.value.strip():
            self.dismiss(name)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A click chooses."""
        self.dismiss(self.found[event.option_index].name)


class ServerModelScreen(ModelScreen):
    """The models of a server, which pulls nothing for a chat."""

    TITLE_TEXT = "Models of the server"
    HINT = "Enter use   Esc close"
    PLACEHOLDER = "Name"
