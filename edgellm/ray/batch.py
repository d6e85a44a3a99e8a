"""A batch on many machines: actors answer lines, and whoever started it writes the file of answers, alone.

A line is on its way to one worker at a time, and is answered once its answer is in the file. A worker that is gone, or
whose machine is, is started anew by Ray where there is room, and its lines go to the others; so do those of one that
cannot load the model, and a batch ends when none can. The same two files go on where they were, here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from edgellm import loading
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.machine.terminal import echo
from edgellm.ray.room import cpus_wanting
from edgellm.ray.same_file import check_same, files_hash, proved
from edgellm.server.batch import Here, PassingError
from edgellm.server.batch_file import Place
from edgellm.server.errors import ServerError
from edgellm.server.models import Models, named
from edgellm.server.server import Server
from edgellm.store import catalogue

TRIES = 10  # workers that may be lost with a line: one that ends them must not go round for ever
SUSPECT = 3  # after so many it goes one at a time with others like it: one that ends workers must not take them along
PAUSE_S = 0.5  # until a lost worker is asked again whether it is there


class Worker:
    """Models in one process. Made by Ray.

    files   the hash of each model's, as whoever writes the answers has them
    """

    def __init__(self, models: Sequence[str], options: loading.LoadOptions, files: Mapping[str, str]) -> None:
        self._models, self._options, self._files = models, options, files
        self._ready: set[str] = set()
        self._making = asyncio.Lock()
        self._here: Here | None = None

    async def _made(self) -> Here:
        """Not made in ``__init__``: an actor whose making failed is gone for ever, and Ray does not make it anew."""
        async with self._making:
            if self._here is None:
                entries = await asyncio.to_thread(named, self._models, catalogue.fetched)
                models = Models(entries, self._options, interactive=False)
                self._here = Here(Server(models, max_requests=1 << 30))
        return self._here

    async def load(self, model: str) -> None:
        """See ``Answering``; FormatError where the files are others."""
        here = await self._made()
        try:
            await here.load(model)
        except ServerError as error:
            raise EdgeLLMError(error.message, code="BATCH") from None
        for entry in here.server.models.loaded():
            if entry.llm is not None:
                found = await asyncio.to_thread(files_hash, entry.llm.gguf, self._options)
                check_same(entry.path, found, self._files[entry.name], "whoever writes the answers")
        self._ready.add(model)

    async def answer(self, place: Place, raw: bytes) -> tuple[bytes, bool]:
        """See ``Answering``."""
        if place.model not in self._ready:  # it was lost, and is here again before anybody found out
            await self.load(place.model)
        return await (await self._made()).answer(place, raw)


class Workers:
    """The ``Answering`` of so many actors of the cluster that this process is connected to.

    models      names, references, or paths that every machine has, this one too
    options     how each worker loads them; ``n_threads`` are also the CPUs that Ray keeps for it
    """

    def __init__(self, models: Sequence[str], options: loading.LoadOptions, n: int) -> None:
        n_threads = options.n_threads or 1
        options = replace(options, n_threads=n_threads)
        if (found := cpus_wanting(n_threads)) is not None:
            raise ParameterError(f"A worker with {n_threads} threads wants {n_threads} CPUs, and {found}.")
        files = {entry.name: proved(entry.path, options) for entry in named(models, catalogue.fetched)}
        # a line that was lost is given out anew here, and not by Ray, which knows not who is idle
        make = ray.remote(Worker).options(
            num_cpus=n_threads, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=0
        )
        self.actors = [make.remote(list(models), options, files) for _ in range(n)]
        self._model = ""
        self._busy: dict[int, set[str]] = {}  # lines that are with each worker that has the model
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, BaseException] = {}  # workers that cannot load the model, and why
        self._changed = asyncio.Condition()
        self._alone = asyncio.Lock()

    async def load(self, model: str) -> None:
        """See ``Answering``: done when one of them has it."""
        for task in self._coming.values():
            task.cancel()
        self._model, self._busy, self._failed = model, {}, {}
        self._coming = {number: self._bring(number) for number in range(len(self.actors))}
        await self._ready()

    def _bring(self, number: int) -> asyncio.Task[None]:
        return asyncio.create_task(self._until_loaded(number))

    async def _until_loaded(self, number: int) -> None:
        while True:
            try:
                await self.actors[number].load.remote(self._model)
                self._busy[number] = set()
                break
            except RayTaskError as error:
                self._give_up(number, error)
                break
            except RayError as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:  # Ray does not make it anew
                    self._give_up(number, error)
                    break
                await asyncio.sleep(PAUSE_S)
        async with self._changed:
            self._changed.notify_all()

    def _give_up(self, number: int, error: RayError) -> None:
        """A worker that cannot load the model has no part in its lines; whoever runs the batch is told why."""
        cause = getattr(error, "cause", None)
        why = cause if isinstance(cause, EdgeLLMError) else error
        self._failed[number] = why
        if len(self._failed) < len(self.actors):  # else it is the error of the batch
            echo(f"A worker cannot load {self._model or 'the model'} and is left out: {why}", err=True)

    async def _ready(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._busy or len(self._failed) == len(self.actors))
        if not self._busy:
            raise next(iter(self._failed.values()))

    async def _tried(self, place: Place, raw: bytes) -> tuple[bytes, bool] | None:
        """The answer of a worker, or None where it was lost."""
        await self._ready()
        number = min(self._busy, key=lambda one: len(self._busy[one]))
        lines = self._busy[number]
        lines.add(place.id)
        try:
            line, is_wrong = await self.actors[number].answer.remote(place, raw)
            return bytes(line), bool(is_wrong)
        except RayTaskError as error:
            if isinstance(error.cause, PassingError):
                raise PassingError(*error.cause.args) from None
            if not isinstance(error.cause, EdgeLLMError):
                raise
            # it was lost, is there again, and could not load the model
            if self._busy.get(number) is lines:
                del self._busy[number]
                self._give_up(number, error)
                async with self._changed:
                    self._changed.notify_all()
        except RayError:
            if self._busy.get(number) is lines:  # the first of them that finds it out
                del self._busy[number]
                self._coming[number] = self._bring(number)
        finally:
            lines.discard(place.id)
        return None

    async def answer(self, place: Place, raw: bytes) -> tuple[bytes, bool]:
        """See ``Answering``."""
        for n_lost in range(TRIES):
            async with self._alone if n_lost >= SUSPECT else nullcontext():
                if (told := await self._tried(place, raw)) is not None:
                    return told
        raise PassingError(f"{TRIES} workers in a row were lost with this line.")

    async def close(self) -> None:
        """See ``Answering``."""
        for task in self._coming.values():
            task.cancel()
        for actor in self.actors:
            with suppress(RayError):
                ray.kill(actor)
