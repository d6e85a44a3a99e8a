"""The matrices that sentence-transformers keeps beside a checkpoint, behind the pooling: modules of the kind Dense."""

from __future__ import annotations

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoints import Weight
from edgellm.formats.checkpoints.weight import plain
from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.safetensors import SafetensorsFile

PROJECTION = "Dense"
NAMES = ("dense_2", "dense_3")
WEIGHT = "linear.weight"
LINEAR = ("", "torch.nn.modules.linear.Identity")  # curves that are none


def projections(
    checkpoint: Checkpoint, architecture: str, paths: list[str]
) -> tuple[TypedMetadata, dict[str, tuple[str, Weight]]]:
    """The sizes of these modules, in their order, and their matrices: GGUF's name -> (that in the files, the numbers).

    UnsupportedError for more of them than GGUF has names for, with a curve or with a bias; FormatError for a module
    without its file.
    """
    metadata: TypedMetadata = {}
    tensors: dict[str, tuple[str, Weight]] = {}
    if len(paths) > len(NAMES):
        raise UnsupportedError(f"modules.json: has {len(paths)} matrices behind the pooling, GGUF has names for two.")
    for name, path in zip(NAMES, paths, strict=False):
        curve = (checkpoint.json(f"{path}/config.json") or {}).get("activation_function", "")
        if curve not in LINEAR:
            raise UnsupportedError(
                f"{short(path)}/config.json: activation_function is {short(curve)}; edgellm converts projections "
                "without a curve. Take another model.",
                code="CHECKPOINT_CONFIG",
            )
        file = f"{path}/model.safetensors"
        if not checkpoint.files.has(file):
            raise FormatError(f"{short(file)}: is not there. {PULL_AGAIN}", code="CHECKPOINT_SHARD")
        stored = SafetensorsFile.open_in(checkpoint.files, file).tensors
        if list(stored) != [WEIGHT] or len(stored[WEIGHT].shape) != 2:
            raise UnsupportedError(
                f"{short(file)}: has {', '.join(map(short, list(stored)[:3]))}; edgellm converts projections of one "
                f"matrix ({WEIGHT}). {PULL_AGAIN}",
                code="MODEL_TENSOR_UNKNOWN",
            )
        tensors[f"{name}.weight"] = f"{file}: {WEIGHT}", plain(stored[WEIGHT])
        n_out, n_in = stored[WEIGHT].shape
        metadata[f"{architecture}.{name}_feat_in"] = (n_in, "UINT32")
        metadata[f"{architecture}.{name}_feat_out"] = (n_out, "UINT32")
    return metadata, tensors
