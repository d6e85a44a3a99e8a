"""Qwen 3.5 and 3.6 (dense): three of four layers are gated delta-nets, the others attention whose output is gated.

Files store norm weights with the 1 already added, and value heads in the order in which key heads repeat.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import feed_forward
from edgellm.models.parts.checkpoint_form import CheckpointForm
from edgellm.models.parts.delta_net import apart_inputs, build_hybrid, read_delta_net
from edgellm.models.parts.delta_net_checkpoint import (
    DELTA_LAYER,
    DELTA_NUMBERS,
    DELTA_VECTORS,
    delta_metadata,
    value_columns,
    value_rows,
)


def build(gguf: ModelFile, *, nextn: bool = False) -> Program:
    """See ``build_hybrid``."""
    net = read_delta_net(gguf, tiled=True)
    inputs = apart_inputs(net)
    return build_hybrid(gguf, net, inputs=inputs, ffn=lambda m, blk: feed_forward(m, blk, "silu"), nextn=nextn)


CHECKPOINT = CheckpointForm(
    classes={
        "Qwen3_5ForCausalLM": "qwen3_5_text",
        "Qwen3_5ForConditionalGeneration": "qwen3_5",
        "Qwen3_5TextModel": "qwen3_5_text",
    },
    metadata=lambda config: delta_metadata(config, "qwen35"),
    layer=DELTA_LAYER,
    bare=DELTA_VECTORS,
    numbers=DELTA_NUMBERS,
    row_orders=value_rows,
    column_orders=value_columns,
    extra=lambda _: {},
    norm_shift=1.0,
)
