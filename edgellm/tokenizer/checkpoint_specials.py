"""What a checkpoint says about its special tokens and its chat template, as GGUF keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from edgellm.formats.checkpoint import TEMPLATES, Checkpoint
from edgellm.formats.errors import FormatError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf_header import TypedMetadata

# name in tokenizer_config.json -> GGUF key, which spells one of them without its second "a"
SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}


PAIR_PROCESSORS = ("BertProcessing", "RobertaProcessing")  # both put marks around every text
STANDS_FOR = {"bos": "cls", "eos": "sep"}


class Specials:
    """Reads tokenizer_config.json, and where it is silent special_tokens_map.json, config.json, tokenizer.json.

    ids   text -> id of the vocabulary
    """

    def __init__(
        self, checkpoint: Checkpoint, ids: Mapping[str, int], description: Mapping[str, Any] | None, kind: str
    ) -> None:
        self.checkpoint, self.ids, self.kind = checkpoint, ids, kind
        self.description = description
        self.generation: Mapping[str, Any] = checkpoint.json("generation_config.json") or {}
        self.n_vocab = max(ids.values(), default=-1) + 1
        self.config = (checkpoint.json("special_tokens_map.json") or {}) | (
            checkpoint.json("tokenizer_config.json") or {}
        )

    def metadata(self) -> TypedMetadata:
        """Ids, whether BOS and EOS are added, other ids that end an answer, and templates."""
        found: TypedMetadata = {}
        for name, key in SPECIAL_KEYS.items():
            token_id = self._id(name)
            if token_id is not None:
                found[f"tokenizer.ggml.{key}"] = (token_id, "UINT32")
        for name in ("bos", "eos"):
            wanted = self._is_added(name) and f"tokenizer.ggml.{name}_token_id" in found
            found[f"tokenizer.ggml.add_{name}_token"] = (wanted, "BOOL")
        if (doubled := self._separates()) is not None:
            found["tokenizer.ggml.add_sep_token"] = (doubled, "BOOL")
        suppressed = self._ids("generation_config.json", self.generation, "suppress_tokens") or []
        if suppressed:
            found["tokenizer.ggml.suppress_tokens"] = (suppressed, "ARRAY[INT32]")
        ends = self._end_ids()
        if set(ends) - {found.get("tokenizer.ggml.eos_token_id", (None,))[0]}:
            found["tokenizer.ggml.eos_token_ids"] = (ends, "ARRAY[INT32]")
        return found | self._templates()

    def texts(self) -> list[str]:
        """The tokens that transformers keeps apart from words because of their part, whatever the vocabulary says."""
        found = [self._text(name) for name in SPECIAL_KEYS]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            given = self.config.get(key)
            several = list(given.values()) if isinstance(given, dict) else given
            found += [_content(entry) for entry in several] if isinstance(several, list) else []
        return [text for text in found if text is not None]

    def _text(self, name: str) -> str | None:
        """The token of this part. An encoder's text begins with [CLS] and ends with [SEP], where nothing else does."""
        text = _content(self.config.get(f"{name}_token"))
        if text is None and self.description is not None and name in STANDS_FOR:
            text = _content(self.config.get(f"{STANDS_FOR[name]}_token"))
        return text

    def _id(self, name: str) -> int | None:
        text = self._text(name)
        if text is not None and text in self.ids:
            return self.ids[text]
        for config in (self.checkpoint.config, self.checkpoint.text_config, self.generation):
            value = config.get(f"{name}_token_id")
            if type(value) is int and 0 <= value < self.n_vocab:
                return value
        return None

    def _end_ids(self) -> list[int]:
        """The ids that end an answer, as generation_config.json says, else config.json."""
        settings = {"generation_config.json": self.generation, "config.json": self.checkpoint.config}
        for file, config in [*settings.items(), ("config.json", self.checkpoint.text_config)]:
            if (ids := self._ids(file, config, "eos_token_id")) is not None:
                return ids
        return []

    def _ids(self, file: str, config: Mapping[str, Any], key: str) -> list[int] | None:
        """The ids of one setting, without those that no answer holds; None where it is silent. FormatError."""
        value = config.get(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in ids):
            raise FormatError(
                f"{self.checkpoint.folder.name}/{file}: {key} is {short(value)}, expected token ids. {PULL_AGAIN}",
                code="CHECKPOINT_CONFIG",
            )
        return [i for i in ids if 0 <= i < self.n_vocab]

    def _is_added(self, name: str) -> bool:
        """Whether a text gets this token: as the config says, else as the template of tokenizer.json does it."""
        given = self.config.get(f"add_{name}_token")
        if isinstance(given, bool):
            return given
        if self.description is None:
            return self.kind == "llama" and name == "bos"
        if self._processors(*PAIR_PROCESSORS):
            return True
        for single in self._post_templates("single"):
            marks = [piece.get("SpecialToken") for piece in single if isinstance(piece, dict)]
            mark = (marks or [None])[0 if name == "bos" else -1]
            if len(marks) > 1 and isinstance(mark, dict) and mark.get("id") in (self._text(name), self._spelled(name)):
                return True
        return False

    def _spelled(self, name: str) -> str | None:
        """The text of a special token that only config.json names, by its id."""
        token_id = self._id(name)
        return next((text for text, i in self.ids.items() if i == token_id), None) if token_id is not None else None

    def _separates(self) -> bool | None:
        """Whether two texts of one input have a second mark between them, besides the one that ends a text; None where
        that is not said."""
        if self._processors("RobertaProcessing"):
            return True
        if self._processors("BertProcessing"):
            return False
        for pair in self._post_templates("pair"):
            texts = [i for i, piece in enumerate(pair) if isinstance(piece, dict) and "Sequence" in piece]
            if len(texts) == 2 and texts[1] > texts[0] + 1 and self.config.get("sep_token") is not None:
                return texts[1] - texts[0] == 3
        return None

    def _post_templates(self, name: str) -> Iterator[list[Any]]:
        """The pieces of "single" or "pair" in the templates of tokenizer.json."""
        for one in self._processors("TemplateProcessing"):
            if isinstance(pieces := one.get(name), list):
                yield pieces

    def _processors(self, *kinds: str) -> list[dict[str, Any]]:
        """The parts of these kinds of what tokenizer.json does to ids."""
        processor = (self.description or {}).get("post_processor")
        if not isinstance(processor, dict):
            return []
        several = processor.get("processors", [processor])
        return (
            [one for one in several if isinstance(one, dict) and one.get("type") in kinds]
            if isinstance(several, list)
            else []
        )

    def _templates(self) -> TypedMetadata:
        """The chat template, and further ones by name."""
        templates = self._named_templates()
        found: TypedMetadata = {}
        if "default" in templates:
            found["tokenizer.chat_template"] = (templates.pop("default"), "STRING")
        if templates:
            found["tokenizer.chat_templates"] = (list(templates), "ARRAY[STRING]")
            for name, text in templates.items():
                found[f"tokenizer.chat_template.{name}"] = (text, "STRING")
        if isinstance(declared := self.config.get("response_template"), dict):  # how the model writes its messages
            found["tokenizer.response_template"] = (json.dumps(declared, ensure_ascii=False), "STRING")
        return found

    def _named_templates(self) -> dict[str, str]:
        text = self.checkpoint.text("chat_template.jinja")
        if text is not None:
            others = self.checkpoint.files.names(".jinja", TEMPLATES)
            named = {PurePath(name).stem: self.checkpoint.text(name) for name in others}
            return {"default": text} | {name: other for name, other in named.items() if other is not None}
        given = self.config.get("chat_template")
        if given is None:
            given = (self.checkpoint.json("chat_template.json") or {}).get("chat_template")
        if isinstance(given, str):
            return {"default": given}
        if isinstance(given, dict):
            given = [{"name": name, "template": template} for name, template in given.items()]
        found = {}
        for entry in given if isinstance(given, list) else ():
            if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template")):
                found[entry["name"]] = entry["template"]
        return found


def _content(entry: Any) -> str | None:
    """The text of a token, written alone or with its properties."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None
