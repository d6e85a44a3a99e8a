"""The library's face: ``load`` a model, then ``stream``, ``generate``, ``chat``, ``tokenize``, ``logprobs``.

A prompt is a str (text to go on with), a list of messages (rendered with the model's chat template) or token ids. An
``LLM`` may be used from any number of threads and tasks; its engine gives them turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgellm import arguments, loading
from edgellm.engine.engine import Engine
from edgellm.engine.requests import CancelFlag
from edgellm.formats.errors import ClosedError, ParameterError
from edgellm.generation import ChunkStream, Generation, GenerationChunk, TextStream, TokenLogprob
from edgellm.sampling import Sampler, SamplingParams
from edgellm.stop import stop_strings

if TYPE_CHECKING:
    from edgellm.adapters.chosen import Choice, LoadedAdapters
    from edgellm.adapters.scales import AdapterScales
    from edgellm.chat_template import ChatTemplate, Message, Segment
    from edgellm.conversation import Conversation
    from edgellm.embedding import Embedder, Poolings, RankedDocument, Text
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.program import Executor, Hook, Program
    from edgellm.machine.progress import StageProgress
    from edgellm.measure.scoring import TextScore
    from edgellm.memory import MemoryNeed
    from edgellm.messages.asking import Reasoning, ToolChoice
    from edgellm.messages.events import Event
    from edgellm.messages.stream import EventStream
    from edgellm.messages.thought_marks import MarkedText
    from edgellm.messages.tool_loop import Reply
    from edgellm.sampling.mask import TokenMask
    from edgellm.structured.answer_form import AnswerForm, MaskSource, ResponseFormat
    from edgellm.tokenizer import Tokenizer

    Messages = Sequence[Message | Mapping[str, Any]]
    Prompt = str | Messages | Sequence[int]

MAX_COUNT = (1 << 31) - 1
PROMPT_END = 64  # tokens of a prompt, which say whether it has begun a thought
RESERVED = ("self", "messages", "tools")  # names that a template gets from the prompt itself


def load(
    name_or_path: str | Path,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    executor: str = "cpu",
    gpu_layers: int | Literal["auto"] = "auto",
    cpu_moe: bool = False,
    chat_template: str | None = None,
    kv_overrides: Mapping[str, Any] | None = None,
    max_tokens_per_step: int = 512,
    n_parallel: int = 1,
    speculate: str | None = None,
    draft: str | Path | None = None,
    cache_dir: str | Path | None = None,
    cache_nbytes: int = loading.CACHE_NBYTES,
    lora: Any = None,
    control_vectors: Any = None,
    control_vector_layers: tuple[int, int] | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    kv_keep: str | None = None,
    force: bool = False,
    progress: StageProgress | None = None,
) -> LLM:
    """Load a GGUF file, or a model by its name, which fetches it when it is not here yet.

        with edgellm.load("smollm2") as llm:
            print(llm.chat("Name three rivers.").content)

    name_or_path    a path, a name that ``edgellm list`` shows, or a reference such as ``hf:owner/repo:Q4_K_M``
    n_ctx           tokens of context; 0 takes all that the model was trained for, None that in a quarter of free memory
    n_threads       None takes the physical cores that this process may use
    executor        "cpu"; "gpu", or "gpu:1" for another one than the best (needs the extra ``gpu``); "auto": a GPU if
                    there is one; "reference": plain numpy, slow, the judge of the others
    gpu_layers      of a GPU: so many of the last layers, and the head, are there and the CPU computes the rest. "auto"
                    is as many as fit its free memory; what it has no kernel for the CPU computes in any case
    cpu_moe         experts stay on the CPU: most of such a model's weights, and few of them are read for a token
    chat_template   Jinja text or a known name, in place of the file's template
    kv_overrides    metadata values in place of the file's
    max_tokens_per_step   tokens of a prompt that are computed together; fewer need less memory and are slower
    n_parallel      conversations whose keys and values are all kept in full. More may run, and all share their steps
    speculate       what is tried in one step, for the same answers sooner: "ngram", what followed the last tokens where
                    they stood before; "mtp", what a block of the file drafts; or ``draft``, a small model or EAGLE-3
    cache_dir       a private folder in which prefixes that were read outlive the program, ``cache_nbytes`` of them
    lora            LoRA adapters (GGUF): a path, a list of paths or (path, scale), or by name; an answer may choose
    control_vectors likewise: directions added to what the layers ``control_vector_layers`` (first, last) make
    cache_type_k    what keys are kept as, also by what drafts, ``cache_type_v`` values: "f16", "q8_0", "q4_0" ...
    kv_keep         fewer keys: "quest:1024", what can matter most; "snapkv:1024", of a prompt, whose rest is forgotten
    force           load even when the free memory looks too small
    progress        called with (stage, done, total, name); stage is "pull", "load" or "compile"

    Raises ModelNotFoundError, DownloadError, FormatError, UnsupportedError, MemoryWouldExceedError, ParameterError.
    """
    options = loading.LoadOptions(
        *(n_ctx, n_threads, executor, chat_template, kv_overrides, max_tokens_per_step, force, n_parallel, speculate),
        *(gpu_layers, cpu_moe, cache_dir, cache_nbytes, lora, control_vectors, control_vector_layers, draft),
        *(cache_type_k, cache_type_v, kv_keep),
    )
    return LLM(loading.open_model(name_or_path, options, progress))


class LLM:
    """A loaded model. Use ``edgellm.load``; ``with edgellm.load(...) as llm`` frees everything at the end."""

    def __init__(self, model: loading.Model) -> None:
        self._model: loading.Model | None = model
        self._need = model.memory_need
        self.path, self.n_ctx, self.n_threads = model.path, model.engine.n_ctx, model.n_threads
        self.tokenizer: Tokenizer = model.tokenizer
        self.default_params: SamplingParams = model.default_params
        self._embeds: Embedder | None = None

    # -- vectors and scores ----------------------------------------------------------------------------------------

    @property
    def kind(self) -> loading.Kind:
        """What the model is for: "chat", "embedding" or "rerank"."""
        return loading.kind_of(self.model.program)

    def check_answers(self) -> None:
        """UnsupportedError where the model is for embeddings or scores and answers nothing."""
        self.model.check_answers()

    def embed(
        self,
        texts: str | Sequence[Text],
        *,
        normalize: bool = True,
        truncate: bool = False,
        dimensions: int | None = None,
        pooling: Poolings | None = None,
        prompt: str | None = None,
        cancel: CancelFlag | None = None,
        counted: Callable[[int], None] = lambda _: None,
        lora: Choice = None,
        control_vectors: Choice = None,
    ) -> Any:
        """The vectors of texts in their order, (n, dim) float32: a text's is the same alone and among others.

        texts        texts, or lists of token ids, which are taken as they are
        normalize    make each of length 1
        truncate     leave out the end of a text that is too long; else it is a ContextFullError with figures
        dimensions   only so many numbers of each, for models whose first ones mean most; normalised afterwards
        pooling      "mean", "cls" or "last" in place of the file's (a model for chats has "mean"); "none": a list with
                     the rows of every text, (n_tokens, dim)
        prompt       stands before each text, such as "query: " where a model was trained so
        cancel       an object with ``is_set()``; set, what is there by then is all
        counted      called with the number of tokens of each text
        lora, control_vectors   as in ``stream``

        UnsupportedError for a model that gives scores, or a device without embeddings.
        """
        return self._embedder.embed(
            texts, normalize=normalize, truncate=truncate, dimensions=dimensions, pooling=pooling, prompt=prompt,
            cancel=cancel, counted=counted, adapters=self.adapter_scales(lora, control_vectors),
        )  # fmt: skip

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        *,
        truncate: bool = False,
        cancel: CancelFlag | None = None,
        counted: Callable[[int], None] = lambda _: None,
        lora: Choice = None,
        control_vectors: Choice = None,
    ) -> list[RankedDocument]:
        """The documents as (index, score), those that answer the query best first, the first ``top_n`` of them.

        A score is what the model's classifier gives, of any size; of a model that says yes or no, the share of yes.

        truncate   leave out the end of a document that is too long beside the query; the rest is as in ``embed``

        UnsupportedError RERANK for a model without a classifier.
        """
        adapters = self.adapter_scales(lora, control_vectors)
        return self._embedder.rerank(query, documents, top_n, truncate, cancel, counted, adapters)

    async def aembed(self, texts: str | Sequence[Text], **options: Any) -> Any:
        """``embed`` to be awaited; cancelling the task ends the work within a step."""
        return await self._beside(self.embed, texts, **options)

    async def _beside(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        from edgellm.embedding import in_thread

        return await in_thread(function, *args, **options)

    async def arerank(self, query: str, documents: Sequence[str], *args: Any, **options: Any) -> list[RankedDocument]:
        """``rerank`` to be awaited."""
        ranked: list[RankedDocument] = await self._beside(self.rerank, query, documents, *args, **options)
        return ranked

    @property
    def pooling(self) -> str:
        """What makes a vector of a text's rows in ``embed``: "mean", "cls", "last", or "none" where all are given."""
        return self._embedder.pooling(None).kind

    @property
    def vector_size(self) -> int:
        """Numbers in such a vector, or row."""
        return self._embedder.width(self._embedder.pooling(None))

    @property
    def _embedder(self) -> Embedder:
        from edgellm.embedding import Embedder

        if self._embeds is None or self._embeds.model is not self.model:
            self._embeds = Embedder(self.model)
        return self._embeds

    # -- answers ---------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        cancel: CancelFlag | None = None,
        progress: Callable[[int, int], None] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        special: bool = False,
        response_format: ResponseFormat = None,
        regex: str | None = None,
        grammar: str | MaskSource | None = None,
        hook: Hook | None = None,
        thoughts: tuple[str, str] | None = None,
        begun: int = 0,
        lora: Choice = None,
        control_vectors: Choice = None,
        **sampling: Any,
    ) -> ChunkStream:
        """The answer as it grows: a chunk for each token and a last one with the finish reason and the timings.

        params, sampling   a SamplingParams, or single fields of it (``temperature=0, seed=1``) over the model's own
        max_tokens         then it ends with "length"; None or -1: until the model ends it or the context is full
                           ("context_full")
        stop               text, or several, that end the answer and are not part of it
        logprobs           None, or how many of the likeliest tokens to report beside each one's own log-probability
        cancel             an object with ``is_set()``; set, it ends the answer before the next step ("cancelled")
        progress           called with (done, total) tokens of the prompt while it is read
        tools, template_kwargs   for the chat template; only with messages
        parse_special, special   let control tokens that stand in a text prompt count as such; show those of the answer
        response_format    what the answer must be: a JSON schema, a pydantic or msgspec class (``generate(...).parsed``
                           is then an object of it), or an OpenAI ``response_format`` object
        regex, grammar     likewise: a regular expression that all of it matches; a Lark or GBNF grammar, or a compiled
                           one. What cannot be kept is refused by name before the first token
        hook               sees, and may change, every buffer after each op; see ``edgellm.kernels.program.Hook``. The
                           prefix cache is left out then, so that it sees the whole prompt and changes no other answer
        thoughts           marks to stand around what was thought, in place of the model's own
        begun              tokens at the end of a prompt of ids that are of the answer already
        lora, control_vectors   of those that were loaded: names and their scales, or one name; {}: none, None: all

        Closing the iterator, or dropping it, ends the work within a step, or 25 ms where several are taken at once.
        ContextFullError for a prompt that is longer than the context: nothing is ever cut off silently.
        """
        self.check_answers()
        params = self.params(params, logprobs=logprobs, **sampling)
        stops, special = stop_strings(stop), arguments.flag("special", special)
        ids = self.prompt_ids(prompt, tools=tools, template_kwargs=template_kwargs, parse_special=parse_special)
        self.engine.check(ids, max_tokens)
        text = TextStream(self.tokenizer, stops, special=special)
        text = text if thoughts is None else self._marked(thoughts, ids, begun, stops)
        form = self._answer_form(response_format, regex, grammar)
        sampler = self._sampler(params, ids, form.source.constraint() if form is not None else None)
        options: dict[str, Any] = {"max_tokens": max_tokens, "cancel": cancel, "progress": progress, "hook": hook}
        options["adapters"] = self.adapter_scales(lora, control_vectors)
        return ChunkStream(self.engine, ids, sampler, text, options, form.parse if form is not None else None)

    def _marked(self, thoughts: tuple[str, str], ids: Sequence[int], begun: int, stops: Sequence[str]) -> MarkedText:
        from edgellm.messages.thought_marks import MarkedText, ThoughtMarks

        n_prompt = len(ids) - arguments.whole_number("begun", begun, 0, len(ids))
        end = self.tokenizer.decode(ids[max(n_prompt - PROMPT_END, 0) : n_prompt], special=True)
        marks = ThoughtMarks(*thoughts)
        return MarkedText(self.tokenizer, self.model.message_form, marks, end, ids[n_prompt:], stops)

    def answer_text(self, prompt: Sequence[int], begun: Sequence[int], thoughts: tuple[str, str]) -> str:
        """The text of the first tokens of an answer to a prompt, as ``stream`` gives it with ``thoughts``."""
        return self._marked(thoughts, [*prompt, *begun], len(begun), ()).begun_text

    def _sampler(self, params: SamplingParams, ids: Sequence[int], mask: TokenMask | None) -> Sampler:
        engine = self.engine
        return Sampler(
            params, engine.executor.program.n_vocab, self.tokenizer.eog_ids,
            suppressed_ids=self.tokenizer.suppressed_ids, token_bytes=self.tokenizer.token_bytes,
            tokenize=lambda piece: self.tokenizer.encode(piece, False),
            history=ids, draw=engine.executor.draw, mask=mask,
        )  # fmt: skip

    def _answer_form(
        self, response_format: ResponseFormat, regex: str | None, grammar: str | MaskSource | None
    ) -> AnswerForm | None:
        if response_format is None and regex is None and grammar is None:
            return None
        from edgellm.structured.answer_form import answer_form

        return answer_form(self.tokenizer, response_format, regex, grammar)

    def generate(self, prompt: Prompt, *args: Any, **kwargs: Any) -> Generation:
        """The whole answer, a str with ``tokens``, ``finish_reason``, ``timings`` ...; takes what ``stream`` takes.

        With ``num_beams`` the likeliest that beam search finds, and its ``score``: see ``edgellm.beam_search``.
        """
        if (num_beams := kwargs.pop("num_beams", None)) is not None:
            from edgellm.beam_search import best_answer

            return best_answer(self, prompt, *args, num_beams=num_beams, **kwargs)
        chunks = self.stream(prompt, *args, **kwargs)
        return Generation.of(chunks, chunks.parse)

    def events(
        self,
        messages: str | Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        reasoning: Reasoning = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        cancel: CancelFlag | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        response_format: ResponseFormat = None,
        regex: str | None = None,
        grammar: str | MaskSource | None = None,
        hook: Hook | None = None,
        lora: Choice = None,
        control_vectors: Choice = None,
        **sampling: Any,
    ) -> EventStream:
        """The reply to messages as events: reasoning, content and tool calls apart; see ``edgellm.messages.events``.

        tools                 Python functions, or descriptions as the OpenAI protocol has them
        tool_choice           "auto"; "none"; "required", or {"name": ...} for one of them: then a grammar forces it
        parallel_tool_calls   whether one answer may call several
        reasoning             True or False; how much of it: an effort ("low", "medium", "high"), or tokens at most;
                              None as the model's template has it

        The rest is as in ``stream``; a form that is asked for begins behind the reasoning. ``.message`` is the whole
        reply, once the events are over. Where the model's template knows no tools they are described in plain text.
        """
        from edgellm.messages.asking import Asking
        from edgellm.messages.plain_tools import form_with
        from edgellm.messages.reader import MessageReader
        from edgellm.messages.stream import EventStream, ReadTokens

        self.check_answers()
        engine, form = self.engine, form_with(self.model.message_form, tools)
        params = self.params(params, logprobs=logprobs, **sampling)
        asking = Asking.of(form, tools, tool_choice, parallel_tool_calls, reasoning, template_kwargs)
        messages = arguments.items("messages", _as_messages(messages), "text, or a list of messages")
        segments = asking.opened(form, self._rendered(messages, asking.tools, asking.template_kwargs))
        ids = self._with_prefix(self.tokenizer.encode_segments(segments, False))
        engine.check(ids, max_tokens)
        text = "".join(segment.text for segment in segments)
        read = ReadTokens(self.tokenizer, MessageReader(form, text, asking.tools), stop_strings(stop))
        mask, parse = asking.mask(self.tokenizer, form, text, response_format, regex, grammar)
        options: dict[str, Any] = {"max_tokens": max_tokens, "cancel": cancel, "hook": hook}
        options["adapters"] = self.adapter_scales(lora, control_vectors)
        return EventStream(engine, ids, self._sampler(params, ids, mask), read, options, parse)

    async def aevents(self, messages: str | Messages, *args: Any, **kwargs: Any) -> AsyncIterator[Event]:
        """``events`` for ``async for``. Cancelling the task or closing the iterator ends the work within a step."""
        import asyncio

        events = await asyncio.to_thread(self.events, messages, *args, **kwargs)
        async with contextlib.aclosing(events.asynchronous()) as stream:
            async for event in stream:
                yield event

    def chat(
        self,
        messages: str | Messages,
        *args: Any,
        max_rounds: int = 8,
        on_event: Callable[[Event], None] | None = None,
        **kwargs: Any,
    ) -> Reply:
        """The reply to a list of messages, or to one of a user; takes what ``events`` takes.

            llm.chat("What is the weather in Rome?", tools=[get_weather])

        Tools that are Python functions are run and the model goes on with what they return, for ``max_rounds`` rounds
        at most; what one raises goes to the model as its result. ``reply.steps`` are the messages in between. A call
        of a tool that is only described ends it: ``reply.tool_calls`` are for the caller.

        on_event   sees each event as it comes, those of the calls, too
        """
        from edgellm.messages.tool_loop import ToolLoop

        loop = ToolLoop(_as_messages(messages), kwargs.pop("tools", None), max_rounds)
        while True:
            with contextlib.closing(self.events(loop.messages, *args, tools=loop.described, **kwargs)) as events:
                for event in events:
                    if on_event is not None:
                        on_event(event)
            if not loop.take(events.message):
                return loop.reply
            loop.run()

    def conversation(self, system: str | None = None, *, on_overflow: str = "error", **options: Any) -> Conversation:
        """A chat that remembers what was said; ``options`` are those of ``stream`` for every turn.

        on_overflow   what happens when it does not fit the context: see ``Conversation``
        """
        from edgellm.conversation import Conversation

        return Conversation(self, system, options, on_overflow)

    async def astream(self, prompt: Prompt, *args: Any, **kwargs: Any) -> AsyncIterator[GenerationChunk]:
        """``stream`` for ``async for``. Cancelling the task or closing the iterator ends the work as there."""
        chunks = await self._opened(prompt, *args, **kwargs)
        async with contextlib.aclosing(chunks.asynchronous()) as stream:
            async for chunk in stream:
                yield chunk

    async def _opened(self, prompt: Prompt, *args: Any, **kwargs: Any) -> ChunkStream:
        import asyncio

        # rendering and tokenizing a long prompt takes time that the event loop does not have
        return await asyncio.to_thread(self.stream, prompt, *args, **kwargs)

    async def agenerate(self, prompt: Prompt, *args: Any, **kwargs: Any) -> Generation:
        """``generate`` to be awaited."""
        if kwargs.get("num_beams") is not None:
            return await self._beside(self.generate, prompt, *args, **kwargs)
        chunks = await self._opened(prompt, *args, **kwargs)
        async with contextlib.aclosing(chunks.asynchronous()) as stream:
            return Generation.of([chunk async for chunk in stream], chunks.parse)

    async def achat(
        self,
        messages: str | Messages,
        *args: Any,
        max_rounds: int = 8,
        on_event: Callable[[Event], None] | None = None,
        **kwargs: Any,
    ) -> Reply:
        """``chat`` to be awaited; functions run on threads, and coroutine functions are awaited."""
        import asyncio

        from edgellm.messages.tool_loop import ToolLoop

        loop = ToolLoop(_as_messages(messages), kwargs.pop("tools", None), max_rounds)
        while True:
            events = await asyncio.to_thread(self.events, loop.messages, *args, tools=loop.described, **kwargs)
            async with contextlib.aclosing(events.asynchronous()) as stream:
                async for event in stream:
                    if on_event is not None:
                        on_event(event)
            if not loop.take(events.message):
                return loop.reply
            await loop.arun()

    def params(
        self, params: SamplingParams | None = None, *, logprobs: int | None = None, **sampling: Any
    ) -> SamplingParams:
        """The sampling of a request: single fields over ``params`` or else over the model's own."""
        if params is not None and not isinstance(params, SamplingParams):
            raise arguments.wrong("params", params, "SamplingParams; single fields are given by name")
        if sampling.pop("num_beams", None) is not None:
            raise ParameterError("num_beams is for generate alone: beam search has no token before it has them all.")
        if logprobs is not None and logprobs is not False:
            sampling |= {"n_probs": 0 if logprobs is True else logprobs, "logprobs": True}
        return (self.default_params if params is None else params).with_fields(sampling)

    # -- text and ids ----------------------------------------------------------------------------------------------

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text; see ``Tokenizer.encode``."""
        arguments.text("text", text)
        return self.tokenizer.encode(
            text, arguments.flag("add_special", add_special), arguments.flag("parse_special", parse_special)
        )

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; see ``Tokenizer.decode``."""
        return self.tokenizer.decode(arguments.token_ids("ids", ids), arguments.flag("special", special))

    def apply_template(self, messages: Messages, **kwargs: Any) -> str:
        """The text that the model is given for these messages."""
        messages, kwargs["tools"] = self._shown(messages, kwargs.get("tools"))
        return self.chat_template.render_text(messages, **kwargs)

    def prompt_ids(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """The ids that a prompt becomes: BOS where the vocabulary wants one, never an EOS behind it."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, False, arguments.flag("parse_special", parse_special))
        else:
            parts = arguments.items("prompt", prompt, "text, a list of messages, or token ids")
            if all(hasattr(part, "__index__") for part in parts):
                return arguments.token_ids("prompt", parts)
            ids = self.tokenizer.encode_segments(self._rendered(parts, tools, template_kwargs), False)
        return self._with_prefix(ids)

    def _rendered(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, template_kwargs: Mapping[str, Any] | None
    ) -> list[Segment]:
        more = {} if template_kwargs is None else arguments.mapping("template_kwargs", template_kwargs)
        if taken := [name for name in RESERVED if name in more]:
            raise ParameterError(f"template_kwargs has {taken[0]!r}, which the prompt gives. Take another name.")
        messages, tools = self._shown(messages, tools)
        return self.chat_template.render(messages, tools=tools, **more)

    def _shown(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Messages, Sequence[Mapping[str, Any]] | None]:
        """Messages and tools for the template; in plain text where it knows no tools."""
        from edgellm.chat_template.messages import is_about_tools

        sound = isinstance(messages, Sequence) and isinstance(tools, Sequence | None)  # else render says what is wrong
        if sound and (tools or any(map(is_about_tools, messages))):
            from edgellm.messages.plain_tools import is_plain, told

            if is_plain(self.model.message_form):
                return told(self.chat_template, messages, tools), None
        return messages, tools

    def _with_prefix(self, ids: list[int]) -> list[int]:
        prefix = list(self.tokenizer.special.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def logprobs(self, text: str | Sequence[int], top: int = 0) -> list[TokenLogprob]:
        """The log-probability of every token of a text after those before it, and the ``top`` likeliest there."""
        from edgellm.measure.scoring import token_logprobs

        top = arguments.whole_number("top", top, 0, MAX_COUNT)
        return token_logprobs(self.engine, self.tokenizer, self._text_ids(text), top)

    def score(self, text: str | Sequence[int]) -> TextScore:
        """The log-probability of every token of a text after those before it, as numpy arrays."""
        from edgellm.measure.scoring import score_ids

        return score_ids(self.engine, self._text_ids(text))

    def loglikelihood(self, context: str, continuation: str) -> TextScore:
        """How likely ``continuation`` is after ``context``: ``logprob`` in all, ``is_greedy``, and token by token.

        As lm-evaluation-harness asks it: blanks at the end of the context count to the continuation, and after an
        empty context stands BOS, or EOS where the vocabulary has no BOS.
        """
        from edgellm.measure.scoring import score_continuation

        kept = arguments.text("context", context).rstrip()
        arguments.text("continuation", continuation)
        known, whole = self.prompt_ids(kept), self.prompt_ids(context + continuation)
        if not known:
            first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
            known, whole = [first or 0], [first or 0, *whole]
        return score_continuation(self.engine, known, whole)

    def perplexity(self, text: str | Sequence[int], n_ctx: int = 512) -> float:
        """exp of the mean negative log-likelihood, by llama-perplexity's procedure (second half of each chunk)."""
        from edgellm.measure.perplexity import perplexity

        n_ctx = arguments.whole_number("n_ctx", n_ctx, 1, MAX_COUNT)
        return perplexity(self.engine, self.tokenizer, self._text_ids(text), n_ctx)

    def _text_ids(self, text: str | Sequence[int]) -> list[int]:
        return self.tokenize(text) if isinstance(text, str) else arguments.token_ids("text", text)

    # -- what it has read --------------------------------------------------------------------------------------------

    def save_state(
        self, path: str | Path, tokens: Sequence[int], *, lora: Choice = None, control_vectors: Choice = None
    ) -> int:
        """Write the keys and values of ``tokens`` to a file, as far as the cache has them; how many it has.

        lora, control_vectors   of the answers that have read them, as in ``stream``; the file is of use for these alone

        ``load_state`` brings them back in another program, so that a prompt that begins with them is not read again.
        ParameterError KV_EMPTY when the cache has none of them, EdgeLLMError KV_FILE when the file cannot be written.
        """
        from edgellm.saved_state import save_state

        return save_state(self.model, path, tokens, self.adapter_scales(lora, control_vectors).variant)

    def load_state(self, path: str | Path, *, lora: Choice = None, control_vectors: Choice = None) -> list[int]:
        """Take keys and values from a file that ``save_state`` wrote; the tokens that are known now.

        FormatError KV_FILE for a damaged file or one of another model; nothing is taken from it then.
        """
        from edgellm.saved_state import load_state

        return load_state(self.model, path, self.adapter_scales(lora, control_vectors).variant)

    # -- adapters --------------------------------------------------------------------------------------------------

    def adapter_scales(self, lora: Choice = None, control_vectors: Choice = None) -> AdapterScales:
        """What these choices come to, as the engine takes it."""
        is_default = lora is None and control_vectors is None  # for which nothing that reads adapters is imported
        return self.engine.adapters() if is_default else self.adapters.chosen(lora, control_vectors)

    @property
    def adapters(self) -> LoadedAdapters:
        """The adapters and control vectors that the model was loaded with."""
        from edgellm.adapters.chosen import LoadedAdapters

        return self.model.adapters or LoadedAdapters()

    def set_adapters(self, lora: Choice = None, control_vectors: Choice = None) -> None:
        """From now on answers that choose nothing have these; see ``stream``."""
        self.adapters.set(lora, control_vectors)

    # -- what it is made of ----------------------------------------------------------------------------------------

    @property
    def model(self) -> loading.Model:
        """Everything that ``close`` frees; ClosedError afterwards."""
        if self._model is None:
            raise ClosedError(f"{self.path.name} is closed. Load it again to go on.")
        return self._model

    @property
    def engine(self) -> Engine:
        """Token ids in, token ids out."""
        return self.model.engine

    @property
    def memory_estimate(self) -> MemoryNeed:
        """Bytes that it takes where it runs now."""
        return self._need if self._model is None else self._model.memory_need

    @property
    def runs_on(self) -> str:
        """What computes, in words: "cpu", or a GPU by name and how many layers it has."""
        return "cpu" if self.executor.backend == "CPU" else self.model.runs_on

    def take_notices(self) -> list[str]:
        """What has happened since the last call that a user should know, such as the loss of a GPU."""
        return [self.engine.notices.pop(0) for _ in range(len(self.engine.notices))]  # others append to the list

    @property
    def executor(self) -> Executor:
        """What computes; run by the engine alone."""
        return self.model.engine.executor

    @property
    def program(self) -> Program:
        """The model as a list of ops."""
        return self.model.program

    @property
    def gguf(self) -> GGUFFile:
        """The open file: metadata and tensors."""
        return self.model.gguf

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template; TemplateError when the file has none."""
        return self.model.chat_template

    def close(self) -> None:
        """End all answers, stop the threads, free weights and cache, close the file. May be called twice."""
        if self._model is not None:
            self._model.close()
            self._model = self._embeds = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("A loaded model holds threads and a mapped file and cannot be copied. Load it again.")

    def __repr__(self) -> str:
        state = "closed" if self._model is None else f"{self.n_ctx} tokens of context, {self.n_threads} threads"
        return f"<LLM {self.path.name}: {state}>"


def _as_messages(messages: str | Messages) -> Messages:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
