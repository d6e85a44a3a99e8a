"""llama-server's ``/lora-adapters``: the adapters of a model, and how much of each answers have that do not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from edgellm.server.bodies import Body
from edgellm.server.chat_request import checked_lora
from edgellm.server.http import Call, Json, Reply, Route
from edgellm.server.lora import named_scales
from edgellm.server.protocols.llama_wire import error_body
from edgellm.server.protocols.openai_wire import LoraScales

if TYPE_CHECKING:
    from edgellm.llm import LLM

__all__ = ["ROUTES", "error_body"]


class LoraBody(Body, kw_only=True):
    """The scales of adapters, those that are not named 0; the body is the list itself."""

    listed: ClassVar[str] = "adapters"

    adapters: LoraScales


async def adapters(call: Call) -> Reply:
    """Of the model ``?model=``, or of the first."""
    async with call.server.models.lease(call.query.get("model")) as entry:
        return Json(_told(entry.leased))


def _told(llm: LLM) -> list[dict[str, Any]]:
    told = []
    for number, adapter in enumerate(llm.adapters.loras):
        said = {key: adapter.gguf.metadata.get(f"adapter.lora.{key}") for key in ("task_name", "prompt_prefix")}
        told.append(
            {
                "id": number,
                "path": adapter.path.name,
                "name": adapter.name,
                "scale": llm.adapters.scales[number],
                **{key: value if isinstance(value, str) else "" for key, value in said.items()},
            }
        )
    return told


async def set_adapters(call: Call) -> Reply:
    """From the next answer on; those that are not named rest."""
    scales = checked_lora("adapters", call.body.adapters)
    async with call.server.models.lease(call.query.get("model")) as entry:
        named = named_scales(entry.leased, scales)
        entry.leased.set_adapters(named)
        entry.lora = named
        return Json({"success": True})


ROUTES = (
    Route("GET", "/lora-adapters", adapters, summary="The adapters of a model"),
    Route("POST", "/lora-adapters", set_adapters, body=LoraBody, summary="How much of each answers have"),
)
