"""What keys, commands and the palette do: the verbs of the application, each a few lines over ``Chat``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from textual.app import SystemCommand
from textual.screen import Screen

from edgellm.context_overflow import ChatTooLongError
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.paths import line_path, look_at, unquoted
from edgellm.sessions import MessageNode, Session, from_json, write_session
from edgellm.sessions.commands import Command
from edgellm.sessions.exchange import MAX_NBYTES
from edgellm.sessions.settings import checked_all, typed
from edgellm.sessions.tree import title_of
from edgellm.tui.aside import Aside
from edgellm.tui.chat import LOAD_SETTINGS, Chat
from edgellm.tui.commands import COMMANDS
from edgellm.tui.dialog import LineDialog
from edgellm.tui.palette import Palette
from edgellm.tui.prompt_input import PromptInput
from edgellm.tui.safe_text import one_line, safe_text
from edgellm.tui.screen_rules import ScreenRules
from edgellm.tui.transcript import Transcript

SUMMARY_COMES = "A summary is on its way. Esc stops it."
ERROR_S = 12.0  # an error with advice stays so long


class ChatActions(ScreenRules):
    """The verbs. ``ChatApp`` draws."""

    chat: Chat
    aside: Aside
    palette: Palette
    editing: MessageNode | None = None  # the message that the next text takes the place of
    draft = ""  # what stood in the input before

    # -- what ChatApp gives ----------------------------------------------------------------------------------------

    @property
    def transcript(self) -> Transcript:
        """The conversation."""
        return self.screen_stack[0].query_one(Transcript)

    @property
    def prompt(self) -> PromptInput:
        """The input."""
        return self.screen_stack[0].query_one(PromptInput)

    def give_back(self, node: MessageNode) -> None:
        """Nothing came of an answer: the words of its question are not lost."""
        if not node.text and not node.tokens and node.parent is not None and not self.prompt.text:
            self.prompt.put(node.parent.text)
            self.editing = node.parent

    def redraw(self, *, to_end: bool = True) -> None:
        """Show the session as it is now."""
        raise NotImplementedError

    # -- saying things ---------------------------------------------------------------------------------------------

    def say(self, text: str, title: str = "") -> None:
        """A short note."""
        self.notify(safe_text(text), title=title, markup=False, timeout=4)

    def warn(self, notes: Sequence[str], title: str) -> None:
        """What was not taken, one note for each reason."""
        if notes:
            text = safe_text("\n".join(notes[:5]))
            self.notify(text, title=title, severity="warning", timeout=ERROR_S, markup=False)

    def complain(self, error: BaseException) -> None:
        """An error with its advice."""
        code = str(getattr(error, "code", ""))
        title = "" if code == ParameterError.code else code.replace("_", " ").capitalize()
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename or ''}: {error.strerror}.".lstrip(": ")
        self.notify(safe_text(message), title=title, severity="error", timeout=ERROR_S, markup=False)

    @contextlib.contextmanager
    def complaining(self) -> Iterator[None]:
        """Errors inside become notifications."""
        try:
            yield
        except (EdgeLLMError, OSError) as error:
            self.complain(error)

    def target(self, role: str | None = None) -> MessageNode | None:
        """The marked message, else the last one of the role."""
        chosen = self.transcript.chosen
        if chosen is not None and (role is None or chosen.role == role):
            return chosen
        path = self.chat.session.tree.path
        return next((node for node in reversed(path) if role is None or node.role == role), None)

    # -- answers ---------------------------------------------------------------------------------------------------

    def action_regenerate(self) -> None:
        """Another answer to the same message."""
        node = self.target()
        with self.complaining():
            if node is None:
                raise ParameterError("There is no message to answer again. Write one first.")
            if self.chat.summing_up is not None:
                raise ParameterError(SUMMARY_COMES)
            self.chat.halt()
            self.transcript.growing = self.chat.regenerate(node)
        self.redraw()

    def action_go_on(self) -> None:
        """Continue an answer that was cut off."""
        node = self.target("assistant")
        with self.complaining():
            if node is None:
                raise ParameterError("There is no answer to continue.")
            self.transcript.growing = self.chat.go_on(node)
        self.redraw()

    def open_long_chat(self, node: MessageNode, error: ChatTooLongError) -> bool:
        """Ask what to do with a chat that the context is too short for; whether there is anything to ask."""
        from edgellm.tui.long_chat_dialog import ALWAYS, DROP, SUMMARY, LongChatDialog

        asked = node.parent
        earlier = len(asked.path()) > 1 if asked is not None and not node.text else False
        dialog = LongChatDialog(error, summary=earlier)
        if self.chat.session.settings.get("context_overflow") == "stop" or not dialog.choices():
            return False

        def chosen(what: str | None) -> None:
            with self.complaining():
                if what is None or asked is None:
                    self.give_back(node)
                elif what == SUMMARY:
                    self.transcript.growing = self.chat.go_on_summarized(asked)
                else:
                    if what == ALWAYS:
                        self.chat.set("context_overflow", DROP)
                    self.transcript.growing = self.chat.answer_long(node, DROP if what == ALWAYS else what)
            self.redraw()
            self.screen_stack[0].set_focus(self.prompt)

        self.push_screen(dialog, chosen)
        return True

    def action_edit(self) -> None:
        """Bring a message of the user back into the input; sending it makes a branch."""
        node = self.target("user")
        if node is None:
            self.say("There is no message of yours to edit.")
            return
        if self.editing is None:
            self.draft = self.prompt.full_text
        self.editing = node
        self.prompt.put(node.text)
        self.screen_stack[0].set_focus(self.prompt)
        self.transcript.choose(None)
        self.redraw(to_end=False)

    def leave_editing(self) -> None:
        """The next text is a message behind the last again; what was begun before comes back."""
        if self.editing is not None:
            self.editing = None
            self.prompt.put(self.draft)
            self.draft = ""

    def action_turn(self, step: int) -> None:
        """Go to another branch: at the marked message, else at the last place where there are several."""
        tree = self.chat.session.tree
        node = self.transcript.chosen
        if node is None or len(tree.siblings(node)) < 2:
            node = next((n for n in reversed(tree.path) if len(tree.siblings(n)) > 1), None)
        if node is None:
            self.say("There is one branch. Edit a message, regenerate, or branch from a token.")
            return
        if self.chat.summing_up is not None:
            self.say(SUMMARY_COMES)
            return
        self.chat.halt()
        was_marked = self.transcript.chosen is not None
        other = tree.turn(node, step)
        self.chat.saved()
        self.redraw(to_end=not was_marked)
        if was_marked:
            self.transcript.choose(other)

    def action_tokens(self) -> None:
        """Open the token view over an answer."""
        node = self.target("assistant")
        if node is None or not node.tokens:
            self.say("There are no tokens to look at: only answers made here have them.")
            return
        from edgellm.tui.token_screen import Branch, TokenScreen

        def chosen(branch: Branch | None) -> None:
            if branch is None:
                return
            with self.complaining():
                self.chat.halt()
                self.transcript.growing = self.chat.branch(node, *branch)
            self.redraw()
            self.prompt.focus()

        self.push_screen(TokenScreen(list(node.tokens), self.palette, node.model), chosen)

    # -- copying ---------------------------------------------------------------------------------------------------

    def action_copy(self, number: int = 0) -> None:
        """Copy the marked message or the last answer; with a number, that code block."""
        self.copy(str(number) if number else "")

    def copy(self, which: str = "") -> None:
        """``""`` the answer, ``"2"`` code block 2."""
        with self.complaining():
            if which:
                codes = self.transcript.codes
                if not which.isdigit() or not 1 <= int(which) <= len(codes):
                    raise ParameterError(f"There is no code block {which}. This chat shows {len(codes)}.")
                self.copy_to_clipboard(codes[int(which) - 1].code)
                self.say(f"Code block {which} copied.")
                return
            node = self.transcript.chosen or self.target("assistant")
            if node is None:
                raise ParameterError("There is no answer to copy.")
            self.copy_to_clipboard(node.parts()[1])
            self.say("Copied.")

    # -- sessions --------------------------------------------------------------------------------------------------

    def action_new(self) -> None:
        """Begin a new chat."""
        self.chat.new_session()
        self.leave_editing()
        self.redraw()
        self.screen_stack[0].set_focus(self.prompt)

    def action_chats(self, words: str = "") -> None:
        """Open the list of chats, those with the words."""
        from edgellm.tui.sessions_screen import Chosen, SessionsScreen

        def chosen(result: Chosen | None) -> None:
            if result is None:
                self.redraw(to_end=False)  # the title may be another
                return
            what, session_id = result
            if what == "open":
                self.open_session(session_id)
            elif what == "delete":
                if session_id == self.chat.session.id:
                    self.leave_editing()
                self.aside.in_order(self.chat.delete_session(session_id), lambda _: self.action_chats())
                self.redraw()
            elif what == "export":
                self.aside.in_order(lambda: exported(self.chat.store.load(session_id)), self._say_where)

        screen = SessionsScreen(self.chat.store, self.chat.session.id, self.rename_session, words)
        self.aside.in_order(self.chat.writer.flush, lambda _: screen.refill_if_open())  # the last words are found too
        self.push_screen(screen, chosen)

    def open_session(self, session_id: int) -> None:
        """Go on with a session; its model is loaded when it is another."""
        self.aside.in_order(lambda: self.chat.loaded(session_id), self._entered)

    def _entered(self, session: Session) -> None:
        self.chat.enter(session)
        self.warn(session.notes, "Left out of this chat")
        self.leave_editing()
        model = self.chat.session.model
        if model and model != self.chat.model:
            self.say(f"This chat was led with {one_line(model)}. Ctrl-L brings it back.")
        self.redraw()
        self.screen_stack[0].set_focus(self.prompt)

    def revived(self, session: Session) -> None:
        """A chat that another program had deleted is there again."""
        title = one_line(session.shown_title)
        self.warn([f"{title!r} was deleted elsewhere while it was open here; it was saved again, whole."], "Chats")

    def rename(self, title: str) -> None:
        """Give this chat a title; without one it is called by its first words again."""
        self.rename_session(self.chat.session.id, title)
        self.say(one_line(self.chat.session.shown_title) or "It will be called by its first words.", "Title")

    def rename_session(self, session_id: int, title: str, then: Callable[[], object] = lambda: None) -> None:
        """Give a chat a title."""
        session, chat = self.chat.session, self.chat
        if session_id == session.id:  # in memory too, or its next message would write the old one back
            session.title = title_of(title)
            chat.saved()
            self.redraw(to_end=False)
            self.aside.in_order(chat.writer.flush, lambda _: then())
        else:
            self.aside.in_order(lambda: chat.store.rename(session_id, title), lambda _: then())

    def export(self, name: str) -> None:
        """Write this chat to a file; the ending says in which form."""
        session = self.chat.session
        self.aside.in_order(lambda: exported(session, name), self._say_where)

    def _say_where(self, path: Path) -> None:
        self.say(str(path.absolute()), "Exported")

    def import_file(self, name: str) -> None:
        """Bring in a chat from a file and go on with it."""
        store = self.chat.store

        def read() -> Session:
            if not name:
                raise ParameterError("Which file? Write /import FILE.")
            session = from_json(read_text(line_path(name), MAX_NBYTES))
            store.save_all(session)
            return store.load(session.id)

        self.aside.in_order(read, self._entered)

    # -- model and settings ----------------------------------------------------------------------------------------

    def action_models(self, name: str = "") -> None:
        """Choose a model, or take the one that is named."""
        if name := unquoted(name):
            self.use_model(name)
            return
        from edgellm.tui.model_screen import ModelScreen, ServerModelScreen, model_rows, server_rows

        server = self.chat.server

        def chosen(found: str | None) -> None:
            if found is not None:
                self.use_model(found)

        def found(rows: list[Any]) -> None:
            if len(self.screen_stack) == 1:
                screen = ModelScreen if server is None else ServerModelScreen
                self.push_screen(screen(rows, self.chat.model), chosen)

        self.aside.newest("models", lambda _: model_rows() if server is None else server_rows(server), found)

    def use_model(self, name: str) -> None:
        """Load a model, fetching it first when it is not here; the conversation stays."""
        if name != self.chat.model or self.chat.llm is None:
            self.chat.load_model(name)
        self.redraw(to_end=False)

    def action_settings(self) -> None:
        """Open the settings of this chat."""
        from edgellm.sampling import SamplingParams
        from edgellm.tui.settings_screen import SettingsScreen, setting_rows

        chat, llm = self.chat, self.chat.llm
        defaults = llm.default_params if llm is not None else SamplingParams()
        plain = SamplingParams()
        recommended = {n for n in plain.__dataclass_fields__ if getattr(defaults, n) != getattr(plain, n)}
        denoises = getattr(getattr(llm, "program", None), "denoising", None) is not None
        rows = setting_rows(defaults, recommended, llm.n_ctx if llm is not None else 0, denoises=denoises)
        presets = (lambda: list(chat.store.presets()), self.save_preset, self.use_preset)
        self.push_screen(SettingsScreen(rows, self.setting_values, self.change_setting, presets))

    def setting_values(self) -> dict[str, Any]:
        """What is set, the system message among it."""
        return {**self.chat.session.settings, "system message": self.chat.session.system}

    def change_setting(self, name: str, value: Any) -> None:
        """Set one thing; None takes the default again."""
        if name == "system message":
            self.chat.session.system = value or ""
            self.chat.saved()
            return
        self.chat.set(name, value)
        if name in LOAD_SETTINGS:
            self.redraw(to_end=False)

    def set_one(self, text: str) -> None:
        """``/set temp 0.2``."""
        with self.complaining():
            name, _, text = text.partition(" ")
            if not text.strip():
                raise ParameterError("Write /set NAME VALUE, such as /set temp 0.2; Ctrl-G shows all settings.")
            name, value = typed(name, text)
            self.change_setting(name, value)
            self.say(f"{name} = {text.strip()}")

    def set_system(self, text: str) -> None:
        """``/system TEXT``."""
        if text:
            self.change_setting("system message", text)
        self.say(self.chat.session.system or "none", "System message")

    def save_preset(self, name: str) -> None:
        """Keep the settings of this chat under a name."""
        values = self.setting_values()
        self.aside.in_order(
            lambda: self.chat.store.save_preset(name, values), lambda _: self.say(f"Saved as {one_line(name)}.")
        )

    def use_preset(self, name: str) -> None:
        """Take settings that were saved."""
        with self.complaining():
            presets: Mapping[str, dict[str, Any]] = self.chat.store.presets()
            if name not in presets:
                known = ", ".join(presets) or "none"
                raise ParameterError(f"There is no preset {name!r}. Saved: {known}. Ctrl-G, then s saves one.")
            values = dict(presets[name])
            session = self.chat.session
            session.system = str(values.pop("system message", ""))
            values, refused = checked_all(values)
            before, session.settings = session.settings.get("n_ctx"), values
            self.chat.saved()
            self.warn(refused, "Settings")
            if values.get("n_ctx") != before:
                self.chat.load_model()
                self.redraw(to_end=False)
            self.say(f"Settings of {name}.")

    def use_theme(self, name: str) -> None:
        """Other colours, kept for the next time."""
        with self.complaining():
            if name not in self.available_themes:
                raise ParameterError(f"Themes: {', '.join(sorted(self.available_themes))}.")
            self.theme = name

    # -- the palette, leaving --------------------------------------------------------------------------------------

    def get_system_commands(self, screen: Screen[Any]) -> Iterator[SystemCommand]:
        """Every command by its name, and Textual's choice of themes."""
        for command in COMMANDS.values():
            title = f"/{command.name}" + (f"   {command.key}" if command.key else "")
            yield SystemCommand(title, command.help, lambda command=command: self._ask_and_run(command))
        yield SystemCommand("Themes", "Choose the colours from a list", self.search_themes)

    def _ask_and_run(self, command: Command) -> None:
        if command.argument and not command.argument.startswith("["):
            self.push_screen(LineDialog(command.usage), lambda text: command.run(self, text.strip()) if text else None)
        else:
            command.run(self, "")

    def action_keys(self) -> None:
        """All keys and commands."""
        from edgellm.tui.help_screen import HelpScreen

        self.push_screen(HelpScreen())

    def action_leave(self, status: int = 0) -> None:
        """End the application; what is open is saved."""
        self.exit(status, return_code=status)


def exported(session: Session, name: str = "") -> Path:
    """Write a chat to a file that is not there yet. ParameterError when it is; OSError."""
    path = line_path(name) if name else free_path(one_line(session.shown_title) or "chat", ".md")
    if look_at(path) is not None:
        raise ParameterError(f"{path} is there already and stays as it is. Give another name.")
    write_session(path, session)
    return path


def free_path(title: str, ending: str) -> Path:
    """A file of this folder that is not there yet, named after a title."""
    stem = "".join(c if c.isalnum() or c in " -_" else " " for c in title)
    stem = "-".join(stem.split())[:60] or "chat"
    for number in range(1, 10_000):
        path = Path(stem + (f"-{number}" if number > 1 else "") + ending)
        if not path.exists():
            return path
    raise ParameterError(f"{stem}{ending}: the folder is full of such files. Give another name.")
