"""Matrices packed by the schemes of quantized checkpoints: (config, tensors of a module, the matrix they stand for).

Where a scheme's own package can be had it packs and unpacks; else the layout is written down here a second time, the
slow and plain way, from the scheme's published formula.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Packed = tuple[dict[str, Any], dict[str, Any], np.ndarray]
GROUP = 32


def _integers(rng: np.random.Generator, w: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, ...]:
    """q, z, scale of the groups of a matrix: (n_out, n_in), (n_out, n_groups), (n_out, n_groups) in float16."""
    groups = w.reshape(w.shape[0], -1, size)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / (2**bits - 1), 1e-4).astype(np.float16)
    zero = np.clip(np.round(-low / scale.astype(np.float32)), 1, 2**bits - 1).astype(np.int64)
    q = np.clip(np.round(groups / scale[..., None].astype(np.float32)) + zero[..., None], 0, 2**bits - 1)
    return q.reshape(w.shape).astype(np.int64), zero, scale


def _bit_rows(numbers: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) numbers along the first axis as int32 words (n * bits / 32, m), bit by bit."""
    stream = (numbers[:, None, :] >> np.arange(bits)[None, :, None] & 1).reshape(-1, numbers.shape[1])
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0))).reshape(-1, 32, numbers.shape[1])
    return (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)[:, None]).sum(1).astype(np.uint32).view(np.int32)


def gptq(w: np.ndarray, rng: np.random.Generator, bits: int = 4, *, act_order: bool, form: str) -> Packed:
    """GPTQ; with ``act_order`` the inputs of a group lie anywhere."""
    n_in = w.shape[1]
    order = rng.permutation(n_in) if act_order else np.arange(n_in)
    q_sorted, zero, scale = _integers(rng, w[:, order], bits, GROUP)
    q = np.empty_like(q_sorted)
    q[:, order] = q_sorted
    g_idx = np.empty(n_in, np.int32)
    g_idx[order] = np.arange(n_in) // GROUP
    stored_zero = zero - 1 if form == "gptq" else zero
    tensors = {
        "qweight": _bit_rows(q.T, bits),
        "qzeros": _bit_rows(stored_zero, bits).T.copy(),
        "scales": scale.T.copy(),
        "g_idx": g_idx,
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": act_order,
        "checkpoint_format": form,
    }
    return config, tensors, scale.astype(np.float32)[:, g_idx] * (q - zero[:, g_idx]).astype(np.float32)


def awq(w: np.ndarray, rng: np.random.Generator) -> Packed:
    """AWQ's GEMM layout: output 8 c + order[i] in nibble i of word c."""
    q, zero, scale = _integers(rng, w, 4, GROUP)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(numbers: np.ndarray) -> np.ndarray:  # (n, n_out) -> (n, n_out / 8)
        eights = numbers.reshape(len(numbers), -1, 8)
        return sum(eights[:, :, order[i]] << 4 * i for i in range(8)).astype(np.uint32).view(np.int32)

    tensors = {"qweight": words(q.T), "qzeros": words(zero.T), "scales": scale.T.copy()}
    group = np.arange(w.shape[1]) // GROUP
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return config, tensors, scale.astype(np.float32)[:, group] * (q - zero[:, group]).astype(np.float32)


def bitsandbytes_4bit(w: np.ndarray, rng: np.random.Generator, kind: str, *, nested: bool) -> Packed:
    """NF4 and FP4 by the package itself."""
    torch = pytest.importorskip("torch", reason="bitsandbytes packs torch tensors")
    functional = pytest.importorskip("bitsandbytes.functional", reason="the package judges its own format")
    packed, state = functional.quantize_4bit(torch.tensor(w), quant_type=kind, compress_statistics=nested)
    wanted = functional.dequantize_4bit(packed, state).numpy()
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors, wanted


def bitsandbytes_int8(w: np.ndarray, rng: np.random.Generator) -> Packed:
    """LLM.int8: rows times their largest size over 127."""
    largest = np.abs(w).max(axis=1).astype(np.float32)
    q = np.round(w * (127 / largest)[:, None]).astype(np.int8)
    tensors = {"weight": q, "SCB": largest, "weight_format": np.zeros((), np.uint8)}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, q * (largest / np.float32(127))[:, None]


HQQ_SHIFTS = {8: [0], 4: [4, 0], 3: [27, 24, 21, 18, 15, 12, 9, 6, 3, 0], 2: [6, 4, 2, 0], 1: [7, 6, 5, 4, 3, 2, 1, 0]}


def hqq(w: np.ndarray, rng: np.random.Generator, bits: int, axis: int, *, as_float: bool = False) -> Packed:
    """HQQ: zero points are no whole numbers; rows of the grouped matrix are packed a part at a time."""
    size = 64
    grouped = w.reshape(-1, size) if axis == 1 else w.reshape(size, -1)
    low, high = grouped.min(axis=axis, keepdims=True), grouped.max(axis=axis, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    zero = (-low / scale.astype(np.float32)).astype(np.float16)
    wide_scale, wide_zero = scale.astype(np.float32), zero.astype(np.float32)
    q = np.clip(np.round(grouped / wide_scale + wide_zero), 0, 2**bits - 1).astype(np.int64)
    shifts = HQQ_SHIFTS[bits]
    padded = np.pad(q, ((0, -len(q) % len(shifts)), (0, 0))).reshape(len(shifts), -1, q.shape[1])
    packed = sum(part << shift for part, shift in zip(padded, shifts, strict=True))
    packed = packed.astype(np.int32 if bits == 3 else np.uint8)
    packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[bits]
    tensors = {
        "W_q": packed.view(np.float16) if as_float else packed,
        "scale": scale,
        "zero": zero,
        "shape": np.array(w.shape, np.int64),
        "axis": np.array(axis, np.int32),
        "nbits": np.array(bits, np.int32),
        "group_size": np.array(size, np.int32),
        "packing": np.frombuffer(packing.encode(), np.uint8).copy(),
        "view_as_float": np.array(as_float, np.uint8),
        "encoded_state_dict": np.array(1, np.uint8),
        "quant_scale": np.array(0, np.uint8),
    }
    wanted = ((q.astype(np.float32) - wide_zero) * wide_scale).reshape(w.shape)
    return {"quant_method": "hqq", "quant_config": {}}, tensors, wanted


def fp8(w: np.ndarray, rng: np.random.Generator, kind: str, scales: str) -> Packed:
    """8-bit floats of torch, with scales for all, each row or blocks."""
    torch = pytest.importorskip("torch", reason="torch judges 8-bit floats")
    dtype = getattr(torch, {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[kind])
    block = {"tensor": w.shape, "channel": (1, w.shape[1]), "block": (48, 40)}[scales]
    rows, columns = np.arange(w.shape[0]) // block[0], np.arange(w.shape[1]) // block[1]
    scale = (0.01 + 0.1 * rng.random((rows[-1] + 1, columns[-1] + 1))).astype(np.float32)
    spread = scale[rows][:, columns]
    packed = torch.tensor(w / spread).to(dtype)
    config: dict[str, Any] = {"quant_method": "fp8" if scales != "channel" else "fbgemm_fp8"}
    if scales == "block":
        config["weight_block_size"] = list(block)
    name = "weight_scale_inv" if scales == "block" else "weight_scale"
    return (
        config,
        {"weight": packed, name: scale.reshape(()) if scales == "tensor" else scale},
        (packed.float().numpy() * spread),
    )


def mxfp4(w: np.ndarray, rng: np.random.Generator) -> Packed:
    """gpt-oss's blocks, unpacked by transformers."""
    torch = pytest.importorskip("torch", reason="transformers unpacks torch tensors")
    module = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers judges gpt-oss's blocks")
    blocks = rng.integers(0, 256, (*w.shape[:-1], w.shape[1] // 32, 16), dtype=np.uint8)
    scales = rng.integers(118, 124, blocks.shape[:-1], dtype=np.uint8)
    wanted = module.convert_moe_packed_tensors(
        torch.tensor(blocks)[None], torch.tensor(scales)[None], dtype=torch.float32
    )
    tensors = {"weight_blocks": blocks, "weight_scales": scales}
    return {"quant_method": "mxfp4"}, tensors, wanted[0].T.numpy()


def compressed(w: np.ndarray, rng: np.random.Generator, form: str, **arguments: Any) -> Packed:
    """compressed-tensors by the package itself."""
    torch = pytest.importorskip("torch", reason="compressed-tensors packs torch tensors")
    reason = "the package judges its own format"
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    settings = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=settings, format=form)
    size = {"group": settings.group_size, "channel": w.shape[1], "tensor": w.size}.get(
        str(getattr(settings.strategy, "value", settings.strategy))
    )
    if size is None:
        rows, columns = settings.block_structure
        scale = np.abs(w.reshape(w.shape[0] // rows, rows, -1, columns)).max((1, 3)) / 100
    else:
        scale = np.abs(w.reshape(-1, size)).max(-1).reshape(-1, max(1, w.shape[1] // size)) / 2.0 ** (
            settings.num_bits - 1
        )
    state = {"weight": torch.tensor(w), "weight_scale": torch.tensor(scale.astype(np.float32))}
    if not settings.symmetric:
        zero = rng.integers(-3, 3, state["weight_scale"].shape)
        state["weight_zero_point"] = torch.tensor(zero, dtype=torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(dict(state), scheme)
    wanted = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings.model_dump(mode="json")}},
    }
    return config, packed, wanted


def nvfp4(w: np.ndarray, rng: np.random.Generator, method: str) -> Packed:
    """Four-bit floats packed by compressed-tensors; Model Optimizer names the parts otherwise and inverts a scale."""
    torch = pytest.importorskip("torch", reason="compressed-tensors packs torch tensors")
    reason = "the package judges its own format"
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason=reason)
    whole = torch.tensor([448 * 6 / np.abs(w).max()], dtype=torch.float32)
    amax = torch.tensor(np.abs(w.reshape(len(w), -1, 16)).max(-1))
    scale = (amax / 6 * whole).to(torch.float8_e4m3fn)
    numbers = scale.float() / whole
    packed = helpers.quantize_and_pack_fp4(torch.tensor(w), scale.float(), global_scale=whole, group_size=16)
    unpacked = helpers.unpack_fp4_from_uint8(packed, *w.shape, dtype=torch.float32).numpy()
    inputs = {"dynamic": "local", "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "input_activations": inputs, "weights": inputs | {"dynamic": False}}
    config: dict[str, Any] = {"quant_method": method, "config_groups": {"group_0": group}}
    if method == "modelopt":
        whole = 1 / whole
        wanted = unpacked * np.repeat((scale.float() * whole).numpy(), 16, axis=1)
        tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole[0]}
        return config | {"quant_algo": "NVFP4"}, tensors, wanted
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
    return config | {"format": "nvfp4-pack-quantized"}, tensors, unpacked * np.repeat(numbers.numpy(), 16, axis=1)


def modelopt_fp8(w: np.ndarray, rng: np.random.Generator) -> Packed:
    """One scale for the matrix."""
    _, tensors, wanted = fp8(w, rng, "e4m3", "tensor")
    renamed = {"weight_scale" if "scale" in name else name: value for name, value in tensors.items()}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt", "version": "0.29.0"}}
    return config, renamed, wanted


def mlx(w: np.ndarray, rng: np.random.Generator, bits: int) -> Packed:
    """MLX's affine mode: the words are one stream of bits along the inputs."""
    q, zero, scale = _integers(rng, w, bits, GROUP)
    bias = (-scale.astype(np.float32) * zero).astype(np.float16)
    tensors = {"weight": _bit_rows(q.T, bits).T.copy().view(np.uint32), "scales": scale, "biases": bias}
    spread = (np.repeat(part.astype(np.float32), GROUP, axis=1) for part in (scale, bias))
    by, plus = spread
    return {"bits": bits, "group_size": GROUP}, tensors, q.astype(np.float32) * by + plus


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}

PACKERS: dict[str, Callable[[np.ndarray, np.random.Generator], Packed]] = {
    **{
        f"gptq {bits} bits {order}{form}": (
            lambda w, rng, bits=bits, order=order, form=form: gptq(w, rng, bits, act_order=bool(order), form=form)
        )
        for bits in (2, 3, 4, 8)
        for order, form in (("", "gptq"), ("act-order ", "gptq"), ("act-order ", "gptq_v2"))
    },
    "awq": awq,
    **{
        f"bitsandbytes {kind}{' nested' * nested}": (
            lambda w, rng, kind=kind, nested=nested: bitsandbytes_4bit(w, rng, kind, nested=nested)
        )
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    },
    "bitsandbytes int8": bitsandbytes_int8,
    **{
        f"hqq {bits} bits axis {axis}": (lambda w, rng, bits=bits, axis=axis: hqq(w, rng, bits, axis))
        for bits in (8, 4, 3, 2, 1)
        for axis in (0, 1)
    },
    "hqq 4 bits as float": lambda w, rng: hqq(w, rng, 4, 1, as_float=True),
    **{
        f"fp8 {kind} {scales}": (lambda w, rng, kind=kind, scales=scales: fp8(w, rng, kind, scales))
        for kind in ("e4m3", "e5m2")
        for scales in ("tensor", "channel", "block")
    },
    "mxfp4": mxfp4,
    **{f"mlx {bits} bits": (lambda w, rng, bits=bits: mlx(w, rng, bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "compressed nvfp4": lambda w, rng: nvfp4(w, rng, "compressed-tensors"),
    "modelopt nvfp4": lambda w, rng: nvfp4(w, rng, "modelopt"),
    "modelopt fp8": modelopt_fp8,
    "compressed int4 group": lambda w, rng: compressed(w, rng, "pack-quantized", **INT4),
    "compressed int4 zero point": lambda w, rng: compressed(w, rng, "pack-quantized", **INT4, symmetric=False),
    "compressed int3": lambda w, rng: compressed(w, rng, "pack-quantized", **INT4 | {"num_bits": 3}),
    "compressed int8 packed": lambda w, rng: compressed(w, rng, "pack-quantized", **INT8, strategy="channel"),
    "compressed int8": lambda w, rng: compressed(w, rng, "int-quantized", **INT8, strategy="channel"),
    "compressed int8 zero point": lambda w, rng: compressed(
        w, rng, "int-quantized", **INT8, strategy="channel", symmetric=False
    ),
    "compressed fp8": lambda w, rng: compressed(w, rng, "float-quantized", **FLOAT8, strategy="channel"),
    "compressed fp8 tensor": lambda w, rng: compressed(w, rng, "float-quantized", **FLOAT8, strategy="tensor"),
    "compressed fp8 block": lambda w, rng: compressed(
        w, rng, "float-quantized", **FLOAT8, strategy="block", block_structure=[16, 32]
    ),
}

LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")
