"""How much of each loaded adapter a request has. Light: the engine knows of adapters no more than this."""

from __future__ import annotations

from typing import NamedTuple


class AdapterScales(NamedTuple):
    """The scale of every loaded adapter, () where a request has none.

    variant   names them and their scales for the prefix cache: what they have computed no other request finds
    """

    values: tuple[float, ...] = ()
    variant: str = ""


NO_ADAPTERS = AdapterScales()
