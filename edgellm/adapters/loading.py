"""From what a caller names to open adapters: files, names and scales of ``edgellm.load`` and of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edgellm import arguments
from edgellm.adapters.chosen import LoadedAdapters, checked_scale
from edgellm.adapters.control_vector import open_control_vector
from edgellm.adapters.limits import MAX_ADAPTERS
from edgellm.adapters.lora import open_lora
from edgellm.adapters.rewrite import Adapter
from edgellm.formats.errors import ParameterError

_EXPECTED = "a path, a list of paths or of (path, scale), or a mapping of names to these"


class AdapterChoice(NamedTuple):
    """A file, what it is called ("" for the file's own name), and its scale.

    idle   the scale is for requests that name the adapter; those that say nothing have none of it
    """

    path: Path
    name: str = ""
    scale: float = 1.0
    idle: bool = False

    @property
    def own_name(self) -> str:
        """What requests call it."""
        return self.name or self.path.stem

    @property
    def named_scale(self) -> float:
        """The scale for requests that name it and say none: 1 where it was loaded to be at rest."""
        return self.scale or 1.0


def adapter_choices(what: str, given: Any) -> tuple[AdapterChoice, ...]:
    """Files as a caller gives them: see ``_EXPECTED``. ParameterError for anything else."""
    if given is None:
        return ()
    if isinstance(given, Mapping):
        named = list(arguments.mapping(what, given).items())
    elif isinstance(given, str | Path):
        named = [("", given)]
    else:
        named = [("", one) for one in arguments.items(what, given, _EXPECTED)]
    choices = []
    for name, one in named:
        if isinstance(one, AdapterChoice):
            choices.append(one)
            continue
        file, scale = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(file, str | Path):
            raise arguments.wrong(what, one, _EXPECTED)
        choices.append(AdapterChoice(arguments.path(what, file), name, checked_scale(what, scale)))
    if len(choices) > MAX_ADAPTERS:
        raise ParameterError(f"{what}: {len(choices)} files. Give up to {MAX_ADAPTERS}.")
    return tuple(choices)


def layer_range(given: Any) -> tuple[int, int] | None:
    """The first and last layer of control vectors; ParameterError for what is no such pair."""
    if given is None:
        return None
    pair = arguments.items("control_vector_layers", given, "two numbers of layers, from 1 on")
    if len(pair) != 2:
        raise arguments.wrong("control_vector_layers", given, "two numbers of layers, from 1 on")
    first = arguments.whole_number("control_vector_layers", pair[0], 1, 1 << 16)
    return first, arguments.whole_number("control_vector_layers", pair[1], first, 1 << 16)


def open_adapters(
    loras: Sequence[AdapterChoice], vectors: Sequence[AdapterChoice], layers: tuple[int, int] | None = None
) -> LoadedAdapters:
    """Open all of them; nothing stays open when one fails. Each has a name of its own.

    layers   the first and the last that control vectors count in, all of theirs by default
    """
    opened, adapters, taken = LoadedAdapters(), list[Adapter](), dict[str, Path]()
    try:
        for choices, open_one in ((loras, open_lora), (vectors, partial(open_control_vector, layers=layers))):
            taken.clear()
            for choice in choices:
                adapter = open_one(choice.path, choice.name or None)
                adapters.append(adapter)
                if adapter.name in taken:
                    raise ParameterError(
                        f"{choice.path} and {taken[adapter.name]} are both called {adapter.name!r}. Give one of them "
                        "another name, as NAME=FILE."
                    )
                taken[adapter.name] = choice.path
    except BaseException:
        for adapter in adapters:
            adapter.close()
        raise
    choices = (*loras, *vectors)
    opened.adapters, opened.named = adapters, [choice.named_scale for choice in choices]
    opened.scales = [0.0 if choice.idle else choice.scale for choice in choices]
    return opened
