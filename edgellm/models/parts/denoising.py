"""What models share that write by denoising: decoders whose tokens see both ways, and what their files say of masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgellm.formats.errors import FormatError
from edgellm.formats.findings import short
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Denoising, Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata
from edgellm.models.parts.encoder import check_sees_both_ways
from edgellm.models.parts.hparams import BROKEN_FILE, file_name

MASK, SHIFTS = "tokenizer.ggml.mask_token_id", "diffusion.shift_logits"


def build_denoiser(gguf: ModelFile, *, shifted: bool, algorithm: str, block: int, **decoder: Any) -> Program:
    """A decoder, see ``build_decoder``, all of whose tokens see all of the text.

    shifted            of a file that does not say it; this and the next two are as in ``Denoising``
    algorithm, block   as its makers have them
    """
    check_sees_both_ways(gguf)
    program = build_decoder(gguf, both_ways=True, **decoder)
    mask, shifted = _mask(gguf, program.n_vocab), _flag(gguf, shifted)
    return replace(program, denoising=Denoising(mask, shifted, algorithm, block))


def _mask(gguf: ModelFile, n_vocab: int) -> int:
    mask = gguf.metadata.get(MASK)
    if type(mask) is not int or not 0 <= mask < n_vocab:
        raise FormatError(
            f"{file_name(gguf)}: {MASK} is {short(mask)}, and a {gguf.architecture} model writes by replacing that "
            f"token: expected one of 0 to {n_vocab - 1}. {BROKEN_FILE}",
            code="MODEL_HPARAMS",
        )
    return mask


def _flag(gguf: ModelFile, default: bool) -> bool:
    value = gguf.metadata.get(SHIFTS, default)
    if not isinstance(value, bool):
        raise FormatError(
            f"{file_name(gguf)}: {SHIFTS} is {short(value)}, expected true or false. {BROKEN_FILE}",
            code="GGUF_KEY_TYPE",
        )
    return value


def denoising_metadata(config: CheckpointConfig, architecture: str, *, shifted: bool, mask: int) -> TypedMetadata:
    """The keys of masks, from config.json; ``mask`` where it does not name one."""
    return {
        f"{architecture}.attention.causal": (False, "BOOL"),
        SHIFTS: (shifted, "BOOL"),
        MASK: (config.integer("mask_token_id", mask), "UINT32"),
    }
