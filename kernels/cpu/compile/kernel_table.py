"""Every CPU kernel by name: the module and function it comes from. Imports none of them.

A name is what the cache, ``edgellm doctor`` and the executor call a kernel. ``function(name)`` imports numba.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cache_types import PACKED, TOKEN_TYPES
from edgellm.kernels.cpu.encoders import ENCODERS
from edgellm.kernels.cpu.weights import FLOAT, QUANTIZED

TAKE_A_FORM = ("make_matmul", "make_float_matmul", "make_panel_matmul", "make_expert_matmul", "make_self_attention")
"""Products, by what makes their kernels."""
DECODE = "team_decode"
TEAM = ("team_publish", "team_lead", "team_work", DECODE)
TOP_K = "top_k"
"""Called by samplers and team_decode; no op has it."""
STREAM = "stream"
"""What read_bandwidth.py measures with; no op has it."""

# name -> (module, function, argument of a make_ function or None)
KERNELS: dict[str, tuple[str, str, str | None]] = {
    **{name: ("team", name, None) for name in TEAM},
    **{
        name: ("elementwise", name, None)
        for name in ("rms_norm", "quantize", "rope", "add", "add_scaled", "select_outputs", "store_kv")
    },
    **{name: ("elementwise", name, None) for name in ("scale", "split_heads", "join_heads")},
    **{kind: ("elementwise", "make_cap", kind) for kind in ("softcap", "clamp")},
    **{f"{kind}_gate": ("elementwise", "make_gate", kind) for kind in ("sigmoid", "softplus")},
    **{name: ("elementwise", name, None) for name in ("layer_norm", "add_rows")},
    **{
        f"gated_{kind}": ("elementwise", "make_gated_unit", kind)
        for kind in ("silu", "gelu", "gelu_erf", "clamped_swiglu")
    },
    **{f"activate_{kind}": ("elementwise", "make_activate", kind) for kind in ("gelu", "gelu_erf", "relu_squared")},
    "attention": ("attention", "make_attention", ""),
    "attention_latent": ("attention", "make_latent_attention", ""),
    "attention_typed": ("attention", "attention_typed", None),
    **{f"score_{name}": ("typed_attention", "make_score", name) for name in TOKEN_TYPES},
    **{f"weigh_{name}": ("typed_attention", "make_weigh", name) for name in TOKEN_TYPES},
    **{f"store_{name}": ("typed_store", "make_store", name) for name in TOKEN_TYPES},
    **{f"{part}_{name}": ("packed_attention", f"make_{part}", name) for name in PACKED for part in ("score", "weigh")},
    **{f"bound_keys_{name}": ("full_blocks", "make_bound_keys", name) for name in TOKEN_TYPES},
    **{name: ("full_blocks", name, None) for name in ("pack_kv", "choose_blocks")},
    "hadamard": ("elementwise", "hadamard", None),
    **{name: ("altup", name, None) for name in ("mix_streams", "add_to_streams", "match_magnitude", "scale_columns")},
    "gaussian_top_k": ("altup", "gaussian_top_k", None),
    "self_attention": ("self_attention", "make_self_attention", ""),
    **{name: ("short_conv", name, None) for name in ("short_conv", "causal_conv")},
    **{name: ("delta_net", name, None) for name in ("delta_gates", "delta_rule")},
    **{name: ("state_space", name, None) for name in ("ssm_gates", "ssm_scan", "gated_norm")},
    **{f"adapter_down_{quant.lower()}": ("adapters", "make_adapter_down", quant) for quant in FLOAT},
    **{f"adapter_up_{quant.lower()}": ("adapters", "make_adapter_up", quant) for quant in FLOAT},
    "add_direction": ("adapters", "add_direction", None),
    TOP_K: ("top_k", "top_k", None),
    STREAM: ("stream", "stream", None),
    **{f"matmul_{quant.lower()}": ("quantized_matmul", "make_matmul", quant) for quant in QUANTIZED},
    **{f"matmul_{quant.lower()}": ("float_matmul", "make_float_matmul", quant) for quant in FLOAT},
    **{f"matmul_texts_{quant.lower()}": ("float_panels", "make_panel_matmul", quant) for quant in FLOAT},
    "head_matmul_turned": ("turned_heads", "head_matmul_turned", None),
    **{name: ("experts", name, None) for name in ("route", "group_by_expert", "expert_sum")},
    **{f"expert_matmul_{quant.lower()}": ("experts", "make_expert_matmul", quant) for quant in (*QUANTIZED, *FLOAT)},
    **{f"embed_{quant.lower()}": ("embed", "make_embed", quant) for quant in (*QUANTIZED, *FLOAT)},
}


def function(name: str, form: str | None = None) -> Callable[..., None]:
    """The Python function of a kernel or an encoder, ready for ``jit.compile_object``. Imports numba (0.4 s).

    One function serves all forms, but a product has what only some can do, to multiply bytes, and tiles, and attention
    as many rows at once as there are registers for.
    """
    _, attribute, argument = _row(name)
    made = getattr(importlib.import_module(f"edgellm.kernels.cpu.{module(name).replace('/', '.')}"), attribute)
    if argument is None:
        return made
    given = () if argument == "" else (argument,)
    if attribute in ("make_attention", "make_latent_attention", "make_score", "make_weigh"):
        most = 4 if form in ("amx", "avx512_vnni") else 3
        return made(*given, most)
    return made(*given, form) if attribute in TAKE_A_FORM else made(*given)


def module(name: str) -> str:
    """The file below kernels/cpu that a kernel or an encoder comes from, without its suffix."""
    return ("encoders/" if name in ENCODERS else "kernels/") + _row(name)[0]


def _row(name: str) -> tuple[str, str, str | None]:
    known = {**KERNELS, **ENCODERS}
    if name not in known:
        raise UnsupportedError(f"there is no CPU kernel {name!r}; known: {', '.join(known)}", code="KERNEL_UNKNOWN")
    return known[name]
