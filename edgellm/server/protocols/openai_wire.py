"""What the OpenAI protocols share: errors, usage, log-probabilities, sampling fields and their bounds."""

from __future__ import annotations

import secrets
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgellm.adapters.limits import MAX_ADAPTERS, MAX_SCALE
from edgellm.server.bodies import Body
from edgellm.server.chat_request import checked_bias
from edgellm.server.errors import Kind, ServerError
from edgellm.server.relay import RELAY

if TYPE_CHECKING:
    from edgellm.engine.requests import Timings
    from edgellm.generation import TokenLogprob

ERROR_TYPES: dict[Kind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "too_large": "invalid_request_error",
    "context_exceeded": "exceed_context_size_error",
    "not_supported": "not_supported_error",
    "overloaded": "unavailable_error",
    "rate_limited": "rate_limit_error",
    "server_error": "server_error",
}
"""llama-server's names, of which OpenAI's are a part."""

ERROR_CODES: dict[Kind, str] = {
    "authentication": "invalid_api_key",
    "not_found": "model_not_found",
    "context_exceeded": "context_length_exceeded",
    "overloaded": "server_overloaded",
    "rate_limited": "rate_limit_exceeded",
}

FINGERPRINT = f"edgellm-{version('edgellm')}"  # one version gives the same answer to the same seed, to the last bit
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ShortText = Annotated[str, Meta(min_length=1, max_length=64)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
CountOrAll = Annotated[int, Meta(ge=-1, le=2**31 - 1)]


def error_body(error: ServerError) -> tuple[int, dict[str, Any]]:
    """The status and body of an error."""
    code = ERROR_CODES.get(error.kind) if error.kind != "not_found" or error.field == "model" else None
    told = {"message": error.message, "type": ERROR_TYPES[error.kind], "param": error.field, "code": code}
    return error.status, {"error": {**told, **error.details}}


def new_id(prefix: str) -> str:
    """An id that no other reply has; a call that is made again has the same."""
    relay = RELAY.get()
    return prefix + (secrets.token_hex(12) if relay is None else relay.new_id())


class AdapterScale(msgspec.Struct, forbid_unknown_fields=True):
    """How much of a LoRA adapter, by the id that /lora-adapters gives it."""

    id: Annotated[int, Meta(ge=0, lt=MAX_ADAPTERS)]
    scale: Annotated[float, Meta(ge=-MAX_SCALE, le=MAX_SCALE)]


LoraScales = Annotated[list[AdapterScale], Meta(max_length=MAX_ADAPTERS)]


class SamplingBody(Body, kw_only=True):
    """The fields that choose tokens: OpenAI's, and beside them llama-server's."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-1e6, le=1e6)]] | None = None
    top_k: CountOrAll | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    top_n_sigma: Annotated[float, Meta(ge=-1, le=1e6)] | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Probability | None = None
    repeat_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    repeat_last_n: CountOrAll | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    dry_base: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    dry_allowed_length: Count | None = None
    dry_penalty_last_n: CountOrAll | None = None
    dry_sequence_breakers: Annotated[list[ShortText], Meta(max_length=64)] | None = None
    mirostat_tau: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    mirostat_eta: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    dynatemp_range: Annotated[float, Meta(ge=0, le=100)] | None = None
    dynatemp_exponent: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    min_keep: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    samplers: Annotated[list[Annotated[str, Meta(max_length=32)]], Meta(max_length=16)] | None = None
    ignore_eos: bool | None = None
    diffusion_steps: Annotated[int, Meta(ge=0, le=4096)] | None = None
    diffusion_length: Annotated[int, Meta(ge=1, le=1024)] | None = None
    diffusion_block_length: Annotated[int, Meta(ge=-1, le=1024)] | None = None
    diffusion_algorithm: Annotated[int, Meta(ge=-1, le=4)] | None = None
    diffusion_alg_temp: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    diffusion_cfg_scale: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    diffusion_eps: Probability | None = None


_RENAMED = {"repetition_penalty": "repeat_penalty", "repeat_last_n": "penalty_last_n"}


def sampling_fields(body: SamplingBody) -> dict[str, Any]:
    """Those that were given, as SamplingParams has them."""
    given = {}
    for name in SamplingBody.__struct_fields__:
        value = getattr(body, name)
        if value is not None:
            given[_RENAMED.get(name, name)] = value
    if "logit_bias" in given:
        given["logit_bias"] = checked_bias("logit_bias", given["logit_bias"])
    if "seed" in given and given["seed"] < -1:  # their seeds are signed
        given["seed"] += 2**64
    return given


def usage(timings: Timings, n_reasoning: int = 0, generated: int | None = None) -> dict[str, Any]:
    """What was read, what of it the cache held, and what was written, in tokens."""
    written = timings.generation_n if generated is None else generated
    return {
        "prompt_tokens": timings.prompt_n,
        "completion_tokens": written,
        "total_tokens": timings.prompt_n + written,
        "prompt_tokens_details": {"cached_tokens": timings.reused_n},
        "completion_tokens_details": {"reasoning_tokens": n_reasoning},
    }


def llama_timings(timings: Timings) -> dict[str, float]:
    """The times in llama-server's names."""
    n, prompt_ms = timings.computed_n, timings.prompt_ms
    predicted, predicted_ms = timings.generation_n, timings.generation_ms
    told: dict[str, float] = {
        "cache_n": timings.reused_n,
        "prompt_n": n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / n if n else 0.0,
        "prompt_per_second": timings.prompt_tps,
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / (predicted - 1) if predicted > 1 else 0.0,
        "predicted_per_second": timings.generation_tps,
    }
    if timings.drafted_n:
        told |= {"draft_n": timings.drafted_n, "draft_n_accepted": timings.accepted_n}
    return told


def chat_logprob(one: TokenLogprob) -> dict[str, Any]:
    """A token of ``logprobs.content`` and the likeliest in its place: OpenAI's fields and llama-server's ``id``."""
    told = [{"id": token.token, **_logprob(token)} for token in (one, *one.top)]
    return {**told[0], "top_logprobs": told[1:]}


def plain_logprob(one: TokenLogprob) -> dict[str, Any]:
    """The same where the protocol knows no ids of tokens: Responses and Ollama."""
    return {**_logprob(one), "top_logprobs": [_logprob(other) for other in one.top]}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    """``bytes`` are the token's own, also where it is only part of a character and its text is U+FFFD."""
    return {"token": one.text, "logprob": finite(one.logprob), "bytes": list(one.bytes)}


def finite(logprob: float | None) -> float:
    """JSON has no infinity: what cannot be is told as OpenAI does."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob
