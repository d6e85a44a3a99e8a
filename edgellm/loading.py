"""From a name to everything an ``LLM`` stands on: file, program, tokenizer, cache, executor, engine."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import samefile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from edgellm import arguments
from edgellm.engine.block_drafts import BlockDrafts
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.draft_model import DraftModel
from edgellm.engine.engine import Engine
from edgellm.engine.nextn_drafts import NextnDrafts
from edgellm.engine.snapkv import SnapKV
from edgellm.engine.speculation import DRAFTERS, SPECULATIONS, Drafter
from edgellm.formats import bus_error
from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors
from edgellm.kernels.chosen_blocks import check_chosen_context, with_kept_keys
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.kernels.program import HiddenExecutor, LargerThanMemory
from edgellm.kernels.row_log import with_log
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.machine.cores import default_threads
from edgellm.machine.memory import SystemMemory
from edgellm.machine.paths import typed_file
from edgellm.machine.progress import StageProgress
from edgellm.memory import (
    GIB,
    PROCESS_NBYTES,
    MemoryNeed,
    check_fits,
    estimate,
    experts_stay_in_file,
    kv_nbytes,
    placement_text,
    step_tokens,
    system_memory,
)
from edgellm.models import DRAFTS, build_nextn_program, build_program
from edgellm.sampling import SamplingParams
from edgellm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellm.adapters.chosen import LoadedAdapters
    from edgellm.adapters.loading import AdapterChoice
    from edgellm.chat_template import ChatTemplate
    from edgellm.engine.disk_cache import DiskCache
    from edgellm.kernels.kv import CachePool
    from edgellm.kernels.program import Executor, Program
    from edgellm.messages.form import MessageForm
    from edgellm.models.drafts import DraftProgram

Kind = Literal["chat", "embedding", "rerank"]

KV_SHARE = 4  # the default context's keys and values take at most a quarter of the free memory
CACHE_NBYTES = 8 << 30  # of the prefixes that are kept on the disk
LEAST_CONTEXT = 2048  # tokens; the default goes no lower for lack of memory
WHOLE_CONTEXT = 2048  # the default where each step has all of a text

DENOISES = (
    "This model writes by denoising: the tokens of a block come in no order, and are shown once all before them are "
    "there. Fewer steps are faster (--diffusion-steps, or /set diffusion-steps)."
)
"""What a user is told once."""


@dataclass(frozen=True)
class LoadOptions:
    """What ``edgellm.load`` was given; see there."""

    n_ctx: int | None = None
    n_threads: int | None = None
    executor: str = "cpu"
    chat_template: str | None = None
    kv_overrides: Mapping[str, Any] | None = None
    max_tokens_per_step: int = 512
    force: bool = False
    n_parallel: int = 1
    speculate: str | None = None
    gpu_layers: executors.GPULayers = "auto"
    cpu_moe: bool = False
    cache_dir: str | Path | None = None
    cache_nbytes: int = CACHE_NBYTES
    lora: tuple[AdapterChoice, ...] = ()
    control_vectors: tuple[AdapterChoice, ...] = ()
    control_vector_layers: tuple[int, int] | None = None
    draft: str | Path | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    kv_keep: str | None = None

    def __post_init__(self) -> None:
        given = (self.lora, self.control_vectors, self.control_vector_layers)
        if any(one is not None and (type(one) is not tuple or one) for one in given):
            self._check_adapters()
        for name, least, most in (("n_ctx", 0, arguments.MAX_CONTEXT), ("n_threads", 1, arguments.MAX_THREADS)):
            if getattr(self, name) is not None:
                arguments.whole_number(name, getattr(self, name), least, most)
        arguments.whole_number("max_tokens_per_step", self.max_tokens_per_step, 1, arguments.MAX_TOKENS_PER_STEP)
        arguments.whole_number("n_parallel", self.n_parallel, 1, 4096)
        executors.check_split(self.executor, self.gpu_layers, self.cpu_moe)
        object.__setattr__(self, "executor", executors.resolved(self.executor))
        if self.speculate is not None and not (isinstance(self.speculate, str) and self.speculate in SPECULATIONS):
            raise arguments.wrong("speculate", self.speculate, f"None or one of {', '.join(SPECULATIONS)}")
        if self.draft is not None:
            object.__setattr__(self, "draft", arguments.path("draft", self.draft))
            if self.speculate is not None:
                raise ParameterError("draft and speculate both say what drafts. Give one of them.")
        arguments.whole_number("cache_nbytes", self.cache_nbytes, 1, 1 << 62)
        arguments.cache_type("cache_type_k", self.cache_type_k)
        arguments.cache_type("cache_type_v", self.cache_type_v)
        arguments.kv_keep("kv_keep", self.kv_keep)
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", arguments.path("cache_dir", self.cache_dir))
        if self.chat_template is not None:
            arguments.text("chat_template", self.chat_template)
        if self.kv_overrides is not None:
            arguments.mapping("kv_overrides", self.kv_overrides)  # ``validate.override`` looks at the values
        arguments.flag("force", self.force)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters or control vectors go with the model."""
        return bool(self.lora or self.control_vectors)

    def _check_adapters(self) -> None:
        from edgellm.adapters.loading import adapter_choices, layer_range

        for name in ("lora", "control_vectors"):
            object.__setattr__(self, name, adapter_choices(name, getattr(self, name)))
        object.__setattr__(self, "control_vector_layers", layer_range(self.control_vector_layers))


@dataclass
class Model:
    """All that ``close`` frees, and what was decided on the way."""

    path: Path
    gguf: GGUFFile
    program: Program
    tokenizer: Tokenizer
    engine: Engine
    n_threads: int
    default_params: SamplingParams
    memory_need: MemoryNeed
    runs_on: str = "cpu"
    template_source: str | None = None
    adapters: LoadedAdapters | None = None
    draft: HiddenDraft | None = None

    def check_answers(self) -> None:
        """UnsupportedError where the model is for embeddings or scores and answers nothing."""
        if (kind := kind_of(self.program)) != "chat":
            use = "scores of documents: use rerank" if kind == "rerank" else "vectors of texts: use embed"
            raise UnsupportedError(
                f"{self.path.name} answers nothing, it makes {use}, or take a model for chats.", code="EMBEDDINGS"
            )

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """Compiled when first used; a model without one can still go on with plain text."""
        self.check_answers()
        from edgellm.chat_template import ChatTemplate  # jinja2: 50 ms

        return ChatTemplate.from_metadata(self.gguf.metadata, override=self.template_source)

    @functools.cached_property
    def message_form(self) -> MessageForm:
        """How the model writes reasoning and calls; found when first used, some 20 ms."""
        from edgellm.messages.form import MessageForm

        return MessageForm.of(self.chat_template, self.tokenizer, self.gguf.metadata)

    def close(self) -> None:
        """Stop the engine, then let go of the file."""
        self.engine.close()
        for part in (self.adapters, self.draft, self.gguf):
            if part is not None:
                part.close()


@dataclass(frozen=True)
class HiddenDraft:
    """An open file that drafts for one model, from what its layers read."""

    gguf: GGUFFile
    made: DraftProgram

    def close(self) -> None:
        """Let go of the file, which the model's program needs as well."""
        self.gguf.close()


def kind_of(program: Program) -> Kind:
    """What a model is for, as its file says."""
    pooling = program.pooling
    if program.is_encoder or pooling is not None:
        return "rerank" if pooling is not None and pooling.kind == "rank" else "embedding"
    return "chat"


def open_model(name_or_path: str | Path, options: LoadOptions, progress: StageProgress | None = None) -> Model:
    """Do all of it; when one part fails nothing stays behind."""
    arguments.path("name_or_path", name_or_path)
    report = (lambda stage, done, total, name: None) if progress is None else arguments.function("progress", progress)
    path = fetched(name_or_path, report)
    if options.draft is not None:
        options = replace(options, draft=fetched(options.draft, report))
    report("load", 0, 2, path.name)
    with open_program(path, options.kv_overrides) as (gguf, program), contextlib.ExitStack() as opened:
        options, program, adapters, n_ctx, need, draft = plan = planned(program, gguf, options)
        opened.callback(plan.close)
        memory = system_memory()  # before the model takes its own
        if not options.force:
            check_fits(need, memory, executors.device_memory(options.executor))
        report("load", 1, 2, path.name)
        tokenizer = Tokenizer.from_gguf(gguf.metadata, template=_given_template(options), proved=True)
        default_params = SamplingParams.from_metadata(gguf.metadata, gguf.overrides)
        report("load", 2, 2, path.name)
        if need.where is not None:  # the free memory may be another by now
            options = replace(options, gpu_layers=need.where.layers)
        engine, n_threads = start_engine(program, gguf, n_ctx, tokenizer, options, report, draft)
        engine.intact = gguf.check
        if program.denoising is not None:
            engine.notices.append(DENOISES)
        if adapters is not None:
            engine.adapters = adapters.chosen
        try:
            if options.cache_dir is not None and not program.takes_whole_texts:  # of which nothing is kept
                engine.scheduler.disk = _disk_cache(engine, gguf, need, options, Path(options.cache_dir))
            if _leave_in_file(engine.executor, need, memory):  # behind what reads the whole file
                warnings.warn(_from_disk(path, need, memory), RuntimeWarning, stacklevel=2)
        except BaseException:
            engine.close()
            raise
        opened.pop_all()
    runs_on = placement_text(need, options.executor)
    model = Model(
        path, gguf, program, tokenizer, engine, n_threads, default_params, need, runs_on, options.chat_template,
        adapters, draft,
    )  # fmt: skip
    if need.device is not None:
        engine.fallback = functools.partial(_on_cpu, model, n_ctx, options)
    return model


class Plan(NamedTuple):
    """What a file is loaded as: ``options`` as far as they hold for it, and the program with all that they add.

    ``close`` lets go of the adapters and the draft, where it is loaded by nobody.
    """

    options: LoadOptions
    program: Program
    adapters: LoadedAdapters | None
    n_ctx: int
    need: MemoryNeed
    draft: HiddenDraft | None = None

    def close(self) -> None:
        """Close the files of adapters and of what drafts."""
        for part in (self.adapters, self.draft):
            if part is not None:
                part.close()


def planned(program: Program, gguf: GGUFFile, options: LoadOptions) -> Plan:
    """How an open file will be loaded."""
    options, adapters = options_for(program, options), None
    with contextlib.ExitStack() as opened:
        if (draft := hidden_draft(program, options)) is not None:
            opened.callback(draft.close)
            program = tapped_for(draft, program)
        if options.has_adapters:
            program, adapters = with_adapters(program, options)
            opened.callback(adapters.close)
        program = typed(program, options)
        n_ctx = choose_context(program, options)
        check_chosen_context(program, n_ctx)
        program = program.for_context(n_ctx)
        if options.speculate is not None or options.draft is not None:
            program = with_log(program)
        need = memory_need(program, gguf, n_ctx, options, draft)
        plan = Plan(options, program, adapters, n_ctx, need, draft)
        opened.pop_all()
    return plan


def prove_drafts(paths: Iterable[Path], options: LoadOptions) -> None:
    """UnsupportedError where the draft model can be none, or one of these models for chats has no block that drafts."""
    bus_error.install()
    reads_states = False
    if options.draft is not None:
        with contextlib.closing(GGUFFile.open(fetched(options.draft, lambda *_: None))) as gguf:
            reads_states = gguf.architecture in DRAFTS
            if not reads_states:
                draft_context(build_program(gguf), 1)
    for path in paths if options.speculate == "mtp" or reads_states else ():
        with open_program(path, options.kv_overrides) as (gguf, program):
            if kind_of(program) == "chat" and options.speculate == "mtp":
                build_nextn_program(gguf)
            elif kind_of(program) == "chat" and (draft := hidden_draft(program, options)) is not None:
                draft.close()
        gguf.close()


def hidden_draft(program: Program, options: LoadOptions) -> HiddenDraft | None:
    """The file that drafts for this program from what its layers read; None where a model drafts, or nothing."""
    if options.draft is None:
        return None
    with contextlib.ExitStack() as opened:
        gguf = opened.enter_context(contextlib.closing(GGUFFile.open(fetched(options.draft, lambda *_: None))))
        if gguf.architecture not in DRAFTS:
            return None
        from edgellm.models.drafts import Target, build_draft

        made = build_draft(gguf, Target.of(program))
        opened.pop_all()
    return HiddenDraft(gguf, made)


def tapped_for(draft: HiddenDraft, program: Program) -> Program:
    """The program whose steps make what a draft reads."""
    from edgellm.models.drafts.features import with_features

    return with_features(program, draft.made.features)


def _no_hidden_states(what: str, options: LoadOptions) -> UnsupportedError:
    return UnsupportedError(
        f"{what} needs hidden states beside logits, which a model on the CPU and {options.executor} does not keep. Put "
        "all layers on the GPU, or take the CPU.",
        code="NO_NEXTN",
    )


def with_adapters(program: Program, options: LoadOptions) -> tuple[Program, LoadedAdapters]:
    """The program, with what runs for requests that have adapters, and these."""
    from edgellm.adapters.loading import open_adapters
    from edgellm.adapters.rewrite import adapted

    adapters = open_adapters(options.lora, options.control_vectors, options.control_vector_layers)
    try:
        made = adapted(program, adapters.adapters)
    except BaseException:
        adapters.close()
        raise
    return replace(program, adapted=made), adapters


def options_for(program: Program, options: LoadOptions) -> LoadOptions:
    """The same without drafts where a model makes vectors or scores, or writes by denoising."""
    if kind_of(program) == "chat" and program.denoising is None:
        return options
    return replace(options, draft=None, speculate=None)


def typed(program: Program, options: LoadOptions) -> Program:
    """The program with keys and values of the types that were asked for, and of as many as are to be read."""
    return with_kept_keys(
        with_cache_types(program, options.cache_type_k, options.cache_type_v),
        arguments.kv_keep("kv_keep", options.kv_keep),
        options.n_ctx or max(1, program.context_length),
    )


def typed_draft(program: Program, options: LoadOptions) -> Program:
    """The same for what drafts, which keeps them as they are where its heads do not divide."""
    try:
        return typed(program, replace(options, kv_keep=None))
    except UnsupportedError as error:
        if error.code != "CACHE_TYPE":
            raise
        return program


def _leave_in_file(executor: Executor, need: MemoryNeed, memory: SystemMemory) -> bool:
    """Let the experts stay in the file where they do not fit ``memory``, which is what was free before loading."""
    if not experts_stay_in_file(need, memory) or not isinstance(executor, LargerThanMemory):
        return False
    executor.leave_experts_in_file()
    return True


def _from_disk(path: Path, need: MemoryNeed, memory: SystemMemory) -> str:
    total, free = need.total / GIB, memory.available / GIB
    return (
        f"{path.name} needs {total:.1f} GiB and {free:.1f} GiB are free: up to {need.in_file / GIB:.1f} GiB of its "
        "experts stay on the disk, read when tokens are sent to them, which takes as long as the disk does. Take a "
        "smaller context (-c), a smaller model, or close other programs to keep more of them in memory."
    )


def _on_cpu(model: Model, n_ctx: int, options: LoadOptions) -> tuple[Executor, KVCache]:
    """What goes on where a GPU is gone; MemoryWouldExceedError where there is no room for it."""
    program, gguf = model.program, model.gguf
    options = replace(options, executor="cpu", gpu_layers="auto", draft=None, speculate=None)  # what drafts is loaded
    need, memory = memory_need(program, gguf, n_ctx, options), system_memory()
    if not options.force:
        check_fits(need, memory)
    executor, cache = _executor(program, n_ctx, options, lambda *_: None)
    _leave_in_file(executor, need, memory)
    model.memory_need = need  # what servers divide their memory by
    return executor, cache


def _disk_cache(engine: Engine, gguf: GGUFFile, need: MemoryNeed, options: LoadOptions, folder: Path) -> DiskCache:
    """Keeps prefixes of this model in a folder. What computed them is in the key: the answers stay the same."""
    from importlib.metadata import version

    from edgellm.engine.cache_file import model_key
    from edgellm.engine.disk_cache import DiskCache

    executor = engine.executor
    forms = (getattr(part, "isa", None) for part in getattr(executor, "parts", {0: executor}).values())
    form = " ".join(isa.name for isa in forms if isa is not None)
    where = "" if need.where is None else f"{placement_text(need, options.executor)} {need.where.sides}"
    key = model_key(gguf, executor, f"{executor.backend} {form} {where} {version('edgellm')}")
    return DiskCache.open(folder, key, engine.cache, options.cache_nbytes)


@contextlib.contextmanager
def open_program(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Iterator[tuple[GGUFFile, Program]]:
    """A file and its program, left open when the block ends well. A file that was cut short meanwhile is its error."""
    bus_error.install()
    gguf = GGUFFile.open(path, overrides)
    try:
        try:
            yield gguf, build_program(gguf)
        finally:
            gguf.check()
    except BaseException:
        gguf.close()
        raise


def _given_template(options: LoadOptions) -> str | None:
    """The text of the chat template that is used in place of the file's; TemplateError for an unknown name."""
    if options.chat_template is None:
        return None
    from edgellm.chat_template.template import named_or_source  # jinja2: 50 ms

    return named_or_source(options.chat_template)


def fetched(name: str | Path, report: StageProgress) -> Path:
    """The catalogue's ``fetched``; a path that is there does without its 60 ms of imports."""
    with contextlib.suppress(ParameterError):  # a name needs no path; the catalogue says what is wrong with one
        if (path := typed_file(name)) is not None:
            return path
    from edgellm.store import catalogue

    return catalogue.fetched(name, lambda done, total: report("pull", done, total, str(name)))


def choose_context(program: Program, options: LoadOptions) -> int:
    """Tokens of context: as asked for, else as trained and as far as the memory goes."""
    trained = max(1, program.context_length)
    if program.is_encoder or program.row_tables:  # it knows no positions past those
        return min(options.n_ctx or trained, trained)
    if options.n_ctx is not None:
        return options.n_ctx or trained
    if program.denoising is not None:
        return min(trained, WHOLE_CONTEXT)
    budget = (executors.device_memory(options.executor) or system_memory()).available // KV_SHARE
    low, high = min(trained, LEAST_CONTEXT), trained
    while low < high:  # the most that fits
        middle = (low + high + 1) // 2
        if kv_nbytes(program, middle, options.max_tokens_per_step, options.n_parallel, options.executor) <= budget:
            low = middle
        else:
            high = middle - 1
    return low if low == trained else max(LEAST_CONTEXT, low // BLOCK_TOKENS * BLOCK_TOKENS)


def memory_need(
    program: Program, gguf: GGUFFile, n_ctx: int, options: LoadOptions, hidden: HiddenDraft | None = None
) -> MemoryNeed:
    """Bytes for the model with a full context, and for its draft model, or the draft that reads its layers."""
    need = _need(program, gguf, n_ctx, options)
    if options.speculate == "mtp":  # its weights are in the file
        block = _need(typed_draft(build_nextn_program(gguf), options), gguf, n_ctx, draft_options(options))
        need = replace(need, draft=block.kv + block.work)
    if hidden is not None:
        own = _need(typed_draft(hidden.made.program, options), hidden.gguf, n_ctx, draft_options(options))
        return replace(need, draft=own.total - PROCESS_NBYTES)
    if options.draft is None:
        return need
    with open_program(fetched(options.draft, lambda *_: None)) as (draft_gguf, draft):
        n_draft = draft_context(draft, n_ctx)
        own = _need(typed_draft(draft, options), draft_gguf, n_draft, draft_options(options))
        is_same = samefile(gguf.path, draft_gguf.path)  # whose pages are in memory once
    draft_gguf.close()
    return replace(need, draft=own.total - PROCESS_NBYTES - (own.weights if is_same else 0))


def _need(program: Program, gguf: GGUFFile, n_ctx: int, options: LoadOptions) -> MemoryNeed:
    return estimate(
        program,
        gguf.nbytes,
        n_ctx,
        options.max_tokens_per_step,
        options.n_parallel,
        executor=options.executor,
        n_threads=options.n_threads,
        gpu_layers=options.gpu_layers,
        cpu_moe=options.cpu_moe,
    )


def start_engine(
    program: Program,
    gguf: GGUFFile,
    n_ctx: int,
    tokenizer: Tokenizer,
    options: LoadOptions,
    report: StageProgress,
    draft: HiddenDraft | None = None,
) -> tuple[Engine, int]:
    """The executor and the engine that owns it; the number of threads."""
    snap = _snap(program, n_ctx, options)
    executor, cache = _executor(program, n_ctx, options, report)
    drafter: Callable[[], Drafter] | None = DRAFTERS.get(options.speculate or "")
    try:
        if draft is not None:
            drafter = _hidden_drafts(executor, draft, n_ctx, tokenizer, options, report)
        elif options.draft is not None:
            drafter = _draft_model(executor, n_ctx, tokenizer, options, report)
        elif options.speculate == "mtp":
            drafter = _nextn_drafts(executor, gguf, n_ctx, options, report)
    except BaseException:
        executor.close()
        raise
    engine = Engine(executor, cache, tokenizer.eog_ids, drafter)
    engine.scheduler.snap = snap
    if isinstance(drafter, DraftModel | NextnDrafts):
        drafter.tell = engine.notices.append
    return engine, _n_threads(options)


def _snap(program: Program, n_ctx: int, options: LoadOptions) -> SnapKV | None:
    """What keeps keys at the end of a prompt, where it is asked for. UnsupportedError on a GPU, and with a folder."""
    keep = arguments.kv_keep("kv_keep", options.kv_keep)
    if keep is None or keep.way != "snapkv" or kind_of(program) != "chat":
        return None
    if executors.is_gpu(options.executor) or options.cache_dir is not None:
        what = "a cache_dir" if options.cache_dir is not None else f"the device {options.executor}"
        raise UnsupportedError(f"kv_keep={options.kv_keep} does not go with {what}.", code="KV_KEEP")
    return SnapKV(program, keep.n_tokens, step_tokens(program, n_ctx, options.max_tokens_per_step))


def _nextn_drafts(
    beside: Executor, gguf: GGUFFile, n_ctx: int, options: LoadOptions, report: StageProgress
) -> NextnDrafts:
    if not isinstance(beside, HiddenExecutor):
        raise _no_hidden_states("speculate=mtp", options)
    program = typed_draft(build_nextn_program(gguf), options).for_context(n_ctx)
    executor, cache = _executor(program, n_ctx, draft_options(options), report, beside)
    assert isinstance(executor, HiddenExecutor), "it is of the same kind"
    return NextnDrafts(executor, cache)


def _hidden_drafts(
    beside: Executor, draft: HiddenDraft, n_ctx: int, tokenizer: Tokenizer, options: LoadOptions, report: StageProgress
) -> NextnDrafts:
    from edgellm.drafting import have_same_ids
    from edgellm.models.drafts import mismatch

    if not isinstance(beside, HiddenExecutor):
        raise _no_hidden_states(f"A draft of this kind ({draft.gguf.architecture})", options)
    own = draft.gguf.metadata
    if "tokenizer.ggml.tokens" in own and not have_same_ids(tokenizer, Tokenizer.from_gguf(own, proved=True)):
        raise mismatch(draft.gguf, "its vocabulary has other texts", "its own")
    program = typed_draft(draft.made.program, options).for_context(n_ctx)
    executor, cache = _executor(program, n_ctx, draft_options(options), report, beside)
    assert isinstance(executor, HiddenExecutor), "it is of the same kind"
    if draft.made.keep is None or draft.made.block is None:
        return NextnDrafts(executor, cache, draft.made.ids, of_tokens=True)
    keep = typed_draft(draft.made.keep, options).for_context(n_ctx)
    try:
        keeper, _ = _executor(keep, n_ctx, draft_options(options), report, beside, cache.pool)
    except BaseException:
        executor.close()
        raise
    return BlockDrafts(executor, keeper, cache, draft.made.block, draft.made.ids)


def draft_options(options: LoadOptions) -> LoadOptions:
    """How a draft model is loaded: on the CPU where the model has a GPU, whose steps are too short to share it."""
    executor = "cpu" if executors.is_gpu(options.executor) else options.executor
    return replace(options, draft=None, executor=executor, gpu_layers="auto", cpu_moe=False)


def draft_context(draft: Program, n_ctx: int) -> int:
    """Tokens of context of a draft model. UnsupportedError for one that cannot be one."""
    if kind_of(draft) != "chat" or draft.denoising or any(group.kind == "state" for group in draft.groups):
        what = "has recurrent layers" if kind_of(draft) == "chat" else "answers nothing"
        what = "writes by denoising" if draft.denoising else what
        raise UnsupportedError(
            f"The draft model ({draft.architecture}) {what}. Take one for chats, with attention in all layers.",
            code="DRAFT_MODEL",
        )
    return min(n_ctx, max(1, draft.context_length))


def _draft_model(
    beside: Executor, n_ctx: int, tokenizer: Tokenizer, options: LoadOptions, report: StageProgress
) -> DraftModel:
    from edgellm.drafting import reading_of

    assert options.draft is not None, "there is one"
    own = draft_options(options)
    with open_program(options.draft) as (gguf, program):
        n_draft = draft_context(program, n_ctx)
        program = typed_draft(program, options).for_context(n_draft)
        draft = Tokenizer.from_gguf(gguf.metadata, proved=True)
        reading = reading_of(tokenizer, draft, beside.program.n_vocab, program.n_vocab)
        executor, cache = _executor(program, n_draft, own, report, beside)
    return DraftModel(executor, cache, reading, gguf.close)


def _executor(
    program: Program,
    n_ctx: int,
    options: LoadOptions,
    report: StageProgress,
    beside: Executor | None = None,
    pool: CachePool | None = None,
) -> tuple[Executor, KVCache]:
    max_tokens = step_tokens(program, n_ctx, options.max_tokens_per_step)
    executor = executors.open_executor(
        options.executor,
        program,
        pool_blocks(program.cache_layers, n_ctx, max_tokens, options.n_parallel),
        n_threads=_n_threads(options),
        max_tokens=max_tokens,
        on_compile=functools.partial(report, "compile"),
        gpu_layers=options.gpu_layers,
        cpu_moe=options.cpu_moe,
        beside=beside,
        pool=pool,
    )
    return executor, KVCache(executor.pool, n_ctx)


def _n_threads(options: LoadOptions) -> int:
    return options.n_threads or default_threads()
