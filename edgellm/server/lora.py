"""The adapters that a request names, by id or by name, as the library takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgellm.server.chat_request import Lora
from edgellm.server.errors import invalid

if TYPE_CHECKING:
    from edgellm.adapters.scales import AdapterScales
    from edgellm.llm import LLM


def named_scales(llm: LLM, scales: Lora) -> dict[str, float] | None:
    """Scales by name; None for those that the model has. ServerError for an id that there is not."""
    if scales is None:
        return None
    names = [adapter.name for adapter in llm.adapters.loras]
    found = {}
    for one, scale in scales.items():
        if isinstance(one, int) and one >= len(names):
            raise invalid("lora", f"there is no adapter {one}; the model has {len(names)}.")
        found[names[one] if isinstance(one, int) else one] = scale
    return found


def adapter_scales(llm: LLM, scales: Lora) -> AdapterScales:
    """The same as the engine takes it."""
    return llm.adapter_scales(named_scales(llm, scales))
