"""How the weights of a checkpoint are kept: plain, or packed by one of the schemes below, one file for each.

A scheme is found by ``quant_method`` of config.json's ``quantization_config``. Its file has ``weights(config, parts)``:
the parameters it packs, by name, each decoded row by row when it is asked for.
"""

from __future__ import annotations

import importlib

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoints.scheme_keys import check_scheme_keys
from edgellm.formats.checkpoints.weight import Parts, Weight, plain
from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short

__all__ = ["SCHEMES", "Weight", "open_weights", "scheme_of"]

SCHEMES: dict[str, str] = {
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "fbgemm_fp8": "fp8",
    "fp8": "fp8",
    "gptq": "gptq",
    "hqq": "hqq",
    "mlx": "mlx",
    "modelopt": "modelopt",
    "mxfp4": "mxfp4",
}
"""``quant_method`` -> the module here that decodes it."""


def scheme_of(checkpoint: Checkpoint) -> str:
    """The ``quant_method``, "" for a checkpoint that is not quantized. UnsupportedError for an unknown one."""
    config = checkpoint.quantization
    if config is None:
        return ""
    method = config.get("quant_method")
    if method is None and ("load_in_4bit" in config or "load_in_8bit" in config):
        method = "bitsandbytes"
    if method is None and "bits" in config and "group_size" in config:
        method = "mlx"
    if not isinstance(method, str) or method not in SCHEMES:
        raise UnsupportedError(
            f"{checkpoint.folder.name}: is quantized by {short(method)}; edgellm decodes {', '.join(sorted(SCHEMES))}. "
            "Take a checkpoint in one of these, or the one that is not quantized.",
            code="CHECKPOINT_SCHEME",
        )
    modules = (name.removesuffix(".weight") for name in checkpoint.tensors) if method == "mlx" else ()
    check_scheme_keys(checkpoint.folder.name, config, modules)
    return method


def open_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Every parameter of the checkpoint by its plain name (``....weight``), in the order of the files."""
    scheme = scheme_of(checkpoint)
    parts = Parts(checkpoint.tensors, scheme)
    packed: dict[str, Weight] = {}
    if scheme:
        module = importlib.import_module(f"{__name__}.{SCHEMES[scheme]}")
        packed = module.weights(checkpoint.quantization, parts)
    rest = {name: plain(tensor) for name, tensor in checkpoint.tensors.items() if name not in parts.used}
    return rest | packed
