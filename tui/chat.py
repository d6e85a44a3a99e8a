"""What the application does, without a screen: asking, answering again, branching, sessions, models.

One ``Chat`` is used from the thread of the screen alone; its threads are ``Answering``, ``Loading`` and the writer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edgellm.context_overflow import SUMMARY_REQUEST
from edgellm.formats.errors import EdgeLLMError, MemoryWouldExceedError, ParameterError
from edgellm.generation import TokenLogprob
from edgellm.sessions import MessageNode, Session, SessionStore, SessionWriter
from edgellm.sessions.settings import checked
from edgellm.sessions.tree import prompt_messages
from edgellm.tui import aside, kept_state
from edgellm.tui.answering import Answering, Loading, Sent, is_remote, spelled
from edgellm.tui.long_chat import compose_answer, compose_summary

if TYPE_CHECKING:
    from edgellm.remote.model import RemoteServer

LOAD_SETTINGS = ("n_ctx",)  # take effect when the model is loaded
OWN_SETTINGS = ("context_overflow",)  # the chat's, not the model's
NO_ROOM = (ParameterError, MemoryWouldExceedError, MemoryError)  # what a setting that asks for too much ends in


class SummingUp(NamedTuple):
    """A summary on its way: the message it grows in, what is to be asked after it, and the chat it is of."""

    node: MessageNode
    text: str
    old: Session


class Chat:
    """A session, a model, and at most one answer at a time.

    load            as ``edgellm.load``
    load_options    for every model
    settings        of new sessions: what the command line said
    server          where all models are, instead of this machine
    """

    def __init__(
        self,
        store: SessionStore,
        load: Callable[..., Any],
        model: str,
        *,
        load_options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        system: str = "",
        server: RemoteServer | None = None,
    ) -> None:
        self.store = store
        self.writer = SessionWriter(store)
        self.load = load
        self.server = server
        self.model = model
        self.load_options = dict(load_options or {})
        self.first_settings = dict(settings or {})
        self.first_system = system
        self.llm: Any = None
        self.loading: Loading | None = None
        self.answering: Answering | None = None
        self.states = store.path.parent / "kv"
        self._fresh = False  # whether the model has not yet been given what it had read of the session
        self._read_more = False  # whether it has read more since the state was kept
        self._keeping: threading.Thread | None = None  # writes such a state
        self.waiting: tuple[MessageNode, Callable[[], None]] | None = None  # an answer that begins with the model
        self._model_before = ""  # the last one that could be loaded
        self._tried: list[dict[str, Any]] = []  # LOAD_SETTINGS that the model was loaded with, the last one now
        self._worked: dict[str, Any] = {}  # those of the last model that could be loaded
        self.notes: list[str] = []  # what the user is to be told
        self.summing_up: SummingUp | None = None
        self.given_back = ""  # a message that was not asked after all
        self.session = self._load_for = self._new_session()

    # -- sessions --------------------------------------------------------------------------------------------------

    def _new_session(self) -> Session:
        return Session(model=self.model, system=self.first_system, settings=dict(self.first_settings))

    def new_session(self) -> None:
        """Begin anew with the settings of the command line."""
        self.leave_session()
        self.session = self._new_session()

    def open_session(self, session_id: int) -> None:
        """Go on with a session of the store. ParameterError when it is gone."""
        self.enter(self.loaded(session_id))

    def loaded(self, session_id: int) -> Session:
        """A session of the store with all that was said; from any thread. ParameterError when it is gone."""
        self.writer.flush()
        return self.store.load(session_id)

    def enter(self, session: Session) -> None:
        """Go on with a session that was loaded."""
        self.leave_session()
        self.session = session
        self._fresh = True
        self.writer.known(session)

    def leave_session(self) -> None:
        """Stop, and keep what the model has read of the session."""
        self._leave_summary()
        self.halt()
        self._keep()
        self._fresh = self._read_more = False

    def _keep(self) -> None:
        """Keep what the model has read of the session, beside the screen: it may be much to write."""
        if self.llm is None or not self._read_more or is_remote(self.llm):
            return
        before, llm, session = self._keeping, self.llm, self.session

        def keep() -> None:
            if before is not None:
                before.join()
            kept_state.keep(llm, self.states, session, session.settings.get("template_kwargs"))

        self._keeping = threading.Thread(target=keep, name="edgellm-keep", daemon=True)
        self._keeping.start()
        self._keeping.join(aside.BLINK_S)

    def _kept(self) -> None:
        """Wait until all of it is written; a model is closed after that."""
        if self._keeping is not None:
            self._keeping.join()

    def delete_session(self, session_id: int) -> Callable[[], None]:
        """Begin anew when it is this one; gives what is left to do, from any thread: deleting it."""
        old = self.session if session_id == self.session.id else None
        if old is not None:
            self.halt()
            self.session = self._new_session()

        def delete() -> None:
            self._kept()  # or what is being written of it would come back
            if old is not None:
                self.writer.forget(old)
            self.store.delete(session_id)
            kept_state.forget(self.states, session_id)

        return delete

    def saved(self, node: MessageNode | None = None) -> None:
        """Note that the session, and a message of it, are to be written."""
        if self.session.tree.roots:
            self.writer.changed(self.session, node)

    # -- answers ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way or waits for the model."""
        return self.answering is not None or self.waiting is not None

    def ask(self, text: str, *, beside: MessageNode | None = None) -> MessageNode:
        """A message behind the leaf (or in the place of ``beside``), and its answer; gives the answer."""
        tree = self.session.tree
        if beside is not None and all(root is not beside.path()[0] for root in tree.roots):
            beside = None  # of a chat that is no more the open one
        if beside is None and tree.leaf is not None and tree.leaf.role == "user":
            beside = tree.leaf  # it got no answer; roles go on taking turns
        if beside is not None and not beside.children:  # nobody answered it: to ask once more is no branch
            asked = beside
            asked.text = text
            tree.select(asked)
        else:
            asked = tree.add("user", text, beside.parent if beside is not None else tree.leaf, finish_reason="stop")
        self.saved(asked)
        return self._answer(asked)

    def regenerate(self, node: MessageNode) -> MessageNode:
        """Another answer in the place of ``node``, or to it when it is the user's."""
        asked = node if node.role == "user" else node.parent
        if asked is None:
            raise ParameterError("There is no message to answer again. Write one first.")
        return self._answer(asked)

    def go_on(self, node: MessageNode) -> MessageNode:
        """Continue an answer that was cut off or stopped."""
        if node.role != "assistant":
            raise ParameterError("Only an answer can be continued.")
        if node.children:
            raise ParameterError("There are messages behind this answer. Regenerate it, or branch from a token.")
        self._start(node, node.tokens if node.model == self.model else ())
        return node

    def branch(self, node: MessageNode, position: int, other: TokenLogprob) -> MessageNode:
        """A sibling of an answer that has ``other`` at ``position`` and goes on from there."""
        if node.model != self.model:
            raise ParameterError(f"These tokens are {node.model}'s. Load that model to branch from them.")
        kept = list(node.tokens[:position])
        was = node.tokens[position]
        kept.append(TokenLogprob(other.token, other.bytes, other.logprob, was.top, other.after, other.cut_by))
        branched = self.session.tree.add("assistant", "", node.parent, model=self.model)
        branched.tokens = kept
        if self.llm is not None:
            branched.text = spelled(self.llm, kept)
        self.saved(branched)
        self._start(branched, kept)
        return branched

    def stop(self) -> bool:
        """Stop the answer, or forget the one that waits; whether there was one."""
        if self.answering is not None:
            self.answering.stop()
            return True
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self._settle(waiting[0])
        return waiting is not None

    def halt(self) -> None:
        """Stop and see the end of it, before the session changes."""
        self.stop()
        self._halt_answer()

    def _halt_answer(self) -> None:
        if self.answering is not None:
            if is_remote(self.answering.llm):
                self.answering.leave()  # a server may be silent for long
            else:
                self.answering.stop()
                self.answering.wait(5)
            self.poll()

    def _answer(self, asked: MessageNode, way: str | None = None) -> MessageNode:
        node = self.session.tree.add("assistant", "", asked, model=self.model)
        self._start(node, (), way)
        return node

    def answer_long(self, node: MessageNode, way: str) -> MessageNode:
        """Answer, or go on with an answer, that the context was too short for; ``way`` is for this time."""
        if node.text:
            self._start(node, node.tokens if node.model == self.model else (), way)
            return node
        assert node.parent is not None
        return self._answer(node.parent, way)

    def go_on_summarized(self, asked: MessageNode) -> MessageNode:
        """A new chat that begins with a summary of this one up to ``asked``, which is asked there then."""
        if self.busy or self.llm is None:
            raise ParameterError("An answer is on its way, or the model. Esc stops it.")
        old = self.session
        messages = prompt_messages(old.system, asked.path()[:-1])
        self.leave_session()
        title = f"{old.shown_title} (continued)"
        self.session = session = Session(title=title, model=self.model, system=old.system, settings=dict(old.settings))
        request = session.tree.add("user", SUMMARY_REQUEST, finish_reason="stop")
        node = session.tree.add("assistant", "", request, model=self.model)
        self.summing_up = SummingUp(node, asked.text, old)
        self._begin(node, compose_summary(messages, self.options()))
        return node

    def _summed_up(self, answered: Answering) -> None:
        """The summary stands: ask what was to be asked. Without it the old chat is there again."""
        summed_up, self.summing_up = self.summing_up, None
        if summed_up is None:
            return
        if answered.error is None and summed_up.node.text and summed_up.node.finish_reason != "cancelled":
            for node in self.session.tree.path:
                self.saved(node)
            self.ask(summed_up.text)
            return
        self._back_to(summed_up.old)
        self.given_back = summed_up.text

    def _leave_summary(self) -> None:
        """A summary on its way is left with its chat: nothing is asked behind it."""
        if self.summing_up is not None:
            old, self.summing_up = self.summing_up.old, None
            self.halt()
            self._back_to(old)

    def _back_to(self, old: Session) -> None:
        """The chat that was to be summed up is there again; the one for the summary is forgotten."""
        new, self.session = self.session, old

        def forget() -> None:
            self.writer.forget(new)
            with contextlib.suppress(EdgeLLMError):  # a locked file keeps it: a chat too many, and none too few
                self.store.delete(new.id)

        threading.Thread(target=forget, name="edgellm-forget", daemon=True).start()

    def _start(self, node: MessageNode, prefix: Any, way: str | None = None) -> None:
        if self.busy:
            raise ParameterError("An answer is on its way. Esc stops it.")
        session = self.session

        def begin() -> None:
            node.model = session.model = self.model
            chosen = way or session.settings.get("context_overflow", "ask")
            compose = compose_answer(session, node, prefix, self.options(), chosen)
            if node.text and not prefix:
                node.tokens.clear()  # another model's
            if prefix and not node.text:  # branched while no model was there to spell it
                node.text = spelled(self.llm, prefix)
            self._begin(node, compose)

        if self.llm is None:
            self.waiting = (node, begin)
            if self.loading is None:  # the last one could not be loaded; that will be told once more
                self.load_model()
        else:
            begin()

    def _begin(self, node: MessageNode, compose: Callable[[Answering], Sent]) -> None:
        session = self.session

        def changed() -> None:
            if node.text or node.tokens:
                self.writer.changed(session, node)

        def prepare() -> str:
            return kept_state.take(self.llm, self.states, session.id)

        first = prepare if self._fresh and not is_remote(self.llm) else None
        self._fresh, self._read_more = False, True
        self.answering = Answering(self.llm, node, compose, self.options(), changed, first).start()

    def options(self) -> dict[str, Any]:
        """What ``LLM.stream`` is given besides the prompt: the session's settings."""
        return {k: v for k, v in self.session.settings.items() if k not in (*LOAD_SETTINGS, *OWN_SETTINGS)}

    def set(self, name: str, value: Any) -> None:
        """Keep a setting, None for its default, after a look at whether it can work. ParameterError."""
        settings = self.session.settings
        if self.server is not None and name in LOAD_SETTINGS:
            raise ParameterError(f"{name} is the server's: it is set where that is started.")
        if value is not None:
            value = checked(name, value)
        here = self.llm is not None and not is_remote(self.llm)
        n_vocab = getattr(self.llm.tokenizer, "n_vocab", None) if here else None
        if name == "logit_bias" and value and n_vocab is not None and max(value) >= n_vocab:
            raise ParameterError(f"logit_bias: token {max(value)} is not in the vocabulary of {n_vocab}.")
        if value is None:
            settings.pop(name, None)
        else:
            settings[name] = value
        if name in LOAD_SETTINGS:
            self.load_model()  # kept when it has worked
        else:
            self.saved()

    def poll(self) -> tuple[Answering | None, Loading | None]:
        """The answer and the model that came to an end since the last call."""
        answered = loaded = None
        if self.answering is not None and self.answering.finished.is_set():
            answered, self.answering = self.answering, None
            self._settle(answered.node)
            self._summed_up(answered)
            if getattr(answered.error, "code", "") == "MODEL_FILE_CHANGED" and answered.llm is self.llm:
                self.llm, self._read_more = None, False  # it answers no more; the next message loads it anew
                answered.llm.close()
        if self.loading is not None and self.loading.finished.is_set():
            loaded, self.loading = self.loading, None
            self.llm = loaded.llm
            if self.llm is None:
                self._go_back(loaded)
                return answered, loaded
            self._settle_load()
            if self.waiting is not None:
                (_, begin), self.waiting = self.waiting, None
                try:
                    begin()
                except EdgeLLMError as error:
                    loaded.error = error
        return answered, loaded

    def _settle(self, node: MessageNode) -> None:
        """An answer without a word is taken back, so that roles go on taking turns; its question stays."""
        tree = self.session.tree
        if node.text or node.tokens:
            node.finish_reason = node.finish_reason or "cancelled"
            self.saved(node)
        elif node in tree.siblings(node):
            tree.cut(node)
            self.saved()

    # -- the model -------------------------------------------------------------------------------------------------

    def load_model(self, name: str | None = None, instead: Mapping[str, Any] | None = None) -> None:
        """Load a model in the place of the one that is there; the conversation stays, and so does what waits.

        instead   of the session's settings that have just failed: whether they are to blame is known when it loads
        """
        self._leave_summary()
        self._halt_answer()
        self._keep()
        self._load_for = self.session
        self._fresh, self._read_more = True, False
        before, self.llm = self.llm, None
        if before is not None:
            self._model_before = self.model
        if self.loading is not None:
            before = self.loading.take_before()
            self.loading.abandon()
        self.model = name or self.model
        if self.server is not None:
            self.model = self.server.full_name(self.model)
        own = {name: self.session.settings[name] for name in LOAD_SETTINGS if name in self.session.settings}
        chosen = own if instead is None else dict(instead)
        self._tried = [chosen] if instead is None else [*self._tried, chosen]
        options = {**self.load_options, **chosen}
        self.loading = Loading(self.load, self.model, options, before, self._kept).start()

    def stop_loading(self) -> bool:
        """Back to the model that was there, while it is still open: during a pull. Whether there was one."""
        if self.loading is None or (before := self.loading.take_before()) is None:
            return False
        self.loading.abandon()
        self.loading = None
        self.llm, self.model = before, self._model_before
        return True

    def _settle_load(self) -> None:
        """The model is there: settings that it could not be loaded with are to blame, the others are kept."""
        settings, self._worked = self.session.settings, self._tried[-1]
        if self.session is not self._load_for:
            return  # they are another chat's
        for name in LOAD_SETTINGS:
            if settings.get(name) != self._worked.get(name) and len(self._tried) > 1:
                now = self._worked.get(name, "the default")
                if name in settings:
                    self.notes.append(f"{name} = {settings.pop(name)} did not work; it is {now} again.")
        settings |= self._worked
        self.saved()

    def _go_back(self, failed: Loading) -> None:
        """A model or a setting that does not work does not cost the model that was there."""
        instead = next((one for one in (self._worked, {}) if one not in self._tried), None)
        if instead is not None and isinstance(failed.error, NO_ROOM):
            self.load_model(failed.name, instead)
            return
        self.llm = failed.take_before()
        if self.llm is not None:
            self.model = self._model_before
        elif self._model_before not in ("", failed.name):
            name, self._model_before = self._model_before, ""
            self.load_model(name)

    def close(self) -> None:
        """Stop everything and write what is waiting."""
        self._leave_summary()
        self.stop()
        if self.loading is not None:
            self.loading.abandon()
            self.llm = self.loading.take_before()
        try:
            self.leave_session()
        finally:
            self.writer.close()
            self._kept()
        if self.llm is not None:
            self.llm.close()
        self.store.close()
