"""The application: the screen, the clock that draws what the threads have done, and the keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from time import monotonic, thread_time
from typing import Any, ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.css.query import NoMatches
from textual.driver import Driver
from textual.theme import Theme
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static, TextArea
from textual.widgets._toast import ToastHolder
from textual.worker import WorkerFailed

from edgellm.context_overflow import ChatTooLongError
from edgellm.formats.errors import EdgeLLMError
from edgellm.sessions.tree import left_out_of, left_out_span, title_of
from edgellm.tui.actions import ChatActions
from edgellm.tui.answering import is_remote
from edgellm.tui.aside import NOTHING, Aside
from edgellm.tui.attachments import file_names, missing_files, quoted, with_files
from edgellm.tui.chat import Chat
from edgellm.tui.clipboard import in_tmux, into_tmux
from edgellm.tui.commands import COMMANDS, matching
from edgellm.tui.completions import Completions
from edgellm.tui.dialog import SHORT
from edgellm.tui.markdown import prepare
from edgellm.tui.meters import Meters, context_part, stage_part, timing_parts
from edgellm.tui.narrow import WholeFooter, words_of
from edgellm.tui.palette import DARK, LIGHT, palette_of
from edgellm.tui.prompt_input import PromptInput
from edgellm.tui.safe_text import one_line, short_name
from edgellm.tui.transcript import Transcript

FRAME_S = 0.08  # the screen is drawn at most so often while something moves
FIGURES_S = 0.25  # figures beside a growing answer: nobody reads them faster
BAR_S = 1.0  # the scrollbar beside it: 4 ms, since Textual composes the screen for it
SHARE = 20  # drawing may take one part in so many of the time: the model needs the rest
LONGEST_FRAME_S = 0.5  # however slow the drawing is
SHOWN_S = 0.1  # from the first refresh until the terminal has it
AGAIN_S = 2.0  # a second Ctrl-C within this time leaves
PLACEHOLDERS = ("Write a message, / commands, @ file", "Message, / commands, @ file", "Message, /, @")  # what fits
FRAME = 9  # cells around the input, and the cursor
BUSY = "The answer is still coming. Esc stops it."


class ChatApp(ChatActions):
    """``run()`` returns the exit status."""

    CSS_PATH = "app.tcss"
    TITLE = "edgellm"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", show=True),
        Binding("f1", "keys", "Help", show=True, priority=True),  # early: a narrow footer ends where it must
        Binding("ctrl+t", "tokens", "Tokens", show=True, priority=True),
        Binding("ctrl+o", "chats", "Chats", show=True, priority=True),
        Binding("ctrl+n", "new", "New", show=True),
        Binding("ctrl+l", "models", "Model", show=True, priority=True),
        Binding("ctrl+g", "settings", "Settings", show=True, priority=True),
        Binding("ctrl+r", "regenerate", "Again", show=True),
        Binding("ctrl+y", "copy", "Copy", show=False, priority=True),
        Binding("alt+up", "read", "Read", show=False, priority=True),
        Binding("alt+left", "turn(-1)", show=False, priority=True),
        Binding("alt+right", "turn(1)", show=False, priority=True),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+q", "leave", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False, priority=True),
    ]

    def __init__(self, chat: Chat, *, first: str | None = None, note: str | None = None) -> None:
        super().__init__()
        self.chat = chat
        self.first, self.note = first, note
        self.aside = Aside(self.call_later, self.complain)
        self.is_shown = threading.Event()  # the first picture is on the terminal
        for theme in (DARK, LIGHT):
            self.register_theme(theme)
        self.theme = first_theme(self.chat.store.preferences().get("theme"), set(self.available_themes))
        self.palette = palette_of(self.get_css_variables(), self.current_theme.dark, self.no_color)
        self._clock: Timer | None = None
        self._n_ticks = 0
        self._drawn_at = self._told_at = self._barred_at = self._cpu_s = 0.0
        self._drawn: tuple[int, int] = (0, 0)
        self._interrupted = -AGAIN_S
        self.bringing = ""  # a message whose files are being read
        self.ending = False

    def get_driver_class(self) -> type[Driver]:
        """Textual's own driver, with our reader where it is Textual's for a terminal of Linux or macOS."""
        usual = super().get_driver_class()
        if usual.__name__ == "LinuxDriver":
            with contextlib.suppress(ImportError):  # a Textual that is built otherwise
                from edgellm.tui.terminal_driver import TerminalDriver

                return TerminalDriver
        return usual

    def exit(self, *arguments: Any, **options: Any) -> None:
        """End the application; a screen that opens in this moment gets no parts any more."""
        self.ending = True
        super().exit(*arguments, **options)

    def _handle_exception(self, error: Exception) -> None:
        """Show it and end, but for a part that is missing because the application ends."""
        cause = error.error if isinstance(error, WorkerFailed) else error
        if not (isinstance(cause, NoMatches) and (self.ending or not self.is_running)):
            super()._handle_exception(error)

    def compose(self) -> ComposeResult:
        yield Static("", id="head", markup=False)
        yield Transcript(self.palette, self.chat.session.tree.siblings)
        yield Completions()
        yield Meters(self.palette, id="meters")
        with Horizontal(id="prompt-row"):
            yield Static("❯ ", id="prompt-mark", markup=False)
            yield PromptInput(self.chat.store.prompts(), placeholder=PLACEHOLDERS[0])
        yield WholeFooter(show_command_palette=False)

    def on_mount(self) -> None:
        """Input first; the model loads when the first picture is there."""
        self.screen_stack[0].set_focus(self.prompt)
        self._clock = self.set_interval(FRAME_S, self.tick, pause=True)
        self.theme_changed_signal.subscribe(self, self._recolour)
        self.app_resume_signal.subscribe(self, lambda _: self.refresh(layout=True))  # after fg all of it is gone
        self.redraw()
        self.warn([self.note] if self.note else [], "Sessions")
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    loop.add_signal_handler(number, self.action_leave, 128 + number)
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self.set_timer(SHOWN_S, self.is_shown.set)
        if self.chat.llm is None and self.chat.loading is None:
            self.chat.load_model()
        self.wake()
        if self.first:
            self.send(self.first)

    # -- drawing ---------------------------------------------------------------------------------------------------

    def redraw(self, *, to_end: bool = True) -> None:
        """Show the session as it is now."""
        session = self.chat.session
        transcript = self.transcript
        transcript.siblings_of = session.tree.siblings
        answering = self.chat.answering
        if answering is not None:
            transcript.growing = answering.node
        elif self.chat.waiting is None:
            transcript.growing = None
        transcript.welcome = self._welcome()
        path = session.tree.path
        left_out = answering.left_out if answering is not None else left_out_of(path)
        transcript.show(path, left_out_span(path, left_out), to_end=to_end)
        title = Text("  ", end="", no_wrap=True, overflow="ellipsis")
        model = short_name(self.chat.model)
        room = max(self.size.width - len(model) - 6, 8)
        title.append(words_of(one_line(session.shown_title) or "New chat", room - 2), "bold")
        title.truncate(room, overflow="ellipsis", pad=True)
        title.append(f"  {model}", self.palette.mark)
        self.screen_stack[0].query_one("#head", Static).update(title, layout=False)
        self.show_meters()
        self.wake()

    def _welcome(self) -> list[Text]:
        muted = self.palette.muted
        lines = [Text("")] * max(self.size.height // 4 - 2, 0)
        lines += [Text("edgellm", self.palette.heading), Text("")]
        server = self.chat.server
        where = "Everything stays on this machine and" if server is None else f"It goes to {server.authority}; all"
        said = Text(f"Write below. {where} is saved as it is said.", muted)
        lines += said.wrap(self.console, self.transcript.text_width)
        hints = (("/", "commands"), ("@", "bring in a text file"), ("^O", "earlier chats"), ("F1", "all keys"))
        lines += [Text(""), *(Text(f"{key:<4}", self.palette.mark).append(meaning, muted) for key, meaning in hints)]
        room = self.transcript.scrollable_content_region.height
        while len(lines) > room and (blank := next((line for line in lines if not line.plain), None)) is not None:
            lines.remove(blank)  # a low screen has no room for space
        return lines

    def wake(self) -> None:
        """Something moves: let the clock run."""
        if self._clock is not None:
            self._clock.resume()

    def tick(self) -> None:
        """Draw what the threads have done since the last time; at rest the clock stands still.

        A long block is drawn less often, so that the model keeps its pace.
        """
        if not self.is_running:  # the screens are being taken down, and the clock beats on until they are
            return
        answered, loaded = self.chat.poll()
        if loaded is not None:
            self._loaded(loaded)
        if answered is not None:
            self._answered(answered)
        answering = self.chat.answering
        if not self.chat.busy and self.chat.loading is None:
            assert self._clock is not None
            self._clock.pause()
            return
        now, spent_s = monotonic(), thread_time() - self._cpu_s  # of the last picture
        if now - self._drawn_at < min(spent_s * SHARE, LONGEST_FRAME_S) - FRAME_S / 2:  # the clock's nearest beat
            return
        self._drawn_at, self._cpu_s = now, thread_time()
        self._n_ticks += 1
        if answering is not None:
            key = (answering.node.id, len(answering.node.text))
            if key != self._drawn:
                self._drawn = key
                if answering.left_out != self.transcript.n_left_out:
                    self.redraw(to_end=self.transcript.at_end)
                self.transcript.growing = answering.node
                self.transcript.grow()
                if now - self._barred_at >= BAR_S:
                    self._barred_at = now
                    self.transcript.show_bar()
        if answering is None or not answering.node.tokens or now - self._told_at >= FIGURES_S:
            self._told_at = now
            self.show_meters()

    def _loaded(self, loaded: Any) -> None:
        if loaded.error is not None:
            self.complain(loaded.error)
            if self.chat.loading is None:  # else the chat tries once more
                self.stop_waiting()
        for note in self.chat.notes:
            self.warn([note], "Settings")
        self.chat.notes.clear()
        self.redraw(to_end=False)
        if self.chat.llm is not None:  # while the user writes, and not while the first tokens come
            threading.Thread(target=prepare, args=(self.palette,), name="edgellm-markdown", daemon=True).start()

    def stop_waiting(self) -> None:
        """Give up the answer that waits for a model."""
        if self.chat.waiting is not None:
            node = self.chat.waiting[0]
            self.chat.stop()
            self.give_back(node)
            self.redraw()

    def _answered(self, answered: Any) -> None:
        self.transcript.growing = None
        if answered.note:
            self.say(answered.note)
        if isinstance(answered.error, ChatTooLongError) and self.open_long_chat(answered.node, answered.error):
            self.redraw(to_end=False)
            return
        if answered.error is not None:
            self.complain(answered.error)
        if self.chat.given_back:
            self.prompt.put(self.chat.given_back)
            self.chat.given_back = ""
        else:
            self.give_back(answered.node)
        self.redraw(to_end=self.transcript.at_end)

    def show_meters(self) -> None:
        """The line of figures."""
        chat, palette, parts = self.chat, self.palette, []
        answering = chat.answering
        if self.editing is not None:
            parts.append(Text("✎ editing, Esc leaves it", palette.warning))
        if chat.loading is not None:
            parts.append(stage_part(palette, chat.loading.stage, self._n_ticks))
        if answering is not None and not answering.node.timings.get("generation_n") and answering.read[1]:
            parts.append(stage_part(palette, ("reading", *answering.read, ""), self._n_ticks))
        leaf = chat.session.tree.leaf
        answer = answering.node if answering is not None else leaf
        timings = answer.timings if answer is not None else {}
        if chat.llm is not None and chat.llm.n_ctx:
            used = int(timings.get("prompt_n", 0) + timings.get("generation_n", 0))
            n_ctx = chat.llm.n_ctx
            parts.append(context_part(palette, min(used, n_ctx), n_ctx))  # the last token is not in it
        if chat.writer.error is not None:
            parts.insert(0, Text("not saved", palette.error))
        parts += timing_parts(palette, timings, self.memory())
        self.screen_stack[0].query_one(Meters).show(parts)

    def not_saved(self, error: EdgeLLMError) -> None:
        """The file of the chats could not be written; it is tried again, and until then the figures say so."""
        self.complain(error)
        self.show_meters()

    def memory(self) -> int:
        """Bytes of this process that were in memory at most."""
        if self.chat.llm is None or is_remote(self.chat.llm):
            return 0
        from edgellm.machine.memory import peak_rss  # brings NumPy: not before the first picture

        return peak_rss()

    def _recolour(self, theme: Theme) -> None:
        self.palette = palette_of(self.get_css_variables(), theme.dark, self.no_color)
        self.screen_stack[0].query_one(Meters).palette = self.palette
        self.transcript.redraw(self.palette)
        self.redraw(to_end=False)
        self.aside.in_order(lambda: self.chat.store.save_preference("theme", theme.name))

    def on_resize(self, event: events.Resize) -> None:
        """A low screen has no room for space."""
        self.screen_stack[0].set_class(event.size.height < SHORT, "short")
        fitting = (line for line in PLACEHOLDERS if len(line) + FRAME <= event.size.width)
        self.prompt.placeholder = next(fitting, "")
        self.call_after_refresh(self.redraw, to_end=False)

    # -- the input -------------------------------------------------------------------------------------------------

    @on(PromptInput.Sent)
    def _sent(self, event: PromptInput.Sent) -> None:
        self.send(event.text)

    def send(self, text: str) -> None:
        """A command, or a message; while an answer comes the message goes back into the input."""
        self.prompt.remember(text)
        self.clear_notifications()  # they were about the last thing
        self.screen.query(ToastHolder).remove()  # Textual leaves the room they took
        try:
            if COMMANDS.has(text):
                COMMANDS.run(self, text)
                return
            if self.chat.busy or self.bringing:
                self.prompt.put(text)
                self.say("The files are still being read. Esc leaves it." if self.bringing else BUSY)
                return
            if "@" in text:
                self._bring_in(text)
            else:
                self._ask(text, text, [], [])
        except (EdgeLLMError, OSError) as error:
            self._refused(text, error)

    def _bring_in(self, text: str) -> None:
        """Read the files that a message mentions; then it is sent."""
        self.bringing, session = text, self.chat.session

        def read(unwanted: object) -> tuple[str, list[str], list[str]]:
            full, names = with_files(text)
            return full, names, [] if names else missing_files(text)

        def sent(found: tuple[str, list[str], list[str]] | None, error: BaseException | None = None) -> None:
            self.bringing = ""
            if self.chat.session is not session:  # it was for the chat that was open then
                self.prompt.put(text)
            elif found is not None:
                self._ask(text, *found)
            else:
                self._refused(text, error)

        self.aside.newest("files", read, sent, lambda error: sent(None, error))

    def _ask(self, text: str, full: str, names: list[str], missing: list[str]) -> None:
        """Give the model a message with its files."""
        self.transcript.choose(None)
        try:
            self.transcript.growing = self.chat.ask(full, beside=self.editing)
        except (EdgeLLMError, OSError) as error:
            self._refused(text, error)
            return
        self.leave_editing()
        if names:
            self.say(", ".join(names), "Brought in")
            if len(self.chat.session.tree.path) == 2:  # a chat is not called by a file's first lines
                self.chat.session.title = title_of(text)
        elif missing:
            self.say(f"There is no file {', '.join(missing)}; the message went as it stands.")
        self.redraw()
        self.aside.in_order(lambda: self.chat.store.add_prompt(text), failed=NOTHING)  # the writer tells of a full disk

    def _refused(self, text: str, error: BaseException | None) -> None:
        self.prompt.put(text)
        if error is not None:
            self.complain(error)

    @on(PromptInput.Word)
    def _word(self, event: PromptInput.Word) -> None:
        if not self.is_running:
            return
        word = event.word
        if word.startswith("@"):
            self.aside.newest(
                "names", lambda _: file_names(word[1:].lstrip('"')), lambda names: self._names(word, names)
            )
            return
        self.aside.forget("names")
        self._found(word, matching(word) if word else [])

    def _names(self, word: str, names: list[str]) -> None:
        if word == self.prompt.word():
            self._found(word, [(f"@{quoted(name)}", "") for name in names])

    def _found(self, word: str, rows: list[tuple[str, str]]) -> None:
        is_whole = len(rows) == 1 and rows[0][0] == word
        self.prompt.whole_word = word if is_whole else ""
        self._offer([] if is_whole else rows)

    def _offer(self, rows: list[tuple[str, str]]) -> None:
        self.query_one(Completions).offer(rows)
        self.prompt.completing = bool(rows)

    @on(PromptInput.Completing)
    def _completing(self, event: PromptInput.Completing) -> None:
        completions = self.query_one(Completions)
        if event.key in ("up", "down"):
            completions.move(1 if event.key == "down" else -1)
            return
        word = completions.chosen if event.key == "accept" else ""
        self._offer([])
        begun = self.prompt.word().replace('"', "").lower()
        if word and not word.replace('"', "").lower().startswith(begun):  # more was typed meanwhile
            self.prompt.send()
        elif word and word != self.prompt.word():
            self.prompt.complete(word if word.endswith("/") else f"{word} ")
        elif word:
            self.prompt.send()

    @on(OptionList.OptionSelected, "Completions")
    def _clicked(self) -> None:
        self._completing(PromptInput.Completing("accept"))
        self.screen_stack[0].set_focus(self.prompt)

    @on(Transcript.CodeClicked)
    def _code_clicked(self, event: Transcript.CodeClicked) -> None:
        codes = [code.code for code in self.transcript.codes]
        self.copy(str(codes.index(event.block.code) + 1))

    # -- keys ------------------------------------------------------------------------------------------------------

    def action_stop(self) -> None:
        """Stop the answer, or a pull; else leave editing, else go back to the input."""
        if self.bringing:
            text, self.bringing = self.bringing, ""
            self.aside.forget("files")
            self.prompt.put(text)
        elif self.chat.waiting is not None:
            self.stop_waiting()
        elif self.chat.stop():
            self.wake()
        elif self.chat.stop_loading():
            self.redraw(to_end=False)
        elif self.editing is not None:
            self.leave_editing()
            self.show_meters()
        self.transcript.choose(None)
        self.screen_stack[0].set_focus(self.prompt)

    def action_read(self) -> None:
        """From the input to the conversation."""
        self.screen_stack[0].set_focus(self.transcript)  # at once: the next key is meant for it

    def action_interrupt(self) -> None:
        """Ctrl-C: copy what is selected, stop the answer, clear the input, and the second time leave."""
        now = monotonic()
        focused = self.focused
        selected = focused.selected_text if isinstance(focused, TextArea | Input) else ""
        selected = selected or self.screen.get_selected_text() or ""
        if selected:
            self.copy_to_clipboard(selected)
            self.screen.clear_selection()
            self.say("Copied.")
            return
        if now - self._interrupted < AGAIN_S:
            self.action_leave(130)
            return
        self._interrupted = now
        if self.chat.busy:
            self.action_stop()
            return
        if self.prompt.text and len(self.screen_stack) == 1:
            self.prompt.put("")
        self.say("Ctrl-C once more leaves.")

    def copy_to_clipboard(self, text: str) -> None:
        """Everything that copies, the input's own keys too, reaches the clipboard of the user's terminal."""
        if not in_tmux():
            super().copy_to_clipboard(text)
            return
        self._clipboard = text  # what Ctrl-V brings back
        osc_52 = super().copy_to_clipboard
        self.aside.newest("copy", lambda _: into_tmux(text), lambda done: None if done else osc_52(text))


def first_theme(kept: str | None, known: set[str]) -> str:
    """The theme that was chosen last, else one that suits what the terminal says of itself."""
    if kept in known:
        return str(kept)
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return LIGHT.name if ground in ("7", "15") else DARK.name
