"""How full a cache is: what requests hold of it, and what they will want."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("msgspec", reason="the server needs its extra: pip install edgellm[server]")
pytest.importorskip("gguf", reason="the judge of files: pip install gguf")

from tiny_models import write_tiny_model

import edgellm
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.server.metrics import cache_used, cache_wanted


def test_requests_hold_blocks_and_want_room_for_what_is_not_read_yet(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1)
    with edgellm.load(model, n_ctx=256, n_threads=1) as llm:
        engine: Any = llm.engine
        (n_blocks,) = engine.cache.pool.n_blocks
        assert cache_used(engine) == cache_wanted(engine) == 0
        chunks = llm.stream([5] * 96, max_tokens=128, ignore_eos=True, temperature=0)
        next(chunks)
        assert 3 / n_blocks <= cache_used(engine) <= 1 and cache_wanted(engine) >= cache_used(engine)
        chunks.close()

    def request(n_tokens: int, n_held: int | None, whole: bool = False) -> Any:
        sequence = None if n_held is None else SimpleNamespace(length=n_held)
        return SimpleNamespace(tokens=[0] * n_tokens, sequence=sequence, whole=whole)

    groups = [SimpleNamespace(kind="all"), SimpleNamespace(kind="window"), SimpleNamespace(kind="state")]
    cache = SimpleNamespace(n_used=lambda: (2, 1, 3), pool=SimpleNamespace(groups=groups, n_blocks=(8, 4, 4)))
    waiting = [request(64, 60), request(4 * BLOCK_TOKENS, None), request(500, None, whole=True)]
    engine = SimpleNamespace(cache=cache, scheduler=SimpleNamespace(requests=waiting))
    assert cache_used(engine) == 3 / 4, "of the group that is fullest"
    assert cache_wanted(engine) == 3 / 4 + (4 * BLOCK_TOKENS + 4) / (8 * BLOCK_TOKENS)
    cache.pool.groups, cache.pool.n_blocks, cache.n_used = (), (), tuple
    assert cache_used(engine) == cache_wanted(engine) == 0, "a model that keeps nothing"
