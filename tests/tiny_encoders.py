"""Tiny GGUF encoders for tests: random transformers models, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import add_value

from edgellm.models import architectures

ENCODERS = (
    "bert",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "modern-bert",
    "nomic-bert",
    "nomic-bert-moe",
)
"""Architectures that give hidden states and no logits."""
DENOISERS = ("dream", "llada", "llada-moe")
"""Architectures whose tokens see both ways and that have logits: theirs is test_denoising.py."""
DECODERS = [architecture for architecture in architectures() if architecture not in (*ENCODERS, *DENOISERS)]

N_LAYER, N_EMBD, N_HEAD, N_FF = 2, 48, 4, 80
"""Heads of 12: no multiple of any register."""

WORDS = "the quick brown fox jumps over lazy dog a cat sleeps rivers run to sea what is capital of france paris"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces() -> tuple[list[str], list[int]]:
    """A WordPiece vocabulary as GGUF has it, with its types: every word of WORDS, every letter and digit."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"]
    tokens = [*SPECIAL, *("\u2581" + word for word in dict.fromkeys([*WORDS.split(), *letters])), *letters]
    return tokens, [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))


def tokenizer_keys() -> dict[str, Any]:
    """The metadata of that vocabulary."""
    tokens, types = word_pieces()
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.token_type_count": 2,
    }


def random_bert(kind: str = "BertModel", **options: Any) -> Any:
    """A random model of transformers with this vocabulary, every tensor filled, norms and biases too."""
    torch = pytest.importorskip("torch", reason="the judge of encoders is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the judge of encoders is transformers")
    sizes = {
        "vocab_size": len(word_pieces()[0]),
        "hidden_size": N_EMBD,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "intermediate_size": N_FF,
        "max_position_embeddings": 700,
    }
    torch.manual_seed(7)
    model = getattr(transformers, kind)(transformers.BertConfig(**sizes | options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.2 if parameter.dim() > 1 else 0.1
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + size * torch.randn_like(parameter))
    return model


def write_bert(path: Path, model: Any, pooling: int | None = 1, metadata: dict[str, Any] | None = None) -> Path:
    """The model as F32 GGUF; a classifier's pooler is ``cls``, its matrix ``cls.output``."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, model.config.num_hidden_layers)
    keys = tokenizer_keys() | {
        "bert.block_count": config.num_hidden_layers,
        "bert.context_length": config.max_position_embeddings,
        "bert.embedding_length": config.hidden_size,
        "bert.feed_forward_length": config.intermediate_size,
        "bert.attention.head_count": config.num_attention_heads,
        "bert.attention.layer_norm_epsilon": config.layer_norm_eps,
        "bert.attention.causal": False,
    }
    if pooling is not None:
        keys["bert.pooling_type"] = pooling
    writer = gguf.GGUFWriter(path, "bert")
    for key, value in (keys | (metadata or {})).items():
        add_value(writer, key, value)
    classifies = hasattr(model, "classifier")
    for stored, tensor in model.state_dict().items():
        name = stored.removeprefix("bert.")
        head = {"pooler.dense": "cls", "classifier": "cls.output"}.get(name.rpartition(".")[0])
        if head and not classifies:
            continue
        found = f"{head}.{name.rpartition('.')[2]}" if head else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, stored
        writer.add_tensor(found, np.ascontiguousarray(tensor.float().numpy()))
    write_out(writer)
    return Path(path)


def write_out(writer: gguf.GGUFWriter) -> None:
    """The whole file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
