"""A model is a program: a flat tuple of ops over named buffers, run for a batch of tokens.

An architecture file writes the program; an executor (``reference``, ``cpu``) runs it. This file is the whole contract
between the two. It knows no model, no kind of op, and computes nothing.

Buffers are (rows, width), float32 for the most part. A buffer of kind ``tokens`` has one row per token of the batch,
one of kind ``outputs`` one row per token whose logits, or hidden states, are wanted. Heads lie side by side in a row:
(n_heads, head_dim) flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from edgellm.kernels.kv import BLOCK_TOKENS, KVLayer, groups_of

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor
    from edgellm.kernels.draw import Draw, TokenDraw
    from edgellm.kernels.kv import CacheGroup, CacheLayer, CachePool
    from edgellm.kernels.pooling import Pooling
    from edgellm.kernels.rope import Rope


RowKind = Literal["tokens", "outputs"]


@dataclass(frozen=True)
class Buffer:
    """A named (rows, width) array that lives for one step, or columns of another one: ``width`` from ``first`` on."""

    name: str
    width: int
    rows: RowKind = "tokens"
    dtype: str = "float32"
    of: str = ""
    first: int = 0


@dataclass(frozen=True)
class Op(ABC):
    """One step of a program: a frozen dataclass of its buffers, its weights and numbers. ``kernels.ops`` has them all.

    A kind of op says by the names of its fields what it touches, so that nothing else needs to know:

    name      what kernels call it
    kernel    the op whose kernels run it, where it has none of its own
    reads     buffers it reads
    writes    buffers it writes; one that it changes in place stands in both
    weights   tensors it multiplies with; None in such a field is "not there"
    by_row    whether row t of what it writes depends on row t of what it reads and on nothing else of the batch
    cache     what it does to the cache of its ``layer``: "update" is to read and to write
    computes  False for one that says something of a program, and that no kernel runs
    """

    name: ClassVar[str]
    kernel: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ()
    by_row: ClassVar[bool] = False
    cache: ClassVar[Literal["read", "write", "update"] | None] = None
    computes: ClassVar[bool] = True

    @abstractmethod
    def reference(self, step: Any) -> None:
        """The op in plain numpy on a ``kernels.ops.step.Step``: what every executor is judged by."""

    @staticmethod
    @abstractmethod
    def trial(s: Any, variant: str = "") -> None:
        """Add ops of the kind in odd shapes to a ``kernels.ops.sketch.Sketch``; every kernel must agree on them.

        ``variant`` is what a kernel's name has behind the op's: a type of weights, an activation.
        """

    def read_buffers(self) -> tuple[str, ...]:
        """The names of the buffers that it reads."""
        return self._values(self.reads)

    def written_buffers(self) -> tuple[str, ...]:
        """The names of the buffers that it writes."""
        return self._values(self.writes)

    def weight_names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return self._values(self.weights)

    def read_layers(self) -> tuple[int, ...]:
        """The layer whose cache it reads, if any."""
        return self._values(("layer",)) if self.cache in ("read", "update") else ()

    def written_layers(self) -> tuple[int, ...]:
        """The layer whose cache it writes, if any."""
        return self._values(("layer",)) if self.cache in ("write", "update") else ()

    def nbytes_per_token(self, tensors: Mapping[str, QuantizedTensor]) -> int:
        """Bytes of its weights that one token reads: all of them, where an op does not know better."""
        return sum(tensors[name].nbytes for name in self.weight_names())

    def _values(self, fields: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple([value for field in fields if (value := getattr(self, field)) is not None])


@dataclass(frozen=True)
class Denoising:
    """How a model writes whose tokens see those after them: places of a text hold a mask until they get their tokens.

    mask       the token that holds a place
    shifted    the logits of a place are those of the row before it
    algorithm  by which its makers choose the places that are next, one of ``sampling.denoising.ALGORITHMS``
    block      places that get their tokens before any behind them, 0 for all that are to be written
    """

    mask: int
    shifted: bool
    algorithm: str
    block: int


@dataclass(frozen=True)
class Program:
    """What an executor needs to know of a model.

    output       the buffer of the result, (n_outputs, n_vocab); of an encoder it is ``hidden``
    hidden       the buffer of the rows that logits are made of, (n_outputs, n_embd); "" where a program has none
    tapped       a buffer of rows of all tokens that is to be had behind a step, for what drafts; "" for none
    is_encoder   a token sees those after it, too: all of a text is in one step, and there are no logits
    denoising    how it writes, where a token sees those after it, too, and there are logits
    pooling      how its hidden states become the vector of a text, where the file says so
    log_rows     tokens of a step that an executor logs at most (row_log.py), 0 where it is not to
    n_adapters   how many adapters its ops have branches for: the columns of ``Batch.adapters``
    adapted      what runs in its place for a batch with adapters: the same ops and buffers, and more
    """

    architecture: str
    ops: tuple[Op, ...]
    buffers: dict[str, Buffer]
    tensors: dict[str, QuantizedTensor]
    cache_layers: tuple[CacheLayer, ...]
    ropes: dict[str, Rope]
    n_vocab: int
    context_length: int  # tokens the model was trained for
    n_embd: int
    output: str = "logits"
    hidden: str = ""
    tapped: str = ""
    is_encoder: bool = False
    denoising: Denoising | None = None
    pooling: Pooling | None = None
    log_rows: int = 0
    n_adapters: int = 0
    adapted: Program | None = None

    @property
    def takes_whole_texts(self) -> bool:
        """Whether all of a text is in one step, of which nothing is kept."""
        return self.is_encoder or self.denoising is not None

    def root(self, name: str) -> str:
        """The buffer that has the columns of ``name``: itself, or the one that it is part of."""
        return self.buffers[name].of or name

    def kv_layer(self, layer: int) -> KVLayer:
        """The cache of an attention."""
        found = self.cache_layers[layer]
        assert isinstance(found, KVLayer), f"layer {layer} has no keys and values"
        return found

    def for_context(self, n_ctx: int) -> Program:
        """The program of a run with a context of so many tokens, which some rotations depend on."""
        ropes = {name: rope.for_context(n_ctx) for name, rope in self.ropes.items()}
        return replace(self, ropes=ropes, adapted=None if self.adapted is None else self.adapted.for_context(n_ctx))

    def of(self, batch: Batch) -> Program:
        """What runs for a batch: the program itself, or the one with adapters."""
        return self if batch.adapters is None or self.adapted is None else self.adapted

    def table_of(self, layer: int) -> int:
        """Which of a batch's tables is that of a layer of the cache."""
        return self.groups.index(self.cache_layers[layer].group)

    @cached_property
    def groups(self) -> tuple[CacheGroup, ...]:
        """The kinds of cache that the layers have: one block table of a sequence for each."""
        return groups_of(self.cache_layers)

    @cached_property
    def row_tables(self) -> tuple[Op, ...]:
        """The ops that add a row of a table by position or type, which a batch has to stay within."""
        return tuple(op for op in self.ops if op.name == "add_rows")


@dataclass(frozen=True)
class Batch:
    """n tokens of any number of sequences. Tokens of one sequence stand together, positions rising by one.

    tokens, positions, sequences   (n,) int32; ``sequences`` is the row of the token's block tables
    outputs                        (n,) bool, logits wanted
    tables                         an int32 array for each of ``Program.groups``. (n_sequences, max_blocks): physical
                                   block that holds positions [32 b, 32 b + 32), -1 where none is kept. For states
                                   (n_sequences, 2): the slot that is read, -1 before position 0, and the one written

    What text has no use for, and pictures and encoders have:

    sees             (n,) int32, the last position that a token attends to: its own or a later one of its sequence in
                     this batch, never less than the token's before it. None: its own, that is causal attention
    embeddings       rows of this batch, (k,) int, and what stands there in place of their tokens' embeddings,
                     (k, n_embd) float32, as it is behind the scale of the embedding
    rope_positions   (n_parts, n) int32, what ``Rope.part_of`` chooses from, or (n,), the same in every part, where a
                     sequence holds fewer positions than it had tokens; None: ``positions``
    types            (n,) int32, which of an encoder's texts a token is of; None: all of the first
    hidden           ``Program.hidden`` is wanted in place of logits
    logged           the step may be taken back in part, by ``LoggingExecutor.replay``
    adapters         (n, n_adapters) float32, the scale of each adapter for each token; None: no token has any
    """

    tokens: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    outputs: np.ndarray
    tables: tuple[np.ndarray, ...] = field(default=())
    sees: np.ndarray | None = None
    embeddings: tuple[np.ndarray, np.ndarray] | None = None
    rope_positions: np.ndarray | None = None
    types: np.ndarray | None = None
    hidden: bool = False
    logged: bool = False
    adapters: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def single(
        cls,
        program: Program,
        tokens: Sequence[int] | np.ndarray,
        start: int = 0,
        outputs: Literal["all", "last"] = "all",
    ) -> Batch:
        """Tokens of the only sequence, from position ``start`` on, in blocks 0, 1, 2 ... of a pool it has to itself.

        Its state goes on in slot 0, so such a step cannot be run again.
        """
        n = len(tokens)
        n_blocks = (start + n + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        wanted = np.full(n, outputs == "all")
        wanted[-1:] = True
        state = np.array([[0 if start else -1, 0]])
        return cls(
            tokens=np.asarray(tokens, np.int32),
            positions=np.arange(start, start + n, dtype=np.int32),
            sequences=np.zeros(n, np.int32),
            outputs=wanted,
            tables=tuple(np.arange(n_blocks)[None] if group.kind != "state" else state for group in program.groups),
        )

    def overwrites(self, groups: Sequence[CacheGroup]) -> bool:
        """Whether a state is written where it is read: such a step cannot be done again."""
        kept = zip(self.tables, groups, strict=True)
        return any(bool((table[self.sequences, 0] == table[self.sequences, 1]).any()) for table, group in kept
                   if group.kind == "state")  # fmt: skip

    def onward(self, tokens: Sequence[int], groups: Sequence[CacheGroup]) -> Batch:
        """The step behind one of a token a sequence, whose tokens these are: a state goes on where it was written."""
        tables = tuple(
            np.repeat(table[:, 1:], 2, axis=1) if group.kind == "state" else table
            for table, group in zip(self.tables, groups, strict=True)
        )
        positions = self.positions + np.int32(1)
        return replace(self, tokens=np.array(tokens, np.int32), positions=positions, tables=tables, sees=None)

    def again(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Batch:
        """This step of a token a sequence and those behind it in one, without outputs: ``counts`` steps of each.

        tokens   of each step, of all sequences
        """
        pairs = [(row, step) for row, n in enumerate(counts) for step in range(n)]
        rows, steps = np.array(pairs, np.int32).reshape(-1, 2).T
        return replace(
            self,
            tokens=np.array([tokens[step][row] for row, step in pairs], np.int32),
            positions=self.positions[rows] + steps,
            sequences=self.sequences[rows],
            outputs=np.zeros(len(rows), bool),
            sees=None,
            adapters=None if self.adapters is None else self.adapters[rows],
        )


Hook = Callable[[int, Op, Callable[[str], np.ndarray]], None]
"""Called after each op with its index, the op, and a function that gives a writable view of a buffer by name."""


class Executor(Protocol):
    """Runs a program for a batch, with a cache of its own. Not safe for several threads at once: one engine owns it.

    backend    llama-bench's word for the device
    kv_dtype   of the keys and values in its cache
    """

    backend: ClassVar[str]
    kv_dtype: ClassVar[str]
    program: Program
    pool: CachePool
    max_tokens: int

    @staticmethod
    def work_nbytes(program: Program, max_tokens: int, n_threads: int) -> int:
        """Bytes that one would hold beside its cache and the mapped file: unpacked weights and buffers."""
        ...

    @property
    def draw(self) -> Draw | None:
        """What it does with logits for samplers, on any thread; None where it has nothing better than numpy."""
        ...

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32 for the tokens that want them, valid until the next call.

        With ``Batch.hidden`` their hidden states, (n_outputs, n_embd). UnsupportedError for a program without them.

        NumericError when one of them is NaN or infinite: whoever calls need not look again.
        """
        ...

    def close(self) -> None:
        """Stop the threads and let go of the weights and the cache. May be called twice."""
        ...


@runtime_checkable
class InterruptibleExecutor(Executor, Protocol):
    """An executor that can be stopped in the midst of a step, of which nothing is left then."""

    def run_while(self, batch: Batch, wanted: Callable[[], bool]) -> np.ndarray | None:
        """``run`` without a hook, (n_outputs, n_vocab), asking now and then whether it is still wanted; else None."""
        ...


@runtime_checkable
class HiddenExecutor(Executor, Protocol):
    """An executor that tells what the logits of a step were made of, and what else its program keeps of it.

    keeps_hidden   whether to keep it of steps with more than 32 rows of logits, too
    """

    keeps_hidden: bool

    def last_hidden(self) -> np.ndarray:
        """``Program.hidden`` of the rows that the last ``run`` gave logits of, (n_outputs, n_embd) float32; valid until
        the next.

        ParameterError for more than 32 rows without ``keeps_hidden``.
        """
        ...

    def last_tapped(self) -> np.ndarray:
        """``Program.tapped`` of all tokens of the last ``run`` without a hook, (n_tokens, width) float32; valid until
        the next."""
        ...


@runtime_checkable
class LoggingExecutor(Executor, Protocol):
    """An executor that can take back tokens of a step of a program with states, given ``Program.log_rows``."""

    def replay(self, batch: Batch, counts: Sequence[int]) -> None:
        """Make the states that the last step has written anew: those behind its first tokens.

        batch    that step, of ``Program.log_rows`` tokens at most, which was ``logged``
        counts   tokens of each of its sequences, 0 for one whose state stays as it is; at least one is more
        """
        ...


@runtime_checkable
class LargerThanMemory(Protocol):
    """An executor that can run a program whose experts do not all fit memory."""

    def leave_experts_in_file(self) -> None:
        """Read the experts that a step is sent to from the file, and nothing around them; slower where all fit."""
        ...


@runtime_checkable
class DecodingExecutor(Executor, Protocol):
    """An executor that can go from token to token by itself: what was drawn is the next step's token."""

    def decode(self, batch: Batch, n_steps: int, draw: TokenDraw, stop_ids: Collection[int] = ()) -> int:
        """Up to ``n_steps`` decode steps; how many tokens were drawn, the first of ``draw``.

        draw       from this executor's ``draw``
        batch      the next token of one sequence; its block tables have room for all the steps
        stop_ids   one of them ends the run, as its last token

        It may end before, and with a step that gives NaN or infinity: that step's token is missing (none, when it was
        the first), and whoever asks for it with ``run`` gets the error.
        """
        ...


@runtime_checkable
class TogetherDecodingExecutor(DecodingExecutor, Protocol):
    """An executor that can do so for several sequences, and ends early when it is told that somebody waits."""

    def decode_together(
        self, batch: Batch, n_steps: int, draws: Sequence[TokenDraw], stop_ids: Sequence[Collection[int]]
    ) -> list[int]:
        """``decode`` for the next tokens of several sequences, each with a draw and stop ids; the tokens drawn of each.

        The run ends with the step in which one of them ends, be it by NaN: then that one has a token less.
        """
        ...

    def hurry(self, wanted: bool) -> None:
        """Whether a run shall end with the step that it is at; called on any thread, also between two runs."""
        ...
