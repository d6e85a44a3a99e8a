"""A model over several machines: each has some of its layers, in an actor of Ray, and a step goes from one to the next.

A stage is a part of the program as a GPU's would be (kernels/split.py), and loads the weights of its layers and no
others. What one stage has written and the next one reads goes from actor to actor; only logits come back here. One
answer keeps one stage busy at a time, so there are several lanes: engines with caches of their own on the same stages,
whose steps follow each other through them. A token's numbers come from the same ops, so answers are those of one
machine to the last bit. When a stage is gone, all are started anew and answers go on from their tokens.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from edgellm import loading
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.formats.errors import DeviceLostError, EdgeLLMError, ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.generation import ChunkStream, Generation
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.kv import CachePool, StateLayer, groups_of
from edgellm.kernels.placement import layers_of
from edgellm.kernels.program import Batch, Executor, Hook, Program
from edgellm.kernels.split import SplitExecutor, cut
from edgellm.llm import LLM
from edgellm.memory import step_tokens
from edgellm.ray.room import cpus_wanting
from edgellm.ray.same_file import check_same, file_hash
from edgellm.sampling import SamplingParams
from edgellm.tokenizer import Tokenizer

PIECE_NBYTES = 90_000  # Ray sends up to 100 kB along with its answer, and the rest by its object store: 2 ms more
MAX_PIECES = 8
PLACE_S = 60.0  # for all stages to have a machine and a process; loading takes as long as it takes

TAKEN = frozenset(("n_ctx", "n_threads", "n_parallel", "max_tokens_per_step", "chat_template", "kv_overrides", "force"))
"""The options of loading that stages know."""

Command = tuple[Any, ...]
"""What a stage is told: the name of a method of ``PartExecutor``, and its arguments; a value of ``write`` by its place
among the values that travel beside the commands."""


class StageFacts(NamedTuple):
    """One stage.

    layers          first and last
    weights_nbytes  of its tensors; ``cache_nbytes`` of all lanes when they are full
    resident_nbytes of its process now, pages of the file included
    """

    number: int
    node: str
    layers: tuple[int, int]
    weights_nbytes: int
    cache_nbytes: int
    resident_nbytes: int


class Stage:
    """A part of the program, an executor of it for each lane. Made by Ray."""

    def __init__(self, number: int) -> None:
        self.number = number

    def node(self) -> str:
        """Where it is: it answers as soon as it has a place, before it loads anything."""
        return str(ray.get_runtime_context().get_node_id())

    def load(
        self, model: str, overrides: Any, n_ctx: int, sides: tuple[int, ...], n_lanes: int, blocks: Sequence[int],
        n_threads: int, max_tokens: int, expected: str,
    ) -> None:  # fmt: skip
        """Open the file, of the hash that is expected, and load the weights of its layers."""
        number = self.number
        with loading.open_program(loading.fetched(model, lambda *_: None), overrides) as (gguf, program):
            parts = cut(program.for_context(n_ctx), sides, max(sides) + 1)
            check_same(gguf.path, file_hash(gguf), expected, "whoever starts the pipeline")
        self.gguf = gguf
        own = parts.programs[number]
        assert own is not None, "every stage has ops"
        self.program = own
        make = partial(CPUExecutor, own, parts.n_blocks(number, blocks), is_part=True)
        self.lanes = [make(n_threads=n_threads, max_tokens=max_tokens) for _ in range(n_lanes)]
        self.layers = [layer for layer, side in zip(layers_of(program)[0], sides, strict=True) if side == number]

    def work(self, lane: int, n_pieces: int, commands: Sequence[Command], name: str | None, *values: np.ndarray) -> Any:
        """Do as told, then give the rows of a buffer, in so many pieces."""
        executor = self.lanes[lane]
        for what, *arguments in commands:
            if what == "write":
                executor.write(arguments[0], values[arguments[1]])
            elif what == "pool":
                getattr(executor.pool, arguments[0])(*arguments[1:])
            else:
                getattr(executor, what)(*arguments)
        self.gguf.check()
        if name is None:
            return None
        rows = np.array(executor.read(name))
        return rows if n_pieces == 1 else [piece.copy() for piece in np.array_split(rows.reshape(-1), n_pieces)]

    def read_block(self, lane: int, group: int, block: int) -> bytes:
        """See ``CachePool``."""
        return self.lanes[lane].pool.read_block(group, block)

    def facts(self) -> StageFacts:
        """What it has and takes."""
        return StageFacts(
            self.number,
            self.node(),
            (max(0, min(self.layers)), max(self.layers)),
            sum(tensor.nbytes for tensor in self.program.tensors.values()),
            sum(lane.pool.nbytes for lane in self.lanes),
            _resident_nbytes(),
        )


def _resident_nbytes() -> int:
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS:"))
    return 0


@contextmanager
def _stage_errors(number: int) -> Iterator[None]:
    """Errors of a stage's machine are a lost device; those of its work are its own."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, EdgeLLMError):
            raise cause from None
        if isinstance(cause, RayActorError):  # of the stage before it
            raise DeviceLostError(f"A stage before stage {number} of the pipeline is gone. {cause}") from error
        raise
    except RayError as error:
        raise DeviceLostError(f"Stage {number} of the pipeline is gone. {_short(error)}") from error


def _wait_for_places(actors: Sequence[Any], wanted: dict[str, Any]) -> None:
    """Until each has a machine; DeviceLostError, with what it waits for, where that takes too long."""
    until = time.monotonic() + PLACE_S
    for number, actor in enumerate(actors):
        try:
            with _stage_errors(number):
                ray.get(actor.node.remote(), timeout=max(0.1, until - time.monotonic()))
        except DeviceLostError as error:
            if not isinstance(error.__cause__, GetTimeoutError):
                raise
            free = {name: n for name, n in ray.available_resources().items() if name in ("CPU", "GPU", *wanted)}
            raise DeviceLostError(
                f"Stage {number} of the pipeline found no machine within {PLACE_S:.0f} s: it wants {wanted}, and the "
                f"cluster has {free} free, on several machines. Take fewer threads, or end what has them."
            ) from error


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Later:
    """Rows that a stage will have computed: passed on without being looked at, or an array when one is wanted."""

    def __init__(self, ref: Any, number: int, width: int) -> None:
        self.ref, self.number, self.width = ref, number, width

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with _stage_errors(self.number):
            found = ray.get(self.ref)
        rows = np.concatenate(found).reshape(-1, self.width) if isinstance(found, list) else found
        return np.asarray(rows, dtype)


class RemotePool(CachePool):
    """The cache of a stage's lane: its shapes here, its memory there."""

    def __init__(self, program: Program, n_blocks: Sequence[int], part: RemotePart) -> None:
        self.layers, self.groups = program.cache_layers, groups_of(program.cache_layers)
        self.n_blocks, self.dtype, self._part = tuple(n_blocks), np.dtype("float16"), part
        self.arrays = []
        for layer in self.layers:
            kept = np.dtype(np.float32) if isinstance(layer, StateLayer) else self.dtype
            n = self.n_blocks[self.groups.index(layer.group)]
            shapes = [(n, *shape) for shape in layer.shapes()]
            self.arrays.append([np.broadcast_to(np.zeros((), kept), shape) for shape in shapes])

    def copy_block(self, group: int, source: int, target: int) -> None:
        self._part.tell("pool", "copy_block", group, source, target)

    def write_block(self, group: int, block: int, data: bytes | memoryview) -> None:
        self._part.tell("pool", "write_block", group, block, bytes(data))

    def read_block(self, group: int, block: int) -> bytes:
        return self._part.read_block(group, block)


class RemotePart:
    """The ``PartExecutor`` of a stage's lane: what it is told is kept until something is to be read."""

    draw = None
    max_outputs = CPUExecutor.max_outputs

    def __init__(self, actor: Any, number: int, lane: int, program: Program, n_blocks: Sequence[int]) -> None:
        self.program, self._actor, self._number, self._lane = program, actor, number, lane
        self.pool = RemotePool(program, n_blocks, self)
        self._commands: list[Command] = []
        self._values: list[Any] = []
        self._n_outputs = 0

    def tell(self, what: str, *arguments: Any) -> None:
        """Have something done before the next read."""
        self._commands.append((what, *arguments))

    def begin(self, batch: Batch, outputs: Sequence[int]) -> None:
        self.tell("begin", batch, list(outputs))
        self._n_outputs = len(outputs)

    def outputs(self, rows: Sequence[int]) -> None:
        self.tell("outputs", list(rows))
        self._n_outputs = len(rows)

    def run_ops(self, first: int, last: int, *, alone: bool = False) -> None:
        self.tell("run_ops", first, last)

    def write(self, name: str, values: Any) -> None:
        self.tell("write", name, len(self._values))
        self._values.append(values.ref if isinstance(values, Later) else values)

    def read(self, name: str) -> Any:
        width = self.program.buffers[name].width
        n_pieces = 1
        if name == self.program.output:
            n_pieces = max(1, -(-4 * width * self._n_outputs // PIECE_NBYTES))
        return Later(self._send(name, n_pieces if n_pieces <= MAX_PIECES else 1), self._number, width)

    def read_block(self, group: int, block: int) -> bytes:
        self._send(None)
        with _stage_errors(self._number):
            return bytes(ray.get(self._actor.read_block.remote(self._lane, group, block)))

    def _send(self, name: str | None, n_pieces: int = 1) -> Any:
        commands, values, self._commands, self._values = self._commands, self._values, [], []
        with _stage_errors(self._number):
            work = self._actor.work.options(num_returns=n_pieces)
            return work.remote(self._lane, n_pieces, commands, name, *values)

    def close(self) -> None:
        """Nothing: the stage is closed for all lanes at once."""


class PipelineExecutor(SplitExecutor):
    """The ``Executor`` of a lane."""

    backend: ClassVar[str] = "CPU"

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        if hook is not None:
            raise UnsupportedError("A hook cannot see the buffers of a pipeline: they are on other machines.")
        return super().run(batch)


class Pipeline:
    """A model over several machines. Answers of any number of threads; those that run together share stages and steps.

    lanes        an ``LLM`` for each: all that one can do, but for hooks
    stages       the actors; ``n_restarts`` how often they were started anew
    """

    def __init__(
        self, model: str | Path, n_stages: int, options: loading.LoadOptions, n_lanes: int, resources: dict[str, Any]
    ) -> None:
        self._model, self._n_lanes, self._resources = str(model), n_lanes, resources
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._generation = 0  # of the actors
        self.n_restarts = 0
        with loading.open_program(loading.fetched(self._model, lambda *_: None), options.kv_overrides) as (
            gguf,
            program,
        ):
            if program.takes_whole_texts:
                what = "makes vectors" if program.is_encoder else "writes by denoising"
                raise UnsupportedError(f"A model that {what} has no pipeline; serve replicas of it.")
            self.n_ctx = loading.choose_context(program, options)
            self.program = program.for_context(self.n_ctx)
            self.options = replace(options, n_threads=options.n_threads or 1)
            self.max_tokens = step_tokens(self.program, self.n_ctx, options.max_tokens_per_step)
            self.sides = stage_sides(self.program, n_stages)
            self.parts = cut(self.program, self.sides, n_stages)
            self._hash = file_hash(gguf)
            self.blocks = pool_blocks(self.program.cache_layers, self.n_ctx, self.max_tokens, self.options.n_parallel)
        self._gguf = gguf
        self.stages: list[Any] = []
        self.lanes: list[LLM] = []
        try:
            self._start()
            self.lanes = [self._lane(gguf, number) for number in range(n_lanes)]
        except BaseException:
            self.close()
            raise
        self._busy = [0] * n_lanes

    def _start(self) -> None:
        """Start the stages, or start them anew."""
        make = ray.remote(Stage).options(**{"num_cpus": self.options.n_threads, **self._resources})
        how = (self._n_lanes, self.blocks, self.options.n_threads, self.max_tokens, self._hash)
        overrides = dict(self.options.kv_overrides or {}) or None
        self.stages = [make.remote(number) for number in range(len(self.parts.programs))]
        self._generation += 1
        try:
            _wait_for_places(self.stages, {"CPU": self.options.n_threads, **self._resources})
            loads = [actor.load.remote(self._model, overrides, self.n_ctx, self.sides, *how) for actor in self.stages]
            for number, loaded in enumerate(loads):
                with _stage_errors(number):
                    ray.get(loaded)
        except BaseException:
            self._kill()  # else they go on waiting, for the places of those that come after
            raise

    def _kill(self) -> None:
        for actor in self.stages:
            with suppress(RayError):
                ray.kill(actor)

    def _executor(self, lane: int) -> tuple[Executor, KVCache]:
        makes: list[Any] = [partial(RemotePart, actor, number, lane) for number, actor in enumerate(self.stages)]
        executor = PipelineExecutor(self.parts, self.blocks, makes, self.max_tokens)
        return cast("Executor", executor), KVCache(executor.pool, self.n_ctx)

    def _lane(self, gguf: GGUFFile, lane: int) -> LLM:
        tokenizer = Tokenizer.from_gguf(gguf.metadata, proved=True)
        engine = Engine(*self._executor(lane), tokenizer.eog_ids)
        engine.fallback = partial(self._again, engine, lane, self._generation)
        need = loading.memory_need(self.program, gguf, self.n_ctx, self.options)
        params = SamplingParams.from_metadata(gguf.metadata, gguf.overrides)
        threads = self.options.n_threads or 1
        model = loading.Model(
            gguf.path, gguf, self.program, tokenizer, engine, threads, params, need, "cpu", self.options.chat_template
        )
        return LLM(model)

    def _again(self, engine: Engine, lane: int, generation: int) -> tuple[Executor, KVCache]:
        """What a lane goes on with when a stage is gone: the first lane that finds it out starts all stages anew."""
        with self._starting:
            if generation == self._generation:
                self._kill()
                self._start()
                self.n_restarts += 1
            engine.fallback = partial(self._again, engine, lane, self._generation)
            return self._executor(lane)

    def stream(self, prompt: Any, **options: Any) -> ChunkStream:
        """See ``LLM.stream``; on the lane that has the fewest answers."""
        return self._idlest().stream(prompt, **options)

    def generate(self, prompt: Any, **options: Any) -> Generation:
        """See ``LLM.generate``."""
        with self._lock:
            lane = min(range(len(self.lanes)), key=self._busy.__getitem__)
            self._busy[lane] += 1
        try:
            return self.lanes[lane].generate(prompt, **options)
        finally:
            with self._lock:
                self._busy[lane] -= 1

    def _idlest(self) -> LLM:
        return min(self.lanes, key=lambda llm: len(llm.engine.scheduler.requests))

    def facts(self) -> list[StageFacts]:
        """The stages as they are now. DeviceLostError when one is gone."""
        found = []
        for number, actor in enumerate(self.stages):
            with _stage_errors(number):
                found.append(ray.get(actor.facts.remote()))
        return found

    def close(self) -> None:
        """End all answers and all stages."""
        for llm in self.lanes:
            llm.engine.close()
        self._kill()
        self.stages = []
        self._gguf.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def stage_sides(program: Program, n_stages: int) -> tuple[int, ...]:
    """The stage of each op: layers in a row, about as many bytes of weights in each stage.

    ParameterError for more stages than layers, UnsupportedError where layers of two stages share keys and values.
    """
    layers, n_layers = layers_of(program)
    if not 1 <= n_stages <= n_layers:
        raise ParameterError(f"stages is {n_stages}. The model has {n_layers} layers, so it must be 1 to {n_layers}.")
    nbytes = [0] * (n_layers + 2)
    for op, layer in zip(program.ops, layers, strict=True):
        nbytes[layer + 1] += sum(program.tensors[name].nbytes for name in op.weight_names())
    # what is looked up is no work: it goes along with the first layer
    before = list(itertools.accumulate(nbytes[1:], initial=0))
    total, stage, stage_of = before[-1], 0, list[int]()
    for layer in range(n_layers + 1):
        middle = (before[layer] + before[layer + 1]) / 2
        wanted = min(n_stages - 1, int(n_stages * middle / max(1, total)))
        least = n_stages - 1 - max(0, n_layers - 1 - layer)  # every later stage has a layer
        stage = max(stage, min(max(wanted, least), stage + (layer > 0)))
        stage_of.append(stage)
    sides = tuple(stage_of[max(0, layer)] for layer in layers)
    owner: dict[int, int] = {}
    for op, side in zip(program.ops, sides, strict=True):
        for layer in {*op.read_layers(), *op.written_layers()}:
            if owner.setdefault(layer, side) != side:
                raise UnsupportedError(
                    f"{program.architecture}: layers of two stages share their keys and values, which cannot be cut."
                )
    return sides


def pipeline(
    model: str | Path,
    stages: int,
    *,
    lanes: int | None = None,
    options: loading.LoadOptions | None = None,
    resources: dict[str, Any] | None = None,
) -> Pipeline:
    """A model whose layers stand in so many actors of the Ray cluster that this process is connected to.

    model      a name, a reference, or a path that every machine has
    lanes      answers, or groups of them, that are under way in different stages; None is as many as there are stages
    options    as for one machine; ``n_threads`` are those of each stage, and the CPUs that Ray keeps for it
    resources  further options of the actors, such as {"scheduling_strategy": "SPREAD"}, which is the default

    ParameterError without Ray or room for the stages, DeviceLostError when one does not start; else as loading does.
    """
    if not ray.is_initialized():
        raise ParameterError("There is no Ray cluster here. Connect to one first: ray.init(address=...).")
    options = loading.LoadOptions(n_parallel=4) if options is None else options
    plain = loading.LoadOptions()
    for one in fields(options):
        if one.name not in TAKEN and getattr(options, one.name) != getattr(plain, one.name):
            raise UnsupportedError(f"{one.name} does not go with a pipeline of stages. Leave it out.")
    wanted = stages * (options.n_threads or 1)
    if (found := cpus_wanting(wanted)) is not None:
        raise ParameterError(f"{stages} stages with {options.n_threads or 1} threads want {wanted} CPUs, and {found}.")
    return Pipeline(
        model,
        stages,
        options,
        lanes or stages,
        {"scheduling_strategy": "SPREAD", **(resources or {})},
    )
