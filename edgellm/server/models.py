"""Which models a server has: known by name, loaded when asked for, closed when idle or when another needs the memory.

A request names a model of the list and never a file: what is served is said on the command line, or else is what the
store has. How much a model will need is predicted from its header before it is loaded; the least recently used idle
ones make room. Everything slow runs on threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgellm import loading
from edgellm.formats.errors import EdgeLLMError, ModelNotFoundError, UnsupportedError
from edgellm.measure.model_card import ModelCard, model_card
from edgellm.memory import GIB, PROCESS_NBYTES
from edgellm.server.bodies import shown
from edgellm.server.errors import ServerError
from edgellm.store import catalogue

if TYPE_CHECKING:
    from edgellm.llm import LLM
    from edgellm.machine.progress import StageProgress
    from edgellm.memory import MemoryNeed

WAIT_S = 120.0  # for busy models to become idle, where one of them must make room

CHATS: Sequence[loading.Kind] = ("chat",)
VECTOR_MODELS: Sequence[loading.Kind] = ("embedding", "chat")
RERANKERS: Sequence[loading.Kind] = ("rerank",)
"""The kinds of models that a request may mean which names none, the likeliest first."""

T = TypeVar("T")
Load = Callable[["ModelEntry"], "LLM"]


@dataclass(frozen=True)
class ModelFacts:
    """What a client may know of a model that need not be loaded for it.

    need_nbytes     the system's memory that it will take
    device_nbytes   and of a GPU's own
    kind            what the model is for
    """

    card: ModelCard
    n_ctx: int
    need_nbytes: int
    device_nbytes: int = 0
    kind: loading.Kind = "chat"


@dataclass(eq=False)
class ModelEntry:
    """A model that the server has; ``llm`` while it is loaded.

    names      all that find it, the first is the one that clients are told
    leases     answers that use it now
    expires    time.monotonic at which it may be closed; None keeps it
    lora       scales of adapters that clients have set for all; they outlive ``llm``
    """

    names: tuple[str, ...]
    path: Path
    llm: LLM | None = None
    leases: int = 0
    last_used: float = 0.0
    expires: float | None = None
    facts: ModelFacts | None = None
    load_s: float = 0.0
    lora: dict[str, float] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """The one that clients are told."""
        return self.names[0]

    @property
    def leased(self) -> LLM:
        """Its model, for as long as there is a lease of it. ServerError overloaded once its file has changed."""
        if self.llm is None:
            said = f"The file of {self.name!r} changed while it answered. Send the request again."
            raise ServerError("overloaded", said)
        return self.llm

    @property
    def created(self) -> int:
        """When its file was written, in seconds since 1970; 0 where that is unknown."""
        try:
            return int(self.path.stat().st_mtime)
        except OSError:
            return 0


class Models:
    """The models of a server. Used from one event loop.

    entries      as ``named`` gives them; None serves what the store has
    options      how they are loaded
    load         in place of ``loading.open_model``
    progress     of loading; called on a thread
    keep_alive   seconds that an idle one stays; None for ever, or until its memory is wanted
    budget       bytes that all loaded ones may take; None takes what is free now
    tell         given a line for whoever runs the server, such as the loss of a GPU
    interactive  somebody waits for each answer: steps are kept short
    """

    def __init__(
        self,
        entries: Sequence[ModelEntry] | None,
        options: loading.LoadOptions | None = None,
        *,
        keep_alive: float | None = None,
        budget: int | None = None,
        load: Load | None = None,
        progress: StageProgress | None = None,
        tell: Callable[[str], None] = lambda line: None,
        interactive: bool = True,
    ) -> None:
        self.tell = tell
        self.interactive = interactive
        self._given = None if entries is None else {name: entry for entry in entries for name in entry.names}
        self._stored: dict[str, ModelEntry] = {}
        self.options = loading.LoadOptions() if options is None else options
        self.keep_alive = keep_alive
        self.budget = loading.system_memory().available if budget is None else budget
        self.device = loading.executors.device_memory(self.options.executor)  # as it is before anything is loaded
        self._load = self._open if load is None else load
        self.progress = progress
        self._room = asyncio.Condition()
        self._loading = asyncio.Lock()

    # -- which there are -------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """What clients may ask for; looks at the disk, so not for the event loop."""
        if self._given is None:
            return [model.name for model in catalogue.installed_models()]
        return [entry.name for entry in dict.fromkeys(self._given.values())]

    async def entries(self) -> list[ModelEntry]:
        """All of them, loaded or not."""
        if self._given is not None:
            return list(dict.fromkeys(self._given.values()))
        found = await asyncio.to_thread(catalogue.installed_models)
        kept = {model.name: self._stored.get(model.name) for model in found}
        self._stored = {model.name: kept[model.name] or ModelEntry((model.name,), model.path) for model in found} | {
            name: entry for name, entry in self._stored.items() if entry.llm is not None
        }
        return list(self._stored.values())

    async def usable(self) -> list[ModelEntry]:
        """Those whose files can be read and are of an architecture that edgellm has: what clients are listed."""
        entries = await self.entries()
        found = await asyncio.gather(*map(self.facts, entries), return_exceptions=True)
        wrong = [one for one in found if isinstance(one, BaseException) and not isinstance(one, EdgeLLMError | OSError)]
        if wrong:
            raise wrong[0]
        return [entry for entry, facts in zip(entries, found, strict=True) if isinstance(facts, ModelFacts)]

    def adapters(self) -> list[str]:
        """The names of the LoRA adapters of the only model."""
        return [choice.own_name for choice in self.options.lora]

    def adapter_of(self, name: str) -> str | None:
        """The adapter of a name ``model:adapter``."""
        known = self._given or {}
        named = (one for one in self.adapters() if name.endswith(f":{one}") and name.removesuffix(f":{one}") in known)
        return next(named, None) if name not in known else None

    def scales_of(self, name: str) -> dict[str, float] | None:
        """How much of which adapter such a name means; None for a model's own name."""
        adapter = self.adapter_of(name)
        return next(({adapter: one.named_scale} for one in self.options.lora if one.own_name == adapter), None)

    async def find(self, name: str | None, kinds: Sequence[loading.Kind] = CHATS) -> ModelEntry:
        """The entry of a name; without one the first of these kinds, or else of all. ServerError not_found."""
        if name and (adapter := self.adapter_of(name)) is not None:
            name = name.removesuffix(f":{adapter}")
        known = (self._given if self._given is not None else self._stored).get(name or "")
        if known is not None:
            return known
        if not name and (usable := await self.usable()):
            return min(usable, key=lambda entry: _rank(entry, kinds))
        entries = await self.entries()
        for entry in entries:
            if name and (name in entry.names or name in map(shown, entry.names)):
                return entry
        have = ", ".join(entry.name for entry in entries[:8]) or "none; `edgellm pull` brings one"
        raise ServerError(
            "not_found", f"model: there is no {(name or 'model')[:100]!r} here. There is: {have}.", "model"
        )

    async def facts(self, entry: ModelEntry) -> ModelFacts:
        """What the header of its file says, and the context that this server gives it."""
        if entry.facts is None:
            entry.facts = await _of_file(entry, self._read_facts)
        return entry.facts

    def _read_facts(self, entry: ModelEntry) -> ModelFacts:
        if (llm := entry.llm) is not None:
            return self._facts(model_card(llm.gguf), llm.n_ctx, llm.memory_estimate, llm.kind)
        with loading.open_program(entry.path, self.options.kv_overrides) as (gguf, program):
            try:
                plan = loading.planned(program, gguf, self.options)
            except UnsupportedError as error:
                if error.code not in ("NO_NEXTN", "DRAFT_MODEL", "KV_KEEP", "CACHE_TYPE"):
                    raise
                # it is there all the same; whoever asks for it is told why it cannot be loaded so
                bare = replace(self.options, speculate=None, draft=None)
                plain = replace(bare, kv_keep=None, cache_type_k="f16", cache_type_v="f16")
                plan = loading.planned(program, gguf, plain)
            plan.close()
            facts = self._facts(model_card(gguf), plan.n_ctx, plan.need, loading.kind_of(program))
        gguf.close()
        return facts

    def _facts(self, card: ModelCard, n_ctx: int, need: MemoryNeed, kind: loading.Kind) -> ModelFacts:
        return ModelFacts(card, n_ctx, need.of_system(self.device), need.of_device(self.device), kind)

    # -- loaded on demand ------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lease(
        self, name: str | None, keep_alive: float | None = None, kinds: Sequence[loading.Kind] = CHATS
    ) -> AsyncIterator[ModelEntry]:
        """A loaded model for as long as the block takes. Raises what loading raises.

        Nobody closes it meanwhile, unless its file has changed: then it answers no more, and the next lease loads it.
        """
        entry = await self.find(name, kinds)
        entry.leases += 1
        llm = None
        try:
            await self._loaded(entry)
            llm = entry.llm
            yield entry
        except EdgeLLMError as error:
            if error.code == "MODEL_FILE_CHANGED" and entry.llm is llm:
                self._tell_notices(entry)
                entry.facts = None
                await self.unload(entry)
            raise
        finally:
            entry.leases -= 1
            self._tell_notices(entry)
            entry.last_used = time.monotonic()
            kept = self.keep_alive if keep_alive is None else keep_alive
            entry.expires = None if kept is None or kept < 0 else entry.last_used + kept
            await self._notify()

    def _tell_notices(self, entry: ModelEntry) -> None:
        for notice in getattr(entry.llm, "take_notices", list)():
            self.tell(f"{entry.name}: {notice}")

    async def _loaded(self, entry: ModelEntry) -> None:
        if entry.llm is not None:
            return
        # goes on when the client that asked for it leaves: others may wait for it, and threads cannot be stopped
        await asyncio.shield(asyncio.ensure_future(self._load_once(entry)))

    async def _load_once(self, entry: ModelEntry) -> None:
        async with self._loading:
            if entry.llm is not None:
                return
            facts = await self.facts(entry)
            await self._make_room(entry, facts.need_nbytes - PROCESS_NBYTES, facts.device_nbytes)
            started = time.monotonic()
            llm = await _of_file(entry, self._load)
            llm.engine.scheduler.interactive = self.interactive
            if entry.lora is not None:
                llm.set_adapters(entry.lora)
            entry.llm, entry.load_s = llm, time.monotonic() - started
            entry.facts = self._facts(facts.card, llm.n_ctx, llm.memory_estimate, facts.kind)
            entry.last_used = time.monotonic()

    def _open(self, entry: ModelEntry) -> LLM:
        from edgellm.llm import LLM

        return LLM(loading.open_model(entry.path, self.options, self.progress))

    def _has_room(self, loaded: Sequence[ModelEntry], need: int, on_device: int) -> bool:
        """Whether so many bytes fit beside those that are loaded."""
        needs = [entry.llm.memory_estimate for entry in loaded if entry.llm is not None]
        taken = sum(one.of_system(self.device) - PROCESS_NBYTES for one in needs)
        there = sum(one.of_device(self.device) for one in needs)
        free = self.device.available if self.device else 0
        return taken + need <= self.budget and there + on_device <= free

    async def _make_room(self, entry: ModelEntry, need: int, on_device: int) -> None:
        """Close idle models, the longest unused first, until ``need`` bytes fit, and ``on_device`` on a GPU."""
        deadline = time.monotonic() + WAIT_S
        while (loaded := self.loaded()) and not self._has_room(loaded, need, on_device):
            idle = [one for one in loaded if one.leases == 0]
            if idle:
                await self.unload(min(idle, key=lambda one: one.last_used))
                continue
            if time.monotonic() > deadline:
                raise ServerError(
                    "overloaded",
                    f"{entry.name} needs {(need + on_device) / GIB:.2f} GiB, and the models that have them are busy: "
                    f"{', '.join(one.name for one in loaded)}. Ask again, or start the server with more --memory.",
                )
            async with self._room:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), 1.0)

    def loaded(self) -> list[ModelEntry]:
        """Those that are in memory."""
        every = (self._given if self._given is not None else self._stored).values()
        return [entry for entry in dict.fromkeys(every) if entry.llm is not None]

    async def _notify(self) -> None:
        async with self._room:
            self._room.notify_all()

    # -- and closed again ------------------------------------------------------------------------------------------

    async def unload(self, entry: ModelEntry) -> None:
        """Free an idle model; what runs on it ends with an error."""
        llm, entry.llm = entry.llm, None
        if llm is not None:
            await asyncio.to_thread(llm.close)

    def forget(self, entry: ModelEntry) -> LLM:
        """Leave a loaded model that cannot be closed to itself; the next request loads it anew."""
        llm, entry.llm = entry.llm, None
        assert llm is not None, "it is loaded"
        return llm

    async def close_idle(self) -> None:
        """Close what was idle for too long."""
        for entry in self.loaded():
            if entry.leases == 0 and entry.expires is not None and time.monotonic() >= entry.expires:
                await self.unload(entry)

    async def close(self) -> None:
        """Free all of them."""
        for entry in self.loaded():
            await self.unload(entry)


async def _of_file(entry: ModelEntry, read: Callable[[ModelEntry], T]) -> T:
    """What is read of its file, on a thread. ServerError not_found for one that is gone: its place is no client's."""
    try:
        return await asyncio.to_thread(read, entry)
    except ModelNotFoundError:
        if entry.path.exists():
            raise
        said = f"model: the file of {entry.name!r} is gone. Bring it back, or ask for another model."
        raise ServerError("not_found", said, "model") from None


def _rank(entry: ModelEntry, kinds: Sequence[loading.Kind]) -> int:
    """The place of its kind; its facts are known."""
    return [*kinds, entry.facts.kind].index(entry.facts.kind) if entry.facts is not None else len(kinds)


def named(given: Iterable[str], fetch: Callable[[str], Path], aliases: Sequence[str] = ()) -> list[ModelEntry]:
    """Entries for what the command line names; ``fetch`` gives the file of one. Aliases are further names of the first.

    A model of the catalogue keeps its name; a path is known by its file's name, with and without ``.gguf``, and as it
    was written.
    """
    entries: list[ModelEntry] = []
    taken: set[str] = set()
    for text in given:
        path = fetch(text)
        names = [text] if not os.path.exists(text) else [path.stem, path.name, text]
        names += aliases if not entries else ()
        own = tuple(name for name in dict.fromkeys(names) if name not in taken) or (str(path),)
        taken |= set(own)
        entries.append(ModelEntry(own, path))
    if not entries:
        raise ModelNotFoundError("there is no model to serve. Name one, or bring one with `edgellm pull smollm2`.")
    return entries
