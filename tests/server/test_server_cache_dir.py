"""``--cache-dir``: what a server has read, its next start need not read again; clients see it in the usage."""

from __future__ import annotations

from pathlib import Path

import tiny_models
from server_client import client_of

from edgellm.loading import LoadOptions
from edgellm.server.models import ModelEntry, Models
from edgellm.server.server import Server

CHAT = "/v1/chat/completions"


def asked(path: Path, folder: Path, text: str) -> tuple[str, int, int]:
    """The answer of a server that has just started, how many tokens the prompt had and how many of them were known."""
    options = LoadOptions(n_ctx=4096, kv_overrides={"llama.context_length": 4096}, cache_dir=folder)
    with client_of(Server(Models([ModelEntry(("tiny",), path)], options))) as client:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        reply = client.post(CHAT, json=body).json()
        usage = reply["usage"]
        known = usage["prompt_tokens_details"]["cached_tokens"]
        return reply["choices"][0]["message"]["content"], usage["prompt_tokens"], known


def test_a_long_prefix_costs_only_its_tail_after_a_restart(tmp_path: Path) -> None:
    path, folder, prefix = tiny_models.write_tiny_model(tmp_path / "tiny.gguf"), tmp_path / "cache", "river 17 " * 400
    first = asked(path, folder, f"{prefix} first?")
    assert first[1] > 3000 and first[2] == 0
    again = asked(path, folder, f"{prefix} first?")
    assert again[0] == first[0] and first[1] - again[2] <= 33
    other = asked(path, folder, f"{prefix} another one?")
    assert other[1] - other[2] < 70
    assert other[0] == asked(path, tmp_path / "new", f"{prefix} another one?")[0]
