"""The settings that a chat may have: one list of names, types and ranges, for what comes from a file and what is typed.

Settings become arguments of ``load`` and ``stream``; a session file is untrusted, so nothing else may stand in it.
Sampling fields keep the ranges of ``SamplingParams``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from edgellm.formats.errors import ParameterError
from edgellm.sampling.options import parse_setting
from edgellm.sessions.records import shortly
from edgellm.stop import MAX_STOP_LENGTH, MAX_STOP_STRINGS

OVERFLOW_WAYS = ("ask", "drop_oldest", "stop")  # what to do when a message does not fit the context
NOT_SAVED = ("processors", "n_probs", "logprobs", "post_sampling_probs", "sampler_trace")  # a program's, not a chat's
MAX_TOKENS = 2**31 - 1
MAX_BIASES = 1 << 16
MAX_KWARGS_NBYTES = 1 << 16
RENDERING = frozenset((
    "self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "parse_special",
))  # fmt: skip


def checked(name: str, value: Any) -> Any:
    """The value of a setting in its plain form. ParameterError for a name that is none and a value that cannot work."""
    check = _CHECKS.get(name)
    if check is not None:
        return check(name, value)
    from edgellm.sampling import SamplingParams  # brings NumPy

    if name not in SamplingParams.__dataclass_fields__ or name in NOT_SAVED:
        raise ParameterError(f"{shortly(name)}: a chat has no such setting.")
    given = getattr(SamplingParams(**{name: value}), name)
    return list(given) if isinstance(given, tuple) else given


def typed(name: str, text: str) -> tuple[str, Any]:
    """The setting of any of its names, and the value that was typed, None for nothing. ParameterError as in checked."""
    if name.lstrip("-") in ("n", "predict", "n-predict", "n_predict"):
        name = "max_tokens"
    value: Any = text.strip()
    if not value:
        return name, None
    if name in ("n_ctx", "max_tokens"):
        try:
            value = int(value)
        except ValueError:
            raise ParameterError(f"{name} is {value!r}; it takes a number of tokens.") from None
    elif name == "stop":
        value = [part for part in value.split(";") if part]
    elif name != "context_overflow":
        name, value = parse_setting(name, value)
    return name, checked(name, value)


def checked_all(settings: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings that may stay, and a line about each other one."""
    if not isinstance(settings, Mapping):
        return {}, [f"settings: {type(settings).__name__}, expected names and values."]
    kept, refused = {}, []
    for name, value in settings.items():
        try:
            if value is not None:
                kept[str(name)] = checked(str(name), value)
        except ParameterError as error:
            refused.append(str(error))
    return kept, refused


def as_json(settings: Mapping[str, Any]) -> str:
    """Settings as JSON that every reader knows: a banned token is ``false``, since JSON has no infinity."""
    bias = settings.get("logit_bias")
    if bias:
        banned = {token: False if value == -math.inf else value for token, value in bias.items()}
        settings = {**settings, "logit_bias": banned}
    text = json.dumps(settings, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate would not go into a file


def _whole(least: int, greatest: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= greatest:
            raise ParameterError(f"{name}: got {shortly(value)}, expected an integer from {least} to {greatest}.")
        return value

    return check


def _context(name: str, value: Any) -> int:
    from edgellm.arguments import MAX_CONTEXT  # brings the engine

    return _whole(0, MAX_CONTEXT)(name, value)


def _way(name: str, value: Any) -> str:
    if value not in OVERFLOW_WAYS:
        raise ParameterError(f"{name}: got {shortly(value)}, expected one of {', '.join(OVERFLOW_WAYS)}.")
    return str(value)


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    fits = isinstance(texts, list | tuple) and len(texts) <= MAX_STOP_STRINGS
    if not fits or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts):
        limits = f"at most {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_LENGTH} characters"
        raise ParameterError(f"{name}: got {shortly(value)}, expected a list of texts, {limits}.")
    return list(texts)


def _samplers(name: str, value: Any) -> list[str]:
    from edgellm.sampling import SamplingParams

    order: Any = value if isinstance(value, str) else tuple(_texts(name, value))
    return list(SamplingParams(samplers=order).samplers)


def _biases(name: str, value: Any) -> dict[int, float]:
    from edgellm.sampling import SamplingParams

    if isinstance(value, Mapping) and len(value) > MAX_BIASES:
        raise ParameterError(f"{name}: got {len(value)} tokens, expected at most {MAX_BIASES}.")
    if isinstance(value, Mapping):  # JSON has no numbers as keys
        value = {_token(name, token): number for token, number in value.items()}
    return dict(SamplingParams(logit_bias=value).logit_bias)  # type: ignore[arg-type]


def _token(name: str, token: Any) -> Any:
    if not isinstance(token, str):
        return token
    if not (token.isascii() and token.isdecimal() and len(token) <= 10):
        raise ParameterError(f"{name}: {shortly(token)} is no token id.")
    return int(token)


def _template_names(name: str, value: Any) -> dict[str, Any]:
    """Names for the chat template, plain data under names that rendering does not use itself."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise ParameterError(f"{name}: got {shortly(value)}, expected an object such as {{'enable_thinking': false}}.")
    for key in value:
        if key in RENDERING or key.startswith("_"):
            raise ParameterError(f"{name}: {shortly(key)} is not for a setting to say.")
    try:
        nbytes = len(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        raise ParameterError(f"{name}: expected plain JSON without infinite numbers.") from None
    if nbytes > MAX_KWARGS_NBYTES:
        raise ParameterError(f"{name}: {nbytes} bytes, expected at most {MAX_KWARGS_NBYTES}.")
    return dict(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _whole(-1, MAX_TOKENS),
    "n_ctx": _context,
    "context_overflow": _way,
    "stop": _texts,
    "dry_sequence_breakers": _texts,
    "samplers": _samplers,
    "logit_bias": _biases,
    "template_kwargs": _template_names,
}
