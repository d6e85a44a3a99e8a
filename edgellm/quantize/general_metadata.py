"""The ``general.*`` keys of a converted checkpoint: name, size, licence, origin, recommended sampling.

From config.json, generation_config.json and the head of the model card, under the names llama.cpp's converter uses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.errors import FormatError
from edgellm.formats.file_types import size_label
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf_header import TypedMetadata

MAX_CARD_NBYTES = 1 << 20
MAX_CARD_HEAD = 1 << 16  # characters
MAX_TEXT = 1000
MAX_LIST = 100
# generation_config.json -> general.sampling.*
SAMPLING = {
    "top_k": ("top_k", "INT32"),
    "top_p": ("top_p", "FLOAT32"),
    "min_p": ("min_p", "FLOAT32"),
    "temperature": ("temp", "FLOAT32"),
    "repetition_penalty": ("penalty_repeat", "FLOAT32"),
}
# what a GGUF file has no name for -> values that ask for nothing
UNSAID: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({},),
    "stop_strings": ([],),
    "top_h": (),
    "typical_p": (1,),
}


def general_metadata(checkpoint: Checkpoint, n_params: int) -> TypedMetadata:
    """All that is known; nothing for what the files leave out."""
    card = _card(checkpoint)
    found = _sampling(checkpoint)
    found["general.name"] = (_title(checkpoint), "STRING")
    found["general.size_label"] = (size_label(n_params), "STRING")
    for key, name in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        value = card.get(key)
        if isinstance(value, list):
            value = ",".join(_texts(value))
        if isinstance(value, str):
            found[f"general.{name}"] = (value[:MAX_TEXT], "STRING")
    found |= _base_models(card)
    tags = _texts(card.get("tags")) + _texts(card.get("pipeline_tag"))
    if tags:
        found["general.tags"] = (tags, "ARRAY[STRING]")
    languages = _texts(card.get("language", card.get("languages")))
    if languages:
        found["general.languages"] = (languages, "ARRAY[STRING]")
    return found


def _sampling(checkpoint: Checkpoint) -> TypedMetadata:
    """The recommended sampling. FormatError ``CHECKPOINT_CONFIG`` for a value that is no number."""
    config = checkpoint.json("generation_config.json") or {}
    if config.get("do_sample") is False:
        return {"general.sampling.temp": (0.0, "FLOAT32")}  # the likeliest token, whatever the rest says
    found: TypedMetadata = {}
    for key, (name, kind) in SAMPLING.items():
        value = config.get(key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 31
        if not number or (kind == "INT32" and value != int(value)):
            raise FormatError(
                f"{checkpoint.folder.name}/generation_config.json: {key} is {short(value)}, expected a number. "
                f"{PULL_AGAIN}",
                code="CHECKPOINT_CONFIG",
            )
        found[f"general.sampling.{name}"] = (int(value) if kind == "INT32" else value, kind)
    if config.get("repetition_penalty") not in (None, 1):
        found["general.sampling.penalty_last_n"] = (-1, "INT32")  # transformers counts all tokens
    return found


def generation_notes(checkpoint: Checkpoint) -> list[str]:
    """What generation_config.json asks for beside, by name."""
    config = checkpoint.json("generation_config.json") or {}
    asked = [key for key, nothing in UNSAID.items() if config.get(key) is not None and config[key] not in nothing]
    if not asked:
        return []
    return [f"generation_config.json asks for {', '.join(asked)}, which a GGUF file cannot say: it is left out."]


def folder_name(folder: Path) -> str:
    """The name of a checkpoint's folder, of the repository where it lies in the cache of the hub's own client."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _title(checkpoint: Checkpoint) -> str:
    """A readable name: that of the repository, where config.json has it, else of the folder."""
    named = checkpoint.config.get("_name_or_path")
    repository = isinstance(named, str) and named.count("/") == 1 and not named.startswith((".", "/", "~"))
    name = named.split("/")[1] if repository and isinstance(named, str) else folder_name(checkpoint.folder)
    words = name[:MAX_TEXT].replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not re.match(r"v?\d", w) else w for w in words) or "model"


def _base_models(card: dict[str, Any]) -> TypedMetadata:
    found: TypedMetadata = {}
    models = [name for name in _texts(card.get("base_model")) if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    if models:
        found["general.base_model.count"] = (len(models), "UINT32")
    for i, name in enumerate(models):
        owner, repository = name.split("/")
        found[f"general.base_model.{i}.name"] = (repository.replace("-", " "), "STRING")
        found[f"general.base_model.{i}.organization"] = (owner, "STRING")
        found[f"general.base_model.{i}.repo_url"] = (f"https://huggingface.co/{name}", "STRING")
    return found


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text[:MAX_TEXT] for text in values[:MAX_LIST] if isinstance(text, str)]


def _card(checkpoint: Checkpoint) -> dict[str, Any]:
    """The YAML head of README.md; empty for a card without one, or one that cannot be read."""
    try:
        text = checkpoint.text("README.md", MAX_CARD_NBYTES) or ""
    except FormatError as error:
        if error.code == "CHECKPOINT_LINK":
            raise
        return {}  # a card that is no text, or too long: the model is the same without it
    match = re.match(r"---\r?\n(.*?)\r?\n---", text[:MAX_CARD_HEAD], re.DOTALL)
    if match is None or "&" in match[1]:  # anchors can grow a few lines into gigabytes
        return {}
    import yaml  # type: ignore[import-untyped]  # huggingface_hub brings it

    try:
        head = yaml.safe_load(match[1].replace("\t", "  "))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}
