"""A server and its models: which there are, and one of them with what a chat needs of an ``LLM``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from edgellm.engine.requests import CancelFlag
from edgellm.formats.errors import EdgeLLMError, ModelNotFoundError, ParameterError, RemoteError
from edgellm.generation import GenerationChunk
from edgellm.remote.answer import AnswerReader, as_object, is_count
from edgellm.remote.connection import LOAD_S, Connection, parse_address
from edgellm.sampling import SamplingParams
from edgellm.sessions.tree import END_THINK, THINK, MessageNode

if TYPE_CHECKING:
    from edgellm.conversation import Conversation
    from edgellm.machine.progress import StageProgress

LIST_S = 30.0
MAX_MODELS = 1000
MAX_NAME = 256
MAX_TOP_LOGPROBS = 20
BAN = -100.0  # a bias that OpenAI's protocol calls a ban
WIRE_NAMES = {"penalty_last_n": "repeat_last_n"}  # llama-server's, where they are others
OWN_NAMES = {wire: name for name, wire in WIRE_NAMES.items()}


class RemoteModel(NamedTuple):
    """A model of a server: its name, tokens of context (0: untold), bytes (0: untold), whether it is in memory."""

    name: str
    n_ctx: int
    nbytes: int
    is_loaded: bool


class RemoteServer:
    """A server that the user named, and the key for it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.connection = Connection(parse_address(url), key)

    @property
    def authority(self) -> str:
        """``host:port``, by which sessions tell its models from those of this machine."""
        return self.connection.address.authority

    def models(self) -> list[RemoteModel]:
        """What it lists, the loaded ones first. RemoteError and its like."""
        told = self.connection.ask("GET", "/v1/models", silent_s=LIST_S)
        data = as_object(told).get("data")
        if not isinstance(data, list):
            raise self.connection.nonsense("no list of models")
        found = [model for model in map(_model, data[:MAX_MODELS]) if model is not None]
        return sorted(found, key=lambda model: not model.is_loaded)

    def full_name(self, name: str) -> str:
        """``name@host:port``."""
        return name if name.endswith(f"@{self.authority}") else f"{name}@{self.authority}"

    def first(self) -> str:
        """The full name of the model to begin with. ModelNotFoundError when there is none."""
        models = self.models()
        if not models:
            raise ModelNotFoundError(f"{self.connection.address} has no models.")
        return self.full_name(models[0].name)

    def known(self, full_name: str) -> str:
        """A full name, if it is one of this server's models, else ""."""
        name, _, where = full_name.rpartition("@")
        return full_name if where == self.authority and name in {model.name for model in self.models()} else ""

    def open(self, name: str = "", progress: StageProgress | None = None) -> RemoteLLM:
        """A model by its name, or by its full name, else the first; a server that loads on demand loads it now."""
        name = name.removesuffix(f"@{self.authority}")
        models = self.models()
        names = [model.name for model in models]
        if not models or (name and name not in names):
            there = ", ".join(names[:8]) or "none"
            raise ModelNotFoundError(f"{self.connection.address} has no model {name!r}. It has: {there}.")
        model = models[names.index(name) if name else 0]
        if progress is not None:
            progress("load", 0, None, self.full_name(model.name))
        return RemoteLLM(self.connection, model, self._props(model.name))

    def _props(self, name: str) -> Mapping[str, Any]:
        """llama-server's settings of a model; empty where the server has no such thing."""
        try:
            told = self.connection.ask("GET", f"/props?model={quote(name, safe='')}", silent_s=LOAD_S)
        except (RemoteError, ParameterError) as error:
            if error.code in ("REMOTE_MISSING", "REMOTE_REPLY", "PARAMETER"):
                return {}
            raise
        return as_object(as_object(told).get("default_generation_settings"))


class RemoteLLM:
    """A model behind a server. It has no tokenizer here: texts and counts are the server's.

    n_ctx            tokens of context, 0 where the server does not tell
    default_params   the server's sampling, as far as it tells
    """

    is_remote = True
    chat_template = "the server's own"

    def __init__(self, connection: Connection, model: RemoteModel, settings: Mapping[str, Any]) -> None:
        self.connection, self.name = connection, model.name
        self._is_llama = bool(settings)  # it knows llama-server's fields
        self._no_logprobs = False
        n_ctx = settings.get("n_ctx")
        self.n_ctx = n_ctx if is_count(n_ctx) and n_ctx else model.n_ctx
        self.default_params = _params(as_object(settings.get("params")))

    def __enter__(self) -> RemoteLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held between two requests."""

    def conversation(self, system: str | None = None, *, on_overflow: str = "error", **options: Any) -> Conversation:
        """As of an ``LLM``."""
        from edgellm.conversation import Conversation

        return Conversation(self, system, options, on_overflow)

    def stream(
        self,
        prompt: Sequence[Any],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        cancel: CancelFlag | None = None,
        progress: Callable[[int, int], None] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        sampler_trace: bool = False,
        thoughts: tuple[str, str] = (THINK, END_THINK),
        **sampling: Any,
    ) -> Generator[GenerationChunk, None, None]:
        """The answer to messages as it grows; closing it, or ``cancel``, ends the server's work.

        Takes what ``LLM.stream`` takes. ``sampler_trace`` is of this machine's samplers alone and changes nothing here;
        ``thoughts`` are the marks of sessions and no others.
        """
        if thoughts != (THINK, END_THINK):
            raise ParameterError(f"thoughts is {thoughts}; of a server's answer they are {THINK} and {END_THINK}.")
        body: dict[str, Any] = {"model": self.name, "messages": [self._wire(message) for message in prompt]}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if max_tokens is not None and max_tokens >= 0:
            body["max_tokens"] = max_tokens
        if stop:
            body["stop"] = [stop] if isinstance(stop, str) else list(stop)
        body |= _template_fields(template_kwargs or {})
        body |= {WIRE_NAMES.get(name, name): _sampling_value(name, value) for name, value in sampling.items()}
        if self._is_llama:
            body["return_progress"] = True
        if logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": min(int(logprobs), MAX_TOP_LOGPROBS)}
        return self._chunks(body, cancel, progress)

    def _chunks(
        self, body: dict[str, Any], cancel: CancelFlag | None, progress: Callable[[int, int], None] | None
    ) -> Generator[GenerationChunk, None, None]:
        if self._no_logprobs:
            body = {name: value for name, value in body.items() if "logprobs" not in name}
        limited, n_top = "max_tokens" in body, body.get("top_logprobs", 0)
        reader = AnswerReader(self.connection, progress, self.n_ctx, limited, n_top)
        said = False
        try:
            with contextlib.closing(self.connection.events("/v1/chat/completions", body, cancel)) as events:
                for event in events:
                    for chunk in reader.chunks(event):
                        said = True
                        yield chunk
        except EdgeLLMError as error:
            if cancel is None or not cancel.is_set():  # else the line was cut anywhere, and what is left says nothing
                refused = isinstance(error, ParameterError) and "logprobs" in body and "logprobs" in str(error)
                if said or not refused:
                    raise
                self._no_logprobs = True  # a server that has none answers without them
                yield from self._chunks(body, cancel, progress)
                return
        yield reader.last(cancel is not None and cancel.is_set())

    def prompt_ids(
        self,
        messages: Sequence[Any],
        *,
        tools: Any = None,
        template_kwargs: Any = None,
        cancel: CancelFlag | None = None,
    ) -> list[int]:
        """The tokens that messages become, as the server counts them; none where it does not count.

        RemoteError REMOTE_LOST once ``cancel`` is set.
        """
        body: dict[str, Any] = {"model": self.name, "messages": [self._wire(message) for message in messages]}
        if template_kwargs:
            body["chat_template_kwargs"] = dict(template_kwargs)
        told = self._ask_if_there("/apply-template", body, cancel)
        text = told.get("prompt")
        return self._ids(text, cancel, parse_special=True) if isinstance(text, str) else []

    def tokenize(self, text: str, add_special: bool = False, *, cancel: CancelFlag | None = None) -> list[int]:
        """The ids of a text, as the server has them; none where it does not tell. ``cancel`` as of ``prompt_ids``."""
        return self._ids(text, cancel, add_special=add_special)

    def _ids(
        self, text: str, cancel: CancelFlag | None, *, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        body = {"model": self.name, "content": text, "add_special": add_special, "parse_special": parse_special}
        tokens = self._ask_if_there("/tokenize", body, cancel).get("tokens")
        return [token for token in tokens if is_count(token)] if isinstance(tokens, list) else []

    def _ask_if_there(self, path: str, body: Any, cancel: CancelFlag | None) -> Mapping[str, Any]:
        if not self._is_llama:
            return {}
        try:
            told = self.connection.ask("POST", path, body, cancel=cancel)
        except RemoteError as error:
            if error.code != "REMOTE_MISSING":
                raise
            return {}
        return as_object(told)

    def _wire(self, message: Any) -> dict[str, Any]:
        """A message as the protocol has it; what was thought goes to servers that know the field."""
        fields: dict[str, Any] = dict(message if isinstance(message, Mapping) else message.to_dict())
        content = fields.get("content")
        if fields.get("role") == "assistant" and isinstance(content, str) and "reasoning_content" not in fields:
            thought, said = MessageNode("assistant", str(content)).parts()
            fields |= {"content": said} | ({"reasoning_content": thought} if thought else {})
        if not self._is_llama:
            fields.pop("reasoning_content", None)
        return fields


def _model(row: Any) -> RemoteModel | None:
    """A row of ``/v1/models``; None for one without a name."""
    if not isinstance(row, Mapping):
        return None
    name = row.get("id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        return None
    meta = as_object(row.get("meta"))
    sizes = (meta.get("n_ctx"), *(row.get(key) for key in ("context_window", "max_model_len", "context_length")))
    n_ctx = next((size for size in sizes if is_count(size) and size), 0)
    nbytes = meta.get("size")
    loaded = as_object(row.get("status")).get("value") == "loaded"
    return RemoteModel(name, n_ctx, nbytes if is_count(nbytes, 1 << 60) else 0, loaded)


def _params(told: Mapping[str, Any]) -> SamplingParams:
    """The sampling that a server tells, in llama-server's names, as far as it can be."""
    known: dict[str, Any] = {}
    for wire, value in told.items():
        name = OWN_NAMES.get(wire, wire)
        if name in SamplingParams.__dataclass_fields__ and isinstance(value, int | float) and name != "seed":
            with contextlib.suppress(EdgeLLMError):
                known[name] = getattr(SamplingParams(**{name: value}), name)  # type: ignore[arg-type]
    return SamplingParams(**known)


def _template_fields(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Names for the template; going on with the last message is a field of its own."""
    rest = {name: value for name, value in kwargs.items() if name != "continue_final_message"}
    body: dict[str, Any] = {"chat_template_kwargs": rest} if rest else {}
    if kwargs.get("continue_final_message"):
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _sampling_value(name: str, value: Any) -> Any:
    if name == "logit_bias":
        return {str(token): BAN if add is False else max(min(float(add), -BAN), BAN) for token, add in value.items()}
    return list(value) if isinstance(value, tuple) else value
